"""A decoder in Flax NNX: one Block, its parameters stacked over the layers, one scan, taps as outputs.

What a family has besides (families.py) are parameters that are there or not.

Dimension letters, used in every name that holds an array:
X rows of samples (one a data device), T tokens of a step, P positions carried on, S keys, D model (hidden size),
N query heads, K kv heads, H head dim, F mlp width, L layers, V vocabulary, C captured layers, R kept tokens.

The model sees one row. Its T tokens belong to any number of samples, one behind the other; a sample may have begun
in an earlier step and may go on in a later one (data/steps.py, model/attention.py).

Parameters keep the layout of the Hugging Face checkpoint ([out, in]); a parameter's letters are all
that weights.py and sharding.py need to know about it. Over a mesh the model runs on each device's own part of
them, and adds up what the parts give (`parts`, sharding.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.kinds import ALL_KINDS, EMBEDDING, KINDS
from qwen_jax.model.attention import Attend, Carried
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.sharding import WHOLE, Parts, is_split


class Shared(NamedTuple):
    """What all layers of a step share.

    cos_TH, sin_TH: of each token's position in its sample (rope_tables). attend: how attention is computed, for these
    positions (attention.py).
    """

    cos_TH: jax.Array
    sin_TH: jax.Array
    attend: Attend
    parts: Parts = WHOLE

    def cast(self, dtype: jnp.dtype) -> "Shared":
        return self._replace(cos_TH=self.cos_TH.astype(dtype), sin_TH=self.sin_TH.astype(dtype))


def _param(config: ModelConfig, letters: str, dtype: jnp.dtype) -> nnx.Param:
    """A placeholder of the right shape: values always come from a checkpoint (weights.py)."""
    return nnx.Param(jnp.zeros([config.dims[letter] for letter in letters], dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean square in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.eps = config.rms_norm_eps
        self.scale_D = _param(config, "D", dtype)

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return _normed(x_TD, self.scale_D, self.eps)


class HeadNorm(nnx.Module):
    """The same over each head, one weight for all heads."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.eps = config.rms_norm_eps
        self.scale_H = _param(config, "H", dtype)

    def __call__(self, x_TNH: jax.Array) -> jax.Array:
        return _normed(x_TNH, self.scale_H, self.eps)


