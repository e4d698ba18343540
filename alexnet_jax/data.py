"""A batch as a function of (seed, step): data sets, permutations, prefetch, statistics.

NumPy only: a process that makes batches never needs JAX. Which images a step sees depends on the
seed and the step alone, not on what ran before or on how many processes share the work. A small
data set is decoded once and mapped into memory; a large one stays in its files, and reader
processes gather each batch from there. Both have the same order and the same interface.
"""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from alexnet_jax import files, prepare, prepared
from alexnet_jax import statistics as statistics_room
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.readers import Readers, readers
from alexnet_jax.statistics import Statistics, Sums
from alexnet_jax.stored import Segment, Source, Unreadable, form_of

T = TypeVar('T')
Batch = dict[str, np.ndarray]
log = logging.getLogger(__name__)

CHUNK_BYTES = 2**26  # of images taken into memory at once
RESIDENT_GIB = 4.0  # up to which a decoded split is kept beside the data and mapped into memory


class Images(Protocol):
    """uint8 [N, H, W, C], 0..255, to be indexed by a number, a slice or an array of numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split held as uint8, memory-mapped where it can be; treat the arrays as read-only."""

    name: str  # 'fashion_mnist'
    split: str  # the TFDS split expression as given: 'train[:55000]'
    images: Images
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [n, H, W, C], labels int32 [n]) of those numbers."""
        return self.images[numbers], self.labels[numbers]


class LargeDataset(Dataset):
    """A split that stays in its array_record files, and is read by other processes.

    Its labels come with the images; `labels` reads through all records at the first use, and keeps
    them beside the decoded copies.
    """

    images: 'StoredImages'

    def __init__(self, name: str, split: str, images: 'StoredImages', names: tuple[str, ...]):
        vars(self).update(name=name, split=split, images=images, class_names=names)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return self.images.labels()

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [n, H, W, C], labels int32 [n]) of those numbers."""
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
    """The images and labels of `split`, in TFDS's order.

    The first call decodes the array_record files and keeps the result in `data_dir/decoded`; later
    calls map that copy into memory, after comparing the sha256 of it and of the files it came from.
    A base split of more than `resident_gib` is not decoded: its images are read when they are asked
    for. Images of different sizes are brought to 256 px as `pictures.picture` does.

    Args:
        name: a data set that lies in `data_dir` in TFDS's array_record format, with the features
            `image` (uint8) and `label`.
        data_dir: the folder of all data sets.
        split: TFDS's split syntax: 'test', 'train[:55000]', 'train[90%:]', 'train[:50]+test'.
        workers: processes that read; -1: one a core; 0: this process reads.
        resident_gib: the limit between small and large, of a whole base split, decoded.

    Raises:
        UsageError: `name` or `split` is unknown, or the split is empty.
        RunError: the data set is not there or is damaged; says which command makes it.
    """
    folder = _folder(name, Path(data_dir))
    splits = prepared.shards(folder)
    sizes = {base: count for base, (count, _) in splits.items()}
    terms, names = parse_split(split, sizes), class_names(name, data_dir)
    shape, _ = _form(folder)
    if max(sizes[base] for base, *_ in terms) * math.prod(shape) > resident_gib * 2**30:
        images = StoredImages(folder, _source(folder, terms), readers(workers), terms)
        return LargeDataset(name, split, images, names)
    parts = []
    for base, start, stop in terms:
        images, labels = _decoded(folder, base, *splits[base], workers)
        parts.append((images[start:stop], labels[start:stop]))
    if len(parts) == 1:
        images, labels = parts[0]
    else:
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Dataset(name, split, images, labels, names)


