"""The splits of a prepared data set, by name, and their statistics. NumPy only, no JAX.

A small split is decoded once and then read into memory. A large one stays in its files, and threads
read images on demand. Both have the same order, pixels and interface.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_jax import files
from alexnet_jax.data import prepared, statistics
from alexnet_jax.data.prepared import Description
from alexnet_jax.data.records import StoredImages, Term
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import RunError, UsageError

log = logging.getLogger(__name__)

RESIDENT_GIB = 4.0  # up to this size a decoded split is held in memory


# ---- data sets ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split as uint8 arrays; treat them as read-only."""

    name: str  # 'fashion_mnist'
    split: str  # the TFDS split expression as given: 'train[:55000]'
    images: np.ndarray | StoredImages  # uint8 [N, H, W, C], 0..255
    known_labels: np.ndarray | None  # int32 [N]; None for those in the records of `images`
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]; the first use of those in records reads all, and keeps a copy."""
        if self.known_labels is not None:
            return self.known_labels
        images = self._stored
        (labels,) = _kept(images, ['labels'], lambda: [images.read(range(len(images)), None)])
        return labels

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n], of those numbers."""
        if self.known_labels is None:
            return self._stored.take(numbers)
        return self.images[numbers], self.known_labels[numbers]

    @property
    def _stored(self) -> StoredImages:
        assert isinstance(self.images, StoredImages)
        return self.images


# ---- loading --------------------------------------------------------------------------------


def load(
    name: str,
    data_dir: str | Path,
    split: str,
    *,
    workers: int = -1,
    resident_gib: float = RESIDENT_GIB,
) -> Dataset:
    """Open the images and labels of `split`, in TFDS's order.

    The first call decodes the array_record files and keeps the result in `data_dir/decoded`. A
    part of a base split of more than `resident_gib` is not decoded: its images are read on demand.
    Pictures of different sizes are resized to 256 px by `images.decode`.

    Args:
        name: a data set in `data_dir` in TFDS's array_record format, with the features `image`
            (uint8) and `label`: 'cifar10', or with a config of TFDS 'imagenet_resized/64x64'.
        data_dir: the folder of all data sets.
        split: a split expression of TFDS: 'test', 'train[:55000]', 'train[90%:]+test'.
        workers: threads that read a large set; -1: one per core; 0: the calling thread reads.
        resident_gib: the largest decoded base split that is held in memory.

    Raises:
        UsageError: `name` or `split` is unknown, or the split is empty.
        RunError: the data set is missing or damaged; the message contains the command to run.
    """
    folder = _folder(name, Path(data_dir))
    about = prepared.describe(folder)
    lengths = {base: [n for _, n in files] for base, files in about.files.items()}
    terms = parse_split(split, lengths)
    stored = StoredImages(folder, about, terms, workers)
    largest = max(sum(lengths[base]) for base, *_ in terms)
    if largest * math.prod(about.shape) > resident_gib * 2**30:
        return Dataset(name, split, stored, None, about.words)
    # Decoding 60,000 PNGs takes 10 s, reading the copy 0.1 s; sweeps start many runs.
    arrays = _kept(stored, ('images', 'labels'), lambda: stored.take(np.arange(len(stored))))
    return Dataset(name, split, *arrays, about.words)


