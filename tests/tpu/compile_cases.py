"""Compiles the product's programs for machines that are not there. Runs where libtpu is; see test_compiled.py.

python -m tests.tpu.compile_cases FOLDER < cases.json: a JSON list of cases: arguments of `program_of` and the
mesh, with a name.
Writes FOLDER/NAME.json with the compiler's figures and FOLDER/NAME.txt, the compiled program as text.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from qwen_jax.accelerators import ACCELERATORS
from qwen_jax.data.steps import StepShape, step_tokens
from qwen_jax.model.attention import make_form, resolve_attention
from qwen_jax.model.compiled import absent_mesh, compile_now
from qwen_jax.model.config import ModelConfig, parse_config
from qwen_jax.model.program import Program
from qwen_jax.model.published import config_fields
from qwen_jax.run.device_check import TINY


def config_of(size: str) -> ModelConfig:
    """Of a published size, or of the tiny model that `certify --self` computes."""
    return TINY if size == "tiny" else parse_config(config_fields(size))


def program_of(
    mesh: Mesh | AbstractMesh,
    size: str,
    positions: int = 2048,
    layers: int | None = None,
    dtype: str = "bfloat16",
    taps: tuple[str, ...] = ("residual",),
    answers: bool = False,
    batch_size: int = 4,
    stored: str | None = None,
) -> Program:
    """The step of a published size on the TPUs of that mesh, as run/job.py makes it. layers: the first ones only.
    stored: None stores the compute dtype."""
    config = config_of(size)
    tokens, layers = step_tokens(batch_size, positions, False), layers or config.num_layers
    form = make_form(resolve_attention("auto", dtype, "tpu"), "tpu", tokens, positions)
    shape = StepShape.of(tokens, positions, mesh.shape["data"], form.page)
    every = tuple(range(layers))
    return Program(config, layers, every, tuple(taps), dtype, stored or dtype, mesh, shape, form, answers)


def compile_case(folder: Path, case: dict[str, Any]) -> None:
    """kept: tokens of a step that are kept."""
    name, kept = case.pop("name"), case.pop("kept", None)
    mesh = absent_mesh(ACCELERATORS[case.pop("machine")], case.pop("model_parallel", 1))
    program = program_of(mesh, **case)
    found = asdict(compile_now(program.lower_step(kept)))
    (folder / f"{name}.txt").write_text(found.pop("text"))
    found |= {"weights": program.weight_bytes, "carried": program.carried_bytes}
    (folder / f"{name}.json").write_text(json.dumps(found))


def main() -> None:
    folder = Path(sys.argv[1])
    for case in json.load(sys.stdin):  # one after the other: libtpu crashes where two threads compile at once
        compile_case(folder, case)


if __name__ == "__main__":
    main()
