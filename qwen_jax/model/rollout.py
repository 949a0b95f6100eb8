"""Tokens of the model's own after prompts: one at a time, for many prompts at once.

Prompts go through steps as everywhere (program.py), which leave their keys and values. Then each has a slot, in which
every new token looks at the keys of its own prompt alone, in blocks counted from the prompt's start. So what a slot
computes depends neither on the other slots nor on how long they are.

B slots of a row; other letters: see decoder.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.model.attention import Attend, Carried, make_form
from qwen_jax.model.capture import zeros_like
from qwen_jax.model.decoder import Decoder, Shared
from qwen_jax.model.program import Program, specs_of

SLOTS = 16
"""Of a row."""
_TOKENS_AT_ONCE = 16
_KEYS = 256


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token, else tokens are drawn, by `seed`, the sample and the place. ends: token
    ids that end an answer."""

    temperature: float
    seed: int
    ends: tuple[int, ...]


class PromptStep(NamedTuple):
    """A step of prompts. tokens_XT, positions_XT: as data.steps.Step has them. start_XB, slot_XB, count_X: of each row
    the prompts that it completes: where their keys begin in what the step leaves, their slots, and how many they are.
    """

    tokens_XT: np.ndarray
    positions_XT: np.ndarray
    start_XB: np.ndarray
    slot_XB: np.ndarray
    count_X: np.ndarray


class Prompts(NamedTuple):
    """int32, of each slot: its prompt's last token and length (1 where it is empty), how many tokens may follow (0
    there), and its sample_idx."""

    last_token_XB: np.ndarray
    length_XB: np.ndarray
    most_XB: np.ndarray
    sample_XB: np.ndarray


class _State(NamedTuple):
    """Of each slot: its last token, that token's position, and how many may still follow."""

    token_XB: jax.Array
    position_XB: jax.Array
    left_XB: jax.Array


def slot_attention(position_B: jax.Array) -> Attend:
    """Attention of one token a slot. What a layer carries: keys and values [B, K, S, H], S a multiple of _KEYS."""
    slots = jnp.arange(position_B.shape[0])
    blocks = position_B.max() // _KEYS + 1

    def attend(
        q_BNH: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array, carried: Carried
    ) -> tuple[jax.Array, Carried]:
        keys, values = (
            old_BKSH.at[slots, :, position_B].set(new_BKH)
            for old_BKSH, new_BKH in zip(carried, (k_BKH, v_BKH), strict=True)
        )
        B, K, H = k_BKH.shape
        q_BKGH = q_BNH.reshape(B, K, -1, H)

        def more(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            weighted, largest, total = sums
            first = number * _KEYS
            k_BKSH, v_BKSH = (jax.lax.dynamic_slice_in_dim(x, first, _KEYS, 2) for x in (keys, values))
            scores = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
            visible_BS = first + jnp.arange(_KEYS) <= position_B[:, None]
            scores = jnp.where(visible_BS[:, None, None], scores * H**-0.5, -jnp.inf)
            new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_largest), jnp.exp(largest - new_largest)
            added = jnp.einsum(
                "BKGS,BKSH->BKGH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
            )
            return weighted * shrink + added, new_largest, total * shrink + weights.sum(-1, keepdims=True)

        empty = jnp.zeros((*q_BKGH.shape[:3], 1), jnp.float32)
        start = (jnp.zeros(q_BKGH.shape, jnp.float32), empty - jnp.inf, empty)
        weighted, _, total = jax.lax.fori_loop(0, blocks, more, start)
        return (weighted / total).astype(q_BNH.dtype).reshape(q_BNH.shape), (keys, values)

    return attend


