"""Confidence intervals for the difference between two recipes, from a few seeds and one test set.

Both recipes are trained with the same seeds and tested on the same images, so everything is
computed on the paired differences d[s, i] = (ours wrong) - (base wrong) for seed s and image i,
each -1, 0 or 1.

Two sources of chance are crossed: other seeds would give other nets, and other images would be
easier or harder. With d[s, i] = mean + seed[s] + image[i] + rest[s, i], S seeds and N images, let
A, B and C be the mean squares of seeds, images and rest, each divided by S N. The variance of the
mean is estimated by

    V = max(A + B - C, A)

(Searle, Casella, McCulloch, *Variance Components*, 1992, chapter 4: a negative component is taken
as zero), and the interval is mean -+ t sqrt(V) with Student's t of

    V^2 / (A^2 / (S - 1) + B^2 / (N - 1) + C^2 / ((S - 1) (N - 1)))

degrees of freedom (Satterthwaite, *An approximate distribution of estimates of variance
components*, Biometrics Bulletin 2, 1946). In simulations with a known difference, for nine mixtures
of the two sources, it covers that difference in 93.0 to 97.0 % of the cases with 3 seeds, in 94.2
to 95.7 % with 5 and in 95.0 to 95.7 % with 10 (tests/test_intervals.py). With two seeds it covers
too little, so an interval needs three.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST_SEEDS = 3
ROUNDING = 1e-15  # of a variance; that of a single image of 10,000 is some 1e-10


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean difference in error; all values are fractions, positive where ours is worse.

    low, high: the interval; p: two-sided, for no difference. None with fewer than FEWEST_SEEDS
        seeds, and where the seeds agree so exactly that they show no variance.
    spread: the standard deviation of the seeds' differences; None with a single seed.
    error: the mean error of ours.
    p_holm: p corrected for the number of comparisons, see `holm`.
    """

    mean: float
    seeds: int
    images: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    spread: float | None = None
    error: float = float('nan')
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Return whether the interval exists and does not contain zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def within(self, margin: float) -> bool:
        """Return whether the interval exists and is inside +-margin."""
        ends = self.low, self.high
        return all(end is not None and abs(end) <= margin for end in ends)


def difference(ours: np.ndarray, base: np.ndarray) -> Difference:
    """Compare ours with the base, paired by seed and by image.

    Args:
        ours, base: bool [S, N], wrong or not; row s has the same seed in both.
    """
    d = ours.astype(np.float64) - base.astype(np.float64)
    seeds, images = d.shape
    spread = float(d.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    found = Difference(float(d.mean()), seeds, images, spread=spread, error=float(ours.mean()))
    if seeds < FEWEST_SEEDS:
        return found
    if not d.any():
        return dataclasses.replace(found, low=0.0, high=0.0, p=1.0)
    _, variance, freedom = variance_of_mean(d)
    if variance < ROUNDING:
        return found
    half = float(half_width(variance, freedom))
    p = float(2 * stats.t.sf(abs(found.mean) / np.sqrt(variance), freedom))
    return dataclasses.replace(found, low=found.mean - half, high=found.mean + half, p=p)


def variance_of_mean(d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of d [..., S, N], its variance and that one's degrees of freedom: [...]."""
    seeds, images = d.shape[-2:]
    mean, by_seed, by_image = d.mean(axis=(-2, -1)), d.mean(axis=-1), d.mean(axis=-2)
    rest = d - by_seed[..., None] - by_image[..., None, :] + mean[..., None, None]
    a = by_seed.var(axis=-1, ddof=1) / seeds
    b = by_image.var(axis=-1, ddof=1) / images
    rest_freedom = (seeds - 1) * (images - 1)
    c = np.sum(rest**2, axis=(-2, -1)) / rest_freedom / (seeds * images)
    variance = np.maximum(a + b - c, a)
    spread = a**2 / (seeds - 1) + b**2 / (images - 1) + c**2 / rest_freedom
    return mean, variance, variance**2 / np.where(spread > 0, spread, 1)


def half_width(variance: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return half the width of the interval: [...]."""
    return stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    In ascending order each is multiplied by how many are left, and is no smaller than the one
    before: the chance that any of the null hypotheses rejected at 0.05 is true is below 0.05.
    """
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def over_images(gain: np.ndarray) -> tuple[float, float, float]:
    """Return (mean, low, high) of [N]: the interval over other images, with these very nets."""
    mean = float(gain.mean())
    half = float(stats.norm.ppf((1 + LEVEL) / 2) * gain.std(ddof=1) / np.sqrt(len(gain)))
    return mean, mean - half, mean + half