def _normed(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """Over the last axis."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return scale[...] * (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def _plus(x: jax.Array, bias: jax.Array | nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias[...]


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        def bias(letters: str, wanted: bool) -> nnx.Param | None:
            return _param(config, letters, dtype) if wanted else None

        self.kv_heads = config.num_kv_heads
        self.q_NHD = _param(config, "NHD", dtype)
        self.q_bias_NH = bias("NH", config.qkv_bias)
        self.k_KHD = _param(config, "KHD", dtype)
        self.k_bias_KH = bias("KH", config.qkv_bias)
        self.v_KHD = _param(config, "KHD", dtype)
        self.v_bias_KH = bias("KH", config.qkv_bias)
        self.q_norm = HeadNorm(config, dtype) if config.qk_norm else None
        self.k_norm = HeadNorm(config, dtype) if config.qk_norm else None
        self.o_DNH = _param(config, "DNH", dtype)
        self.o_bias_D = bias("D", config.o_bias)

    def __call__(self, x_TD: jax.Array, shared: Shared, carried: Carried) -> tuple[jax.Array, Carried]:
        heads_TNH, carried = self.heads(x_TD, shared, carried)
        return self.out(heads_TNH, shared.parts), carried

    def heads(self, x_TD: jax.Array, shared: Shared, carried: Carried) -> tuple[jax.Array, Carried]:
        """What each head gives, before the output projection."""
        cos_TH, sin_TH, attend, parts = shared

        def projected(weights_NHD: jax.Array, bias_NH: jax.Array | nnx.Param | None) -> jax.Array:
            N, H, D = weights_NHD.shape
            x_TE = jnp.einsum("TD,ED->TE", x_TD, weights_NHD.reshape(N * H, D))
            return _plus(x_TE.reshape(-1, N, H), bias_NH)

        def own(param: nnx.Param | None) -> Any:
            return None if param is None else parts.own_kv_heads(param[...], self.kv_heads)

        q_TNH = projected(self.q_NHD[...], self.q_bias_NH)
        k_TKH = projected(own(self.k_KHD), own(self.k_bias_KH))
        v_TKH = projected(own(self.v_KHD), own(self.v_bias_KH))
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = rotate(q_TNH, cos_TH, sin_TH), rotate(k_TKH, cos_TH, sin_TH)
        return attend(q_TNH, k_TKH, v_TKH, carried)

    def out(self, heads_TNH: jax.Array, parts: Parts) -> jax.Array:
        o_DE, heads_TE = (x.reshape(len(x), -1) for x in (self.o_DNH[...], heads_TNH))
        out_TD = parts.add(jnp.einsum("TE,DE->TD", heads_TE, o_DE))
        return _plus(out_TD, self.o_bias_D)


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        def bias(letters: str) -> nnx.Param | None:
            return _param(config, letters, dtype) if config.mlp_bias else None

        self.gate_FD = _param(config, "FD", dtype)
        self.gate_bias_F = bias("F")
        self.up_FD = _param(config, "FD", dtype)
        self.up_bias_F = bias("F")
        self.down_DF = _param(config, "DF", dtype)
        self.down_bias_D = bias("D")

    def __call__(self, x_TD: jax.Array, parts: Parts = WHOLE) -> jax.Array:
        return self.out(self.neurons(x_TD), parts)

    def neurons(self, x_TD: jax.Array) -> jax.Array:
        """silu(gate(x)) * up(x)"""
        gate_TF = _plus(jnp.einsum("TD,FD->TF", x_TD, self.gate_FD[...]), self.gate_bias_F)
        up_TF = _plus(jnp.einsum("TD,FD->TF", x_TD, self.up_FD[...]), self.up_bias_F)
        return jax.nn.silu(gate_TF) * up_TF

    def out(self, neurons_TF: jax.Array, parts: Parts) -> jax.Array:
        out_TD = parts.add(jnp.einsum("TF,DF->TD", neurons_TF, self.down_DF[...]))
        return _plus(out_TD, self.down_bias_D)


class Block(nnx.Module):
    """One decoder layer; returns the residual stream after it, every tap, and the keys and values to carry on."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.attn_norm = RMSNorm(config, dtype)
        self.attn = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = Mlp(config, dtype)

    def __call__(
        self, x_TD: jax.Array, shared: Shared, carried: Carried
    ) -> tuple[jax.Array, dict[str, jax.Array], Carried]:
        attn_in_TD = self.attn_norm(x_TD)
        heads_TNH, carried = self.attn.heads(attn_in_TD, shared, carried)
        attn_TD = self.attn.out(heads_TNH, shared.parts)
        mid_TD = x_TD + attn_TD
        mlp_in_TD = self.mlp_norm(mid_TD)
        neurons_TF = self.mlp.neurons(mlp_in_TD)
        mlp_TD = self.mlp.out(neurons_TF, shared.parts)
        x_TD = mid_TD + mlp_TD
        seen = {
            "residual": x_TD,
            "attn": attn_TD,
            "mlp": mlp_TD,
            "resid_mid": mid_TD,
            "attn_in": attn_in_TD,
            "mlp_in": mlp_in_TD,
            "attn_heads": heads_TNH.reshape(len(x_TD), -1),
            "mlp_act": neurons_TF,
        }
        return x_TD, seen, carried


class Decoder(nnx.Module):
    """The embedding and the first `num_layers` blocks; the final norm and LM head only `with_head`.

    `num_layers` below the config's own leaves the deeper layers out altogether.
    """

    def __init__(self, config: ModelConfig, num_layers: int, dtype: jnp.dtype, with_head: bool = False):
        self.config = config
        self.embed_VD = _param(config, "VD", dtype)
        self.blocks = nnx.vmap(lambda _: Block(config, dtype))(jnp.arange(num_layers))
        if with_head:
            self.final_norm = RMSNorm(config, dtype)
            if not config.tied_embeddings:
                self.head_VD = _param(config, "VD", dtype)

    def __call__(
        self,
        tokens_T: jax.Array,
        shared: Shared,
        carried: Carried,
        layers: Sequence[int],
        taps: Sequence[str] = ("residual",),
        dtype: jnp.dtype | None = None,
        kept_R: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], jax.Array, Carried]:
        """Runs all blocks over one step of a row.

        tokens_T: int32.
        carried: what attention carries from the step before, with a leading layer axis.
        layers: ascending 0-based block indices below the number of blocks.
        taps: names of kinds.py.
        dtype: of the taps; None keeps the compute dtype.
        kept_R: int32, the tokens of the step that the taps keep; None keeps all, R = T.
        Returns ({tap: [C, R, width of the kind]}, x_TD after the last block, what to carry on); C = len(layers), 1 for
        the embedding.
        """
        x_TD = self.embed_VD[...][tokens_T]
        graph, params = nnx.split(self.blocks)
        shared = shared.cast(x_TD.dtype)

        def kept(x_TD: jax.Array, tap: str) -> jax.Array:
            x_RD = (x_TD if kept_R is None else x_TD[kept_R]).astype(dtype or x_TD.dtype)
            return shared.parts.whole(x_RD) if is_split(ALL_KINDS[tap].letters) else x_RD

        # A layer nobody asked for writes to the slot of the next requested one, which overwrites it, or to
        # a spare one at the end: one traced layer, and only the requested layers are ever held.
        num_blocks = jax.tree.leaves(params)[0].shape[0]
        slots_L = np.searchsorted(layers, np.arange(num_blocks)).astype(np.int32)
        embedded_RD = kept(x_TD, EMBEDDING)
        captured = self._room_for(taps, slots_L[-1] + 1, embedded_RD)

        def step(state, layer):
            x_TD, captured, carried = state
            layer_params, slot, index = layer
            own = jax.tree.map(lambda all_: jax.lax.dynamic_index_in_dim(all_, index, 0, False), carried)
            x_TD, seen, own = nnx.merge(graph, layer_params)(x_TD, shared, own)
            rows = {tap: kept(seen[tap], tap).reshape(room.shape[1:]) for tap, room in captured.items()}
            captured = _with(captured, shared.parts.apart(rows), slot)
            # In the scan's state, not in its inputs and outputs, so that it is there once and written in place.
            return (x_TD, captured, _with(carried, own, index)), None

        inputs = (params, jnp.asarray(slots_L), jnp.arange(num_blocks))
        (last_TD, captured, carried), _ = jax.lax.scan(step, (x_TD, captured, carried), inputs)
        captured = {tap: _ungrouped(room)[: len(layers)] for tap, room in captured.items()}
        if EMBEDDING in taps:
            captured[EMBEDDING] = embedded_RD[None]
        return captured, last_TD, carried

    def _room_for(self, taps: Sequence[str], slots: int, like_RD: jax.Array) -> dict[str, jax.Array]:
        """Zeros [slots, R / S, S, width of the kind] for each tap but the embedding.

        S is 8, where that divides R, as TPU tiles what leaves the device: the compiler would lay the loop's array out
        otherwise, and copy all of it at the end, on TPU7x for each block of the statistics too.
        """
        widths = {tap: KINDS[tap].width(self.config.dims) for tap in taps if tap != EMBEDDING}
        R = len(like_RD)
        S = _SUBLANES if R % _SUBLANES == 0 else R
        return {tap: jnp.zeros((slots, R // S, S, width), like_RD.dtype) for tap, width in widths.items()}

    def logits(self, x_TD: jax.Array) -> jax.Array:
        """[T, V] float32, of the residual stream after the last block."""
        head_VD = self.embed_VD[...] if self.config.tied_embeddings else self.head_VD[...]
        return (self.final_norm(x_TD) @ head_VD.T).astype(jnp.float32)

    def log_probs(self, x_TD: jax.Array, rows_T: jax.Array, next_T: jax.Array, count: jax.Array) -> jax.Array:
        """[T] float32: natural log-probability of next_T[i] as the token after row rows_T[i], for i below `count`.

        x_TD: the residual stream after the last block. In blocks of rows, since logits of all of them would take
        V floats each, and only as many as are wanted.
        """
        padded = (0, _LOGIT_ROWS)
        rows, wanted = jnp.pad(rows_T, padded), jnp.pad(next_T, padded)

        def some(number: jax.Array, found: jax.Array) -> jax.Array:
            start = number * _LOGIT_ROWS
            here = jax.lax.dynamic_slice_in_dim(rows, start, _LOGIT_ROWS)
            chosen = jax.lax.dynamic_slice_in_dim(wanted, start, _LOGIT_ROWS)
            logits_RV = self.logits(x_TD[here])
            chosen_R = jnp.take_along_axis(logits_RV, chosen[:, None], axis=1)[:, 0]
            log_probs_R = chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
            return jax.lax.dynamic_update_slice_in_dim(found, log_probs_R, start, 0)

        found = jax.lax.fori_loop(0, -(-count // _LOGIT_ROWS), some, jnp.zeros(rows.shape, jnp.float32))
        return found[: rows_T.shape[0]]


_LOGIT_ROWS = 64
_SUBLANES = 8


def _ungrouped(room: jax.Array) -> jax.Array:
    """[slots, R, width] of what Decoder._room_for made."""
    return room.reshape(len(room), -1, room.shape[-1])


def _with(stacked: Any, entries: Any, index: jax.Array) -> Any:
    """The stacked arrays with `entries` at `index`."""
    return jax.tree.map(
        lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0), stacked, entries
    )


def rope_tables(config: ModelConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, float32 [positions, H], times what the rope scales them by (rope.py).

    The frequencies repeat over both halves of the head, as in Hugging Face's layout.
    """
    frequencies = np.tile(config.rope.frequencies(config.head_dim), 2)
    angles_PH = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    scale = np.float32(config.rope.scale)
    return np.cos(angles_PH) * scale, np.sin(angles_PH) * scale


def rotate(x_TNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Turns each pair (i, i + H/2) of a head by its position's angle."""
    first, second = jnp.split(x_TNH, 2, axis=-1)
    turned_TNH = jnp.concatenate([-second, first], axis=-1)
    return x_TNH * cos_TH[:, None, :] + turned_TNH * sin_TH[:, None, :]


def abstract_model(
    config: ModelConfig, num_layers: int, dtype: jnp.dtype, with_head: bool = False
) -> Decoder:
    """The model with shapes in place of arrays: what the loader must fill, at no memory."""
    return nnx.eval_shape(lambda: Decoder(config, num_layers, dtype, with_head))


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole published model, final norm and untied LM head included."""
    params = nnx.state(abstract_model(config, config.num_layers, jnp.bfloat16, with_head=True))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
