"""A run's data, devices and compiled functions, opened from its config."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import config as configuration
from alexnet_jax.config import Config, Settings
from alexnet_jax.data import datasets
from alexnet_jax.data.batches import TrainStream
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import distributed, mesh
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training import finetune, splits
from alexnet_jax.training.step import TrainState, jit_init_state, jit_train_step, make_optimizer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Job:
    """An open run: its config, data, devices and compiled functions.

    validation: None if data.validation is 'none'.
    shardings: of the TrainState.
    """

    settings: Settings
    config: dict[str, Any]
    workdir: Path
    layout: Layout
    train: Dataset
    validation: Dataset | None
    test: Dataset
    statistics: Statistics
    optimizer: optax.GradientTransformationExtraArgs
    shardings: Any
    train_step: Callable
    predict: evaluate.Predict

    @property
    def total_steps(self) -> int:
        """The number of the last step."""
        return self.settings.total_steps(len(self.train))

    def steps_every(self, every_epochs: float) -> frozenset[int]:
        """Return the step numbers at multiples of `every_epochs`, and the last step."""
        interval = every_epochs * self.settings.steps_per_epoch(len(self.train))
        times = math.floor(self.total_steps / interval)
        steps = {math.ceil(interval * i) for i in range(1, times + 1)}
        return frozenset({*steps, self.total_steps})

    def epoch(self, step: int) -> float:
        """Return how many times the training images have been seen after a step."""
        return step / self.settings.steps_per_epoch(len(self.train))

    def start(self) -> TrainState:
        """Return the state of step 0, on the devices."""
        return jit_init_state(self.settings, self.optimizer, self.shardings)

    def scores(self, params: Any, dataset: Dataset) -> dict[str, float]:
        """Return the errors on the centre view of every image."""
        probability = evaluate.probabilities(
            self.predict, params, self.statistics, dataset, **self.evaluation()
        )['centre']
        return evaluate.scores(probability, dataset.labels)

    def evaluation(self) -> dict[str, Any]:
        """Return the arguments of `evaluate.probabilities` that are the same for all data."""
        return {'layout': self.layout, 'batch_size': self.settings.loop.eval_batch_size}

    def batch(self, step: int) -> dict[str, Array]:
        """Return the global batch of a step, on the devices; a process reads its part only."""
        size = self.settings.batch_size
        rows = self.layout.local_batch_slice(size)
        return self.layout.put_batch(self.host_batch(step, rows), size)

    def host_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Return the batch of a step, or rows of it, as NumPy arrays."""
        settings = self.settings
        return TrainStream(self.train, settings.seed, settings.batch_size, rows).batch(step)


def open_job(config: Config, settings: Settings, workdir: Path) -> Job:
    """Open the data of a config and build its functions.

    Raises:
        UsageError: the config does not fit the devices or the data.
        RunError: the data does not exist or is damaged.
    """
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    validated = () if settings.data.validation == 'none' else ('validation',)
    train, test, *validation = splits.open_splits(settings.data, ('train', 'test', *validated))
    _check_data(settings, train)
    statistics = mesh.put_global(_statistics(settings, train, workdir), layout.replicated)
    optimizer = make_optimizer(settings, len(train))
    train_step, shardings = jit_train_step(settings, layout, optimizer, len(train))
    return Job(
        settings=settings,
        config=configuration.plain(config),
        workdir=workdir,
        layout=layout,
        train=train,
        validation=validation[0] if validation else None,
        test=test,
        statistics=statistics,
        optimizer=optimizer,
        shardings=shardings,
        train_step=train_step,
        predict=evaluate.make_predict(settings, layout),
    )


def _statistics(settings: Settings, train: Dataset, workdir: Path) -> Statistics:
    """Return the statistics of the training images, or of the run that `init_from` names."""
    if settings.init_from != 'none' and settings.init_statistics == 'source':
        found = finetune.statistics(settings.init_from, workdir)
    else:
        measured = datasets.statistics_of(train)
        basis = measured.colour_vectors * measured.colour_std
        found = Statistics(jnp.asarray(measured.mean_image), jnp.asarray(basis))
    distributed.agree('the training data', f'{len(train)} {np.asarray(found[0]).tobytes()!r}')
    channels = train.images.shape[-1]
    if found.mean_image.shape[-1] != channels:
        raise UsageError(
            f'{settings.init_from} was trained on images of {found.mean_image.shape[-1]} '
            f'channel(s), but {train.name} has {channels}; set init_statistics=data.'
        )
    return found


def _check_data(settings: Settings, train: Dataset) -> None:
    classes, channels = len(train.class_names), train.images.shape[-1]
    if classes != settings.net.classes:
        last = settings.net.layers[-1].name
        raise UsageError(
            f'{train.name} has {classes} classes, but the net has {settings.net.classes}; '
            f'set model.{last}.features={classes}.'
        )
    if channels not in (1, settings.net.channels):
        raise UsageError(f'{train.name} has {channels} channels; set model.channels={channels}.')
    if len(train) < settings.batch_size:
        raise UsageError(
            f'{train.split} has {len(train)} images, fewer than one batch of '
            f'{settings.batch_size}; lower batch_size.'
        )
