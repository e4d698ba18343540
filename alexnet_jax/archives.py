"""Pictures inside tar files, and in tar files inside those, found and read where they lie.

An archive is gone through once, from front to end, and its md5 taken on the way: a hard disk reads
138 GB so at its full speed. From then on each picture is known by file, offset and size, and is
read by itself; nothing is unpacked to disk.
"""

import contextlib
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
MOST_BYTES = 2**28  # of one picture, encoded: ImageNet's largest has a twentieth of it


class Entry(NamedTuple):
    """A file in an archive: where its bytes lie in the archive's file."""

    inside: str  # the name of the tar file within the archive that holds it, or ''
    name: str
    offset: int
    size: int


def entries(
    path: Path, md5: str | None = None, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Entry]:
    """Every file of a tar file, and of the tar files in it, in their order.

    Args:
        path: of an uncompressed tar file.
        md5: of the whole file, compared when all has been read.
        progress: called with the bytes read so far, now and then.

    Raises:
        RunError: it cannot be read, ends too early, has another md5, or holds what a set of
            pictures does not hold: links, devices, names that lead out of their folder.
    """
    try:
        with path.open('rb', buffering=0) as file:
            summed = _Summed(file, progress, md5 is not None)
            with tarfile.open(fileobj=summed, mode='r|', bufsize=BLOCK_BYTES) as tar:
                for member in _files(tar, path):
                    if not member.name.endswith('.tar'):
                        yield Entry('', member.name, member.offset_data, member.size)
                        continue
                    inner = tar.extractfile(member)
                    with tarfile.open(fileobj=inner, mode='r|', bufsize=BLOCK_BYTES) as nested:
                        for one in _files(nested, path):
                            offset = member.offset_data + one.offset_data
                            yield Entry(member.name, one.name, offset, one.size)
            while summed.read(BLOCK_BYTES):
                pass  # the padding behind the last file counts for the sum
    except (tarfile.TarError, EOFError) as error:
        raise RunError(
            f'{path} cannot be read to its end ({error}): it is no whole tar file; go on with its '
            'download, or fetch it again.'
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if md5 is not None and summed.md5.hexdigest() != md5:
        raise RunError(
            f'{path} is not the official file (its md5 is {summed.md5.hexdigest()}, not {md5}): '
            'fetch it again.'
        )


class _Summed(io.RawIOBase):
    """A file read from front to end, with its md5."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None], needed: bool):
        self._file, self._progress, self._needed, self._done = file, progress, needed, 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._done += len(block)
        if self._needed:
            self.md5.update(block)
        self._progress(self._done)
        return block


def _files(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of `tar`; whatever else could do harm or is no picture is refused."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # ty: ignore[missing-attribute] (it remembers all that it saw)
        if member.isdir():
            continue
        name = PurePosixPath(member.name)
        if name.is_absolute() or '..' in name.parts:
            raise RunError(
                f'{path} holds {member.name!a}, a name that leads out of its folder: this is '
                'not the official file.'
            )
        if not member.isreg() or member.issparse():
            raise RunError(
                f'{path} holds {member.name!a}, which is no plain file: this is not the '
                'official file.'
            )
        yield member


def read(path: Path, offset: int, size: int) -> bytes:
    """The bytes of one file of an archive, unpacked where they are gzipped (ILSVRC2010 has one).

    Raises:
        RunError: the archive cannot be read or has become shorter, or the file is larger than a
            picture can be.
    """
    if size > MOST_BYTES:
        raise RunError(f'{path} holds a file of {size:,} bytes, which can be no picture.')
    try:
        with path.open('rb', buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) != size:
        raise RunError(f'{path} has become shorter since it was looked through: fetch it again.')
    return gunzipped(content) if content[:2] == b'\x1f\x8b' else content


def read_soon(path: Path, offset: int, size: int) -> None:
    """Let the system fetch these bytes while others are worked on, where it can."""
    if not hasattr(os, 'posix_fadvise'):
        return
    with contextlib.suppress(OSError), path.open('rb', buffering=0) as file:
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def unreadable(path: Path, error: OSError) -> RunError:
    """The error for a raw file that is not there, or not to be read."""
    return RunError(f'{path} cannot be read ({error.strerror}): see to it, and run this again.')


def gunzipped(content: bytes) -> bytes:
    """A gzipped file's contents, if they are not larger than a picture can be; else as it is."""
    try:
        stream = zlib.decompressobj(wbits=31)
        plain = stream.decompress(content, MOST_BYTES)
    except zlib.error:
        return content  # whoever decodes it says what is wrong
    return plain if stream.eof else content
