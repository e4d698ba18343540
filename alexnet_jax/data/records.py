"""Read and decode records of array_record files, as TFDS writes them, by number and by threads.

Needs neither JAX nor TFDS. A record is a tf.train.Example. TFDS's own reader takes 1.2 to 1.3
times as long, and if OpenCV is installed it decodes with OpenCV, which gives different pixels.

Decoding releases Python's lock for most of its time (88 % for JPEG), so threads should scale to
about 8 cores; 2 were measured, see experiments/results/reading. Threads end with their process and
need no shared memory. Worker processes, our own or grain's, were slower for JPEG.
"""

import bisect
import contextlib
import functools
import itertools
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module as array_record  # ty: ignore[missing-module-member]

from alexnet_jax import machine
from alexnet_jax.data import images as image_io
from alexnet_jax.data import prepared

Term = tuple[str, int, int]  # (base split, first example, one past the last)
LEAST = 8  # images a task: starting one costs some 0.05 ms
RUN = 64  # consecutive records that are read by one call, 30 times as fast as one by one


class StoredImages:
    """Images in their files, uint8 [N, H, W, C]; indexed along N as an array is."""

    def __init__(self, folder: Path, about: prepared.Description, terms: list[Term], workers: int):
        """Take the parts of a data set that make up a split, and the number of reader threads.

        With `workers` 0 the calling thread reads; -1 stands for one per core.
        """
        self.folder, self.terms, self.encoded = folder, terms, about.encoded
        self.workers = machine.cores() if workers == -1 else workers
        self.segments: list[tuple[Path, int, int]] = []  # (file, its first record, how many)
        for base, start, stop in terms:
            first = 0
            for path, count in about.files[base]:
                low, high = max(start, first), min(stop, first + count)
                if low < high:
                    self.segments.append((path, low - first, high - low))
                first += count
        self._ends = list(itertools.accumulate(take for _, _, take in self.segments))
        self.shape = (self._ends[-1], *about.shape)  # (N, H, W, C)
        self._reader = functools.cache(_open)  # files stay open

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any, /) -> np.ndarray:
        numbers = np.arange(len(self))[key]
        images, _ = self.take(numbers.reshape(-1))
        return images.reshape(*numbers.shape, *self.shape[1:])

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 [n, H, W, C], and labels, int32 [n]; any thread may call it.

        Raises:
            RunError: a record is damaged, or its image is not as described.
            OSError: the system cannot open a file, which may be intact.
        """
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        labels = np.empty(len(numbers), np.int32)
        size = max(LEAST, -(-len(numbers) // max(1, 2 * self.workers)))

        def read(start: int) -> None:
            chunk = slice(start, start + size)
            labels[chunk] = self.read(numbers[chunk].tolist(), images[chunk])

        run = _pool(self.workers).map if self.workers else map
        list(run(read, range(0, len(numbers), size)))
        return images, labels

    def read(self, numbers: Sequence[int], out: np.ndarray | None) -> np.ndarray:
        """Decode images into `out`, uint8 [n, H, W, C], in this thread; return labels, int32 [n].

        Without `out` only the labels are read. It raises as `take` does.
        """
        labels, row = np.empty(len(numbers), np.int32), 0
        while row < len(numbers):
            segment = bisect.bisect_right(self._ends, numbers[row])
            path, skip, take = self.segments[segment]
            left = self._ends[segment] - numbers[row]  # images from this one to the segment's last
            position = skip + take - left
            count, most = 1, min(left, RUN, len(numbers) - row)
            while count < most and numbers[row + count] == numbers[row] + count:
                count += 1
            # array_record reads a list of several records at half the speed of one by one.
            places = ([position],) if count == 1 else (position, position + count)
            try:
                found = self._reader(path).read(*places)
                for i, record in zip(range(row, row + count), found, strict=True):
                    image, labels[i] = image_and_label(record)
                    if out is not None and self.encoded:
                        image_io.decode_into(image, out[i])
                    elif out is not None:
                        out[i] = np.frombuffer(image, np.uint8).reshape(self.shape[1:])
            except MemoryError:
                raise
            except Exception as error:  # decoders and array_record raise many types
                path.open('rb').close()  # OSError: too many open files, no permission
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                reason = f'{path.name}, records from {position}: {reason}'
                raise prepared.damaged(self.folder, reason) from error
            row += count
        return labels


def _open(path: Path) -> Any:
    """Return array_record's reader of a file."""
    _raise_file_limit()
    # Random access: nothing is read ahead, and the calling thread does the work.
    options = 'readahead_buffer_size:0,max_parallelism:0'
    return array_record.ArrayRecordReader(str(path), options=options, file_reader_buffer_size=32768)


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Return the reader threads shared by all splits of this process."""
    return ThreadPoolExecutor(count, thread_name_prefix='reader')


@functools.cache
def _raise_file_limit() -> None:
    """Raise the limit of open files: TFDS splits ImageNet into 1,024, the usual limit."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- tf.train.Example -----------------------------------------------------------------------
# Example {1: Features {1: repeated {1: name, 2: Feature {1: BytesList | 3: Int64List {1: value}}}}}
# in protobuf's wire format. No image is copied: this takes 25 us for a raw image of 256 px, and
# protobuf 300 us, more than the rest of reading it.


def image_and_label(record: bytes) -> tuple[memoryview, int]:
    """Return the bytes of the feature `image` and the value of the feature `label`.

    Raises:
        ValueError, LookupError: it is not such a record.
    """
    found = {}
    for features in _fields(memoryview(record)):
        for entry in _fields(features):
            name, value = _fields(entry)
            found[bytes(name)] = value
    image, label = (_first(found[name]) for name in (b'image', b'label'))
    number, _ = _varint(label, 0)
    return image, number - (number >> 63 << 64)  # two's complement: -1 where there is none


def _first(feature: memoryview) -> memoryview:
    """Return the first value of a Feature."""
    values = next(_fields(feature))
    return next(_fields(values))


def _fields(message: memoryview) -> Iterator[memoryview]:
    """Yield the contents of each field of a message; numbers are varints."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size, after = _varint(message, at)
        if key & 7 == 2:  # length-delimited
            at, after = after, after + size
        if key & 7 not in (0, 2) or after > len(message):
            raise ValueError('it is not a tf.train.Example, or is truncated')
        yield message[at:after]
        at = after


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return (value, position after it)."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
