"""A training run, from a config and an empty folder to a net, its errors and its predictions.

On the same devices every number of it is a function of (config, seed, step): batches, crops,
dropout and rates are derived from the step, so that a run that was killed and started again ends in
the same bits.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import config as configuration
from alexnet_jax import config_file
from alexnet_jax.config import Config, Settings
from alexnet_jax.data import batches as batching
from alexnet_jax.data import datasets
from alexnet_jax.data.batches import TrainStream
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.model import augment
from alexnet_jax.model import optimizer as optimizers
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import cpu, distributed, mesh
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.progress import ProgressBar, duration
from alexnet_jax.training import finetune, splits
from alexnet_jax.training import metrics as run_metrics
from alexnet_jax.training import preflight as checks
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.checkpoint import Checkpoints
from alexnet_jax.training.metrics import log
from alexnet_jax.training.profiling import StepProfiler
from alexnet_jax.training.step import (
    TrainState,
    init_state,
    inputs,
    jit_init_state,
    jit_train_step,
    make_optimizer,
)

Array = jax.Array
PREFLIGHT_IMAGES = 128  # enough for a standard deviation, and any one device holds them
STALL = 0.05  # the share of its time that the loop may stand still before it says so

# ---------------------------------------------------------------------------------- what is open


@dataclasses.dataclass(frozen=True)
class Job:
    """A config with everything it needs at hand: data, devices, compiled functions."""

    settings: Settings
    config: dict[str, Any]
    workdir: Path
    layout: Layout
    train: Dataset
    validation: Dataset | None  # None if data.validation is 'none'
    test: Dataset
    statistics: Statistics
    optimizer: optax.GradientTransformationExtraArgs
    shardings: Any  # of the TrainState
    train_step: Callable
    predict: evaluate.Predict

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.total_steps(len(self.train))

    def steps_every(self, every_epochs: float) -> frozenset[int]:
        """Return the step numbers at multiples of `every_epochs`, and the last step."""
        pace = every_epochs * self.settings.steps_per_epoch(len(self.train))
        times = math.floor(self.total_steps / pace)
        return frozenset({*(math.ceil(pace * i) for i in range(1, times + 1)), self.total_steps})

    def start(self) -> TrainState:
        """The state of step 0, on the devices."""
        return jit_init_state(self.settings, self.optimizer, self.shardings)

    def scores(self, params: Any, dataset: Dataset) -> dict[str, float]:
        """Errors on the centre view of every image."""
        probability = evaluate.probabilities(
            self.predict, params, self.statistics, dataset, **self.evaluation()
        )
        return evaluate.scores(probability, dataset.labels)

    def evaluation(self) -> dict[str, Any]:
        """How this job evaluates."""
        return {'layout': self.layout, 'batch_size': self.settings.loop.eval_batch_size}

    def batch(self, step: int) -> dict[str, Array]:
        """The global batch of a step, on the devices; a process reads its own rows only."""
        size = self.settings.batch_size
        rows = self.layout.local_batch_slice(size)
        return self.layout.put_batch(self.host_batch(step, rows), size)

    def host_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The batch of a step, or rows of it, as NumPy arrays."""
        return TrainStream(self.train, self.settings.seed, self.settings.batch_size, rows).batch(
            step
        )


def open_job(config: Config, settings: Settings, workdir: Path) -> Job:
    """Get the data and build what the config describes; nothing is trained yet."""
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
    """Of the training images; or those by which the net to start from has seen its own."""
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
            f'{settings.init_from} has seen images of {found.mean_image.shape[-1]} channel(s), and '
            f'{train.name} has {channels}; set init_statistics=data.'
        )
    return found


def _check_data(settings: Settings, train: Dataset) -> None:
    classes, channels = len(train.class_names), train.images.shape[-1]
    if classes != settings.net.classes:
        last = settings.net.layers[-1].name
        raise UsageError(
            f'{train.name} has {classes} classes and the net {settings.net.classes}; '
            f'set model.{last}.features={classes}.'
        )
    if channels not in (1, settings.net.channels):
        raise UsageError(f'{train.name} has {channels} channels; set model.channels={channels}.')
    if len(train) < settings.batch_size:
        raise UsageError(
            f'{train.split} holds {len(train)} images, fewer than one batch of '
            f'{settings.batch_size}; lower batch_size.'
        )


