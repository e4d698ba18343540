"""A batch as a function of (seed, step): data sets in memory, permutations, prefetch, statistics.

NumPy only: a process that makes batches never needs JAX. Which images a step sees depends on the
seed and the step alone, not on what ran before or on how many processes share the work.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alexnet_jax import prepare
from alexnet_jax.errors import RunError, UsageError

T = TypeVar('T')
Batch = dict[str, np.ndarray]
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split held as uint8, memory-mapped where it can be; treat the arrays as read-only."""

    name: str  # 'fashion_mnist'
    split: str  # the TFDS split expression as given: 'train[:55000]'
    images: np.ndarray  # uint8 [N, H, W, C], 0..255
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


# ---- loading --------------------------------------------------------------------------------


def load(name: str, data_dir: str | Path, split: str) -> Dataset:
    """The images and labels of `split`, in TFDS's order.

    The first call decodes the array_record files and keeps the result in `data_dir/decoded`; later
    calls map that copy into memory, after comparing the sha256 of it and of the files it came from.

    Args:
        name: a data set that lies in `data_dir` in TFDS's array_record format, with the features
            `image` (uint8, one size for all) and `label`.
        data_dir: the folder of all data sets.
        split: TFDS's split syntax: 'test', 'train[:55000]', 'train[90%:]', 'train[:50]+test'.

    Raises:
        UsageError: `name` or `split` is unknown, or the split is empty.
        RunError: the data set is not there or is damaged; says which command makes it.
    """
    folder = _folder(name, Path(data_dir))
    splits = prepare.shards(folder)
    sizes = {base: count for base, (count, _) in splits.items()}
    parts = []
    for base, start, stop in parse_split(split, sizes):
        images, labels = _decoded(folder, base, *splits[base])
        parts.append((images[start:stop], labels[start:stop]))
    if len(parts) == 1:
        images, labels = parts[0]
    else:
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Dataset(name, split, images, labels, _class_names(folder))


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
    """The folder of the newest version of a prepared data set."""
    versions = [
        path.parent
        for path in data_dir.glob('*/*/dataset_info.json')
        if path.parts[-3] == name and re.fullmatch(r'\d+\.\d+\.\d+', path.parts[-2])
    ]
    if versions:
        return max(versions, key=lambda path: [int(part) for part in path.name.split('.')])
    if name in prepare.DATASETS:
        raise RunError(
            f'Data set {name} is not in {data_dir}: run `{prepare.command(name, data_dir)}`.'
        )
    if name in ('imagenet2010', 'imagenet2012'):
        raise RunError(
            f'{name} is not in {data_dir}, and its official files are to be had on request only: '
            'prepare its images, all of one size, with TFDS as array_record there.'
        )
    there = {path.parts[-3] for path in data_dir.glob('*/*/dataset_info.json')}
    known = ', '.join(sorted(there.union(prepare.DATASETS)))
    raise UsageError(f"There is no data set '{name}' in {data_dir}: choose from {known}.")


