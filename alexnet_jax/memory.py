"""What malloc does with the memory that XLA frees; nothing of JAX or NumPy is imported here."""

import ctypes
import os
import platform


def keep_freed() -> None:
    """Have glibc's malloc keep what is freed, as the next step asks for the same again.

    On a CPU XLA asks malloc for its scratch space anew at every step. By default glibc hands such
    large blocks back to the system, and page faults fetch them one by one: a fifth of a quickstart
    step. malloc can keep them only for the thread that started the program (other threads' arenas
    end at 64 MB), so JAX is told to compute in the thread that asks for it. The environment
    variable that says so wins where it is set. Call this before JAX is imported; elsewhere than on
    glibc it does nothing.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    malloc = ctypes.CDLL(None)
    malloc.mallopt(mmap_max, 0)
    malloc.mallopt(trim_threshold, -1)  # never
    os.environ.setdefault('JAX_CPU_ENABLE_ASYNC_DISPATCH', 'false')
