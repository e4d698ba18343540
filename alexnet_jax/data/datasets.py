"""The splits of a prepared data set, by name, and their statistics. NumPy only, no JAX.

A small split is decoded once and mapped into memory. A large one stays in its files, and threads
read images on demand. Both have the same order, pixels and interface.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_jax import files
from alexnet_jax.data import prepared
from alexnet_jax.data import statistics as image_statistics
from alexnet_jax.data.prefetch import prefetch
from alexnet_jax.data.prepared import Description
from alexnet_jax.data.records import StoredImages, Term
from alexnet_jax.data.statistics import Statistics, Sums
from alexnet_jax.errors import RunError, UsageError

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**26  # of images read into memory at once
RESIDENT_GIB = 4.0  # up to this size a decoded split is kept beside the data and mapped into memory


# ---- data sets ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split as uint8 arrays, memory-mapped where possible; treat them as read-only."""

    name: str  # 'fashion_mnist'
    split: str  # the TFDS split expression as given: 'train[:55000]'
    images: np.ndarray | StoredImages  # uint8 [N, H, W, C], 0..255
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n], of those numbers."""
        return self.images[numbers], self.labels[numbers]


class LargeDataset(Dataset):
    """A split that stays in its array_record files; its labels come with the images."""

    images: StoredImages

    def __init__(self, name: str, split: str, images: StoredImages, names: tuple[str, ...]):
        vars(self).update(name=name, split=split, images=images, class_names=names)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Return all labels, int32 [N]; the first use reads all records, and keeps a copy."""
        path = self._kept('labels.npy')
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):  # missing or damaged
            labels = self.images.read(range(len(self)), None)
            _keep(path, 'the labels', lambda scratch: _save(scratch, labels))
            return labels

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n], of those numbers."""
        return self.images.take(numbers)

    def statistics(self) -> Statistics:
        """Return the statistics of all images; computes them unless preparation or a run has."""
        folder, path = self.images.folder, self._kept('statistics.npz')
        beside = image_statistics.load(folder / 'statistics.npz')
        if beside and self.images.terms == [('train', 0, beside[1])]:
            return beside[0]
        if kept := image_statistics.load(path):
            return kept[0]
        log.warning('%s: computing the mean image of %s images', folder, f'{len(self):,}')
        found = statistics(self.images)
        _keep(path, 'the statistics', lambda path: image_statistics.save(path, found, len(self)))
        return found

    def _kept(self, ending: str) -> Path:
        """Return the path of a copy of what depends on the records; the name changes with them."""
        images, folder = self.images, self.images.folder
        stats = [path.stat() for path, _, _ in images.segments]
        stamps = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        about = json.dumps([images.terms, images.shape[1:], stamps])
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        return _copies(folder) / f'{folder.parent.name}-{folder.name}-{digest}.{ending}'


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

    The first call decodes the array_record files and keeps the result in `data_dir/decoded`; later
    calls map that copy into memory, after comparing the sha256 of it and of the files it came from.
    A base split of more than `resident_gib` is not decoded: its images are read on demand. Pictures
    of different sizes are resized to 256 px by `images.decode`.

    Args:
        name: a data set in `data_dir` in TFDS's array_record format, with the features `image`
            (uint8) and `label`.
        data_dir: the folder of all data sets.
        split: a split expression of TFDS: 'test', 'train[:55000]', 'train[90%:]+test'.
        workers: threads that read a large set; -1: one per core; 0: the calling thread reads.
        resident_gib: the largest decoded base split that is kept in memory.

    Raises:
        UsageError: `name` or `split` is unknown, or the split is empty.
        RunError: the data set is missing or damaged; the message contains the command to run.
    """
    folder = _folder(name, Path(data_dir))
    about = prepared.describe(folder)
    lengths = {base: [n for _, n in files] for base, files in about.files.items()}
    terms, names = parse_split(split, lengths), about.words
    sizes = {base: sum(counts) for base, counts in lengths.items()}
    if max(sizes[base] for base, *_ in terms) * math.prod(about.shape) > resident_gib * 2**30:
        return LargeDataset(name, split, StoredImages(folder, about, terms, workers), names)
    parts = []
    for base, start, stop in terms:
        images, labels = _decoded(folder, about, base, workers)
        parts.append((images[start:stop], labels[start:stop]))
    if len(parts) == 1:
        return Dataset(name, split, *parts[0], names)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Dataset(name, split, images, labels, names)


