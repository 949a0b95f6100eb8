"""Parallel gzip: right content, order, bounded memory, and failures that reach the caller."""

import ctypes
import gzip
import io
import random
import sys
import threading

import pytest

from qwen_jax.shards import compress
from qwen_jax.shards.compress import ParallelGzipWriter
from tests.waiting import until


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(compress, "BLOCK_BYTES", 1000)


def written(pieces, threads=2) -> bytes:
    file = io.BytesIO()
    with ParallelGzipWriter(file, threads) as out:
        for piece in pieces:
            assert out.write(piece) == len(piece)
    return file.getvalue()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 25_017])
def test_content_survives(size):
    data = random.Random(size).randbytes(size)
    assert gzip.decompress(written([data])) == data


def test_bytes_do_not_depend_on_cuts_or_threads():
    data = random.Random(1).randbytes(10_500)
    cut = [data[:1], data[1:999], memoryview(data)[999:4000], b"", bytearray(data[4000:])]
    assert written([data], threads=1) == written(cut, threads=4)


def test_large_writes_make_members_of_their_own(monkeypatch):
    monkeypatch.setattr(compress, "IN_PLACE_BYTES", 1500)
    data = random.Random(1).randbytes(4000)
    pieces = [data[:700], data[700:3200], data[3200:]]  # small, large (two blocks and a half), small
    out = written(pieces, threads=4)
    assert gzip.decompress(out) == data and out == written(pieces, threads=1)
    blocks = [data[:700], data[700:1700], data[1700:2700], data[2700:3200], data[3200:]]
    assert out == b"".join(map(compress.compress_block, blocks))


def test_large_writes_are_not_copied(monkeypatch):
    monkeypatch.setattr(compress, "IN_PLACE_BYTES", 1500)
    seen = []
    monkeypatch.setattr(compress, "compress_block", lambda block: seen.append(block.obj) or b"")
    data = bytes(2500)
    written([data])
    assert [owner is data for owner in seen] == [True] * 3


def in_thread_with_stack_at(address: int, function) -> list:
    """What `function` returns in a thread whose stack lies at `address`; nothing if that is taken."""
    libc, size = ctypes.CDLL(None), 1 << 20
    libc.mmap.restype = ctypes.c_void_p
    private_anonymous_noreplace = 0x100022
    stack = ctypes.c_void_p(
        libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), 3, private_anonymous_noreplace, -1, 0)
    )
    if stack.value != address:
        return []
    attributes, thread, returned = ctypes.create_string_buffer(64), ctypes.c_void_p(), []
    start = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: returned.append(function()) or 0)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstack(attributes, stack, ctypes.c_size_t(size))
    assert libc.pthread_create(ctypes.byref(thread), attributes, start, None) == 0
    libc.pthread_join(thread, None)
    libc.munmap(stack, ctypes.c_size_t(size))
    return returned


@pytest.mark.skipif(sys.platform != "linux", reason="places thread stacks by Linux calls")
def test_bytes_do_not_depend_on_where_the_stack_lies():
    """Bare isal fails this: its member for such a block depends on the stack's address, one time in 128."""
    block = b"--look here, and another look here, -- !"
    random_address = random.Random(0).randrange
    found = set()
    for _ in range(1000):
        address = random_address(1 << 40, 1 << 46) & ~0xFFFF
        found.update(in_thread_with_stack_at(address, lambda: compress.compress_block(block)))
    assert found == {compress.compress_block(block)}
    assert gzip.decompress(found.pop()) == block


def test_members_have_no_time_and_no_name():
    data = written([b"x" * 3500])
    start = b"\x1f\x8b\x08\x04" + bytes(4)
    assert data.startswith(start) and data.count(start) == 4


def test_zlib_stands_in_for_isal(monkeypatch):
    monkeypatch.setattr(compress, "isal_zlib", None)
    data = random.Random(2).randbytes(3500)
    out = written([data])
    assert gzip.decompress(out) == data and out[4:8] == bytes(4)


def test_the_callers_buffer_may_be_used_again():
    buffer = bytearray(b"a" * 700)
    file = io.BytesIO()
    with ParallelGzipWriter(file) as out:
        for letter in b"abcdef":
            buffer[:] = bytes([letter]) * 700
            out.write(buffer)
    assert gzip.decompress(file.getvalue()) == b"".join(bytes([letter]) * 700 for letter in b"abcdef")


def test_order_holds_when_early_blocks_are_slow(monkeypatch):
    compress_block, later_done = compress.compress_block, threading.Event()

    def slow_first(block):
        if block[0] == ord("0"):
            assert later_done.wait(10)
        else:
            later_done.set()
        return compress_block(block)

    monkeypatch.setattr(compress, "compress_block", slow_first)
    data = b"".join(bytes([ord("0") + n]) * 1000 for n in range(4))
    assert gzip.decompress(written([data])) == data


def test_blocks_in_flight_are_bounded(monkeypatch):
    gate, taken = threading.Event(), []
    monkeypatch.setattr(compress, "compress_block", lambda block: gate.wait(10) and b"")
    out = ParallelGzipWriter(io.BytesIO(), threads=2)

    def feed():
        for n in range(80):
            out.write(bytes(1000))
            taken.append(n)

    thread = threading.Thread(target=feed)
    thread.start()
    waiting = 2 + compress._BLOCKS_WAITING
    until(lambda: len(taken) == waiting)
    thread.join(0.1)
    assert len(taken) == waiting
    gate.set()
    thread.join()
    out.close()


def test_a_failing_thread_reaches_the_caller(monkeypatch):
    def broken(block):
        raise MemoryError("no room")

    monkeypatch.setattr(compress, "compress_block", broken)
    out = ParallelGzipWriter(io.BytesIO())
    out.write(bytes(1500))
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            out.close()
    with pytest.raises(MemoryError, match="no room"):
        out.write(b"more")


def test_a_failing_file_reaches_the_caller():
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    out = ParallelGzipWriter(Full(), threads=1)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10):
            out.write(bytes(1000))
    with pytest.raises(OSError, match="No space left"):
        out.close()


def test_an_exception_inside_with_leaves_an_unfinished_file():
    file = io.BytesIO()
    with pytest.raises(KeyError), ParallelGzipWriter(file, threads=1) as out:
        out.write(bytes(1500))
        raise KeyError
    assert file.getvalue() == b""
    out.close()
    assert file.getvalue() == b""
    with pytest.raises(ValueError, match="closed"):
        out.write(b"more")


def test_threads_end_with_the_writer():
    before = threading.active_count()
    written([bytes(5000)], threads=3)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "sizes", [[0], [400, 300, 900], [999, 1, 1000], [1500, 2, 0, 4000], [25_017, 3], [1, 999, 7]]
)
def test_pieces_give_the_bytes_of_the_whole(sizes, monkeypatch):
    """Also where they are compressed in place, in blocks that lie in several of them."""
    monkeypatch.setattr(compress, "IN_PLACE_BYTES", 2000)
    data = random.Random(0).randbytes(sum(sizes))
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    file = io.BytesIO()
    with ParallelGzipWriter(file, 2) as out:
        out.write_joined([data[end - size : end] for size, end in zip(sizes, ends, strict=True)])
    assert file.getvalue() == written([data])
