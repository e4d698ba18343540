"""Find image files that the user names, and read them in the stored form of a data set."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alexnet_jax import command
from alexnet_jax.data import images as image_io
from alexnet_jax.data.batches import prefetch
from alexnet_jax.errors import RunError


def find(words: Sequence[str]) -> list[Path]:
    """Return the files that words name: files, folders (all files in them, sorted), globs.

    Each file is returned once. Names in a folder that begin with a dot are skipped. A path that
    does not exist is also returned, so that reading it reports the error.
    """
    found: dict[Path, None] = {}
    for word in words:
        paths = [Path(word)]
        if glob.has_magic(word) and not paths[0].exists():
            paths = sorted(map(Path, glob.glob(word, recursive=True))) or paths
        for path in paths:
            found |= dict.fromkeys(_files_in(path) or [path])
    return list(found)


def _files_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob('*')
        if path.is_file()
        and not any(part.startswith('.') for part in path.relative_to(folder).parts)
    )


def read(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image file in the stored form of a data set: uint8, of `shape` (H, W, C).

    Of an animation or a file with several pages, the first is read.

    Raises:
        RunError: it does not exist, or is not an image.
    """
    try:
        return image_io.decode(path.read_bytes(), shape)
    except OSError as error:
        reason = f'cannot be read as an image: {error.strerror}'
    except image_io.BadImage as error:
        reason = str(error)
    raise RunError(f'{command.shown(path)} {reason}.')


def read_ahead(
    paths: Sequence[Path], shape: tuple[int, int, int], block: int, faults: list[str]
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Read all images among `paths`, up to `block` at a time; a thread reads the next ones.

    Yields:
        Their paths, and uint8 [b, H, W, C]. Each file that is not an image is reported in one
        sentence, which is also appended to `faults`.
    """

    def one_block(number: int) -> dict[Path, np.ndarray]:
        found = {}
        for path in paths[number * block : (number + 1) * block]:
            try:
                found[path] = read(path, shape)
            except RunError as error:
                command.log(str(error))
                faults.append(str(error))
        return found

    for found in prefetch(one_block, 0, -(-len(paths) // block), depth=1):
        if found:
            yield list(found), np.stack(list(found.values()))
