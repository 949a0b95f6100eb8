"""The product's own programs, compiled for TPU by its compiler without a TPU. Compiled is not run."""

import json
import math
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.accelerators import ACCELERATORS
from qwen_jax.cli import FlagParser
from qwen_jax.model.config import parse_config
from qwen_jax.model.published import PUBLISHED, config_fields
from qwen_jax.run.roof import (
    complaint,
    device_memory,
    held_bytes,
    machine_mesh,
    outline_of_config,
)
from qwen_jax.settings import add_settings, take_settings
from tests.scripts.conftest import ROOT
from tests.tpu.compile_cases import config_of, program_of

# Two layers where the depth does not matter: the program is a scan, so it is as long.
CASES = {
    "v4": {"size": "0.5B", "machine": "v4-8"},
    "options": {
        "size": "0.5B",
        "machine": "v6e-4",
        "layers": 2,
        "taps": ["residual", "attn", "mlp", "embedding"],
        "answers": True,
        "kept": 512,
    },
    "split": {"size": "7B", "machine": "v5litepod-4", "model_parallel": 4},
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)
HOST = re.compile(r" (infeed|outfeed|send|recv)\(|S\(5\)")  # 5 is the host's memory
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALL = re.compile(r" call(?:-start)?\(.* to_apply=%?([\w.-]+)")


@dataclass(frozen=True)
class Compiled:
    case: dict
    figures: dict
    text: str

    def collectives(self) -> list[tuple[str, str]]:
        """(computation, kind) of each; one that is called, as TPU7x's SparseCores do them, by where it is called."""
        found, callers, where = [], {}, ""
        for line in self.text.splitlines():
            if opened := COMPUTATION.match(line):
                where = opened[1]
            if called := CALL.search(line):
                callers[called[1]] = where
            found += [(where, kind) for kind in COLLECTIVE.findall(line)]
        return [(callers.get(where, where), kind) for where, kind in found]

    def loop_bodies(self) -> set[str]:
        return set(re.findall(r"body=%?([\w.-]+)", self.text))


