"""Causal grouped-query attention over an endless row of samples: the one place that chooses how it is computed.

Dimension letters: see qwen_jax/model/decoder.py. T queries stand in a row of samples; each sees the keys of its own
sample up to itself. A step's keys are the P carried ones followed by its own T, so every sample is contiguous in
them, and what is carried on is the last P of them.

A form is called with the positions of a step's tokens, once, and then for each layer with q_TNH, k_TKH, v_TKH and
what that layer carries; it returns softmax(q k^T / sqrt(H)) v as [T, N, H] in q's dtype, and what to carry on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from qwen_jax.errors import ConfigError

Carried = tuple[jax.Array, ...]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Carried], tuple[jax.Array, Carried]]

_LANES = 128


class Form(Protocol):
    """A way to compute attention.

    page: a sample must start at a multiple of so many tokens of its row, and T and P be multiples of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def page(self) -> int: ...

    @property
    def head_axes(self) -> tuple[int, ...]: ...

    def carried_shapes(self, positions: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of what a layer carries, kv heads on an axis that `head_axes` names."""
        ...

    def __call__(self, positions_T: jax.Array) -> Attend: ...


def resolve_attention(name: str, dtype: str, platform: str) -> str:
    """The form that `--attention NAME` means for this compute dtype on such devices.

    auto: the vendor's ragged kernel in bfloat16 on TPU, else `blocked`. float32 is asked for to be exact, and the
    kernel is not. Raises ConfigError for a kernel that cannot run here.
    """
    ragged = platform == "tpu" and dtype == "bfloat16"
    if name == "ragged" and not ragged:
        raise ConfigError(
            f"--attention ragged needs a TPU and bfloat16, here is {platform} and {dtype}; use --attention auto"
        )
    return "ragged" if name == "auto" and ragged else name.replace("auto", "blocked")


def make_form(name: str, platform: str, tokens: int, positions: int) -> Form:
    """The form of that (resolved) name, for so many tokens a step and positions carried."""
    if name == "ragged":
        return Ragged(next(page for page in _PAGES if tokens * positions <= page**2 * _TABLE_ENTRIES))
    return Blocked(at_once=_AT_ONCE.get(platform, 1))


_AT_ONCE = {"gpu": 32}
"""Query blocks that go through together: on a CPU one, whose scores stay in the cache; many fill a GPU."""
_PAGES = tuple(16 << n for n in range(12))
_TABLE_ENTRIES = 1 << 16
"""The kernel keeps a table of pages in the scalar memory, 1 MiB: an entry for each page of each sample of a step."""


@dataclass(frozen=True)
class Blocked:
    """Exact attention everywhere: blocks of queries of one sample, each over blocks of keys counted from that sample's
    start, the softmax online in float32 (Milakov and Gimelshein 2018; Rabe and Staats 2021).

    A row's result depends neither on where its block begins nor on what else is in it: the keys come in the same
    blocks in the same order, and a block that is masked throughout changes nothing. A block that spills over its
    sample's end is overwritten there by the next sample's first one.
    """

    at_once: int = 1
    queries: int = 256
    keys: int = 256
    name = "blocked"
    page = 1
    head_axes = (0, 0)

    def carried_shapes(self, positions: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return ((kv_heads, positions, head_dim),) * 2

    def __call__(self, positions_T: jax.Array) -> Attend:
        T = positions_T.shape[0]
        row_T = jnp.arange(T)
        begins_T = (row_T - jnp.maximum(row_T - positions_T, 0)) % self.queries == 0
        first_rows_T = jnp.nonzero(begins_T, size=T, fill_value=T)[0]
        rounds = -(-begins_T.sum() // self.at_once)
        padded = jnp.pad(first_rows_T, (0, self.at_once), constant_values=T)
        # Behind the last row stands no sample, so a block that begins there has no keys to see.
        positions = jnp.pad(positions_T, (0, self.queries), constant_values=-1)

        def attend(
            q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, carried: Carried
        ) -> tuple[jax.Array, Carried]:
            N, H = q_TNH.shape[1:]
            K = k_TKH.shape[1]
            q_KTGH = q_TNH.reshape(T, K, N // K, H).swapaxes(0, 1)
            q_KTGH = jnp.pad(q_KTGH, ((0, 0), (0, self.queries), (0, 0), (0, 0)))
            keys, values = (
                jnp.concatenate(
                    [old_KPH, new_TKH.swapaxes(0, 1), jnp.zeros((K, self.keys, H), new_TKH.dtype)], 1
                )
                for old_KPH, new_TKH in zip(carried, (k_TKH, v_TKH), strict=True)
            )
            # Else what is carried on would be cut from the old ones, and no longer be written in their place.
            keys, values = jax.lax.optimization_barrier((keys, values))
            P = carried[0].shape[1]

            def one(row: jax.Array) -> jax.Array:
                here = jax.lax.dynamic_slice_in_dim(positions, row, self.queries)
                q_block = jax.lax.dynamic_slice_in_dim(q_KTGH, row, self.queries, 1)
                return self._block(q_block, keys, values, P + row - here[0], here)

            def some(number: jax.Array, out_KTGH: jax.Array) -> jax.Array:
                if self.at_once == 1:
                    row = padded[number]
                    return jax.lax.dynamic_update_slice_in_dim(out_KTGH, one(row), row, 1)
                rows = jax.lax.dynamic_slice_in_dim(padded, number * self.at_once, self.at_once)
                return _scatter(out_KTGH, jax.vmap(one)(rows), rows, positions)

            out_KTGH = jax.lax.fori_loop(0, rounds, some, jnp.zeros_like(q_KTGH))
            out_TNH = out_KTGH[:, :T].swapaxes(0, 1).reshape(T, N, H)
            return out_TNH, (keys[:, T : T + P], values[:, T : T + P])

        return attend

    def _block(
        self,
        q_KQGH: jax.Array,
        keys_KSH: jax.Array,
        values_KSH: jax.Array,
        start: jax.Array,
        here_Q: jax.Array,
    ) -> jax.Array:
        """[K, Q, G, H] of Q queries whose first one stands at here_Q[0] of the sample that begins at key `start`."""
        K, Q, G, H = q_KQGH.shape
        q_KRH = q_KQGH.reshape(K, Q * G, H)  # the rows of a kv head's query heads one below the other
        at_Q = here_Q[0] + jnp.arange(Q)
        last = jnp.where(here_Q == at_Q, at_Q, -1).max()
        at_R1 = jnp.repeat(at_Q, G)[:, None]

        def more(masked: bool, number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            weighted_KRH, largest_KR1, total_KR1 = sums
            first = number * self.keys
            k_KSH, v_KSH = (
                jax.lax.dynamic_slice_in_dim(x_KSH, start + first, self.keys, 1)
                for x_KSH in (keys_KSH, values_KSH)
            )
            scores_KRS = jnp.einsum("KRH,KSH->KRS", q_KRH, k_KSH, preferred_element_type=jnp.float32)
            if masked:
                scores_KRS = jnp.where(first + jnp.arange(self.keys) <= at_R1, scores_KRS, -jnp.inf)
            new_KR1 = jnp.maximum(largest_KR1, scores_KRS.max(axis=-1, keepdims=True))
            weights_KRS, shrink_KR1 = (jnp.exp((x - new_KR1) * H**-0.5) for x in (scores_KRS, largest_KR1))
            added_KRH = jnp.einsum(
                "KRS,KSH->KRH", weights_KRS.astype(v_KSH.dtype), v_KSH, preferred_element_type=jnp.float32
            )
            total_KR1 = total_KR1 * shrink_KR1 + weights_KRS.sum(axis=-1, keepdims=True)
            return weighted_KRH * shrink_KR1 + added_KRH, new_KR1, total_KR1

        empty_KR1 = jnp.zeros((K, Q * G, 1), jnp.float32)
        sums = (jnp.zeros((K, Q * G, H), jnp.float32), empty_KR1 - jnp.inf, empty_KR1)
        whole = (here_Q[0] + 1) // self.keys  # blocks that every query sees all of
        sums = jax.lax.fori_loop(0, whole, partial(more, False), sums)
        weighted_KRH, _, total_KR1 = jax.lax.fori_loop(
            whole, last // self.keys + 1, partial(more, True), sums
        )
        return (weighted_KRH / total_KR1).astype(q_KQGH.dtype).reshape(K, Q, G, H)


def _scatter(
    out_KTGH: jax.Array, blocks_AKQGH: jax.Array, rows_A: jax.Array, positions: jax.Array
) -> jax.Array:
    """Puts each block's own rows where they belong; rows behind its sample's end are left out."""
    A, K, Q, G, H = blocks_AKQGH.shape
    row_AQ = rows_A[:, None] + jnp.arange(Q)
    own_AQ = positions[row_AQ] == positions[rows_A][:, None] + jnp.arange(Q)
    row_AQ = jnp.where(own_AQ & (rows_A[:, None] < out_KTGH.shape[1] - Q), row_AQ, out_KTGH.shape[1])
    blocks_KAQGH = blocks_AKQGH.swapaxes(0, 1).reshape(K, A * Q, G, H)
    return out_KTGH.at[:, row_AQ.reshape(-1)].set(blocks_KAQGH, mode="drop")


@dataclass(frozen=True)
class Ragged:
    """The ragged paged attention kernel that jax ships for TPU: the step's keys, seen as pages, are its cache.

    Its blocks of keys are counted from each sample's start. Heads are padded with zeros to the width that the
    kernel knows.
    """

    page: int
    queries: int = 32
    keys: int = 512
    name = "ragged"
    head_axes = (2,)

    def carried_shapes(self, positions: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return ((positions // self.page, self.page, 2 * kv_heads, -(-head_dim // _LANES) * _LANES),)

    def __call__(self, positions_T: jax.Array) -> Attend:
        T = positions_T.shape[0]
        begins_T = (positions_T == 0).at[0].set(True)
        most = T // self.page
        rows_M = jnp.nonzero(begins_T, size=most + 1, fill_value=T)[0].astype(jnp.int32)
        samples_1 = begins_T.sum(dtype=jnp.int32)[None]
        at_M = positions_T[jnp.minimum(rows_M[:-1], T - 1)]
        lengths_M = at_M + rows_M[1:] - rows_M[:-1]

        def attend(
            q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, carried: Carried
        ) -> tuple[jax.Array, Carried]:
            (old,) = carried
            H, width = q_TNH.shape[-1], old.shape[-1]
            kv_TKH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, -1, H)
            new = _widen(kv_TKH, width).reshape(-1, *old.shape[1:])
            cache = jnp.concatenate([old, new])
            first_M = (old.shape[0] * self.page + rows_M[:-1] - at_M) // self.page
            pages_MP = jnp.minimum(first_M[:, None] + jnp.arange(old.shape[0]), cache.shape[0] - 1)
            out_TNH = ragged_paged_attention(
                _widen(q_TNH, width),
                cache,
                lengths_M,
                pages_MP.astype(jnp.int32),
                rows_M,
                samples_1,
                sm_scale=H**-0.5,
                num_kv_pages_per_block=min(max(1, self.keys // self.page), old.shape[0]),
                num_queries_per_block=self.queries,
                vmem_limit_bytes=_VMEM_BYTES,
            )
            return out_TNH[..., :H], (cache[most:],)

        return attend


_VMEM_BYTES = 64 << 20


def _widen(x_TNH: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x_TNH, ((0, 0), (0, 0), (0, width - x_TNH.shape[-1])))
