"""Host memory: how much a run may hold, and how it is reused."""

import ctypes
import sys

from qwen_jax.data.prompts import CHUNK_BYTES
from qwen_jax.data.steps import StepShape
from qwen_jax.data.streams import MAX_LINE_BYTES
from qwen_jax.run.pipeline import MIN_REAL_SHARE, STEPS_IN_FLIGHT

_PROMPT_FACTOR, _LINE_FACTOR = 250, 18
"""Bytes of memory at most for each byte of a text that is made into tokens, and of a line that is read; measured on
texts of rare characters and on lines of short strings (docs/performance.md)."""
# glibc's malloc.h; the numbers are part of its ABI.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def reuse_freed_memory() -> None:
    """Asks glibc to keep freed blocks of up to 32 MiB for the next use; elsewhere does nothing.

    By default each compressed member's buffer goes back to the kernel, and the page faults of the next one
    cost about a third of the compression speed (benchmarks/host_path.py). Two arenas, because what is free in
    one does not serve threads of another, and the kept blocks would add up (benchmarks/scaling.py).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_TOP_PAD, 16 << 20)


def activation_bytes_bound(shape: StepShape, bytes_per_token: int, shard_bytes: int) -> int:
    """The most bytes of activations that a run holds on the host, whatever the length of its stream.

    Two shards (one filling, one being compressed, each up to one sample over its size) and the step that the older one
    shares with its predecessor; a long sample for each further row, which waits for one before it; the steps in
    flight and the one being handed out; divided by the share of a kept step that is wanted.
    """
    shards = 2 * (shard_bytes + shape.positions * bytes_per_token)
    waiting = (shape.rows - 1) * shape.positions * bytes_per_token
    steps = (1 + STEPS_IN_FLIGHT + 1) * shape.per_step * bytes_per_token
    return round((shards + waiting + steps) / MIN_REAL_SHARE)


def prompt_memory_bound(most_bytes: int) -> int:
    """The most bytes that lines and prompts take while they are made into tokens. most_bytes: of a prompt."""
    return _PROMPT_FACTOR * (CHUNK_BYTES + most_bytes) + _LINE_FACTOR * MAX_LINE_BYTES
