"""The program of a step, without its weights: tokens in, the asked-for layers' activations and their statistics out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.kinds import ALL_KINDS, EMBEDDING, EXACT_CHANNELS, STORED_DTYPES
from qwen_jax.model.attention import Carried, Form
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.decoder import Decoder, Shared, rope_tables
from qwen_jax.model.quantise import Quantised, Stored, loss_sums, quantise, values_of
from qwen_jax.model.sharding import Parts
from qwen_jax.model.weights import abstract_parameters


def resolve_dtype(name: str) -> str:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU; other names stand for themselves."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class StepShape(Protocol):
    """What a program needs of data.steps.StepShape."""

    @property
    def tokens(self) -> int: ...

    @property
    def positions(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def blocks(self) -> int: ...


Shape = TypeVar("Shape", bound=StepShape, covariant=True)

TapArrays = dict[str, jax.Array] | dict[str, Stored[jax.Array]]
"""[X, C, R, D] of each tap; where the stored dtype is quantised, as computed and as stored."""


BlockSums = dict[str, tuple[jax.Array, ...]]
"""Of each tap, of the channels mean_XCED, squares_XCED and max_abs_XCED, and where quantised the largest error,
max_error_XCED."""


class Sums(NamedTuple):
    """Statistics of a tap. of_rows: norms_XCR, and where quantised the three of loss_sums. of_blocks: see BlockSums."""

    of_rows: tuple[jax.Array, ...]
    of_blocks: tuple[jax.Array, ...]


@dataclass(frozen=True)
class Program(Generic[Shape]):
    """A run's step without its weights: all that decides what is compiled.

    num_layers: layers that are run. layers: ascending 0-based block indices below it; taps: see Decoder; stored_dtype:
    of the captured arrays; with_answers: log-probabilities are wanted, which takes the model's head; rollout:
    tokens that the model may put behind each prompt (rollout.py).
    """

    config: ModelConfig
    num_layers: int
    layers: tuple[int, ...]
    taps: tuple[str, ...]
    dtype: str
    stored_dtype: str
    mesh: Mesh
    shape: Shape
    form: Form
    with_answers: bool = False
    rollout: int = 0

    @property
    def parts(self) -> Parts:
        return Parts("model", self.mesh.shape["model"])

    @cached_property
    def model(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The graph, and the parameters as shapes with their shardings."""
        return abstract_parameters(
            self.config, self.num_layers, jnp.dtype(self.dtype), self.mesh, self.with_answers
        )

    def carried(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What attention carries from step to step, for every row and layer."""
        kv_heads = self.parts.count * self.parts.kv_heads_each(self.config.num_kv_heads)
        found = []
        shapes = self.form.carried_shapes(self.shape.positions, kv_heads, self.config.head_dim)
        for shape, head_axis in zip(shapes, self.form.head_axes, strict=True):
            axes = ["model" if axis == head_axis else None for axis in range(len(shape))]
            found.append(self._array((self.num_layers, *shape), self.dtype, None, *axes))
        return tuple(found)

    @property
    def is_quantised(self) -> bool:
        return STORED_DTYPES[self.stored_dtype].is_quantised

    @property
    def captured_dtype(self) -> str:
        """Of what the step gives."""
        return self.dtype if self.is_quantised else self.stored_dtype

    def captured_rows(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """So many tokens of each tap, as the step gives them."""
        found = {}
        for tap in self.taps:
            count = 1 if tap == EMBEDDING else len(self.layers)
            shape = (count, rows, ALL_KINDS[tap].width(self.config.dims))
            found[tap] = self._array(shape, self.captured_dtype)
        return found

    def stored_rows(self, rows: int) -> Any:
        """The same, as they leave the device: arrays, or Quantised."""
        captured = self.captured_rows(rows)
        return jax.tree.map(self._quantised, captured) if self.is_quantised else captured

    def rows_to_sum(self, rows: int) -> Any:
        """The same, as they are summed up (TapArrays)."""
        captured, stored = self.captured_rows(rows), self.stored_rows(rows)
        return jax.tree.map(Stored, captured, stored) if self.is_quantised else captured

    def carried_rows(self) -> Any:
        """The last kept tokens of every row, which the next step's blocks may begin with (TapArrays)."""
        return self.rows_to_sum(self.shape.block_tokens)

    def _quantised(self, captured: jax.ShapeDtypeStruct) -> Quantised[jax.ShapeDtypeStruct]:
        by_row, width = captured.shape[1:3], captured.shape[3]
        exact = (*by_row, EXACT_CHANNELS)
        return Quantised(
            self._array((*by_row, width), self.stored_dtype),
            self._array(by_row, "float32"),
            self._array(exact, "int32"),
            self._array(exact, self.dtype),
        )

    def _array(self, shape: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        """One for each row."""
        sharding = NamedSharding(self.mesh, P("data", *axes))
        return jax.ShapeDtypeStruct((self.shape.rows, *shape), jnp.dtype(dtype), sharding=sharding)

    @property
    def weight_bytes(self) -> int:
        """Of the parameters on each device."""
        return _bytes_each(self.model[1])

    @property
    def layer_bytes(self) -> int:
        """Of the layers among them: without embedding, head and final norm."""
        return _bytes_each(self.model[1]["blocks"])

    @property
    def carried_bytes(self) -> int:
        """Of what goes on from step to step, on each device."""
        return _bytes_each((self.carried(), self.carried_rows()))

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return rope_tables(self.config, self.shape.positions)

    @cached_property
    def step(self) -> jax.stages.Wrapped:
        """(params, rope tables, carried, carried rows, tokens_XT, positions_XT, kept_XR, answers, kept counts [X],
        block starts and counts [X, E]) -> (TapArrays, {tap: Sums}, [X, T] log-probabilities or None, carried, carried
        rows). Each device works on its own row; what is carried is donated."""
        graph, params = self.model
        by_row, carried = P("data"), tuple(array.sharding.spec for array in self.carried())
        mapped = jax.shard_map(
            partial(self._own_row, graph),
            mesh=self.mesh,
            in_specs=(specs_of(params), P(), carried, *(by_row,) * 8),
            out_specs=(by_row, by_row, by_row, carried, by_row),
            check_vma=False,  # what a loop carries begins alike everywhere and ends by device
        )
        return jax.jit(mapped, donate_argnums=(2, 3))

    def lower_step(self, kept: int | None = None) -> jax.stages.Lowered:
        """The step for the devices of the mesh, which need not be there. kept: tokens kept of a row, None for all."""
        tokens, count = self._array((self.shape.tokens,), "int32"), self._array((), "int32")
        kept_XR = None if kept is None else self._array((kept,), "int32")
        answers = (tokens, tokens, count) if self.with_answers else None
        blocks = self._array((self.shape.blocks,), "int32")
        everywhere = NamedSharding(self.mesh, P())
        tables = [
            jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=everywhere) for table in self.tables()
        ]
        carried = self.carried(), self.carried_rows()
        inputs = tokens, tokens, kept_XR, answers, count, blocks, blocks
        return self.step.lower(self.model[1], tuple(tables), *carried, *inputs)

    def _own_row(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        tables: tuple[jax.Array, jax.Array],
        carried: Carried,
        *inputs: Any,
    ) -> tuple[TapArrays, dict[str, Sums], jax.Array | None, Carried, TapArrays]:
        """What a device does with its row."""
        carried, (rows, tokens_T, positions_T, kept_R, answers, count, *blocks) = jax.tree.map(
            lambda x: x[0], (carried, inputs)
        )
        cos_TH, sin_TH = (table_PH[positions_T] for table_PH in tables)
        # On TPU and GPU float32 products run in fewer bits unless told otherwise.
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else None):
            model: Decoder = nnx.merge(graph, params)
            captured, last_TD, carried = model(
                tokens_T,
                Shared(cos_TH, sin_TH, self.form(positions_T), self.parts),
                carried,
                self.layers,
                self.taps,
                jnp.dtype(self.captured_dtype),
                kept_R,
            )
            log_probs_T = model.log_probs(last_TD, *answers) if answers is not None else None
        taps, sums, rows = self.finish(rows, captured, count, *blocks)
        return jax.tree.map(lambda x: x[None], (taps, sums, log_probs_T, carried, rows))

    def finish(
        self,
        before: TapArrays,
        captured: dict[str, jax.Array],
        count: jax.Array,
        starts_E: jax.Array,
        counts_E: jax.Array,
    ) -> tuple[TapArrays, dict[str, Sums], TapArrays]:
        """What a step does with its `count` kept tokens: quantises them where asked, and sums them up. before: the rows
        that a block may begin with; those for the next step come last."""
        taps: TapArrays = captured
        if self.is_quantised:
            taps = {tap: Stored(x_CRD, quantise(x_CRD, self.stored_dtype)) for tap, x_CRD in captured.items()}
        taps = jax.lax.optimization_barrier(taps)  # so that `sum_up_more` gives the same bits
        of_blocks = self._block_sums(before, taps, starts_E, counts_E)
        sums, rows = {}, {}
        for tap, of_tap in taps.items():
            norms_CR = jnp.linalg.norm(values_of(of_tap), axis=-1)
            loss = loss_sums(of_tap) if isinstance(of_tap, Stored) else ()
            sums[tap] = Sums((norms_CR, *loss), of_blocks[tap])
            rows[tap] = rows_from(before[tap], of_tap, count - self.shape.block_tokens)
        return taps, sums, rows

    def _block_sums(
        self, before: TapArrays, taps: TapArrays, starts_E: jax.Array, counts_E: jax.Array
    ) -> BlockSums:
        return {
            tap: block_sums(
                partial(rows_from, before[tap], taps[tap]), starts_E, counts_E, self.shape.block_tokens
            )
            for tap in taps
        }

    @cached_property
    def sum_up_more(self) -> jax.stages.Wrapped:
        """(carried rows, TapArrays, block starts and counts [X, E]) -> BlockSums of the blocks of a step beyond those
        that it takes, which only very short samples make; they begin in the step."""
        return self.by_row(self._block_sums, 4)

    def by_row(self, function: Callable, arguments: int) -> jax.stages.Wrapped:
        """Done by each device with its own row of the arguments."""

        def own_row(*inputs: Any) -> Any:
            return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], inputs)))

        mapped = jax.shard_map(
            own_row,
            mesh=self.mesh,
            in_specs=(P("data"),) * arguments,
            out_specs=P("data"),
            check_vma=False,
        )
        return jax.jit(mapped)


