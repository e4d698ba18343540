"""Time training on real input, and the time to the first step.

Feeding: the trainer's own loop, reading, prefetching and logging as in any run, takes turns with
the same compiled step on one batch that stays on the device. The loop itself logs how long it
waited for input.

Start: `main.py` in a process of its own, from the command to the record of its first step, with an
empty folder of compiled programs and again with the folder that this left. The data is prepared.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.errors import AlexNetError, RunError
from alexnet_jax.parallel import cpu
from alexnet_jax.training import metrics as run_metrics
from alexnet_jax.training import train
from alexnet_jax.training.train import History, Job
from configs import alexnet
from experiments.throughput import baselines
from experiments.throughput.results import environment, keep

ROOT = Path(__file__).resolve().parents[2]
INPUTS = {  # the scale of configs/alexnet.py that reads each
    'quickstart': 'quickstart',
    'Fashion-MNIST at 224 px': 'fashion_mnist',
    '256 x 256 x 3 in array_record': 'imagenet2012',
}
STORED = {'name': 'stored_images', 'images': 1024, 'px': 256, 'classes': 10}
FEWEST_STEPS = 5  # of a sample


# ----------------------------------------------------------------------------------------- feeding


def config_of(name: str, scratch: Path) -> Any:
    """The config that trains on an input; images of 256 x 256 x 3 are noise, made here."""
    scale = INPUTS[name]
    config = alexnet.get_config(scale)
    if scale == 'imagenet2012':
        write_stored_images(scratch, STORED['images'])
        config.model.fc8.features = STORED['classes']
        config.data.update(name=STORED['name'], data_dir=str(scratch))
        config.data.update(train='train', validation='train[:64]', test='train[:64]')
        config.data.resident_gib = 0.0  # so few are read from their files as ImageNet's are,
        config.loop.evaluate_every_epochs = 1e6  # and their short epochs do not end all the time
    return config


def feeding(flags: argparse.Namespace) -> None:
    """Every input; one that cannot be read is a row that says so."""
    for name in flags.inputs:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                config = config_of(name, Path(scratch))
                config.model.compute_dtype = flags.dtype
                found = feed(config, Path(scratch), flags.rounds, flags.sample_secs)
            except AlexNetError as error:
                found = {'not_run': str(error)}
        row = {'input': name, **found, **environment()}
        keep(flags.out, 'feeding', [row])
        print(name, {key: row[key] for key in found}, flush=True)


def feed(config: Any, scratch: Path, rounds: int, sample_secs: float) -> dict[str, Any]:
    """Seconds a step of the trainer's loop and of the step alone, a value a round."""
    config.mesh.update(data=baselines.as_devices(config), tower=1)
    config.loop.eval_batch_size = 64
    config.loop.log_every_steps = FEWEST_STEPS
    if config.data.name == 'fashion_mnist':
        config.data.update(validation='train[-64:]', test='test[:64]')
    job = train.open_job(config, configuration.unpack(config), scratch)
    batch = job.batch(0)
    state, _ = resident(job, job.start(), batch, 1)
    cpu.keep_freed()
    state, secs = resident(job, state, batch, 1)
    steps = max(FEWEST_STEPS, round(10 * sample_secs / secs))
    state, *_ = real(job, state, FEWEST_STEPS, scratch)
    row: dict[str, Any] = {'batch_size': job.settings.batch_size, 'steps': steps}
    row |= {'real_secs': [], 'resident_secs': [], 'stall_share': []}
    for _ in range(rounds):
        state, secs = resident(job, state, batch, steps)
        row['resident_secs'].append(secs)
        state, secs, stalled = real(job, state, steps, scratch)
        row['real_secs'].append(secs)
        row['stall_share'].append(stalled / (secs * steps))
    return row


def resident(job: Job, state: Any, batch: Any, steps: int) -> tuple[Any, float]:
    """Steps on one batch; seconds each."""
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = job.train_step(state, batch, job.statistics)
        cpu.block_on_cpu(metrics)
    jax.block_until_ready(state)
    return state, (time.perf_counter() - start) / steps