def run_with_libtpu(*arguments: str, given: str = "") -> str:
    """What a Python of the environment that has libtpu prints; it lets one process in at a time."""
    python = os.environ.get("TPU_PYTHON")
    if python is None:
        pytest.skip("TPU_PYTHON names no Python that has libtpu; tests/run makes one")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if subprocess.run([python, "-c", "import libtpu"], env=environment, capture_output=True).returncode:
        pytest.skip("libtpu cannot be imported there: it is published for Linux on x86_64 only")
    command = [python, *arguments]
    done = subprocess.run(command, input=given, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compile_all(folder: Path, cases: dict[str, dict]) -> None:
    given = json.dumps([{"name": name, **case} for name, case in cases.items()])
    run_with_libtpu("-m", "tests.tpu.compile_cases", str(folder), given=given)


def read(folder: Path, name: str, case: dict) -> Compiled:
    figures = json.loads((folder / f"{name}.json").read_text())
    return Compiled(case, figures, (folder / f"{name}.txt").read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder, CASES)
    return {name: read(folder, name, case) for name, case in CASES.items()}


def check_program(found: Compiled) -> None:
    """What holds of every step on every machine."""
    check_collectives(found)
    assert not HOST.search(found.text), "moves something between host and device"
    tokens, positions = found.case.get("batch_size", 4) * 2048, found.case.get("positions", 2048)
    config = config_of(found.case["size"])
    if tokens not in (
        config.hidden_size,
        config.intermediate_size,
    ):  # else [tokens, hidden] looks the same; the other sizes have the same code
        assert largest_square(found.text, {tokens, tokens + positions}) < 2
    check_arguments(found)


def check_collectives(found: Compiled) -> None:
    """None between rows of devices, two a block between those that share the weights: no weight is gathered."""
    collectives, bodies = found.collectives(), found.loop_bodies()
    if found.case.get("model_parallel", 1) == 1:
        assert collectives == []
        return
    assert [kind for _, kind in collectives] == ["all-reduce"] * 2
    ((body, _), (again, _)) = collectives
    assert body == again and body in bodies


def largest_square(text: str, lengths: set[int]) -> int:
    """How many axes of an array are as long as a step or its keys, at most."""
    shapes = set(re.findall(r"\b[a-z]+\d+\w*\[([\d,]+)\]", text))
    return max(sum(int(size) in lengths for size in shape.split(",")) for shape in shapes)


def check_arguments(found: Compiled) -> None:
    """Weights and carried keys are arguments in device memory, and the keys' place is that of the new ones."""
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", found.text)[1]
    arguments = [
        math.prod(map(int, shape.split(","))) * int(bits) // 8
        for bits, shape in re.findall(r"\b[a-z]+(\d+)\w*\[([\d,]+)\]", re.sub(r"/\*.*?\*/", "", layout))
    ]
    assert sum(arguments) >= found.figures["weights"]
    aliases = re.search(r"input_output_alias=\{(.*?) \}, entry", found.text)
    assert aliases, "nothing is donated"
    kept = sum(arguments[int(place)] for place in re.findall(r"\((\d+), \{\}", aliases[1]))
    assert kept == found.figures["carried"]


@pytest.mark.parametrize("name", CASES)
def test_a_step_compiles_without_what_it_does_not_need(compiled, name):
    check_program(compiled[name])


@pytest.mark.wide
def test_a_plan_can_ask_the_compiler():
    demo = ["--dataset_path", "examples/demo/streams/stream_000.jsonl", "--model_path", "examples/demo/model"]
    flags = ["--max_seq_length", "1024", "--accelerator", "v6e-4", "--compile"]
    said = run_with_libtpu("-m", "qwen_jax", "plan", "--worker_id", "0", *demo, *flags)
    assert re.search(r"^  compiler +\d+ s: .* of arguments, .* of temporaries, ", said, re.M), said


def compile_one(folder: Path, **case: Any) -> Compiled:
    compile_all(folder, {"one": case})
    return read(folder, "one", case)


def test_with_answers_and_kept_tokens_less_leaves_the_device(compiled):
    """512 rows of three taps of two layers and of the embedding, their norms, three sums of 48 blocks, and a
    log-probability for each token."""
    wanted = (3 * 2 + 1) * (512 * (896 * 2 + 4) + 3 * 48 * 896 * 4) + 8192 * 4
    assert compiled["options"].figures["outputs"] == pytest.approx(wanted, rel=0.01)


def check_formula(found: Compiled) -> None:
    """One step's memory by the plan's formula and by the compiler."""
    case = {name: value for name, value in found.case.items() if name not in ("machine", "model_parallel")}
    machine = ACCELERATORS[found.case["machine"]]
    program = program_of(machine_mesh(machine, found.case.get("model_parallel", 1)), **case)
    ours, figures = device_memory(program, machine), found.figures
    formula = ours.weights + ours.carried + held_bytes(program) + ours.temporaries
    assert formula == pytest.approx(
        sum(figures[name] for name in ("arguments", "outputs", "temporaries")), rel=0.1
    )


@pytest.mark.parametrize("name", ["v4", "split"])
def test_the_plans_formula_agrees_with_the_compiler(compiled, name):
    check_formula(compiled[name])


def test_statistics_make_no_copy_of_what_is_captured(compiled):
    """Beside an input of the mlp's product, temporaries are less than a hundredth of the captured rows."""
    config, tokens = config_of("0.5B"), 4 * 2048
    captured = config.num_layers * tokens * config.hidden_size * 2
    assert compiled["v4"].figures["temporaries"] < tokens * config.intermediate_size * 2 + captured / 100


@pytest.mark.wide
def test_weights_that_are_shared_on_tpu7x(tmp_path):
    """Its compiler is apart: captured rows and sums over devices are tiled in two ways there."""
    found = compile_one(tmp_path, size="0.5B", machine="tpu7x-8", layers=2, model_parallel=2)
    check_program(found)
    check_formula(found)


def smallest_split(size: str, machine: str, positions: int) -> int | None:
    """The smallest --model_parallel that fits by the plan's formula."""
    parser = FlagParser()
    add_settings(parser)
    settings = take_settings(vars(parser.parse_args(["--worker_id", "0"])))
    for parts in (1, 2, 4, 8):
        changed = replace(settings, max_seq_length=positions, model_parallel=parts)
        outline = outline_of_config(changed, parse_config(config_fields(size)))
        if complaint(outline, ACCELERATORS[machine]) is None:
            return parts
    return None


@pytest.mark.parametrize(
    "size, layers",
    [pytest.param("tiny", None, marks=pytest.mark.wide), pytest.param("0.5B", 2, marks=pytest.mark.slow)],
)
def test_float32(tmp_path, size, layers):
    """Of few tokens, and of a tiny model: the exact form, which float32 takes, compiles for minutes."""
    case = {"size": size, "machine": "v6e-4", "layers": layers, "dtype": "float32", "batch_size": 1}
    check_program(compile_one(tmp_path, **case))


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v4-8", "v6e-4"])
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_quantised_rows(stored, machine, tmp_path):
    """What is computed is there beside what is stored, and nothing else that is as large but one copy of the codes."""
    found = compile_one(tmp_path, size="0.5B", machine=machine, stored=stored)
    check_program(found)
    check_formula(found)
    config = config_of("0.5B")
    codes = config.num_layers * 4 * 2048 * config.hidden_size
    assert found.figures["temporaries"] < 1.05 * codes


TPUS = [each.name for each in ACCELERATORS.values() if each.topology]


@pytest.mark.slow
@pytest.mark.parametrize("machine", TPUS)
@pytest.mark.parametrize("size", PUBLISHED)
def test_every_size_on_every_machine(size, machine, tmp_path):
    """At the smallest --model_parallel that fits; where none does, the compiler is not asked."""
    lengths = {positions: smallest_split(size, machine, positions) for positions in (2048, 8192, 32768)}
    cases = {
        str(positions): {"size": size, "machine": machine, "model_parallel": parts, "positions": positions}
        for positions, parts in lengths.items()
        if parts is not None
    }
    if not cases:
        pytest.skip(f"{size} does not fit {machine}")
    compile_all(tmp_path, cases)
    for name, case in cases.items():
        found = read(tmp_path, name, case)
        check_program(found)
        check_formula(found)
