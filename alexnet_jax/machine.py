"""What the machine gives this process: cores, and memory; nothing of JAX or NumPy is imported here.

On a CPU XLA asks malloc for its scratch space anew at every step. By default glibc hands such large
blocks back to the system, and page faults fetch them one by one, tens of thousands a step.
"""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of malloc.h


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

    Call it when the step has been compiled: what the compiler frees would be kept too, in pieces,
    among which a step then takes half as long again. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] == 'glibc':
        malloc = ctypes.CDLL(None)
        malloc.mallopt(MMAP_MAX, 0)
        malloc.mallopt(TRIM_THRESHOLD, -1)  # never
