"""Small nets with inputs and weights made by a formula, for the comparison with PyTorch.

Nothing here needs PyTorch: `make_net` writes what PyTorch computes for these cases to net.npz, and
tests/test_model.py computes the same with this project's net.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.model.alexnet import Net, geometry
from configs import alexnet, alexnet_paper

FILE = Path(__file__).with_name('net.npz')
BATCH_SIZE = 4
SAMPLES = 256  # gradient values stored a parameter
RECIPES = {'source': alexnet.get_config, 'paper': alexnet_paper.get_config}


@dataclasses.dataclass(frozen=True)
class Case:
    """A net and one training batch; `params` is the canonical tree, all arrays are NumPy's."""

    net: Net
    params: dict[str, dict[str, np.ndarray]]
    images: np.ndarray  # float32 [B, H, W, C], about what is left of 0-255 without the mean
    labels: np.ndarray  # int32 [B]
    masks: dict[str, np.ndarray]  # bool [B, units] by layer


def small(recipe: str) -> Case:
    """The two-tower net at an eighth of the widths, 112 px and three channels, ten classes."""
    config = RECIPES[recipe]('quickstart')
    config.model.channels = 3
    alexnet.narrow(config.model, 2)  # quickstart has divided by four already
    return case(net_of(config), BATCH_SIZE)


def net_of(config) -> Net:
    """The net of a ConfigDict."""
    return configuration.unpack(config).net


def case(net: Net, batch_size: int) -> Case:
    """Weights of the net's own standard deviations, and images with large-scale structure."""
    stages = geometry(net)
    params = {
        stage.layer.name: {
            'kernel': _noise(stage.kernel, 2 * i) * np.float32(stage.layer.init_std),
            'bias': stage.layer.bias + 0.1 * _noise((stage.layer.features,), 2 * i + 1),
        }
        for i, stage in enumerate(stages)
    }
    masks = {
        stage.layer.name: _noise((batch_size, *stage.output), 100 + i) < 0
        for i, stage in enumerate(stages)
        if 'dropout' in stage.layer.ops
    }
    labels = np.arange(batch_size, dtype=np.int32) % net.classes
    return Case(net, params, _images(net, batch_size), labels, masks)


def samples(gradient: np.ndarray) -> np.ndarray:
    """At most SAMPLES values, spread evenly over the flattened array."""
    flat = np.asarray(gradient).reshape(-1)
    return flat[:: max(1, flat.size // SAMPLES)][:SAMPLES]


def _images(net: Net, batch_size: int) -> np.ndarray:
    """Noise of 40 on waves of 60, in 0-255 units without the mean."""
    side, channels = net.input_px, net.channels
    y, x = np.mgrid[:side, :side] / side
    image, channel = np.arange(batch_size)[:, None], np.arange(channels)
    phase = (1 + image + channel)[:, None, None, :] * (y + 2 * x)[None, :, :, None]
    waves = 60 * np.sin(2 * math.pi * phase)
    return np.float32(waves) + 40 * _noise((batch_size, side, side, channels), 99)


def _noise(shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Uniform float32, mean 0, variance 1; from raw Philox bits, which no NumPy release changes."""
    bits = np.random.Philox(key=stream).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return ((unit - np.float32(0.5)) * np.float32(math.sqrt(12))).reshape(shape)
