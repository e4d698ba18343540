"""Test streaming sums against a direct computation, exactness, and files."""

import numpy as np
import pytest

from alexnet_jax.data import statistics


def some(count=40, shape=(30, 20, 3), seed=0):
    """Images whose channels are correlated."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, *shape)) @ rng.normal(size=(shape[-1], shape[-1]))
    return np.clip(mixed * 50 + 120, 0, 255).astype(np.uint8)


def direct(images):
    """Mean image, standard deviations and eigenvectors in float64, all at once."""
    pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
    covariance = np.atleast_2d(np.cov(pixels, rowvar=False, bias=True))
    variances, vectors = np.linalg.eigh(covariance)
    return images.astype(np.float64).mean(axis=0), np.sqrt(variances[::-1]), vectors[:, ::-1]


@pytest.mark.parametrize('shape', [(30, 20, 3), (28, 28, 1), (1, 1, 3), (300, 7, 2)])
def test_against_a_direct_computation(shape):
    images = some(shape=shape)
    mean, stds, vectors = direct(images)
    found = statistics.of_images(images)
    # float32 has a relative precision of 6e-8.
    np.testing.assert_allclose(found.mean_image, mean, rtol=1e-6)
    np.testing.assert_allclose(found.colour_std, stds, rtol=1e-6)
    signs = np.sign((found.colour_vectors * vectors).sum(axis=0))
    np.testing.assert_allclose(found.colour_vectors, vectors * signs, atol=1e-6)
    largest = np.abs(found.colour_vectors).argmax(axis=0)
    assert (found.colour_vectors[largest, np.arange(shape[-1])] > 0).all()


def test_neither_order_nor_parts_matter(monkeypatch):
    images = some(50)
    expected = vars(statistics.of_images(images))
    monkeypatch.setattr(statistics, 'CHUNK_BYTES', 7 * images[0].size)
    for other in (images, images[::-1], np.roll(images, 13, axis=0)):
        for name, value in vars(statistics.of_images(other)).items():
            np.testing.assert_array_equal(value, expected[name])


def test_large_sums_are_exact():
    """White images but for one value, which rounding would lose in float32."""
    white = np.full((5, 256, 256, 3), 255, np.uint8)
    white[0, 0, 0] = 254
    total, products = statistics.sums(white)
    pixels = white.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(products, pixels.T @ pixels)
    np.testing.assert_array_equal(total, white.astype(np.int64).sum(axis=0).transpose(2, 0, 1))


def test_sums_of_as_many_white_images_as_imagenet_has_are_exact():
    _, white = statistics.sums(np.full((1, 256, 256, 3), 255, np.uint8))
    _, other = statistics.sums(np.full((1, 256, 256, 3), 254, np.uint8))
    products = white * 1_281_166 + other
    exact = 256 * 256 * (1_281_166 * 255**2 + 254**2)
    assert [[int(value) for value in row] for row in products] == [[exact] * 3] * 3


def test_saving_is_deterministic(tmp_path):
    computed = statistics.of_images(some())
    for name in ('a.npz', 'b.npz'):
        statistics.save(tmp_path / name, computed, 40)
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    found = np.load(tmp_path / 'a.npz')
    assert found['count_decoded'] == 40
    for name, value in vars(computed).items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32