def real(job: Job, state: Any, steps: int, folder: Path) -> tuple[Any, float, float]:
    """The trainer's loop for so many steps more: seconds each, and how long it stood still."""
    start, history = int(state.step), History()
    epochs = (start + steps - 0.5) * job.settings.batch_size / len(job.train)
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, epochs=epochs))
    writer = run_metrics.MetricWriter(folder, start, job.settings.loop.tensorboard)
    with contextlib.closing(writer), contextlib.redirect_stderr(io.StringIO()):
        state = train.train(job, state, history, _Unsaved(), writer)
    written = [r for r in run_metrics.read(folder) if r['kind'] == 'train' and r['step'] > start]
    return state, history.secs / steps, sum(record['stall_secs'] for record in written)


class _Unsaved:
    """In the place of checkpoints: these runs leave nothing."""

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait(self) -> None:
        """For nothing."""


def write_stored_images(folder: Path, count: int) -> None:
    """A data set of noise, uint8 [256, 256, 3] as PNG, in array_record as TFDS writes it."""
    import tensorflow_datasets as tfds
    from PIL import Image

    px, classes = STORED['px'], STORED['classes']

    class StoredImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Noise."""

        name = STORED['name']
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            image = tfds.features.Image(shape=(px, px, 3), encoding_format='png')
            label = tfds.features.ClassLabel(num_classes=classes)
            features = tfds.features.FeaturesDict({'image': image, 'label': label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            rng = np.random.default_rng(0)
            for number in range(count):
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (px, px, 3), np.uint8)
                Image.fromarray(pixels).save(file, format='png', compress_level=1)
                file.seek(0)
                yield number, {'image': file, 'label': number % classes}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        StoredImages(data_dir=folder, file_format='array_record').download_and_prepare()


# ----------------------------------------------------------------------------------------- start-up


def start(flags: argparse.Namespace) -> None:
    """Cold and warm in turn, for quickstart and, on a GPU, for the full net."""
    configs = ['configs/alexnet.py']
    if jax.default_backend() != 'cpu':
        configs.append('configs/alexnet.py:fashion_mnist')
    for config in configs:
        row: dict[str, Any] = {'config': config, 'cold_secs': [], 'warm_secs': []}
        for _ in range(flags.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                for kind in ('cold', 'warm'):
                    secs = first_step_secs(config, Path(scratch), kind)
                    row[f'{kind}_secs'].append(secs)
        keep(flags.out, 'start', [row | environment()])
        print(config, {key: row[key] for key in ('cold_secs', 'warm_secs')}, flush=True)


def first_step_secs(
    config: str, scratch: Path, workdir: str, more: tuple[str, ...] = (), limit_secs: float = 600
) -> float:
    """Seconds until a new process has recorded its first step; it is then killed.

    Compiled programs are looked for, and kept, in `scratch`/cache.

    Raises:
        RunError: it ended, or took too long, before there was a record.
    """
    folder = scratch / workdir
    words = [sys.executable, 'main.py', f'--config={config}', f'--workdir={folder}']
    words += ['--config.loop.log_every_steps=1', f'--config.loop.compilation_cache={scratch}/cache']
    # On a GPU this process holds half of the memory.
    variables = os.environ | {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.4'}
    with (scratch / f'{workdir}.log').open('w+') as log:
        begin = time.perf_counter()
        child = subprocess.Popen(
            [*words, *more], cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not any(record['kind'] == 'train' for record in run_metrics.read(folder)):
                secs = time.perf_counter() - begin
                if child.poll() is not None or secs > limit_secs:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ['nothing'])[-1]
                    raise RunError(f'no first step of {config} after {secs:.0f} s; it said: {last}')
                time.sleep(0.01)
            return time.perf_counter() - begin
        finally:
            child.kill()
            child.wait()
