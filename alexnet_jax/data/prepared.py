"""The folder of a prepared data set: its files, whether they are complete, the lock to write it."""

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

FETCHED = ('fashion_mnist', 'mnist')  # prepared without being given any files
OFFICIAL = ('imagenet2010', 'imagenet2012')  # their archives are available on request only
PREPARATION = 'preparation.json'  # beside the records of a set that prepare/shards.py wrote
LOG_EVERY_SECS = 30


def command(name: str, data_dir: str | Path) -> str:
    """Return the command line that prepares data set `name`."""
    source = ' --source=FOLDER' if name in OFFICIAL else ''
    return f'python -m alexnet_jax prepare {name}{source} --data_dir={data_dir}'


def shards(folder: Path) -> dict[str, tuple[int, list[Path]]]:
    """Return the splits of a prepared data set, from TFDS's `dataset_info.json`.

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
    """Return TFDS's file name for shard `number` of `count`."""
    return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def check_complete(folder: Path, sizes: Mapping[str, int] | None = None) -> None:
    """Raise RunError unless every file of `folder` holds as many records as its description says.

    Args:
        folder: of a data set.
        sizes: {split: examples} that it must have.
    """
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    splits = shards(folder)
    if sizes and {name: count for name, (count, _) in splits.items()} != dict(sizes):
        raise damaged(folder, 'its splits are not the official ones')
    for count, files in splits.values():
        try:
            records = sum(ArrayRecordReader(str(file)).num_records() for file in files)
        except Exception as error:  # array_record raises whatever its C++ status maps to
            raise damaged(folder, (str(error).splitlines() or [''])[0]) from None
        if records != count:
            raise damaged(folder, f'{records:,} records where {count:,} should be')


def damaged(folder: Path, reason: str) -> RunError:
    """Return the error for a data set that cannot be used; it says what to remove and to run."""
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
def locked_staging_dir(data_dir: Path, name: str, report: Report) -> Generator[Path]:
    """Yield the staging directory, locked for this process; it keeps what an earlier run left.

    The lock ends with its process, so a killed run blocks nobody. What the file system or
    array_record's writer raises inside the block becomes one sentence.

    Raises:
        RunError: `data_dir` cannot be written.
    """
    staging = staging_dir(data_dir, name)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / f'{staging.name}.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f'{name}: waiting for another process that prepares it')
                fcntl.flock(lock, fcntl.LOCK_EX)
            staging.mkdir(exist_ok=True)
            try:
                yield staging
                shutil.rmtree(staging)
            finally:
                with contextlib.suppress(OSError):
                    staging.rmdir()  # nothing in it to resume from
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else _full_disk(str(error))
        if not reason:
            raise
        raise RunError(
            f'Cannot prepare data in {data_dir} ({reason}): give it space and write permission, '
            'or choose another folder with --data_dir.'
        ) from error


def _full_disk(message: str) -> str | None:
    """Return the cause named in a message of array_record's writers, which raise no OSError."""
    causes = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return next((cause for cause in causes if cause in message), None)


@contextlib.contextmanager
def progress(what: str, total: int, report: Report) -> Generator[Callable[[int], None]]:
    """Yield a function that shows how much of `total` is done.

    It draws a bar on a terminal, and elsewhere reports a line every LOG_EVERY_SECS.
    """
    logged = time.monotonic()
    with contextlib.closing(ProgressBar(total, report=report)) as bar:

        def update(done: int) -> None:
            nonlocal logged
            bar.to(done, what)
            if bar.plain and time.monotonic() - logged > LOG_EVERY_SECS:
                logged = time.monotonic()
                bar.line(f'{what}: {done:,} of {total:,} ({done / total:.0%})')

        yield update
