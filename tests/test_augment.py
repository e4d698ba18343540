"""Augmentation against plain NumPy in float64, image by image; draws against the 2012 text."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.config import MeshShape
from alexnet_jax.model import augment
from alexnet_jax.model.augment import Draws, Preprocess, Statistics
from alexnet_jax.parallel import mesh

RECIPE = Preprocess(
    resize_px=256,
    image_px=256,
    crop=True,
    mirror=True,
    images_per_crop=1,
    mean='image',
    colour_noise=0.1,
    noise_until_epoch=68.0,
    noise_divisor=1.1,
    scale=1.0,
)
PAPER = SimpleNamespace(input_px=224, channels=3), RECIPE
SMALL = {'resize_px': 16, 'image_px': 16, 'input_px': 11}  # the slack, 5, is odd


def recipe(input_px=224, channels=3, **changes):
    """Return what `augment` reads of a net, and the paper's recipe with changes."""
    net = SimpleNamespace(input_px=input_px, channels=channels)
    return net, dataclasses.replace(RECIPE, **changes)


def layout_of(shape, batch_size):
    if jax.device_count() < math.prod(shape):
        pytest.skip(f'{math.prod(shape)} devices are wanted; tests/conftest.py makes eight')
    return mesh.make_layout(MeshShape(*shape), batch_size)


def images_of(count, side, channels, seed=0):
    shape = (count, side, side, channels)
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def statistics_of(side, channels, seed=1):
    rng = np.random.default_rng(seed)
    return Statistics(
        mean_image=jnp.asarray(rng.uniform(50, 200, (side, side, channels)), jnp.float32),
        colour_basis=jnp.asarray(rng.normal(0, 40, (channels, channels)), jnp.float32),
    )


# --------------------------------------------------------------------------------------- the draws


@pytest.fixture(scope='module')
def many():
    """16,384 images' worth of the paper's choices."""
    draws = jax.jit(lambda key: augment.draw(key, 16_384, 3, *PAPER))(jax.random.key(0))
    return jax.tree.map(np.asarray, draws)


def test_offsets_are_uniform_in_0_to_32_both_ends_included(many):
    assert many.offset.shape == (16_384, 2)
    assert many.offset.dtype == np.int32
    for axis in (0, 1):
        counts = np.bincount(many.offset[:, axis], minlength=33)
        assert len(counts) == 33
        expected = 16_384 / 33
        assert np.sum((counts - expected) ** 2) / expected < 67  # chi squared, 32 degrees: p 3e-4


def test_draws_are_independent_of_each_other(many):
    """Rows, columns, mirrors and the three noises of an image, and each with the next image's;
    and the three arrays number by number, as one key for two of them would show."""
    columns = np.column_stack([*many.offset.T, many.mirror, *many.noise.T])
    neighbours = np.column_stack([columns[:-1], columns[1:]])
    numbers = np.column_stack([array.reshape(-1)[:16_384] for array in many])
    for table in (neighbours, numbers):
        correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
        assert np.abs(correlation).max() < 5 / np.sqrt(16_384)


def test_half_of_the_images_are_mirrored(many):
    assert many.mirror.dtype == bool
    assert abs(many.mirror.mean() - 0.5) < 4 * 0.5 / np.sqrt(16_384)


def test_colour_noise_is_gaussian_of_deviation_a_tenth(many):
    assert many.noise.shape == (16_384, 3)
    assert many.noise.std(axis=0) == pytest.approx([0.1] * 3, rel=4 / np.sqrt(2 * 16_384))
    assert np.abs(many.noise.mean(axis=0)).max() < 4 * 0.1 / np.sqrt(16_384)
    beyond = np.mean(np.abs(many.noise) > 0.2)
    assert beyond == pytest.approx(0.0455, rel=0.1)  # a Gaussian's share beyond two deviations


@pytest.mark.parametrize('batch_size', [128, 100, 20])
def test_32_images_in_a_row_share_crop_and_mirror_but_not_noise(batch_size):
    """The source's way; a batch may end within a share."""
    found = augment.draw(jax.random.key(2), batch_size, 3, *recipe(images_per_crop=32))
    assert found.offset.shape == (batch_size, 2)
    assert found.mirror.shape == (batch_size,)
    blocks = [slice(i, i + 32) for i in range(0, batch_size, 32)]
    for block in blocks:
        assert len(np.unique(found.offset[block], axis=0)) == 1
        assert len(np.unique(found.mirror[block])) == 1
    assert len({tuple(map(int, found.offset[b.start])) for b in blocks}) == len(blocks)
    assert len(np.unique(found.noise)) == found.noise.size


