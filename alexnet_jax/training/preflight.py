"""Diagnose nets that do not train: collapsed initialisation, and the source of non-finite values.

Many reimplementations of AlexNet stay at loss ln(classes), because almost no signal that depends on
the image reaches the logits. One number shows this before the first step: the standard deviation of
the logits across images at initialisation.
"""

import dataclasses
import itertools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import AlexNet, Net

Array = jax.Array
DARK = 2.0  # pixels of 0 to 1 differ across images by less, of 0 to 255 by more


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Statistics of a net at initialisation.

    logit_std: standard deviation of the logits across images, root mean square over classes.
    loss: mean cross-entropy in nats, beside `plateau`, which is ln(classes).
    signal: of each layer's output, the standard deviation across images, root mean square over
        units.
    pixels: the same of the input of conv1; between ten and a hundred for 0-255 units.
    """

    logit_std: float
    loss: float
    plateau: float
    signal: dict[str, float]
    pixels: float

    def weakest(self) -> tuple[str, float]:
        """Return the layer with the smallest gain of the signal, and the gain."""
        pairs = itertools.pairwise(self.signal.items())
        gains = {name: after / max(before, 1e-30) for (_, before), (name, after) in pairs}
        return min(gains.items(), key=lambda item: item[1], default=(next(iter(self.signal)), 0.0))


def preflight(net: Net, params: Any, pixels: Array, labels: Array) -> Preflight:
    """Measure a net on `pixels` [B, H, W, C], the input of conv1, and `labels` [B]."""

    @jax.jit
    def measure(params, pixels, labels):
        seen = alexnet.activations(net, params, pixels)
        last = {layer.name: seen[alexnet.activation_names(layer)[-1]] for layer in net.layers}
        logits = last[net.layers[-1].name]
        signal = {name: _across_images(values) for name, values in last.items()}
        return alexnet.mean_loss(logits, labels), signal, _across_images(pixels)

    loss, signal, spread = jax.device_get(measure(params, pixels, labels))
    signal = {layer.name: float(signal[layer.name]) for layer in net.layers}  # jit sorts its keys
    return Preflight(
        logit_std=signal[net.layers[-1].name],
        loss=float(loss),
        plateau=math.log(net.classes),
        signal=signal,
        pixels=float(spread),
    )


def collapsed_init(found: Preflight, min_logit_std: float) -> str | None:
    """Return one sentence if the initialisation has collapsed, else None."""
    if found.logit_std >= min_logit_std:
        return None
    if found.pixels < DARK:
        advice = 'the pixels must be in 0-255 units: set preprocess.scale=1.'
    else:
        layer, gain = found.weakest()
        least = f'{layer} has the smallest gain ({gain:.0%})'
        advice = f"{least}: raise its init_std, or set model.init_scaling='fan_in'."
    path = ', '.join(f'{name} {value:.1e}' for name, value in found.signal.items())
    return (
        f'collapsed initialisation: the standard deviation of the logits across images is only '
        f'{found.logit_std:.1e} (at least {min_logit_std:.0e} is needed; run 145 had 3e-2), so the '
        f'loss will stay at ln(classes) = {found.plateau:.4f}; that of the pixels is '
        f'{found.pixels:.1e}, and of the layer outputs {path}; {advice}'
    )


def first_not_finite(net: Net, params: Any, pixels: Array, labels: Array, masks: Any) -> str:
    """Return the first operation whose result is not finite, forward and then backward."""
    seen = jax.jit(alexnet.activations, static_argnums=0)(net, params, pixels, masks)
    for name in (name for layer in net.layers for name in alexnet.activation_names(layer)):
        if not np.all(np.isfinite(seen[name])):
            return f'the activations of {name}'
    grads = jax.jit(jax.grad(_loss), static_argnums=1)(params, net, pixels, labels, masks)
    for layer in reversed(net.layers):
        for kind, values in grads[layer.name].items():
            if not np.all(np.isfinite(values)):
                return f'the gradient of {layer.name}/{kind}'
    return 'the loss alone'


def _loss(params, net, pixels, labels, masks):
    return alexnet.mean_loss(
        cast(Array, AlexNet(net).apply({'params': params}, pixels, masks)), labels
    )


def _across_images(values: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.var(values.astype(jnp.float32), axis=0)))
