"""Metrics of a run: its history, metrics.jsonl and TensorBoard, and the environment."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import command, files
from alexnet_jax.parallel import distributed

Metrics = Mapping[str, tuple[Any, Any]]  # of a step: {metric: (sum, count)}
# Fields that hold times. All others repeat exactly when a run is repeated or resumed.
TIMES = ('secs', 'images_per_sec', 'stall_secs')


def log(line: str) -> None:
    """Print a line to stderr, in process 0 only; stdout is for results."""
    if distributed.is_first():
        command.log(line)


@dataclasses.dataclass
class History:
    """Values that a run keeps besides its state; stored in each checkpoint, as JSON.

    errors: top-1 error on the validation images, oldest first.
    sums: (sum, count) of each metric since the last record.
    secs: of training, without evaluation and saving.
    """

    errors: list[float] = dataclasses.field(default_factory=list)
    sums: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    secs: float = 0.0

    def add(self, metrics: Metrics) -> None:
        """Add a step's metrics to the sums."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + float(total), old_count + float(count))

    def take_means(self) -> dict[str, float]:
        """Return the mean of each metric over all that it counts, and start again at zero."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums.clear()
        return means


class MetricWriter:
    """metrics.jsonl, one JSON object per line: {"kind": ..., "step": ..., values}; and TensorBoard.

    Of several processes only the first writes.

    Args:
        workdir: the folder of metrics.jsonl and tensorboard/.
        resume_step: records of later steps are removed, as the resumed run writes them again.
        tensorboard: write event files too, unless tensorboardX is not installed (logs a line).
    """

    def __init__(self, workdir: Path, resume_step: int, tensorboard: bool):
        self.path, self._file, self._board = workdir / 'metrics.jsonl', None, None
        kept = [record for record in read(workdir) if record['step'] <= resume_step]
        self._resumed = {(record['kind'], record['step']) for record in kept}
        if not distributed.is_first():
            return
        with files.atomic_write(self.path) as scratch:
            scratch.write_text(''.join(json.dumps(record) + '\n' for record in kept))
        self._file = self.path.open('a')
        if tensorboard:
            self._board = _board(workdir / 'tensorboard', resume_step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record and flush it, unless an earlier start has written it."""
        if self._file is None or (kind, step) in self._resumed:
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
    """Return the records of a run, oldest first, without lines that are damaged or cut off."""
    path = workdir / 'metrics.jsonl'
    records = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {'kind', 'step'} <= record.keys():
                records.append(record)
    return records


def _board(folder: Path, resume_step: int) -> Any:
    """Return a TensorBoard writer; None, and a line in the log, without tensorboardX."""
    # tensorboardX tries to import torch, which takes seconds, for nothing that is written here.
    if hide := 'torch' not in sys.modules:
        sys.modules['torch'] = None  # ty: ignore[invalid-assignment] (documented way to block it)
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        log('no TensorBoard files are written: tensorboardX is missing (pip install tensorboardX).')
        return None
    finally:
        if hide:
            del sys.modules['torch']
    return SummaryWriter(str(folder), purge_step=resume_step + 1)


# ------------------------------------------------------------------------------- environment


def environment() -> dict[str, Any]:
    """Return versions, devices and commit."""
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
    """Return the name of the accelerator, or of the processor."""
    device = jax.devices()[0]
    cpuinfo = Path('/proc/cpuinfo')
    if device.platform != 'cpu' or not cpuinfo.exists():
        return device.device_kind
    found = re.search(r'model name\s*:\s*(.+)', cpuinfo.read_text())
    return found.group(1) if found else platform.processor() or platform.machine()


def commit() -> str:
    """Return the code's commit, followed by '+' if tracked files were changed; or 'unknown'.

    It is unknown where git does not track this file: an installed package may be inside another
    repository. Logs do not count as changes, as measurements write them while they run.
    """
    here, quiet = Path(__file__), subprocess.DEVNULL

    def git(*words: str) -> str:
        command = ['git', *words]
        found = subprocess.check_output(command, cwd=here.parent, stderr=quiet, timeout=10)
        return found.decode().strip()

    try:
        git('ls-files', '--error-unmatch', here.name)
        logs = ':(top,exclude)experiments/results'
        changed = git('status', '--porcelain', '--untracked-files=no', '--', ':(top)', logs)
        return git('rev-parse', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.SubprocessError):
        return 'unknown'