# ------------------------------------------------------------------------------------- the story


@dataclasses.dataclass
class History:
    """What a run must remember besides its state: kept in each checkpoint, as JSON."""

    errors: list[float] = dataclasses.field(default_factory=list)  # validation, top-1, oldest first
    sums: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    secs: float = 0.0  # of training: evaluation and saving not counted


def run(config: Config, workdir: Path, extend: bool = False) -> str:
    """Train a config to its end, resuming from the workdir's last checkpoint, and evaluate it.

    Args:
        config: what to train.
        workdir: the folder of the run.
        extend: the run there may have had other `epochs` and rates, see `record_extension`.

    Returns:
        One sentence: the accuracy that was reached, and the workdir.

    Raises:
        UsageError: the config is impossible, or the workdir belongs to another one.
        RunError: data or disk are not to be had, numbers are not finite, or a signal came.
    """
    settings = configuration.unpack(config)
    if config_file.is_open(config):
        config = config_file.with_data(config, *splits.facts(settings.data))
        settings = configuration.unpack(config)
    cpu.set_up_cpu(settings.mesh.cpu_devices)
    with workdirs.open_workdir(config, workdir, extend):
        workdirs.use_compilation_cache(settings.loop.compilation_cache, workdir)
        job = open_job(config, settings, workdir)
        devices = job.layout.mesh.devices.flatten()
        log(f'on {len(devices)} device(s) of kind {devices[0].device_kind}: {job.layout}')
        with Checkpoints(workdir / 'checkpoints', report=log) as checkpoints:
            job, state, history, changed = resume_or_start(job, checkpoints)
            writer = run_metrics.MetricWriter(workdir, int(state.step), settings.loop.tensorboard)
            try:
                if changed:
                    record_extension(job, int(state.step), changed, writer)
                state = train(job, state, history, checkpoints, writer)
                checkpoints.wait()
                return finish(job, state, history, writer)
            finally:
                writer.close()


def resume_or_start(
    job: Job, checkpoints: Checkpoints
) -> tuple[Job, TrainState, History, dict[str, list[Any]]]:
    """Return the newest checkpoint that verifies, or step 0 after its pre-flight check.

    A run keeps the mean image that it began with, whatever the data has become.

    Returns:
        The job, the state, the history, and what of the checkpoint's config has changed since, as
        `workdir.changes`: if anything, then this is an extension.

    Raises:
        UsageError: an extension that ends before the checkpoint's step.
    """
    shapes = jax.eval_shape(lambda: init_state(job.settings, job.optimizer))
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        job.shardings,
    )
    restored = checkpoints.restore_newest_intact(
        {'state': target, 'statistics': job.statistics._asdict()}
    )
    if restored is not None:
        changed = workdirs.changes(restored.extra['config'], job.config)
        if changed and restored.step >= job.total_steps:
            raise UsageError(
                f'{job.workdir} has been trained for {restored.step} steps, and an extension to '
                f'{job.settings.epochs:g} epochs ends after {job.total_steps}; set epochs higher.'
            )
        log(f'going on from step {restored.step} of {job.total_steps} in {job.workdir}')
        job = match_classes(job, restored.extra['class_names'])
        job = dataclasses.replace(job, statistics=Statistics(**restored.state['statistics']))
        history = History(**restored.extra.get('history', {}))
        return job, restored.state['state'], history, changed
    state = job.start()
    if job.settings.init_from != 'none':
        state = begin_with(job, state)
    preflight(job, state)
    return job, state, History(), {}


def record_extension(
    job: Job, step: int, changed: dict[str, list[Any]], writer: run_metrics.MetricWriter
) -> None:
    """Write the config of an extension, and a record of what it changes from which step on.

    The state, its step and its velocity are those of the checkpoint. Rates are functions of the
    step under the new config. What is stretched over `epochs` (rates of kind dexp; in our configs
    `late_freeze` and the end of colour noise too) was until now not as in a run of the new length.
    """
    words = ', '.join(f'{key} {old} -> {new}' for key, (old, new) in changed.items())
    log(
        f'extending from step {step}: {words}. Rates follow the new config from here and may rise: '
        f'what is stretched over epochs, as dexp, was not until now what it would have been in '
        f'{job.settings.epochs:g} epochs from the start.'
    )
    if distributed.is_first():
        workdirs.write_config(job.config, job.workdir)
    written = run_metrics.read(job.workdir)
    if not any(r['kind'] == 'extension' and r['step'] == step for r in written):
        writer.write('extension', step, changed=changed)


