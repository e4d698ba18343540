"""Run training, from a config and an empty folder to a trained net, its errors and predictions.

On the same devices every number is a function of (config, seed, step): batches, crops, dropout and
learning rates are derived from the step. A run that was killed and resumed is therefore bitwise
identical to an uninterrupted one.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.config import Config
from alexnet_jax.data import batches as batching
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.model import optimizer as optimizers
from alexnet_jax.parallel import cpu, distributed, mesh
from alexnet_jax.training import preflight as checks
from alexnet_jax.training import splits
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.callbacks import Callback, Interrupt, StepLog, StepProfiler
from alexnet_jax.training.checkpoint import Checkpoints
from alexnet_jax.training.job import Job, open_job, resume_or_start
from alexnet_jax.training.metrics import History, MetricWriter, log
from alexnet_jax.training.step import TrainState, inputs


def run(config: Config, workdir: Path, extend: bool = False) -> str:
    """Train a config to its end, resuming from the workdir's last checkpoint, and evaluate it.

    Args:
        config: what to train.
        workdir: the folder of the run.
        extend: the run there may have had other `epochs` and rates, see `record_extension`.

    Returns:
        One sentence: the test accuracy, and the workdir.

    Raises:
        UsageError: the config is impossible, or the workdir belongs to another one.
        RunError: data or disk fail, numbers are not finite, or a signal came.
    """
    settings = splits.complete(configuration.unpack(config))
    cpu.set_up_cpu(settings.mesh.cpu_devices)
    with workdirs.open_workdir(settings, workdir, extend):
        workdirs.use_compilation_cache(settings.loop.compilation_cache, workdir)
        job = open_job(settings, workdir)
        devices = job.layout.mesh.devices.flatten()
        log(f'on {len(devices)} device(s) of kind {devices[0].device_kind}: {job.layout}')
        job, state, history, changed = resume_or_start(job)
        writer = MetricWriter(workdir, int(state.step), settings.loop.tensorboard)
        with contextlib.closing(writer):
            if changed:
                record_extension(job, int(state.step), changed, writer)
            state = train_to_end(job, state, history, writer)
            return finish(job, state, history, writer)


def record_extension(job: Job, step: int, changed: dict, writer: MetricWriter) -> None:
    """Write the config of an extension, and a record of its changes and of their first step.

    The state, its step and its velocity are those of the checkpoint. Rates are functions of the
    step under the new config. Whatever scales with `epochs` (rates of kind dexp; in our configs
    also `late_freeze` and the end of colour noise) has so far differed from a run of the new
    length.
    """
    words = ', '.join(f'{key} {old} -> {new}' for key, (old, new) in changed.items())
    log(f'extending from step {step}: {words}. Learning rates now follow the new config.')
    if distributed.is_first():
        workdirs.write_config(job.settings, job.workdir)
    writer.write('extension', step, changed=changed)


# --------------------------------------------------------------------------------------- the loop


def train_to_end(job: Job, state: TrainState, history: History, writer: MetricWriter) -> TrainState:
    """Train to the last step, with a log and checkpoints.

    Raises:
        RunError: numbers are not finite; or a signal came, and the run has been saved.
    """
    start, total = int(state.step), job.total_steps
    profile_steps = job.settings.loop.profile_steps if distributed.is_first() else 0
    profiler = StepProfiler(job.workdir / 'profile', profile_steps, start, total)
    step_log = StepLog(job, history, writer, start)
    checkpoints = Checkpoints(job.workdir / 'checkpoints')
    # A signal does not end the wait for the last save.
    with contextlib.closing(step_log.bar), Interrupt() as interrupt, checkpoints:
        saver = CheckpointSaver(job, history, checkpoints)
        state = train(job, state, history, [step_log, profiler, saver, interrupt])
    if (step := int(state.step)) < total:
        raise interrupt.error(step, total, job.workdir)
    return state


class CheckpointSaver(Callback):
    """Saves all that is needed to resume, and to classify an image from the checkpoint alone."""

    def __init__(self, job: Job, history: History, checkpoints: Checkpoints):
        self.job, self.history, self.checkpoints = job, history, checkpoints

    def on_save(self, step: int, state: TrainState, error: float | None) -> None:
        """Start to save a checkpoint."""
        tree = {'state': state, 'statistics': self.job.statistics._asdict()}
        tree = self.job.layout.to_host(tree)
        extra = {
            'config': self.job.settings.tree,
            'history': dataclasses.asdict(self.history),
            'class_names': list(self.job.train.class_names),
            'stored': list(self.job.train.images.shape[1:]),
        }
        self.checkpoints.save(step, tree, extra, error=error)


def train(
    job: Job, state: TrainState, history: History, callbacks: Sequence[Callback]
) -> TrainState:
    """Train from the state's step to the last, or until a callback asks to stop.

    For each step, in this order: wait for its batch, run it, report the step before, and then,
    where due, evaluate, ask whether to stop, and save. A stop saves first.

    Raises:
        RunError: a loss or a gradient is not finite.
    """
    loop, start = job.settings.loop, int(state.step)
    evaluations = job.steps_every(loop.evaluate_every_epochs) if job.validation else frozenset()
    saves = job.steps_every(loop.checkpoint_every_epochs)
    reporter = _Reporter(job, history, callbacks)
    # Two threads: while one puts a batch on the devices, the next is read.
    batches = batching.prefetch(job.batch, start, job.total_steps, loop.prefetch_batches, threads=2)
    with contextlib.closing(batches):
        for step in range(start + 1, job.total_steps + 1):
            reporter.tick()
            with jax.profiler.StepTraceAnnotation('train', step_num=step):
                begin = time.perf_counter()
                batch = next(batches)
                wait_secs = time.perf_counter() - begin
                state, metrics = job.train_step(state, batch, job.statistics)
                cpu.block_on_cpu(metrics)
                reporter.report(state, (step, metrics, wait_secs))
            for callback in callbacks:
                callback.on_step_end(step, state)
            if step == start + 1:  # it is compiled
                cpu.keep_freed()
            error = None
            if step in evaluations:
                reporter.catch_up(state)
                state, error = validate(job, state, history, callbacks)
            stop = any(callback.should_stop(step) for callback in callbacks)
            if step in saves or stop:
                reporter.catch_up(state)
                for callback in callbacks:
                    callback.on_save(step, state, error)
            if stop:
                break
    return state


class _Reporter:
    """Reports each step while the next one runs, so that no accelerator waits for the host."""

    def __init__(self, job: Job, history: History, callbacks: Sequence[Callback]):
        self.job, self.history, self.callbacks = job, history, callbacks
        self._since: float | None = None  # time of the last tick; None while evaluating or saving
        self._pending: tuple[int, Any, float] | None = None

    def tick(self) -> None:
        """Add the time since the last tick to the time of training; after a pause, start."""
        now = time.perf_counter()
        self.history.secs += 0.0 if self._since is None else now - self._since
        self._since = now

    def report(self, state: TrainState, latest: tuple[int, Any, float] | None = None) -> None:
        """Report the step before `latest` (step, metrics, wait_secs), which has been dispatched."""
        pending, self._pending = self._pending, latest
        if pending is None:
            return
        step, metrics, wait_secs = pending
        metrics = jax.device_get(metrics)
        if not math.isfinite(metrics['loss'][0]):
            raise not_finite(self.job, state)
        self.tick()
        for callback in self.callbacks:
            callback.on_metrics(step, metrics, wait_secs)

    def catch_up(self, state: TrainState) -> None:
        """Report the last step too, wait for `state`, and pause the clock until the next step."""
        self.report(state)
        jax.block_until_ready(state)
        self.tick()
        self._since = None


def validate(
    job: Job, state: TrainState, history: History, callbacks: Sequence[Callback]
) -> tuple[TrainState, float]:
    """Evaluate on every validation image, and apply the plateau rule to the error.

    Returns:
        The state with its number of rate drops, and the top-1 error.
    """
    assert job.validation is not None
    net = job.settings, job.layout, state.params, job.statistics
    found = evaluate.probabilities(*net, job.validation, evaluate.CENTRE)
    scores = evaluate.scores(found['centre'], job.validation.labels)
    history.errors.append(scores['top1_error'])
    for callback in callbacks:
        callback.on_evaluation(int(state.step), scores)
    drops = optimizers.plateau_drops(
        history.errors, job.settings.optimizer.weights, job.settings.loop.evaluate_every_epochs
    )
    replicated = mesh.put_global(np.int32(drops), job.layout.replicated)
    return state.replace(num_lr_drops=replicated), scores['top1_error']


def not_finite(job: Job, state: TrainState) -> RunError:
    """Return the error for a step that is not finite, found by repeating it.

    The step has left `state` unchanged, see `TrainState.all_finite`.
    """
    state, statistics = job.layout.to_host((state, job.statistics))
    step = int(state.step)
    batch = jax.tree.map(jnp.asarray, job.host_batch(step))
    pixels, masks = inputs(job.settings, len(job.train), state, batch, statistics)
    where = checks.first_not_finite(job.settings.net, state.params, pixels, masks)
    return RunError(
        f'step {step + 1}: the loss or a gradient is not finite, first in {where}; lower '
        f"optimizer.weights.rate or the layer's init_std. Checkpoints are unchanged."
    )


# ------------------------------------------------------------------------------------------- end


def finish(job: Job, state: TrainState, history: History, writer: MetricWriter) -> str:
    """Evaluate on every test image, centre view and ten views, and return the result's sentence."""
    net = job.settings, job.layout, state.params, job.statistics
    arrays = evaluate.probabilities(*net, job.test, evaluate.VIEWS) | {'label': job.test.labels}
    result = evaluate.summary(arrays, job.test.class_names)
    if distributed.is_first():
        evaluate.keep_predictions(job.workdir, 'test', arrays, job.total_steps)
    writer.write('test', job.total_steps, secs=history.secs, **result)
    centre, ten = result['centre'], result['ten_views']
    return (
        f'{job.settings.name}: test accuracy {1 - centre["top1_error"]:.4f} '
        f'({1 - ten["top1_error"]:.4f} over ten views) on {result["images"]} images after '
        f'{job.total_steps} steps, {history.secs:.0f} s of training; see {job.workdir}'
    )
