"""What malloc does with the memory that XLA frees; nothing of JAX or NumPy is imported here."""

import ctypes
import platform


def keep_freed() -> None:
    """Have glibc's malloc keep what is freed, as the next step asks for the same again.

    On a CPU XLA asks malloc for its scratch space anew at every step. By default glibc hands such
    large blocks back to the system, and page faults fetch them one by one: a third of a quickstart
    step. Call it before NumPy and JAX are imported: their threads bring arenas of their own, whose
    large blocks go back all the same. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # names of malloc.h
    malloc = ctypes.CDLL(None)
    malloc.mallopt(arena_max, 1)
    malloc.mallopt(mmap_max, 0)
    malloc.mallopt(trim_threshold, 2**31 - 1)
