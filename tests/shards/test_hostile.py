"""Bytes from strangers: no code runs, memory stays bounded, and what is not a shard is a ShardError."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.shards import Sample, ShardError, load_shard
from qwen_jax.shards.compress import BLOCK_BYTES, WORK_FLOOR, Budget, GzipReader, member_head
from qwen_jax.shards.format import ROW_KEYS
from tests.few import few
from tests.shards.samples import make_sample, shard_bytes, without_index

GOOD = shard_bytes([make_sample(n, n_tokens=3, hidden=4) for n in range(2)], layers=(0, 1, 2))
GOOD_PICKLE = gzip.decompress(GOOD)
PROTO = b"\x80\x04"


class Reduces:
    """Pickles as a call of any function: the classic exploit."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def refused(data: bytes, match: str = "") -> None:
    with pytest.raises(ShardError, match=match):
        load_shard(io.BytesIO(data))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


CANARY = "/tmp/never-made-by-a-shard"
GADGETS = {
    "os.system": Reduces(os.system, f"touch {CANARY}"),
    "eval": Reduces(eval, f"open({CANARY!r}, 'w')"),
    "exec": Reduces(exec, f"open({CANARY!r}, 'w')"),
    "open": Reduces(open, CANARY, "w"),
    "getattr": Reduces(getattr, "", "join"),
    "numpy.load": Reduces(np.load, CANARY),
    "numpy.save": Reduces(np.save, CANARY, 1),
    "numpy.fromfile": Reduces(np.fromfile, "/etc/passwd"),
    "subprocess": Reduces(subprocess.Popen, ["touch", CANARY]),
    "bytearray": Reduces(bytearray, 1 << 33),
    "nested pickle": Reduces(pickle.loads, pickle.dumps(Reduces(os.system, f"touch {CANARY}"))),
    "in a record": {0: [{"sample_idx": Reduces(os.system, f"touch {CANARY}")}]},
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_are_refused_and_nothing_runs(name, protocol):
    refused(gzip.compress(pickle.dumps(GADGETS[name], protocol)), "is not a whole shard")
    assert not Path(CANARY).exists()


@pytest.mark.parametrize(
    "module_and_name",
    [
        ("numpy.f2py", "compile"),
        ("numpy.f2py.crackfortran", "myeval"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct.__globals__"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.lib._npyio_impl", "load"),
        ("numpy", "memmap"),
        ("numpy", "ndarray.tofile"),
        ("numpy ", "ndarray"),
        ("ml_dtypes", "np.load"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("builtins", "getattr"),
        ("posix", "system"),
    ],
)
def test_names_beside_the_allowed_ones_are_refused(module_and_name):
    module, name = module_and_name
    refused(gzip.compress(PROTO + named(module, name) + b"."), "wants to import")
    refused(gzip.compress(PROTO + text(module) + text(name) + b"\x93."), "wants to import")


FORBIDDEN = {
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "PERSID": b"P1\n.",
    "BINPERSID": b"K\x01Q.",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(" + named("numpy", "ndarray") + b"o.",
    "NEWOBJ": named("numpy", "ndarray") + b")\x81.",
    "NEWOBJ_EX": named("numpy", "ndarray") + b")}\x92.",
    "NEXT_BUFFER": b"\x97.",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 60),
    "STRING": b"S'a'\n.",
    "INT": b"I" + b"9" * 10000 + b"\n.",
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "unknown": b"\xff.",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_opcodes_that_no_shard_needs_are_refused(name):
    refused(gzip.compress(PROTO + FORBIDDEN[name]), "uses pickle opcode")


BROKEN = {
    "empty": (b"", "ends in the middle"),
    "no stop": (PROTO + b"}", "ends in the middle"),
    "pop of nothing": (PROTO + b"0.", "takes an object that is not there"),
    "tuple of nothing": (PROTO + b"\x87.", "takes an object that is not there"),
    "no mark": (PROTO + b"t.", "a mark that is not there"),
    "pop below a mark": (PROTO + b"K\x01(0.", "takes an object that is not there"),
    "append to a dict": (PROTO + b"}K\x01a.", "has no list"),
    "setitem on a list": (PROTO + b"]K\x01K\x01s.", "has no dict"),
    "odd setitems": (PROTO + b"}(K\x01u.", "key without a value"),
    "unhashable key": (PROTO + b"}]K\x01s.", "a list as a dict key"),
    "unknown key": (PROTO + b"}" + text("secret") + b"K\x01s.", "'secret' as a dict key"),
    "doubled key": (PROTO + b"}K\x01]sK\x01]s.", "the key 1 twice"),
    "negative layer": (PROTO + b"}J\xff\xff\xff\xff]s.", "a int as a dict key"),
    "unknown memo": (PROTO + b"h\x07.", "recalls object 7"),
    "memo of nothing": (PROTO + b"q\x00.", "remembers an object"),
    "huge memo index": (PROTO + b"}r\xff\xff\xff\xff.", "under the number 4294967295"),
    "call of a non-callable": (PROTO + b"K\x01)R.", "cannot be called"),
    "call of the ndarray word": (PROTO + named("numpy", "ndarray") + b")R.", "cannot be called"),
    "call with a list": (PROTO + named("numpy", "dtype") + b"]R.", "cannot be called"),
    "build on a dict": (PROTO + b"}}b.", "state of something that has none"),
    "build on a global": (PROTO + named("numpy", "dtype") + b"}b.", "state of something that has none"),
    "bad utf-8": (PROTO + b"X\x01\x00\x00\x00\xff.", "bad pickle"),
    "global without end": (PROTO + b"c" + b"n" * 5000, "without an end"),
    "two objects": (PROTO + b"}}.", "exactly one object"),
    "open mark": (PROTO + b"}(.", "exactly one object"),
    "bytes after stop": (GOOD_PICKLE + b"x", "goes on after the end"),
    "another pickle after stop": (GOOD_PICKLE + GOOD_PICKLE, "goes on after the end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_refused(name):
    data, reason = BROKEN[name]
    refused(gzip.compress(data), f"is not a whole shard: it .*({reason})")


def array_opcodes(dtype: bytes, shape: bytes, data: bytes = bytes(8)) -> bytes:
    """A call of numpy's array reconstruction with any dtype and shape (both as opcodes)."""
    call = (
        named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    )
    return call + b"(K\x01" + shape + dtype + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"


def dtype_opcodes(code: bytes, state: bytes = b"") -> bytes:
    return named("numpy", "dtype") + code + b"\x89\x88\x87R" + state


F4 = dtype_opcodes(text("f4"))
HUGE = b"\x8a\x09" + (1 << 64).to_bytes(9, "little")
ARRAYS = {
    "object dtype": array_opcodes(dtype_opcodes(text("O")), b"K\x01\x85"),
    "object dtype, long name": array_opcodes(dtype_opcodes(text("O8")), b"K\x01\x85"),
    "void dtype": array_opcodes(dtype_opcodes(text("V8")), b"K\x01\x85"),
    "structured dtype": array_opcodes(dtype_opcodes(text("i4,O")), b"K\x01\x85"),
    "comma dtype": array_opcodes(dtype_opcodes(text("f4,f4")), b"K\x01\x85"),
    "dtype of a global": array_opcodes(dtype_opcodes(named("numpy", "ndarray")), b"K\x01\x85"),
    "object flags": array_opcodes(
        dtype_opcodes(text("f4"), b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"),
        b"K\x02\x85",
    ),
    "dtype state with names": array_opcodes(
        dtype_opcodes(text("f4"), b"(K\x03" + text("<") + b"N)}K\x04K\x04K\x00tb"), b"K\x02\x85"
    ),
    "negative shape": array_opcodes(F4, b"J\xfe\xff\xff\xff\x85"),
    "two negatives": array_opcodes(F4, b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"),
    "too large": array_opcodes(F4, b"K\x03\x85"),
    "too small": array_opcodes(F4, b"K\x01\x85"),
    "overflow to zero": array_opcodes(F4, HUGE + HUGE + b"\x86", b""),
    "overflow to eight": array_opcodes(F4, b"\x8a\x09" + ((1 << 64) + 2).to_bytes(9, "little") + b"\x85"),
    "bool shape": array_opcodes(F4, b"\x88K\x02\x86"),
    "list shape": array_opcodes(F4, b"]K\x02a"),
    "64 dimensions": array_opcodes(F4, b"(" + b"K\x01" * 63 + b"K\x02t"),
    "no dimensions": array_opcodes(F4, b")", bytes(4)),
    "state set twice": array_opcodes(F4, b"K\x02\x85")
    + b"(K\x01K\x02\x85"
    + F4
    + b"\x89B\x08\x00\x00\x00"
    + bytes(8)
    + b"tb",
    "list for data": array_opcodes(F4, b"K\x02\x85").replace(b"\x89B\x08\x00\x00\x00" + bytes(8), b"\x89]"),
    "subclass": array_opcodes(F4, b"K\x02\x85").replace(b"numpy\nndarray", b"numpy\ndtype", 1),
    "float scalar": named("numpy._core.multiarray", "scalar") + F4 + b"C\x04\x00\x00\x00\x00\x86R",
    "short scalar": named("numpy._core.multiarray", "scalar")
    + dtype_opcodes(text("i8"))
    + b"C\x04\x00\x00\x00\x00\x86R",
    "rot13": named("_codecs", "encode") + text("os") + text("rot13") + b"\x86R",
}


def test_the_array_under_test_is_well_formed_without_its_flaw():
    refused(gzip.compress(PROTO + array_opcodes(F4, b"K\x02\x85") + b"."), "does not hold a dict of layers")


@pytest.mark.parametrize("name", ARRAYS)
def test_odd_arrays_are_refused(name):
    with pytest.raises(ShardError) as caught:
        load_shard(io.BytesIO(gzip.compress(PROTO + ARRAYS[name] + b".")))
    # Refused for what it is: not for the missing dict round it, and not by numpy's choking on it.
    assert "dict of layers" not in str(caught.value) and "bad pickle" not in str(caught.value)


def record(**changes) -> dict:
    activation = np.ones((3, 4), np.float32)
    good = {
        "sample_idx": 0,
        "activation": activation,
        "shape": (3, 4),
        "text_preview": "a",
        "task_id": "b",
        "token_ids": np.arange(3, dtype=np.int32),
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


STRUCTURES = {
    "list": [record()],
    "empty": {},
    "no records": {0: []},
    "tuple of records": {0: (record(),)},
    "text as layer": {"shape": [record()]},
    "records no dicts": {0: [1]},
    "no activation": {0: [record(activation=None)]},
    "no token_ids": {0: [record(token_ids=None)]},
    "activation a list": {0: [record(activation=[1])]},
    "activation 1-D": {0: [record(activation=np.ones(3, np.float32), shape=(3,))]},
    "activation of ints": {0: [record(activation=np.ones((3, 4), np.int32))]},
    "wrong shape": {0: [record(shape=(4, 3))]},
    "shape a list": {0: [record(shape=[3, 4])]},
    "token_ids too few": {0: [record(token_ids=np.arange(2, dtype=np.int32))]},
    "token_ids int64": {0: [record(token_ids=np.arange(3))]},
    "index text": {0: [record(sample_idx="0")]},
    "index bool": {0: [record(sample_idx=True)]},
    "index negative": {0: [record(sample_idx=-1)]},
    "preview bytes": {0: [record(text_preview=b"a")]},
    "task None in tuple": {0: [record(task_id=(None,))]},
    "roles a string": {0: [record(token_roles="abc")]},
    "residual too short": {0: [record(residual=np.ones((2, 4), np.float32))]},
    "descending": {0: [record(sample_idx=1), record(sample_idx=0)]},
    "doubled": {0: [record(), record()]},
    "other samples": {0: [record()], 1: [record(sample_idx=1)]},
    "more samples": {0: [record()], 1: [record(), record(sample_idx=1)]},
    "other length": {
        0: [record()],
        1: [record(activation=np.ones((2, 4), "f4"), shape=(2, 4), token_ids=np.arange(2, dtype="i4"))],
    },
    "other dtype": {0: [record()], 1: [record(activation=np.ones((3, 4), np.float16))]},
    "other width": {0: [record(), record(sample_idx=1, activation=np.ones((3, 5), "f4"), shape=(3, 5))]},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_wrong_structures_are_refused(name):
    refused(gzip.compress(pickle.dumps(STRUCTURES[name], 4)), "is not a whole shard")


def test_optional_keys_are_read():
    extra = record(residual=np.ones((3, 4), np.float32), token_positions=np.arange(3, dtype=np.int32))
    shard = load_shard(io.BytesIO(gzip.compress(pickle.dumps({5: [extra]}, 4))))
    assert shard[5][0]["residual"].shape == (3, 4) and shard[5][0]["token_positions"].tolist() == [0, 1, 2]


@pytest.mark.wide
def test_damaged_gzip_is_refused():
    content = len(without_index(GOOD))
    for cut in set(range(len(GOOD))) - {content}:
        refused(GOOD[:cut], "is not a whole shard")
    assert load_shard(io.BytesIO(GOOD[:content]))
    refused(GOOD + b"garbage", "bad gzip data")
    refused(GOOD + bytes(10), "bad gzip data")
    refused(GOOD[:-8] + bytes([GOOD[-8] ^ 1]) + GOOD[-7:], "bad gzip data")
    refused(GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "bad gzip data")
    refused(GOOD + GOOD, "goes on after the end")


def own_member(content: bytes, behind: bytes = b"") -> bytes:
    """A member of the form that ours have. behind: bytes between its data and its trailer."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = deflate.compress(content) + deflate.flush() + behind
    return member_head(len(data) + 8) + data + struct.pack("<II", zlib.crc32(content), len(content))


def test_a_member_of_our_form_ends_where_its_data_ends():
    first, rest = own_member(GOOD_PICKLE[:9]), GOOD_PICKLE[9:]
    assert load_shard(io.BytesIO(first + own_member(rest)))
    refused(first + own_member(rest, b"more"), "bad gzip data")


def test_a_member_of_our_form_takes_no_more_memory_than_one_may_have():
    reader = GzipReader(io.BytesIO(own_member(b"x") + own_member(bytes(1 << 26))), Budget())
    tracemalloc.start()
    reader.read(10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * BLOCK_BYTES


def test_a_shard_cut_between_members_is_refused():
    members = [gzip.compress(GOOD_PICKLE[n : n + 200], mtime=0) for n in range(0, len(GOOD_PICKLE), 200)]
    assert load_shard(io.BytesIO(b"".join(members)))
    refused(b"".join(members[:-1]), "ends in the middle of its pickle|not enough data")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * len(GOOD) - 1))
def test_a_flipped_bit_in_the_file_never_changes_what_is_read(bit):
    """gzip does not cover its time stamp, flags and OS byte, nor the bits that fill up a byte."""
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    try:
        shard = load_shard(io.BytesIO(data))
    except ShardError:
        return
    assert pickle.dumps(shard) == pickle.dumps(load_shard(io.BytesIO(GOOD)))


@pytest.mark.wide
@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD_PICKLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_pickles_are_shards_or_refused(changes):
    data = bytearray(GOOD_PICKLE)
    for place, value in changes:
        data[place] = value
    try:
        shard = load_shard(io.BytesIO(gzip.compress(data, 1)))
    except ShardError:
        return
    assert [len(records) for records in shard.values()] == [2, 2, 2]
    for records in shard.values():
        assert [item["activation"].shape for item in records] == [item["shape"] for item in records]


def bomb(unit: bytes, size: int, head: bytes = PROTO, tail: bytes = b".") -> bytes:
    """gzip of head + unit, unit ... + tail, made without holding it."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = unit * (1 << 16)
    parts = [deflate.compress(head)]
    parts += [deflate.compress(block) for _ in range(size // len(block))]
    return b"".join([*parts, deflate.compress(tail), deflate.flush()])


LIMIT = 1 << 30
AMPLIFIED = (
    text("x" * (1 << 20)) + b"q\x000" + named("_codecs", "encode") + b"q\x010" + text("latin1") + b"q\x020"
)
REASONS = {
    "claimed length": "ends in the middle",
    "claimed text length": "ends in the middle",
    "claimed 32-bit length": "ends in the middle",
    "deep nesting": "nests or stacks",
    "lists": "nests or stacks",
    "marks": "nests or stacks",
    "empty members": "takes more work",
    "lists in a list": "takes more work",
    "remembered dicts": "takes more work",
    "deep tuples": "takes more work",
    "one record in many layers": "takes more work",
    "equal strings": "takes more work",
    "equal arrays": "takes more work",
}


def compared(**values) -> bytes:
    """Records of many layers that differ from those of the first in which of two equal values they hold."""
    one, other = ({**record(), **{key: make() for key, make in values.items()}} for _ in range(2))
    return gzip.compress(pickle.dumps({layer: [dict(other if layer else one)] for layer in range(9000)}), 9)


BOMBS = {
    "claimed length": lambda: gzip.compress(PROTO + b"\x8e" + struct.pack("<Q", 1 << 62)),
    "claimed text length": lambda: gzip.compress(PROTO + b"\x8d" + struct.pack("<Q", (1 << 64) - 1)),
    "claimed 32-bit length": lambda: gzip.compress(PROTO + b"B\xff\xff\xff\xff"),
    "lists": lambda: bomb(b"]", 1 << 25),
    "zeros as one string": lambda: bomb(bytes(1), 1 << 29, PROTO + b"\x8e" + struct.pack("<Q", 1 << 29)),
    "lists in a list": lambda: bomb(b"](]]]]]]]]]]e0", 1 << 25),
    "remembered dicts": lambda: bomb(b"}\x940", 1 << 25),
    "deep nesting": lambda: bomb(b"]\x94h\x00a", 1 << 24),
    "deep tuples": lambda: bomb(b"\x85", 1 << 25, PROTO + b"N"),
    "marks": lambda: bomb(b"(", 1 << 25),
    "encode": lambda: gzip.compress(PROTO + AMPLIFIED + b"h\x01h\x00h\x02\x86R" * 8000 + b"."),
    "wide text": lambda: gzip.compress(PROTO + (text("\U0001f600" + "x" * 300_000) + b"\x94") * 700 + b"."),
    "empty members": lambda: gzip.compress(b"", mtime=0) * 20_000,
    "equal strings": lambda: compared(task_id=lambda: "".join(["x" * (8 << 20)])),
    "equal arrays": lambda: compared(
        activation=lambda: np.zeros((1 << 20, 2), np.float32),
        shape=lambda: (1 << 20, 2),
        token_ids=lambda: np.zeros(1 << 20, np.int32),
    ),
    "one record in many layers": lambda: gzip.compress(
        pickle.dumps(
            {
                layer: records
                for records in [[record(sample_idx=n) for n in range(300)]]
                for layer in range(9000)
            }
        )
    ),
}
READ = f"""
import resource, sys
from qwen_jax.shards import Sample, ShardError, load_shard
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT} + (1 << 30), {LIMIT} + (1 << 30)))
try:
    load_shard(sys.argv[1])
    print("loaded")
except ShardError as error:
    print("refused", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize("name", few(BOMBS, 4))
def test_bombs_stay_within_the_memory_bound(name, tmp_path):
    path = tmp_path / "bomb.pkl.gz"
    data = BOMBS[name]()
    assert len(data) < 4 << 20
    path.write_bytes(data)
    run = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=90)
    outcome, kilobytes = run.stdout.splitlines()
    assert outcome.startswith("refused"), run.stderr
    assert REASONS.get(name, "unpacks to more than") in outcome
    assert int(kilobytes) << 10 < LIMIT


def test_empty_members_are_not_read_to_their_end():
    data = gzip.compress(b"", mtime=0) * 100_000
    file = io.BytesIO(data)
    with pytest.raises(ShardError, match="takes more work"):
        load_shard(file)
    assert file.tell() < len(data) / 2


class Watched(Budget):
    """share: of its work that a shard leaves, without the floor."""

    made: ClassVar[list[Budget]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)
        self.at_first = self.work_left

    @property
    def share(self):
        return (self.work_left - WORK_FLOOR) / (self.at_first - WORK_FLOOR)


def test_a_shard_of_many_samples_of_one_row_is_read():
    """As --keep_tokens last gives them: what samples share comes first, compresses to nearly nothing, and takes nearly
    all of the work."""
    rows_SRD = np.random.default_rng(0).standard_normal((500, 1, 896)).astype(ml_dtypes.bfloat16)
    one, cells = np.zeros(1, np.int32), np.zeros((1, 4), np.int32)
    extras = {"token_positions": one, "token_roles": one, "token_cells": cells}
    assert set(extras) == set(ROW_KEYS)
    samples = [
        Sample(number, [rows_SRD[number % 500]] * 2, one, "a prompt", "a task", extras)
        for number in range(16_000)
    ]
    file = io.BytesIO(shard_bytes(samples, layers=(0, 3)))
    for layers in (None, [3]):
        file.seek(0)
        shard = load_shard(file, layers=layers)
        assert len(shard[3]) == 16_000 and extras.keys() <= shard[3][-1].keys()


@pytest.mark.wide
@pytest.mark.parametrize(
    "layers, written",
    [(None, bytes), ([3], without_index), ([3], bytes)],
    ids=["all", "one, the others jumped over", "one part"],
)
def test_the_work_of_a_true_shard_is_far_from_the_bound(layers, written, monkeypatch):
    """One token a sample is the most work for the bytes; and arrays so long that they are jumped over."""
    few = [make_sample(n, 1, 64, n_layers=24) for n in range(300)]
    long = [make_sample(n, 2000, 64, n_layers=24) for n in range(3)]
    monkeypatch.setattr("qwen_jax.shards.format.Budget", Watched)
    for samples in (few, long):
        data = written(shard_bytes(samples, layers=tuple(range(24))))
        load_shard(io.BytesIO(data), layers=layers)
        assert Watched.made[-1].share > 0.1


def test_max_bytes_bounds_and_admits():
    big = record(
        activation=np.zeros((100_000, 100), np.float32),
        shape=(100_000, 100),
        token_ids=np.zeros(100_000, np.int32),
    )
    data = gzip.compress(pickle.dumps({0: [big]}, 4))
    with pytest.raises(ShardError, match=r"more than 1,000,000 bytes.*larger max_bytes"):
        load_shard(io.BytesIO(data), max_bytes=10**6)
    assert load_shard(io.BytesIO(data), max_bytes=10**8)[0][0]["shape"] == (100_000, 100)
