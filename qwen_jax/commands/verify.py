"""Reads every shard and names each fault: checksums, structure, shapes, values that are not finite, samples
that are missing or there twice. Exit code 1 if there is any.

  python -m qwen_jax verify activations
  python -m qwen_jax verify gs://your-bucket/activations --streams data/streams/streams.json
  python -m qwen_jax verify activations/worker_0 --repair
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser
from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import Folder, Run, open_runs
from qwen_jax.reading.verify import Fault, verify_runs

FAULTS_FOUND = 1


def add_flags(parser: FlagParser) -> None:
    parser.add_argument(
        "paths", nargs="+", help="worker's folders, folders of these, shards, or gs:// addresses"
    )
    parser.flag("streams", "streams.json of the workers' streams: none may be missing")
    parser.switch("repair", "extract bad or missing shards of a worker's folder again, exactly as they were")
    parser.flag("model_path", "with --repair: the model, where it is no longer where the run had it")
    parser.flag("dataset_path", "with --repair: the stream, likewise")


def run(args: Namespace) -> int:
    runs = [run for path in args.paths for run in open_runs(path)]
    faults = verify_runs(runs, args.streams)
    for fault in faults:
        print(fault)
    if faults and args.repair:
        faults = _repair(runs, faults, args)
    if faults:
        print("1 fault" if len(faults) == 1 else f"{len(faults)} faults")
        return FAULTS_FOUND
    samples = sum(run.metadata["totals"]["samples"] for run in runs if run.metadata)
    shards = sum(len(run.shards) for run in runs)
    print(f"all is whole; workers: {len(runs)}, shards: {shards}, samples: {samples:,}, each stored once")
    return 0


def _repair(runs: list[Run], faults: list[Fault], args: Namespace) -> list[Fault]:
    """Makes the bad shards again, and returns the faults that are left."""
    from qwen_jax.run.repair import repair

    for each in runs:
        bad = sorted({fault.shard for fault in faults if fault.run is each and fault.shard})
        if not bad or each.metadata is None:
            continue
        if not isinstance(each.place, Folder):
            raise UsageError(
                f"{each.where}: --repair works on a local folder; copy the run here, repair it, copy it back"
            )
        print(f"extracting again: {', '.join(bad)}")
        repair(each.place.path, each.metadata, bad, args.model_path, args.dataset_path)
    return verify_runs([run for path in args.paths for run in open_runs(path)], args.streams)
