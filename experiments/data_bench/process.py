"""Run a command of this project and measure its time and memory."""

import os
import re
import signal
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
    words: Sequence[str], log: Path, kill_when: Callable[[float], bool] | None = None
) -> dict[str, float]:
    """Run `python WORDS...` in the repository, its output appended to `log`.

    Args:
        words: arguments of the Python interpreter.
        log: the file for stdout and stderr.
        kill_when: a function of the seconds so far; SIGKILL is sent when it returns True.

    Returns:
        'secs', 'cpu_secs' (with its children's), 'main_process_mib' and 'worker_mib': the peak
        memory of the process and of its largest child.
    """
    begin, ended, main_mib, worker_mib = time.perf_counter(), 0, 0, 0
    with log.open('a') as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        while not ended:
            time.sleep(POLL_SECS)
            main_mib = max(main_mib, _peak_mib(child.pid))
            worker_mib = max([worker_mib, *map(_peak_mib, _children(child.pid))])
            if kill_when and kill_when(time.perf_counter() - begin):
                os.kill(child.pid, signal.SIGKILL)  # Popen.kill would wait for it
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
    except BaseException:  # such as Ctrl-C, which does not reach the child
        child.kill()
        child.wait()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)  # Popen would wait for it again
    if child.returncode != (-signal.SIGKILL if kill_when else 0):
        last = (log.read_text().strip() or 'nothing was printed').splitlines()[-1]
        raise RunError(
            f'{" ".join(words[:3])} ended with exit code {child.returncode}: {last}; see {log}.'
        )
    return {
        'secs': time.perf_counter() - begin,
        'cpu_secs': usage.ru_utime + usage.ru_stime,
        'main_process_mib': main_mib,
        'worker_mib': worker_mib,
    }


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
