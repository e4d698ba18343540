"""Read and decode records of array_record files, as TFDS writes them, by number.

Needs neither JAX nor TFDS. A record is a tf.train.Example. TFDS's own reader takes 1.2 to 1.3
times as long, and if OpenCV is installed it decodes with OpenCV, which gives different pixels.
"""

import bisect
import contextlib
import functools
import itertools
import json
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.data import images, prepared

PX = 256  # the side to which images of different sizes are brought (paper, section 2)


@dataclass(frozen=True)
class Segment:
    """Consecutive records of one file; `stamp` changes when the file is replaced."""

    file: str
    skip: int
    take: int
    stamp: tuple[int, int]

    @staticmethod
    def of(path: Path, skip: int, take: int) -> 'Segment':
        """Return the records `skip` .. `skip + take - 1` of an existing file."""
        about = path.stat()
        return Segment(str(path), skip, take, (about.st_size, about.st_mtime_ns))


@dataclass(frozen=True, eq=False)
class Records:
    """Records in a fixed order, read by their numbers in it.

    folder: of the data set. segments: where the records are stored. shape: of the decoded images,
    [H, W, C]. encoded: true for encoded images (JPEG, PNG), false for the uint8 arrays themselves.
    """

    folder: Path
    segments: tuple[Segment, ...]
    shape: tuple[int, int, int]
    encoded: bool

    @functools.cached_property
    def ends(self) -> list[int]:
        """The number of records up to the end of each segment."""
        return list(itertools.accumulate(segment.take for segment in self.segments))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, numbers: Sequence[int], out: np.ndarray | None) -> np.ndarray:
        """Decode the images `numbers` into `out`, uint8 [n, H, W, C]; return labels, int32 [n].

        Without `out` only the labels are read. Any thread may call it.

        Raises:
            RunError: a record is damaged, or its image is not as described.
            OSError: the system cannot open a file, which may be intact.
        """
        labels = np.empty(len(numbers), np.int32)
        for row, number in enumerate(numbers):
            which = bisect.bisect_right(self.ends, number)
            segment = self.segments[which]
            position = segment.skip + number - (self.ends[which] - segment.take)
            try:
                # One by one: array_record reads a list of records at half the speed.
                record = _reader(segment.file, segment.stamp).read([position])[0]
                image, labels[row] = image_and_label(record)
                if out is not None and self.encoded:
                    images.decode_into(image, out[row])
                elif out is not None:
                    out[row] = np.frombuffer(image, np.uint8).reshape(self.shape)
            except MemoryError:
                raise
            except Exception as error:  # decoders and array_record raise many types
                open(segment.file, 'rb').close()  # OSError: too many open files, no permission
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                name = Path(segment.file).name
                reason = f'{name}, record {position}: {reason}'
                raise prepared.damaged(self.folder, reason) from error
        return labels


@functools.cache
def _reader(file: str, stamp: tuple[int, int]) -> Any:
    """Return an array_record reader of a file, which stays open."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    del stamp
    _raise_file_limit()
    # Random access: nothing is read ahead, and the calling thread does the work.
    options = 'readahead_buffer_size:0,max_parallelism:0'
    return ArrayRecordReader(file, options=options, file_reader_buffer_size=32768)


@functools.cache
def _raise_file_limit() -> None:
    """Raise the limit of open files: TFDS splits ImageNet into 1,024, the usual limit."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def image_format(folder: Path) -> tuple[tuple[int, int, int], bool]:
    """Return `shape` and `encoded` of a data set's records, see `Records`, from features.json.

    Raises:
        RunError: there is no description, or the images are not uint8 [H, W, 1 or 3].
    """
    try:
        features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
        encoded = 'image' in features['image']
        about = features['image']['image' if encoded else 'tensor']
        height, width, channels = map(int, about['shape']['dimensions'])
        readable = encoded or about['encoding'].lower() == 'bytes'
        if about.get('dtype', 'uint8') != 'uint8' or channels not in (1, 3) or not readable:
            raise ValueError(f'{about}, but must be uint8 [H, W, 1 or 3] as bytes')
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise prepared.damaged(folder, f'invalid description of its images: {error}') from None
    if encoded and min(height, width) < 1:  # pictures of any size
        return (PX, PX, 3), encoded
    return (height, width, channels), encoded


# ---- tf.train.Example -----------------------------------------------------------------------
# Example {1: Features {1: repeated {1: name, 2: Feature {1: BytesList | 3: Int64List {1: value}}}}}
# in protobuf's wire format. This takes a tenth of protobuf's time, as no image is copied.


def image_and_label(record: bytes) -> tuple[memoryview, int]:
    """Return the bytes of the feature `image` and the value of the feature `label`.

    Raises:
        ValueError, IndexError: it is not such a record.
    """
    view, image, label = memoryview(record), None, None
    for _, features in _fields(record, (0, len(record))):
        for _, entry in _fields(record, features):
            name, value = dict(_fields(record, entry)).values()
            if record[slice(*name)] == b'image':
                image = view[slice(*_first(record, value))]
            elif record[slice(*name)] == b'label':
                label = _varint(record, _first(record, value)[0])[0]
    if image is None or label is None:
        raise ValueError('it contains no image with a label')
    return image, label - (label >> 63 << 64)  # two's complement: -1 where there is none


def _first(record: bytes, feature: tuple[int, int]) -> tuple[int, int]:
    """Return the span of the only value of a Feature."""
    _, values = next(_fields(record, feature))
    return next(_fields(record, values))[1]


def _fields(record: bytes, span: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (number, span of its contents) of each field of a message."""
    at, end = span
    while at < end:
        key, at = _varint(record, at)
        size, after = _varint(record, at)
        if key & 7 == 2:  # length-delimited
            at, after = after, after + size
        if key & 7 not in (0, 2) or after > end:
            raise ValueError('it is not a tf.train.Example, or is truncated')
        yield key >> 3, (at, after)
        at = after


def _varint(record: bytes, at: int) -> tuple[int, int]:
    """Return (value, position after it)."""
    value = shift = 0
    while True:
        byte = record[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