def parse_split(split: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Resolve a TFDS split expression as TFDS does, without importing it.

    Args:
        split: see `load`; 'all' and slices in shards are TFDS's and not supported here.
        sizes: {base split: number of examples}.

    Returns:
        (base split, first example, one past the last) for each term of the sum.

    Raises:
        UsageError: the syntax, the base split or the bounds are wrong, or no example is left.
    """
    bound = r'(?:(-?[\d_]+(?:\.\d+)?)(%)?)?'
    terms = []
    for term in re.split(r'\s*\+\s*', split):
        match = re.fullmatch(rf'([\w-]+)(?:\[{bound}:{bound}\])?', term)
        if not match:
            raise UsageError(f"Split '{split}' is not understood: write it like 'train[:90%]'.")
        base, low, low_unit, high, high_unit = match.groups()
        if base not in sizes:
            raise UsageError(f"There is no split '{base}': choose from {', '.join(sizes)}.")
        n, percent = sizes[base], bool(low_unit or high_unit)
        start = _bound(low, percent, n, 0, split)
        stop = _bound(high, percent, n, n, split)
        if start >= stop:
            raise UsageError(f"Split '{split}' asks for no image of {base}'s {n:,}.")
        terms.append((base, start, stop))
    return terms


def _bound(text: str | None, percent: bool, n: int, default: int, split: str) -> int:
    """One bound of a slice of n examples as an index in 0..n; negative ones count from the end."""
    if text is None:
        return default
    try:
        index = round(float(text) * n / 100) if percent else int(text)
    except ValueError:
        raise UsageError(f"Split '{split}' is not understood: {text} is no index.") from None
    if abs(index) > n or (percent and abs(float(text)) > 100):
        raise UsageError(f"Split '{split}' reaches beyond the {n:,} images that there are.")
    return index + n if index < 0 else index


def _folder(name: str, data_dir: Path) -> Path:
    """The folder of a prepared data set: one that we prepared, else that of the newest version."""
    versions = [
        path.parent
        for path in data_dir.glob('*/*/dataset_info.json')
        if path.parts[-3] == name and re.fullmatch(r'\d+\.\d+\.\d+', path.parts[-2])
    ]

    def rank(path: Path) -> tuple[bool, list[int]]:
        ours = (path / 'preparation.json').exists()  # images of one size: quick to read
        return ours, [int(part) for part in path.name.split('.')]

    if versions:
        return max(versions, key=rank)
    if name in prepare.DATASETS:
        raise RunError(
            f'Data set {name} is not in {data_dir}: run `{prepared.command(name, data_dir)}`.'
        )
    if name in prepared.OFFICIAL:
        raise RunError(
            f'{name} is not in {data_dir}, and its official files are to be had on request only: '
            f'run `{prepared.command(name, data_dir)}` once you have them.'
        )
    there = {path.parts[-3] for path in data_dir.glob('*/*/dataset_info.json')}
    known = ', '.join(sorted(there.union(prepare.DATASETS)))
    raise UsageError(f"There is no data set '{name}' in {data_dir}: choose from {known}.")


def class_names(name: str, data_dir: str | Path, *, words: bool = True) -> tuple[str, ...]:
    """Of a data set: words where they lie beside it ('tabby, tabby cat'), else TFDS's names.

    Without `words` always TFDS's, of ImageNet the WordNet ids. They are '0', '1', ... where the
    labels have none. Of classes with the same words ('crane') each carries its own name too.

    Raises:
        UsageError, RunError: as `load`.
    """
    folder = _folder(name, Path(data_dir))
    try:
        names = _names(folder)
        beside = folder / 'label.words.txt'
        called = names
        if words and beside.is_file():
            called = beside.read_text(encoding='utf-8').splitlines()
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
            'data.name is not set: prepare your pictures with `python -m alexnet_jax.prepare '
            'folder --source=FOLDER --name=NAME`, and set --config.data.name=NAME.'
        )
    folder = _folder(name, Path(data_dir))
    (*_, channels), _ = _form(folder)
    return len(class_names(name, data_dir)), channels, tuple(prepared.shards(folder))


def _names(folder: Path) -> list[str]:
    names = folder / 'label.labels.txt'
    if names.is_file():
        return names.read_text(encoding='utf-8').splitlines()
    features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
    return list(map(str, range(int(features['label']['classLabel']['numClasses']))))


def _form(folder: Path) -> tuple[tuple[int, int, int], str]:
    try:
        return form_of(folder)
    except Unreadable as problem:
        raise prepared.damaged(folder, str(problem)) from None


def _source(folder: Path, terms: list[tuple[str, int, int]]) -> Source:
    """The records of a split's terms, see `parse_split`, file by file."""
    segments, splits, lengths = [], prepared.shards(folder), _shard_lengths(folder)
    for base, start, stop in terms:
        first = 0
        for path, count in zip(splits[base][1], lengths[base], strict=True):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                segments.append(Segment.of(path, low - first, high - low))
            first += count
    return Source(tuple(segments), *_form(folder))


def _shard_lengths(folder: Path) -> dict[str, list[int]]:
    info = json.loads((folder / 'dataset_info.json').read_text())  # `shards` has checked it
    return {s['name']: [int(n) for n in s['shardLengths']] for s in info['splits']}


# ---- large sets -----------------------------------------------------------------------------


class StoredImages:
    """Images in their files, which look like an array as far as numbers go: see `Images`."""

    def __init__(
        self, folder: Path, source: Source, readers: Readers, terms: list[tuple[str, int, int]]
    ):
        """`terms`: the split that `source` is, see `parse_split`."""
        self.folder, self.source, self.readers, self.terms = folder, source, readers, terms

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self.source), *self.source.shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any, /) -> np.ndarray:
        numbers = np.arange(len(self))[key] if isinstance(key, slice) else np.asarray(key)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        if numbers.dtype.kind not in 'iu':
            raise UsageError(
                'this data set is too large for memory: its images are to be had by a number, a '
                'slice or an array of numbers.'
            )
        if numbers.size and not -len(self) <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f'there are {len(self):,} images, and not one of number {key}')
        images, _ = self.take(numbers.reshape(-1) % len(self))
        return images.reshape(*numbers.shape, *self.shape[1:])

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise UsageError('this data set is too large for memory: ask for a slice of its images.')

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [n, H, W, C], labels int32 [n]) of those numbers.

        Raises:
            RunError: a record is damaged, or a reader process was killed.
            OSError: the system cannot read a file, which may be sound.
        """
        try:
            return self.readers.take(self.source, numbers)
        except Unreadable as problem:
            raise prepared.damaged(self.folder, str(problem)) from problem

    def labels(self) -> np.ndarray:
        """Of all images, int32 [N], from the copy kept beside; reads all records where it is not.

        Raises:
            RunError: a record is damaged.
            OSError: as `take`.
        """
        path = self._kept('labels.npy')
        with contextlib.suppress(OSError, ValueError, EOFError):
            labels = np.load(path)
            if labels.shape == (len(self),) and labels.dtype == np.int32:
                return labels
        try:
            labels = self.source.labels()
        except Unreadable as problem:
            raise prepared.damaged(self.folder, str(problem)) from problem
        _keep(path, 'the labels', lambda scratch: _save(scratch, labels))
        return labels

    def statistics(self) -> Statistics:
        """Of all images: those that lie beside the records, or were kept, or else summed up now."""
        whole = self.terms == [('train', 0, prepared.shards(self.folder).get('train', (0,))[0])]
        kept = self._kept('statistics.npz')
        for path in (self.folder / 'statistics.npz', kept) if whole else (kept,):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found, count = statistics_room.load(path)
                if count == len(self) and found.mean_image.shape == self.shape[1:]:
                    return found
        log.warning('%s: mean image and colours of %s images', self.folder, f'{len(self):,}')
        found = statistics(self)
        _keep(kept, 'the statistics', lambda path: statistics_room.save(path, found, len(self)))
        return found

    def _kept(self, ending: str) -> Path:
        """Where something is kept that depends on the records; a name that tells them apart."""
        stamps = [segment.stamp for segment in self.source.segments]
        about = [self.terms, self.source.shape, stamps]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        copies = self.folder.parent.parent / 'decoded'
        return copies / f'{self.folder.parent.name}-{self.folder.name}-{digest}.{ending}'


def _keep(path: Path, what: str, write: Callable[[Path], None]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with files.whole(path) as scratch:
            write(scratch)
    except OSError as error:
        log.warning('%s cannot keep %s (%s): starts stay slow', path.parent, what, error)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open('wb') as file:  # np.save adds an ending to a path
        np.save(file, array)


# ---- the decoded copy -----------------------------------------------------------------------
# Decoding 60,000 PNGs takes seconds, checking and mapping the copy 0.1 s; sweeps start many runs.


def _decoded(
    folder: Path, split: str, count: int, paths: list[Path], workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels int32 [N] of a whole split, decoded at most once."""
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
    try:
        copies.mkdir(exist_ok=True)
        for path, array in zip(kept, arrays, strict=True):
            with files.whole(path) as scratch:
                _save(scratch, array)
        text = json.dumps([source, [_sha256(path) for path in kept]])
        with files.whole(sums) as scratch:
            scratch.write_text(text)
    except OSError as error:
        log.warning(
            '%s cannot keep a decoded copy of %s (%s): starts stay slow', copies, stem, error
        )
    return arrays


