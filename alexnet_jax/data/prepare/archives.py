"""List the files of tar archives and folders in one pass, and read one by file, offset and size.

Nothing is unpacked to disk. An archive's md5 is computed while it is listed, so a hard disk reads
ImageNet's 138 GB once, from front to end.
"""

import contextlib
import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from alexnet_jax.errors import RunError

BLOCK_BYTES = 2**20
# What file systems, desktops and tools leave in folders, besides hidden files; in lower case.
LEFTOVERS = frozenset((
    '$recycle.bin', 'system volume information', 'thumbs.db', 'desktop.ini', '__macosx',
    'lost+found', '@eadir', '#recycle', '#snapshot', '__pycache__',
))  # fmt: skip


class File(NamedTuple):
    """A file in a tar file or a folder."""

    name: str  # without any folder
    path: str  # of the file on disk that contains it, absolute in a plan
    offset: int
    size: int
    stamp: int = 0  # changes when a file in a folder does


def folder_files(folder: str | Path) -> Iterator[File]:
    """Yield every file below `folder`, links followed, without the leftovers of systems."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith('.') or entry.name.lower() in LEFTOVERS:
            continue
        if entry.is_dir():
            yield from folder_files(entry.path)
        else:
            about = entry.stat()
            yield File(entry.name, entry.path, 0, about.st_size, about.st_mtime_ns)


def tar_files(path: Path, md5: str | None = None) -> Iterator[File]:
    """Yield every plain file of an uncompressed tar file, and of the tar files in it, in order.

    The md5 is compared when all has been read.

    Raises:
        RunError: it is not a tar file, is incomplete, or has another md5.
    """
    with path.open('rb', buffering=0) as file:
        stream = _Hashed(file)
        try:
            yield from _files(str(path), stream)
            while stream.read(BLOCK_BYTES):
                pass  # the padding behind the last file counts for the md5
            if md5 not in (None, stream.md5.hexdigest()):
                raise tarfile.ReadError(f'its md5 is not {md5}')
        except (tarfile.TarError, EOFError) as error:
            raise RunError(
                f'{path} is not the official tar file or is incomplete ({error}): resume or repeat '
                'its download.'
            ) from None


class _Hashed:
    """A file that is read from front to end, with its md5."""

    def __init__(self, file: IO[bytes]):
        self._file, self.md5 = file, hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.md5.update(block)
        return block


def _files(path: str, stream: Any, start: int = 0) -> Iterator[File]:
    """Yield the files of a tar file that begins at byte `start` of the file `path`."""
    with tarfile.open(fileobj=stream, mode='r|', bufsize=BLOCK_BYTES) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # ty: ignore[missing-attribute] (else it keeps all of them)
            offset = start + member.offset_data
            if member.isreg() and member.name.endswith('.tar'):
                yield from _files(path, tar.extractfile(member), offset)
            elif member.isreg():
                yield File(PurePosixPath(member.name).name, path, offset, member.size)


def read(file: File) -> bytes:
    """Return the contents of a file, unpacked where they are gzipped (ILSVRC-2010 has one)."""
    with open(file.path, 'rb', buffering=0) as source:
        content = os.pread(source.fileno(), file.size, file.offset)
    if content[:2] == b'\x1f\x8b':
        with contextlib.suppress(OSError, EOFError, zlib.error):  # the decoder reports the fault
            return gzip.decompress(content)
    return content