def test_what_is_switched_off_is_the_centre_view():
    off = augment.draw(jax.random.key(0), 8, 3, *recipe(crop=False, mirror=False, colour_noise=0.0))
    centre = augment.fixed(8, 3, *PAPER)
    jax.tree.map(np.testing.assert_array_equal, off, centre)
    only_crop = augment.draw(jax.random.key(0), 64, 3, *recipe(mirror=False, colour_noise=0.0))
    assert len(np.unique(only_crop.offset)) > 10
    assert not only_crop.mirror.any()
    assert not only_crop.noise.any()


def test_draws_are_a_function_of_the_key():
    one, same, other = (augment.draw(jax.random.key(k), 64, 3, *PAPER) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for a, b in zip(one, other, strict=True):
        assert np.any(np.asarray(a) != np.asarray(b))


@pytest.mark.parametrize('shape', [(4, 2), (8, 1)])
def test_the_same_bits_and_pixels_on_every_mesh(shape):
    """Drawn and applied inside jit on a batch that is split over 'data', as in training."""
    small = recipe(**SMALL)
    images, statistics = images_of(16, 16, 3), statistics_of(16, 3)

    @jax.jit
    def prepare(key, images):
        draws = augment.draw(key, 16, 3, *small)
        return draws, augment.apply(images, draws, statistics, *small, True)

    def on(shape):
        placed = jax.device_put(images, layout_of(shape, 16).batch_sharding)
        return prepare(jax.random.key(3), placed)

    (draws, pixels), (expected_draws, expected) = on(shape), on((1, 1))
    for drawn, wanted in zip(draws, expected_draws, strict=True):
        if np.issubdtype(drawn.dtype, np.floating):
            # jax 0.12 compiles the inverse error function by shard, and one of 48 normal numbers
            # is off by a unit in the last place; the random bits behind them are the same.
            np.testing.assert_array_max_ulp(np.asarray(drawn), np.asarray(wanted), maxulp=1)
        else:
            np.testing.assert_array_equal(drawn, wanted)
    np.testing.assert_allclose(pixels, expected, rtol=1e-6, atol=1e-4)  # 255 in float32: 3e-5


# ------------------------------------------------------------------------------- what they do


def numpy_apply(images, draws, statistics, net, recipe, noise_on):
    """The reference, for images already at `image_px`: one image after the other, float64."""
    px, mean = net.input_px, np.asarray(statistics.mean_image, np.float64)
    edge = (recipe.image_px - px) // 2
    if recipe.mean == 'image':
        mean = mean[edge : edge + px, edge : edge + px]
    elif recipe.mean == 'channel':
        mean = mean.mean(axis=(0, 1))
    else:
        mean = 0.0
    result = []
    for image, (top, left), mirror, factors in zip(images, *map(np.asarray, draws), strict=True):
        pixels = np.asarray(image, np.float64)[top : top + px, left : left + px]
        if mirror:
            pixels = np.flip(pixels, axis=1)
        pixels = pixels - mean
        if noise_on and recipe.colour_noise:
            components = np.asarray(statistics.colour_basis, np.float64).T
            noise = sum(f * component for f, component in zip(factors, components, strict=True))
            pixels = (pixels + noise) / recipe.noise_divisor
        pixels = pixels * recipe.scale
        if pixels.shape[-1] == 1:
            pixels = np.concatenate([pixels] * net.channels, axis=-1)
        result.append(pixels)
    return np.stack(result)


@pytest.mark.parametrize('noise_on', [False, True])
@pytest.mark.parametrize(
    ('stored', 'changes'),
    [
        (3, {}),
        (3, {'mean': 'channel'}),
        (3, {'mean': 'none', 'scale': 1 / 255}),
        (3, {'colour_noise': 0.0}),
        (3, {'noise_divisor': 1.0}),
        (1, {'channels': 3}),  # grey, repeated
        (1, {'channels': 1}),
        (3, {'input_px': 16}),  # no slack
    ],
)
def test_apply_equals_numpy(stored, changes, noise_on):
    small = recipe(**(SMALL | changes))
    images, statistics = images_of(12, 16, stored), statistics_of(16, stored)
    draws = augment.draw(jax.random.key(1), 12, stored, *small)
    # The switch is traced, as it is in the training step.
    found = jax.jit(lambda on: augment.apply(images, draws, statistics, *small, on))(noise_on)
    expected = numpy_apply(images, draws, statistics, *small, noise_on)
    assert found.dtype == jnp.float32
    net, scale = small[0], small[1].scale
    assert found.shape == expected.shape == (12, net.input_px, net.input_px, net.channels)
    assert np.abs(found - expected).max() < 1e-4 * scale  # 255 in float32: 3e-5


def test_the_mean_does_not_move_with_the_crop():
    """Images that are the mean image itself: zero at the centre, and not when cropped elsewhere."""
    small = recipe(**SMALL | {'colour_noise': 0.0})
    mean = images_of(1, 16, 3)
    statistics = Statistics(mean[0].astype(jnp.float32), jnp.eye(3))
    centre = augment.apply(mean, augment.fixed(1, 3, *small), statistics, *small)
    corner = augment.apply(mean, augment.fixed(1, 3, *small, view=1), statistics, *small)
    assert not centre.any()
    assert np.abs(corner).max() > 10


def test_noise_is_one_colour_an_image_along_the_components():
    """Black images and no mean: every pixel is the sum of factor x deviation x eigenvector."""
    plain = recipe(**SMALL | {'mean': 'none', 'noise_divisor': 1.0})
    statistics = statistics_of(16, 3)
    factors = np.eye(3, dtype=np.float32)
    draws = augment.fixed(3, 3, *plain)._replace(noise=jnp.asarray(factors))
    found = augment.apply(jnp.zeros((3, 16, 16, 3), jnp.uint8), draws, statistics, *plain, True)
    for component in range(3):
        colour = statistics.colour_basis[:, component]
        np.testing.assert_allclose(found[component].reshape(-1, 3), np.tile(colour, (121, 1)))


def test_noise_on_grey_images_is_in_brightness():
    """One component, the grey value: all of an image is lifted, its margin too."""
    plain = recipe(**SMALL | {'mean': 'none', 'noise_divisor': 1.0, 'channels': 1})
    statistics = Statistics(jnp.zeros((16, 16, 1)), jnp.full((1, 1), 90.0))
    images = images_of(2, 16, 1)
    draws = augment.fixed(2, 1, *plain)
    lifted = draws._replace(noise=jnp.array([[0.1], [-0.2]]))
    before = augment.apply(images, draws, statistics, *plain, True)
    after = augment.apply(images, lifted, statistics, *plain, True)
    difference = np.asarray(after - before)
    np.testing.assert_allclose(difference[0], np.full_like(difference[0], 9.0), atol=1e-4)
    np.testing.assert_allclose(difference[1], np.full_like(difference[1], -18.0), atol=1e-4)


# --------------------------------------------------------------------------------------- ten views


def test_ten_views_are_centre_and_corners_and_their_mirror_images():
    """In the documented order; each cut out by hand from one image."""
    plain = recipe(**SMALL | {'mean': 'none'})
    images = images_of(2, 16, 3)
    windows = [
        images[:, 2:13, 2:13],
        *(images[:, y : y + 11, x : x + 11] for y in (0, 5) for x in (0, 5)),
    ]
    windows += [window[:, :, ::-1] for window in windows]

    @jax.jit
    def view(number):
        return augment.apply(
            images, augment.fixed(2, 3, *plain, number), statistics_of(16, 3), *plain
        )

    found = [view(number) for number in range(10)]
    for ours, expected in zip(found, windows, strict=True):
        np.testing.assert_array_equal(ours, expected.astype(np.float32))
    assert len({np.asarray(pixels).tobytes() for pixels in found}) == 10


def test_2012_sizes_put_the_centre_at_16_and_the_corners_at_0_and_32():
    offsets = [augment.fixed(1, 3, *PAPER, view).offset[0].tolist() for view in range(5)]
    assert offsets == [[16, 16], [0, 0], [0, 32], [32, 0], [32, 32]]


# ---------------------------------------------------------------------------------------- resizing


def bilinear(image, side):
    """Enlarged by interpolation between pixel centres; beyond the outermost ones, their values."""
    image = np.asarray(image, np.float64)
    scale = len(image) / side
    places = np.clip((np.arange(side) + 0.5) * scale - 0.5, 0, len(image) - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, len(image) - 1)
    part = places - below
    rows = image[below] * (1 - part)[:, None, None] + image[above] * part[:, None, None]
    return rows[:, below] * (1 - part)[:, None] + rows[:, above] * part[:, None]


def resized(images, side):
    """Return stored images after `apply` with resizing only."""
    count, _, _, channels = images.shape
    plain = recipe(resize_px=side, image_px=side, input_px=side, channels=channels, mean='none')
    draws = augment.fixed(count, channels, *plain)
    return np.asarray(
        augment.apply(images, draws, statistics_of(images.shape[1], channels), *plain)
    )


def assert_same_pixels(found, expected):
    assert np.abs(found - expected).max() < 1e-3  # float32 products of numbers up to 255


def test_enlarging_28_to_128_is_bilinear():
    images = images_of(3, 28, 1)
    expected = [bilinear(image, 128) for image in images]
    assert_same_pixels(resized(images, 128), expected)


def test_shrinking_is_antialiased_as_pil_does_it():
    images = images_of(2, 64, 1)
    for found, image in zip(resized(images, 24), images, strict=True):
        small = Image.fromarray(np.asarray(image[..., 0], np.float32)).resize(
            (24, 24), Image.Resampling.BILINEAR
        )
        assert_same_pixels(found[..., 0], np.asarray(small))


def test_the_mean_image_is_enlarged_with_the_images():
    """Stored at 28 px, crops of 112 from 128: what is subtracted is the enlarged mean's centre."""
    large = recipe(resize_px=128, image_px=128, input_px=112, channels=1, colour_noise=0.0)
    images, statistics = images_of(2, 28, 1), statistics_of(28, 1)
    draws = Draws(jnp.array([[0, 16], [5, 3]]), jnp.array([True, False]), jnp.zeros((2, 1)))
    found = augment.apply(images, draws, statistics, *large)
    enlarged = np.stack([bilinear(image, 128) for image in images])
    mean = bilinear(statistics.mean_image, 128)
    expected = numpy_apply(
        enlarged, draws, statistics._replace(mean_image=mean), *large, noise_on=False
    )
    assert_same_pixels(found, expected)


def test_a_black_margin_round_a_small_image():
    """Fashion-MNIST's way: resized to the crop's side, framed, and shifted by the crop."""
    framed = recipe(resize_px=12, image_px=16, input_px=12, channels=1, mean='none', colour_noise=0)
    images = np.random.default_rng(0).integers(1, 256, (3, 12, 12, 1), np.uint8)
    statistics = Statistics(jnp.zeros((12, 12, 1)), jnp.eye(1))
    draws = augment.Draws(
        offset=jnp.array([[2, 2], [0, 4], [4, 1]]),
        mirror=jnp.array([False, False, True]),
        noise=jnp.zeros((3, 1)),
    )
    found = np.asarray(augment.apply(jnp.asarray(images), draws, statistics, *framed))[..., 0]
    frame = np.pad(images[..., 0], ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    np.testing.assert_array_equal(found[0], images[0, ..., 0])  # the centre view loses nothing
    np.testing.assert_array_equal(found[1], frame[1, 0:12, 4:16])
    np.testing.assert_array_equal(found[2], frame[2, 4:16, 1:13][:, ::-1])


def test_the_mean_image_gets_the_margin_too():
    framed = recipe(resize_px=12, image_px=16, input_px=14, channels=1, colour_noise=0)
    mean = jnp.full((12, 12, 1), 7.0)
    images = jnp.full((1, 12, 12, 1), 7, jnp.uint8)
    statistics = Statistics(mean, jnp.eye(1))
    found = augment.apply(images, augment.fixed(1, 1, *framed), statistics, *framed)
    np.testing.assert_array_equal(found, 0)