def _decode(folder: Path, split: str, count: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode every example of `split`; a large one by processes that end with it."""
    terms = [(split, 0, count)]
    source = _source(folder, terms)
    images, labels = np.empty((count, *source.shape), np.uint8), np.empty(count, np.int32)
    with contextlib.closing(Readers(workers if images.nbytes > CHUNK_BYTES else 0)) as pool:
        stored = StoredImages(folder, source, pool, terms)
        for start in range(0, count, 1000):
            part = slice(start, min(start + 1000, count))
            images[part], labels[part] = stored.take(np.arange(start, part.stop))
    return images, labels


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


# ---- batches --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n images in an epoch: int64 [n], read-only.

    Made by sorting Philox's raw 64-bit words, which NumPy keeps the same for ever, whereas it
    reserves the right to change `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind='stable').astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The images of step `step` (from 0): int64 [batch_size], each in 0..n-1.

    They are the positions step * batch_size .. (step + 1) * batch_size - 1 of the endless chain of
    the epochs' permutations: no image is ever dropped, and a batch may span two epochs.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    parts = [
        permutation(seed, epoch, n)[max(0, first - epoch * n) : last - epoch * n]
        for epoch in epochs
    ]
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class TrainStream:
    """Training batches; `rows` is the share of each global batch that this process holds."""

    dataset: Dataset
    seed: int
    batch_size: int  # of the global batch
    rows: slice = field(default_factory=lambda: slice(None))  # a slice is no hashable default

    def batch(self, step: int) -> Batch:
        """{'image': uint8 [b, H, W, C], 'label': int32 [b]} of step `step`, from 0."""
        indices = batch_indices(self.seed, step, self.batch_size, len(self.dataset))[self.rows]
        images, labels = self.dataset.take(indices)
        return {'image': images, 'label': labels}


def eval_batches(dataset: Dataset, batch_size: int, rows: slice = slice(None)) -> Generator[Batch]:
    """Every image once, in order: `rows` of each global batch, the last one padded to full size.

    Yields:
        {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]}; the mask is 1 for an
        image and 0 for padding (black, label 0), to be left out of every sum and count. The next
        batch is read while one is looked at.
    """
    positions = np.arange(batch_size)[rows]

    def batch(number: int) -> Batch:
        indices = number * batch_size + positions
        real = indices < len(dataset)
        if real.all():
            image, label = dataset.take(indices)
        else:
            image = np.zeros((len(indices), *dataset.images.shape[1:]), np.uint8)
            label = np.zeros(len(indices), np.int32)
            if real.any():
                image[real], label[real] = dataset.take(indices[real])
        return {'image': image, 'label': label, 'mask': real.astype(np.float32)}

    return prefetch(batch, 0, -(-len(dataset) // batch_size), depth=1)


def prefetch(
    fn: Callable[[int], T], start: int, stop: int, depth: int = 2, threads: int = 1
) -> Generator[T]:
    """Yield fn(start), ..., fn(stop - 1), while threads work up to `depth` calls ahead.

    An exception in fn(i) is raised where fn(i) would have been yielded. Closing the generator (or
    dropping it) waits for the calls in flight and ends the threads.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix='prefetch')
    try:
        ahead = deque(pool.submit(fn, i) for i in range(start, min(start + depth, stop)))
        for i in range(start, stop):
            result = ahead.popleft().result()
            if i + depth < stop:
                ahead.append(pool.submit(fn, i + depth))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def shortage(dataset: Dataset, wanted: float) -> str | None:
    """How many cores would read `wanted` images/s, as a sentence; None where none are needed."""
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
    """Of a data set's images; a large one's are looked for before they are summed up."""
    if isinstance(dataset, LargeDataset):
        return dataset.images.statistics()
    return statistics(dataset.images)


def statistics(images: Images) -> Statistics:
    """Mean image and principal components of the pixel colours of `images` (uint8 [N, H, W, C]).

    Chunk by chunk, in whole numbers; see `statistics.Sums`.
    """
    sums = Sums(images.shape[1:])
    chunk = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    parts = prefetch(lambda i: images[i * chunk : (i + 1) * chunk], 0, -(-len(images) // chunk))
    for part in parts:
        sums.add(part)
    return sums.result()
