"""The jitted step: a batch of tokens in, the asked-for layers' activations out, on their way to the host."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.model.attention import make_attend
from qwen_jax.model.qwen2 import Qwen2

log = logging.getLogger(__name__)

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ACTIVATION_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def resolve_dtype(name: str) -> str:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU; other names stand for themselves."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def use_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in `folder`, so that a restart after a pre-emption compiles nothing."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Tap(NamedTuple):
    """What one tap saw of a batch; R kept rows a sample, those past a sample's own count mean nothing.

    activations_CBRD: in the stored dtype. The rest is float32, of these stored values: norms_CBR the rows'
    Euclidean norms; of each channel over a sample's rows mean_CBD the mean, squares_CBD the sum of squared
    distances from it, and max_abs_CBD the largest absolute value.
    """

    activations_CBRD: jax.Array
    norms_CBR: jax.Array
    mean_CBD: jax.Array
    squares_CBD: jax.Array
    max_abs_CBD: jax.Array


class Captured(NamedTuple):
    """What one step gives: a Tap by name, and the answers' log-probabilities where they were asked for."""

    taps: dict[str, Tap]
    answer_logprobs_BA: jax.Array | None = None


def summarise(stored_CBRD: jax.Array, counts_B: jax.Array) -> Tap:
    """The Tap of activations of which the first `counts_B` rows of each sample count.

    On the device, because on the host a pass over the values costs as much as compressing them. Two passes,
    the second one correcting the first's mean (Chan, Golub and LeVeque 1983): float32 sums of large, nearly
    constant channels lose digits in one.
    """
    x_CBRD = stored_CBRD.astype(jnp.float32)
    counts_here_BR1 = (jnp.arange(x_CBRD.shape[2]) < counts_B[:, None])[:, :, None]
    n_B1 = jnp.maximum(counts_B, 1)[:, None]

    def total(values_CBRD: jax.Array) -> jax.Array:
        return jnp.where(counts_here_BR1, values_CBRD, 0).sum(axis=2)

    rough_CBD = total(x_CBRD) / n_B1
    apart_CBRD = x_CBRD - rough_CBD[:, :, None]
    shift_CBD = total(apart_CBRD) / n_B1
    squares_CBD = total(jnp.square(apart_CBRD)) - n_B1 * jnp.square(shift_CBD)
    norms_CBR = jnp.linalg.norm(x_CBRD, axis=-1)
    max_abs_CBD = jnp.where(counts_here_BR1, jnp.abs(x_CBRD), 0).max(axis=2)
    return Tap(stored_CBRD, norms_CBR, rough_CBD + shift_CBD, jnp.maximum(squares_CBD, 0), max_abs_CBD)


class Capture:
    """A loaded model, and the one compiled step per batch shape that captures `layers` of it."""

    def __init__(
        self,
        model: Qwen2,
        layers: Sequence[int],
        taps: Sequence[str],
        dtype: str,
        mesh: Mesh,
        attention: str = "blocked",
    ):
        """layers: ascending 0-based block indices; taps: see Qwen2; dtype: of the captured arrays;
        attention: a resolved name (attention.py)."""
        graph, self._params = nnx.split(model)
        attend = make_attend(attention, mesh)
        self._mesh = mesh
        self._taps = tuple(taps)
        self._shapes: set[tuple] = set()
        # On TPU and GPU float32 products run in fewer bits unless told otherwise.
        precision = "highest" if model.embed_VD.dtype == jnp.float32 else None

        def step(
            params: nnx.State,
            tokens_BT: jax.Array,
            counts_B: jax.Array,
            positions_BR: jax.Array | None,
            answers_BA: jax.Array | None,
        ) -> Captured:
            with jax.default_matmul_precision(precision):
                model = nnx.merge(graph, params)
                stored, last_BTD = model(
                    tokens_BT, layers, taps, ACTIVATION_DTYPES[dtype], attend, positions_BR
                )
                seen = {tap: summarise(stored_CBRD, counts_B) for tap, stored_CBRD in stored.items()}
                if answers_BA is None:
                    return Captured(seen)
                return Captured(seen, model.log_probs(last_BTD, tokens_BT, answers_BA))

        by_row = NamedSharding(mesh, P("data"))
        self._step = jax.jit(step, out_shardings=Captured(NamedSharding(mesh, P(None, "data")), by_row))

    def __call__(
        self,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray | None = None,
        positions_BR: np.ndarray | None = None,
        answers_BA: np.ndarray | None = None,
    ) -> Captured:
        """Starts one step and returns before it is done; the copy to the host is under way.

        All int32, B a multiple of the mesh's data axis. counts_B: the rows of each sample that count, by default
        all T. positions_BR: the positions to keep, by default all. answers_BA: positions from 1 on whose tokens'
        log-probabilities are wanted (the model must have its head). Parameters never leave the devices.
        """
        if counts_B is None:
            counts_B = np.full(len(tokens_BT), tokens_BT.shape[1], np.int32)
        self._announce(tokens_BT, positions_BR, answers_BA)
        by_row = NamedSharding(self._mesh, P("data"))
        inputs = jax.device_put((tokens_BT, counts_B, positions_BR, answers_BA), by_row)
        captured = self._step(self._params, *inputs)
        # A compiled function returns dicts sorted by key.
        captured = captured._replace(taps={tap: captured.taps[tap] for tap in self._taps})
        for array in jax.tree.leaves(captured):
            array.copy_to_host_async()
        return captured

    def _announce(self, *arrays: np.ndarray | None) -> None:
        """Says that a shape is new, so that nobody takes its compilation for a hang."""
        shape = tuple(None if array is None else array.shape for array in arrays)
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        (rows, length), kept, answers = shape
        notes = f", {kept[1]} kept" if kept else ""
        notes += f", {answers[1]} answered" if answers else ""
        log.info("compiling %d x %d%s (the first batch of a shape takes longer)", rows, length, notes)
