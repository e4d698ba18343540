"""Open a run: its data, devices and compiled functions, and its first or restored state."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax.config import Settings
from alexnet_jax.data import datasets
from alexnet_jax.data.batches import TrainStream
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.model import augment
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import distributed, mesh
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training import checkpoint, finetune, splits
from alexnet_jax.training import preflight as checks
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.metrics import History, log
from alexnet_jax.training.step import (
    TrainState,
    init_state,
    jit_init_state,
    jit_train_step,
    make_optimizer,
)

Array = jax.Array
AGREED_IMAGES = 256  # that several processes compare, evenly spaced
PREFLIGHT_IMAGES = 128  # enough for a standard deviation, and any one device can hold them


@dataclasses.dataclass(frozen=True)
class Job:
    """An open run: its settings, data, devices and compiled functions.

    validation: None if data.validation is 'none'.
    statistics: None from opening a workdir with checkpoints until `resume_or_start`.
    shardings: of the TrainState.
    """

    settings: Settings
    workdir: Path
    layout: Layout
    train: Dataset
    validation: Dataset | None
    test: Dataset
    statistics: Any
    optimizer: optax.GradientTransformationExtraArgs
    shardings: Any
    train_step: Callable

    @property
    def total_steps(self) -> int:
        """The number of the last step."""
        return self.settings.total_steps(len(self.train))

    def epoch(self, step: int) -> float:
        """Return how often the images have been seen after a step."""
        return step / self.settings.steps_per_epoch(len(self.train))

    def steps_every(self, every_epochs: float) -> frozenset[int]:
        """Return the step numbers at multiples of `every_epochs`, and the last step."""
        interval = every_epochs * self.settings.steps_per_epoch(len(self.train))
        times = math.floor(self.total_steps / interval)
        steps = {math.ceil(interval * i) for i in range(1, times + 1)}
        return frozenset({*steps, self.total_steps})

    @property
    def local_rows(self) -> slice:
        """The rows of a batch that this process reads."""
        return self.layout.local_batch_slice(self.settings.batch_size)

    def start(self) -> TrainState:
        """Return the state of step 0, on the devices."""
        return jit_init_state(self.settings, self.optimizer, self.shardings)

    def batch(self, step: int) -> dict[str, Array]:
        """Return the global batch of a step, on the devices; a process reads its part only."""
        size = self.settings.batch_size
        return self.layout.put_batch(self.host_batch(step, self.local_rows), size)

    def host_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Return the batch of a step, or rows of it, as NumPy arrays."""
        settings = self.settings
        return TrainStream(self.train, settings.seed, settings.batch_size, rows).batch(step)


def open_job(settings: Settings, workdir: Path) -> Job:
    """Open the data of a run and build its functions.

    Raises:
        UsageError: the config does not fit the devices or the data.
        RunError: the data does not exist or is damaged.
    """
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    data = settings.data  # all splits before any work, as each may be refused
    train, test = splits.load(data, 'train'), splits.load(data, 'test')
    validation = None if data.validation == 'none' else splits.load(data, 'validation')
    _check_data(settings, train)
    if distributed.several():
        images, labels = train.take(np.linspace(0, len(train) - 1, AGREED_IMAGES, dtype=int))
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        distributed.agree('the training data', {'images': len(train), 'sha256': digest})
    statistics = None
    if not checkpoint.steps(workdir / 'checkpoints'):
        statistics = mesh.put_global(_first_statistics(settings, train), layout.replicated)
    optimizer = make_optimizer(settings, len(train))
    train_step, shardings = jit_train_step(settings, layout, optimizer, len(train))
    return Job(
        settings=settings,
        workdir=workdir,
        layout=layout,
        train=train,
        validation=validation,
        test=test,
        statistics=statistics,
        optimizer=optimizer,
        shardings=shardings,
        train_step=train_step,
    )


def _first_statistics(settings: Settings, train: Dataset) -> Statistics:
    """Return the statistics of the training images, or of the run that `init_from` names."""
    if settings.init_from == 'none' or settings.init_statistics == 'data':
        measured = datasets.statistics_of(train)
        basis = measured.colour_vectors * measured.colour_std
        return Statistics(jnp.asarray(measured.mean_image), jnp.asarray(basis))
    found = Statistics(**finetune.read(settings.init_from).state['statistics'])
    channels, theirs = train.images.shape[-1], found.mean_image.shape[-1]
    if theirs != channels:
        raise UsageError(
            f'{settings.init_from} was trained on images of {theirs} channel(s), but {train.name} '
            f'has {channels}; set init_statistics=data.'
        )
    return found


