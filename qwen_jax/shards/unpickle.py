"""An unpickler for bytes from strangers: it can build shards and nothing else.

Python's own unpickler is told what it may import, but still runs numpy's `__setstate__` on whatever
state the file holds, and grows its memo to any index the file names. So this one is a small stack
machine of its own: opcodes are decoded by the metadata in `pickletools`, those in `_HANDLERS` are
carried out, any other ends the reading, and the few globals that a shard needs resolve to builders in
this file. No numpy code sees the file's bytes until sizes have been checked.
"""

import pickletools
import struct
from collections.abc import Callable, Collection
from typing import IO, Any, cast

import numpy as np

from qwen_jax.shards.compress import IN_PLACE_BYTES, Budget, GzipReader, MalformedError
from qwen_jax.shards.dtypes import SPELLINGS, Name

_OP_COST = 128
"""Bytes charged per opcode: more than the largest empty object that one opcode can make."""
_ROOM_BYTES = 16 << 20
_MAX_STACK = 20_000
_MAX_MARKS = 16
_MAX_NAME = 256
_LENGTH_FORMATS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}


class _Global:
    """What a file's (module, name) stands for: a word of our own, with a builder if it may be called."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[[tuple, Budget], Any] | None = None):
        self.name = name
        self.build = build


class _Dtype:
    """Stands for a numpy dtype: one of the table, whatever state the file would like to give it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        # (version, byte order, three fields of structured dtypes, size, alignment, flags)
        order = "|" if self.dtype == np.int8 else "<"
        if type(state) is not tuple or len(state) != 8 or state[:5] != (3, order, None, None, None):
            raise MalformedError("holds a dtype that is not a plain little-endian one")


class _Skipped:
    """Stands for bytes that nobody wants."""

    __slots__ = ("size",)

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


class ArrayShell:
    """Stands for a numpy array until its state has been checked; `array` is None before that, and where its data
    were skipped."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if self.array is not None or type(state) is not tuple or len(state) != 5:
            raise MalformedError("holds an array with a state that numpy does not write")
        version, shape, dtype, fortran, data = state
        if (
            version != 1
            or type(dtype) is not _Dtype
            or type(fortran) is not bool
            or type(data) not in (bytearray, _Skipped)
        ):
            raise MalformedError("holds an array with a state that numpy does not write")
        _check_shape(shape, dtype.dtype.itemsize, len(data))
        if type(data) is _Skipped:
            return
        # frombuffer on a bytearray: writable, and no copy.
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _check_shape(shape: Any, itemsize: int, size: int) -> None:
    if type(shape) is not tuple or len(shape) not in (1, 2) or any(type(n) is not int for n in shape):
        raise MalformedError("holds an array that has neither one nor two dimensions")
    count = 1
    for n in shape:
        count *= n
    if min(shape) < 1 or count * itemsize != size:
        raise MalformedError(
            f"holds an array whose shape needs {count * itemsize} bytes, with {size} bytes of data"
        )


_NDARRAY = _Global("numpy.ndarray")
_DTYPES = {"i8": np.dtype("<i8")} | {
    code: dtype for dtype, (code, _) in SPELLINGS.items() if isinstance(code, str)
}
_NAMED_DTYPES = {
    _Global(".".join(code)): (code, dtype) for dtype, (code, _) in SPELLINGS.items() if isinstance(code, Name)
}


def _build_array(args: tuple, budget: Budget) -> ArrayShell:
    if args != (_NDARRAY, (0,), b"b"):
        raise MalformedError("makes an array in a way that numpy does not")
    return ArrayShell()


def _build_dtype(args: tuple, budget: Budget) -> _Dtype:
    code = args[0] if len(args) == 3 and args[1:] == (False, True) else None
    if type(code) is _Global and code in _NAMED_DTYPES:
        return _Dtype(_NAMED_DTYPES[code][1])
    if type(code) is not str or code not in _DTYPES:
        known = (*SPELLINGS, np.dtype(np.int64))
        raise MalformedError(f"holds a dtype other than {', '.join(map(str, known))}")
    return _Dtype(_DTYPES[code])


def _build_scalar(args: tuple, budget: Budget) -> int:
    """numpy's integer scalars (a dump that kept np.int64 sample indices) as plain ints."""
    if len(args) != 2 or type(args[0]) is not _Dtype or type(args[1]) is not bytearray:
        raise MalformedError("holds a numpy scalar that numpy does not write")
    dtype, data = args[0].dtype, args[1]
    if dtype not in (np.int32, np.int64) or len(data) != dtype.itemsize:
        raise MalformedError("holds a numpy scalar that is not an int32 or int64")
    return int.from_bytes(data, "little", signed=True)


