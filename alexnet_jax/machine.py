"""What the machine gives this process: cores, and memory; nothing of JAX or NumPy is imported here.

On a CPU XLA asks malloc for its scratch space anew at every step. By default glibc hands such large
blocks back to the system, and page faults fetch them one by one, tens of thousands a step.
"""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # names of malloc.h


def cores() -> int:
    """How many this process may use: what Slurm, taskset or a container's limit leave it."""
    found = os.cpu_count() or 1
    if hasattr(os, 'sched_getaffinity'):
        found = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or 'max': no limit
        quota, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text().split())
        found = min(found, max(1, -(-quota // period)))
    return found


def keep_freed() -> None:
    """Have malloc keep what is freed, as the next step asks for the same again.

    It can do so only in the arena of the thread that started the program: those of other threads
    end at 64 MB. So either that thread computes, or `share_arena`. Call this before JAX is
    imported; elsewhere than on glibc it does nothing.
    """
    _set(MMAP_MAX, 0)
    _set(TRIM_THRESHOLD, -1)  # never


def share_arena() -> None:
    """Have all threads that start from now on allocate from the first one's arena.

    For threads that allocate large blocks themselves. Where they only compute, their own arenas are
    faster: a thread's small blocks stay in its core's cache.
    """
    _set(ARENA_MAX, 1)


def _set(name: int, value: int) -> None:
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).mallopt(name, value)
