"""What a shard is: gzip of a pickle `{layer: [record, ...]}`, written in one pass and read safely."""

import itertools
import os
import pickle
import struct
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np

from qwen_jax.errors import BadDataError
from qwen_jax.kinds import EMBEDDING, NOTES
from qwen_jax.ledger.checks import MOST
from qwen_jax.shards.compress import Budget, Buffer, GzipReader, MalformedError, ParallelGzipWriter, Writable
from qwen_jax.shards.dtypes import ACTIVATION_DTYPES, QUANTISED_DTYPES, SPELLINGS, Name
from qwen_jax.shards.parts import (
    HEAD,
    PartReader,
    bytes_left,
    index_member,
    read_index,
    stored_keys,
    wanted_parts,
)
from qwen_jax.shards.rows import (
    ALL_QUANTISED_KEYS,
    KIND_KEYS,
    QuantisedRows,
    Rows,
    StoredRows,
    quantised,
    quantised_keys,
    restore,
    rows_by_key,
)
from qwen_jax.shards.unpickle import ArrayShell, Unpickler

RECORD_KEYS = ("sample_idx", "activation", "shape", "text_preview", "task_id", "token_ids")
"""What every record holds, in this order."""
ROW_KEYS = ("token_positions", "token_roles", "token_cells")
ANSWER_KEYS = ("answer_logprobs", "answer_token_ids", "answer_positions")
NOTE_KEYS = tuple(NOTES)
OPTIONAL_KEYS = (*ROW_KEYS, *ANSWER_KEYS, *KIND_KEYS, *ALL_QUANTISED_KEYS, *NOTE_KEYS)
"""What a record may hold besides: ROW_KEYS, int32 arrays over its rows; ANSWER_KEYS, one entry for each token of the
answer, whether its row is kept or not: float32 log-probabilities, int32 token ids, int32 positions in the prompt;
KIND_KEYS, activations of further kinds; ALL_QUANTISED_KEYS, what belongs to quantised rows (rows.py); NOTE_KEYS, what
the sample's stream line says of it (kinds.NOTES)."""


def record_keys(kinds: Sequence[str]) -> dict[str, str]:
    """The key under which a record holds the rows of each kind. kinds: what is stored of a layer, the main kind first,
    whose rows are always under `activation`."""
    return {kind: kind if number else "activation" for number, kind in enumerate(kinds)}


_RECORD_COST, _RECORD_WORK = 512, 16
_BYTES_A_STEP = 1024


class ShardError(BadDataError):
    """A shard that cannot be written as asked, or a file that is not a whole and well-formed shard."""


Layers = np.ndarray | Sequence[StoredRows]


@dataclass(frozen=True)
class Sample:
    """One sample as the worker hands it over.

    Attributes:
        sample_idx: 0-based line number in the stream.
        activations: [n_layers, n_tokens, hidden] array, or one [n_tokens, hidden] array, Rows or QuantisedRows a
            layer; of kinds.STORED_DTYPES, quantised ones as QuantisedRows.
        token_ids: int32 [n_tokens], of the tokens that are kept.
        text_preview: the first characters of the prompt.
        task_id: the task's name in the dataset.
        extras: further arrays for the record, one for all layers: some of ROW_KEYS, int32 [n_tokens, ...], and
            ANSWER_KEYS, [n] all.
        kinds: where several kinds are stored, all of them by name (KIND_KEYS), each like `activations`, which
            is the first.
        embedding: [n_tokens, hidden], where the embedding is stored.
        notes: some of NOTE_KEYS.
    """

    sample_idx: int
    activations: Layers
    token_ids: np.ndarray
    text_preview: str
    task_id: str
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    kinds: Mapping[str, Layers] = field(default_factory=dict)
    embedding: StoredRows | None = None
    notes: Mapping[str, str | int] = field(default_factory=dict)

    def by_kind(self) -> list[Layers]:
        """Every activation array that the shard holds once: of each kind its layers, and last the embedding."""
        kinds: list[Layers] = list(self.kinds.values()) or [self.activations]
        return kinds if self.embedding is None else [*kinds, [self.embedding]]

    @property
    def nbytes(self) -> int:
        """Raw bytes of its activations."""
        return sum(array.nbytes for kind in self.by_kind() for array in kind)


