"""Diagnose nets that do not train: collapsed initialisation, and the source of non-finite values.

Many reimplementations of AlexNet stay at loss ln(classes), because almost no signal that depends on
the image reaches the logits. One number shows this before the first step: the standard deviation of
the logits across images at initialisation.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import Net

Array = jax.Array
DARK = 2.0  # pixels of 0 to 1 differ across images by less, of 0 to 255 by more


def signal(net: Net, params: Any, pixels: Array) -> dict[str, float]:
    """Return the standard deviation across images of the pixels and of each layer's output.

    It is the root mean square over units, by 'pixels' and the names of the layers, in order.

    Args:
        net: the net.
        params: its parameters.
        pixels: [B, H, W, C], the input of conv1; between ten and a hundred for 0-255 units.
    """

    @jax.jit
    def measure(params, pixels):
        seen = alexnet.activations(net, params, pixels)
        outputs = [seen[alexnet.activation_names(layer)[-1]] for layer in net.layers]
        return [
            jnp.sqrt(jnp.mean(jnp.var(values.astype(jnp.float32), axis=0)))
            for values in (pixels, *outputs)
        ]

    names = ['pixels', *(layer.name for layer in net.layers)]
    return dict(zip(names, map(float, measure(params, pixels)), strict=True))


def collapsed_init(found: Mapping[str, float], min_logit_std: float) -> str | None:
    """Return one sentence if a net with this `signal` will not train, else None."""
    (_, pixels), *layers = found.items()
    _, logit_std = layers[-1]
    if logit_std >= min_logit_std:
        return None
    if pixels < DARK:
        advice = 'the pixels must be in 0-255 units: set preprocess.scale=1.'
    else:
        pairs = itertools.pairwise(layers)
        gains = {name: after / max(before, 1e-30) for (_, before), (name, after) in pairs}
        weakest = min(gains, key=gains.__getitem__, default=layers[0][0])
        advice = f"raise the init_std of {weakest}, or set model.init_scaling='fan_in'."
    path = ', '.join(f'{name} {value:.1e}' for name, value in found.items())
    return (
        f'collapsed initialisation: the standard deviation of the logits across images is only '
        f'{logit_std:.1e} (at least {min_logit_std:.0e} is needed; run 145 had 3e-2), so the loss '
        f'will stay at ln(classes); layer by layer it is {path}; {advice}'
    )


def first_not_finite(net: Net, params: Any, pixels: Array, masks: Any) -> str:
    """Return the first activations that are not finite; the gradients if all are."""
    seen = jax.jit(alexnet.activations, static_argnums=0)(net, params, pixels, masks)
    for name in (name for layer in net.layers for name in alexnet.activation_names(layer)):
        if not np.all(np.isfinite(seen[name])):
            return f'the activations of {name}'
    return 'the gradients'