def _kept(
    images: StoredImages, names: Sequence[str], compute: Callable[[], Iterable[np.ndarray]]
) -> Iterable[np.ndarray]:
    """Return arrays that `compute` derives from images; they are kept in `data_dir/decoded`.

    The name of the file there changes with the record files.
    """
    stats = [path.stat() for path, _, _ in images.segments]
    about = [images.terms, images.shape[1:], [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    *_, name, version = images.folder.parts
    path = images.folder.parents[1] / 'decoded' / f'{name}-{version}-{digest}.{names[0]}.npz'
    with contextlib.suppress(RunError):  # not computed yet, or damaged
        return files.read_npz(path, names).values()
    found = dict(zip(names, compute(), strict=True))
    try:
        path.parent.mkdir(exist_ok=True)
        with files.atomic_write(path) as scratch, scratch.open('wb') as file:
            np.savez(file, allow_pickle=False, **found)
    except OSError as error:
        log.warning('%s: cannot be stored (%s); the next start is slow again', path, error)
    return found.values()


def parse_split(split: str, shard_lengths: dict[str, list[int]]) -> list[Term]:
    """Resolve a TFDS split expression into a term for each part of its sum.

    `shard_lengths` is {base split: number of examples in each of its files}.

    Raises:
        UsageError: the syntax, the base split or the bounds are wrong, or no example is left.
    """
    sizes = {name: sum(lengths) for name, lengths in shard_lengths.items()}
    if split in sizes:
        return [(split, 0, sizes[split])]
    import tensorflow_datasets as tfds  # 0.3 s and 30 MiB, which most runs avoid

    infos = [
        tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=0)
        for name, lengths in shard_lengths.items()
    ]
    try:
        read = tfds.core.ReadInstruction.from_spec(split)
        terms = [
            (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
            for part in read.to_absolute(tfds.core.SplitDict(infos))
        ]
        reason = f"Split '{split}' selects no image in one of its parts"
    except ValueError as error:
        terms, reason = [], str(error).splitlines()[0].partition('. Should be')[0].rstrip('.')
    if not terms or any(start >= stop for _, start, stop in terms):
        raise UsageError(
            f"{reason}: choose from {', '.join(sizes)}, or a part such as 'train[:90%]'."
        )
    return terms


def _folder(name: str, data_dir: Path) -> Path:
    """Return the folder of a data set: the one prepared here, else the newest version."""
    infos = (data_dir / name).glob('*/dataset_info.json')
    versions = [path.parent for path in infos if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)]

    def rank(path: Path) -> tuple[bool, list[int]]:
        ours = (path / prepared.PREPARATION).exists()  # images of one size: quick to read
        return ours, [int(part) for part in path.name.split('.')]

    if versions:
        return max(versions, key=rank)
    infos = data_dir.glob('*/*/dataset_info.json')
    found = ', '.join(sorted({path.parts[-3] for path in infos})) or 'none'
    problem, wanted = f"there is no data set '{name}' in {data_dir}", name
    if name == 'none':  # the default of the config of one's own pictures
        problem, wanted = 'data.name is not set', 'NAME'
    known = name in (*prepared.FETCHED, *prepared.OFFICIAL)
    tfds = '' if known else ' (a data set of TFDS: `tfds build`, see docs/data.md)'
    error = RunError if known else UsageError
    raise error(
        f'{problem} (found: {found}): set data.name to another, or data.data_dir (--data_dir) to '
        f'where it is, or run `{prepared.command(wanted, data_dir)}`{tfds}.'
    )


def describe(name: str, data_dir: str | Path) -> Description:
    """Return the description of a data set; it raises as `load` does."""
    return prepared.describe(_folder(name, Path(data_dir)))


# ---- statistics -----------------------------------------------------------------------------


def statistics_of(dataset: Dataset) -> Statistics:
    """Return the statistics of a data set's images.

    Those of a large one are computed only if neither preparation nor an earlier run has done so.
    """
    images = dataset.images
    if isinstance(images, np.ndarray):
        return statistics.of_images(images)
    with contextlib.suppress(RunError):  # missing, damaged or of an earlier version
        beside = images.folder / 'statistics.npz'
        *arrays, count = files.read_npz(beside, (*statistics.NAMES, 'count_decoded')).values()
        if images.terms == [('train', 0, int(count))]:
            return Statistics(*arrays)

    def compute() -> Iterable[np.ndarray]:
        log.warning('%s: computing the mean image of %s images', images.folder, f'{len(images):,}')
        return vars(statistics.of_images(images)).values()

    return Statistics(*_kept(images, statistics.NAMES, compute))
