"""Compiles the step of every published size for TPU machines that are not there, and prints what the compiler says.

Needs jax[tpu], no TPU: nothing here has run on one. `--only_formulas` leaves the compiler out (and needs no jax[tpu]).
Each program at its smallest --model_parallel that fits, all layers kept in bfloat16, samples of the full length.
Machines of one chip that differ in their number of copies of the weights share a program, since copies send each other
nothing
(tests/tpu): it is compiled once.

  JAX_PLATFORMS=cpu .venv-test-tpu/bin/python benchmarks/tpu_compile.py --sizes 0.5B 7B --machines v4-8 v5litepod-4
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from common import ROOT  # noqa: F401  (puts the package on the path)
from jax.errors import JaxRuntimeError

from qwen_jax.accelerators import ACCELERATORS, Accelerator
from qwen_jax.cli import FlagParser
from qwen_jax.errors import first_line
from qwen_jax.model.compiled import absent_mesh, compile_now
from qwen_jax.model.config import parse_config
from qwen_jax.model.published import PUBLISHED, config_fields
from qwen_jax.run.job import Outline
from qwen_jax.run.roof import Roof, complaint, device_memory, machine_mesh, outline_of_config
from qwen_jax.settings import add_settings, take_settings

MACHINES = [each.name for each in ACCELERATORS.values() if each.topology]
LENGTHS = (2048, 8192, 32768)
COLUMNS = (
    *("model", "machine", "`--max_seq_length`", "`--model_parallel`", "compile s"),
    *("weights", "carried", "steps", "temporaries", "of GB", "TFLOP", "GB moved", "GB leaving", "bound by"),
)


def outlines(size: str, machine: Accelerator, length: int) -> Iterator[Outline]:
    """With each --model_parallel, the smallest first."""
    parser = FlagParser()
    add_settings(parser)
    settings = take_settings(vars(parser.parse_args(["--worker_id", "0"])))
    for parts in (parts for parts in range(1, machine.devices + 1) if machine.devices % parts == 0):
        changed = replace(settings, max_seq_length=length, model_parallel=parts)
        yield outline_of_config(changed, parse_config(config_fields(size)))


def row(size: str, machine: Accelerator, length: int, ask: bool) -> list[str]:
    complaints = []
    for outline in outlines(size, machine, length):
        said = complaint(outline, machine)
        if said is None:
            return figures(outline, size, machine, ask)
        complaints.append(said)
    reason = next((said for said in reversed(complaints) if "needs" in said), complaints[-1])
    return [size, machine.name, f"{length:,}", f"does not fit: {reason}"]


def figures(outline: Outline, size: str, machine: Accelerator, ask: bool) -> list[str]:
    settings = outline.settings
    parts, length = settings.model_parallel, settings.max_seq_length
    program = outline.program(machine_mesh(machine, parts), machine.platform)
    roof, memory = Roof(program, machine, context=length / 2), device_memory(program, machine)
    seconds, temporaries = "not compiled", memory.temporaries
    if ask:
        machine_of_chip = next(
            each
            for each in ACCELERATORS.values()
            if each.chip is machine.chip and each.topology and each.devices % parts == 0
        )
        try:
            seconds, temporaries = compiled(size, machine_of_chip.name, length, parts)
        except JaxRuntimeError as error:
            return [size, machine.name, f"{length:,}", f"does not compile: {first_line(error)}"]
    memories = (memory.weights, memory.carried, memory.steps, temporaries, machine.chip.memory)
    return [
        *(size, machine.name, f"{length:,}", str(parts), seconds),
        *(f"{count / 1e9:.2f}" for count in memories),
        *(f"{roof.flops / 1e12:.1f}", f"{roof.moved / 1e9:.1f}", f"{roof.leaving / 1e9:.2f}", roof.bound),
    ]


@cache
def compiled(size: str, machine: str, length: int, parts: int) -> tuple[str, int]:
    """Seconds, and bytes of temporaries on each device."""
    of_machine = ACCELERATORS[machine]
    outline = next(
        each for each in outlines(size, of_machine, length) if each.settings.model_parallel == parts
    )
    step = outline.program(absent_mesh(of_machine, parts), of_machine.platform)
    found = compile_now(step.lower_step())
    return f"{found.seconds:.0f}", found.temporaries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=MACHINES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--only_formulas", action="store_true")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for size, machine, length in product(args.sizes, args.machines, args.lengths):
        cells = row(size, ACCELERATORS[machine], length, not args.only_formulas)
        cells += [""] * (len(COLUMNS) - len(cells))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
