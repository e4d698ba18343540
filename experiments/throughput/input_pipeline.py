"""Time training on real input, and the time to the first step.

Feeding: the trainer's own loop alternates with the same compiled step on one batch that stays on
the device. Start: `main.py` in a process of its own, from the command to the record of its first
step, with an empty compilation cache, and again with the cache filled by the first start.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.parallel import cpu
from alexnet_jax.training import metrics as run_metrics
from alexnet_jax.training import train
from alexnet_jax.training.callbacks import Callback
from alexnet_jax.training.job import Job, open_job
from alexnet_jax.training.metrics import History
from configs import alexnet
from experiments.data_bench import process, reading
from experiments.throughput import baselines
from experiments.throughput.results import Row, environment
from experiments.throughput.timing import run_alone

INPUTS = {  # the scale of configs/alexnet.py that reads each
    'quickstart': 'quickstart',
    'Fashion-MNIST at 224 px': 'fashion_mnist',
    '256 px JPEG in array_record': 'imagenet2012',
}
STORED, STORED_IMAGES = 'stored_images', 1024
FEWEST_STEPS = 5  # of a sample


def config_of(name: str, scratch: Path) -> Any:
    """Return the config that trains on an input; images of 256 x 256 px are noise, made here."""
    scale = INPUTS[name]
    config = alexnet.get_config(scale)
    if scale == 'imagenet2012':
        write_stored_images(scratch, STORED_IMAGES)
        config.data.update(name=STORED, data_dir=str(scratch))
        config.data.update(train='train', validation='train[:64]', test='train[:64]')
        config.data.resident_gib = 0.0  # so few are read from their files as ImageNet's are,
        config.loop.evaluate_every_epochs = 1e6  # and their short epochs do not end all the time
    return config


def write_stored_images(folder: Path, count: int) -> None:
    """Write a data set of noise, JPEGs of 256 x 256 px in array_record."""
    rng = np.random.default_rng(0)
    some = [reading.encode('jpeg', reading.noise(rng)) for _ in range(100)]
    reading.write(folder / STORED, count, 1, reading.PX, 'jpeg', lambda i: some[i % len(some)])


def feeding(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure every input."""
    for name in INPUTS:
        devices = alexnet.get_config(INPUTS[name]).mesh.cpu_devices
        yield run_alone(devices, measure_input, name, flags)


def measure_input(name: str, flags: argparse.Namespace) -> Row:
    """Measure one input, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        config = config_of(name, Path(scratch))
        config.model.compute_dtype = flags.dtype
        found = feed(config, Path(scratch), flags.rounds, flags.sample_secs)
    return {'input': name, **found, **environment()}


def feed(config: Any, scratch: Path, rounds: int, sample_secs: float) -> Row:
    """Return seconds a step of the trainer's loop and of the step alone, a value a round."""
    config.mesh.update(data=baselines.as_devices(config), tower=1)
    config.loop.eval_batch_size = 64
    if config.data.name == 'fashion_mnist':
        config.data.update(validation='train[-64:]', test='test[:64]')
    job = open_job(configuration.unpack(config), scratch)
    batch = job.batch(0)
    state, _ = resident(job, job.start(), batch, 1)
    cpu.keep_freed()
    state, secs = resident(job, state, batch, 1)
    steps = max(FEWEST_STEPS, round(10 * sample_secs / secs))
    state, *_ = real(job, state, FEWEST_STEPS)
    row: Row = {'batch_size': job.settings.batch_size, 'steps': steps}
    row |= {'real_secs': [], 'resident_secs': [], 'stall_share': []}
    for _ in range(rounds):
        state, secs = resident(job, state, batch, steps)
        row['resident_secs'].append(secs)
        state, secs, stalled = real(job, state, steps)
        row['real_secs'].append(secs)
        row['stall_share'].append(stalled / (secs * steps))
    return row


def resident(job: Job, state: Any, batch: Any, steps: int) -> tuple[Any, float]:
    """Do steps on one batch; return the state and the seconds of a step."""
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = job.train_step(state, batch, job.statistics)
        cpu.block_on_cpu(metrics)
    jax.block_until_ready(state)
    return state, (time.perf_counter() - start) / steps


def real(job: Job, state: Any, steps: int) -> tuple[Any, float, float]:
    """Run the trainer's loop for `steps` more: (state, seconds of a step, seconds of waiting)."""
    start, history, waits = int(state.step), History(), _Waits()
    epochs = (start + steps - 0.5) * job.settings.batch_size / len(job.train)
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, epochs=epochs))
    state = train.train(job, state, history, [waits])
    return state, history.secs / steps, waits.secs


class _Waits(Callback):
    """The time that the loop waits for input."""

    secs = 0.0

    def on_metrics(self, step: int, metrics: Any, wait_secs: float) -> None:
        """Add a step's time."""
        self.secs += wait_secs


def start(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure cold and warm starts of quickstart in turn."""
    row: Row = {'config': 'configs/alexnet.py', 'cold_secs': [], 'warm_secs': []}
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for kind in ('cold', 'warm'):
                secs = first_step_secs(row['config'], Path(scratch), kind)
                row[f'{kind}_secs'].append(secs)
    yield row | environment()


def first_step_secs(config: str, scratch: Path, workdir: str, more: tuple[str, ...] = ()) -> float:
    """Return the seconds until a new process has recorded its first step; it is then killed.

    Compiled programs are cached in `scratch`/cache.
    """
    folder = scratch / workdir
    words = ['main.py', f'--config={config}', f'--workdir={folder}', *more]
    words += ['--config.loop.log_every_steps=1', f'--config.loop.compilation_cache={scratch}/cache']

    def trained() -> bool:
        return any(record['kind'] == 'train' for record in run_metrics.read(folder))

    return process.run(words, scratch / f'{workdir}.log', until=trained)['secs']
