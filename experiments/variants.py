"""Write the table of the tutorials' AlexNets and LeNet: results here, and those reported.

python -m experiments.sweep variants --scale=quickstart --seeds=3      # or fashion_mnist
python -m experiments.variants --runs=workdirs/variants-quickstart
python -m experiments.variants          # rebuild from the archive in the repository
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import VARIANTS
from experiments import run_archive
from experiments.output import config_module, markdown, write_text
from experiments.run_archive import ArchivedRun

CONFIGS = ('alexnet', *VARIANTS)  # what experiments.sweep runs
SEEDS = 3
REPORTED_AT = 'fashion_mnist'  # the full nets at 224 px, as in the tutorials
RESULTS = Path(__file__).parent / 'results' / 'variants'


def table(runs: Sequence[ArchivedRun], scale: str) -> str:
    """Return mean accuracies and their standard deviation over seeds, as Markdown."""
    body = []
    for name in CONFIGS:
        own = [run for run in runs if run.row == name]
        cells = ['not run'] * 4
        if own:
            epochs = f'{own[0].config["epochs"]:g}'
            cells = [str(len(own)), _accuracy(own, 'centre'), _accuracy(own, 'ten_views'), epochs]
        body.append([name, *cells, _reported(name, scale)])
    test = runs[0].config['data']['test']
    head = [scale, 'seeds', 'test accuracy', 'ten views', 'epochs', 'reported']
    parts = [
        markdown([head, *body]),
        f'Mean ± standard deviation over seeds, on all images of `{test}`.\n'
        f'Trained {run_archive.trained_on(runs)}.',
    ]
    return '\n\n'.join(parts + by_epoch(runs) * (scale == REPORTED_AT)) + '\n'


def by_epoch(runs: Sequence[ArchivedRun]) -> list[str]:
    """Return tables of the test accuracy after each epoch, beside what a tutorial printed.

    At the scale of REPORTED_AT the validation split is the test set, as in the tutorials.
    """
    parts = []
    for run in runs:
        printed = getattr(config_module(run.row), 'REPORTED_BY_EPOCH', {})
        if not printed:
            continue
        found = [record for record in run.records if record['kind'] == 'validation']
        # An evaluation comes after the step that completes the epoch: 1.0005, of 468.75 steps each.
        ends = [round(record['epoch'], 2) for record in found]
        here = f'here, {run.environment["device"]}, {run.final()["secs"] / 60:.1f} min'
        rows = [
            [f'{run.row}, seed {run.seed}: test accuracy after epoch', *(f'{e:g}' for e in ends)],
            [here, *(f'{1 - record["top1_error"]:.3f}' for record in found)],
            ['reported', *(f'{printed[end]:.3f}' if end in printed else '-' for end in ends)],
            ['training loss, here', *_training(run, ends)],
        ]
        parts += [markdown(rows), _reported_training(run.row)]
    return parts


def _training(run: ArchivedRun, ends: Sequence[float]) -> list[str]:
    """Return the mean training loss of each epoch, of the windows of steps that end in it.

    An archive that keeps one window an epoch, as `run_archive.thinned` does, has no such mean.
    """
    windows = [record for record in run.records if record['kind'] == 'train']
    cells = []
    for start, end in itertools.pairwise((0.0, *ends)):
        losses = [record['loss'] for record in windows if start + 0.01 < record['epoch'] <= end]
        cells.append(f'{np.mean(losses):.3f}' if len(losses) > 1 else '-')
    return cells


def _reported_training(name: str) -> str:
    loss, accuracy, epoch = config_module(name).REPORTED_TRAINING
    return f'Reported in epoch {epoch}: training loss {loss}, training accuracy {accuracy}.'


def _accuracy(own: Sequence[ArchivedRun], view: str) -> str:
    values = np.array([run.accuracy(view) for run in own])
    spread = f' ± {values.std(ddof=1):.4f}' if len(values) > 1 else ''
    return f'{values.mean():.4f}{spread}'


def _reported(name: str, scale: str) -> str:
    value = getattr(config_module(name), 'REPORTED', None)
    return f'{value:.3f}' if value is not None and scale == REPORTED_AT else '-'


def archive(folder: Path, results: Path) -> Path:
    """Archive the finished runs of a sweep; return the folder of their scale."""
    return run_archive.archive_all(folder, results, CONFIGS)[0]


def build(folder: Path) -> str:
    """Write table.md from the archive in `folder`; return the table."""
    text = table(run_archive.read(folder, predictions=False), folder.name)
    write_text(folder / 'table.md', text)
    return text


main = functools.partial(run_archive.main, 'variants', RESULTS, archive, build)

if __name__ == '__main__':
    sys.exit(main())
