"""Run a command of this project and measure its time and memory."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from alexnet_jax.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
POLL_SECS = 0.05


def run(
    words: Sequence[str], log: Path, until: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Run `python WORDS...` in the repository, its output appended to `log`; kill it at `until`.

    Returns:
        'secs', 'cpu_secs' (with its children's), 'main_process_mib' and 'worker_mib': the peak
        memory of the process and of its largest child.
    """
    begin, cpu_begin, main_mib, worker_mib = time.perf_counter(), _cpu_secs(), 0, 0
    with log.open('a') as file:
        child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
        try:
            while child.poll() is None and not until():
                time.sleep(POLL_SECS)
                main_mib = max(main_mib, _peak_mib(child.pid))
                worker_mib = max([worker_mib, *map(_peak_mib, _children(child.pid))])
        finally:
            child.kill()  # it is alive at the end of `until`, and after Ctrl-C
            child.wait()
    if child.returncode and not until():
        raise RunError(f'{" ".join(words[:3])} ended with exit code {child.returncode}; see {log}.')
    return {
        'secs': time.perf_counter() - begin,
        'cpu_secs': _cpu_secs() - cpu_begin,
        'main_process_mib': main_mib,
        'worker_mib': worker_mib,
    }


def _cpu_secs() -> float:
    """Return the CPU time of all processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _children(pid: int) -> list[str]:
    try:
        return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []


def _peak_mib(pid: int | str) -> int:
    try:
        match = re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())
    except OSError:
        return 0
    return int(match[1]) // 1024 if match else 0


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key over rounds."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}
