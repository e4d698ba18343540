"""Write files atomically; read .npz files safely."""

import contextlib
import os
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np

from alexnet_jax.errors import RunError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Generator[Path]:
    """Give a scratch file beside `path`, which replaces `path` when the block ends well.

    If the block fails, the scratch file is removed and the old file is unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    # A hidden file, which no glob finds after a power cut. The name is unique, since two processes
    # may write the same file.
    scratch = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
    try:
        scratch.touch()
        yield scratch
        sync(scratch)
        scratch.replace(path)
    except OSError as error:
        if error.filename in (None, str(scratch)):
            error.filename = str(path)  # for its message
        raise
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def sync(path: Path) -> None:
    """Flush a file to the disk, so that a power cut cannot leave an empty one under its name."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Check that a file can be written at `path`, before work that may take minutes.

    Raises:
        OSError: its folder does not exist or cannot be written to, or `path` is a folder.
    """
    new = not path.exists()
    path.open('ab').close()
    if new:
        path.unlink()


def read_npz(
    path: Path, names: Iterable[str] = (), advice: str = 'download it again'
) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file of any origin, or all; nothing is unpickled.

    Raises:
        RunError: the file does not exist, is damaged or lacks an array; ends with `advice`.
    """
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except FileNotFoundError:
        raise RunError(f'{path.parent} has no {path.name}: {advice}.') from None
    except Exception as error:  # damage raises various exceptions of zipfile and NumPy
        raise RunError(f'{path} is damaged or unreadable ({error}): {advice}.') from error
