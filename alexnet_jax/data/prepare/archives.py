"""Files in tar archives and folders: listed in one pass, then read by file, offset and size.

Nothing is unpacked to disk. An archive's md5 is computed while it is listed, so a hard disk reads
ImageNet's 138 GB once, from front to end.
"""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, NoReturn

from alexnet_jax.errors import RunError

BLOCK_BYTES = 2**20
MOST_BYTES = 2**28  # of one encoded picture: ImageNet's largest has a twentieth of it
# What file systems, desktops and tools leave in folders, besides hidden files; in lower case.
LEFTOVERS = frozenset((
    '$recycle.bin', 'system volume information', 'thumbs.db', 'ehthumbs.db', 'desktop.ini',
    '__macosx', 'network trash folder', 'temporary items', 'icon\r', 'lost+found', '@eadir',
    '#recycle', '#snapshot', '@recycle', '@recently-snapshot', '@tmp', '__pycache__',
))  # fmt: skip


class Entry(NamedTuple):
    """The bytes of a file that an archive or a folder holds."""

    parent: str  # name of the folder or of the inner tar file it is in, '' for none
    name: str  # without any folder
    path: Path  # of the file on disk
    offset: int
    size: int
    stamp: int = 0  # changes when a file in a folder does


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or one that systems leave behind."""
    return name.startswith('.') or name.lower() in LEFTOVERS


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Yield every file below `folder`, links followed, leftovers of systems passed over.

    Raises:
        RunError: a folder or file cannot be read.
    """
    for place, inside, names in os.walk(folder, onerror=_refuse, followlinks=True):
        inside[:] = sorted(name for name in inside if not is_leftover(name))
        parent = '' if Path(place) == folder else os.path.basename(place)
        for name in sorted(name for name in names if not is_leftover(name)):
            path = Path(place, name)
            about = status(path)
            yield Entry(parent, name, path, 0, about.st_size, about.st_mtime_ns)


def tar_entries(
    path: Path, md5: str | None = None, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Entry]:
    """Yield every plain file of a tar file, and of the tar files in it, in their order.

    Args:
        path: of an uncompressed tar file.
        md5: of the tar file, compared when all has been read.
        progress: called with the bytes read so far.

    Raises:
        RunError: it cannot be read, ends too early, or has another md5.
    """
    try:
        with path.open('rb', buffering=0) as file:
            summed = _Summed(file, progress, md5 is not None)
            with tarfile.open(fileobj=summed, mode='r|', bufsize=BLOCK_BYTES) as tar:
                for one in _files(tar):
                    if not one.name.endswith('.tar'):
                        yield _entry(path, one, str(PurePosixPath(one.name).parent.name))
                        continue
                    inner = tar.extractfile(one)
                    with tarfile.open(fileobj=inner, mode='r|', bufsize=BLOCK_BYTES) as nested:
                        for file_in_it in _files(nested):
                            yield _entry(path, file_in_it, one.name[:-4], one.offset_data)
            while summed.read(BLOCK_BYTES):
                pass  # the padding behind the last file counts for the md5
    except (tarfile.TarError, EOFError) as error:
        raise RunError(
            f'{path} cannot be read to its end ({error}): it is not a complete tar file; resume '
            'its download, or repeat it.'
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if md5 is not None and summed.md5.hexdigest() != md5:
        raise RunError(
            f'{path} is not the official file (its md5 is {summed.md5.hexdigest()}, not {md5}): '
            'download it again.'
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


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # ty: ignore[missing-attribute] (else it keeps all of them)
        if member.isreg() and not member.issparse():
            yield member


def _entry(path: Path, member: tarfile.TarInfo, parent: str, start: int = 0) -> Entry:
    name = PurePosixPath(member.name).name
    return Entry(parent, name, path, start + member.offset_data, member.size)


def read(path: Path, offset: int, size: int) -> bytes:
    """Return the bytes of one file, unpacked where they are gzipped (ILSVRC-2010 has one).

    Raises:
        RunError: the file cannot be read, or has become shorter.
    """
    try:
        with path.open('rb', buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) != size:
        raise RunError(f'{path} has changed since it was listed: run the same command again.')
    return gunzipped(content) if content[:2] == b'\x1f\x8b' else content


def gunzipped(content: bytes) -> bytes:
    """Return a gzipped file's contents up to MOST_BYTES, or `content` where that fails."""
    try:
        stream = zlib.decompressobj(wbits=31)
        plain = stream.decompress(content, MOST_BYTES)
    except zlib.error:
        return content  # the decoder reports what is wrong
    return plain if stream.eof else content


def status(path: Path) -> os.stat_result:
    """Return `path.stat()`.

    Raises:
        RunError: the file is not there, or cannot be read.
    """
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> RunError:
    """Return the error for a source file or folder that is missing or cannot be read."""
    return RunError(
        f'{path} cannot be read ({error.strerror}): mend or remove it, and run this again.'
    )


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from None
