"""How glibc keeps the memory that a run on a CPU frees."""

from __future__ import annotations

import ctypes
import sys

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let a training process on a CPU keep what it frees, to be used again in the next step.

    glibc maps every buffer above 32 MiB anew and gives it back when it is freed, so that each step
    begins with the kernel clearing its gradient buckets page by page: a seventh of the CPU time of
    a MiniLM step. `trim_heap` gives the pages back where that is wanted. It is a setting of the
    whole process, so only who owns the process calls this.
    """
    if (set_option := _libc("mallopt")) is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, _NEVER)


def trim_heap() -> None:
    """Give freed heap pages back to the system.

    glibc keeps the old engine's buffers as holes between live ones; over many phase changes of a
    CPU run resident memory would creep up although nothing is held.
    """
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _libc(name: str) -> ctypes._NamedFuncPointer | None:
    """Return a function of glibc; None where the C library is another and has none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
