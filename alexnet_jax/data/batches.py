"""Training batches as a function of (seed, step), and evaluation batches. NumPy only, no JAX.

The images of a step depend on the seed and the step alone, not on earlier steps or the number of
processes.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from alexnet_jax.data.datasets import Dataset

Batch = dict[str, np.ndarray]
T = TypeVar('T')


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of the n images in an epoch: int64 [n], read-only.

    It sorts Philox's raw 64-bit words, which NumPy guarantees not to change. For
    `Generator.permutation` there is no such guarantee.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind='stable').astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Return the images of step `step` (from 0): int64 [batch_size], each in 0..n-1.

    They are the positions step * batch_size .. (step + 1) * batch_size - 1 of the permutations of
    all epochs, concatenated: no image is dropped, and a batch may span two epochs.
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
    """Training batches; this process reads the slice `rows` of each global batch."""

    dataset: Dataset
    seed: int
    batch_size: int  # of the global batch
    rows: slice = field(default_factory=lambda: slice(None))  # slices are not hashable

    def batch(self, step: int) -> Batch:
        """Return {'image': uint8 [b, H, W, C], 'label': int32 [b]} of step `step`, from 0."""
        indices = batch_indices(self.seed, step, self.batch_size, len(self.dataset))[self.rows]
        images, labels = self.dataset.take(indices)
        return {'image': images, 'label': labels}


def eval_batches(dataset: Dataset, batch_size: int, rows: slice = slice(None)) -> Generator[Batch]:
    """Yield every image once, in order: `rows` of each global batch, the last one padded.

    Yields:
        {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]}; the mask is 1 for an
        image and 0 for padding (black, label 0), to be left out of sums and counts. The next batch
        is read ahead.
    """
    positions = np.arange(batch_size)[rows]

    def batch(number: int) -> Batch:
        indices = number * batch_size + positions
        real = indices < len(dataset)
        image, label = dataset.take(np.where(real, indices, 0))
        image[~real], label[~real] = 0, 0
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
