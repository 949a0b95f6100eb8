"""Causal grouped-query attention: the one place that chooses how it is computed.

Dimension letters: see qwen_jax/model/qwen2.py; G is the number of query heads that share a kv head.
Every form takes q_BTNH, k_BSKH and v_BSKH, S = T, and returns softmax(q k^T / sqrt(H)) v as [B, T, N, H] in
q's dtype, token t seeing keys 0..t. None holds a [B, N, T, T] array.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import ConfigError

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_FUSED = {"tpu": "splash", "gpu": "cudnn"}
_CUDNN_FROM = 8.0
"""The compute capability (Ampere) from which cuDNN has fused attention."""

# The blocked form: queries in groups, each against the keys up to its own end, so that little of what the
# mask hides is computed. A long group goes through in blocks, so that one block's scores stay small.
_GROUP = 256
_MAX_GROUPS = 16
_BLOCK_SCORES = 512 * 8192

_LANES = 128
_SPLASH_BLOCKS = (512, 256, _LANES)


def resolve_attention(name: str, dtype: str, device: jax.Device) -> str:
    """The form that `--attention NAME` means for this compute dtype on such devices.

    auto: the vendor's fused kernel in bfloat16 on TPU and on GPU from Ampere on, else `blocked`. float32 is asked for
    to be exact, and the fused kernels are not. Raises ConfigError for a kernel that cannot run here.
    """
    fused = _FUSED.get(device.platform) if dtype == "bfloat16" else None
    if fused == "cudnn" and not _has_fused_cudnn(device):
        fused = None
    if name == "auto":
        return fused or "blocked"
    if name not in ("blocked", fused):
        needs = {"splash": "a TPU", "cudnn": "an NVIDIA GPU of the Ampere generation or later"}[name]
        raise ConfigError(
            f"--attention {name} needs {needs} and bfloat16, here is {device.device_kind} and {dtype}; "
            "use --attention auto"
        )
    return name


def _has_fused_cudnn(device: jax.Device) -> bool:
    try:
        return float(device.compute_capability) >= _CUDNN_FROM
    except ValueError:  # not NVIDIA's
        return False


def make_attend(name: str, mesh: Mesh) -> Attend:
    """The attention of that (resolved) name, over arrays sharded as model/sharding.py says."""
    forms = {
        "blocked": _blocked_for(mesh),
        "splash": partial(splash_attention, mesh=mesh),
        "cudnn": partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
    }

    def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        if k_BSKH.shape[2] % mesh.shape["model"]:
            # Too few kv heads to split: each query head gets its own copy, so that the heads split evenly.
            G = q_BTNH.shape[2] // k_BSKH.shape[2]
            k_BSKH, v_BSKH = (jnp.repeat(x, G, axis=2) for x in (k_BSKH, v_BSKH))
        return forms[name](q_BTNH, k_BSKH, v_BSKH)

    return attend


def _blocked_for(mesh: Mesh) -> Attend:
    """On a CPU one row after another: a row's scores stay in the cache, those of all rows do not."""
    attend = partial(blocked_attention, row_by_row=jax.default_backend() == "cpu")
    if mesh.size == 1:
        return attend
    spec = P("data", None, "model", None)
    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


def blocked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, row_by_row: bool = False
) -> jax.Array:
    """Exact attention in blocks of queries, with the rounding points of Hugging Face's eager attention:
    scores and weights in the compute dtype, the softmax in float32.

    Memory beside q, k, v and the result: about three float32 arrays of [B, N, 512 x 8192] at most, with B = 1 for
    row_by_row.
    """
    if row_by_row:
        rows = (q_BTNH, k_BSKH, v_BSKH)
        return jax.lax.map(lambda row: _in_groups(*(array[None] for array in row))[0], rows)
    return _in_groups(q_BTNH, k_BSKH, v_BSKH)


def _in_groups(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    size = max(_GROUP, -(-T // (_MAX_GROUPS * _GROUP)) * _GROUP)
    groups = [
        _attend_group(q_BTKGH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], start)
        for start, stop in ((start, min(start + size, T)) for start in range(0, T, size))
    ]
    return jnp.concatenate(groups, axis=1).reshape(B, T, N, H)


def _attend_group(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first: int) -> jax.Array:
    """A group of queries at positions `first`.., in blocks whose scores stay below _BLOCK_SCORES a head."""
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    rows = max(1, _BLOCK_SCORES // S)
    if rows >= T:
        return _attend_block(q_BTKGH, k_BSKH, v_BSKH, first)
    blocks = -(-T // rows)
    padded = jnp.pad(q_BTKGH, ((0, 0), (0, blocks * rows - T), (0, 0), (0, 0), (0, 0)))
    q_MBTKGH = jnp.moveaxis(padded.reshape(-1, blocks, rows, *q_BTKGH.shape[2:]), 1, 0)
    starts_M = first + rows * jnp.arange(blocks)
    out_MBTKGH = jax.lax.map(
        lambda block: _attend_block(block[0], k_BSKH, v_BSKH, block[1]), (q_MBTKGH, starts_M)
    )
    return jnp.moveaxis(out_MBTKGH, 0, 1).reshape(padded.shape)[:, :T]


def _attend_block(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first: int | jax.Array
) -> jax.Array:
    """As two matrix products for each kv head, its query heads' rows one below the other: einsum's own products
    of five-dimensional arrays take three times as long on a CPU."""
    B, T, K, G, H = q_BTKGH.shape
    S = k_BSKH.shape[1]
    q_BKRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # R = G T
    scores_BKGTS = (q_BKRH @ k_BSKH.transpose(0, 2, 3, 1)).reshape(B, K, G, T, S) * H**-0.5
    visible_TS = jnp.arange(S)[None, :] <= first + jnp.arange(T)[:, None]
    scores_BKGTS = jnp.where(visible_TS, scores_BKGTS.astype(jnp.float32), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTKGH.dtype)
    out_BKRH = weights_BKGTS.reshape(B, K, G * T, S) @ v_BSKH.transpose(0, 2, 1, 3)
    return out_BKRH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


def splash_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mesh: Mesh, interpret: bool = False
) -> jax.Array:
    """The splash attention kernel that jax ships for TPU, each device on its own rows and heads.

    Lengths are padded to the kernel's block size; the causal mask hides that from every real token.
    interpret: run the kernel in Pallas' interpreter, on any device.
    """
    spec = P("data", None, "model", None)
    local = partial(_splash_on_one_device, interpret=interpret)
    # The kernel says nothing of how its result varies over the mesh, so that check must be off.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return sharded(q_BTNH, k_BSKH, v_BSKH)


def _splash_on_one_device(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, interpret: bool
) -> jax.Array:
    T, N, H = q_BTNH.shape[1:]
    padded = -(-T // _LANES) * _LANES
    block = next(size for size in _SPLASH_BLOCKS if padded % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * N),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, padded - T), (0, 0), (0, 0))).swapaxes(1, 2)

    q_BNTH, k_BKSH, v_BKSH = heads_first(q_BTNH * H**-0.5), heads_first(k_BSKH), heads_first(v_BSKH)
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH).swapaxes(1, 2)[:, :T].astype(q_BTNH.dtype)