def match_classes(job: Job, names: list[str]) -> Job:
    """Number the classes of the data as the checkpoint does; see `splits.match`."""
    matched = {
        split: splits.match(dataset, names, job.settings.data, job.workdir)
        for split in splits.NAMED
        if (dataset := getattr(job, split)) is not None
    }
    if sorted(job.train.class_names) == sorted(names) and job.train.class_names != tuple(names):
        log('warning: the data has its classes in another order now; they are mapped by name')
    return dataclasses.replace(job, **matched)


def begin_with(job: Job, state: TrainState) -> TrainState:
    """The state of step 0 with the weights of another run's net; see finetune.py."""
    where = job.settings.init_from
    restored = finetune.read(where)
    fresh = job.layout.to_host(state.params)
    layers = [layer.name for layer in job.settings.net.layers]
    names = [job.train.class_names, splits.class_names(job.settings.data, words=False)]
    params, carried = finetune.parameters(
        fresh, restored, layers, names, where, job.settings.init_layers
    )
    finetune.compare(job.config, restored, where, carried)
    return state.replace(params=mesh.put_global(params, job.shardings.params))


def preflight(job: Job, state: TrainState) -> None:
    """Say how the start looks, before it costs days; see preflight.py."""
    labels, pixels = first_batch(job)
    params = job.layout.to_host(state.params)
    found = checks.preflight(job.settings.net, params, pixels, labels)
    log(
        f'pre-flight: the logits differ across images by {found.logit_std:.1e}, loss '
        f'{found.loss:.4f}, ln({job.settings.net.classes}) = {found.plateau:.4f}'
    )
    problem = checks.collapsed_init(found, job.settings.loop.min_logit_std)
    if problem and job.settings.loop.on_collapsed_init == 'error':
        raise RunError(problem)
    if problem:
        log(f'warning: {problem}')


def first_batch(job: Job) -> tuple[Array, Array]:
    """Labels [B] of the first images of the first batch, and their crops as conv1 sees them."""
    rows, recipe = slice(PREFLIGHT_IMAGES), job.settings.preprocess
    batch = jax.tree.map(jnp.asarray, job.host_batch(0, rows))
    size, *_, channels = batch['image'].shape
    statistics = job.layout.to_host(job.statistics)

    @jax.jit
    def crops(images, statistics):
        draws = augment.fixed(size, channels, recipe)
        return augment.apply(images, draws, statistics, recipe)

    return batch['label'], crops(batch['image'], statistics)


def train(
    job: Job,
    state: TrainState,
    history: History,
    checkpoints: Checkpoints,
    writer: run_metrics.MetricWriter,
) -> TrainState:
    """From the state's step to the last; evaluates, saves and logs on the way."""
    loop, start = job.settings.loop, int(state.step)
    evaluations = job.steps_every(loop.evaluate_every_epochs) if job.validation else frozenset()
    saves = job.steps_every(loop.checkpoint_every_epochs)
    step_log = StepLog(job, history, writer, start)
    profile_steps = loop.profile_steps if distributed.is_first() else 0
    profiler = StepProfiler(job.workdir / 'profile', profile_steps, start, job.total_steps)
    # Two threads: while one puts a batch on the devices, the next is read.
    batches = batching.prefetch(job.batch, start, job.total_steps, loop.prefetch_batches, threads=2)
    closing = contextlib.closing
    with closing(batches), closing(step_log), closing(profiler), Interrupt() as interrupt:
        for step in range(start + 1, job.total_steps + 1):
            with profiler.step(step):
                batch = step_log.wait_for(batches)
                state, metrics = job.train_step(state, batch, job.statistics)
                step_log.after(step, metrics, state)
            profiler.after(step, state)
            if step == start + 1:  # it is compiled
                cpu.keep_freed()
            leaving = interrupt.asks_to_leave(step)  # asked once: a signal may come at any line
            due = step in evaluations or step in saves or leaving
            if due:
                step_log.catch_up(state)
            error = None
            if step in evaluations:
                state, error = epoch_end(job, state, history, writer, step_log)
            if step in saves or leaving:
                save(job, checkpoints, state, history, error)
            if leaving and step < job.total_steps:
                checkpoints.wait()
                raise interrupt.leave(step, job)
            if due:
                step_log.go_on()
    return state


