"""Restore a checkpoint; compute errors (one view, ten views, ensembles) and activations.

Errors are fractions in [0, 1]. Every image is counted once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alexnet_jax import config as configuration
from alexnet_jax import config_file, files
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.data import batches
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.model import alexnet, augment
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import cpu, distributed, mesh
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training import checkpoint, splits
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.checkpoint import Step
from alexnet_jax.training.metrics import log

VIEWS = {'centre': (0,), 'ten_views': tuple(range(10))}  # by the names used in results
CENTRE = {'centre': (0,)}
Extract = Callable[[np.ndarray], np.ndarray]


# ------------------------------------------------------------------------- restoring a checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint restored for use on this machine."""

    workdir: Path
    step: int
    settings: Settings
    class_names: tuple[str, ...]  # by label
    layout: Layout
    params: Any  # on the layout's devices
    statistics: Statistics
    stored: tuple[int, int, int]  # the data set's images: (height, width, channels)

    def extractor(self, layer: str) -> Extract:
        """Return a function from images uint8 [B, H, W, C], as stored, to float32 [B, ...].

        Activations are of the centre view, without dropout masks, for any B.
        Images are split over all devices, each of which has the complete net.

        Args:
            layer: a name as `alexnet.activation_names` gives: 'fc7_relu'.

        Raises:
            UsageError: the net has no such layer.
        """
        net, recipe = self.settings.net, self.settings.preprocess
        known = [name for own in net.layers for name in alexnet.activation_names(own)]
        if layer not in known:
            raise UsageError(f"this net has no '{layer}'; choose one of {', '.join(known)}.")

        def run(params: Any, statistics: Statistics, images: jax.Array) -> jax.Array:
            pixels = augment.view(images, statistics, net, recipe)
            return alexnet.activations(net, params, pixels)[layer].astype(jnp.float32)

        layout = mesh.make_layout(MeshShape(data=-1, tower=1), jax.device_count())
        specs = (P(), P(), P('data'))
        run_sharded = jax.jit(
            jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=P('data')),
            compiler_options=cpu.compiler_options(),
        )
        constants = jax.device_put((self.params, self.statistics), layout.replicated)
        size = -(-self.settings.loop.eval_batch_size // layout.replicas) * layout.replicas

        def extract(images: np.ndarray) -> np.ndarray:
            found = []
            for start in range(0, max(len(images), 1), size):
                part = images[start : start + size]
                batch = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
                batch = jax.device_put(batch, layout.batch_sharding)
                found.append(np.asarray(run_sharded(*constants, batch))[: len(part)])
            return np.concatenate(found)

        return extract


def restore(
    workdir: str | Path, step: Step = 'latest', overrides: Mapping[str, Any] | None = None
) -> Trained:
    """Read and verify a checkpoint, and put it on this machine's devices.

    Args:
        workdir: the run's folder.
        step: 'latest', 'best' (lowest validation error) or the number of a step.
        overrides: config values to change, by dotted keys; only those that change no result.

    Raises:
        UsageError: the step does not exist, or an override would change the net.
        RunError: there is no checkpoint, or it is damaged.
    """
    workdir = Path(workdir)
    folder = workdir / 'checkpoints'
    saved = checkpoint.read_extra(folder, step)['config']
    config = config_file.plain(saved)
    for key, value in (overrides or {}).items():
        config_file.override(config, key, value)
    if odd := sorted(workdirs.changes(saved, config).keys() - {'loop.eval_batch_size'}):
        raise UsageError(
            f'--config.{odd[0]} has no effect on an evaluation, which uses the net and recipe of '
            f'the checkpoint; remove it.'
        )
    settings = configuration.unpack(config)
    cpu.set_up_cpu(settings.mesh.cpu_devices)  # before reading asks JAX for its devices
    restored = checkpoint.read(folder, step)
    try:
        layout = mesh.make_layout(settings.mesh, settings.batch_size)
    except UsageError:  # this machine has too few devices for the training's layout
        if jax.process_count() > 1:
            raise
        layout = mesh.make_layout(MeshShape(data=1, tower=1), 1)
    shardings = layout.parameter_shardings(settings.net)
    state, statistics = restored.state['state'], restored.state['statistics']
    return Trained(
        workdir=workdir,
        step=restored.step,
        settings=settings,
        class_names=tuple(restored.extra['class_names']),
        layout=layout,
        params=mesh.put_global(state['params'], shardings),
        statistics=Statistics(**mesh.put_global(statistics, layout.replicated)),
        stored=tuple(restored.extra.get('stored', statistics['mean_image'].shape)),
    )


def open_split(trained: Trained, split: str, data_dir: str = '') -> Dataset:
    """Open a split of the run's data, its labels numbered as the checkpoint's; see `splits`.

    Raises:
        UsageError: the split does not exist, or the data has other classes or channels.
        RunError: the data set does not exist or is damaged.
    """
    config = trained.settings.data
    dataset = splits.load(config, split, data_dir)
    channels, expected = dataset.images.shape[-1], trained.settings.net.channels
    if channels not in (1, expected):
        raise UsageError(
            f'{dataset.name} has images of {channels} channels, but the net in {trained.workdir} '
            f'takes {expected}; choose the data it was trained on.'
        )
    return splits.match(dataset, trained.class_names, config, trained.workdir, data_dir)


# ---------------------------------------------------------------------------------------- scoring


@functools.lru_cache(maxsize=4)
def make_predict(settings: Settings, layout: Layout) -> Callable[..., jax.Array]:
    """Compile (params, statistics, images [B, H, W, C], view 0..9) -> probabilities [B, classes].

    Images are split over 'data'. Every device, and so every process, gets all probabilities.
    """
    forward = layout.forward(settings.net)

    def predict(params, statistics, images, view):
        pixels = augment.view(images, statistics, settings.net, settings.preprocess, view)
        return jax.nn.softmax(forward(params, pixels, None))

    options = cpu.compiler_options()
    return jax.jit(predict, out_shardings=layout.replicated, compiler_options=options)


def probabilities(
    settings: Settings,
    layout: Layout,
    params: Any,
    statistics: Statistics,
    dataset: Dataset,
    views: Mapping[str, Sequence[int]] = CENTRE,
    batch_size: int = 0,
) -> dict[str, np.ndarray]:
    """Return the class probabilities of every image, float32 [N, classes], by the names in `views`.

    Each is a mean of several views' softmax probabilities (paper, section 4.1). Each of several
    processes reads its own share of the images, and gets the complete result. By default batches
    are of loop.eval_batch_size.

    Raises:
        RunError: a probability is not finite.
    """
    predict = make_predict(settings, layout)
    batch_size = batch_size or settings.loop.eval_batch_size
    batch_size = -(-batch_size // layout.replicas) * layout.replicas
    rows = layout.local_batch_slice(batch_size)
    numbers = sorted({view for several in views.values() for view in several})
    shape = len(dataset), len(dataset.class_names)
    found = {name: np.empty(shape, np.float32) for name in views}
    for number, batch in enumerate(batches.eval_batches(dataset, batch_size, rows)):
        images = layout.put_batch({'image': batch['image']}, batch_size)['image']
        by_view = {view: predict(params, statistics, images, view) for view in numbers}
        for name, several in views.items():
            part = found[name][number * batch_size :][:batch_size]
            mean = np.asarray(sum(by_view[view] for view in several) / len(several))
            part[:] = mean[: len(part)]  # without the padding of the last batch
            if not np.isfinite(part).all():
                raise RunError(
                    'the probabilities are not finite because the net has diverged: lower '
                    'optimizer.weights.rate, or evaluate an earlier --step.'
                )
    return found


def top(probability: np.ndarray, count: int) -> list[int]:
    """Return the `count` most probable of [classes], by label among equals."""
    return np.argsort(-probability, kind='stable')[:count].tolist()


def ranks(probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Count the classes ranked before the label's: int64 [N]; see `scores`."""
    own = probability[np.arange(len(label)), label][:, None]
    later = np.arange(probability.shape[1])[None, :] >= label[:, None]
    after = (probability < own) | ((probability == own) & later)  # the label too; false for NaN
    return probability.shape[1] - np.sum(after, axis=1)


def scores(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Return top-1 error, top-5 error and negative log-likelihood (nats an image).

    Args:
        probability: [N, classes].
        label: int [N].

    Equally probable classes are ranked by number, so that a constant prediction is right once in
    `classes` times. A probability of zero counts as the smallest normal float32.
    """
    rank, own = ranks(probability, label), probability[np.arange(len(label)), label]
    likelihood = np.maximum(own, np.finfo(np.float32).tiny).astype(np.float64)
    return {
        'top1_error': float(np.mean(rank >= 1)),
        'top5_error': float(np.mean(rank >= 5)),
        'nll': float(np.mean(-np.log(likelihood))),
    }


def summary(arrays: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the scores of predictions, as `load_predictions` returns them, for JSON.

    They are the `scores` of each of VIEWS, and the top-1 accuracy of each class that has images.
    """
    label = arrays['label']
    right = np.argmax(arrays['centre'], axis=1) == label
    accuracy = {class_names[i]: float(np.mean(right[label == i])) for i in np.unique(label)}
    errors = {view: scores(arrays[view], label) for view in VIEWS}
    return {'images': len(label), **errors, 'class_accuracy': accuracy}


# ------------------------------------------------------------------------- predictions on disk


def predictions_path(workdir: Path, split: str = 'test') -> Path:
    """Return the path of a split's predictions in a workdir."""
    name = ''.join(c if c.isalnum() else '_' for c in split).strip('_')
    return workdir / f'predictions_{name}.npz'


def keep_predictions(
    workdir: Path, split: str, arrays: Mapping[str, np.ndarray], step: int
) -> None:
    """Save predictions as an .npz file, atomically; if that fails, warn, as the scores exist."""
    path = predictions_path(workdir, split)
    try:
        with files.atomic_write(path) as scratch, scratch.open('wb') as file:
            np.savez(file, allow_pickle=False, step=np.int64(step), **arrays)
    except OSError as error:
        log(f'warning: {path} cannot be written ({error.strerror}): the predictions are not saved')


def load_predictions(workdir: Path) -> dict[str, np.ndarray]:
    """Return predictions of a run's test split: 'label' [N]; each of VIEWS [N, classes]; 'step'.

    Raises:
        RunError: they do not exist or are damaged.
    """
    advice = f'create it with python main.py --mode=evaluate --workdir={workdir}'
    path = predictions_path(workdir)
    found = files.read_npz(path, advice=advice)  # 'step' is missing from files of earlier versions
    if not {'label', *VIEWS} <= found.keys():
        raise RunError(f'{path} is incomplete: {advice}.')
    return found


# ------------------------------------------------------------------------------------ the command


def run(
    workdirs: Sequence[Path],
    *,
    step: Step = 'latest',
    split: str = 'test',
    data_dir: str = '',
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or an ensemble, whose probabilities are averaged, on a split.

    For arguments and errors see `restore` and `open_split`. All runs need the same images and
    classes, in the same order.

    Returns:
        The scores, as `summary`, and the step of each workdir.
    """
    members, steps, totals = [], [], dict[str, np.ndarray]()
    for workdir in workdirs:  # before minutes of computing
        checkpoint.read_extra(workdir / 'checkpoints', step)
    for workdir in workdirs:
        trained = restore(workdir, step, overrides)
        arrays = predictions(trained, split, data_dir)
        steps.append(trained.step)
        members.append(summary(arrays, trained.class_names))
        if not totals:
            names, totals = trained.class_names, arrays
            continue
        same_classes = totals['centre'].shape == arrays['centre'].shape
        if not same_classes or not np.array_equal(totals['label'], arrays['label']):
            raise UsageError(
                f'{workdir} was evaluated on different images or has different classes than '
                f'{workdirs[0]}; remove it from --workdir.'
            )
        for view in VIEWS:  # a running sum, so that only two nets' probabilities are in memory
            totals[view] += arrays[view]
    result = {'workdirs': [str(w) for w in workdirs], 'steps': steps, 'split': split}
    if len(workdirs) == 1:
        return result | members[0]
    mean = {view: totals[view] / np.float32(len(workdirs)) for view in VIEWS}
    return result | {'members': members} | summary(totals | mean, names)


def predictions(trained: Trained, split: str, data_dir: str) -> dict[str, np.ndarray]:
    """Predict every image of a split, and save the predictions in the workdir if possible."""
    dataset = open_split(trained, split, data_dir)
    if np.any(dataset.labels < 0):
        raise UsageError(f'{dataset.split} has images without labels; choose another --split.')
    log(
        f'{trained.workdir}: step {trained.step}, {len(dataset)} images of {dataset.split}, on '
        f'{trained.layout}'
    )
    net = trained.settings, trained.layout, trained.params, trained.statistics
    arrays = probabilities(*net, dataset, VIEWS) | {'label': dataset.labels}
    if distributed.is_first():
        keep_predictions(trained.workdir, split, arrays, trained.step)
    return arrays
