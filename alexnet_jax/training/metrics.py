"""What a run says of itself: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Generator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import command, files
from alexnet_jax.parallel import distributed

# Fields that tell time. All others repeat exactly when a run is repeated or resumed.
TIMES = ('secs', 'images_per_sec', 'stall_secs')


def log(line: str) -> None:
    """A line for the person at the terminal, from process 0; stdout is kept for results."""
    if distributed.is_first():
        command.log(line)


class Means:
    """Running sums and counts by name, so that uneven batches average right."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None):
        self.sums = {name: (total, count) for name, (total, count) in (sums or {}).items()}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add one batch's {name: (sum, count)}."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + float(total), old_count + float(count))

    def take(self) -> dict[str, float]:
        """The means so far; starts afresh."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums = {}
        return means


class MetricWriter:
    """metrics.jsonl, one JSON object a line: {"kind": ..., "step": ..., values}; and TensorBoard.

    Of several processes only the first writes.

    Args:
        workdir: where metrics.jsonl and tensorboard/ lie.
        resume_step: records of later steps are dropped: the resumed run writes them again.
        tensorboard: whether to write event files too; left out, with a line, if tensorboardX is
            not installed.
    """

    def __init__(self, workdir: Path, resume_step: int, tensorboard: bool):
        self.path, self._file, self._board = workdir / 'metrics.jsonl', None, None
        if not distributed.is_first():
            return
        kept = [record for record in read(workdir) if record['step'] <= resume_step]
        with files.atomic_write(self.path) as scratch:
            scratch.write_text(''.join(json.dumps(record) + '\n' for record in kept))
        self._file = self.path.open('a')
        if tensorboard:
            self._board = _board(workdir / 'tensorboard', resume_step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record; it is on its way to the disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f'{kind}/{name}', value, step)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut off by a crash is left out."""
    path = workdir / 'metrics.jsonl'
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _board(folder: Path, resume_step: int):
    try:
        with _without('torch'):  # tensorboardX looks for it, and needs it for nothing written here
            from tensorboardX import SummaryWriter
    except ImportError:
        log('tensorboardX is not installed, so no TensorBoard files: pip install tensorboardX.')
        return None
    return SummaryWriter(str(folder), purge_step=resume_step + 1)


@contextlib.contextmanager
def _without(module: str) -> Generator[None]:
    """As if it were not installed, unless it has been imported: PyTorch's import takes seconds."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # ty: ignore[invalid-assignment] (Python's way to say so)
    try:
        yield
    finally:
        del sys.modules[module]


# -------------------------------------------------------------------- what a figure needs beside it


def environment() -> dict[str, Any]:
    """Versions, devices and commit."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        'platform': jax.default_backend(),
        'device': device_name(),
        'devices': jax.device_count(),
        'processes': jax.process_count(),
        'cpus': os.cpu_count(),
        'commit': commit(),
    }


def device_name() -> str:
    """The accelerator's name, or the processor's, where JAX says only 'cpu'."""
    device = jax.devices()[0]
    cpuinfo = Path('/proc/cpuinfo')
    if device.platform != 'cpu' or not cpuinfo.exists():
        return device.device_kind
    found = re.search(r'model name\s*:\s*(.+)', cpuinfo.read_text())
    return found.group(1) if found else platform.processor() or platform.machine()


def short(commit: str) -> str:
    """A commit as people write it; a '+' behind it, of code changed since, stays."""
    return commit[:9] + '+' * commit.endswith('+')


def commit() -> str:
    """Return the code's commit, with '+' behind it if tracked files were changed; or 'unknown'.

    It is unknown where git does not track this file: the repository around an installed package is
    somebody else's. Logs do not count as changes: a measurement writes them, and its second half is
    of the same code.
    """

    def git(*words: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(
            ['git', *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '--', Path(__file__).name)
        logs = ':(top,exclude)experiments/results'
        changed = git('status', '--porcelain', '--untracked-files=no', '--', ':(top)', logs)
        return git('rev-parse', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.SubprocessError):
        return 'unknown'
