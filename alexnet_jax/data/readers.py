"""Reader threads for images, and prefetching.

Decoding releases Python's lock for most of its time (88 % for JPEG), so threads should scale to
about 8 cores; 2 were measured, see experiments/results/reading. Threads end with their process and
need no shared memory. Worker processes, our own or grain's, were slower for JPEG.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from alexnet_jax import machine
from alexnet_jax.data.records import Records

T = TypeVar('T')
LEAST = 8  # images a task: starting one costs some 0.05 ms


@functools.cache
def readers(count: int) -> 'Readers':
    """Return the readers shared by all data sets of this process: `count`, or -1 for all cores."""
    return Readers(machine.cores() if count == -1 else count)


class Readers:
    """`count` threads; with 0 the calling thread reads."""

    def __init__(self, count: int):
        self.count = count
        self._pool = ThreadPoolExecutor(max(count, 1), thread_name_prefix='reader')
        self._secs = deque[float](maxlen=1000)  # per image, of the latest chunks

    def take(self, records: Records, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n]; any thread may call it.

        Raises:
            RunError, OSError: see `Records.read`.
        """
        images = np.empty((len(numbers), *records.shape), np.uint8)
        labels = np.empty(len(numbers), np.int32)
        size = max(LEAST, -(-len(numbers) // max(1, 2 * self.count)))

        def read(start: int) -> None:
            chunk, begin = slice(start, start + size), time.perf_counter()
            labels[chunk] = records.read(numbers[chunk].tolist(), images[chunk])
            self._secs.append((time.perf_counter() - begin) / len(labels[chunk]))

        run = self._pool.map if self.count else map
        list(run(read, range(0, len(numbers), size)))
        return images, labels

    @property
    def rate(self) -> float:
        """The recent rate of one reader, in images/s."""
        return float(1 / np.mean(self._secs))


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