@dataclass(frozen=True)
class ShardInfo:
    """What went into a shard; `raw_bytes` is the size of its activations before compression."""

    samples: int
    tokens: int
    first_sample_idx: int
    last_sample_idx: int
    raw_bytes: int


# The pickle is written by hand, not by pickle.Pickler, for three reasons: the pickler keeps a copy of every
# array's bytes until it ends; it decides by object identity what to repeat, so that equal strings give
# different bytes; and it copies each array once more. A fixed shape of data needs few opcodes.


_NDARRAY = Name("numpy", "ndarray")
_DTYPE = Name("numpy", "dtype")
_RECONSTRUCT = Name("numpy._core.multiarray", "_reconstruct")

# Memo numbers: the record keys come first, then these, then what _Memo numbers. Under _SLOT_MAIN is the record's array
# of the main kind, where that stands in it twice.
_SLOT_RECONSTRUCT = len(RECORD_KEYS)
_SLOT_ARRAY_ARGS = _SLOT_RECONSTRUCT + 1
_SLOT_MAIN = _SLOT_RECONSTRUCT + 2
_SLOT_FREE = _SLOT_RECONSTRUCT + 3


def write_shard(
    file: Writable, layers: Sequence[int], samples: Sequence[Sample], *, threads: int | None = None
) -> ShardInfo:
    """Writes one shard: `{layer: [record, ...]}` with the samples' records in order; the embedding, if any, last.

    What layers share stands before the first of them, so that one layer is read without the others; where each lies is
    said behind the last (shards.parts).

    The bytes depend on the arguments' values alone, not on `threads`. Beside the samples it needs a few
    megabytes of memory. When it raises, what reached `file` is not a whole shard.

    Args:
        file: binary file-like with `write`; not closed.
        layers: the layer index of each entry of `Sample.activations`; distinct, not negative.
        samples: at least one, ascending in sample_idx.
        threads: compressing threads; None takes all cores.

    Raises:
        ShardError: the samples do not fit together (the message names the sample), or there are none.
    """
    _check_samples(layers, samples)
    keys: list[int | str] = []
    with ParallelGzipWriter(file, threads) as out:
        for key, pieces in _pickled_parts(layers, samples):
            if keys:
                out.cut()
            keys.append(key)
            for piece in pieces:
                out.write_joined(piece if isinstance(piece, list) else [piece])
        out.write(pickle.STOP)
    file.write(index_member(keys, out.spans))
    return ShardInfo(
        samples=len(samples),
        tokens=sum(len(sample.token_ids) for sample in samples),
        first_sample_idx=int(samples[0].sample_idx),
        last_sample_idx=int(samples[-1].sample_idx),
        raw_bytes=sum(sample.nbytes for sample in samples),
    )


def load_shard(
    path_or_file: str | os.PathLike | BinaryIO,
    *,
    layers: Collection[int | str] | None = None,
    max_bytes: int | None = None,
    name: str | None = None,
    raw: bool = False,
) -> dict[int | str, list[dict]]:
    """Reads a shard without trusting it: no code from the file runs, and memory is bounded.

    Takes what `write_shard` writes and what pickle protocols 2 to 4 write for the same structure.

    Args:
        path_or_file: the shard's path or an open binary file.
        layers: the layers to keep in memory. Of a shard that says where they lie they alone are read, and checked; of
            others, and of files that cannot seek, large arrays of unwanted layers are jumped over where that can be,
            and what lies behind the last wanted one is not read. None is all of them.
        max_bytes: bound on the memory that the content may take; by default it grows with the size of the
            file (`shards.compress.Budget`), enough for any hidden states.
        name: what messages call the shard; by default its path.
        raw: give quantised rows as they are stored: codes under `activation`, and ALL_QUANTISED_KEYS.

    Returns:
        `{layer: [record, ...]}`, the embedding's records under EMBEDDING where it is stored, with the keys
        RECORD_KEYS and some of OPTIONAL_KEYS; `activation` is a writable [n_tokens, hidden] array in the stored
        dtype, float32 where that is a quantised one; `token_ids` one int32 [n_tokens] array for all records of a
        sample.

    Raises:
        ShardError: not a whole, well-formed shard, or without one of `layers`; the message names the file and what
            is wrong.
    """
    if layers is not None and not layers:
        raise ShardError("layers names none; give at least one, or None for all")
    if not isinstance(path_or_file, str | os.PathLike):
        name = name or str(getattr(path_or_file, "name", "the open file"))
        with _shard_errors(name):
            return _load(path_or_file, name, layers, max_bytes, raw)
    path = os.fspath(path_or_file)
    if path.startswith("gs://"):
        raise ShardError(f"{path} lies in a bucket: qwen_jax.reading.load_shard reads it")
    with _shard_errors(name or path), open(path, "rb") as file:
        return _load(file, name or path, layers, max_bytes, raw)


