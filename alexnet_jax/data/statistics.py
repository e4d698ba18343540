"""Mean image and principal colours of the training images (paper, section 4.1), in one pass.

They are those of the images as training reads them, that is of decoded records: before and after
JPEG encoding the mean image differs by up to one of 255 levels. So it does not matter who sums the
images up, preparation or the first training run, nor from where they are read.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_jax import files

CHUNK_VALUES = 2**18  # summed at once: 2 MiB of float64 fit a cache


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean image and principal components of the pixel colours."""

    mean_image: np.ndarray  # float32 [H, W, C], 0-255 units
    colour_std: np.ndarray  # float32 [C], descending: roots of the pixel covariance's eigenvalues
    colour_vectors: np.ndarray  # float32 [C, C]: column i belongs to colour_std[i]


class Sums:
    """Sums over images, from which their statistics follow.

    All summands are integers, and float64 adds integers exactly up to 2^53: 2.1 million white
    images of 256 x 256 px. So the result depends neither on the order of the images nor on how they
    are split among processes.
    """

    def __init__(self, shape: tuple[int, ...]):
        """Begin with no image; `shape` is that of an image, [H, W, C]."""
        height, width, channels = shape
        self.count = 0
        self.total = np.zeros((channels, height, width))  # of the images
        self.products = np.zeros((channels, channels))  # of two channels, over all pixels

    @classmethod
    def of(cls, count: int, total: np.ndarray, products: np.ndarray) -> 'Sums':
        """Return the sums over `count` images that were kept."""
        sums = cls((*total.shape[1:], len(total)))
        sums.count, sums.total, sums.products = count, total, products
        return sums

    def add(self, images: np.ndarray) -> None:
        """Add images, uint8 [N, H, W, C]."""
        channels, size = len(self.total), self.total[0].size
        at_once = max(1, CHUNK_VALUES // self.total.size)
        buffer = np.empty((channels, min(at_once, len(images)), size))
        for start in range(0, len(images), at_once):
            chunk = images[start : start + at_once]
            planes = buffer[:, : len(chunk)]
            planes[...] = chunk.reshape(len(chunk), size, channels).transpose(2, 0, 1)
            for image in planes.swapaxes(0, 1):
                self.total += image.reshape(self.total.shape)
            pixels = planes.reshape(channels, -1)
            for i in range(channels):
                for j in range(i + 1):
                    # Not @: BLAS would divide it among threads, which costs seven times as much.
                    self.products[i, j] += np.einsum('p,p', pixels[i], pixels[j])
                    self.products[j, i] = self.products[i, j]
        self.count += len(images)

    def merge(self, other: 'Sums') -> None:
        """Add the images that `other` has counted."""
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def result(self) -> Statistics:
        """Return the statistics; each vector's entry of largest magnitude is positive."""
        pixel_count = self.count * self.total[0].size
        mean = self.total.sum(axis=(1, 2)) / pixel_count
        variances, vectors = np.linalg.eigh(self.products / pixel_count - np.outer(mean, mean))
        variances, vectors = variances[::-1], vectors[:, ::-1]  # eigh sorts upwards
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
        return Statistics(
            mean_image=(np.moveaxis(self.total, 0, -1) / self.count).astype(np.float32, order='C'),
            colour_std=np.sqrt(np.maximum(variances, 0)).astype(np.float32),
            colour_vectors=(vectors * np.sign(largest)).astype(np.float32),
        )


def save(path: Path, statistics: Statistics, count: int) -> None:
    """Write the statistics of `count` decoded images atomically; the same bytes each time."""
    with files.atomic_write(path) as scratch, scratch.open('wb') as file:
        # Files of earlier versions have 'count', and are of the images before encoding.
        np.savez(file, count_decoded=np.int64(count), **vars(statistics))


def load(path: Path) -> tuple[Statistics, int]:
    """Return the statistics in a file, and the number of images they were computed from.

    Raises:
        OSError, ValueError, KeyError: the file is missing, damaged, or of images before encoding.
    """
    try:
        with np.load(path) as file:
            names = ('mean_image', 'colour_std', 'colour_vectors')
            return Statistics(*(file[name] for name in names)), int(file['count_decoded'])
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(str(error)) from None


def far_from(found: Statistics, known: Statistics) -> str | None:
    """Return in words what differs much from known colours; None if nothing does.

    Much is a tenth of a standard deviation, or ten degrees of a direction.
    """
    ratios = found.colour_std / known.colour_std
    if np.abs(ratios - 1).max() > 0.1:
        pairs = zip(found.colour_std, known.colour_std, strict=True)
        values = ', '.join(f'{ours:.1f} for {theirs:.1f}' for ours, theirs in pairs)
        return f'the colours vary otherwise than they should (standard deviations {values})'
    cosines = np.abs((found.colour_vectors * known.colour_vectors).sum(axis=0))
    if cosines.min() < np.cos(np.radians(10)):
        return 'the colours vary in other directions than they should'
    return None
