"""Preprocessing and augmentation of images, on the device.

`draw` makes the random choices of a batch in the global view, so that they are the same on every
mesh; `apply` applies them. Training crops, the centre view and the ten views differ only in these
choices. Images are uint8 [B, H, W, C] in 0-255 units, and stay in these units in the 2012 recipe.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.model.alexnet import Net

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The preprocessing recipe (paper, section 4.1, with details from the source)."""

    resize_px: int  # side that images are resized to: 256 in 2012
    image_px: int  # side of the square that crops are taken from, with a black margin: 256 in 2012
    crop: bool  # random offsets in training; else the centre
    mirror: bool  # mirrored with probability 1/2 in training
    images_per_crop: int  # that share offset and mirror, in a row: 32 in the source, 1 in the paper
    mean: Literal['image', 'channel', 'none']  # what is subtracted, see `_mean`
    colour_noise: float  # deviation of the factor on each principal component: 0.1; 0 is off
    noise_until_epoch: float  # colour noise ends here: 68 of 95 in the source
    noise_divisor: float  # divides (image - mean + noise) while the noise is on: 1.1 in the source
    scale: float  # multiplies the result; 1 in 2012, 1 / 255 in some tutorials


class Statistics(NamedTuple):
    """Pixel statistics of the training split, at the stored resolution; float32.

    mean_image: [H, W, C].
    colour_basis: [C, C]; column i is the i-th principal component times the deviation along it.
    """

    mean_image: Array
    colour_basis: Array


class Draws(NamedTuple):
    """The random choices of a batch.

    offset: int32 [B, 2], top and left edge of the crop, px.
    mirror: bool [B].
    noise: float32 [B, C], the factors N(0, colour_noise) on the components.
    """

    offset: Array
    mirror: Array
    noise: Array


def draw(key: Array, batch_size: int, channels: int, net: Net, recipe: Preprocess) -> Draws:
    """Draw a training batch's choices; offsets are uniform in 0..image_px - input_px, inclusive."""
    offset_key, mirror_key, noise_key = jax.random.split(key, 3)
    centre = fixed(batch_size, channels, net, recipe)
    shared = -(-batch_size // recipe.images_per_crop)
    offset, mirror, noise = centre
    if recipe.crop:
        slack = recipe.image_px - net.input_px
        offset = jax.random.randint(offset_key, (shared, 2), 0, slack + 1)
        offset = jnp.repeat(offset, recipe.images_per_crop, axis=0)[:batch_size]
    if recipe.mirror:
        mirror = jax.random.bernoulli(mirror_key, 0.5, (shared,))
        mirror = jnp.repeat(mirror, recipe.images_per_crop, axis=0)[:batch_size]
    if recipe.colour_noise:
        noise = recipe.colour_noise * jax.random.normal(noise_key, (batch_size, channels))
    return Draws(offset, mirror, noise)


def fixed(
    batch_size: int, channels: int, net: Net, recipe: Preprocess, view: Array | int = 0
) -> Draws:
    """Return the choices of a test view: 0 is the centre, 1-4 the corners, 5-9 their mirror images.

    The ten views (paper, section 4.1) are taken from the central `image_px` square.
    """
    end = recipe.image_px - net.input_px
    corners = jnp.array([(end // 2, end // 2), (0, 0), (0, end), (end, 0), (end, end)], jnp.int32)
    view = jnp.asarray(view)
    return Draws(
        offset=jnp.broadcast_to(corners[view % 5], (batch_size, 2)),
        mirror=jnp.broadcast_to(view >= 5, (batch_size,)),
        noise=jnp.zeros((batch_size, channels)),
    )


def apply(
    images: Array,
    draws: Draws,
    statistics: Statistics,
    net: Net,
    recipe: Preprocess,
    noise_on: Array | bool = False,
) -> Array:
    """Map uint8 `images` [B, H, W, C] to conv1's input, float32 [B, input_px, input_px, channels].

    Grey images are repeated in all channels of the net's input.

    Args:
        images: of any resolution; they are resized to `resize_px` by bilinear interpolation, and
            padded to `image_px` by a black margin.
        draws: the random choices of this batch.
        statistics: the mean image and the colours of the training split.
        net: sets `input_px` and `channels` of the crops.
        recipe: the preprocessing.
        noise_on: true while the colour noise, and with it the division, is on.
    """
    pixels = crop(_square(images.astype(jnp.float32), recipe), draws, net.input_px)
    pixels = pixels - _mean(statistics, net.input_px, recipe)[None]
    if recipe.colour_noise:
        noise = draws.noise @ statistics.colour_basis.T
        noisy = (pixels + noise[:, None, None, :]) / recipe.noise_divisor
        pixels = jnp.where(noise_on, noisy, pixels)
    grey = pixels.shape[-1] == 1
    return (jnp.repeat(pixels, net.channels, axis=-1) if grey else pixels) * recipe.scale


def view(
    images: Array, statistics: Statistics, net: Net, recipe: Preprocess, number: Array | int = 0
) -> Array:
    """Map uint8 `images` [B, H, W, C] to conv1's input in a test view, see `fixed` and `apply`."""
    draws = fixed(images.shape[0], images.shape[-1], net, recipe, number)
    return apply(images, draws, statistics, net, recipe)


def crop(images: Array, draws: Draws, px: int) -> Array:
    """Cut [B, px, px, C] at each image's own offset, mirrored where it is drawn."""

    def one(image: Array, offset: Array, mirror: Array) -> Array:
        start = (offset[0], offset[1], jnp.zeros_like(offset[0]))
        window = jax.lax.dynamic_slice(image, start, (px, px, image.shape[2]))
        return jnp.where(mirror, window[:, ::-1], window)

    return jax.vmap(one)(images, draws.offset, draws.mirror)


def _mean(statistics: Statistics, px: int, recipe: Preprocess) -> Array:
    """Return what is subtracted: [px, px, C] or [1, 1, C].

    'image': the mean image's central crop, whatever the offset of a crop (source). 'channel': the
    mean image's average. 'none': zeros.
    """
    if recipe.mean == 'none':
        return jnp.zeros((1, 1, 1))
    if recipe.mean == 'channel':
        return jnp.mean(statistics.mean_image, axis=(0, 1), keepdims=True)
    edge = (recipe.image_px - px) // 2
    side = slice(edge, edge + px)
    return _square(statistics.mean_image[None], recipe)[0, side, side]


def _square(images: Array, recipe: Preprocess) -> Array:
    """Resize and pad float [B, H, W, C] to [B, image_px, image_px, C]."""
    batch, *sides, channels = images.shape
    px = recipe.resize_px
    if tuple(sides) != (px, px):
        images = jax.image.resize(images, (batch, px, px, channels), 'bilinear')
    before = (recipe.image_px - px) // 2
    margin = (before, recipe.image_px - px - before)
    return jnp.pad(images, ((0, 0), margin, margin, (0, 0))) if any(margin) else images
