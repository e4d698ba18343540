"""A file is whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path) -> Generator[Path]:
    """A scratch file beside `path`, which takes its place when the block has ended well.

    Whatever ends the block otherwise, nothing is left, and what lay at `path` lies there still.

    Raises:
        OSError: it cannot be written; the caller knows which flag to name.
    """
    path = Path(path)
    # Hidden, so that no glob takes it for the real one after a power cut; not `.tmp` alone, as two
    # processes may write the same file.
    handle, scratch = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
    os.close(handle)
    try:
        yield Path(scratch)
        os.chmod(scratch, 0o666 & ~_umask())  # mkstemp's 0600 would hide it from others
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
