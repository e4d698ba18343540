"""Fine-tuning: start a run with the weights of another run, the source.

Weights are taken from a checkpoint, layer by layer, where name and shape agree. The mean image and
colour components are also the source's, because its layers were trained on images minus that mean.
The last layer is initialised from scratch unless the class names are the same. The first
checkpoint contains all that a run needs from the source, which may then be removed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.errors import UsageError
from alexnet_jax.training import checkpoint
from alexnet_jax.training.checkpoint import Restored, Step
from alexnet_jax.training.metrics import log

# The keys of a config, besides shapes, on which the output of a trained layer depends.
SHARED = ('input_px', 'towers', 'lrn', 'spatial_norm', 'pool', 'dropout', 'lrn_reads')
OWN = ('kind', 'reads', 'stride_px', 'padding_px', 'ops')
PIXELS = ('image_px', 'resize_px', 'mean', 'scale')

Params = Mapping[str, Mapping[str, np.ndarray]]  # the canonical tree, see alexnet.init


def source(init_from: str) -> tuple[Path, Step]:
    """Split 'WORKDIR', 'WORKDIR:best' or 'WORKDIR:500' into a folder and a step."""
    found = re.fullmatch(r'(.+):(\d+|latest|best)', init_from)
    return (Path(found[1]), found[2]) if found else (Path(init_from), 'latest')


def read(init_from: str) -> Restored:
    """Read and verify the checkpoint of the source.

    Raises:
        UsageError: `init_from` is empty, or there is no such step.
        RunError: there is no checkpoint, or it is damaged.
    """
    if not init_from:
        raise UsageError('init_from is empty: set --config.init_from=WORKDIR[:step].')
    folder, step = source(init_from)
    return checkpoint.read(folder / 'checkpoints', step)


def parameters(
    fresh: Params,
    restored: Restored,
    layers: Sequence[str],
    class_names: Sequence[Sequence[str]],
    where: str,
    wanted: Sequence[str] = (),
) -> tuple[Params, list[str]]:
    """Take the source's layers where name and shape agree, and the rest from `fresh`.

    The last layer is taken only if the classes have the same names. Logs one line: the layers that
    are taken, and the reason why others start fresh.

    Args:
        fresh: parameters of the new net, NumPy arrays.
        restored: the source's checkpoint.
        layers: names in the new net, in order.
        class_names: of the new data, by label, in each naming scheme (words, WordNet ids).
        where: name of the source in messages.
        wanted: the only layers to take; () means all that match.

    Returns:
        The parameters, and the names of the layers taken from the source, in order.

    Raises:
        UsageError: no layer can be taken, or one of `wanted` cannot.
    """
    theirs = restored.state['state']['params']
    same_classes = restored.extra['class_names'] in [list(names) for names in class_names]
    last = layers[-1]

    def why_fresh(layer: str) -> str:
        if layer not in theirs:
            return 'missing there'
        ours, there = fresh[layer], theirs[layer]
        if any(tuple(ours[kind].shape) != tuple(there[kind].shape) for kind in ours):
            return f'{_size(there)} there, {_size(ours)} here'
        return 'other classes' if layer == last and not same_classes else ''

    reasons = {layer: why_fresh(layer) for layer in layers}
    carried = [name for name in layers if not reasons[name] and name in (wanted or layers)]
    if not carried or {*wanted} - {*carried}:
        lacking = {name: reasons[name] for name in wanted or layers if reasons[name]}
        raise UsageError(
            f'init_from={where} lacks layers of this net: {_because(lacking)}; choose a config '
            f'that matches that net, or other init_layers.'
        )
    rest = {name: reason for name, reason in reasons.items() if name not in carried}
    what = _because(rest) or 'no layer'
    log(
        f'starting from step {restored.step} of {where}: copied {", ".join(carried)}; '
        f'initialised from scratch: {what}'
    )
    return {layer: (theirs if layer in carried else fresh)[layer] for layer in layers}, carried


def _size(layer: Mapping[str, np.ndarray]) -> str:
    return 'x'.join(map(str, layer['kernel'].shape))


def _because(reasons: Mapping[str, str]) -> str:
    return ', '.join(f'{name} ({why})' if why else name for name, why in reasons.items())


def compare(
    config: Mapping[str, Any], restored: Restored, where: str, carried: Sequence[str]
) -> None:
    """Warn of differences that shapes do not show: operations, pixels, the order of layers.

    Args:
        config: of the new run, as a tree.
        restored: the source's checkpoint.
        where: name of the source in messages.
        carried: layers taken from the source; differences in others do not matter.
    """
    theirs, ours = _seen(restored.extra['config'], carried), _seen(config, carried)
    if strange := configuration.differences(theirs, ours):
        log(f'warning: {where} was trained with different values of {", ".join(strange)}')


def _seen(config: Mapping[str, Any], carried: Sequence[str]) -> dict[str, Any]:
    """Return the part of a config on which the outputs of layers depend, besides their weights."""
    net, recipe = config['model'], config['preprocess']
    before = dict(zip(net['layers'], ['image', *net['layers']], strict=False))
    shared = {key: net.get(key) for key in SHARED}
    layers = {
        name: {key: net[name].get(key) for key in OWN} | {'follows': before[name]}
        for name in carried
    }
    return {'model': shared | layers, 'preprocess': {key: recipe[key] for key in PIXELS}}
