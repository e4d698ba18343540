"""Reproduce figure 1 of the paper: how much sooner ReLU reaches 25 % training error than tanh.

    python -m experiments.sweep figure1 --seeds=3                       # Fashion-MNIST
    python -m experiments.figure1 --runs=workdirs/figure1-fashion_mnist
    python -m experiments.figure1                                       # rebuild from the archive

With --scale=cifar10, the paper's data, after
`tfds build cifar10 --file_format=array_record --data_dir=data`.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alexnet_jax.analysis import drawing
from experiments import run_archive
from experiments.output import markdown, write_text

# Each activation has its own rate: the one with the fewest epochs, averaged over all seeds.
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
FUNCTIONS = {'relu': 'ReLU', 'tanh': 'tanh'}
TARGET = 0.25  # [p 3.1]

# What experiments.sweep runs.
CONFIGS = tuple(f'experiments/figure1_net.py:{function}' for function in FUNCTIONS)
OVERRIDES = {
    f'rate{rate:g}': {'optimizer.weights.rate': rate, 'optimizer.biases.rate': rate}
    for rate in RATES
}
SCALE, SEEDS = 'fashion_mnist', 3

RESULTS = Path(__file__).parent / 'results' / 'figure1'
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Training records of an activation at a rate, by seed."""

    function: str
    rate: float
    seeds: dict[int, list[Record]]

    def epochs(self) -> dict[int, float]:
        """Return the epochs to TARGET by seed; inf where a run never reached it."""
        return {seed: epochs_to(found, TARGET) for seed, found in self.seeds.items()}

    def mean(self) -> float:
        """Return the mean epochs over seeds; inf if one never reached TARGET."""
        return float(np.mean(list(self.epochs().values())))

    def records(self) -> list[Record]:
        """Return the mean curve over seeds."""
        several = [
            (own[0]['epoch'], [record['top1_error'] for record in own])
            for own in zip(*self.seeds.values(), strict=False)
        ]
        return [
            {'kind': 'train', 'epoch': epoch, 'top1_error': float(np.mean(errors))}
            for epoch, errors in several
        ]


def epochs_to(found: Sequence[Record], target: float) -> float:
    """Return the epoch where the training error first falls to `target`; inf if it does not.

    Each record is the mean of the window that ends at its epoch.
    """
    before, epoch, error = 0.0, 0.0, math.inf
    for record in found:
        middle, own = (before + record['epoch']) / 2, record['top1_error']
        if own <= target:
            share = (error - target) / (error - own) if math.isfinite(error) else 1.0
            return epoch + share * (middle - epoch)
        before, epoch, error = record['epoch'], middle, own
    return math.inf


def archive(folder: Path, results: Path) -> Path:
    """Archive the training curves of all ended runs of a sweep; return the folder of their scale.

    A run that ended with infinite numbers is archived as far as it came.
    """
    rows = [f'figure1_net_{function}-{name}' for function in FUNCTIONS for name in OVERRIDES]
    return run_archive.archive_all(folder, results, rows, _curve)[0]


def _curve(records: Sequence[Record]) -> list[Record]:
    keys = ('kind', 'step', 'epoch', 'loss', 'top1_error')
    return [{key: r[key] for key in keys} for r in records if r['kind'] == 'train']


def read(folder: Path) -> list[Curves]:
    """Return the curves in the archive of a scale, by activation and rate."""
    found: dict[tuple[str, float], dict[int, list[Record]]] = {}
    for path in folder.glob('*/config.json'):
        run = run_archive.read_run(path.parent)
        function = run.config['name'].removeprefix('figure1_')
        seeds = found.setdefault((function, run.config['optimizer']['weights']['rate']), {})
        seeds[run.seed] = run.records
    order = sorted(found, key=lambda key: (list(FUNCTIONS).index(key[0]), key[1]))
    return [Curves(*key, seeds=dict(sorted(found[key].items()))) for key in order]


