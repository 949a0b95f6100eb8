"""The dtypes of arrays in a shard, and how numpy and ml_dtypes spell each in a pickle."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from qwen_jax.kinds import STORED_DTYPES


class Name(NamedTuple):
    """A global, spelled in the pickle as module and name."""

    module: str
    name: str


class Spelling(NamedTuple):
    """code: what numpy.dtype is called with. state: what its __setstate__ is given."""

    code: str | Name
    state: tuple


def _plain(order: str) -> tuple:
    return 3, order, None, None, None, -1, -1, 0


def _of_ml_dtypes(name: str) -> tuple[np.dtype, Spelling]:
    dtype = np.dtype(getattr(ml_dtypes, name))
    size = dtype.itemsize
    return dtype, Spelling(Name("ml_dtypes", name), (3, "<", None, None, None, size, size, 64))


SPELLINGS: dict[np.dtype, Spelling] = {
    np.dtype(np.float32): Spelling("f4", _plain("<")),
    np.dtype(np.float16): Spelling("f2", _plain("<")),
    np.dtype(np.int8): Spelling("i1", _plain("|")),
    np.dtype(np.int32): Spelling("i4", _plain("<")),
    **dict(map(_of_ml_dtypes, ("bfloat16", "float8_e4m3fn"))),
}
"""Of every dtype that a shard of ours may hold."""
ACTIVATION_DTYPES = tuple(np.dtype(name) for name in STORED_DTYPES)
QUANTISED_DTYPES = tuple(np.dtype(name) for name, each in STORED_DTYPES.items() if each.is_quantised)
FLOAT_DTYPES = tuple(dtype for dtype in ACTIVATION_DTYPES if dtype not in QUANTISED_DTYPES)
