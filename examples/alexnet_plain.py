"""AlexNet as its authors ran it (run 145 of the released 2012 program), in plain Flax.

    python examples/alexnet_plain.py        # shapes and parameters

The page to read first: the forward pass and the initialisation, and nothing else. The package runs
the same net from a table of layers (configs/alexnet.py), on one device or with a tower a device;
tests/test_plain.py holds the two equal. Sections are those of the paper; "source" is the program.

The two towers are side by side in the channels: the first half of every layer's maps is tower a,
the second half tower b. A convolution that reads its own tower is a grouped convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import relu


class AlexNet(nn.Module):
    """Map float images [B, 224, 224, 3] (0-255 minus the mean image) to logits [B, classes]."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Return logits; training needs rngs={'dropout': key}."""
        # conv1 sees 224 px, and its last window extends 3 px into zeros: 55 positions.
        # LRN comes before pooling and ReLU here (source); section 3.5 reads ReLU, LRN, pool.
        x = conv('conv1', 96, 11, ((0, 3), (0, 3)), std=0.01, bias=0, stride=4)(x)
        x = relu(max_pool(lrn(x)))  # [B, 27, 27, 96]

        x = conv('conv2', 256, 5, 2, std=0.01, bias=1, towers=2)(x)
        x = max_pool(spatial_norm(lrn(relu(x))))  # [B, 13, 13, 256]; the spatial norm: source

        # The one convolution that reads both towers. Std 0.03 in conv3 to conv5 (source): with the
        # paper's 0.01 the logits vary 14 times less across images.
        x = relu(conv('conv3', 384, 3, 1, std=0.03, bias=0)(x))
        x = relu(conv('conv4', 384, 3, 1, std=0.03, bias=1, towers=2)(x))
        x = relu(max_pool(conv('conv5', 256, 3, 1, std=0.03, bias=1, towers=2)(x)))

        x = x.reshape(len(x), -1)  # [B, 6 * 6 * 256]; all that follows reads both towers
        x = self.dropout(relu(dense('fc6', 4096, bias=1)(x)), train)
        x = self.dropout(relu(dense('fc7', 4096, bias=1)(x)), train)
        return dense('fc8', self.classes, bias=0)(x)

    def dropout(self, x, train: bool):
        """Zero half of the units [B, 4096] in training, halve all of them at test (4.2)."""
        if not train:
            return 0.5 * x
        return jnp.where(jax.random.bernoulli(self.make_rng('dropout'), 0.5, x.shape), x, 0)


def conv(name, features, kernel, padding, *, std, bias, stride=1, towers=1):
    """Make a convolution; weights from an untruncated Gaussian, biases constant (5)."""
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding,
        feature_group_count=towers,
        kernel_init=nn.initializers.normal(std),
        bias_init=nn.initializers.constant(bias),
        name=name,
    )


def dense(name, features, *, bias):
    """Make a fully connected layer."""
    normal, constant = nn.initializers.normal(0.01), nn.initializers.constant(bias)
    return nn.Dense(features, kernel_init=normal, bias_init=constant, name=name)


def lrn(x):
    """Divide by (2 + alpha * sum of squares of the 5 nearest maps of the tower) ** 0.75 (3.3).

    alpha is 1e-4 / 5 (source), 1e-4 in the paper.
    """
    towers = x.reshape(*x.shape[:-1], 2, -1)  # [B, H, W, 2, C / 2]
    total = lax.reduce_window(towers**2, 0.0, lax.add, (1, 1, 1, 1, 5), (1,) * 5, 'SAME')
    return (towers / (2 + 1e-4 / 5 * total) ** 0.75).reshape(x.shape)


def spatial_norm(x):
    """Divide by (1 + 0.001 / 25 * sum of squares of the 5 x 5 px around) ** 0.75 (source)."""
    total = lax.reduce_window(x**2, 0.0, lax.add, (1, 5, 5, 1), (1,) * 4, 'SAME')
    return x / (1 + 0.001 / 25 * total) ** 0.75


def max_pool(x):
    """Take the maxima of windows of 3 px every 2 px: they overlap (3.4)."""
    return nn.max_pool(x, (3, 3), (2, 2))


if __name__ == '__main__':
    print(AlexNet().tabulate(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
