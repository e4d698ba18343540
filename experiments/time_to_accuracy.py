"""Measure the seconds of training needed to reach a given test accuracy.

    python -m experiments.time_to_accuracy --workdir=workdirs/time     # 0.885 on Fashion-MNIST

The trainer's own loop runs to the end of the config's epochs, or to the first whose *validation*
accuracy is --margin above the target: no decision depends on the test images. The first epoch whose
test accuracy reaches the target counts. Only training time is counted: it includes compilation of
the step, but not evaluations, checkpoints or other compilation.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import command, config_file
from alexnet_jax import config as configuration
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import cpu
from alexnet_jax.training import train
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.callbacks import Callback, StepLog
from alexnet_jax.training.job import Job
from alexnet_jax.training.metrics import History, MetricWriter
from alexnet_jax.training.step import TrainState
from experiments.output import slug, write_text
from experiments.throughput import results

TARGET = 0.885  # the tutorials' figure, which they reach in 10 epochs at about 4,150 images/s
NOT_HERE = 'not run: this trains the full net, which needs a GPU; add --anyway to use this device.'


class Epochs(Callback):
    """Seconds of training, validation and test accuracy after each epoch.

    Args:
        job: the run.
        history: of the run.
        enough: the validation accuracy that stops it.
    """

    def __init__(self, job: Job, history: History, enough: float):
        self.job, self.history, self.enough = job, history, enough
        self.secs: list[float] = []
        self.validation: list[float] = []
        self.test: list[float] = []

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Note the validation accuracy."""
        self.validation.append(1 - scores['top1_error'])

    def should_stop(self, step: int) -> bool:
        """Return whether the last validation was good enough."""
        return bool(self.validation) and self.validation[-1] >= self.enough

    def on_save(self, step: int, state: TrainState, error: float | None) -> None:
        """Note the test accuracy, while the clock of training is paused."""
        self.secs.append(self.history.secs)
        self.test.append(1 - self.job.scores(state.params, self.job.test)['top1_error'])


def measure(config: Any, workdir: Path, target: float, margin: float) -> dict[str, Any]:
    """Train, evaluating after each epoch; `secs` is None if no epoch reached the target."""
    settings = configuration.unpack(config)
    cpu.set_up_cpu(settings.mesh.cpu_devices)
    with workdirs.open_workdir(config, workdir):
        workdirs.use_compilation_cache(settings.loop.compilation_cache, workdir)
        job = train.open_job(config, settings, workdir)
        state, history = job.start(), History()
        epochs = Epochs(job, history, target + margin)
        with (
            contextlib.closing(MetricWriter(workdir, 0, settings.loop.tensorboard)) as writer,
            contextlib.closing(StepLog(job, history, writer, 0)) as step_log,
        ):
            train.train(job, state, history, [step_log, epochs])
    first = next((i for i, accuracy in enumerate(epochs.test) if accuracy >= target), None)
    return {
        'config': f'{settings.name}:{settings.scale}',
        'dtype': settings.net.compute_dtype,
        'target': target,
        'margin': margin,
        'secs': None if first is None else epochs.secs[first],
        'epoch': None if first is None else first + 1,
        'reached': None if first is None else epochs.test[first],
        'epoch_secs': epochs.secs,
        'validation_accuracy': epochs.validation,
        'test_accuracy': epochs.test,
        **results.environment(),
    }


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.time_to_accuracy',
        description=(__doc__ or '').splitlines()[0],
    )
    add = parser.add_argument
    add('--config', default='configs/alexnet.py:fashion_mnist')
    add('--target', type=float, default=TARGET, help='target test accuracy (0.885)')
    what = 'stop once validation accuracy exceeds the target by this'
    add('--margin', type=float, default=0.01, help=what)
    add('--dtype', choices=('float32', 'bfloat16'), default='bfloat16')
    add('--workdir', type=command.path, required=True, help='a new folder')
    add('--out', type=command.path, default=results.RESULTS, help='folder for the result')
    add('--anyway', action='store_true', help='run even without a GPU')
    return parser


def act(flags: argparse.Namespace) -> int:
    """Measure, store, and print one line."""
    if jax.default_backend() == 'cpu' and not flags.anyway:
        print(NOT_HERE)
        return 0
    if (flags.workdir / 'metrics.jsonl').exists():
        raise UsageError(f'{flags.workdir} contains a run; choose a new --workdir.')
    every_epoch = {'loop.evaluate_every_epochs': 1.0, 'loop.checkpoint_every_epochs': 1.0}
    config = config_file.load(flags.config, every_epoch | {'model.compute_dtype': flags.dtype})
    row = measure(config, flags.workdir, flags.target, flags.margin)
    path = flags.out / f'time_to_accuracy_{slug(row["device"])}.json'
    write_text(path, json.dumps(row, indent=1) + '\n')
    if row['secs'] is None:
        best = max(row['test_accuracy'])
        raise RunError(f'{flags.target} was not reached: the best was {best:.4f}; see {path}.')
    print(f'{row["reached"]:.4f} after {row["secs"]:.1f} s, epoch {row["epoch"]}; see {path}')
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.run('time_to_accuracy', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
