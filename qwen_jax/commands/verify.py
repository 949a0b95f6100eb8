"""Reads every shard and names each fault: checksums, structure, shapes, values that are not finite, samples
that are missing or there twice. Exit code 1 if there is any.

  python -m qwen_jax verify activations
  python -m qwen_jax verify gs://your-bucket/activations --streams data/streams/streams.json
  python -m qwen_jax verify activations/worker_0 --repair
"""

import tempfile
from argparse import Namespace
from pathlib import Path

from qwen_jax.cli import FlagParser, positive_int, say
from qwen_jax.commands.arguments import add_paths
from qwen_jax.reading.runs import BucketFiles, DescribedRun, LocalFiles, Run, open_runs
from qwen_jax.reading.verify import Fault, Verified, verify_runs

FAULTS_FOUND = 1


def add_flags(parser: FlagParser) -> None:
    add_paths(parser)
    parser.flag("streams", "streams.json of the workers' streams: none may be missing")
    parser.flag("jobs", "shards to read, and to hold in memory, at a time", default=2, type=positive_int)
    parser.switch("repair", "extract bad or missing shards again, exactly as they were")
    parser.flag("model_path", "with --repair: the model, where it is no longer where the run had it")
    parser.flag("dataset_path", "with --repair: the stream, likewise")
    parser.flag("adapter_path", "with --repair: the LoRA adapter, likewise")


def run(args: Namespace) -> int:
    runs, verified = _verify(args)
    if args.repair and _repair(runs, verified.faults, args):
        _, verified = _verify(args)
    if verified.faults:
        count = len(verified.faults)
        say("1 fault" if count == 1 else f"{count} faults")
        return FAULTS_FOUND
    say(
        f"all is whole; workers: {verified.workers}, shards: {verified.shards}, samples: {verified.samples:,}, "
        "each stored once"
    )
    return 0


def _verify(args: Namespace) -> tuple[list[Run], Verified]:
    """Reads all and prints the faults."""
    runs = [run for path in args.paths for run in open_runs(path, damaged_too=True)]
    verified = verify_runs(runs, args.streams, args.jobs)
    for fault in verified.faults:
        say(fault)
    return runs, verified


def _repair(runs: list[Run], faults: list[Fault], args: Namespace) -> bool:
    """Makes the bad shards again; says whether there were any."""
    repaired = False
    for each in [run for run in runs if isinstance(run, DescribedRun)]:
        bad = sorted({fault.shard for fault in faults if fault.run is each and fault.shard in each.entries})
        if bad:
            say(f"extracting again: {', '.join(_with_samples(each, name) for name in bad)}")
            _repair_run(each, bad, args)
            repaired = True
    return repaired


def _with_samples(run: DescribedRun, name: str) -> str:
    entry = run.entries[name]
    return f"{name} (samples {entry['first_sample_idx']} to {entry['last_sample_idx']})"


def _repair_run(run: DescribedRun, bad: list[str], args: Namespace) -> None:
    from qwen_jax.run.repair import repair

    files, moved = run.files, (args.model_path, args.dataset_path, args.adapter_path)
    if isinstance(files, LocalFiles):
        repair(files.path, run.metadata, bad, *moved)
    elif isinstance(files, BucketFiles):
        with tempfile.TemporaryDirectory() as folder:
            repair(Path(folder), run.metadata, bad, *moved)
            for name in bad:
                files.replace_file(name, Path(folder) / name)
