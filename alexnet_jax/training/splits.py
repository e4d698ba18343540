"""Splits of a run's data set, and the values that a config takes from it.

A checkpoint numbers its classes by their order in its training data. Data that was prepared again,
or elsewhere, may number the same classes differently. All code that uses data with a checkpoint
therefore passes it through `match`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.config import Data, Settings, plain, unpack
from alexnet_jax.data import datasets
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import UsageError
from alexnet_jax.parallel import distributed

NAMED = ('train', 'validation', 'test')


def load(config: Data, split: str, data_dir: str = '') -> Dataset:
    """Open a split of a run's data set, its classes numbered as the data set numbers them.

    Args:
        config: the data section of the run's config.
        split: 'train', 'validation', 'test', or a split expression of TFDS.
        data_dir: the folder of all data sets; the config's if empty.

    Raises:
        UsageError: the split does not exist.
        RunError: the data set does not exist or is damaged.
    """
    folder, part = _ensure(config, data_dir), getattr(config, split) if split in NAMED else split
    size = {'workers': config.workers, 'resident_gib': config.resident_gib}
    try:
        return datasets.load(config.name, folder, part, **size)
    except UsageError as error:
        key = f'data.{split}={part}: ' if split in NAMED else ''
        raise UsageError(f'{key}{error}') from error


def own_names(config: Data, data_dir: str = '') -> tuple[str, ...]:
    """Return a data set's own class names by label, such as WordNet ids."""
    return datasets.describe(config.name, _ensure(config, data_dir)).class_names


def match(
    dataset: Dataset, names: Sequence[str], config: Data, owner: object, data_dir: str = ''
) -> Dataset:
    """Return `dataset` with its labels numbered as a checkpoint numbers them.

    Where both have the same set of names in another order, labels are mapped by name. The data
    set's own names (WordNet ids) count as well as its words. Names that are only the numbers
    '0', '1', ..., as those of imported weights, match any classes of the same number.

    Args:
        dataset: see `load`.
        names: the checkpoint's class names, by label.
        config: the data section of the run's config.
        owner: the checkpoint's workdir, for messages.
        data_dir: see `load`.

    Raises:
        UsageError: the data has other classes than the checkpoint.
    """
    names = tuple(names)
    if dataset.class_names == names:
        return dataset
    ids, numbers = own_names(config, data_dir), tuple(map(str, range(len(names))))
    unnamed = names if numbers in (names, dataset.class_names) else ()
    choices = (dataset.class_names, ids, unnamed)
    found = next((x for x in choices if sorted(x) == sorted(names)), ())
    if len(found) != len(dataset.class_names) or len(set(names)) < len(names):
        odd = sorted({*dataset.class_names} ^ {*names})[:5] or ['repeated names']
        raise UsageError(
            f'{dataset.name} has {len(dataset.class_names)} classes that differ from the '
            f'{len(names)} of the checkpoint in {owner} ({", ".join(odd)}); choose the data it was '
            f'trained on, with --data_dir or the config.'
        )
    mapping = np.array([names.index(name) for name in found], np.int32)
    labels = np.where(dataset.labels < 0, dataset.labels, mapping[dataset.labels])
    return Dataset(dataset.name, dataset.split, dataset.images, labels, names)


def _ensure(config: Data, data_dir: str) -> str:
    """Prepare the data set if it is missing and public; return the folder of all data sets."""
    if data_dir and not Path(data_dir).is_dir():  # a misspelt one would be filled
        raise UsageError(
            f'--data_dir={data_dir} is not a folder: name the folder of all data sets.'
        )
    folder = data_dir or config.data_dir
    if distributed.is_first():
        fashion_mnist.ensure(config.name, folder)
    distributed.wait_for_all('data')
    return folder


# ---------------------------------------------------------------- a config's values from the data


def complete(settings: Settings) -> Settings:
    """Return settings whose open values, see `with_data`, are taken from the data."""
    net, data = settings.tree['model'], settings.data
    closed = net['channels'] and settings.net.classes
    if closed and 'auto' not in (data.train, data.validation, data.test):
        return settings
    about = datasets.describe(data.name, _ensure(data, ''))
    found = with_data(settings.tree, len(about.class_names), about.shape[2], tuple(about.files))
    return unpack(found)


def with_data(
    config: Mapping[str, Any], classes: int, channels: int = 0, splits: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the config with its open values taken from the data.

    Args:
        config: open are `features` of the last layer and `channels` if they are 0, and a split
            that is 'auto'.
        classes: the number of classes in the data.
        channels: of the stored images.
        splits: the names of the data's splits.

    Raises:
        UsageError: a split is 'auto', and there is no split to take it from.
    """
    tree = plain(config)
    net = tree['model']
    last = net[net['layers'][-1]]
    last['features'] = last['features'] or classes
    net['channels'] = net['channels'] or channels
    tree['data'] |= _auto_splits(tree['data'], splits)
    return tree


def _auto_splits(wanted: Mapping[str, Any], there: Sequence[str]) -> dict[str, str]:
    """Return {key: split} for each 'auto': the split of that name, or a tenth of the training's."""
    names = dict(train=('train',), validation=('validation', 'val', 'valid'), test=('test',))
    auto = [key for key in names if wanted[key] == 'auto']
    found = {key: name for key in auto for name in names[key] if name in there}
    if 'train' in auto and len(there) == 1:  # one split, by any name
        found['train'] = there[0]
    missing = [key for key in auto if key not in found]
    if missing and 'train' not in found:
        raise UsageError(
            f"data.{missing[0]} is 'auto', but {wanted['name']} only has the splits "
            f'{", ".join(there)}; choose one of them, or a part of one such as {there[0]}[90%:].'
        )
    if missing:  # the last tenths of the training split
        train, end = found['train'], 100 - 10 * len(missing)
        found['train'] = f'{train}[:{end}%]'
        for start, key in zip(range(end, 100, 10), missing, strict=True):
            found[key] = f'{train}[{start}%:{start + 10}%]'
    return found