def shard_layers(path: str | os.PathLike) -> list[int | str]:
    """The layers that a shard holds, EMBEDDING last; raises as load_shard does."""
    with _shard_errors(os.fspath(path)), open(path, "rb") as file:
        return stored_keys(read_index(file)) or list(load_shard(path))


def check_index(path: str | os.PathLike, layers: Iterable[int | str], name: str) -> None:
    """Raises ShardError where the shard says that its parts are others than they are. layers: those that it holds.
    name: what messages call the shard."""
    with _shard_errors(name), open(path, "rb") as file:
        parts = read_index(file)
        PartReader(file, parts).finish()
        if parts and stored_keys(parts) != list(layers):
            raise MalformedError("has an index of other layers than it holds")


@contextmanager
def _shard_errors(name: str) -> Iterator[None]:
    try:
        yield
    except MalformedError as error:
        raise ShardError(f"{name} is not a whole shard: it {error}. Fetch or extract it again.") from error
    except OSError as error:
        raise ShardError(f"cannot read shard {name}: {error.strerror or error}") from error


def _load(
    file: BinaryIO, name: str, layers: Collection[int | str] | None, max_bytes: int | None, raw: bool
) -> dict[int | str, list[dict]]:
    source = file if layers is None or not file.seekable() else _wanted(file, layers, name)
    budget = Budget(max_bytes, _input_bytes(source))
    keys = (*RECORD_KEYS, *OPTIONAL_KEYS, EMBEDDING)
    data = Unpickler(GzipReader(source, budget), budget, keys, layers).load()
    if isinstance(source, PartReader):
        source.finish()
    shard = _to_shard(_only(data, layers, name), budget)
    del data
    return shard if raw else _restored(shard, budget)


def _input_bytes(source: BinaryIO) -> int | None:
    """What there is to read; None where nobody knows before the end."""
    if isinstance(source, PartReader):
        return source.size
    return bytes_left(source) if source.seekable() else None


def _restored(shard: dict[int | str, list[dict]], budget: Budget) -> dict[int | str, list[dict]]:
    """The same with values in the place of codes, record by record, so that few are held as both."""
    for records in shard.values():
        for number, record in enumerate(records):
            if "scale" in record:
                budget.charge(sum(4 * rows.size for rows in rows_by_key(record).values()))
            records[number] = restore(record)
    return shard


def _wanted(file: BinaryIO, layers: Collection[int | str], name: str) -> BinaryIO:
    """What of a shard to read for these layers: their parts, or all where it does not say where they lie."""
    parts = read_index(file)
    if not parts:
        return file
    _refuse_absent(layers, stored_keys(parts), name)
    return cast(BinaryIO, PartReader(file, wanted_parts(parts, layers)))  # it has what is read with


def _only(data: Any, layers: Collection[int | str] | None, name: str) -> Any:
    """The wanted layers, in the shard's order; raises ShardError for one that is not there."""
    if layers is None or type(data) is not dict:
        return data
    _refuse_absent(layers, data, name)
    return {layer: records for layer, records in data.items() if layer in layers}


def _refuse_absent(layers: Collection[int | str], there: Collection[int | str], name: str) -> None:
    absent = [layer for layer in layers if layer not in there]
    if absent:
        raise ShardError(
            f"{name} has no layer {', '.join(map(str, absent))}, but {', '.join(map(str, there)) or 'none'}; ask for "
            "one of these"
        )