def epoch_end(
    job: Job,
    state: TrainState,
    history: History,
    writer: run_metrics.MetricWriter,
    step_log: 'StepLog',
) -> tuple[TrainState, float]:
    """Evaluate on every validation image; the plateau rule sees the error."""
    step = int(state.step)
    assert job.validation is not None
    scores = job.scores(state.params, job.validation)
    history.errors.append(scores['top1_error'])
    epoch = step / job.settings.steps_per_epoch(len(job.train))
    writer.write('validation', step, epoch=epoch, **scores)
    step_log.bar.line(
        f'epoch {epoch:.2f}: validation error {scores["top1_error"]:.2%}, '
        f'top-5 {scores["top5_error"]:.2%}, loss {scores["nll"]:.4f}'
    )
    drops = optimizers.plateau_drops(
        history.errors, job.settings.optimizer.weights, job.settings.loop.evaluate_every_epochs
    )
    replicated = mesh.put_global(np.int32(drops), job.layout.replicated)
    return state.replace(num_lr_drops=replicated), scores['top1_error']


def save(
    job: Job, checkpoints: Checkpoints, state: TrainState, history: History, error: float | None
) -> None:
    """All that is needed to go on, and to classify an image from the checkpoint alone."""
    tree = {'state': state, 'statistics': job.statistics._asdict()}
    extra = {
        'config': job.config,
        'history': dataclasses.asdict(history),
        'class_names': list(job.train.class_names),
        'stored': list(job.train.images.shape[1:]),
    }
    checkpoints.save(int(state.step), tree, extra, error=error)


def finish(job: Job, state: TrainState, history: History, writer: run_metrics.MetricWriter) -> str:
    """Evaluate on every test image, one view and ten, and say what was reached."""
    result, arrays = evaluate.report(
        job.predict, state.params, job.statistics, job.test, **job.evaluation()
    )
    if distributed.is_first():
        evaluate.keep_predictions(job.workdir, 'test', arrays)
    tested = {r['step'] for r in run_metrics.read(job.workdir) if r['kind'] == 'test'}
    if job.total_steps not in tested:
        writer.write('test', job.total_steps, secs=history.secs, **result)
    centre, ten = result['centre'], result['ten_views']
    return (
        f'{job.settings.name}: test accuracy {1 - centre["top1_error"]:.4f} '
        f'({1 - ten["top1_error"]:.4f} over ten views) on {result["images"]} images after '
        f'{job.total_steps} steps, {history.secs:.0f} s of training; it lies in {job.workdir}'
    )


# ------------------------------------------------------------------------- the loop's companions


