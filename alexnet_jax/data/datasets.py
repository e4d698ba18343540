"""The splits of a prepared data set, by name, and their statistics. NumPy only, no JAX.

A small split is decoded once and mapped into memory. A large one stays in its files, and threads
read the images that are asked for. Both have the same order, pixels and interface.
"""

import collections
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
from typing import Any

import numpy as np

from alexnet_jax import files
from alexnet_jax.data import prepared
from alexnet_jax.data import statistics as image_statistics
from alexnet_jax.data.readers import Readers, prefetch, readers
from alexnet_jax.data.records import Segment, Source, form_of
from alexnet_jax.data.statistics import Statistics, Sums
from alexnet_jax.errors import RunError, UsageError

Term = tuple[str, int, int]  # (base split, first example, one past the last)
log = logging.getLogger(__name__)

CHUNK_BYTES = 2**26  # of images read into memory at once
RESIDENT_GIB = 4.0  # up to this size a decoded split is kept beside the data and mapped into memory


# ---- data sets ------------------------------------------------------------------------------


class StoredImages:
    """Images in their files, uint8 [N, H, W, C]; indexed along N as an array is."""

    def __init__(self, source: Source, readers: Readers, terms: list[Term]):
        """`terms`: the split that `source` reads, see `parse_split`."""
        self.source, self.readers, self.terms = source, readers, terms

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self.source), *self.source.shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any, /) -> np.ndarray:
        if isinstance(key, tuple):
            raise IndexError('a data set in its files is indexed by images only')
        numbers = np.arange(len(self))[key]
        images, _ = self.take(numbers.reshape(-1))
        return images.reshape(*numbers.shape, *self.shape[1:])

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise UsageError('this data set is too large for memory: take a slice of its images.')

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n], of those numbers.

        Raises:
            RunError: a record is damaged.
            OSError: the system cannot open a file, which may be intact.
        """
        return self.readers.take(self.source, numbers)

    def labels(self) -> np.ndarray:
        """Return all labels, int32 [N]; reads all records unless a copy is kept.

        Raises:
            RunError, OSError: as `take`.
        """
        path = self._kept('labels.npy')
        with contextlib.suppress(OSError, ValueError, EOFError):
            labels = np.load(path)
            if labels.shape == (len(self),) and labels.dtype == np.int32:
                return labels
        labels = self.source.read(range(len(self)), None)
        _keep(path, 'the labels', lambda scratch: _save(scratch, labels))
        return labels

    def statistics(self) -> Statistics:
        """Return the statistics of all images; computes them unless preparation or a run has."""
        folder = self.source.folder
        everything = ('train', 0, prepared.shards(folder).get('train', (0,))[0])
        kept = self._kept('statistics.npz')
        beside = [folder / 'statistics.npz'] if self.terms == [everything] else []
        for path in (*beside, kept):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found, count = image_statistics.load(path)
                if count == len(self) and found.mean_image.shape == self.shape[1:]:
                    return found
        log.warning('%s: mean image and colours of %s images', folder, f'{len(self):,}')
        found = statistics(self)
        _keep(kept, 'the statistics', lambda path: image_statistics.save(path, found, len(self)))
        return found

    def _kept(self, ending: str) -> Path:
        """Return where to keep what depends on the records; the name changes with them."""
        stamps = [segment.stamp for segment in self.source.segments]
        about = [self.terms, self.source.shape, stamps]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        folder = self.source.folder
        copies = folder.parent.parent / 'decoded'
        return copies / f'{folder.parent.name}-{folder.name}-{digest}.{ending}'


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
    """A split that stays in its array_record files; its labels come with the images.

    The first use of `labels` reads all records, and keeps them beside the decoded copies.
    """

    images: StoredImages

    def __init__(self, name: str, split: str, images: StoredImages, names: tuple[str, ...]):
        vars(self).update(name=name, split=split, images=images, class_names=names)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Return all labels, int32 [N]."""
        return self.images.labels()

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n], of those numbers."""
        return self.images.take(numbers)


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
    A base split of more than `resident_gib` is not decoded: its images are read when they are asked
    for. Images of different sizes are brought to 256 px as `images.picture` does.

    Args:
        name: a data set in `data_dir` in TFDS's array_record format, with the features `image`
            (uint8) and `label`.
        data_dir: the folder of all data sets.
        split: a split expression of TFDS: 'test', 'train[:55000]', 'train[90%:]+test'.
        workers: threads that read a large set; -1: one a core; 0: the calling thread reads.
        resident_gib: the limit between small and large, of a whole base split, decoded.

    Raises:
        UsageError: `name` or `split` is unknown, or the split is empty.
        RunError: the data set is missing or damaged; the message has the command that prepares it.
    """
    folder = _folder(name, Path(data_dir))
    splits = prepared.shards(folder)  # checks the description too
    terms, names = parse_split(split, _shard_lengths(folder)), class_names(name, data_dir)
    shape, _ = form_of(folder)
    if max(splits[base][0] for base, *_ in terms) * math.prod(shape) > resident_gib * 2**30:
        images = StoredImages(_source(folder, terms), readers(workers), terms)
        return LargeDataset(name, split, images, names)
    parts = []
    for base, start, stop in terms:
        images, labels = _decoded(folder, base, *splits[base], workers)
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
    import tensorflow_datasets as tfds  # 0.3 s and 30 MiB, which most large runs need not

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
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip('.')
        raise UsageError(
            f"{reason}. There are {', '.join(sizes)}; parts are written like 'train[:90%]'."
        ) from None
    for base, start, stop in terms:
        if start >= stop:
            raise UsageError(f"Split '{split}' asks for no image of {base}'s {sizes[base]:,}.")
    return terms


