"""What malloc does with the memory that XLA frees; nothing of JAX or NumPy is imported here.

On a CPU XLA asks malloc for its scratch space anew at every step. By default glibc hands such large
blocks back to the system, and page faults fetch them one by one, tens of thousands a step.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # names of malloc.h


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