def rows_from(before: Any, stored: Any, start: jax.Array) -> Any:
    """[C, S, ...]: S rows of the stored ones from `start` on, those before them where it is negative, zeros behind
    them; of each of several arrays."""
    return jax.tree.map(lambda old, here: _rows_from(old, here, start), before, stored)


def _rows_from(before_CS: jax.Array, stored_CR: jax.Array, start: jax.Array) -> jax.Array:
    """Joins no more than three blocks, since the stored rows are most of what a device holds beside the weights."""
    size = before_CS.shape[1]
    short = max(0, size - stored_CR.shape[1])
    stored_CR = jnp.pad(stored_CR, ((0, 0), (0, short), *[(0, 0)] * (stored_CR.ndim - 2)))
    inside = jnp.clip(start, 0, stored_CR.shape[1] - size)
    piece_CS = jax.lax.dynamic_slice_in_dim(stored_CR, inside, size, 1)
    around = jnp.concatenate([before_CS, piece_CS, jnp.zeros_like(before_CS)], axis=1)
    return jax.lax.dynamic_slice_in_dim(around, size + start - inside, size, 1)


def _bytes_each(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def specs_of(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding.spec, tree)


def block_sums(
    rows_at: Callable[[jax.Array], jax.Array | Stored[jax.Array]],
    starts_E: jax.Array,
    counts_E: jax.Array,
    size: int,
) -> tuple[jax.Array, ...]:
    """Mean, sum of squared distances from it and largest absolute value of each channel, [C, E, D] each, over the
    first `counts_E` of the `size` rows that `rows_at` gives for each of `starts_E`; of quantised rows the largest
    error, too.

    On the device, because on the host a pass over the values costs as much as compressing them. Each block in the
    same way wherever it stands, so that its bits are its own. Two passes, the second one correcting the first's mean
    (Chan, Golub and LeVeque 1983): float32 sums of large, nearly constant channels lose digits in one.
    """

    def one(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        start, count = block
        rows = rows_at(start)
        x_CSD = values_of(rows)
        counts_here_S1 = (jnp.arange(size) < count)[:, None]
        n = jnp.maximum(count, 1)

        def total(values_CSD: jax.Array) -> jax.Array:
            return jnp.where(counts_here_S1, values_CSD, 0).sum(axis=1)

        rough_CD = total(x_CSD) / n
        apart_CSD = x_CSD - rough_CD[:, None]
        shift_CD = total(apart_CSD) / n
        squares_CD = total(jnp.square(apart_CSD)) - n * jnp.square(shift_CD)

        def largest(values_CSD: jax.Array) -> jax.Array:
            return jnp.where(counts_here_S1, jnp.abs(values_CSD), 0).max(axis=1)

        found = rough_CD + shift_CD, jnp.maximum(squares_CD, 0), largest(x_CSD)
        if not isinstance(rows, Stored):
            return found
        return *found, largest(rows.computed_CRD.astype(jnp.float32) - x_CSD)

    return tuple(sums_ECD.swapaxes(0, 1) for sums_ECD in jax.lax.map(one, (starts_E, counts_E)))
