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


class Captured(NamedTuple):
    """What one step gives: activations_CBTD in the stored dtype; norms_CBT their Euclidean norms, float32."""

    activations_CBTD: jax.Array
    norms_CBT: jax.Array


class Capture:
    """A loaded model, and the one compiled step per batch shape that captures `layers` of it."""

    def __init__(
        self,
        model: Qwen2,
        layers: Sequence[int],
        tap: str,
        dtype: str,
        mesh: Mesh,
        attention: str = "blocked",
    ):
        """layers: ascending 0-based block indices; tap: see Qwen2; dtype: of the captured arrays;
        attention: a resolved name (attention.py)."""
        graph, self._params = nnx.split(model)
        attend = make_attend(attention, mesh)
        self._mesh = mesh
        self._shapes: set[tuple[int, ...]] = set()
        # On TPU and GPU float32 products run in fewer bits unless told otherwise.
        precision = "highest" if model.embed_VD.dtype == jnp.float32 else None

        def step(params: nnx.State, tokens_BT: jax.Array) -> Captured:
            with jax.default_matmul_precision(precision):
                model = nnx.merge(graph, params)
                captured_CBTD = model(tokens_BT, layers, tap, ACTIVATION_DTYPES[dtype], attend)
            # On the device, because on the host a pass over the values costs as much as compressing them.
            return Captured(captured_CBTD, jnp.linalg.norm(captured_CBTD.astype(jnp.float32), axis=-1))

        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, P(None, "data")))

    def __call__(self, tokens_BT: np.ndarray) -> Captured:
        """Starts one step and returns before it is done; the copy to the host is under way.

        tokens_BT: int32, B a multiple of the mesh's data axis. Parameters never leave the devices.
        """
        if tokens_BT.shape not in self._shapes:
            self._shapes.add(tokens_BT.shape)
            log.info("compiling %d x %d (the first batch of a shape takes longer)", *tokens_BT.shape)
        tokens = jax.device_put(tokens_BT, NamedSharding(self._mesh, P("data")))
        captured = self._step(self._params, tokens)
        for array in captured:
            array.copy_to_host_async()
        return captured