def _check_samples(layers: Sequence[int], samples: Sequence[Sample]) -> None:
    if not samples:
        raise ShardError("a shard needs at least one sample")
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ShardError(f"layers must be distinct and not negative, got {list(layers)}")
    first = samples[0].activations[0]
    if first.dtype not in ACTIVATION_DTYPES:
        names = ", ".join(str(dtype) for dtype in ACTIVATION_DTYPES)
        raise ShardError(f"activations must be one of {names}, got {first.dtype}")
    widths = [kind[0].shape[-1] for kind in samples[0].by_kind()]
    for sample in samples:
        _check_sample(sample, len(layers), first.dtype, widths)
    for before, after in itertools.pairwise(samples):
        if after.sample_idx <= before.sample_idx:
            raise ShardError(f"sample {after.sample_idx} comes after sample {before.sample_idx} in one shard")


def _check_sample(sample: Sample, n_layers: int, dtype: np.dtype, widths: Sequence[int]) -> None:
    """widths: of the rows of each kind."""
    rows, by_kind = len(sample.token_ids), sample.by_kind()
    if len(by_kind) != len(widths):
        raise ShardError(f"sample {sample.sample_idx} has {len(by_kind)} kinds, the shard {len(widths)}")
    for kind in (sample.activations, *sample.kinds.values()):
        if len(kind) != n_layers:
            raise ShardError(f"sample {sample.sample_idx} has {len(kind)} layers, the shard {n_layers}")
    for arrays, width in zip(by_kind, widths, strict=True):
        if any(layer.shape != (rows, width) or layer.dtype != dtype for layer in arrays):
            found = ", ".join(sorted({f"{layer.dtype}{list(layer.shape)}" for layer in arrays}))
            raise ShardError(
                f"sample {sample.sample_idx} should have activations {dtype}{[rows, width]}, got {found}"
            )
        for fault in filter(None, map(_quantised_fault, arrays)):
            raise ShardError(f"sample {sample.sample_idx} cannot be stored: {fault}")
    if sample.sample_idx < 0 or min(rows, *widths) < 1:
        raise ShardError(f"sample {sample.sample_idx} has a negative index, no tokens or no features")
    if sample.token_ids.dtype != np.int32 or sample.token_ids.ndim != 1:
        raise ShardError(
            f"sample {sample.sample_idx} has token_ids {sample.token_ids.dtype}, expected int32 [n]"
        )
    for name, array in sample.extras.items():
        by_row = name in ROW_KEYS and array.dtype == np.int32 and len(array) == rows
        if not by_row and not _is_of_answer(name, array):
            raise ShardError(
                f"sample {sample.sample_idx} cannot store {name} as {array.dtype}{list(array.shape)}"
            )
    if not _answers_agree(sample.extras):
        raise ShardError(f"sample {sample.sample_idx} has {', '.join(ANSWER_KEYS)} of different lengths")


def _quantised_fault(rows: StoredRows) -> str | None:
    if isinstance(rows, QuantisedRows):
        return rows.fault
    return f"rows of {rows.dtype} need a scale (QuantisedRows)" if rows.dtype in QUANTISED_DTYPES else None


def _is_of_answer(name: str, array: np.ndarray) -> bool:
    dtype = np.float32 if name == "answer_logprobs" else np.int32
    return name in ANSWER_KEYS and array.dtype == dtype and array.ndim == 1


def _answers_agree(arrays: Mapping[str, np.ndarray]) -> bool:
    return len({len(arrays[key]) for key in ANSWER_KEYS if key in arrays}) < 2


class _Memo:
    """Memo numbers of what a shard repeats, given out in the order in which it is put there."""

    def __init__(self) -> None:
        self._slots: dict[Hashable, int] = {}

    def put(self, key: Hashable, pieces: Iterable["Piece"]) -> Iterator["Piece"]:
        """Pieces that remember the value of `pieces`, and leave nothing behind."""
        yield from pieces
        self._slots[key] = _SLOT_FREE + len(self._slots)
        yield _put(self._slots[key]) + pickle.POP

    def get(self, key: Hashable) -> bytes:
        """What fetches that value again."""
        return _get(self._slots[key])


Piece = Buffer | list[Buffer]
"""Bytes of the pickle; a list is one array's, which belong together."""