def chosen(found: Sequence[Curves], function: str) -> Curves | None:
    """Return the curves at the rate with the fewest epochs, among those with most seeds.

    None where no rate reached the target with all its seeds, or none was run.
    """
    own = [curves for curves in found if curves.function == function]
    most = max((len(curves.seeds) for curves in own), default=0)
    own = [curves for curves in own if len(curves.seeds) == most]
    best = min(own, key=lambda curves: curves.mean(), default=None)
    return None if best is None or math.isinf(best.mean()) else best


def ratio(tanh: Curves, relu: Curves) -> tuple[int, float, float, float]:
    """Return epochs of tanh over those of ReLU: (common seeds, geometric mean, low, high).

    The 95 % interval is over seeds, by Student's t on the logarithms. It does not include that the
    rates were chosen on the same seeds. nan where there are too few seeds.
    """
    slow, fast = tanh.epochs(), relu.epochs()
    logs = np.log([slow[seed] / fast[seed] for seed in slow if seed in fast])
    seeds = len(logs)
    mean = float(np.exp(logs.mean())) if seeds else math.nan
    if seeds < 2:
        return seeds, mean, math.nan, math.nan
    half = stats.t.ppf(0.975, seeds - 1) * logs.std(ddof=1) / math.sqrt(seeds)
    return seeds, mean, mean * math.exp(-half), mean * math.exp(half)


def page(found: Sequence[Curves], scale: str) -> str:
    """Return the table of rates and the ratio, as Markdown."""
    both = {function: chosen(found, function) for function in FUNCTIONS}
    rates = sorted({curves.rate for curves in found})
    by_key = {(curves.function, curves.rate): curves for curves in found}
    body = [
        [f'rate {rate:g}', *(_cell(by_key.get((f, rate)), both[f]) for f in FUNCTIONS)]
        for rate in rates
    ]
    head = [f'epochs to {TARGET:.0%} training error, {scale}', *FUNCTIONS.values()]
    edges = [
        f'{FUNCTIONS[f]} is fastest at the end of the grid; a rate beyond it may be faster.'
        for f, own in both.items()
        if own and own.rate in (rates[0], rates[-1])
    ]
    paper = (
        'The paper reports a factor of six on CIFAR-10, for a net that it does not describe (3.1, '
        'figure 1).'
    )
    return f'{markdown([head, *body])}\n\n{" ".join([_compared(**both), paper, *edges])}\n'


def _compared(relu: Curves | None, tanh: Curves | None) -> str:
    if relu is None or tanh is None:
        return 'One did not reach it with all seeds at any rate, so there is no ratio.'
    seeds, mean, low, high = ratio(tanh, relu)
    between = f' [{low:.2f}, {high:.2f}]' if math.isfinite(low) else ''
    inconclusive = '; inconclusive' if low <= 1 <= high else ''
    return (
        f'tanh at {tanh.rate:g} takes {mean:.2f}{between} times as many epochs as ReLU at '
        f'{relu.rate:g} ({seeds} seeds; brackets: 95 % interval over seeds){inconclusive}.'
    )


def _cell(curves: Curves | None, best: Curves | None) -> str:
    if curves is None:
        return 'not run'
    values = list(curves.epochs().values())
    if missed := sum(map(math.isinf, values)):
        return f'not reached by {missed} of {len(values)} seeds'
    spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
    text = f'{np.mean(values):.3f}{spread}'
    return f'**{text}**' if curves is best else text


def build(folder: Path) -> str:
    """Write table.md and figure1.svg from the archive in `folder`; return the table."""
    found = read(folder)
    text = page(found, folder.name)
    write_text(folder / 'table.md', text)
    both = [own for function in FUNCTIONS if (own := chosen(found, function))]
    curves = {f'{FUNCTIONS[own.function]}, rate {own.rate:g}': own.records() for own in both}
    if curves:
        write_text(folder / 'figure1.svg', drawing.render(drawing.fig1(curves), 'svg').decode())
    return text


main = functools.partial(run_archive.main, 'figure1', RESULTS, archive, build)

if __name__ == '__main__':
    sys.exit(main())
