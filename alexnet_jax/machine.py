"""Count the cores of this machine. Imports neither JAX nor NumPy."""

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """Return the number of cores that Slurm, taskset and the container leave to this process."""
    found = os.cpu_count() or 1
    if hasattr(os, 'sched_getaffinity'):
        found = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or 'max': no limit
        quota, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text().split())
        found = min(found, max(1, -(-quota // period)))
    return found
