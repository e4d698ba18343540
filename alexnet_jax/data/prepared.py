"""The folder of a prepared data set: its files, their completeness, and the lock to write it."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from alexnet_jax.command import log
from alexnet_jax.errors import RunError
from alexnet_jax.progress import ProgressBar

FETCHED = ('fashion_mnist', 'mnist')  # prepared without being given any files
OFFICIAL = ('imagenet2010', 'imagenet2012')  # their archives are available on request only
PREPARATION = 'preparation.json'  # beside the records of a set that prepare/shards.py wrote
LOG_EVERY_SECS = 30


def command(name: str, data_dir: str | Path) -> str:
    """Return the command line that prepares data set `name`."""
    source = ' --source=FOLDER' if name in OFFICIAL else ''
    return f'python -m alexnet_jax prepare {name}{source} --data_dir={data_dir}'


def record_files(folder: Path) -> dict[str, list[tuple[Path, int]]]:
    """Return the splits of a prepared data set, from TFDS's `dataset_info.json`.

    Returns:
        {split: [(array_record file, its number of examples)]}, in order.

    Raises:
        RunError: the description is missing or unreadable, or array_record files are missing.
    """
    try:
        info = json.loads((folder / 'dataset_info.json').read_text())
        lengths = {s['name']: [int(n) for n in s['shardLengths']] for s in info['splits']}
        stem = info['name']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f'dataset_info.json: {error}') from None
    found = {
        split: [(folder / shard_name(stem, split, i, len(counts)), n) for i, n in enumerate(counts)]
        for split, counts in lengths.items()
    }
    for path in (path for files in found.values() for path, _ in files):
        if not path.is_file():
            raise damaged(folder, f'{path.name} is missing')
    return found


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """Return TFDS's file name for shard `number` of `count`."""
    return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def check_complete(folder: Path, sizes: Mapping[str, int] | None = None) -> None:
    """Raise RunError unless every file of `folder` contains as many records as described.

    Args:
        folder: of a data set.
        sizes: {split: examples} that it must have.
    """
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    splits = record_files(folder)
    if sizes and {name: sum(n for _, n in files) for name, files in splits.items()} != sizes:
        raise damaged(folder, 'its splits are not the official ones')
    for path, count in (file for files in splits.values() for file in files):
        try:
            records = ArrayRecordReader(str(path)).num_records()
        except Exception as error:  # array_record raises whatever its C++ status maps to
            raise damaged(folder, (str(error).splitlines() or [''])[0]) from None
        if records != count:
            raise damaged(folder, f'{path.name} contains {records:,} records, not {count:,}')


def damaged(folder: Path, reason: str) -> RunError:
    """Return the error for a data set that cannot be used: what to remove and to run."""
    name, data_dir = folder.parent.name, folder.parent.parent
    again = command(name, data_dir)
    if name not in (*FETCHED, *OFFICIAL):
        ours = (folder / PREPARATION).exists()
        what = f'folder --name={name} --source=FOLDER' if ours else f'tfds --name={name}'
        again = command(what, data_dir)
    return RunError(
        f'The data set in {folder} is damaged ({reason}): remove that folder and run `{again}`.'
    )


# ---- writing one ----------------------------------------------------------------------------


def staging_dir(data_dir: Path, name: str) -> Path:
    """Return the folder in which a data set is written before it gets its final name."""
    return data_dir / f'.prepare-{name}'


@contextlib.contextmanager
def locked_staging_dir(data_dir: Path, name: str) -> Generator[Path]:
    """Yield the staging directory, locked for this process; it keeps what an earlier run left.

    It is removed when the block ends well. The system releases the lock of a killed process.

    Raises:
        OSError: `data_dir` cannot be written, or the disk is full.
    """
    staging = staging_dir(data_dir, name)
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(f'{staging}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f'{name}: waiting for another process that is preparing it')
            fcntl.flock(lock, fcntl.LOCK_EX)
        staging.mkdir(exist_ok=True)
        try:
            yield staging
            shutil.rmtree(staging)
        except Exception as error:  # array_record has types of its own for a full disk
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number), str(data_dir)) from error
            raise
        finally:
            with contextlib.suppress(OSError):
                staging.rmdir()  # if it contains nothing to resume from


@contextlib.contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """Yield a function that shows how much of `total` is done.

    It draws a bar on a terminal, and elsewhere prints a line every LOG_EVERY_SECS.
    """
    logged = time.monotonic()
    with contextlib.closing(ProgressBar(total)) as bar:

        def update(done: int) -> None:
            nonlocal logged
            bar.to(done, what)
            if bar.plain and time.monotonic() - logged > LOG_EVERY_SECS:
                logged = time.monotonic()
                bar.line(f'{what}: {done:,} of {total:,} ({done / total:.0%})')

        yield update