def _pickled_parts(
    layers: Sequence[int], samples: Sequence[Sample]
) -> Iterator[tuple[int | str, Iterator[Piece]]]:
    """All but the pickle's end, part by part. A part behind the first needs that one, and no other."""
    memo = _Memo()
    yield HEAD, _head_pieces(memo, samples)
    for position, layer in enumerate(layers):
        yield layer, _layer_pieces(memo, layer, position, samples)
    if samples[0].embedding is not None:
        yield EMBEDDING, _embedding_pieces(memo, samples)


def _head_pieces(memo: _Memo, samples: Sequence[Sample]) -> Iterator[Piece]:
    yield pickle.PROTO + b"\x04" + _prologue()
    first = samples[0]
    shared = [_shared_arrays(sample) for sample in samples]
    described = list(zip(samples, shared, strict=True))
    of_rows = _arrays_of(first.activations[0], {name: kind[0] for name, kind in first.kinds.items()})
    for key in OPTIONAL_KEYS:
        if key in of_rows or any(key in arrays or key in sample.notes for sample, arrays in described):
            yield from memo.put(key, [_encode(key)])
    beside = [array.dtype for each in shared for array in each.values()]
    dtypes = [first.activations[0].dtype, *(array.dtype for array in of_rows.values()), *beside]
    for dtype in dict.fromkeys(dtypes):
        yield from memo.put(dtype, [_dtype_opcodes(dtype)])
    for sample, arrays in described:
        for name, array in arrays.items():
            yield from memo.put((sample.sample_idx, name), _array_pieces(memo, array))
        for name, note in sample.notes.items():
            yield from memo.put((sample.sample_idx, name), [_encode(note)])
    yield pickle.EMPTY_DICT


def _shared_arrays(sample: Sample) -> dict[str, np.ndarray]:
    """What the sample's records of all layers share, in the order of a record."""
    extras = {key: sample.extras[key] for key in OPTIONAL_KEYS if key in sample.extras}
    return {"token_ids": sample.token_ids, **extras}


def _layer_pieces(memo: _Memo, layer: int, position: int, samples: Sequence[Sample]) -> Iterator[Piece]:
    yield _encode(int(layer)) + pickle.EMPTY_LIST
    for sample in samples:
        kinds = {name: kind[position] for name, kind in sample.kinds.items()}
        yield from _record_pieces(memo, sample, sample.activations[position], kinds)
    yield pickle.SETITEM


def _embedding_pieces(memo: _Memo, samples: Sequence[Sample]) -> Iterator[Piece]:
    yield _encode(EMBEDDING) + pickle.EMPTY_LIST
    for sample in samples:
        if sample.embedding is not None:
            yield from _record_pieces(memo, sample, sample.embedding, {})
    yield pickle.SETITEM


def _prologue() -> bytes:
    """Puts what every record repeats into the memo, under the _SLOT numbers."""
    values = [_encode(key) for key in RECORD_KEYS]
    values.append(_encode(_RECONSTRUCT))
    values.append(_encode((_NDARRAY, (0,), b"b")))
    values.append(_encode(None))
    return b"".join(value + _put(slot) + pickle.POP for slot, value in enumerate(values))


def _dtype_opcodes(dtype: np.dtype) -> bytes:
    code, state = SPELLINGS[dtype]
    return _encode(_DTYPE) + _encode((code, False, True)) + pickle.REDUCE + _encode(state) + pickle.BUILD


def _arrays_of(activation: StoredRows, kinds: Mapping[str, StoredRows]) -> dict[str, np.ndarray | Rows]:
    """What of OPTIONAL_KEYS a record holds for its rows. kinds: as Sample.kinds, of one layer."""
    found: dict[str, np.ndarray | Rows] = {}
    for number, (key, rows) in enumerate((kinds or {"activation": activation}).items()):
        if isinstance(rows, QuantisedRows):
            found[key] = rows.codes
            found.update(zip(quantised_keys(key if number else "activation"), rows.beside, strict=True))
        else:
            found[key] = rows
    return found


