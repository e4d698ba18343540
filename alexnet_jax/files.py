"""Write a file completely or not at all; read an .npz file from anywhere."""

import contextlib
import errno
import os
import tempfile
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from alexnet_jax.errors import RunError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Generator[Path]:
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


def check_writable(path: str | Path, flag: str = '--output') -> None:
    """Check that a file can be written at `path`, before the work whose result it will hold.

    Raises:
        RunError: its folder does not exist or cannot be written to, or `path` is a folder.
    """
    path = Path(path)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except OSError as error:
        raise RunError(
            f'{path} cannot be written ({error.strerror}); choose another {flag}.'
        ) from error


def read_npz(path: Path, names: Sequence[str], advice: str) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file, which may come from anywhere: nothing is unpickled.

    Raises:
        RunError: the file does not exist, is damaged or lacks an array; ends with `advice`.
    """
    try:
        with path.open('rb') as file:
            if not zipfile.is_zipfile(file):
                raise ValueError('it is no .npz file, or cut off')
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise RunError(f'{path.parent} holds no {path.name}: {advice}.') from None
    except OSError as error:
        raise RunError(f'{path} cannot be read ({error.strerror or error}): {advice}.') from error
    except Exception as error:  # zipfile and NumPy raise whatever damaged bytes lead them to
        raise RunError(f'{path} is damaged ({error}): {advice}.') from error
