"""A sample's bits are a function of the sample and the settings alone, in float32 and in bfloat16."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.data.steps import BLOCK_TOKENS, StepShape
from qwen_jax.kinds import ALL_KINDS
from qwen_jax.model.capture import Capture, Compilation
from tests.few import few
from tests.model.conftest import capture_samples, joined, program_of, samples_of

LENGTHS = (40, 1, 300, 77, 130, 64, 5, 299, 33)
TAPS = tuple(ALL_KINDS)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setting(request, small):
    """A capture of every tap, its shape and some prompts; each test takes the capture as another one left it."""
    model = small.ours(jnp.dtype(request.param))
    shape = StepShape(96, max(LENGTHS))
    capture = Capture(Compilation(program_of(model, range(small.config.num_layers), TAPS, shape)), model)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, small.config.vocab_size, length).astype(np.int32) for length in LENGTHS]
    return capture, shape, prompts


def bits(capture, shape, prompts) -> dict[bytes, list[np.ndarray]]:
    """By the prompt's tokens: all that is stored of it, and its sums."""
    found = {}
    for sample in capture_samples(capture, shape, samples_of(prompts)):
        sums = [array for tap in TAPS for array in sample.taps[tap].sums.arrays]
        found[sample.tokenized.token_ids.tobytes()] = [*(joined(sample, tap) for tap in TAPS), *sums]
    return found


def assert_equal_bits(ours, theirs, prompts) -> None:
    for prompt in prompts:
        for a, b in zip(ours[prompt.tobytes()], theirs[prompt.tobytes()], strict=True):
            assert a.tobytes() == b.tobytes(), f"the sample of {len(prompt)} tokens"


@pytest.mark.parametrize("seed", range(2))
def test_neighbours_order_and_where_steps_end(setting, seed):
    """Others before, between and behind, in another order: every sample begins and is cut elsewhere."""
    capture, shape, prompts = setting
    expected = bits(capture, shape, prompts)
    rng = np.random.default_rng(seed)
    strangers = [rng.integers(0, 199, rng.integers(1, 120)).astype(np.int32) for _ in range(4)]
    mixed = [*prompts, *strangers]
    rng.shuffle(mixed)
    assert_equal_bits(bits(capture, shape, mixed), expected, prompts)


def test_each_alone(setting):
    """As a run that is cut there begins."""
    capture, shape, prompts = setting
    expected = bits(capture, shape, prompts)
    for prompt in prompts:
        assert_equal_bits(bits(capture, shape, [prompt]), expected, [prompt])


def test_more_samples_than_a_step_sums_up(setting):
    """Of one to three tokens: those beyond the step's own blocks are summed up by another program."""
    capture, shape, _ = setting
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 199, length).astype(np.int32) for length in (3, 2, 1) * 10]
    assert shape.blocks < len(prompts) < sum(map(len, prompts)) < shape.tokens
    together = bits(capture, shape, prompts)
    for prompt in prompts[-6:]:
        assert_equal_bits(bits(capture, shape, [prompt]), together, [prompt])


def test_blocks_of_statistics_span_steps(setting):
    """Or the test above would say nothing of them."""
    _, shape, prompts = setting
    assert shape.tokens < BLOCK_TOKENS < max(map(len, prompts))


PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from qwen_jax.data.steps import StepShape
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.config import read_config
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from tests.model.conftest import capture_samples, first_devices, joined, program_of, samples_of
from tests.model.test_quantise import bits, looked_capture

config = read_config(sys.argv[1])
rng = np.random.default_rng(5)
prompts = [rng.integers(0, 199, length).astype(np.int32) for length in (40, 1, 300, 77, 130, 64, 5, 299, 33) * 2]
assert len(jax.devices()) == 8
for devices in (1, int(sys.argv[3])):
    mesh = make_mesh() if devices == 8 else first_devices(devices)
    for dtype in sys.argv[4:]:
        if dtype == "int8":
            arrays = [array for arrays in bits(*looked_capture(dtype, mesh)).values() for array in arrays]
        else:
            model = load_model(open_checkpoint(sys.argv[1]), config, config.num_layers, jnp.dtype(dtype), mesh)
            shape = StepShape(96, 300, devices)
            program = program_of(model, range(config.num_layers), ["residual"], shape, mesh=mesh)
            found = capture_samples(Capture(Compilation(program), model), shape, samples_of(prompts))
            arrays = [joined(sample) for sample in found]
        rows = np.concatenate([array.ravel().view(np.uint8) for array in arrays])
        np.save(f"{sys.argv[2]}/{dtype}_{devices}.npy", rows)
"""


@pytest.mark.parametrize(
    "devices, dtypes", few([(8, ["float32"]), (8, ["bfloat16", "int8"]), (2, ["float32", "bfloat16"])])
)
def test_several_devices_compute_what_one_does(small, tmp_path, devices, dtypes):
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small.folder), str(tmp_path), str(devices), *dtypes],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    for dtype in dtypes:
        one, several = (np.load(tmp_path / f"{dtype}_{count}.npy") for count in (1, devices))
        assert one.size
        np.testing.assert_array_equal(one, several)
