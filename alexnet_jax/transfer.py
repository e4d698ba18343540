"""A run that begins with another run's net: fine-tuning.

The weights come from a checkpoint, and with them what its pixels were measured by: the layers have
learned to see images minus *that* mean. The last layer starts afresh, unless the classes are the
same by name.
What a started run needs of the source lies in its own workdir, so that it can be resumed without.
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax import checkpoint, distributed, files
from alexnet_jax import config as configuration
from alexnet_jax.augment import Statistics
from alexnet_jax.checkpoint import Restored, Step
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.records import say

Params = Mapping[str, Mapping[str, np.ndarray]]  # the canonical tree, see model.init


def source(init_from: str) -> tuple[Path, Step]:
    """'WORKDIR', 'WORKDIR:best' or 'WORKDIR:500' as a folder and a step."""
    found = re.fullmatch(r'(.+):(\d+|latest|best)', init_from)
    if not found:
        return Path(init_from), 'latest'
    step = found[2]
    return Path(found[1]), int(step) if step.isdigit() else step


def read(init_from: str) -> Restored:
    """The checkpoint to begin with, verified.

    Raises:
        UsageError: it is not named, or has no such step.
        RunError: there is none, or it is damaged.
    """
    if not init_from:
        raise UsageError('init_from is empty: set --config.init_from=WORKDIR[:step].')
    folder, step = source(init_from)
    if not (folder / 'checkpoints').is_dir():
        raise RunError(f'init_from={init_from}: {folder} holds no checkpoint; name a workdir.')
    return checkpoint.read(folder / 'checkpoints', step)


def parameters(
    fresh: Params,
    restored: Restored,
    layers: Sequence[str],
    class_names: Sequence[Sequence[str]],
    where: str,
) -> Params:
    """The weights of the source; those of the last layer are `fresh` if the classes are others.

    Args:
        fresh: of the new net, NumPy arrays.
        restored: the source's checkpoint.
        layers: of the new net, in order.
        class_names: of the new data, by label; in each way to call them (words, WordNet ids).
        where: how to call the source.

    Raises:
        UsageError: another layer differs; names all that do.
    """
    theirs = restored.state['state']['params']
    if set(theirs) != set(layers):
        raise UsageError(
            f'init_from={where}: its layers are {", ".join(sorted(theirs))}, and those of this net '
            f'{", ".join(sorted(layers))}; choose the config of that net.'
        )

    def shapes(params: Params, layer: str) -> dict[str, tuple[int, ...]]:
        return {kind: tuple(leaf.shape) for kind, leaf in params[layer].items()}

    *below, last = layers
    at_fault = [layer for layer in below if shapes(fresh, layer) != shapes(theirs, layer)]
    if at_fault:
        first = at_fault[0]
        raise UsageError(
            f'init_from={where}: {", ".join(at_fault)} have other shapes there ({first}: '
            f'{shapes(theirs, first)["kernel"]} there, {shapes(fresh, first)["kernel"]} here), and '
            f'only {last} may; choose the config of that net.'
        )
    same = restored.extra['class_names'] in [list(names) for names in class_names]
    same = same and shapes(fresh, last) == shapes(theirs, last)
    how = f'its {last} too, as the classes are the same' if same else f'{last} afresh'
    say(f'starting from step {restored.step} of {where}, {how}')
    return {layer: (theirs if same or layer != last else fresh)[layer] for layer in layers}


def compare(config: Mapping[str, Any], restored: Restored, where: str) -> None:
    """Say where this net or its input is not the source's: weights do not show it."""
    differ = []
    for section in ('model', 'preprocess'):
        theirs, ours = restored.extra['config'][section], config[section]
        differ += configuration.differences(theirs, ours, f'{section}.')
    last = config['model']['layers'][-1]
    # What follows is about how weights begin, and how they are trained.
    beside = rf'model\.({last}\.features|init_scaling|.*\.(init|init_std|bias|fan_in_2012))'
    training = r'preprocess\.(crop|mirror|share|colour_noise|noise_\w+)'
    strange = [key for key in differ if not re.fullmatch(f'{beside}|{training}', key)]
    if strange:
        say(f'warning: {where} was trained with other values of {", ".join(strange)}')


def statistics(init_from: str, workdir: Path) -> Statistics:
    """The source's mean image and colours, kept in this workdir from the first start on.

    Raises:
        UsageError, RunError: as `read`, or the copy is damaged.
    """
    path = workdir / 'source_statistics.npz'
    if distributed.is_first() and not path.exists():
        found = read(init_from).state['statistics']
        workdir.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as scratch, scratch.open('wb') as file:
            arrays = {name: np.asarray(found[name]) for name in Statistics._fields}
            np.savez(file, allow_pickle=False, **arrays)
    distributed.wait_for_all('statistics of the source')
    try:
        with np.load(path) as file:
            return Statistics(*(jnp.asarray(file[name]) for name in Statistics._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f'{path} is damaged ({error}): remove it, and it is taken from {init_from} again.'
        ) from error
