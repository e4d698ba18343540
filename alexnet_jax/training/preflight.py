"""Two questions about a net that does not train: is its start dead, and where did it turn infinite?

Copies of AlexNet sit at loss ln(classes) because the signal that depends on the image is all but
gone at the logits. One number tells before the first step: the standard deviation of the logits
across images at initialisation.
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
    """What a net's start looks like.

    logit_std: standard deviation of the logits across images, root mean square over classes.
    loss: mean cross-entropy in nats, beside `plateau`, which is ln(classes).
    signal: for each layer, what depends on the image in its result: standard deviation across
        images, root mean square over units.
    pixels: the same of what conv1 sees; with 0-255 units it is some ten to a hundred.
    """

    logit_std: float
    loss: float
    plateau: float
    signal: dict[str, float]
    pixels: float

    def weakest(self) -> tuple[str, float]:
        """The layer that passes on the least of the signal it gets, and that share."""
        names = list(self.signal)
        gains = {
            after: self.signal[after] / max(self.signal[before], 1e-30)
            for before, after in itertools.pairwise(names)
        }
        name = min(gains, key=lambda key: gains[key], default=names[-1])
        return name, gains.get(name, 0.0)


def preflight(net: Net, params: Any, pixels: Array, labels: Array) -> Preflight:
    """Measure a start on some images: `pixels` [B, H, W, C] as conv1 sees them, `labels` [B]."""

    @jax.jit
    def measure(params, pixels, labels):
        seen = _activations(net, params, pixels, None)
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
    """One sentence about a start that will not train, or None."""
    if found.logit_std >= min_logit_std:
        return None
    if found.pixels < DARK:
        advice = 'the pixels are wanted in 0-255 units: set preprocess.scale=1.'
    else:
        layer, gain = found.weakest()
        least = f'{layer} passes on least ({gain:.0%})'
        advice = f"{least}: raise its init_std, or set model.init_scaling='fan_in'."
    path = ', '.join(f'{name} {value:.1e}' for name, value in found.signal.items())
    return (
        f'collapsed initialisation: across images the logits differ by only {found.logit_std:.1e} '
        f'(standard deviation; at least {min_logit_std:.0e} is needed, run 145 had 3e-2), so the '
        f'loss will stay at ln(classes) = {found.plateau:.4f}; the pixels differ by '
        f'{found.pixels:.1e}, the outputs of the layers by {path}; {advice}'
    )


def first_not_finite(net: Net, params: Any, pixels: Array, labels: Array, masks: Any) -> str:
    """Where a step goes wrong, in one phrase: the first operation, forward and then backward."""
    seen = jax.jit(_activations, static_argnums=0)(net, params, pixels, masks)
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


def _activations(net: Net, params: Any, pixels: Array, masks: Any) -> dict[str, Array]:
    """Everything the net computes on the way, by the names of `alexnet.steps`."""
    _, variables = AlexNet(net).apply({'params': params}, pixels, masks, mutable=['intermediates'])
    return {name: value[0] for name, value in variables['intermediates'].items()}


def _across_images(values: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.var(values.astype(jnp.float32), axis=0)))
