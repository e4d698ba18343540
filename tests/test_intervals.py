"""Intervals that cover a known difference as often as they say, in simulated predictions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from experiments import intervals

REPEATS, IMAGES = 4000, 300


def simulate(seeds: int, seed_std: float, idea_std: float, rest_std: float):
    """Wrong or not of two recipes, [REPEATS, seeds, IMAGES] each, and the true difference.

    An image is missed where difficulty + the recipe's own view of the image + the seed's luck +
    the rest exceeds a threshold; all are normal, so the expected error is the normal tail.
    """
    draw = np.random.default_rng([seeds, int(100 * seed_std), int(100 * rest_std)])

    def normal(std: float, *shape: int) -> np.ndarray:
        return std * draw.standard_normal(shape, np.float32)

    difficulty = normal(1.0, REPEATS, 1, IMAGES)
    both, expected = [], []
    for threshold, own in ((1.2, idea_std), (1.3, 0.0)):
        latent = difficulty + normal(own, REPEATS, 1, IMAGES)
        latent = latent + normal(seed_std, REPEATS, seeds, 1)
        both.append(latent + normal(rest_std, REPEATS, seeds, IMAGES) > threshold)
        total = np.sqrt(1 + own**2 + seed_std**2 + rest_std**2)
        expected.append(stats.norm.sf(threshold / total))
    return *both, expected[0] - expected[1]


# Seeds' luck: none, as large as the rest, dominating; images' share: none, some, nearly all.
SOURCES = list(itertools.product((0.0, 0.05, 0.15), ((0.0, 0.5), (0.3, 0.5), (1.0, 0.1))))


@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize(('seed_std', 'of_images'), SOURCES)
def test_the_interval_covers_the_true_difference(seeds, seed_std, of_images):
    """93 to 97 %: the Monte-Carlo error of 4,000 repeats is 0.3 %."""
    ours, base, true = simulate(seeds, seed_std, *of_images)
    mean, variances = intervals.crossed(ours.astype(np.float64) - base)
    half = intervals.half_width(variances, seeds)
    coverage = np.mean(np.abs(mean - true) <= half)
    assert 0.93 <= coverage <= 0.97, coverage


def test_seeing_one_source_alone_does_not_cover():
    """Why all this: the images' interval where seeds differ, the seeds' where images do."""
    ours, base, true = simulate(3, 0.15, 0.3, 0.5)
    mean, (of_seeds, of_images, _) = intervals.crossed(ours.astype(np.float64) - base)
    assert np.mean(np.abs(mean - true) <= 1.96 * np.sqrt(of_images)) < 0.5
    assert np.mean(np.abs(mean - true) <= 1.96 * np.sqrt(of_seeds + of_images)) < 0.9
    ours, base, true = simulate(3, 0.0, 1.0, 0.1)
    mean, (of_seeds, *_) = intervals.crossed(ours.astype(np.float64) - base)
    assert np.mean(np.abs(mean - true) <= stats.t.ppf(0.975, 2) * np.sqrt(of_seeds)) < 0.7


def test_without_a_difference_p_values_are_small_as_seldom_as_they_say():
    draw = np.random.default_rng(0)
    difficulty = draw.standard_normal((600, 1, IMAGES))

    def wrong():
        luck = 0.1 * draw.standard_normal((600, 5, 1))
        return difficulty + luck + 0.5 * draw.standard_normal((600, 5, IMAGES)) > 1.2

    found = [intervals.difference(a, b) for a, b in zip(wrong(), wrong(), strict=True)]
    p = np.array([own.p for own in found])
    assert 0.02 < np.mean(p < 0.05) < 0.08
    assert 0.4 < np.mean(p < 0.5) < 0.6
    assert [own.decided for own in found] == [own.p < 0.05 for own in found]


def test_one_by_hand():
    """Two seeds, four images; the sums of squares of a two-way table without replication."""
    ours = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], bool)
    base = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], bool)
    found = intervals.difference(ours, base)
    # d = [[1, 0, 0, 1], [1, 0, 0, 0]]: the seeds' means 1/2 and 1/4, the images' 1, 0, 0, 1/2
    assert found.mean == 3 / 8
    assert found.spread == pytest.approx(0.25 / np.sqrt(2))
    rest = 2 * (0.125**2 + 0.125**2 + 0.125**2 + 0.375**2) / 3
    of_images = (np.var([1, 0, 0, 0.5], ddof=1) - rest / 2) / 4
    of_seeds = 0.03125 / 2
    t, z = 12.706204736, 1.959963985
    share = of_seeds / (of_seeds + of_images)
    cochran, satterthwaite = share * t + (1 - share) * z, stats.t.ppf(0.975, 1 / share**2)
    half = (cochran + satterthwaite) / 2 * np.sqrt(of_seeds + of_images)
    assert (found.low, found.high) == pytest.approx((3 / 8 - half, 3 / 8 + half))
    assert not found.decided


def test_seeds_that_agree_by_chance_decide_nothing():
    """Two seeds of one difference have no variance, but the images do."""
    ours, base = np.zeros((2, 400), bool), np.zeros((2, 400), bool)
    ours[0, :3], ours[1, 3:6], base[:, 6] = True, True, True
    found = intervals.difference(ours, base)
    assert found.mean == pytest.approx(2 / 400)
    assert found.spread == 0
    # d: each seed misses three images of its own, and not one that the base misses twice
    mean, (_, of_images, of_rest) = intervals.crossed(ours.astype(float) - base)
    assert of_rest > 0
    half = 2 / 3 * 1.959963985 * np.sqrt(of_images + of_rest)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.low < 0 < found.high
    assert not found.decided


def test_one_seed_says_nothing_of_others():
    found = intervals.difference(np.ones((1, 9), bool), np.zeros((1, 9), bool))
    assert (found.mean, found.low, found.p, found.spread) == (1.0, None, None, None)
    assert not found.decided


def test_the_same_nets_do_not_differ():
    wrong = np.random.default_rng(0).random((3, 50)) < 0.3
    found = intervals.difference(wrong, wrong)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.decided


def test_seeds_are_paired():
    """What all nets of a seed share is not counted as chance."""
    draw = np.random.default_rng(3)
    base = draw.random((3, 400)) < np.array([[0.1], [0.3], [0.5]])
    worse = base | (draw.random((3, 400)) < 0.1)
    paired = intervals.difference(worse, base)
    crossed_over = intervals.difference(worse[[1, 2, 0]], base)
    assert paired.mean == pytest.approx(crossed_over.mean)
    assert paired.decided
    assert not crossed_over.decided


@pytest.mark.parametrize(
    ('p', 'corrected'),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm's steps: x4, x3, x2, x1
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p, corrected):
    assert intervals.holm(p) == pytest.approx(corrected)


def test_over_images_covers():
    draw = np.random.default_rng(5)
    truth, hits = 0.1, 0
    for _ in range(500):
        _, low, high = intervals.over_images((draw.random(800) < truth).astype(float))
        hits += low <= truth <= high
    assert 0.92 < hits / 500 < 0.98
