"""From a checkpoint, or a run's parameters, to errors: one view, ten views, ensembles.

Errors are fractions in [0, 1]. Every image is counted once.
"""

import dataclasses
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import augment, config_file, data, distributed, files, parallel, prepare
from alexnet_jax import config as configuration
from alexnet_jax import workdir as workdirs
from alexnet_jax.augment import Statistics
from alexnet_jax.checkpoint import Checkpoints, Step
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.data import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import Layout
from alexnet_jax.records import say

VIEWS = {'centre': (0,), 'ten_views': tuple(range(10))}  # by the name used in results
EMPTY: Mapping[str, Any] = types.MappingProxyType({})
Predict = Callable[[Any, Statistics, jax.Array, int], jax.Array]


# ----------------------------------------------------------------------------- a checkpoint, opened


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a checkpoint holds, ready for use on this machine."""

    workdir: Path
    step: int
    settings: Settings
    class_names: tuple[str, ...]
    layout: Layout
    params: Any  # on the layout's devices
    statistics: Statistics
    stored: tuple[int, int, int]  # the data set's images: (height, width, channels)


def restore(
    workdir: str | Path, step: Step = 'latest', overrides: Mapping[str, Any] = EMPTY
) -> Trained:
    """Read and verify a checkpoint, and place it on the devices that are here.

    It lies as it did in training where this machine has the devices for that, and on one device
    where it has not.

    Args:
        workdir: of the run.
        step: 'latest', 'best' (lowest validation error) or the number of a step.
        overrides: values of its config to be changed, by dotted keys: those that change no result.

    Raises:
        UsageError: no such step, or an override that would change the net.
        RunError: no checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    if not checkpoints.steps():
        raise RunError(f'{workdir} holds no checkpoint; train first with --workdir={workdir}.')
    step = int(step) if isinstance(step, str) and step.isdigit() else step
    settings = configuration.unpack(_with(overrides, checkpoints.extra(step)['config']))
    parallel.set_up_cpu(settings.mesh.cpu_devices)  # before reading asks JAX for its devices
    restored = checkpoints.restore(None, step)
    layout, shardings = _placement(settings)
    return Trained(
        workdir=workdir,
        step=restored.step,
        settings=settings,
        class_names=tuple(restored.extra['class_names']),
        layout=layout,
        params=parallel.place(restored.state['state']['params'], shardings),
        statistics=Statistics(
            **parallel.place(restored.state['statistics'], parallel.whole(layout))
        ),
        stored=tuple(
            restored.extra.get('stored', restored.state['statistics']['mean_image'].shape)
        ),
    )


