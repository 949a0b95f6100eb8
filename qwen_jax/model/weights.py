"""safetensors -> stacked, sharded parameters, by a table of names. No torch.

The loader closes the books: every tensor of the checkpoint is either needed, left out on purpose
(named below), or an error; all errors are raised at once.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qwen_jax.errors import ConfigError
from qwen_jax.model.adapter import Adapter, LowRank, open_adapter
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.decoder import Decoder, abstract_model
from qwen_jax.model.sharding import sharding_of
from qwen_jax.model.tensors import READABLE_DTYPES, file_sha256, open_tensors

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# Checkpoint name below `model.layers.{i}.` -> (our path, checkpoint axes in our dimension letters, and the switch of
# ModelConfig that a model must have on for it, "" where all have it). Axes that the checkpoint flattens stand
# together: "NH D" is a [N * H, D] matrix.
LAYER_TENSORS = {
    "input_layernorm.weight": (("attn_norm", "scale_D"), "D", ""),
    "self_attn.q_proj.weight": (("attn", "q_NHD"), "NH D", ""),
    "self_attn.q_proj.bias": (("attn", "q_bias_NH"), "NH", "qkv_bias"),
    "self_attn.k_proj.weight": (("attn", "k_KHD"), "KH D", ""),
    "self_attn.k_proj.bias": (("attn", "k_bias_KH"), "KH", "qkv_bias"),
    "self_attn.v_proj.weight": (("attn", "v_KHD"), "KH D", ""),
    "self_attn.v_proj.bias": (("attn", "v_bias_KH"), "KH", "qkv_bias"),
    "self_attn.q_norm.weight": (("attn", "q_norm", "scale_H"), "H", "qk_norm"),
    "self_attn.k_norm.weight": (("attn", "k_norm", "scale_H"), "H", "qk_norm"),
    "self_attn.o_proj.weight": (("attn", "o_DNH"), "D NH", ""),
    "self_attn.o_proj.bias": (("attn", "o_bias_D"), "D", "o_bias"),
    "post_attention_layernorm.weight": (("mlp_norm", "scale_D"), "D", ""),
    "mlp.gate_proj.weight": (("mlp", "gate_FD"), "F D", ""),
    "mlp.gate_proj.bias": (("mlp", "gate_bias_F"), "F", "mlp_bias"),
    "mlp.up_proj.weight": (("mlp", "up_FD"), "F D", ""),
    "mlp.up_proj.bias": (("mlp", "up_bias_F"), "F", "mlp_bias"),
    "mlp.down_proj.weight": (("mlp", "down_DF"), "D F", ""),
    "mlp.down_proj.bias": (("mlp", "down_bias_D"), "D", "mlp_bias"),
}
# Read for log-probabilities only, else left out on purpose. Old checkpoints also store rope frequencies.
HEAD_TENSORS = (LM_HEAD, FINAL_NORM)
UNUSED_LAYER_TENSORS = ("self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a local checkpoint folder: file and shape of each, by name; and what is added to some of them."""

    folder: Path
    files: tuple[Path, ...]
    location: Mapping[str, Path]
    adapter: Adapter | None = None

    def digest(self) -> str:
        """sha256 over the files' own sha256 sums (those that the Hub shows), by name, and the adapter's."""
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(file_sha256, self.files))
        listing = "".join(f"{s}  {f.name}\n" for s, f in zip(sums, self.files, strict=True))
        listing += "" if self.adapter is None else self.adapter.digest()
        return hashlib.sha256(listing.encode()).hexdigest()

    def change(self, name: str) -> LowRank | None:
        return None if self.adapter is None else self.adapter.changes.get(name)