def _record_pieces(
    memo: _Memo, sample: Sample, activation: StoredRows, kinds: Mapping[str, StoredRows]
) -> Iterator[Piece]:
    values: Mapping[str, Any] = {
        "sample_idx": int(sample.sample_idx),
        "shape": tuple(activation.shape),
        "text_preview": sample.text_preview,
        "task_id": sample.task_id,
    }
    main, arrays = next(iter(kinds), None), _arrays_of(activation, kinds)
    yield pickle.EMPTY_DICT + pickle.MARK
    for slot, key in enumerate(RECORD_KEYS):
        yield _get(slot)
        if key in values:
            yield _encode(values[key])
        elif key == "token_ids":
            yield memo.get((sample.sample_idx, key))
        else:
            yield from _array_pieces(memo, arrays["activation" if main is None else main])
            yield b"" if main is None else _put(_SLOT_MAIN)
    for key in [key for key in OPTIONAL_KEYS if key in sample.extras or key in arrays or key in sample.notes]:
        yield memo.get(key)
        if key == main:
            yield _get(_SLOT_MAIN)
        elif key in arrays:
            yield from _array_pieces(memo, arrays[key])
        else:
            yield memo.get((sample.sample_idx, key))
    yield pickle.SETITEMS + pickle.APPEND


def _array_pieces(memo: _Memo, array: np.ndarray | Rows) -> Iterator[Piece]:
    """What numpy's own pickling means, with the data as views of the array."""
    arrays = array.pieces if isinstance(array, Rows) else [array]
    data: list[Buffer] = [np.ascontiguousarray(each).reshape(-1).view(np.uint8).data for each in arrays]
    size = array.nbytes
    length = (
        pickle.BINBYTES + struct.pack("<I", size)
        if size < 1 << 32
        else pickle.BINBYTES8 + struct.pack("<Q", size)
    )
    yield _get(_SLOT_RECONSTRUCT) + _get(_SLOT_ARRAY_ARGS) + pickle.REDUCE + pickle.MARK
    yield _encode(1) + _encode(tuple(array.shape)) + memo.get(array.dtype)
    yield pickle.NEWFALSE + length
    yield data
    yield pickle.TUPLE + pickle.BUILD


def _put(slot: int) -> bytes:
    return pickle.BINPUT + bytes([slot]) if slot < 256 else pickle.LONG_BINPUT + struct.pack("<I", slot)


def _get(slot: int) -> bytes:
    return pickle.BINGET + bytes([slot]) if slot < 256 else pickle.LONG_BINGET + struct.pack("<I", slot)


