"""Recomputes a few stored samples in float32, with this toolkit's model and, where torch is installed, with
Hugging Face's, and compares every layer: largest difference, relative error, cosine. Writes the result into
metadata.json under `fidelity`, with the tolerance of the dtype. Exit code 1 if a layer is beyond it.

With --self it looks at this machine's devices instead, without any run: random models, one of them as wide as
--model_path, against float32 on the CPU; and whether a sample's bits are its own among other samples.

  python -m qwen_jax certify activations/worker_0 --samples 8
  python -m qwen_jax certify --self --model_path Qwen/Qwen2.5-7B
"""

import logging
from argparse import Namespace
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int, positive_int, say
from qwen_jax.commands.arguments import add_path
from qwen_jax.errors import UsageError
from qwen_jax.reading.fidelity import drawn_samples, record_fidelity, why_not_recorded
from qwen_jax.reading.runs import DescribedRun, described, open_runs

BEYOND_TOLERANCE = 1


def add_flags(parser: FlagParser) -> None:
    add_path(parser, nargs="?")
    parser.switch("self", "check this machine's devices instead of a run")
    parser.flag("samples", "stored samples to recompute, of each worker", default=8, type=positive_int)
    parser.flag("seed", "which samples", default=0, type=non_negative_int)
    parser.flag(
        "model_path", "the model, where it is no longer where the run had it; with --self one that is as wide"
    )
    parser.flag("model_parallel", "with --self: devices that share the weights", default=1, type=positive_int)
    parser.flag("dataset_path", "the stream, likewise")
    parser.flag("adapter_path", "the LoRA adapter, likewise")


def run(args: Namespace) -> int:
    if (args.path is not None) == args.self:
        raise UsageError("give the path of a run, or --self for this machine's devices")
    logging.getLogger("qwen_jax").setLevel(logging.INFO)
    if args.self:
        return 0 if _certify_devices(args) else BEYOND_TOLERANCE
    passed = [_certify(described(each), args) for each in open_runs(args.path)]
    return 0 if all(passed) else BEYOND_TOLERANCE


def _certify_devices(args: Namespace) -> bool:
    from qwen_jax.model.program import resolve_dtype
    from qwen_jax.run.device_check import check_devices
    from qwen_jax.run.devices import device_errors, find_devices

    devices = find_devices()
    say(f"{len(devices)} x {devices[0].device_kind}")
    passed = True
    with device_errors():
        for verdict in check_devices(_widths(args.model_path), resolve_dtype("auto"), args.model_parallel):
            say(f"  {verdict}")
            passed = passed and not verdict.faults
    say("  passed" if passed else "  FAILED")
    return passed


def _widths(model_path: str | None) -> Any:
    """The model's ModelConfig, else that of the smallest published one."""
    from qwen_jax.model.config import parse_config, read_config
    from qwen_jax.model.published import config_fields
    from qwen_jax.model.source import fetch_model

    if model_path is None:
        return parse_config(config_fields("0.5B"))
    return read_config(fetch_model(model_path, weights=False).folder)


def _certify(run: DescribedRun, args: Namespace) -> bool:
    from qwen_jax.run.certify import certify
    from qwen_jax.run.recorded import reference_job

    stored = list(drawn_samples(run, args.samples, args.seed))
    job = reference_job(run.metadata, args.model_path, args.dataset_path, args.adapter_path)
    record = certify(job, stored)
    _show(run, record)
    obstacle = why_not_recorded(run)
    if obstacle is None:
        record_fidelity(run, record)
    else:
        say(f"{obstacle}: nothing was recorded")
    return record["passed"]


def _show(run: DescribedRun, record: dict[str, Any]) -> None:
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
