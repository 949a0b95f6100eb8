"""Every form of attention equals the plain one; lengths up to 32,768 fit in memory."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.model import attention
from qwen_jax.model.attention import blocked_attention, make_attend, resolve_attention, splash_attention
from qwen_jax.model.sharding import make_mesh

B, N, K, H = 2, 6, 2, 64


def make_qkv(length: int, dtype=np.float32, batch: int = B) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(length)
    shapes = ((batch, length, heads, H) for heads in (N, K, K))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def plain(q_BTNH, k_BSKH, v_BSKH) -> np.ndarray:
    """The definition, in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 63, 512, 513, 1100])
def test_blocked(length):
    qkv = make_qkv(length)
    np.testing.assert_allclose(jax.jit(blocked_attention)(*qkv), plain(*qkv), rtol=0, atol=3e-6)


@pytest.mark.parametrize("length", [1, 40, 130, 333])
def test_blocked_in_long_groups(length, monkeypatch):
    """The same code as at 32,768 tokens, with small limits."""
    monkeypatch.setattr(attention, "_GROUP", 16)
    monkeypatch.setattr(attention, "_MAX_GROUPS", 4)
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 7 * 100)
    qkv = make_qkv(length)
    np.testing.assert_allclose(blocked_attention(*qkv), plain(*qkv), rtol=0, atol=3e-6)


@pytest.mark.parametrize("length", [1, 100, 300])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 3e-6), (ml_dtypes.bfloat16, 0.02)])
def test_splash_in_interpret_mode(length, dtype, tolerance):
    """bfloat16 keeps 8 bits: values up to 4 are 0.016 apart."""
    qkv = make_qkv(length, dtype)
    out = splash_attention(*qkv, mesh=make_mesh(), interpret=True)
    assert out.dtype == dtype and out.shape == qkv[0].shape
    np.testing.assert_allclose(np.asarray(out, np.float32), plain(*qkv), rtol=0, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash_compiles_for_tpu(head_dim):
    """Lowering to the TPU's own kernel language needs no TPU."""
    shapes = [jax.ShapeDtypeStruct((2, 1088, heads, head_dim), jnp.bfloat16) for heads in (14, 2, 2)]
    attend = jax.jit(make_attend("splash", make_mesh()))
    text = attend.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert "1088x1088" not in text and "1152x1152" not in text


@dataclass(frozen=True)
class Device:
    """What is asked of a jax device."""

    platform: str
    compute_capability: str = ""
    device_kind: str = "kind"


TPU, CPU = Device("tpu"), Device("cpu")
H100, T4, AMD = (Device("gpu", capability) for capability in ("9.0", "7.5", "gfx942"))


def test_auto_takes_the_fused_kernel_only_in_bfloat16():
    devices = (TPU, H100, T4, AMD, CPU)
    assert [resolve_attention("auto", "bfloat16", device) for device in devices] == [
        *("splash", "cudnn", "blocked", "blocked", "blocked")
    ]
    assert {resolve_attention("auto", "float32", device) for device in devices} == {"blocked"}
    assert resolve_attention("blocked", "bfloat16", TPU) == "blocked"


@pytest.mark.parametrize(
    "name, dtype, device",
    [
        ("splash", "bfloat16", CPU),
        ("cudnn", "float32", H100),
        ("cudnn", "bfloat16", TPU),
        ("cudnn", "bfloat16", T4),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused(name, dtype, device):
    with pytest.raises(ConfigError, match=f"--attention {name} needs an? .* and bfloat16, here is kind and"):
        resolve_attention(name, dtype, device)


LONG = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from qwen_jax.model.capture import Capture
from qwen_jax.model.config import read_config
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint

config, mesh = read_config(sys.argv[1]), make_mesh()
model = load_model(open_checkpoint(sys.argv[1]), config, 1, jnp.float32, mesh)
tokens = np.random.default_rng(3).integers(0, config.vocab_size, (1, 32768), np.int32)
step = Capture(model, (0,), ["residual"], "float32", mesh)
step(tokens[:, :256]).taps["residual"].activations_CBRD.block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
long = np.asarray(step(tokens).taps["residual"].activations_CBRD)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
short = np.asarray(step(tokens[:, :1024]).taps["residual"].activations_CBRD)
np.save(sys.argv[2], np.stack([long[:, :, :1024], short]))
print((after - before) * 1024)
"""


def test_32768_tokens_on_the_cpu(tmp_path):
    """A plain [N, T, T] array of this one head would take 4.3 GB in float32; it all stays below 1 GB."""
    from tests.model.conftest import build_reference

    folder = build_reference((32, 48, 1, 1, 1, 199, True), tmp_path / "model").folder
    command = [sys.executable, "-c", LONG, str(folder), str(tmp_path / "out.npy")]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 30
    long, short = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(long, short, rtol=0, atol=1e-5 * np.abs(short).max())