def _with(overrides: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        new = config_file.plain(config)
        config_file.override(new, key, value)
        free = (*workdirs.MAY_DIFFER, 'loop.eval_batch_size')
        if key not in free and config_file.differences(config, new):
            raise UsageError(
                f'--config.{key} changes nothing in an evaluation: net and recipe are those of '
                f'the checkpoint; leave it out.'
            )
        config = new
    return config


def _placement(settings: Settings) -> tuple[Layout, Any]:
    def place(shape: MeshShape, batch_size: int) -> tuple[Layout, Any]:
        layout = parallel.lay_out(shape, batch_size)
        return layout, parallel.shardings(parallel.parameter_specs(settings.net, layout), layout)

    try:
        return place(settings.mesh, settings.batch_size)
    except UsageError:  # it was trained on a larger machine
        if jax.process_count() > 1:
            raise
        return place(MeshShape(data=1, tower=1), 1)


# ----------------------------------------------------------------------------- from nets to errors


def make_predict(settings: Settings, layout: Layout) -> Predict:
    """(params, statistics, uint8 images [B, H, W, C], view 0..9) -> probabilities [B, classes].

    Images are split over 'data'; every device, and so every process, gets all probabilities.
    """
    forward = parallel.forward(settings.net, layout)

    def predict(params, statistics, images, view):
        batch, channels = images.shape[0], images.shape[-1]
        draws = augment.fixed(batch, channels, settings.preprocess, view)
        pixels = augment.apply(images, draws, statistics, settings.preprocess)
        return jax.nn.softmax(forward(params, pixels, None))

    return jax.jit(
        predict,
        out_shardings=parallel.whole(layout),
        compiler_options=parallel.compiler_options(),
    )


def probabilities(
    predict: Predict,
    params: Any,
    statistics: Statistics,
    dataset: Dataset,
    *,
    layout: Layout,
    batch_size: int,
    views: Sequence[int] = (0,),
) -> np.ndarray:
    """Class probabilities of every image, averaged over `views`: float32 [N, classes].

    The average is over softmax probabilities, not logits (paper, section 4.1). Of several
    processes each reads its own share of the images, and all get the whole result.
    """
    how = {'layout': layout, 'batch_size': batch_size}
    return all_probabilities(predict, params, statistics, dataset, {'': views}, **how)['']


def all_probabilities(
    predict: Predict,
    params: Any,
    statistics: Statistics,
    dataset: Dataset,
    wanted: Mapping[str, Sequence[int]],
    *,
    layout: Layout,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """`probabilities` of several choices of views, by name; each image is read once for all.

    Raises:
        RunError: they are not finite.
    """
    batch_size = -(-batch_size // layout.replicas) * layout.replicas
    rows = parallel.own_rows(layout, batch_size)
    numbers = sorted({view for views in wanted.values() for view in views})
    found: dict[str, np.ndarray] = {}
    start = 0
    for batch in data.eval_batches(dataset, batch_size, rows):
        images = parallel.place_batch(layout, {'image': batch['image']}, batch_size)['image']
        seen = {view: predict(params, statistics, images, view) for view in numbers}
        for name, views in wanted.items():
            mean = np.asarray(sum(seen[view] for view in views) / len(views))
            if name not in found:
                found[name] = np.empty((len(dataset), mean.shape[1]), mean.dtype)
            room = found[name][start : start + batch_size]
            room[:] = mean[: len(room)]  # what is behind it is padding
            if not np.isfinite(room).all():
                raise RunError(
                    'the probabilities are not finite, the net has diverged: lower '
                    'optimizer.weights.rate, or evaluate an earlier --step.'
                )
        start += batch_size
    return found


def ranks(probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How many classes come before the label's: int64 [N]; see `scores`."""
    own = probability[np.arange(len(label)), label][:, None]
    later = np.arange(probability.shape[1])[None, :] >= label[:, None]
    behind = (probability < own) | ((probability == own) & later)  # itself too; never with a NaN
    return probability.shape[1] - np.sum(behind, axis=1)


def scores(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 error and negative log-likelihood (nats an image) of [N, classes] and [N].

    A label is among the top k when fewer than k classes are more probable; equally probable ones
    are ranked by their number, so that a constant prediction is right once in `classes` times. A
    probability that underflows to zero counts as the smallest normal float32.
    """
    rank, own = ranks(probability, label), probability[np.arange(len(label)), label]
    likelihood = np.maximum(own, np.finfo(np.float32).tiny).astype(np.float64)
    return {
        'top1_error': float(np.mean(rank >= 1)),
        'top5_error': float(np.mean(rank >= 5)),
        'nll': float(np.mean(-np.log(likelihood))),
    }


def class_accuracy(probability: np.ndarray, label: np.ndarray, names: Sequence[str]) -> dict:
    """Share of each class's images whose top-1 is right; classes without an image are left out."""
    right = np.argmax(probability, axis=1) == label
    return {
        name: float(np.mean(right[label == i]))
        for i, name in enumerate(names)
        if np.any(label == i)
    }


def report(
    predict: Predict, params: Any, statistics: Statistics, dataset: Dataset, **how: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All scores of one view and of ten, and the predictions they come from.

    Returns:
        Scores as JSON can hold them, and arrays 'centre' and 'ten_views' (float32 [N, classes])
        and 'label' (int32 [N]): 400 MB for the 50,000 images and 1,000 classes of ImageNet.
    """
    arrays = all_probabilities(predict, params, statistics, dataset, VIEWS, **how)
    arrays['label'] = dataset.labels
    return summary(arrays, dataset.class_names), arrays


def summary(arrays: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, Any]:
    """The scores of saved predictions."""
    label = arrays['label']
    result: dict[str, Any] = {'images': len(label)}
    for name in VIEWS:
        result[name] = scores(arrays[name], label)
    result['class_accuracy'] = class_accuracy(arrays['centre'], label, class_names)
    return result


def save_predictions(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz that is whole or not there."""
    with files.whole(path) as scratch, scratch.open('wb') as file:
        np.savez(file, allow_pickle=False, **arrays)


# ---------------------------------------------------------------------------------- the command


def run(
    workdirs: Sequence[Path],
    *,
    step: Step = 'latest',
    split: str = 'test',
    data_dir: str = '',
    overrides: Mapping[str, Any] = EMPTY,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or the ensemble of several, on every image of a split.

    Args:
        workdirs: of the runs; the probabilities of several are averaged.
        step: 'latest', 'best' (lowest validation error) or the number of a step.
        split: 'train', 'validation' or 'test' of the run's config, or an expression of TFDS.
        data_dir: where the data lies, if not where the run had it.
        overrides: see `restore`.

    Returns:
        The scores, as `report`, with the step of each workdir.

    Raises:
        UsageError: a step that is not there, a split that is not there, nets that do not fit.
        RunError: no checkpoint, a damaged one, or no data.
    """
    members, steps, class_names = [], [], ()
    label, totals = np.zeros(0), dict[str, np.ndarray]()
    for workdir in workdirs:
        trained = restore(workdir, step, overrides)
        arrays, found, class_names = predictions(trained, split, data_dir)
        steps.append(found)
        if len(workdirs) > 1:
            members.append(summary(arrays, class_names))
        if not totals:
            label, totals = arrays['label'], {name: arrays[name] for name in VIEWS}
            continue
        if not np.array_equal(label, arrays['label']):
            raise UsageError(f'{workdir} was evaluated on other images than {workdirs[0]}.')
        if totals['centre'].shape != arrays['centre'].shape:
            raise UsageError(f'{workdir} has other classes than {workdirs[0]}; leave it out.')
        for name in VIEWS:  # two nets' probabilities are in memory, however many there are
            totals[name] += arrays[name]
    result = {'workdirs': [str(w) for w in workdirs], 'steps': steps, 'split': split}
    if members:
        result['members'] = members
    mean = {name: total / np.float32(len(workdirs)) for name, total in totals.items()}
    return result | summary({'label': label, **mean}, class_names)


def predictions(
    trained: Trained, split: str, data_dir: str
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    """Predict every image, save predictions_<split>.npz: (arrays, step, class names)."""
    dataset = open_split(trained.settings, split, data_dir)
    say(
        f'{trained.workdir}: step {trained.step}, {len(dataset)} images of {dataset.split}, on '
        f'{trained.layout}'
    )
    _, arrays = report(
        make_predict(trained.settings, trained.layout),
        trained.params,
        trained.statistics,
        dataset,
        layout=trained.layout,
        batch_size=trained.settings.loop.eval_batch_size,
    )
    if distributed.is_first():
        save_predictions(trained.workdir / f'predictions_{_file_name(split)}.npz', arrays)
    return arrays, trained.step, dataset.class_names


def open_split(settings: Settings, split: str, data_dir: str = '') -> Dataset:
    """One split of a run's data set; see `open_splits`."""
    return open_splits(settings, (split,), data_dir)[0]


def open_splits(settings: Settings, splits: Sequence[str], data_dir: str = '') -> list[Dataset]:
    """Splits of a run's data set: 'train', 'validation', 'test', or expressions of TFDS.

    Raises:
        UsageError: no such split.
        RunError: no data.
    """
    names, folder = settings.data, _fetched(settings, data_dir)
    named = ('train', 'validation', 'test')
    how: Any = {'workers': names.workers, 'resident_gib': names.resident_gib}

    def load(split: str) -> Dataset:
        if split not in named:
            return data.load(names.name, folder, split, **how)
        try:
            return data.load(names.name, folder, getattr(names, split), **how)
        except UsageError as error:
            raise UsageError(f'data.{split}={getattr(names, split)}: {error}') from error

    return [load(split) for split in splits]


def class_names(settings: Settings, *, words: bool = True) -> tuple[str, ...]:
    """Of a run's data set; it is fetched where it is not there."""
    return data.class_names(settings.data.name, _fetched(settings), words=words)


def facts(settings: Settings) -> tuple[int, int, tuple[str, ...]]:
    """Return the number of classes, the channels and the splits of a run's data set."""
    return data.facts(settings.data.name, _fetched(settings))


def _fetched(settings: Settings, data_dir: str = '') -> str:
    """Where the data lies, once it is there."""
    folder = data_dir or settings.data.data_dir
    if distributed.is_first():
        prepare.ensure(settings.data.name, folder)
    distributed.wait_for_all('data')
    return folder


def _file_name(split: str) -> str:
    return ''.join(c if c.isalnum() else '_' for c in split).strip('_')


def line(result: Mapping[str, Any]) -> str:
    """A result as the one JSON line of stdout."""
    return json.dumps(result)
