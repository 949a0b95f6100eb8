"""Recomputes a few stored samples in float32, with this toolkit's model and, where torch is installed, with
Hugging Face's, and compares every layer: largest difference, relative error, cosine. Writes the result into
metadata.json under `fidelity`, with the tolerance of the dtype. Exit code 1 if a layer is beyond it.

  python -m qwen_jax certify activations/worker_0 --samples 8
"""

import logging
from argparse import Namespace
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int, positive_int, say
from qwen_jax.commands.arguments import add_path
from qwen_jax.reading.fidelity import drawn_samples, record_fidelity, why_not_recorded
from qwen_jax.reading.runs import Run, open_runs

BEYOND_TOLERANCE = 1


def add_flags(parser: FlagParser) -> None:
    add_path(parser)
    parser.flag("samples", "stored samples to recompute, of each worker", default=8, type=positive_int)
    parser.flag("seed", "which samples", default=0, type=non_negative_int)
    parser.flag("model_path", "the model, where it is no longer where the run had it")
    parser.flag("dataset_path", "the stream, likewise")


def run(args: Namespace) -> int:
    logging.getLogger("qwen_jax").setLevel(logging.INFO)
    passed = [_certify(each, args) for each in open_runs(args.path)]
    return 0 if all(passed) else BEYOND_TOLERANCE


def _certify(run: Run, args: Namespace) -> bool:
    from qwen_jax.run.certify import certify
    from qwen_jax.run.recorded import reference_job

    stored = list(drawn_samples(run, args.samples, args.seed))
    job = reference_job(run.metadata, args.model_path, args.dataset_path)
    record = certify(job, stored)
    _show(run, record)
    obstacle = why_not_recorded(run)
    if obstacle is None:
        record_fidelity(run, record)
    else:
        say(f"{obstacle}: nothing was recorded")
    return record["passed"]


def _show(run: Run, record: dict[str, Any]) -> None:
    say(f"{run.where}: {len(record['samples'])} samples, tolerance {record['tolerance']:.2g}")
    for name, kinds in record["references"].items():
        say(f"  against {name}")
        say(f"  {'kind':<10} {'layer':>9} {'max abs':>10} {'relative':>10}   1 - min cosine")
        for kind, layers in kinds.items():
            for layer, close in layers.items():
                say(f"  {kind:<10} {layer:>9} {_numbers(**close)}")
    say("  within the tolerance" if record["passed"] else "  BEYOND THE TOLERANCE")


def _numbers(max_abs: float | None, relative: float | None, min_cosine: float | None) -> str:
    away = None if min_cosine is None else 1 - min_cosine
    columns = ((max_abs, 10), (relative, 10), (away, 16))
    return " ".join(
        f"{'not finite' if value is None else f'{value:.2e}':>{width}}" for value, width in columns
    )
