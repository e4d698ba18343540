"""Find the rows of a large array that are nearest to given ones (paper, figure 4)."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alexnet_jax.data.records import StoredImages

BLOCK = 256  # rows in memory at a time: images of 256 px take 50 MB, features of conv1 300 MB
SPARE = 8  # candidates of a block beyond k, as a matrix product rounds


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Features [N, ...] that are computed whenever they are indexed, in place of an array."""

    images: np.ndarray | StoredImages  # uint8 [N, H, W, C], as stored
    extract: Callable[[np.ndarray], np.ndarray]  # to float32 [b, ...], see Trained.extractor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, ...)."""
        return len(self.images), *self[:0].shape[1:]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Compute rows, float32 [b, ...]."""
        return self.extract(self.images[rows])


class Neighbours(NamedTuple):
    """The neighbours of Q queries, nearest first."""

    index: np.ndarray  # int64 [Q, k], rows of the features
    distance: np.ndarray  # float64 [Q, k], Euclidean


def nearest(
    queries: np.ndarray, features: np.ndarray | Computed, k: int, block: int = BLOCK
) -> Neighbours:
    """Find the k nearest rows by Euclidean distance, in float64.

    In each block, |r|^2 - 2 q.r selects k + SPARE candidates. Their distances are sums of squared
    differences, so a duplicate is at distance 0, and rows at the same distance are ranked by index.
    The result is exact unless more than k + SPARE rows of a block are as near as the k-th, up to
    rounding (about 1e-16 of |q|^2 + |r|^2): any of these may then be among the k.

    Args:
        queries: float32 [Q, D], or [Q, ...], which is flattened.
        features: float32 [N, D], or [N, ...]; a row that is not finite is ranked last.
        k: neighbours of each query; all N rows if there are fewer.
        block: rows in memory at a time.
    """
    width = math.prod(features.shape[1:])
    queries = np.asarray(queries, np.float64).reshape(len(queries), width)
    squared, index = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    for start in range(0, features.shape[0], block):
        rows = np.asarray(features[start : start + block], np.float64).reshape(-1, width)
        rough = np.sum(rows**2, axis=1) - 2 * queries @ rows.T  # without |q|^2, the same for all
        near = np.argsort(rough, axis=1, kind='stable')[:, : k + SPARE]
        exact = np.empty(near.shape)
        for own, query, candidates in zip(exact, queries, near, strict=True):
            own[:] = np.sum((rows[candidates] - query) ** 2, axis=1)
        squared, index = np.hstack([squared, exact]), np.hstack([index, start + near])
        order = np.lexsort((index, squared))[:, :k]  # by distance, then by index
        squared, index = (np.take_along_axis(x, order, 1) for x in (squared, index))
    return Neighbours(index, np.sqrt(squared))
