"""Measure the seconds of training needed to reach a given test accuracy.

    python -m experiments.time_to_accuracy --workdir=workdirs/time     # 0.885 on Fashion-MNIST

The full net at 224 px. The default target is the tutorials' figure, which they reach in 10 epochs
at about 4,150 images/s. Training is the trainer's own loop. It stops at the end of the config's
epochs, or after the first whose *validation* accuracy is --margin above the target: the test images
are used only after training. Then the parameters of each epoch are evaluated on all of them, and
the first epoch that reaches the target counts. Only training time is counted: it includes
compilation of the step, but not evaluations, checkpoints or other compilation.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import command, config_file, files
from alexnet_jax import config as configuration
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import cpu, mesh
from alexnet_jax.training import train
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.callbacks import Callback, StepLog
from alexnet_jax.training.job import open_job
from alexnet_jax.training.metrics import History, MetricWriter
from alexnet_jax.training.step import TrainState
from experiments.throughput import results

TARGET = 0.885
NOT_HERE = 'not run: this trains the full net, which needs a GPU; add --anyway to use this device.'


class EpochParams(Callback):
    """Keeps the parameters at the end of each epoch, and stops once validation is good enough.

    Args:
        folder: of the parameters.
        history: of the run.
        enough: validation accuracy.
    """

    def __init__(self, folder: Path, history: History, enough: float):
        self.folder, self.history, self.enough = folder, history, enough
        self.accuracy: float | None = None
        self.found: list[dict[str, Any]] = []

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Note the accuracy."""
        self.accuracy = 1 - scores['top1_error']

    def should_stop(self, step: int) -> bool:
        """Return whether the last validation was good enough."""
        return self.accuracy is not None and self.accuracy >= self.enough

    def on_save(self, step: int, state: TrainState, error: float | None) -> None:
        """Write the parameters; note step, seconds of training and validation accuracy."""
        path = self.folder / f'params_{step}.npz'
        np.savez(path, *jax.tree.leaves(jax.device_get(state.params)))
        accuracy = None if error is None else 1 - error
        row = {'step': step, 'secs': self.history.secs, 'validation': accuracy, 'path': path}
        self.found.append(row)

    def params(self, number: int, shardings: Any) -> Any:
        """Return those of an epoch, on the devices."""
        with np.load(self.found[number]['path']) as file:
            leaves = list(file.values())
        tree = jax.tree.unflatten(jax.tree.structure(shardings), leaves)
        return mesh.put_global(tree, shardings)


def measure(config: Any, workdir: Path, target: float, margin: float) -> dict[str, Any]:
    """Train, then evaluate on the test images; `secs` is None if no epoch reached the target."""
    settings = configuration.unpack(config)
    cpu.set_up_cpu(settings.mesh.cpu_devices)
    with workdirs.open_workdir(config, workdir):
        workdirs.use_compilation_cache(settings.loop.compilation_cache, workdir)
        job = open_job(config, settings, workdir)
        state, history = job.start(), History()
        epochs = EpochParams(workdir, history, target + margin)
        with (
            contextlib.closing(MetricWriter(workdir, 0, settings.loop.tensorboard)) as writer,
            contextlib.closing(
                StepLog(settings, job.train, settings.batch_size, history, writer, 0)
            ) as step_log,
        ):
            train.train(job, state, history, [step_log, epochs])
    accuracies = []
    for number in range(len(epochs.found)):
        params = epochs.params(number, job.shardings.params)
        accuracies.append(1 - train.validation_scores(job, params, job.test)['top1_error'])
        epochs.found[number]['path'].unlink()
    first = next((i for i, accuracy in enumerate(accuracies) if accuracy >= target), None)
    return {
        'config': f'{settings.name}:{settings.scale}',
        'dtype': settings.net.compute_dtype,
        'target': target,
        'margin': margin,
        'secs': None if first is None else epochs.found[first]['secs'],
        'epoch': None if first is None else first + 1,
        'reached': None if first is None else accuracies[first],
        'epoch_secs': [epoch['secs'] for epoch in epochs.found],
        'validation_accuracy': [epoch['validation'] for epoch in epochs.found],
        'test_accuracy': accuracies,
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
    add(
        '--margin',
        type=float,
        default=0.01,
        help='stop once validation accuracy exceeds the target by this',
    )
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
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / f'time_to_accuracy_{results.slug(row["device"])}.json'
    with files.atomic_write(path) as scratch:
        scratch.write_text(json.dumps(row, indent=1) + '\n')
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