def _class_names(folder: Path) -> tuple[str, ...]:
    """The names TFDS keeps beside the records, or '0', '1', ... where the labels have none."""
    try:
        names = folder / 'label.labels.txt'
        if names.is_file():
            return tuple(names.read_text().splitlines())
        features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
        return tuple(map(str, range(int(features['label']['classLabel']['numClasses']))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise prepare.damaged(folder, f'the description of its labels: {error}') from None


# ---- the decoded copy -----------------------------------------------------------------------
# Decoding 60,000 PNGs takes 6 s, checking and mapping the copy 0.1 s; sweeps start many runs.


def _decoded(
    folder: Path, split: str, count: int, files: list[Path]
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels int32 [N] of a whole split, decoded at most once."""
    copies = folder.parent.parent / 'decoded'
    stem = f'{folder.parent.name}-{folder.name}-{split}'
    paths = [copies / f'{stem}.{part}.npy' for part in ('images', 'labels')]
    sums = copies / f'{stem}.json'
    source = [_sha256(file) for file in files]
    with contextlib.suppress(OSError, ValueError):
        if json.loads(sums.read_text()) == [source, [_sha256(path) for path in paths]]:
            images, labels = (np.load(path, mmap_mode='r').view(np.ndarray) for path in paths)
            return images, labels
    arrays = _decode(folder, split, count)
    try:
        copies.mkdir(exist_ok=True)
        for path, array in zip(paths, arrays, strict=True):
            _write(path, lambda file, array=array: np.save(file, array))
        text = json.dumps([source, [_sha256(path) for path in paths]])
        _write(sums, lambda file: file.write(text.encode()))
    except OSError as error:
        log.warning(
            '%s cannot keep a decoded copy of %s (%s): starts stay slow', copies, stem, error
        )
    return arrays


def _decode(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode every example of `split` through TFDS."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        shape = builder.info.features['image'].shape
        if None in shape:
            raise UsageError(f'The images in {folder} differ in size and cannot be held as one.')
        open_split: Any = builder.as_data_source  # wrapt's stubs hide its signature
        skip = {'image': tfds.decode.SkipDecoding()}
        source: Any = open_split(split, decoders=skip)
        images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
                images[row] = _pixels(example['image'], shape)
                labels[row] = example['label']
    except UsageError:
        raise
    except Exception as error:  # array_record and TFDS promise no set of exceptions
        raise prepare.damaged(folder, f'{split}: {str(error).splitlines()[0]}') from error
    return images, labels


def _pixels(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decode one PNG or JPEG to uint8 [H, W, C]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert('L' if shape[-1] == 1 else 'RGB')).reshape(shape)


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _write(path: Path, write: Callable) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared copy from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ---- batches --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
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
    chain = np.concatenate([permutation(seed, epoch, n) for epoch in epochs])
    return chain[first - epochs[0] * n : last - epochs[0] * n]


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
        return {'image': self.dataset.images[indices], 'label': self.dataset.labels[indices]}


def eval_batches(dataset: Dataset, batch_size: int, rows: slice = slice(None)) -> Iterator[Batch]:
    """Every image once, in order: `rows` of each global batch, the last one padded to full size.

    Yields:
        {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]}; the mask is 1 for an
        image and 0 for padding (black, label 0), to be left out of every sum and count.
    """
    positions = np.arange(batch_size)[rows]
    for start in range(0, len(dataset), batch_size):
        indices = start + positions
        real = indices < len(dataset)
        image = np.zeros((len(indices), *dataset.images.shape[1:]), np.uint8)
        label = np.zeros(len(indices), np.int32)
        image[real], label[real] = dataset.images[indices[real]], dataset.labels[indices[real]]
        yield {'image': image, 'label': label, 'mask': real.astype(np.float32)}


def prefetch(fn: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T]:
    """Yield fn(start), ..., fn(stop - 1), while a thread works up to `depth` calls ahead.

    An exception in fn(i) is raised where fn(i) would have been yielded. Closing the generator (or
    dropping it) waits for the call in flight and ends the thread.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix='prefetch')
    try:
        ahead = deque(pool.submit(fn, i) for i in range(start, min(start + depth, stop)))
        for i in range(start, stop):
            result = ahead.popleft().result()
            if i + depth < stop:
                ahead.append(pool.submit(fn, i + depth))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


# ---- statistics -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the paper's preprocessing needs to know of the training images (section 4.1)."""

    mean_image: np.ndarray  # float32 [H, W, C], 0-255 units
    colour_std: np.ndarray  # float32 [C], descending: roots of the pixel covariance's eigenvalues
    colour_vectors: np.ndarray  # float32 [C, C]: column i belongs to colour_std[i]


def statistics(images: np.ndarray) -> Statistics:
    """Mean image and principal components of the pixel colours of `images` (uint8 [N, H, W, C]).

    Sums are taken chunk by chunk in float64, where sums of products of bytes are exact. Each vector
    is signed so that its entry of largest magnitude is positive.
    """
    channels = images.shape[-1]
    total = np.zeros(images.shape[1:])
    products = np.zeros((channels, channels))
    for start in range(0, len(images), 1000):
        chunk = images[start : start + 1000].astype(np.float64)
        total += chunk.sum(axis=0)
        pixels = chunk.reshape(-1, channels)
        products += pixels.T @ pixels
    pixel_count = len(images) * images.shape[1] * images.shape[2]
    mean = total.sum(axis=(0, 1)) / pixel_count
    variances, vectors = np.linalg.eigh(products / pixel_count - np.outer(mean, mean))
    variances, vectors = variances[::-1], vectors[:, ::-1]  # eigh sorts upwards
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return Statistics(
        mean_image=(total / len(images)).astype(np.float32),
        colour_std=np.sqrt(np.maximum(variances, 0)).astype(np.float32),
        colour_vectors=(vectors * np.sign(largest)).astype(np.float32),
    )
