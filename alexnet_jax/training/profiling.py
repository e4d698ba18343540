"""A trace of some training steps, by jax.profiler, for TensorBoard and Perfetto."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.training.metrics import log

SETTLE_STEPS = 10  # the first of a start compile, fill the prefetch queue and take new memory


class StepProfiler:
    """Traces a number of steps of this start of a run.

    They are those behind the first SETTLE_STEPS, or, of a run that ends before, the last ones, but
    not the one that is compiled unless there is no other.

    Args:
        folder: where the trace is written, as TensorBoard's profile plugin looks for it.
        steps: how many; 0 traces none.
        start: steps that have been trained already.
        total: steps of the run.
    """

    def __init__(self, folder: Path, steps: int, start: int, total: int):
        settle = min(SETTLE_STEPS, max(1, total - start - steps))
        self.folder, self.running = folder, False
        self.first = min(start + settle + 1, total) if steps else total + 1
        self.last = min(self.first + steps - 1, total)

    @contextlib.contextmanager
    def step(self, step: int) -> Generator[None]:
        """Trace what is done in this context if `step` is among the steps, under its number."""
        if step == self.first:
            log(f'tracing steps {self.first} to {self.last}')
            jax.profiler.start_trace(self.folder)
            self.running = True
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            yield

    def after(self, step: int, state: Any) -> None:
        """End the trace when the last of its steps has been computed."""
        if step == self.last and self.running:
            jax.block_until_ready(state)
            self.close()
            log(
                f'the trace is in {self.folder}: tensorboard --logdir={self.folder.parent}, or '
                f'its trace.json.gz in ui.perfetto.dev'
            )

    def close(self) -> None:
        """End a trace that is under way."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
