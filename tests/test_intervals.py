"""Test that intervals cover a known difference at their level, in simulated predictions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from experiments import intervals

REPEATS, IMAGES = 4000, 300


def simulate(seeds: int, seed_std: float, idea_std: float, rest_std: float):
    """Simulate wrong or not of two recipes, [REPEATS, seeds, IMAGES] each, and the true difference.

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


@pytest.mark.parametrize('seeds', [3, 5, 10])
@pytest.mark.parametrize(('seed_std', 'of_images'), SOURCES)
def test_the_interval_covers_the_true_difference(seeds, seed_std, of_images):
    """Check coverage of 93 to 97 %; the Monte-Carlo error of 4,000 repeats is 0.3 %."""
    ours, base, true = simulate(seeds, seed_std, *of_images)
    mean, variance, freedom = intervals.variance_of_mean(ours.astype(np.float64) - base)
    coverage = np.mean(np.abs(mean - true) <= intervals.half_width(variance, freedom))
    assert 0.93 <= coverage <= 0.97, coverage


def test_an_interval_for_one_source_alone_does_not_cover():
    """Check that an interval over images alone, or over seeds alone, covers too little."""
    ours, base, true = simulate(3, 0.15, 0.3, 0.5)
    d = ours.astype(np.float64) - base
    off = np.abs(d.mean(axis=(-2, -1)) - true)
    of_images = d.mean(axis=-2).var(axis=-1, ddof=1) / IMAGES
    assert np.mean(off <= 1.96 * np.sqrt(of_images)) < 0.7
    ours, base, true = simulate(3, 0.0, 1.0, 0.1)
    d = ours.astype(np.float64) - base
    of_seeds = d.mean(axis=-1).var(axis=-1, ddof=1) / 3
    off = np.abs(d.mean(axis=(-2, -1)) - true)
    assert np.mean(off <= stats.t.ppf(0.975, 2) * np.sqrt(of_seeds)) < 0.7


def test_without_a_difference_p_values_are_uniform():
    draw = np.random.default_rng(0)
    difficulty = draw.standard_normal((600, 1, IMAGES))

    def wrong():
        luck = 0.1 * draw.standard_normal((600, 5, 1))
        return difficulty + luck + 0.5 * draw.standard_normal((600, 5, IMAGES)) > 1.2

    found = [intervals.difference(a, b) for a, b in zip(wrong(), wrong(), strict=True)]
    p = np.array([own.p for own in found])
    assert 0.02 < np.mean(p < 0.05) < 0.08
    assert 0.4 < np.mean(p < 0.5) < 0.6
    assert [own.significant for own in found] == [own.p < 0.05 for own in found]


def test_one_by_hand():
    """Check three seeds and four images: mean squares of a two-way table without replication."""
    ours = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1]], bool)
    base = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    found = intervals.difference(ours, base)
    # d = [[1, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]]: sums of seeds 2, 1, 2; of images 3, 0, 0, 2
    assert found.mean == pytest.approx(5 / 12)
    total = 5 - 25 / 12
    of_seeds, of_images = 9 / 4 - 25 / 12, 13 / 3 - 25 / 12  # sums of squares
    squares = of_seeds / 2, of_images / 3, (total - of_seeds - of_images) / 6
    a, b, c = (square / 12 for square in squares)
    assert a + b - c > a
    variance = a + b - c
    freedom = variance**2 / (a**2 / 2 + b**2 / 3 + c**2 / 6)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((5 / 12 - half, 5 / 12 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(5 / 12 / np.sqrt(variance), freedom))
    assert found.spread == pytest.approx(np.std([0.5, 0.25, 0.5], ddof=1))
    assert not found.significant


def test_equivalence_is_an_interval_inside_the_margin():
    inside = intervals.Difference(0.001, 5, 100, low=-0.001, high=0.003)
    assert inside.within(0.003)
    assert not inside.within(0.0029)
    assert not intervals.Difference(0.0, 1, 100).within(1.0)


def test_seeds_that_agree_exactly_have_no_interval():
    """Check three seeds that miss three different images each: no variance is seen."""
    ours, base = np.zeros((3, 400), bool), np.zeros((3, 400), bool)
    ours[0, :3], ours[1, 3:6], ours[2, 6:9] = True, True, True
    found = intervals.difference(ours, base)
    assert found.mean == pytest.approx(3 / 400)
    assert (found.spread, found.low, found.p) == (0, None, None)
    assert not found.significant


@pytest.mark.parametrize('seeds', [1, 2])
def test_too_few_seeds_have_no_interval(seeds):
    found = intervals.difference(np.ones((seeds, 9), bool), np.zeros((seeds, 9), bool))
    assert (found.mean, found.low, found.p) == (1.0, None, None)
    assert not found.significant


def test_the_same_nets_do_not_differ():
    wrong = np.random.default_rng(0).random((3, 50)) < 0.3
    found = intervals.difference(wrong, wrong)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.significant


def test_seeds_are_paired():
    """Check that effects shared by all nets of a seed do not count as chance."""
    draw = np.random.default_rng(3)
    base = draw.random((3, 400)) < np.array([[0.1], [0.3], [0.5]])
    worse = base | (draw.random((3, 400)) < 0.1)
    paired = intervals.difference(worse, base)
    crossed_over = intervals.difference(worse[[1, 2, 0]], base)
    assert paired.mean == pytest.approx(crossed_over.mean)
    assert paired.significant
    assert not crossed_over.significant


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
