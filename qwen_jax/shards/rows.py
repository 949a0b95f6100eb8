"""Rows of activations as a shard holds them: values, or codes with what turns them into values again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.kinds import KINDS, QUANTISED_KEYS
from qwen_jax.shards.dtypes import FLOAT_DTYPES

KIND_KEYS = tuple(KINDS)


@dataclass(frozen=True)
class Rows:
    """[n, hidden] rows that lie in several arrays, one behind the other, as the steps of a run gave them."""

    pieces: Sequence[np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.pieces)), self.pieces[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class QuantisedRows:
    """[n, hidden] rows of which K values each are kept exactly.

    codes: int8 or float8_e4m3fn. scale_N: float32. channels_NK: int32, where the exact values stand, different ones
    in each row. exact_NK: those values, float32, float16 or bfloat16.
    """

    codes: np.ndarray | Rows
    scale_N: np.ndarray
    channels_NK: np.ndarray
    exact_NK: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the codes."""
        return self.codes.dtype

    @property
    def beside(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In the order of QUANTISED_KEYS."""
        return self.scale_N, self.channels_NK, self.exact_NK

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + sum(array.nbytes for array in self.beside)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def fault(self) -> str | None:
        """What keeps these from being rows, in words; None where nothing does."""
        count, width = self.shape
        if self.scale_N.dtype != np.float32 or self.scale_N.shape != (count,):
            return f"scale is {_form(self.scale_N)}, not one float32 a row"
        if not (np.isfinite(self.scale_N) & (self.scale_N >= 0)).all():
            return "scale holds values that are no scale"
        channels_NK, exact_NK = self.channels_NK, self.exact_NK
        if channels_NK.dtype != np.int32 or channels_NK.shape != (count, channels_NK.shape[-1]):
            return f"exact_channels are {_form(channels_NK)}, not int32 [{count}, K]"
        if exact_NK.dtype not in FLOAT_DTYPES or exact_NK.shape != channels_NK.shape:
            return f"exact_values are {_form(exact_NK)}, not one value for each of exact_channels"
        ordered_NK = np.sort(channels_NK, axis=1)
        if ordered_NK[:, 0].min() < 0 or ordered_NK[:, -1].max() >= width or _repeats(ordered_NK):
            return f"exact_channels are not different channels of {width} in each row"
        return None


def _form(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _repeats(ordered_NK: np.ndarray) -> bool:
    return bool((ordered_NK[:, 1:] == ordered_NK[:, :-1]).any())


StoredRows = np.ndarray | Rows | QuantisedRows
_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Of each code's byte its value: looked up, since ml_dtypes takes more than twice as long to cast."""


def restored(rows: QuantisedRows) -> np.ndarray:
    """float32 [n, hidden]: each code times its row's scale, and the exact values at their channels."""
    codes = np.concatenate(rows.codes.pieces) if isinstance(rows.codes, Rows) else rows.codes
    wide_ND = codes if codes.dtype == np.int8 else _FLOAT8[codes.view(np.uint8)]
    values_ND = wide_ND * rows.scale_N[:, None]
    np.put_along_axis(values_ND, rows.channels_NK, rows.exact_NK.astype(np.float32), axis=1)
    return values_ND


def quantised_keys(key: str) -> tuple[str, ...]:
    """Where a record holds what belongs to the codes under `key`, in the order of QUANTISED_KEYS."""
    return tuple(name if key == "activation" else f"{key}_{name}" for name in QUANTISED_KEYS)


ALL_QUANTISED_KEYS = tuple(name for key in ("activation", *KIND_KEYS) for name in quantised_keys(key))


def rows_by_key(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of rows of a record, each once: the main kind's under `activation`."""
    main = record["activation"]
    others = {key: record[key] for key in KIND_KEYS if key in record and record[key] is not main}
    return {"activation": main, **others}


def quantised(record: Mapping[str, Any], key: str) -> QuantisedRows:
    """The codes under `key` with what belongs to them."""
    return QuantisedRows(record[key], *(record[name] for name in quantised_keys(key)))


def restore(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as pickle gives it, with float32 rows in the place of codes and without what belonged to these; a record
    whose rows are not quantised as it is."""
    if "scale" not in record:
        return dict(record)
    values = {id(record[key]): restored(quantised(record, key)) for key in rows_by_key(record)}
    return {
        key: values.get(id(value), value) for key, value in record.items() if key not in ALL_QUANTISED_KEYS
    }


def stored_bytes(record: Mapping[str, Any]) -> int:
    """Raw bytes of a record's rows, each array once, with what belongs to codes."""
    beside = [record[name] for name in ALL_QUANTISED_KEYS if name in record]
    return sum(array.nbytes for array in (*rows_by_key(record).values(), *beside))
