"""Mean image and principal colours of the training images (paper, section 4.1), in one pass.

They are computed from the decoded records that training reads, because JPEG encoding changes the
mean image by up to one of 255 levels. Preparation and training therefore get identical values.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import files, machine

CHUNK_BYTES = 2**24  # of images in memory at once, in each thread
CHUNK_VALUES = 2**18  # summed at once: 2 MiB of float64 fit in a cache


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean image and principal components of the pixel colours."""

    mean_image: np.ndarray  # float32 [H, W, C], 0-255 units
    colour_std: np.ndarray  # float32 [C], descending: roots of the pixel covariance's eigenvalues
    colour_vectors: np.ndarray  # float32 [C, C]: column i belongs to colour_std[i]


NAMES = tuple(field.name for field in fields(Statistics))


def of_images(images: Any) -> Statistics:
    """Compute the statistics of uint8 images [N, H, W, C], an array or `records.StoredImages`.

    All summands are integers, which float64 adds exactly up to 2^53: 2.1 million white images of
    256 x 256 px. So the result depends neither on the order of the images nor on their partition.
    Each vector's largest entry is positive.
    """
    size = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    total = products = np.zeros(())
    with ThreadPoolExecutor(machine.cores()) as pool:
        starts = range(0, len(images), size)
        for more in pool.map(lambda start: sums(images[start : start + size]), starts):
            total, products = total + more[0], products + more[1]
    pixel_count = len(images) * total[0].size
    mean = total.sum(axis=(1, 2)) / pixel_count
    variances, vectors = np.linalg.eigh(products / pixel_count - np.outer(mean, mean))
    variances, vectors = variances[::-1], vectors[:, ::-1]  # eigh sorts upwards
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return Statistics(
        mean_image=(np.moveaxis(total, 0, -1) / len(images)).astype(np.float32, order='C'),
        colour_std=np.sqrt(np.maximum(variances, 0)).astype(np.float32),
        colour_vectors=(vectors * np.sign(largest)).astype(np.float32),
    )


def sums(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum uint8 images [N, H, W, C]: float64 [C, H, W], and products of channels [C, C]."""
    *size, channels = images.shape[1:]
    total, products = np.zeros((channels, *size)), np.zeros((channels, channels))
    for part in np.array_split(images, 1 + images.size // CHUNK_VALUES):
        planes = part.reshape(-1, channels).T.astype(np.float64, order='C')  # [C, N H W]
        # Not planes @ planes.T: BLAS starts threads, which doubles the processor time.
        products += np.einsum('ip,jp->ij', planes, planes)
        total += planes.reshape(channels, len(part), *size).sum(axis=1)
    return total, products


def save(path: Path, statistics: Statistics, count: int) -> None:
    """Write the statistics of `count` decoded images atomically; the same bytes each time."""
    with files.atomic_write(path) as scratch, scratch.open('wb') as file:
        # Earlier versions wrote 'count', for the images before encoding.
        np.savez(file, count_decoded=np.int64(count), **vars(statistics))