class StepLog:
    """Follows the loop one step behind, so that an accelerator never waits for the host."""

    def __init__(self, job: Job, history: History, writer: run_metrics.MetricWriter, start: int):
        self.job, self.history, self.writer = job, history, writer
        self.bar = ProgressBar(job.total_steps, start, log, shown=distributed.is_first())
        self.means = run_metrics.Means(history.sums)
        self.pending: tuple[int, dict] | None = None
        self.since, self.stalled, self.logged_secs = time.perf_counter(), 0.0, history.secs
        self.steps = 0
        self.windows, self.said_limit = 0, False

    def wait_for(self, batches: Iterator) -> Any:
        """The next batch, and how long the loop stood still for it."""
        begin = time.perf_counter()
        batch = next(batches)
        self.stalled += time.perf_counter() - begin
        return batch

    def after(self, step: int, metrics: dict, state: TrainState) -> None:
        """Step `step` is under way: take in the one before."""
        previous, self.pending = self.pending, (step, metrics)
        cpu.block_on_cpu(metrics)
        if previous is not None:
            self._take(*previous, state)

    def catch_up(self, state: TrainState) -> None:
        """Take in the last step too, and stop the clock."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._take(*pending, state)
        jax.block_until_ready(state)
        self._tick()
        self.history.sums = dict(self.means.sums)

    def go_on(self) -> None:
        """Start the clock again."""
        self.since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.history.secs += now - self.since
        self.since = now

    def _take(self, step: int, metrics: dict, state: TrainState) -> None:
        metrics = jax.device_get(metrics)
        if not math.isfinite(metrics['loss'][0]):
            raise not_finite(self.job, state)
        self.means.add(metrics)
        self.steps += 1
        self.bar.to(step)
        if step % self.job.settings.loop.log_every_steps == 0 or step == self.job.total_steps:
            self._write(step)

    def _write(self, step: int) -> None:
        self._tick()
        secs = self.history.secs - self.logged_secs
        pace = self.steps * self.job.settings.batch_size / max(secs, 1e-9)
        means = self.means.take()
        timing = {'secs': self.history.secs, 'images_per_sec': pace, 'stall_secs': self.stalled}
        epoch = step / self.job.settings.steps_per_epoch(len(self.job.train))
        self.writer.write('train', step, epoch=epoch, **means, **timing)
        left = (self.job.total_steps - step) * self.job.settings.batch_size / pace
        text = f'loss {means["loss"]:.4f}  {pace:.0f} images/s'
        self.bar.to(step, text)
        if self.bar.plain:
            log(f'step {step}/{self.job.total_steps}  {text}  {duration(left)} left')
        self._judge_input(secs)
        self.steps, self.stalled, self.logged_secs = 0, 0.0, self.history.secs

    def _judge_input(self, secs: float) -> None:
        """Say once if the loop stands still for want of images, and how many cores would do."""
        self.windows += 1
        share = self.stalled / max(secs, 1e-9)
        if self.said_limit or self.windows == 1 or share <= STALL:  # the first has the start in it
            return
        size = self.job.settings.batch_size
        rows = len(range(size)[self.job.layout.local_batch_slice(size)])
        wanted = self.steps * rows / max(secs - self.stalled, 1e-9)
        if why := datasets.shortage(self.job.train, wanted):
            self.said_limit = True
            self.bar.line(f'the input is the limit, {share:.0%} of the time: {why}')

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()


def not_finite(job: Job, state: TrainState) -> RunError:
    """The step that went wrong can be repeated: `state` is as it was before it."""
    state, statistics = job.layout.to_host((state, job.statistics))
    step = int(state.step)
    batch = jax.tree.map(jnp.asarray, job.host_batch(step))
    pixels, masks = inputs(job.settings, len(job.train), state, batch, statistics)
    net = job.settings.net
    where = checks.first_not_finite(net, state.params, pixels, batch['label'], masks)
    return RunError(
        f'step {step + 1}: the loss or a gradient is not finite, first in {where}; lower '
        f"optimizer.weights.rate or the layer's init_std. Checkpoints are as they were."
    )


class Interrupt:
    """SIGTERM and Ctrl-C ask the loop to finish its step, save and leave; a second Ctrl-C kills.

    Of several processes any may be asked, and all leave after the same step.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'Interrupt':
        if distributed.several():  # JAX handles SIGTERM from the first step to the last
            self._before[signal.SIGTERM] = signal.SIG_DFL
            return self
        with contextlib.suppress(ValueError):  # handlers belong to the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asks_to_leave(self, step: int) -> bool:
        """Whether to leave after this step."""
        if distributed.several():
            return distributed.asked_to_leave(step)
        return self.signal is not None

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.signal = number
        signal.signal(number, self._before[number])

    def leave(self, step: int, job: Job) -> RunError:
        """How to go on, as an error that carries the shell's exit code of the signal."""
        number = signal.Signals(self.signal or signal.SIGTERM)
        error = RunError(
            f'{number.name}: saved at step {step} of {job.total_steps}; the same command with '
            f'--workdir={job.workdir} goes on from there.'
        )
        error.exit_code = 128 + number
        return error
