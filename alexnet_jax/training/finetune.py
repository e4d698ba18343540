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

from alexnet_jax import config_file
from alexnet_jax.config import Settings
from alexnet_jax.errors import UsageError
from alexnet_jax.training import checkpoint
from alexnet_jax.training.checkpoint import Restored
from alexnet_jax.training.metrics import log

# The keys of a config, besides shapes, on which the output of a trained layer depends.
SHARED = ('input_px', 'towers', 'lrn', 'spatial_norm', 'pool', 'dropout', 'lrn_reads')
OWN = ('kind', 'reads', 'stride_px', 'padding_px', 'ops')
PIXELS = ('image_px', 'resize_px', 'mean', 'scale')

Params = Mapping[str, Mapping[str, np.ndarray]]  # the canonical tree, see alexnet.init


def read(init_from: str) -> Restored:
    """Read and verify the checkpoint of the source: 'WORKDIR', 'WORKDIR:best' or 'WORKDIR:500'.

    Raises:
        UsageError: `init_from` is empty, or there is no such step.
        RunError: there is no checkpoint, or it is damaged.
    """
    if not init_from:
        raise UsageError('init_from is empty: set --config.init_from=WORKDIR[:step].')
    found = re.fullmatch(r'(.+):(\d+|latest|best)', init_from)
    folder, step = found.groups() if found else (init_from, 'latest')
    return checkpoint.read(Path(folder) / 'checkpoints', step)


def parameters(
    settings: Settings, restored: Restored, fresh: Params, class_names: Sequence[Sequence[str]]
) -> Params:
    """Take the source's layers where name and shape agree, and the rest from `fresh`.

    The last layer is taken only if the classes have the same names. Logs which layers are taken,
    the reason why others start fresh, and what differs in the config of those that are taken.

    Args:
        settings: of the new run.
        restored: the source's checkpoint.
        fresh: parameters of the new net, NumPy arrays.
        class_names: of the new data, by label, in each naming scheme (words, WordNet ids).

    Raises:
        UsageError: no layer can be taken, or one of `init_layers` cannot.
    """
    where, wanted = settings.init_from, settings.init_layers
    layers = [layer.name for layer in settings.net.layers]
    theirs = restored.state['state']['params']
    same_classes = restored.extra['class_names'] in [list(names) for names in class_names]

    def why_fresh(name: str) -> str:
        if name not in theirs:
            return 'missing there'
        ours, there = fresh[name], theirs[name]
        if any(tuple(ours[kind].shape) != tuple(there[kind].shape) for kind in ours):
            sizes = ['x'.join(map(str, layer['kernel'].shape)) for layer in (there, ours)]
            return f'{sizes[0]} there, {sizes[1]} here'
        return 'other classes' if name == layers[-1] and not same_classes else ''

    reasons = {layer: why_fresh(layer) for layer in layers}
    carried = [name for name in layers if not reasons[name] and name in (wanted or layers)]
    if not carried or {*wanted} - {*carried}:
        lacking = {name: reasons[name] for name in wanted or layers if reasons[name]}
        raise UsageError(
            f'init_from={where} lacks layers of this net: {_because(lacking)}; choose a config '
            f'that matches that net, or other init_layers.'
        )
    rest = {name: reason for name, reason in reasons.items() if name not in carried}
    log(
        f'starting from step {restored.step} of {where}: copied {", ".join(carried)}; '
        f'initialised from scratch: {_because(rest) or "no layer"}'
    )
    if strange := differences(restored.extra['config'], settings.tree, carried):
        log(f'warning: {where} was trained with different values of {", ".join(strange)}')
    return {layer: (theirs if layer in carried else fresh)[layer] for layer in layers}


def _because(reasons: Mapping[str, str]) -> str:
    return ', '.join(f'{name} ({why})' if why else name for name, why in reasons.items())


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], carried: Sequence[str]
) -> list[str]:
    """Return the keys of two configs that differ in what shapes of the carried layers do not show.

    These are operations, pixels and the order of layers.
    """
    return [*config_file.differences(_seen(theirs, carried), _seen(ours, carried))]


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
