"""Eight virtual devices compute what one computes. The devices must exist before jax starts: own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.model.sharding import check_split, make_mesh, planned_mesh
from tests.model.conftest import QUICK, SHAPES, build_reference

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from qwen_jax.data.steps import StepShape
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.config import read_config
from qwen_jax.model.sharding import check_split, make_mesh, planned_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from tests.model.conftest import capture_samples, first_devices, joined, program_of, samples_of

folder, out = sys.argv[1:3]
config = read_config(folder)
tokens = np.random.default_rng(7).integers(0, config.vocab_size, (16, 24), np.int32)
taps = ["residual", "attn_heads", "mlp_act"]  # of a whole, of parts split by heads, and by neurons
for devices, model_parallel in ((1, 1), (8, int(sys.argv[3]))):
    mesh = make_mesh(model_parallel) if devices == 8 else first_devices(devices)
    check_split(config, model_parallel)
    model = load_model(open_checkpoint(folder), config, config.num_layers, jnp.float32, mesh)
    shape = StepShape(40, 24, mesh.shape["data"])
    program = program_of(model, range(config.num_layers), taps, shape, mesh=mesh)
    found = capture_samples(Capture(Compilation(program), model), shape, samples_of(tokens))
    joined_up = [np.concatenate([joined(sample, tap) for tap in taps], axis=-1) for sample in found]
    np.save(f"{out}/{devices}.npy", np.stack(joined_up, axis=1))
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model))
    planned = replace(program, mesh=planned_mesh(devices, model_parallel)).weight_bytes
    print(json.dumps({"devices": mesh.size, "bytes_per_device": per_device, "planned": planned}))
"""


def run(folder: Path, model_parallel: int, out: Path) -> list[dict]:
    """On one device, and on eight."""
    options = {"xla_force_host_platform_device_count": 8} | QUICK
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(out), str(model_parallel)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


@pytest.mark.wide
@pytest.mark.parametrize("shape, model_parallel", [("1.5B-like", 4), ("7B-like", 4)])
def test_eight_devices_equal_one(shape, model_parallel, tmp_path):
    """1.5B-like with 4 parts has fewer kv heads than parts: they are replicated."""
    _check_eight(build_reference(SHAPES[shape], tmp_path / "reference").folder, model_parallel, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3 yarn", "llama"])
def test_eight_devices_equal_one_in_every_family(family, tmp_path):
    """Biases behind what the parts add up, and norms of heads that are split."""
    from tests.model.test_families import CASES

    shape = (64, 96, 2, 8, 2, 97, True)
    _check_eight(build_reference(shape, tmp_path / "reference", **CASES[family]).folder, 4, tmp_path)


def _check_eight(folder: Path, model_parallel: int, tmp_path: Path) -> None:
    import numpy as np

    one, many = run(folder, model_parallel, tmp_path)
    assert (one["devices"], many["devices"]) == (1, 8)
    assert many["planned"] == many["bytes_per_device"] and one["planned"] == one["bytes_per_device"]
    expected, sharded = np.load(tmp_path / "1.npy"), np.load(tmp_path / "8.npy")
    np.testing.assert_allclose(sharded, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert many["bytes_per_device"] < one["bytes_per_device"] / 2


def test_uneven_splits_are_refused(small):
    with pytest.raises(ConfigError, match="does not divide the 1 local devices"):
        make_mesh(3)
    with pytest.raises(ConfigError, match="does not divide the 8 devices planned for"):
        planned_mesh(8, 3)
    with pytest.raises(ConfigError, match="14 heads"):
        check_split(small.config, 3)
