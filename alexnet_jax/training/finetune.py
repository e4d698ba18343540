"""Fine-tuning: start a run with the weights of another run, the source.

Weights are taken from a checkpoint, layer by layer, where name and shape agree. The mean image and
colour components are also the source's, because its layers were trained on images minus that mean.
The last layer is initialised from scratch unless the class names are the same. Everything that a
run needs from the source is stored in its own workdir, so it can be resumed without the source.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax import files
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import distributed
from alexnet_jax.training import checkpoint
from alexnet_jax.training.checkpoint import Restored, Step
from alexnet_jax.training.metrics import log

Params = Mapping[str, Mapping[str, np.ndarray]]  # the canonical tree, see alexnet.init


def source(init_from: str) -> tuple[Path, Step]:
    """Split 'WORKDIR', 'WORKDIR:best' or 'WORKDIR:500' into a folder and a step."""
    found = re.fullmatch(r'(.+):(\d+|latest|best)', init_from)
    if not found:
        return Path(init_from), 'latest'
    step = found[2]
    return Path(found[1]), int(step) if step.isdigit() else step


def read(init_from: str) -> Restored:
    """Read and verify the checkpoint of the source.

    Raises:
        UsageError: `init_from` is empty, or there is no such step.
        RunError: there is no checkpoint, or it is damaged.
    """
    if not init_from:
        raise UsageError('init_from is empty: set --config.init_from=WORKDIR[:step].')
    folder, step = source(init_from)
    if not (folder / 'checkpoints').is_dir():
        raise RunError(
            f'init_from={init_from}: {folder} contains no checkpoint; give the workdir of a run.'
        )
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
    missing = [f'{layer} ({reasons[layer]})' for layer in wanted if reasons[layer]]
    if missing:
        raise UsageError(
            f'init_from={where} has no {", ".join(missing)} for this net; '
            'remove it from init_layers.'
        )
    carried = [name for name in layers if not reasons[name] and name in (wanted or layers)]
    if not carried:
        raise UsageError(
            f'init_from={where} has no layer with the same name and shape as this net: '
            f'{_because(reasons)}; choose a config that matches that net.'
        )
    rest = {name: reason for name, reason in reasons.items() if name not in carried}
    what = (
        f'initialised from scratch: {_because(rest)}'
        if rest
        else 'no layer initialised from scratch'
    )
    log(f'starting from step {restored.step} of {where}: copied {", ".join(carried)}; {what}')
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
    source_config = restored.extra['config']
    layers, before = config['model']['layers'], source_config['model']['layers']
    moved = [
        layer
        for layer in carried
        if (previous := _previous(layers, layer)) not in ('', *carried)
        or previous != _previous(before, layer)
    ]
    if moved:
        log(
            f'warning: {", ".join(moved)} of {where} followed a different layer there; to '
            'train these from scratch, set init_layers to the layers before them'
        )
    differ = []
    for section in ('model', 'preprocess'):
        theirs, ours = source_config[section], config[section]
        differ += configuration.differences(theirs, ours, f'{section}.')
    others = '|'.join(map(re.escape, {*layers, *before, 'layers'} - {*carried}))
    # Keys of initialisation and training only.
    start = r'model\.(init_scaling|.*\.(init|init_std|bias|reference_fan_in))'
    training = r'preprocess\.(crop|mirror|images_per_crop|colour_noise|noise_\w+)'
    beside = rf'{start}|{training}|model\.({others})(\..*)?'
    strange = [key for key in differ if not re.fullmatch(beside, key)]
    if strange:
        log(f'warning: {where} was trained with different values of {", ".join(strange)}')


def _previous(layers: Sequence[str], layer: str) -> str:
    """Return the name of the layer before `layer`, '' for the first."""
    return ['', *layers][list(layers).index(layer)]


def statistics(init_from: str, workdir: Path) -> Statistics:
    """Return the source's mean image and colours; the first start stores them in this workdir.

    Raises:
        UsageError, RunError: see `read`; or the copy is damaged.
    """
    path = workdir / 'source_statistics.npz'
    if distributed.is_first() and not path.exists():
        found = read(init_from).state['statistics']
        workdir.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as scratch, scratch.open('wb') as file:
            arrays = {name: np.asarray(found[name]) for name in Statistics._fields}
            np.savez(file, allow_pickle=False, **arrays)
    distributed.wait_for_all('statistics of the source')
    advice = f'remove it to copy it from {init_from} again'
    arrays = files.read_npz(path, Statistics._fields, advice)
    return Statistics(*(jnp.asarray(arrays[name]) for name in Statistics._fields))