def parse_split(split: str, shard_lengths: dict[str, list[int]]) -> list[Term]:
    """Resolve a TFDS split expression.

    Args:
        split: see `load`.
        shard_lengths: {base split: number of examples in each of its files}.

    Returns:
        A term for each part of the sum.

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
    infos = list(data_dir.glob('*/*/dataset_info.json'))
    versions = [
        path.parent
        for path in infos
        if path.parts[-3] == name and re.fullmatch(r'\d+\.\d+\.\d+', path.parts[-2])
    ]

    def rank(path: Path) -> tuple[bool, list[int]]:
        ours = (path / prepared.PREPARATION).exists()  # images of one size: quick to read
        return ours, [int(part) for part in path.name.split('.')]

    if versions:
        return max(versions, key=rank)
    found = ', '.join(sorted({path.parts[-3] for path in infos})) or 'none'
    problem, wanted = f"there is no data set '{name}' in {data_dir}", name
    if name == 'none':  # the default of the config of one's own pictures
        problem, wanted = 'data.name is not set', 'NAME'
    error = RunError if name in (*prepared.FETCHED, *prepared.OFFICIAL) else UsageError
    raise error(
        f'{problem} (found: {found}): set data.name to another, or run '
        f'`{prepared.command(wanted, data_dir)}`.'
    )


def class_names(name: str, data_dir: str | Path, *, words: bool = True) -> tuple[str, ...]:
    """Return the class names of a data set, by label.

    They are its words if it has them ('tabby, tabby cat') and `words` is true, else TFDS's names
    (for ImageNet the WordNet ids), else '0', '1', ... To words that two classes share ('crane') the
    name is appended.

    Raises:
        UsageError, RunError: as `load`.
    """
    about = prepared.describe(_folder(name, Path(data_dir)))
    return about.words if words else about.class_names


def facts(name: str, data_dir: str | Path) -> tuple[int, int, tuple[str, ...]]:
    """Return the number of classes, the channels of an image and the splits of a data set.

    Raises:
        UsageError, RunError: as `load`.
    """
    about = prepared.describe(_folder(name, Path(data_dir)))
    return len(about.class_names), about.shape[2], tuple(about.files)


# ---- the decoded copy -----------------------------------------------------------------------
# Decoding 60,000 PNGs takes seconds, checking and mapping the copy 0.1 s; sweeps start many runs.


def _copies(folder: Path) -> Path:
    """Return the folder of what is derived from the data sets beside `folder`."""
    return folder.parent.parent / 'decoded'


def _decoded(
    folder: Path, about: Description, split: str, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [N, H, W, C], and labels, int32 [N], of a base split, decoded once."""
    stem = f'{folder.parent.name}-{folder.name}-{split}'
    kept = [_copies(folder) / f'{stem}.{part}.npy' for part in ('images', 'labels')]
    sums = _copies(folder) / f'{stem}.json'
    source = [_sha256(path) for path, _ in about.files[split]]
    with contextlib.suppress(OSError, ValueError):
        if json.loads(sums.read_text()) == [source, [_sha256(path) for path in kept]]:
            images, labels = (np.load(path, mmap_mode='r').view(np.ndarray) for path in kept)
            return images, labels
    count = sum(n for _, n in about.files[split])
    arrays = StoredImages(folder, about, [(split, 0, count)], workers).take(np.arange(count))

    def write(scratch: Path) -> None:
        for path, array in zip(kept, arrays, strict=True):
            with files.atomic_write(path) as beside:
                _save(beside, array)
        scratch.write_text(json.dumps([source, [_sha256(path) for path in kept]]))

    _keep(sums, f'a decoded copy of {stem}', write)
    return arrays


def _keep(path: Path, what: str, write: Callable[[Path], None]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with files.atomic_write(path) as scratch:
            write(scratch)
    except OSError as error:
        log.warning('%s: cannot store %s (%s); the next start is slow again', path, what, error)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open('wb') as file:  # np.save adds an ending to a path
        np.save(file, array)


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def shortage(dataset: Dataset, wanted: float) -> str | None:
    """Estimate, in a sentence, the cores that read `wanted` images/s; None for a small set."""
    if not isinstance(dataset, LargeDataset):
        return None
    count, rate = max(dataset.images.workers, 1), dataset.images.rate
    return (
        f'{count} reader(s) read {rate:,.0f} images/s each, but the training step consumes '
        f'{wanted:,.0f}/s: {math.ceil(wanted / rate)} cores that do nothing else would be enough '
        '(data.workers)'
    )


# ---- statistics -----------------------------------------------------------------------------


def statistics_of(dataset: Dataset) -> Statistics:
    """Return the statistics of a data set's images; kept ones of a large set are reused."""
    if isinstance(dataset, LargeDataset):
        return dataset.statistics()
    return statistics(dataset.images)


def statistics(images: np.ndarray | StoredImages) -> Statistics:
    """Compute mean image and colours of uint8 images [N, H, W, C], chunk by chunk; see `Sums`."""
    sums = Sums(images.shape[1:])
    chunk = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    parts = prefetch(lambda i: images[i * chunk : (i + 1) * chunk], 0, -(-len(images) // chunk))
    for part in parts:
        sums.add(part)
    return sums.result()
