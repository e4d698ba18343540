"""A prepared data set on disk, as TFDS lays it out: found, checked, and made under a lock."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from alexnet_jax.errors import RunError
from alexnet_jax.progress import ProgressBar

Report = Callable[[str], None]

OFFICIAL = ('imagenet2010', 'imagenet2012')  # their archives are to be had on request only
PREPARATION = 'preparation.json'  # beside the records of a set made from pictures by this program


def command(name: str, data_dir: str | Path) -> str:
    """What a person types to prepare data set `name`."""
    source = ' --source=FOLDER' if name in OFFICIAL else ''
    return f'python -m alexnet_jax.prepare {name}{source} --data_dir={data_dir}'


def shards(folder: Path) -> dict[str, tuple[int, list[Path]]]:
    """The splits of a prepared data set, read from TFDS's `dataset_info.json`.

    Returns:
        {split: (number of examples, its array_record files in order)}.

    Raises:
        RunError: the description is missing or unreadable, or array_record files are missing.
    """
    try:
        info = json.loads((folder / 'dataset_info.json').read_text())
        lengths = {s['name']: [int(n) for n in s['shardLengths']] for s in info['splits']}
        stem = info['name']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f'dataset_info.json: {error}') from None
    found = {}
    for split, counts in lengths.items():
        files = [folder / shard_name(stem, split, i, len(counts)) for i in range(len(counts))]
        for file in files:
            if not file.is_file():
                raise damaged(folder, f'{file.name} is missing')
        found[split] = (sum(counts), files)
    return found


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """TFDS's name for shard `number` of `count`."""
    return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def check_whole(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise RunError unless `folder` has exactly the splits {name: examples} in readable files."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    splits = shards(folder)
    if {name: count for name, (count, _) in splits.items()} != dict(sizes):
        raise damaged(folder, 'its splits are not the official ones')
    for count, files in splits.values():
        try:
            records = sum(ArrayRecordReader(str(file)).num_records() for file in files)
        except Exception as error:  # array_record raises whatever its C++ status maps to
            raise damaged(folder, (str(error).splitlines() or [''])[0]) from None
        if records != count:
            raise damaged(folder, f'{records:,} records where {count:,} should be')


def damaged(folder: Path, reason: str) -> RunError:
    """The error for a prepared data set that cannot be used: says what to remove and to run."""
    name, data_dir = folder.parent.name, folder.parent.parent
    again = command(name, data_dir)
    if name not in ('fashion_mnist', *OFFICIAL):
        ours = (folder / PREPARATION).exists()
        what = f'folder --name={name} --source=FOLDER' if ours else f'tfds --name={name}'
        again = command(what, data_dir)
    return RunError(
        f'The data set in {folder} is damaged ({reason}): remove that folder and run `{again}`.'
    )


# ---- making one -----------------------------------------------------------------------------


def room(data_dir: Path, name: str) -> Path:
    """Where a data set is made."""
    return data_dir / f'.prepare-{name}'


@contextlib.contextmanager
def workroom(data_dir: Path, name: str, report: Report, *, keep: bool = False) -> Generator[Path]:
    """A scratch folder in `data_dir`, this process's alone until it leaves.

    It is empty, and swept away at the end, unless what a run leaves is kept for the next one. The
    lock goes with its process, however that dies; so whoever holds it may sweep up after one that
    was killed.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    scratch = room(data_dir, name)
    with open(data_dir / f'.prepare-{name}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f'{name}: another process is preparing it; waiting')
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=keep)
        try:
            yield scratch
        finally:
            if not keep:
                shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def cannot_write(data_dir: Path) -> Generator[None]:
    """Turn what the file system or array_record's writers raise into one sentence."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else _full_disk(str(error))
        if not reason:
            raise
        raise RunError(
            f'Cannot prepare data in {data_dir} ({reason}): give it space and write permission, '
            'or choose another folder with --data_dir.'
        ) from error


def _full_disk(message: str) -> str | None:
    """The cause hidden in a message of array_record's writers, which raise no OSError."""
    causes = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return next((cause for cause in causes if cause in message), None)


def clock(secs: float) -> str:
    """Hours, minutes, seconds: '30:05:00'."""
    minutes, rest = divmod(round(secs), 60)
    return f'{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}'


class Meter:
    """A progress bar that also shows the amount done and the rate; plain lines now and then."""

    def __init__(self, what: str, total: int, unit: str, report: Report, scale: int = 1):
        """`total` of `unit` (each of them `scale`) are to be done."""
        self._what, self._total, self._unit, self._scale = what, total, unit, scale
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._bar = ProgressBar(total, report=report)

    def __enter__(self) -> 'Meter':
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def to(self, done: int, every_secs: float = 30) -> None:
        """Show that `done` of the total are done; what the first call says was done before."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now
        rate = (done - self._first) / max(1e-6, now - self._began)
        line = (
            f'{self._what}: {done / self._scale:,.0f} of {self._total / self._scale:,.0f} '
            f'{self._unit}, {rate / self._scale:,.1f} a second'
        )
        self._bar.to(done, line)
        if self._bar.plain and now - self._said >= every_secs and rate > 0:
            self._said = now
            self._bar.line(f'{line}, {clock((self._total - done) / rate)} left')