def _folder(name: str, data_dir: Path) -> Path:
    """Return the folder of a data set: one prepared here if there is, else the newest version."""
    infos = list(data_dir.glob('*/*/dataset_info.json'))
    versions = [
        path.parent
        for path in infos
        if path.parts[-3] == name and re.fullmatch(r'\d+\.\d+\.\d+', path.parts[-2])
    ]

    def rank(path: Path) -> tuple[bool, list[int]]:
        ours = (path / 'preparation.json').exists()  # images of one size: quick to read
        return ours, [int(part) for part in path.name.split('.')]

    if versions:
        return max(versions, key=rank)
    if name in (*prepared.FETCHED, *prepared.OFFICIAL):
        why = ', and its official files need a registration' if name in prepared.OFFICIAL else ''
        raise RunError(
            f'Data set {name} is not in {data_dir}{why}: run `{prepared.command(name, data_dir)}`.'
        )
    known = ', '.join(sorted({*(path.parts[-3] for path in infos), *prepared.FETCHED}))
    raise UsageError(f"There is no data set '{name}' in {data_dir}: choose from {known}.")


def class_names(name: str, data_dir: str | Path, *, words: bool = True) -> tuple[str, ...]:
    """Return the class names of a data set: words if it has them ('tabby, tabby cat'), else TFDS's.

    Without `words` always TFDS's, for ImageNet the WordNet ids. They are '0', '1', ... if the
    labels have none. Classes with the same words ('crane') get their TFDS name appended.

    Raises:
        UsageError, RunError: as `load`.
    """
    folder = _folder(name, Path(data_dir))
    try:
        names = called = _names(folder)
        if words and (folder / 'label.words.txt').is_file():
            called = (folder / 'label.words.txt').read_text(encoding='utf-8').splitlines()
        if len(called) != len(names):
            raise ValueError(f'{len(called)} words for {len(names)} classes')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise prepared.damaged(folder, f'the description of its labels: {error}') from None
    often = collections.Counter(called)
    return tuple(
        word if often[word] == 1 else f'{word} ({name})'
        for word, name in zip(called, names, strict=True)
    )


def facts(name: str, data_dir: str | Path) -> tuple[int, int, tuple[str, ...]]:
    """Return the number of classes, the channels of an image and the splits of a data set.

    Raises:
        UsageError, RunError: as `load`.
    """
    if name == 'none':
        raise UsageError(
            'data.name is not set: prepare your pictures with `python -m alexnet_jax prepare '
            'folder --source=FOLDER --name=NAME`, and set --config.data.name=NAME.'
        )
    folder = _folder(name, Path(data_dir))
    (*_, channels), _ = form_of(folder)
    return len(class_names(name, data_dir)), channels, tuple(prepared.shards(folder))