def _encode(value: bool | int | str | bytes | tuple | Name | None) -> bytes:
    """Opcodes that push a small value, without use of the memo."""
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return _encode_int(value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        case bytes():
            return pickle.SHORT_BINBYTES + struct.pack("<B", len(value)) + value
        case Name():
            return _encode(value.module) + _encode(value.name) + pickle.STACK_GLOBAL
        case tuple():
            return pickle.MARK + b"".join(map(_encode, value)) + pickle.TUPLE
    raise TypeError(f"no opcodes for {type(value).__name__}")


def _encode_int(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + struct.pack("<B", len(data)) + data


def _to_shard(data: Any, budget: Budget) -> dict[int | str, list[dict]]:
    """Checks the unpickled structure and puts arrays where shells are; raises MalformedError."""
    if type(data) is not dict or not data:
        raise MalformedError("does not hold a dict of layers")
    for layer, records in data.items():
        if (type(layer) is not int and layer != EMBEDDING) or type(records) is not list or not records:
            raise MalformedError("does not hold a dict of layer number to list of records")
    shard = {layer: [_to_record(record, budget) for record in records] for layer, records in data.items()}
    first_layer, first = next(iter(shard.items()))
    outline = [_outline(record) for record in first]
    if any(after[0] <= before[0] for before, after in itertools.pairwise(outline)):
        raise MalformedError("has samples out of order")
    for layer, records in shard.items():
        if [_outline(record) for record in records] != outline:
            raise MalformedError(f"has other samples in layer {layer} than in layer {first_layer}")
    of_layers = {
        _widths(record) for layer, records in shard.items() if layer != EMBEDDING for record in records
    }
    if (
        len(of_layers) > 1
        or len(set(map(_widths, shard.get(EMBEDDING, ())))) > 1
        or len(_dtypes(outline)) > 1
    ):
        raise MalformedError("mixes activations of different widths or dtypes")
    return shard


def _outline(record: dict) -> tuple:
    """What a sample's records have in common in all layers."""
    activation = record["activation"]
    return record["sample_idx"], record["task_id"], len(activation), activation.dtype


def _dtypes(outline: Iterable[tuple]) -> set[np.dtype]:
    return {of_sample[-1] for of_sample in outline}


def _widths(record: dict) -> tuple[tuple[str, int], ...]:
    """Of the rows of each kind that a record holds."""
    return tuple((key, record[key].shape[1]) for key in ("activation", *KIND_KEYS) if key in record)


def _to_record(record: Any, budget: Budget) -> dict[str, Any]:
    budget.charge(_RECORD_COST)
    if type(record) is not dict or not set(RECORD_KEYS) <= record.keys() or EMBEDDING in record:
        raise MalformedError(f"has a record without all of {', '.join(RECORD_KEYS)}, or with others")
    result: dict[str, Any] = {
        key: value.array if type(value) is ArrayShell else value for key, value in record.items()
    }
    for key, kind in (("sample_idx", int), ("shape", tuple), ("text_preview", str), ("task_id", str)):
        if type(result[key]) is not kind:
            raise MalformedError(f"has a record whose {key} is no {kind.__name__}")
    if not 0 <= result["sample_idx"] <= MOST:
        raise MalformedError(f"has a record whose sample_idx is not from 0 to {MOST}")
    _check_arrays(result)
    budget.work(_RECORD_WORK + _size(result) // _BYTES_A_STEP)
    return result


def _size(record: dict[str, Any]) -> int:
    """Bytes that whoever looks at the record looks at: records may share them, and so be many."""
    arrays = {id(value): value.nbytes for value in record.values() if type(value) is np.ndarray}
    texts = sum(len(value) for value in record.values() if type(value) is str)
    return texts + sum(arrays.values())


def _check_arrays(record: dict[str, Any]) -> None:
    activation = record["activation"]
    if (
        type(activation) is not np.ndarray
        or activation.ndim != 2
        or activation.dtype not in ACTIVATION_DTYPES
    ):
        raise MalformedError("has a record whose activation is no two-dimensional float array")
    if record["shape"] != activation.shape:
        raise MalformedError("has a record whose shape is not that of its activation")
    tokens = record["token_ids"]
    if type(tokens) is not np.ndarray or tokens.dtype != np.int32 or tokens.shape != activation.shape[:1]:
        raise MalformedError("has a record whose token_ids are not one int32 per token")
    for key in sorted(record.keys() & set(NOTE_KEYS)):
        if type(record[key]) is not NOTES[key]:
            raise MalformedError(f"has a record whose {key} is no {NOTES[key].__name__}")
    for key in sorted(record.keys() & set(OPTIONAL_KEYS) - set(NOTE_KEYS) - set(ALL_QUANTISED_KEYS)):
        if not _is_optional_array(key, record[key], activation):
            raise MalformedError(f"has a record whose {key} is no such array over its tokens")
    _check_quantised(record)
    if not _answers_agree(record):
        raise MalformedError(f"has a record with {', '.join(ANSWER_KEYS)} of different lengths")


def _check_quantised(record: dict[str, Any]) -> None:
    """That what belongs to codes is there and fits them, and nothing of the kind beside other rows."""
    there = record.keys() & set(ALL_QUANTISED_KEYS)
    coded = record["activation"].dtype in QUANTISED_DTYPES
    wanted = {name for key in rows_by_key(record) for name in quantised_keys(key)} if coded else set()
    if there != wanted:
        raise MalformedError(
            f"has a record of {record['activation'].dtype} with {', '.join(sorted(there)) or 'no scale'} beside"
        )
    if any(type(record[name]) is not np.ndarray for name in there):
        raise MalformedError("has a record whose scale or exact values are no arrays")
    for key in rows_by_key(record) if coded else ():
        if fault := quantised(record, key).fault:
            raise MalformedError(f"has a record whose {key} cannot be restored: {fault}")


def _is_optional_array(key: str, array: Any, activation: np.ndarray) -> bool:
    if type(array) is not np.ndarray:
        return False
    if key in KIND_KEYS:
        return array.ndim == 2 and (array.dtype, len(array)) == (activation.dtype, len(activation))
    if key in ANSWER_KEYS:
        return _is_of_answer(key, array)
    width = (4,) if key == "token_cells" else ()
    return array.dtype == np.int32 and array.shape == (len(activation), *width)
