"""Find the rows of a large array that are nearest to given ones, exactly (paper, figure 4)."""

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from alexnet_jax.data.batches import prefetch

BLOCK = 256  # rows in memory at a time: images of 256 px take 50 MB, features of conv1 300 MB
EPSILON = np.finfo(np.float64).eps


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Features [N, ...] that are computed whenever they are indexed, in place of an array."""

    images: Callable[[slice], np.ndarray]  # uint8 [b, H, W, C], as stored
    extract: Callable[[np.ndarray], np.ndarray]  # to float32 [b, ...], see Trained.extractor
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, ...)."""
        return self.count, *self[:0].shape[1:]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Compute rows, float32 [b, ...]."""
        return self.extract(self.images(slice(*rows.indices(self.count))))


def blocks(rows: np.ndarray | Computed, size: int) -> Generator[np.ndarray]:
    """Yield all rows in order, float32 [b, ...], while a thread computes or reads the next ones."""

    def block(number: int) -> np.ndarray:
        return np.array(rows[number * size : (number + 1) * size], np.float32)

    return prefetch(block, 0, -(-rows.shape[0] // size))


class Neighbours(NamedTuple):
    """The neighbours of Q queries, nearest first."""

    index: np.ndarray  # int64 [Q, k], rows of the features
    distance: np.ndarray  # float64 [Q, k], Euclidean


def nearest(
    queries: np.ndarray, features: np.ndarray | Computed, k: int, block: int = BLOCK
) -> Neighbours:
    """Find the k nearest rows by Euclidean distance.

    Distances are sums of squared differences in float64, so the result is exact: a duplicate is at
    distance 0, and rows at the same distance are ranked by index. They are computed only for rows
    that may be among the nearest by |q|^2 - 2 q.r + |r|^2, which is off by at most `error`, by the
    usual bound of a scalar product.

    Args:
        queries: float32 [Q, D], or [Q, ...], which is flattened.
        features: float32 [N, D], or [N, ...]; a row that is not finite is ranked last.
        k: neighbours of each query; all N rows if there are fewer.
        block: rows in memory at a time.
    """
    width = math.prod(features.shape[1:])
    queries = np.asarray(queries, np.float64).reshape(len(queries), width)
    squared, index = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    start = 0
    for rows in blocks(features, block):
        rows = rows.reshape(len(rows), width).astype(np.float64)
        norms = np.sum(queries**2, axis=1)[:, None] + np.sum(rows**2, axis=1)
        rough, error = norms - 2 * queries @ rows.T, 2 * (width + 8) * EPSILON * norms
        most = np.hstack([squared, rough + error])
        place = min(k, most.shape[1]) - 1
        kth = np.partition(most, place, axis=1)[:, place, None]
        new = np.full(rough.shape, np.inf)
        for own, query, near in zip(new, queries, ~(rough - error > kth), strict=True):
            own[near] = np.sum((rows[near] - query) ** 2, axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(rows)), new.shape)
        squared, index = np.hstack([squared, new]), np.hstack([index, numbers])
        order = np.argsort(squared, axis=1, kind='stable')[:, :k]  # earlier rows come first
        squared, index = (np.take_along_axis(x, order, 1) for x in (squared, index))
        start += len(rows)
    return Neighbours(index, np.sqrt(squared))