class Rollout:
    """Continues prompts, SLOTS of each row at once."""

    def __init__(self, program: Program, params: nnx.State, sampling: Sampling):
        """program: of a run with log-probabilities. params: of its model, on the devices."""
        tokens = program.shape.tokens
        # A step's prompts are all whole in what it leaves.
        shape = replace(cast(Any, program.shape), positions=program.shape.positions + tokens, page=1)
        platform = program.mesh.devices.flat[0].platform
        form = make_form("blocked", platform, tokens, shape.positions)
        self._program = replace(program, shape=shape, form=form, taps=(), layers=(0,))
        self._sampling = sampling
        self._params = params
        self._tables = jax.device_put(self._program.tables(), NamedSharding(program.mesh, P()))

    @property
    def shape(self) -> Any:
        """Of the steps that it takes, for each row by itself."""
        return replace(cast(Any, self._program.shape), rows=1)

    def __call__(self, steps: Sequence[PromptStep], prompts: Prompts) -> np.ndarray:
        """int32 [X, B, longest answer]: the tokens that follow each prompt, -1 behind its end.

        steps: that hold the prompts' tokens.
        """
        size = _room(int((prompts.length_XB + prompts.most_XB).max()))
        slots = self._filled(steps, size)
        given = (prompts.last_token_XB, prompts.length_XB - 1, prompts.most_XB, prompts.sample_XB)
        *begun, samples = jax.device_put(given, self._by_row)
        state = _State(*begun)
        found = []
        while np.asarray(state.left_XB).any():
            state, slots, tokens = self._decode(self._params, self._tables, slots, state, samples)
            found.append(np.asarray(tokens))
        return np.concatenate(found, axis=-1)

    @property
    def _by_row(self) -> NamedSharding:
        return NamedSharding(self._program.mesh, P("data"))

    def _filled(self, steps: Sequence[PromptStep], size: int) -> Carried:
        """Every slot's keys and values, [X, L, B, K, size, H]."""
        program = self._program
        kv_heads = program.parts.count * program.parts.kv_heads_each(program.config.num_kv_heads)
        shape = (program.shape.rows, program.num_layers, SLOTS, kv_heads, size, program.config.head_dim)
        zeros = np.zeros(shape, jnp.dtype(program.dtype))
        slots: Carried = tuple(jax.device_put((zeros, zeros), self._of_slots))
        carried = zeros_like(program.carried())
        for step in steps:
            inputs = jax.device_put((step.tokens_XT, step.positions_XT), self._by_row)
            nothing = (None,) * 5  # of what is captured: the program has no taps
            *_, carried, _ = program.step(self._params, self._tables, carried, {}, *inputs, *nothing)
            begun = jax.device_put((step.start_XB, step.slot_XB, step.count_X), self._by_row)
            slots = self._take(slots, carried, *begun)
        return slots

    @property
    def _of_slots(self) -> NamedSharding:
        return NamedSharding(self._program.mesh, P("data", None, None, "model"))

    @cached_property
    def _take(self) -> jax.stages.Wrapped:
        """(slots, carried, start_XB, slot_XB, count_X) -> slots: puts the keys of prompts that are whole where they are
        used."""
        slots, carried = (self._of_slots.spec,) * 2, specs_of(self._program.carried())
        mapped = jax.shard_map(
            _own_take,
            mesh=self._program.mesh,
            in_specs=(slots, carried, P("data"), P("data"), P("data")),
            out_specs=slots,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=0)

    @cached_property
    def _decode(self) -> jax.stages.Wrapped:
        """(params, rope tables, slots, state, sample_XB) -> (state, slots, tokens [X, B, _TOKENS_AT_ONCE])"""
        graph, params = self._program.model
        slots, by_row = (self._of_slots.spec,) * 2, P("data")
        mapped = jax.shard_map(
            partial(self._own_decode, graph),
            mesh=self._program.mesh,
            in_specs=(specs_of(params), P(), slots, by_row, by_row),
            out_specs=(by_row, slots, by_row),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=2)

    def _own_decode(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        tables: tuple[jax.Array, jax.Array],
        slots: Carried,
        state: _State,
        sample_XB: jax.Array,
    ) -> tuple[_State, Carried, jax.Array]:
        slots, state, sample_B = jax.tree.map(lambda x: x[0], (slots, state, sample_XB))
        with jax.default_matmul_precision("highest" if self._program.dtype == "float32" else None):
            model: Decoder = nnx.merge(graph, params)

            def one(carry: tuple[_State, Carried], step: None) -> tuple[tuple[_State, Carried], jax.Array]:
                (token_B, position_B, left_B), slots = carry
                cos_BH, sin_BH = (table_PH[position_B] for table_PH in tables)
                shared = Shared(cos_BH, sin_BH, slot_attention(position_B), self._program.parts)
                _, x_BD, slots = model(token_B, shared, slots, (0,), ())
                chosen_B = self._chosen(model.logits(x_BD), sample_B, position_B)
                goes_on = left_B > 0
                ended = jnp.isin(chosen_B, jnp.array(self._sampling.ends, jnp.int32))
                state = _State(
                    jnp.where(goes_on, chosen_B, token_B),
                    position_B + goes_on,
                    jnp.where(goes_on & ~ended, left_B - 1, 0),
                )
                return (state, slots), jnp.where(goes_on, chosen_B, -1)

            (state, slots), tokens = jax.lax.scan(one, (state, slots), None, _TOKENS_AT_ONCE)
        return jax.tree.map(lambda x: x[None], (state, slots, tokens.T))

    def _chosen(self, logits_BV: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
        """int32 [B]. Drawn with the Gumbel trick (Maddison et al. 2014), each from a key of its own."""
        if not self._sampling.temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        base = jax.random.key(self._sampling.seed)

        def drawn(logits_V: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(base, sample), position)
            noise_V = jax.random.gumbel(key, logits_V.shape, jnp.float32)
            return jnp.argmax(logits_V / self._sampling.temperature + noise_V)

        return jax.vmap(drawn)(logits_BV, sample_B, position_B).astype(jnp.int32)


def _own_take(
    slots: Carried, carried: Carried, start_XB: jax.Array, slot_XB: jax.Array, count_X: jax.Array
) -> Carried:
    """slots: of a row [1, L, B, K, size, H]. carried: [1, L, K, S, H]."""
    size = slots[0].shape[4]
    start_B, slot_B = start_XB[0], slot_XB[0]
    padded = tuple(jnp.pad(x[0], ((0, 0), (0, 0), (0, size), (0, 0))) for x in carried)

    def take(number: jax.Array, slots: Carried) -> Carried:
        pieces = (jax.lax.dynamic_slice_in_dim(x, start_B[number], size, 2) for x in padded)
        return tuple(
            jax.lax.dynamic_update_index_in_dim(all_, piece[None], slot_B[number], 2)
            for all_, piece in zip(slots, pieces, strict=True)
        )

    return jax.lax.fori_loop(0, count_X[0], take, slots)


def slot_bytes(program: Program) -> int:
    """Of the keys and values of a row's slots, and of the steps that fill them, on each device; 0 without rollouts."""
    if not program.rollout:
        return 0
    config, shape = program.config, program.shape
    kv_heads = program.parts.kv_heads_each(config.num_kv_heads)
    positions = SLOTS * _room(shape.positions) + shape.positions + shape.tokens
    values = 2 * program.num_layers * kv_heads * positions * config.head_dim
    return values * jnp.dtype(program.dtype).itemsize


def _room(longest: int) -> int:
    """Positions of a slot: few sizes, each of which compiles a program."""
    return _KEYS << max(0, (longest - 1) // _KEYS).bit_length()
