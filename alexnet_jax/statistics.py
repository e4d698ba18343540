"""What the paper's preprocessing needs to know of the training images (section 4.1), streaming."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_jax import files

BLOCK_PX = 256  # 256 products of two bytes sum to less than 2^24: float32 is exact
MOST_RECENT = (2**24 - 1) // 255  # bytes so many sum exactly in float32
CHUNK_VALUES = 2**19  # taken at once: what fits a cache, and bounds the memory
MOST_IMAGES = (2**32 - 1) // 255  # 16.8 million


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the paper's preprocessing needs to know of the training images (section 4.1)."""

    mean_image: np.ndarray  # float32 [H, W, C], 0-255 units
    colour_std: np.ndarray  # float32 [C], descending: roots of the pixel covariance's eigenvalues
    colour_vectors: np.ndarray  # float32 [C, C]: column i belongs to colour_std[i]


class Sums:
    """Sums over images, from which their statistics follow.

    Sums of bytes and of products of two bytes are whole numbers, and are added as such. So the
    result depends neither on the order of the images nor on how they are cut into parts.
    """

    def __init__(self, shape: tuple[int, ...]):
        """Of images of `shape` [H, W, C]."""
        height, width, channels = shape
        self.count = 0
        self.products = np.zeros((channels, channels))  # float64 is exact up to 2^53
        self._total = np.zeros((channels, height, width), np.uint32)  # fits MOST_IMAGES bytes
        self._recent = np.zeros(self._total.shape, np.float32)  # not yet in _total
        self._recent_count = 0
        self._blocks = np.zeros((0, 0, 0), np.float32)  # kept: new memory costs more than the sums
        self._pixel_count = 0  # in them

    @classmethod
    def of(cls, count: int, total: np.ndarray, products: np.ndarray) -> 'Sums':
        """Those of `count` images, as they were kept."""
        channels, height, width = total.shape
        found = cls((height, width, channels))
        found.count, found._total, found.products = count, total, products
        return found

    @property
    def total(self) -> np.ndarray:
        """Sums over images: uint32 [C, H, W]."""
        self._settle()
        return self._total

    def add(self, images: np.ndarray) -> None:
        """Images uint8 [n, H, W, C] more.

        Raises:
            OverflowError: beyond MOST_IMAGES.
        """
        at_once = max(1, CHUNK_VALUES // max(1, self._total.size))
        for start in range(0, len(images), at_once):
            self.add_planes(np.moveaxis(images[start : start + at_once], -1, 0))

    def add_planes(self, planes: np.ndarray) -> None:
        """As `add`, of images whose channels come first: uint8 [C, n, H, W]."""
        self._counted(planes.shape[1])
        images = self._floats(planes)
        for i in range(planes.shape[1]):
            if self._recent_count == MOST_RECENT:
                self._settle()
            self._recent += images[:, i]
            self._recent_count += 1
        self.products += self._products()

    def merge(self, other: 'Sums') -> None:
        """What `other` has counted, added to this."""
        self._counted(other.count)
        self._total += other.total
        self.products += other.products

    def _settle(self) -> None:
        if not self._recent_count:
            return
        self._total += self._recent.astype(np.uint32)
        self._recent[:], self._recent_count = 0, 0

    def _floats(self, planes: np.ndarray) -> np.ndarray:
        """The planes as float32, a view of `_blocks`: converted once, for both kinds of sums."""
        channels, pixel_count = len(planes), planes[0].size
        if pixel_count != self._pixel_count:
            self._pixel_count, blocks = pixel_count, -(-pixel_count // BLOCK_PX)
            self._blocks = np.zeros((channels, blocks, BLOCK_PX), np.float32)
        images = self._blocks.reshape(channels, -1)[:, :pixel_count].reshape(planes.shape)
        images[...] = planes
        return images

    def _products(self) -> np.ndarray:
        """Sums over all pixels of `_blocks` of the products of two channels: [C, C], exact."""
        channels = len(self._blocks)
        products = np.empty((channels, channels))
        for i in range(channels):
            for j in range(i + 1):
                sums = np.einsum('bp,bp->b', self._blocks[i], self._blocks[j])
                products[i, j] = products[j, i] = sums.sum(dtype=np.float64)
        return products

    def _counted(self, images: int) -> None:
        self.count += images
        if self.count > MOST_IMAGES:
            raise OverflowError(f'more than {MOST_IMAGES:,} images')

    def result(self) -> Statistics:
        """Each vector is signed so that its entry of largest magnitude is positive."""
        total = self.total
        pixel_count = self.count * total.shape[1] * total.shape[2]
        mean = total.sum(axis=(1, 2), dtype=np.int64) / pixel_count
        variances, vectors = np.linalg.eigh(self.products / pixel_count - np.outer(mean, mean))
        variances, vectors = variances[::-1], vectors[:, ::-1]  # eigh sorts upwards
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
        return Statistics(
            mean_image=(np.moveaxis(total, 0, -1) / self.count).astype(np.float32, order='C'),
            colour_std=np.sqrt(np.maximum(variances, 0)).astype(np.float32),
            colour_vectors=(vectors * np.sign(largest)).astype(np.float32),
        )


def save(path: Path, statistics: Statistics, count: int) -> None:
    """Write the statistics of `count` images, whole or not at all, the same bytes each time."""
    with files.whole(path) as scratch, scratch.open('wb') as file:
        np.savez(file, count=np.int64(count), **vars(statistics))


def load(path: Path) -> tuple[Statistics, int]:
    """The statistics, and of how many images they are.

    Raises:
        OSError, ValueError, KeyError: they are not there, or damaged.
    """
    try:
        with np.load(path) as file:
            names = ('mean_image', 'colour_std', 'colour_vectors')
            return Statistics(*(file[name] for name in names)), int(file['count'])
    except (zipfile.BadZipFile, EOFError) as error:  # cut off
        raise ValueError(str(error)) from None


def far_from(found: Statistics, known: Statistics) -> str | None:
    """What differs much from known colours, in words; None if nothing does.

    Much is a tenth of a standard deviation's size, or ten degrees of a direction.
    """
    ratios = found.colour_std / known.colour_std
    if np.abs(ratios - 1).max() > 0.1:
        pairs = zip(found.colour_std, known.colour_std, strict=True)
        said = ', '.join(f'{ours:.1f} for {theirs:.1f}' for ours, theirs in pairs)
        return f'the colours vary otherwise than they should (standard deviations {said})'
    cosines = np.abs((found.colour_vectors * known.colour_vectors).sum(axis=0))
    if cosines.min() < np.cos(np.radians(10)):
        return 'the colours vary in other directions than they should'
    return None
