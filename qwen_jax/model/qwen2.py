"""Qwen2.5 in Flax NNX: one Block, its parameters stacked over the layers, one scan, taps as outputs.

Dimension letters, used in every name that holds an array:
B batch, T tokens (queries), S tokens (keys), D model (hidden size), N query heads, K kv heads,
H head dim, F mlp width, L layers, V vocabulary, C captured layers.

Parameters keep the layout of the Hugging Face checkpoint ([out, in]); a parameter's letters are all
that weights.py and sharding.py need to know about it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.model.attention import Attend, blocked_attention
from qwen_jax.model.config import Qwen2Config

TAPS = ("residual", "attn", "mlp")
"""What can be captured of a layer; `embedding`, what enters block 0, comes besides."""


def _param(config: Qwen2Config, letters: str, dtype: jnp.dtype) -> nnx.Param:
    """A placeholder of the right shape: values always come from a checkpoint (weights.py)."""
    return nnx.Param(jnp.zeros([config.dims[letter] for letter in letters], dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean square in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config: Qwen2Config, dtype: jnp.dtype):
        self.eps = config.rms_norm_eps
        self.scale_D = _param(config, "D", dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
        return self.scale_D[...] * (x32_BTD * jax.lax.rsqrt(mean_square_BT1 + self.eps)).astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions; biases on q, k and v only."""

    def __init__(self, config: Qwen2Config, dtype: jnp.dtype):
        self.q_NHD = _param(config, "NHD", dtype)
        self.q_bias_NH = _param(config, "NH", dtype)
        self.k_KHD = _param(config, "KHD", dtype)
        self.k_bias_KH = _param(config, "KH", dtype)
        self.v_KHD = _param(config, "KHD", dtype)
        self.v_bias_KH = _param(config, "KH", dtype)
        self.o_DNH = _param(config, "DNH", dtype)

    def __call__(self, x_BTD: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array, attend: Attend) -> jax.Array:
        q_BTNH = jnp.einsum("BTD,NHD->BTNH", x_BTD, self.q_NHD[...]) + self.q_bias_NH[...]
        k_BTKH = jnp.einsum("BTD,KHD->BTKH", x_BTD, self.k_KHD[...]) + self.k_bias_KH[...]
        v_BTKH = jnp.einsum("BTD,KHD->BTKH", x_BTD, self.v_KHD[...]) + self.v_bias_KH[...]
        out_BTNH = attend(rotate(q_BTNH, cos_TH, sin_TH), rotate(k_BTKH, cos_TH, sin_TH), v_BTKH)
        return jnp.einsum("BTNH,DNH->BTD", out_BTNH, self.o_DNH[...])


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: Qwen2Config, dtype: jnp.dtype):
        self.gate_FD = _param(config, "FD", dtype)
        self.up_FD = _param(config, "FD", dtype)
        self.down_DF = _param(config, "DF", dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self.gate_FD[...])
        up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self.up_FD[...])
        return jnp.einsum("BTF,DF->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_DF[...])


class Block(nnx.Module):
    """One decoder layer; returns the residual stream after it and every tap."""

    def __init__(self, config: Qwen2Config, dtype: jnp.dtype):
        self.attn_norm = RMSNorm(config, dtype)
        self.attn = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = Mlp(config, dtype)

    def __call__(
        self, x_BTD: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array, attend: Attend
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        attn_BTD = self.attn(self.attn_norm(x_BTD), cos_TH, sin_TH, attend)
        x_BTD = x_BTD + attn_BTD
        mlp_BTD = self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + mlp_BTD
        return x_BTD, {"residual": x_BTD, "attn": attn_BTD, "mlp": mlp_BTD}


class Qwen2(nnx.Module):
    """The embedding and the first `num_layers` blocks; the final norm and LM head only `with_head`.

    `num_layers` below the config's own leaves the deeper layers out altogether.
    """

    def __init__(self, config: Qwen2Config, num_layers: int, dtype: jnp.dtype, with_head: bool = False):
        self.config = config
        self.embed_VD = _param(config, "VD", dtype)
        self.blocks = nnx.vmap(lambda _: Block(config, dtype))(jnp.arange(num_layers))
        if with_head:
            self.final_norm = RMSNorm(config, dtype)
            if not config.tied_embeddings:
                self.head_VD = _param(config, "VD", dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        layers: Sequence[int],
        taps: Sequence[str] = ("residual",),
        dtype: jnp.dtype | None = None,
        attend: Attend = blocked_attention,
        positions_BR: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Runs all blocks; returns what the taps saw at `layers`, and the residual stream after the last block.

        tokens_BT: int32, padded on the right; the causal mask keeps padding from every real token.
        layers: ascending 0-based block indices below the number of blocks.
        taps: of `residual` (stream after block i, before the final norm), `attn` and `mlp` (what the
          sublayer adds to the stream), `embedding` (what block 0 takes in).
        dtype: of the taps; None keeps the compute dtype.
        attend: how attention is computed (attention.py).
        positions_BR: int32, the R positions of each row that the taps keep; None keeps all, R = T.
        Returns ({tap: [C, B, R, D]}, x_BTD); C = len(layers), 1 for `embedding`.
        """
        x_BTD = self.embed_VD[...][tokens_BT]
        cos_TH, sin_TH = rope_tables(self.config, tokens_BT.shape[1], x_BTD.dtype)
        graph, params = nnx.split(self.blocks)

        def kept(x_BTD: jax.Array) -> jax.Array:
            if positions_BR is not None:
                x_BTD = jnp.take_along_axis(x_BTD, positions_BR[:, :, None], axis=1)
            return x_BTD.astype(dtype or x_BTD.dtype)

        # A layer nobody asked for writes to the slot of the next requested one, which overwrites it, or to
        # a spare one at the end: one traced layer, and only the requested layers are ever held.
        num_blocks = jax.tree.leaves(params)[0].shape[0]
        slots_L = np.searchsorted(layers, np.arange(num_blocks)).astype(np.int32)
        kept_BRD = jax.eval_shape(kept, x_BTD)
        empty_CBRD = jnp.zeros((slots_L[-1] + 1, *kept_BRD.shape), kept_BRD.dtype)
        captured = {tap: empty_CBRD for tap in taps if tap != "embedding"}

        def step(carry, layer):
            x_BTD, captured = carry
            layer_params, slot = layer
            x_BTD, seen = nnx.merge(graph, layer_params)(x_BTD, cos_TH, sin_TH, attend)
            captured = {
                tap: jax.lax.dynamic_update_index_in_dim(array_CBRD, kept(seen[tap]), slot, 0)
                for tap, array_CBRD in captured.items()
            }
            return (x_BTD, captured), None

        (last_BTD, captured), _ = jax.lax.scan(step, (x_BTD, captured), (params, jnp.asarray(slots_L)))
        captured = {tap: array_CBRD[: len(layers)] for tap, array_CBRD in captured.items()}
        if "embedding" in taps:
            captured["embedding"] = kept(x_BTD)[None]
        return captured, last_BTD

    def log_probs(self, x_BTD: jax.Array, tokens_BT: jax.Array, positions_BA: jax.Array) -> jax.Array:
        """[B, A] float32: natural log-probability of the token at each of `positions_BA`, given those before it.

        x_BTD: the residual stream after the last block; positions from 1 on. One answer position of every row
        at a time, since logits of all of them would take V floats each.
        """
        head_VD = self.embed_VD[...] if self.config.tied_embeddings else self.head_VD[...]

        def one(position_B: jax.Array) -> jax.Array:
            before_BD = jnp.take_along_axis(x_BTD, position_B[:, None, None] - 1, axis=1)[:, 0]
            logits_BV = (self.final_norm(before_BD) @ head_VD.T).astype(jnp.float32)
            wanted_B1 = jnp.take_along_axis(tokens_BT, position_B[:, None], axis=1)
            chosen_B = jnp.take_along_axis(logits_BV, wanted_B1, axis=1)[:, 0]
            return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)

        return jax.lax.map(one, positions_BA.T).T


def rope_tables(config: Qwen2Config, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, [T, H], computed in float32 (Su et al. 2021).

    The frequencies theta**(-2i/H) repeat over both halves of the head, as in Hugging Face's layout.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    angles_TH = np.arange(length, dtype=np.float32)[:, None] * np.tile(frequencies, 2)
    return jnp.cos(angles_TH).astype(dtype), jnp.sin(angles_TH).astype(dtype)


def rotate(x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Turns each pair (i, i + H/2) of a head by its position's angle."""
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned_BTNH = jnp.concatenate([-second, first], axis=-1)
    return x_BTNH * cos_TH[:, None, :] + turned_BTNH * sin_TH[:, None, :]


def abstract_model(config: Qwen2Config, num_layers: int, dtype: jnp.dtype, with_head: bool = False) -> Qwen2:
    """The model with shapes in place of arrays: what the loader must fill, at no memory."""
    return nnx.eval_shape(lambda: Qwen2(config, num_layers, dtype, with_head))


def parameter_count(config: Qwen2Config) -> int:
    """Parameters of the whole published model, final norm and untied LM head included."""
    params = nnx.state(abstract_model(config, config.num_layers, jnp.bfloat16, with_head=True))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
