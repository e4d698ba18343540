"""Trace some training steps with jax.profiler, for TensorBoard and Perfetto."""

from pathlib import Path

import jax

from alexnet_jax.training.callbacks import Callback
from alexnet_jax.training.metrics import log
from alexnet_jax.training.step import TrainState

SETTLE_STEPS = 10  # the first steps compile, fill the prefetch queue and allocate memory


class StepProfiler(Callback):
    """Traces a number of steps of this start of a run.

    They follow the first SETTLE_STEPS. A shorter run has its last steps traced, but not the
    one that is compiled, unless there is no other.

    Args:
        folder: of the trace, in the form of TensorBoard's profile plugin.
        steps: their number; 0 traces none.
        start: number of steps trained already.
        total: number of steps of the run.
    """

    def __init__(self, folder: Path, steps: int, start: int, total: int):
        settle = min(SETTLE_STEPS, max(1, total - start - steps))
        self.folder, self.running = folder, False
        self.first = min(start + settle + 1, total) if steps else total + 1
        self.last = min(self.first + steps - 1, total)

    def on_step_begin(self, step: int) -> None:
        """Start the trace before its first step; mark each step by its number."""
        if step == self.first:
            log(f'tracing steps {self.first} to {self.last}')
            jax.profiler.start_trace(self.folder)
            self.running = True
        self._mark = jax.profiler.StepTraceAnnotation('train', step_num=step)
        self._mark.__enter__()

    def on_step_end(self, step: int, state: TrainState) -> None:
        """End the trace when its last step has been computed."""
        self._mark.__exit__(None, None, None)
        if step == self.last and self.running:
            jax.block_until_ready(state)
            self.close()
            log(
                f'the trace is in {self.folder}: tensorboard --logdir={self.folder.parent}, or '
                f'open its trace.json.gz at ui.perfetto.dev'
            )

    def close(self) -> None:
        """End a trace that is incomplete."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
