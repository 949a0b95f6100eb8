"""Every form of attention equals the plain one; 32,768 tokens fit in memory."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.model.attention import Blocked, make_form, resolve_attention
from tests.few import few

N, K, H = 6, 2, 64


def plain(q_TNH, k_TKH, v_TKH) -> np.ndarray:
    """The definition for one sample, in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q_TNH, k_TKH, v_TKH))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def in_steps(form, samples, tokens: int, positions: int) -> np.ndarray:
    """Runs samples (q, k, v each) through the form, one behind the other, `tokens` a step; rows without the rest."""
    row = [np.concatenate(arrays) for arrays in zip(*samples, strict=True)]
    at = np.concatenate([np.arange(len(sample[0])) for sample in samples]).astype(np.int32)
    dtype = row[0].dtype
    carried = tuple(jnp.zeros(shape, dtype) for shape in form.carried_shapes(positions, K, H))
    step = jax.jit(lambda at, q, k, v, carried: form(at)(q, k, v, carried))
    found = []
    for start in range(0, len(at), tokens):
        rest = max(0, start + tokens - len(at))
        here, *qkv = (
            np.pad(x[start : start + tokens], [(0, rest)] + [(0, 0)] * (x.ndim - 1)) for x in (at, *row)
        )
        here[tokens - rest :] = np.arange(rest)
        out, carried = step(here, *qkv, carried)
        found.append(np.asarray(out)[: tokens - rest])
    return np.concatenate(found)


def make_samples(lengths, dtype=np.float32):
    rng = np.random.default_rng(sum(lengths))
    return [
        tuple(rng.normal(size=(length, heads, H)).astype(dtype) for heads in (N, K, K)) for length in lengths
    ]


@pytest.mark.parametrize("at_once", few([3, 1]))
@pytest.mark.parametrize("tokens", few([97, 64]))
def test_blocked(at_once, tokens):
    """Blocks of 16 queries and 32 keys, one at a time as on a CPU and several as on a GPU."""
    samples = make_samples([1, 200, 16, 33, 64, 5, 2, 130])
    out = in_steps(Blocked(at_once, 16, 32), samples, tokens, 200)
    expected = np.concatenate([plain(*sample) for sample in samples])
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


@pytest.mark.wide
def test_blocked_at_its_own_sizes():
    samples = make_samples([300, 700])
    expected = np.concatenate([plain(*sample) for sample in samples])
    np.testing.assert_allclose(in_steps(Blocked(), samples, 512, 700), expected, rtol=0, atol=3e-6)


def test_blocked_in_bfloat16():
    """bfloat16 keeps 8 bits: values up to 4 are 0.016 apart."""
    samples = make_samples([40, 90], ml_dtypes.bfloat16)
    out = in_steps(Blocked(1, 16, 32), samples, 64, 90)
    assert out.dtype == ml_dtypes.bfloat16
    expected = np.concatenate([plain(*sample) for sample in samples])
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=0, atol=0.02)


def test_what_came_before_a_sample_is_not_seen():
    """Not even where it is no number."""
    before, sample = make_samples([70, 50])
    broken = tuple(np.full_like(x, np.nan) for x in before)
    out = in_steps(Blocked(1, 16, 32), [broken, sample, before], 48, 70)
    np.testing.assert_allclose(out[70:120], plain(*sample), rtol=0, atol=3e-6)
    np.testing.assert_allclose(out[120:], plain(*before), rtol=0, atol=3e-6)


def test_auto_takes_the_ragged_kernel_in_bfloat16_on_tpu_only():
    platforms = ("tpu", "gpu", "cpu")
    found = [resolve_attention("auto", "bfloat16", platform) for platform in platforms]
    assert found == ["ragged", "blocked", "blocked"]
    assert {resolve_attention("auto", "float32", platform) for platform in platforms} == {"blocked"}
    assert resolve_attention("blocked", "bfloat16", "tpu") == "blocked"


@pytest.mark.parametrize("dtype, platform", [("bfloat16", "cpu"), ("bfloat16", "gpu"), ("float32", "tpu")])
def test_a_kernel_that_cannot_run_here_is_refused(dtype, platform):
    with pytest.raises(ConfigError, match=f"ragged needs a TPU and bfloat16, here is {platform} and {dtype}"):
        resolve_attention("ragged", dtype, platform)


@pytest.mark.parametrize("positions, page", [(2048, 16), (8192, 32), (32768, 64)])
def test_pages_are_as_small_as_the_kernels_table_allows(positions, page):
    form = make_form("ragged", "tpu", 8192, positions)
    assert form.page == page
    assert (8192 // page) * (positions // page) <= 1 << 16


LONG = """
import resource, sys
import jax.numpy as jnp, numpy as np
from qwen_jax.data.steps import StepShape
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.config import read_config
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from tests.model.conftest import capture_samples, joined, program_of, samples_of

config = read_config(sys.argv[1])
model = load_model(open_checkpoint(sys.argv[1]), config, 1, jnp.float32, make_mesh())
tokens = np.random.default_rng(3).integers(0, config.vocab_size, 32768, np.int32)
shape = StepShape(1024, 32768)
capture = Capture(Compilation(program_of(model, (0,), ["residual"], shape)), model)
(short,) = capture_samples(capture, shape, samples_of([tokens[:1000]]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(long,) = capture_samples(capture, shape, samples_of([tokens]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
np.testing.assert_array_equal(joined(long)[:, :1000], joined(short))
print((after - before) * 1024)
"""


@pytest.mark.wide
def test_32768_tokens_on_the_cpu(tmp_path):
    """A plain [N, T, T] array of this one head would take 4.3 GB in float32; beyond the short sample it takes 50 MB."""
    from tests.model.conftest import build_reference

    folder = build_reference((32, 48, 1, 1, 1, 199, True), tmp_path / "model").folder
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50 << 20