def _names(folder: Path) -> list[str]:
    names = folder / 'label.labels.txt'
    if names.is_file():
        return names.read_text(encoding='utf-8').splitlines()
    features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
    return list(map(str, range(int(features['label']['classLabel']['numClasses']))))


def _source(folder: Path, terms: list[Term]) -> Source:
    """Return the records of a split's terms, file by file."""
    segments, splits, lengths = [], prepared.shards(folder), _shard_lengths(folder)
    for base, start, stop in terms:
        first = 0
        for path, count in zip(splits[base][1], lengths[base], strict=True):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                segments.append(Segment.of(path, low - first, high - low))
            first += count
    return Source(folder, tuple(segments), *form_of(folder))


def _shard_lengths(folder: Path) -> dict[str, list[int]]:
    info = json.loads((folder / 'dataset_info.json').read_text())
    return {s['name']: [int(n) for n in s['shardLengths']] for s in info['splits']}


# ---- the decoded copy -----------------------------------------------------------------------
# Decoding 60,000 PNGs takes seconds, checking and mapping the copy 0.1 s; sweeps start many runs.


def _decoded(
    folder: Path, split: str, count: int, paths: list[Path], workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [N, H, W, C], and labels, int32 [N], of a base split, decoded once."""
    copies = folder.parent.parent / 'decoded'
    stem = f'{folder.parent.name}-{folder.name}-{split}'
    kept = [copies / f'{stem}.{part}.npy' for part in ('images', 'labels')]
    sums = copies / f'{stem}.json'
    source = [_sha256(path) for path in paths]
    with contextlib.suppress(OSError, ValueError):
        if json.loads(sums.read_text()) == [source, [_sha256(path) for path in kept]]:
            images, labels = (np.load(path, mmap_mode='r').view(np.ndarray) for path in kept)
            return images, labels
    arrays = _decode(folder, split, count, workers)

    def write(scratch: Path) -> None:
        for path, array in zip(kept, arrays, strict=True):
            with files.atomic_write(path) as beside:
                _save(beside, array)
        scratch.write_text(json.dumps([source, [_sha256(path) for path in kept]]))

    _keep(sums, f'a decoded copy of {stem}', write)
    return arrays


def _decode(folder: Path, split: str, count: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode every example of a base split."""
    terms = [(split, 0, count)]
    source = _source(folder, terms)
    stored = StoredImages(source, readers(workers), terms)
    images, labels = np.empty((count, *source.shape), np.uint8), np.empty(count, np.int32)
    for start in range(0, count, 1000):
        part = slice(start, min(start + 1000, count))
        images[part], labels[part] = stored.take(np.arange(start, part.stop))
    return images, labels


def _keep(path: Path, what: str, write: Callable[[Path], None]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with files.atomic_write(path) as scratch:
            write(scratch)
    except OSError as error:
        log.warning('%s cannot keep %s (%s): starts stay slow', path.parent, what, error)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open('wb') as file:  # np.save adds an ending to a path
        np.save(file, array)


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def shortage(dataset: Dataset, wanted: float) -> str | None:
    """Return how many cores would read `wanted` images/s, as a sentence; None for a small set."""
    if not isinstance(dataset, LargeDataset):
        return None
    at_work = dataset.images.readers
    count, enough = max(at_work.count, 1), math.ceil(wanted / at_work.rate)
    what = (
        f'{enough} cores would do (data.workers)'
        if enough > count
        else 'they are enough if nothing else is at work on their cores'
    )
    return (
        f'{count} reader(s) read {at_work.rate:,.0f} images/s each, and the step takes '
        f'{wanted:,.0f}/s: {what}'
    )


# ---- statistics -----------------------------------------------------------------------------


def statistics_of(dataset: Dataset) -> Statistics:
    """Return the statistics of a data set's images; kept ones of a large set are reused."""
    if isinstance(dataset, LargeDataset):
        return dataset.images.statistics()
    return statistics(dataset.images)


def statistics(images: np.ndarray | StoredImages) -> Statistics:
    """Compute mean image and colours of uint8 images [N, H, W, C], chunk by chunk; see `Sums`."""
    sums = Sums(images.shape[1:])
    chunk = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    parts = prefetch(lambda i: images[i * chunk : (i + 1) * chunk], 0, -(-len(images) // chunk))
    for part in parts:
        sums.add(part)
    return sums.result()
