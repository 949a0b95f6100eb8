"""Host memory: how it is reused."""

import ctypes
import sys

# glibc's malloc.h; the numbers are part of its ABI.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def reuse_freed_memory() -> None:
    """Asks glibc to keep freed blocks of up to 32 MiB for the next use; elsewhere does nothing.

    By default each compressed member's buffer goes back to the kernel, and the page faults of the next one
    cost about a third of the compression speed (benchmarks/host_path.py).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_TOP_PAD, 16 << 20)
