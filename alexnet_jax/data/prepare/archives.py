"""List the files of tar archives and folders in one pass, and read one by file, offset and size.

Nothing is unpacked to disk. An archive's md5 is computed while it is listed, so a hard disk reads
ImageNet's 138 GB once, from front to end.
"""

import contextlib
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from alexnet_jax.errors import RunError

BLOCK_BYTES = 2**20
# What file systems, desktops and tools leave in folders, besides hidden files; in lower case.
LEFTOVERS = frozenset((
    '$recycle.bin', 'system volume information', 'thumbs.db', 'desktop.ini', '__macosx',
    'lost+found', '@eadir', '#recycle', '#snapshot', '__pycache__',
))  # fmt: skip


class Entry(NamedTuple):
    """A file in an archive or a folder."""

    name: str  # without any folder
    path: Path  # of the file on disk
    offset: int
    size: int
    stamp: int = 0  # changes when a file in a folder does


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or one that systems leave behind."""
    return name.startswith('.') or name.lower() in LEFTOVERS


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Yield every file below `folder`, links followed, without the leftovers of systems.

    Raises:
        OSError: a folder or file cannot be read, or links form a loop.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_leftover(entry.name):
            continue
        if entry.is_dir():
            yield from folder_entries(Path(entry.path))
        else:
            about = entry.stat()
            yield Entry(entry.name, Path(entry.path), 0, about.st_size, about.st_mtime_ns)


def tar_entries(
    path: Path, md5: str | None = None, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Entry]:
    """Yield every plain file of a tar file, and of the tar files in it, in their order.

    Args:
        path: of an uncompressed tar file.
        md5: of the tar file, compared when all has been read.
        progress: called with the bytes read so far.

    Raises:
        RunError: it is not a tar file, is incomplete, or has another md5.
    """
    with path.open('rb', buffering=0) as file:
        stream = _Hashed(file, progress)
        try:
            with tarfile.open(fileobj=stream, mode='r|', bufsize=BLOCK_BYTES) as tar:
                for one in _files(tar):
                    if not one.name.endswith('.tar'):
                        yield _entry(path, one)
                        continue
                    inner = tar.extractfile(one)
                    with tarfile.open(fileobj=inner, mode='r|', bufsize=BLOCK_BYTES) as nested:
                        for file_in_it in _files(nested):
                            yield _entry(path, file_in_it, one.offset_data)
            while stream.read(BLOCK_BYTES):
                pass  # the padding behind the last file counts for the md5
            found = stream.md5.hexdigest()
            reason = '' if md5 in (None, found) else f'its md5 is {found}, not {md5}'
        except (tarfile.TarError, EOFError) as error:
            reason = str(error)
    if reason:
        raise RunError(
            f'{path} is not the official tar file or is incomplete ({reason}): resume or repeat '
            'its download.'
        )


class _Hashed(io.RawIOBase):
    """A file read from front to end, with its md5."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]):
        self._file, self._progress, self._done = file, progress, 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._done += len(block)
        self.md5.update(block)
        self._progress(self._done)
        return block


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # ty: ignore[missing-attribute] (else it keeps all of them)
        if member.isreg():
            yield member


def _entry(path: Path, member: tarfile.TarInfo, start: int = 0) -> Entry:
    name = PurePosixPath(member.name).name
    return Entry(name, path, start + member.offset_data, member.size)


def read(path: Path, offset: int, size: int) -> bytes:
    """Return the bytes of one file, unpacked where they are gzipped (ILSVRC-2010 has one).

    Raises:
        OSError: the file cannot be read.
    """
    with path.open('rb', buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if content[:2] == b'\x1f\x8b':
        with contextlib.suppress(OSError, EOFError, zlib.error):  # the decoder reports the fault
            return gzip.decompress(content)
    return content
