"""Callbacks of the training loop: logging, profiling, and signals that end a run early."""

import contextlib
import datetime
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax.errors import RunError
from alexnet_jax.parallel import distributed
from alexnet_jax.progress import ProgressBar
from alexnet_jax.training.job import Job
from alexnet_jax.training.metrics import History, Metrics, MetricWriter, log

STALL_SHARE = 0.05  # of the training time; the log warns when waiting for input takes more
SETTLE_STEPS = 10  # the first steps compile, fill the prefetch queue and allocate memory


class Callback:
    """Hooks of the training loop, called in the order of its events; by default they do nothing."""

    def on_step_end(self, step: int, state: Any) -> None:
        """Act when a step has been dispatched; `state` may still be under computation."""

    def on_metrics(self, step: int, metrics: Metrics, wait_secs: float) -> None:
        """Receive a step's metrics and its wait for input, while the next step runs."""

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Receive the scores on the validation images."""

    def should_stop(self, step: int) -> bool:
        """Return whether the loop is to save and end after this step; called once a step."""
        del step
        return False

    def on_save(self, step: int, state: Any, error: float | None) -> None:
        """Store the TrainState; `error` is this step's validation error, None if not evaluated."""


class StepLog(Callback):
    """Writes records of training and validation, and shows progress on the terminal.

    Args:
        job: the run.
        history: of the run; the means since the last record and the time of training.
        writer: of the records.
        start: number of steps trained already.
    """

    def __init__(self, job: Job, history: History, writer: MetricWriter, start: int):
        self.job, self.history, self.writer = job, history, writer
        self.bar = ProgressBar(job.total_steps, start, log, shown=distributed.is_first())
        self.steps, self.wait_secs, self.logged_secs = 0, 0.0, history.secs
        self.records, self.warned = 0, False

    def on_metrics(self, step: int, metrics: Metrics, wait_secs: float) -> None:
        """Add the step to the means; write a record every `log_every_steps`."""
        self.history.add(metrics)
        self.steps += 1
        self.wait_secs += wait_secs
        self.bar.to(step)
        if step % self.job.settings.loop.log_every_steps == 0 or step == self.job.total_steps:
            self._write(step)

    def _write(self, step: int) -> None:
        secs = self.history.secs - self.logged_secs
        size, total = self.job.settings.batch_size, self.job.total_steps
        rate = self.steps * size / max(secs, 1e-9)
        means = self.history.take_means()
        timing = {'secs': self.history.secs, 'images_per_sec': rate, 'stall_secs': self.wait_secs}
        self.writer.write('train', step, epoch=self.job.epoch(step), **means, **timing)
        text = f'loss {means["loss"]:.4f}  {rate:.0f} images/s'
        self.bar.to(step, text)
        if self.bar.plain:
            left = datetime.timedelta(seconds=round((total - step) * size / rate))
            log(f'step {step}/{total}  {text}  {left} left')
        self._warn_of_slow_input(secs)
        self.steps, self.wait_secs, self.logged_secs = 0, 0.0, self.history.secs

    def _warn_of_slow_input(self, secs: float) -> None:
        """Log once if reading images from disk is the bottleneck."""
        self.records += 1
        share = self.wait_secs / max(secs, 1e-9)
        if self.warned or self.records == 1 or share <= STALL_SHARE:  # start-up is in the first
            return
        if not isinstance(self.job.train.images, np.ndarray):
            self.warned = True
            self.bar.line(
                f'training waits for its input {share:.0%} of the time: more cores (data.workers) '
                'or raw storage may help, see docs/data.md'
            )

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write a record of the validation, and print it."""
        epoch = self.job.epoch(step)
        self.writer.write('validation', step, epoch=epoch, **scores)
        self.bar.line(
            f'epoch {epoch:.2f}: validation error {scores["top1_error"]:.2%}, '
            f'top-5 {scores["top5_error"]:.2%}, loss {scores["nll"]:.4f}'
        )


class StepProfiler(Callback):
    """Traces some steps of this start of a run, for TensorBoard and Perfetto.

    They follow the first SETTLE_STEPS. A shorter run has its last steps traced, without the first
    one, which is compiled.

    Args:
        folder: of the trace, in the form of TensorBoard's profile plugin.
        steps: their number; 0 traces none.
        start: number of steps trained already.
        total: number of steps of the run.
    """

    def __init__(self, folder: Path, steps: int, start: int, total: int):
        before = min(start + SETTLE_STEPS, max(start + 1, total - steps))
        self.folder, self.steps = folder, range(before + 1, min(before + steps, total) + 1)

    def on_step_end(self, step: int, state: Any) -> None:
        """Start the trace before its first step, and end it when its last has been computed."""
        if step + 1 in self.steps[:1]:
            log(f'tracing steps {self.steps[0]} to {self.steps[-1]}')
            jax.profiler.start_trace(self.folder)
        elif step in self.steps[-1:]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            log(
                f'the trace is in {self.folder}: tensorboard --logdir={self.folder.parent}, or '
                f'open its trace.json.gz at ui.perfetto.dev'
            )


class Interrupt(Callback):
    """Stop the loop after SIGTERM or Ctrl-C; a second Ctrl-C ends a single process immediately.

    Any of several processes may get the signal, and all stop after the same step.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> 'Interrupt':
        if distributed.several():  # JAX handles SIGTERM from the first step to the last
            self._handlers[signal.SIGTERM] = signal.SIG_DFL
            return self
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.signal = number
        signal.signal(number, self._handlers[number])

    def should_stop(self, step: int) -> bool:
        """Return whether a signal has come."""
        if distributed.several():
            return distributed.preempted(step)
        return self.signal is not None

    def error(self, step: int, total: int, workdir: Path) -> RunError:
        """Return the error that ends the run, with the shell's exit code for the signal."""
        number = signal.Signals(self.signal or signal.SIGTERM)
        error = RunError(
            f'{number.name}: saved at step {step} of {total}; run the same command with '
            f'--workdir={workdir} to resume.'
        )
        error.exit_code = 128 + number
        return error