def _check_data(settings: Settings, train: Dataset) -> None:
    classes, channels = len(train.class_names), train.images.shape[-1]
    net, problem = settings.net, ''
    if classes != net.classes:
        problem = (
            f'{train.name} has {classes} classes, but the net has {net.classes}; '
            f'set model.{net.layers[-1].name}.features={classes}.'
        )
    elif channels not in (1, net.channels):
        problem = f'{train.name} has {channels} channels; set model.channels={channels}.'
    elif len(train) < settings.batch_size:
        problem = (
            f'{train.split} has {len(train)} images, fewer than one batch of '
            f'{settings.batch_size}; lower batch_size.'
        )
    if problem:
        raise UsageError(problem)


# ------------------------------------------------------------------------------ the first state


def resume_or_start(job: Job) -> tuple[Job, TrainState, History, dict]:
    """Return the newest checkpoint that verifies, or step 0 after its pre-flight check.

    A run keeps the mean image of its first start, however the data has changed since.

    Returns:
        The job, the state, the history, and the changes of the config since the checkpoint, see
        `workdir.changes`: any make this an extension.

    Raises:
        UsageError: an extension that ends before the checkpoint's step.
    """
    folder = job.workdir / 'checkpoints'
    restored = checkpoint.read_newest_intact(folder)
    if restored is None:
        state = _initialise(job)
        preflight(job, state)
        return job, state, History(), {}
    changed = workdirs.changes(restored.extra['config'], job.settings.tree)
    if changed and restored.step >= job.total_steps:
        raise UsageError(
            f'{job.workdir} has been trained for {restored.step} steps, but an extension to '
            f'{job.settings.epochs:g} epochs ends after {job.total_steps} steps; increase epochs.'
        )
    names = restored.extra['class_names']
    log(f'resuming at step {restored.step} of {job.total_steps} in {job.workdir}')
    found = mesh.put_global(restored.state['statistics'], job.layout.replicated)
    matched = {
        split: splits.match(dataset, names, job.settings.data, job.workdir)
        for split in splits.NAMED
        if (dataset := getattr(job, split)) is not None
    }
    job = dataclasses.replace(job, statistics=Statistics(**found), **matched)
    shapes = jax.eval_shape(lambda: init_state(job.settings, job.optimizer))
    state = checkpoint.fit_to(shapes, restored.state['state'], folder)
    state = mesh.put_global(state, job.shardings)
    return job, state, History(**restored.extra.get('history', {})), changed


def _initialise(job: Job) -> TrainState:
    """Return the state of step 0, with the weights of another run if `init_from` names one."""
    state, settings = job.start(), job.settings
    if (where := settings.init_from) == 'none':
        return state
    fresh = job.layout.to_host(state.params)
    names = [job.train.class_names, splits.own_names(settings.data)]
    params = finetune.parameters(settings, finetune.read(where), fresh, names)
    return state.replace(params=mesh.put_global(params, job.shardings.params))


def preflight(job: Job, state: TrainState) -> None:
    """Log how far the logits differ across images at initialisation; see preflight.py.

    Raises:
        RunError: the initialisation has collapsed, and `loop.on_collapsed_init` is 'error'.
    """
    net, loop = job.settings.net, job.settings.loop
    found = checks.signal(net, job.layout.to_host(state.params), first_crops(job))
    spread = found[net.layers[-1].name]
    log(f'pre-flight: standard deviation of the logits across images {spread:.1e}')
    problem = checks.collapsed_init(found, loop.min_logit_std)
    if problem and loop.on_collapsed_init == 'error':
        raise RunError(problem)
    if problem:
        log(f'warning: {problem}')


def first_crops(job: Job) -> Array:
    """Return centre crops [B, H, W, C], as conv1 sees them, of the first batch's images."""
    net, recipe = job.settings.net, job.settings.preprocess
    images = jnp.asarray(job.host_batch(0, slice(PREFLIGHT_IMAGES))['image'])
    view = jax.jit(augment.view, static_argnums=(2, 3))
    return view(images, job.layout.to_host(job.statistics), net, recipe)