def open_checkpoint(folder: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """Finds `model.safetensors` or the files of `model.safetensors.index.json`; reads only headers.

    adapter: the folder of an adapter that is merged into what is loaded. Raises ConfigError for missing files,
    unreadable files and tensors that stand in two files.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        files = _indexed_files(index)
    elif single.exists():
        files = [single]
    else:
        raise ConfigError(
            f"{folder} holds neither {single.name} nor {index.name}; give a complete checkpoint"
        )
    location: dict[str, Path] = {}
    duplicates = []
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                if name in location:
                    duplicates.append(f"{name} (in {location[name].name} and {file.name})")
                location[name] = file
    if duplicates:
        raise ConfigError(f"{folder}: tensors stored twice: {', '.join(duplicates)}")
    return Checkpoint(folder, tuple(files), location, None if adapter is None else open_adapter(adapter))


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{index} is not a safetensors index ({error!r}); download the model again"
        ) from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ConfigError(f"{index} names files that are not there: {', '.join(missing)}; download them")
    return files


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    num_layers: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    with_head: bool = False,
) -> Decoder:
    """The first `num_layers` layers on the devices of `mesh`, in `dtype`; with the final norm and LM head if asked.

    Each device's part of each parameter is read straight from the files; no full copy of the model
    is held on the host. Raises ConfigError with all unknown, missing, mis-shaped and unreadable tensors.
    """
    check_tensors(checkpoint, config, num_layers, with_head)
    graph, abstract = abstract_parameters(config, num_layers, dtype, mesh, with_head)
    handles = {file: open_tensors(file) for file in checkpoint.files}
    filled = []
    for path, leaf in nnx.to_flat_state(abstract):
        names, axes = _sources(path, num_layers)
        tensors = [
            _Tensor(handles[checkpoint.location[name]], name, axes, config, checkpoint.change(name))
            for name in names
        ]
        read = partial(_read_part, tensors, _is_stacked(path), leaf.dtype)
        filled.append((path, leaf.replace(_place(leaf.shape, leaf.sharding, read))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def abstract_parameters(
    config: ModelConfig, num_layers: int, dtype: jnp.dtype, mesh: Mesh | AbstractMesh, with_head: bool = False
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and its parameters as shapes, each with the sharding that load_model gives it."""
    graph, abstract = nnx.split(abstract_model(config, num_layers, dtype, with_head))

    def placed(path: tuple[Any, ...], leaf: Any) -> Any:
        sharding = _sharding(path, config, mesh)
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

    flat = [(path, placed(path, leaf)) for path, leaf in nnx.to_flat_state(abstract)]
    return graph, nnx.from_flat_state(flat)


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return path[0] == "blocks"


def _sharding(path: tuple[Any, ...], config: ModelConfig, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where one of our parameters lies."""
    _, axes = _sources(path, 0)
    return sharding_of(mesh, "L" * _is_stacked(path) + axes.replace(" ", ""), config.dims)


_SINGLE_TENSORS: dict[tuple[Any, ...], tuple[str, str]] = {
    ("embed_VD",): (EMBEDDING, "V D"),
    ("final_norm", "scale_D"): (FINAL_NORM, "D"),
    ("head_VD",): (LM_HEAD, "V D"),
}
_PATH_TO_TENSOR: dict[tuple[Any, ...], tuple[str, str]] = {
    path: (suffix, axes) for suffix, (path, axes, _) in LAYER_TENSORS.items()
}


def _sources(path: tuple[Any, ...], num_layers: int) -> tuple[list[str], str]:
    """The checkpoint names behind one of our parameters, and their axes."""
    if path in _SINGLE_TENSORS:
        name, axes = _SINGLE_TENSORS[path]
        return [name], axes
    suffix, axes = _PATH_TO_TENSOR[path[1:]]
    return [f"model.layers.{i}.{suffix}" for i in range(num_layers)], axes


Index = tuple[slice, ...]

_ALIGNMENT = 64
_PIECE_BYTES = 4 << 20


class _Tensor:
    """One stored tensor, readable by an index into its unflattened axes."""

    def __init__(self, handle: Any, name: str, axes: str, config: ModelConfig, change: LowRank | None = None):
        self._stored, self._change = handle.get_slice(name), change
        self._groups = axes.split()
        self._dims = config.dims

    def read_into(self, part: np.ndarray, index: Index) -> None:
        """Fills `part` (contiguous) with what lies at `index` (a start and stop for each letter), cast."""
        parts = iter(index)
        flat = [self._flatten(group, [next(parts) for _ in group]) for group in self._groups]
        rows = part.reshape([bounds.stop - bounds.start for bounds in flat])
        step = max(1, _PIECE_BYTES // rows[0].nbytes)
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            piece = slice(flat[0].start + start, flat[0].start + stop)
            stored = self._stored[(piece, *flat[1:])]
            rows[start:stop] = stored if self._change is None else self._change.added(stored, piece, flat[1])

    def _flatten(self, group: str, parts: list[slice]) -> slice:
        """Only the first letter of a flattened group is ever split, so the part is one range."""
        inner = math.prod(self._dims[letter] for letter in group[1:])
        return slice(parts[0].start * inner, parts[0].stop * inner)


def _read_part(tensors: list[_Tensor], stacked: bool, dtype: jnp.dtype, index: Index) -> np.ndarray:
    """The part at `index` of one parameter; a stacked one has a tensor for each entry of its first axis."""
    part = _aligned_empty([bounds.stop - bounds.start for bounds in index], dtype)
    for entry, tensor in zip(part if stacked else [part], tensors, strict=True):
        tensor.read_into(entry, index[1:] if stacked else index)
    return part


def _aligned_empty(shape: list[int], dtype: jnp.dtype) -> np.ndarray:
    """An array that jax takes over on a CPU as it is; one that is not so aligned it would copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _place(shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Reads each distinct part once and puts it on every device that holds it."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        bounds = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        key = tuple((b.start, b.stop) for b in bounds)
        if key not in parts:
            parts[key] = read(bounds)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def check_tensors(
    checkpoint: Checkpoint, config: ModelConfig, num_layers: int, with_head: bool = False
) -> None:
    """Raises one ConfigError that names every tensor which does not fit the architecture."""
    expected = expected_shapes(config)
    needed = expected_shapes(config, num_layers, with_head)
    unused = {*HEAD_TENSORS} | {
        f"model.layers.{i}.{suffix}" for i in range(config.num_layers) for suffix in UNUSED_LAYER_TENSORS
    }
    found = set(checkpoint.location)
    faults = [f"missing {name}" for name in sorted(needed.keys() - found)]
    faults += [f"unknown {name}" for name in sorted(found - expected.keys() - unused)]
    for name in sorted(needed.keys() & found):
        with open_tensors(checkpoint.location[name]) as tensors:
            stored = tensors.get_slice(name)
            if tuple(stored.get_shape()) != needed[name]:
                faults.append(f"{name} has shape {tuple(stored.get_shape())}, expected {needed[name]}")
            if stored.get_dtype() not in READABLE_DTYPES:
                faults.append(f"{name} is {stored.get_dtype()}, readable are {', '.join(READABLE_DTYPES)}")
    if checkpoint.adapter is not None:
        faults += checkpoint.adapter.faults(expected_shapes(config, with_head=True))
    if faults:
        raise ConfigError(f"{checkpoint.folder} does not fit its config.json: {'; '.join(faults)}")


def expected_shapes(
    config: ModelConfig, num_layers: int | None = None, with_head: bool = False
) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of the embedding, of the first `num_layers` layers (default all) and the head."""

    def shape(axes: str) -> tuple[int, ...]:
        return tuple(math.prod(config.dims[letter] for letter in group) for group in axes.split())

    shapes = {EMBEDDING: shape("V D")}
    if with_head:
        shapes[FINAL_NORM] = shape("D")
        if not config.tied_embeddings:
            shapes[LM_HEAD] = shape("V D")
    of_layer = {
        suffix: shape(axes)
        for suffix, (_, axes, switch) in LAYER_TENSORS.items()
        if not switch or getattr(config, switch)
    }
    for i in range(config.num_layers if num_layers is None else num_layers):
        shapes |= {f"model.layers.{i}.{suffix}": found for suffix, found in of_layer.items()}
    return shapes
