"""Causal grouped-query attention, exact, in query blocks.

Dimension letters: see qwen_jax/model/qwen2.py; G is the number of query heads that share a kv head.
"""

import jax
import jax.numpy as jnp

# Scores of one block are [B, N, QUERY_BLOCK, S]: large enough for full-speed matrix products, small
# enough that no [B, N, T, S] array is ever held.
QUERY_BLOCK = 512


def causal_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, token t seeing keys 0..t; returns [B, T, N, H] in q's dtype.

    Each block of queries reads only the keys up to its own end, so that about half of the masked
    products are never computed. The rounding points are those of Hugging Face's eager attention:
    scores and weights in the compute dtype, the softmax in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    blocks = [
        _attend(q_BTKGH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], start)
        for start, stop in ((start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK))
    ]
    return jnp.concatenate(blocks, axis=1).reshape(B, T, N, H)


def _attend(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first_position: int) -> jax.Array:
    """One block of queries that starts at `first_position`, over keys 0..S-1."""
    T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * H**-0.5
    visible_TS = jnp.arange(S)[None, :] <= first_position + jnp.arange(T)[:, None]
    scores_BKGTS = jnp.where(visible_TS, scores_BKGTS.astype(jnp.float32), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTKGH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
