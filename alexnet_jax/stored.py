"""Images where they lie: by number out of array_record files, as TFDS writes them.

A reader process needs no more than this room, NumPy and Pillow: neither JAX nor TFDS. A record is a
tf.train.Example, whose image is looked up and decoded into the row of an array that is there
already.
"""

import bisect
import contextlib
import functools
import itertools
import json
import resource
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import pictures

PX = 256  # the side to which images of different sizes are brought (paper, section 2)


class Unreadable(Exception):
    """A record that cannot be read, or a description of records; says which and why."""


@dataclass(frozen=True)
class Segment:
    """Consecutive records of one file; `stamp` tells it from another one of the same name."""

    file: str
    skip: int
    take: int
    stamp: tuple[int, int]

    @staticmethod
    def of(path: Path, skip: int, take: int) -> 'Segment':
        """Of a file that is there."""
        about = path.stat()
        return Segment(str(path), skip, take, (about.st_size, about.st_mtime_ns))


@dataclass(frozen=True, eq=False)
class Source:
    """Records in a fixed order, to be read by their numbers in it; plain data, so it pickles.

    shape: of the images that come out, (height, width, channels).
    form: what a record holds: 'pixels', the uint8 array itself; 'picture', an encoded image of
        `shape`; 'any size', an encoded image that is brought to `shape`.
    """

    segments: tuple[Segment, ...]
    shape: tuple[int, int, int]
    form: str

    @functools.cached_property
    def ends(self) -> list[int]:
        """Of each segment, how many records there are up to its end."""
        return list(itertools.accumulate(segment.take for segment in self.segments))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, numbers: Sequence[int], out: np.ndarray) -> np.ndarray:
        """Decode the images `numbers` into `out`, uint8 [n, H, W, C]; returns labels int32 [n].

        Raises:
            Unreadable: a record is damaged, or holds another image than the description says.
            OSError: the system cannot read the file, which may be sound.
        """
        labels = np.empty(len(numbers), np.int32)
        for row, number in enumerate(numbers):
            with self._named(number):
                image, labels[row] = image_and_label(self._record(number))
                self._decode(image, out[row])
        return labels

    def labels(self) -> np.ndarray:
        """Of all records, int32 [N]: no image is decoded, but all bytes are read.

        Raises:
            Unreadable: a record is damaged.
            OSError: as `read`.
        """
        labels = np.empty(len(self), np.int32)
        for number in range(len(self)):
            with self._named(number):
                labels[number] = image_and_label(self._record(number))[1]
        return labels

    def _record(self, number: int) -> bytes:
        segment, position = self._place(number)
        # One by one: array_record reads a list of records at half the speed.
        return _reader(segment.file, segment.stamp).read([position])[0]

    def _place(self, number: int) -> tuple[Segment, int]:
        which = bisect.bisect_right(self.ends, number)
        segment = self.segments[which]
        return segment, segment.skip + number - (self.ends[which] - segment.take)

    @contextlib.contextmanager
    def _named(self, number: int) -> Generator[None]:
        """Whatever goes wrong in the block, goes wrong with that record."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # decoders and array_record raise whatever they stumble over
            segment, position = self._place(number)
            _read_through(segment.file)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Unreadable(f'{Path(segment.file).name}, record {position}: {reason}') from error

    def _decode(self, image: memoryview, row: np.ndarray) -> None:
        if self.form == 'pixels':
            row[:] = np.frombuffer(image, np.uint8).reshape(self.shape)
        elif self.form == 'picture':
            row[:] = pictures.decode(bytes(image), self.shape)
        else:
            row[:] = pictures.picture(bytes(image), self.shape[0])


def _read_through(file: str) -> None:
    """Whether the system can: no descriptor left or a failing disk is no fault of the data.

    Raises:
        OSError: it cannot. (A file that is gone is for the data set to say.)
    """
    with contextlib.suppress(FileNotFoundError), open(file, 'rb') as bytes_of:
        while bytes_of.read(2**20):
            pass


@functools.cache
def _reader(file: str, stamp: tuple[int, int]) -> Any:
    """An open file; as many as there are stay open."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordReader,  # a compiled module without stubs
    )

    del stamp
    _allow_files()
    # Random access: nothing is read ahead, and no threads but the caller's.
    options = 'readahead_buffer_size:0,max_parallelism:0'
    return ArrayRecordReader(file, options=options, file_reader_buffer_size=32768)


def close_files() -> None:
    """Close what this process has opened; what is read later is opened again."""
    _reader.cache_clear()


@functools.cache
def _allow_files() -> None:
    """TFDS cuts ImageNet into 1,024 files, and the usual limit of open ones is as many."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def form_of(folder: Path) -> tuple[tuple[int, int, int], str]:
    """What the records of a data set hold, from its `features.json`: (shape, form), see `Source`.

    Raises:
        Unreadable: there is no description, or one of something else than labelled images.
        OSError: the system cannot read it.
    """
    try:
        features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
        about = features['image']
        inner = about.get('image') or about['tensor']
        sides = [int(side) for side in inner['shape']['dimensions']]
        dtype, encoding = inner.get('dtype', 'uint8'), inner.get('encoding', 'none')
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f'the description of its images: {error}') from None
    height, width, channels = sides if len(sides) == 3 else (0, 0, 0)
    if dtype != 'uint8' or channels not in (1, 3):
        raise Unreadable(f'its images are {dtype} {sides}, and not uint8 [H, W, 1 or 3]')
    if 'tensor' in about:
        if encoding.lower() != 'bytes' or min(sides) < 1:
            raise Unreadable(f'its images are arrays with encoding {encoding}, and not bytes')
        return (height, width, channels), 'pixels'
    if min(height, width) < 1:
        return (PX, PX, 3), 'any size'
    return (height, width, channels), 'picture'


# ---- tf.train.Example -----------------------------------------------------------------------
# Example {1: Features {1: repeated {1: name, 2: Feature {1: BytesList | 3: Int64List {1: value}}}}}
# in protobuf's wire format. Reading it here takes a tenth of protobuf's time, as no byte of the
# image is copied, and keeps TensorFlow's message types out of the reader processes.


def image_and_label(record: bytes) -> tuple[memoryview, int]:
    """The bytes of the feature `image` and the number of the feature `label`.

    Raises:
        ValueError: it is no such record.
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
        raise ValueError('it holds no image with a label')
    return image, label - (label >> 63 << 64)  # two's complement: -1 where there is none


def _first(record: bytes, feature: tuple[int, int]) -> tuple[int, int]:
    """Where the only value of a Feature lies."""
    _, values = next(_fields(record, feature))
    return next(_fields(record, values))[1]


def _fields(record: bytes, span: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """(number, where its contents lie) of each field of a message."""
    at, end = span
    while at < end:
        key, at = _varint(record, at)
        if key & 7 == 2:  # so many bytes
            size, at = _varint(record, at)
            stop = at + size
        elif key & 7 == 0:
            stop = _varint(record, at)[1]
        else:
            raise ValueError('it is no tf.train.Example')
        if stop > end:
            raise ValueError('it is cut off')
        yield key >> 3, (at, stop)
        at = stop


def _varint(record: bytes, at: int) -> tuple[int, int]:
    """(value, where the next field begins)."""
    value = shift = 0
    while True:
        byte = record[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