def _encode(args: tuple, budget: Budget) -> bytearray:
    """How protocol 2 spells bytes."""
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise MalformedError("calls _codecs.encode for something else than bytes")
    budget.charge(len(args[0]))
    return bytearray(args[0], "latin1")


_GLOBALS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Global("numpy.dtype", _build_dtype),
    ("numpy._core.multiarray", "_reconstruct"): _Global("_reconstruct", _build_array),
    ("numpy.core.multiarray", "_reconstruct"): _Global("_reconstruct", _build_array),
    ("numpy._core.multiarray", "scalar"): _Global("scalar", _build_scalar),
    ("numpy.core.multiarray", "scalar"): _Global("scalar", _build_scalar),
    **{tuple(name): found for found, (name, _) in _NAMED_DTYPES.items()},
    ("_codecs", "encode"): _Global("_codecs.encode", _encode),
}
"""Exact names, never a prefix: what lies beside them in numpy (load, f2py ...) runs code."""


class Unpickler:
    """Reads one pickle of dicts, lists, tuples, ints, strings, bytes and arrays.

    Args:
        stream: where the pickle comes from; read to the end, which must follow the pickle at once.
        budget: charged per opcode and per decoded string.
        keys: the strings that a dict may have as keys; ints from 0 to 65535 are keys as well.
        wanted: of the lists that a dict holds, those to keep, by key; of others large float arrays are skipped, they
            are emptied as they come, and reading ends when all of these are there. None keeps all and reads to the
            end.
    """

    def __init__(
        self,
        stream: GzipReader,
        budget: Budget,
        keys: Collection[str],
        wanted: Collection[int | str] | None = None,
    ):
        self._stream = stream
        self._budget = budget
        self._keys = keys
        self._wanted = wanted
        self._missing = set(wanted or ())
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Returns the object, arrays as ArrayShell; raises MalformedError on anything unexpected."""
        try:
            while True:
                info, handler = self._next_opcode()
                argument = self._argument(info)
                if info.name == "STOP":
                    return self._finish()
                handler(self, argument)
                if self._wanted is not None and not self._missing:
                    return self._stack[0]
                if len(self._stack) > _MAX_STACK or len(self._marks) > _MAX_MARKS:
                    raise MalformedError("nests or stacks more objects than a shard has")
        except MalformedError:
            raise
        except ValueError as error:  # pickletools and the text codecs on bad arguments
            raise MalformedError(f"holds a bad pickle ({error})") from error

    def _next_opcode(self) -> tuple[pickletools.OpcodeInfo, Callable]:
        code = self._stream.read(1)
        if not code:
            raise MalformedError("ends in the middle of its pickle")
        if code not in _OPCODES:
            raise MalformedError(f"uses pickle opcode {code!r}, which no shard needs")
        self._budget.charge(_OP_COST)
        self._budget.work(1)
        return _OPCODES[code]

    def _argument(self, info: pickletools.OpcodeInfo) -> Any:
        if info.arg is None:
            return None
        if info.arg.n in _LENGTH_FORMATS:
            return self._counted(info.arg.n)
        if info.arg.n == pickletools.UP_TO_NEWLINE:
            return self._line(), self._line()
        return info.arg.reader(cast(IO[bytes], self._stream))  # it has what is read with

    def _counted(self, kind: int) -> bytearray | _Skipped:
        """Bytes behind their length; a false length costs no more memory than the bytes that are there."""
        form = _LENGTH_FORMATS[kind]
        (size,) = struct.unpack(form, self._take(struct.calcsize(form)))
        if size >= IN_PLACE_BYTES and self._wants_no_such_array():
            self._stream.skip(size)
            return _Skipped(size)
        return self._take(size)

    def _wants_no_such_array(self) -> bool:
        """Whether what comes are the values or codes of activations in a layer that is not wanted.

        Other arrays belong to all layers of a sample, and are stored once, before or in the first layer.
        """
        layer = self._layer_at_hand()
        if self._wanted is None or layer is None or layer in self._wanted:
            return False
        shape, dtype, _ = self._stack[-3:]
        of_rows = type(dtype) is _Dtype and (dtype.dtype.kind != "i" or dtype.dtype == np.int8)
        return of_rows and type(shape) is tuple and len(shape) == 2

    def _layer_at_hand(self) -> int | str | None:
        """The key of the list that is being filled in the outermost dict.

        That dict is followed by one key and list, or, as Python's pickler does it, by all keys and lists so far.
        """
        stack, at_hand = self._stack, None
        for at in range(1, len(stack) - 1, 2):
            if type(stack[at]) not in (int, str) or type(stack[at + 1]) is not list:
                break
            at_hand = stack[at]
            self._budget.work(1)
        return at_hand

    def _take(self, size: int) -> bytearray:
        # Room for all of it at once, up to a bound, since growing bit by bit copies the data several times.
        data, filled = bytearray(min(size, _ROOM_BYTES)), 0
        while filled < size:
            if filled == len(data):
                data += bytes(min(filled, size - filled))
            with memoryview(data) as whole, whole[filled:] as rest:
                filled += self._stream.read_into(rest)
            if filled < len(data):
                raise MalformedError("ends in the middle of its pickle")
        return data

    def _line(self) -> str:
        line = self._stream.readline(_MAX_NAME)
        if not line.endswith(b"\n"):
            raise MalformedError("names a global without an end")
        self._budget.work(len(line))
        return line[:-1].decode()

    def _finish(self) -> Any:
        # Reading on is what makes the gzip reader check the last CRC.
        if self._stream.read(1):
            raise MalformedError("goes on after the end of its pickle")
        if len(self._stack) != 1 or self._marks:
            raise MalformedError("does not hold exactly one object")
        return self._stack[0]

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise MalformedError("takes an object that is not there")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        """The object on top of the stack, which must be of exactly this type."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0) or type(self._stack[-1]) is not kind:
            raise MalformedError(f"has no {kind.__name__} where one must be")
        return self._stack[-1]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_text(self, data: bytearray) -> None:
        text = data.decode("utf-8", "surrogatepass")
        self._budget.charge(4 * len(text))
        self._stack.append(text)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise MalformedError("takes objects down to a mark that is not there")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def pop_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self._stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise MalformedError("has a dict key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._check_key(key)
            if key in target:
                raise MalformedError(f"has the key {key!r} twice in one dict")
            target[key] = value
            if self._wanted is not None and type(value) is list:
                self._missing.discard(key)
                if key not in self._wanted:
                    value.clear()

    def _check_key(self, key: Any) -> None:
        if type(key) is int and 0 <= key < 1 << 16:
            return
        if type(key) is not str or key not in self._keys:
            shown = repr(key[:40]) if type(key) is str else f"a {type(key).__name__}"
            raise MalformedError(f"has {shown} as a dict key")

    def remember(self, index: int) -> None:
        # Dense indices only: the guide's pickle.load allocates up to the highest one it meets.
        if index > len(self._memo) or not self._stack:
            raise MalformedError(
                f"remembers an object under the number {index}, which no pickler would use next"
            )
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise MalformedError(f"recalls object {index}, which it has not remembered")
        self._stack.append(self._memo[index])

    def import_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in _GLOBALS:
            shown = (
                f"{module[:60]}.{name[:60]}" if type(module) is str and type(name) is str else "a non-name"
            )
            raise MalformedError(
                f"wants to import {shown!r}, which no shard needs: do not unpickle this file"
            )
        self._stack.append(_GLOBALS[module, name])

    def import_from_stack(self) -> None:
        name = self.pop()
        self.import_name(self.pop(), name)

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if type(function) is not _Global or function.build is None or type(args) is not tuple:
            raise MalformedError("calls something that cannot be called")
        self._stack.append(function.build(args, self._budget))

    def set_state(self) -> None:
        state = self.pop()
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, _Dtype | ArrayShell):
            raise MalformedError("sets the state of something that has none")
        target.set_state(state)


_HANDLERS: dict[str, Callable[[Unpickler, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": Unpickler.push,
    "BININT1": Unpickler.push,
    "BININT2": Unpickler.push,
    "LONG1": lambda machine, data: machine.push(int.from_bytes(data, "little", signed=True)),
    "SHORT_BINBYTES": Unpickler.push,
    "BINBYTES": Unpickler.push,
    "BINBYTES8": Unpickler.push,
    "SHORT_BINUNICODE": Unpickler.push_text,
    "BINUNICODE": Unpickler.push_text,
    "BINUNICODE8": Unpickler.push_text,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": Unpickler.remember,
    "LONG_BINPUT": Unpickler.remember,
    "MEMOIZE": lambda machine, _: machine.remember(len(machine._memo)),
    "BINGET": Unpickler.recall,
    "LONG_BINGET": Unpickler.recall,
    "GLOBAL": lambda machine, names: machine.import_name(*names),
    "STACK_GLOBAL": lambda machine, _: machine.import_from_stack(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.set_state(),
}
_OPCODES = {
    info.code.encode("latin1"): (info, _HANDLERS[info.name])
    for info in pickletools.opcodes
    if info.name in _HANDLERS
}
