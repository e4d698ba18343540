"""Figure 1 of the paper: how much sooner ReLU reaches 25 % training error than tanh.

    python -m experiments.sweep figure1 --seeds=3                       # Fashion-MNIST
    python -m experiments.figure1 --runs=workdirs/figure1-fashion_mnist
    python -m experiments.figure1                                       # again, from what is kept

On CIFAR-10, the paper's data, likewise with --scale=cifar10, once `python -m alexnet_jax prepare
tfds --name=cifar10` has it (that wants TensorFlow and the network, once).

The net is figure1_net.py's, with ReLU and with tanh, on the same batches, and nothing regularised.
Each has its rate chosen from RATES, independently: the one with the fewest epochs to 25 %, the mean
of all seeds. Training error is that of the batches trained on, over windows of
`loop.log_every_steps`; each window stands at its middle, and between windows lie straight lines.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alexnet_jax import command
from alexnet_jax.analysis import figures
from alexnet_jax.command import log
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.training import metrics
from experiments import digest

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
    """A function at a rate: the training records of each seed."""

    function: str
    rate: float
    seeds: dict[int, list[Record]]

    def epochs(self, target: float = TARGET) -> dict[int, float]:
        """To the target, by seed; inf where a run never reached it."""
        return {seed: epochs_to(found, target) for seed, found in self.seeds.items()}

    def mean(self, target: float = TARGET) -> float:
        """Of the seeds; inf if one never reached it."""
        return float(np.mean(list(self.epochs(target).values())))

    def records(self) -> list[Record]:
        """The mean curve over the seeds."""
        several = zip(*self.seeds.values(), strict=False)
        return [
            {'kind': 'train', 'epoch': own[0]['epoch'], 'top1_error': _error(own)}
            for own in several
        ]


def _error(own: Sequence[Record]) -> float:
    return float(np.mean([record['top1_error'] for record in own]))


def epochs_to(found: Sequence[Record], target: float) -> float:
    """When the training error first falls to `target`: epochs, inf if it does not.

    Each record is of the window that ends at its epoch.
    """
    before, epoch, error = 0.0, 0.0, math.inf
    for record in found:
        middle, own = (before + record['epoch']) / 2, record['top1_error']
        if own <= target:
            share = (error - target) / (error - own) if math.isfinite(error) else 1.0
            return epoch + share * (middle - epoch)
        before, epoch, error = record['epoch'], middle, own
    return math.inf


# ------------------------------------------------------------------------------------- runs, kept


def keep(folder: Path, results: Path) -> Path:
    """Keep the curves of all runs of a sweep: the folder of their scale.

    A run that ended in infinite numbers is kept as far as it came, and never reaches the target.

    Raises:
        RunError: there are none.
    """
    found = [path for path in sorted(folder.glob('figure1_net_*-rate*-*')) if _ended(path)]
    if not found:
        raise RunError(f'{folder} holds no run of this figure; train with experiments.sweep.')
    configs = {path: digest.portable(path) for path in found}
    scales = {config['scale'] for config in configs.values()}
    if len(scales) > 1:
        raise RunError(f'{folder} holds runs of {len(scales)} scales; part them.')
    target = results / scales.pop()
    for path, config in configs.items():
        own = target / path.name
        own.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True) + '\n'
        digest.write_text(own / 'config.json', text)
        digest.write_text(own / 'environment.json', (path / 'environment.json').read_text())
        digest.write_text(own / 'metrics.jsonl', digest.lines(_small(metrics.read(path))))
    return target


def _ended(path: Path) -> bool:
    """At its last epoch, or where its numbers turned infinite; what was cut off says nothing."""
    if (path / 'config.json').exists():
        epochs = json.loads((path / 'config.json').read_text())['epochs']
        trained = [row['epoch'] for row in metrics.read(path) if row['kind'] == 'train']
        if digest.diverged(path) or (trained and trained[-1] >= epochs - 1e-6):
            return True
    log(f'{path} is not finished, and is left out.')
    return False


def _small(found: Sequence[Record]) -> list[Record]:
    keys = ('kind', 'step', 'epoch', 'loss', 'top1_error')
    return [{k: r[k] for k in keys} for r in found if r['kind'] == 'train']


def read(folder: Path) -> list[Curves]:
    """What is kept of a scale, function after function, the rates ascending.

    Raises:
        RunError: it is damaged.
    """
    found: dict[tuple[str, float], dict[int, list[Record]]] = {}
    for path in sorted(folder.glob('*/config.json')):
        try:
            config = json.loads(path.read_text())
            function = config['name'].removeprefix('figure1_')
            key = (function, config['optimizer']['weights']['rate'])
            found.setdefault(key, {})[config['seed']] = list(metrics.read(path.parent))
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f'{path.parent} is damaged ({error!r}); keep it again.') from error
    order = sorted(found, key=lambda key: (list(FUNCTIONS).index(key[0]), key[1]))
    return [Curves(*key, seeds=dict(sorted(found[key].items()))) for key in order]


# ----------------------------------------------------------------------------------- what it says


def chosen(found: Sequence[Curves], function: str, target: float) -> Curves | None:
    """The rate with the fewest epochs to the target, of those that were run with most seeds.

    None where no rate reached it with all its seeds, or none was run.
    """
    own = [curves for curves in found if curves.function == function]
    most = max((len(curves.seeds) for curves in own), default=0)
    own = [curves for curves in own if len(curves.seeds) == most]
    best = min(own, key=lambda curves: curves.mean(target), default=None)
    return None if best is None or math.isinf(best.mean(target)) else best


def ratio(tanh: Curves, relu: Curves, target: float) -> tuple[int, float, float, float]:
    """Epochs of tanh over those of ReLU: (seeds that both have, geometric mean, low, high).

    A 95 % interval over seeds, Student's t on the logarithms; that the rates were chosen on the
    same seeds is not in it. nan where there are too few seeds.
    """
    slow, fast = tanh.epochs(target), relu.epochs(target)
    logs = np.log([slow[seed] / fast[seed] for seed in slow if seed in fast])
    seeds = len(logs)
    mean = float(np.exp(logs.mean())) if seeds else math.nan
    if seeds < 2:
        return seeds, mean, math.nan, math.nan
    half = stats.t.ppf(0.975, seeds - 1) * logs.std(ddof=1) / math.sqrt(seeds)
    return seeds, mean, mean * math.exp(-half), mean * math.exp(half)


def page(found: Sequence[Curves], scale: str, target: float = TARGET) -> str:
    """The rates, the choice, and the ratio, as Markdown."""
    both = {function: chosen(found, function, target) for function in FUNCTIONS}
    rates = sorted({curves.rate for curves in found})
    rows = [
        f'| epochs to {target:.0%} training error, {scale} | ' + ' | '.join(FUNCTIONS.values()),
        '|---|' + '---|' * len(FUNCTIONS),
    ]
    rows[0] += ' |'
    by_key = {(curves.function, curves.rate): curves for curves in found}
    for rate in rates:
        cells = [_cell(by_key.get((f, rate)), both[f], target) for f in FUNCTIONS]
        rows.append(f'| rate {rate:g} | ' + ' | '.join(cells) + ' |')
    edges = [
        f'{FUNCTIONS[f]} is fastest at the end of the grid, so that a rate beyond it may be faster.'
        for f, own in both.items()
        if own and own.rate in (rates[0], rates[-1])
    ]
    said = _compared(both['relu'], both['tanh'], target)
    paper = (
        'The paper: six times, on CIFAR-10, with a net that it does not describe (3.1, figure 1).'
    )
    return '\n'.join([*rows, '', ' '.join([said, paper, *edges]), ''])


def _compared(relu: Curves | None, tanh: Curves | None, target: float) -> str:
    if relu is None or tanh is None:
        missed = [FUNCTIONS[f] for f, own in (('relu', relu), ('tanh', tanh)) if own is None]
        return (
            f'{" and ".join(missed)} reached it at no rate with all seeds, so there is no ratio: '
            f'run the sweep to its end, or with --config.epochs larger.'
        )
    seeds, mean, low, high = ratio(tanh, relu, target)
    if not seeds:
        return 'The fastest rates have no seed in common, so there is no ratio.'
    between = f' [{low:.2f}, {high:.2f}]' if math.isfinite(low) else ''
    undecided = '; which of them is faster is undecided' if low <= 1 <= high else ''
    return (
        f'tanh at {tanh.rate:g} takes {mean:.2f}{between} times as many epochs as ReLU at '
        f'{relu.rate:g} ({seeds} seeds; in brackets 95 % over seeds){undecided}.'
    )


def _cell(curves: Curves | None, best: Curves | None, target: float) -> str:
    if curves is None:
        return 'not run'
    values = list(curves.epochs(target).values())
    if not all(map(math.isfinite, values)):
        missed = sum(map(math.isinf, values))
        return f'not reached by {missed} of {len(values)} seeds'
    spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
    text = f'{np.mean(values):.3f}{spread}'
    return f'**{text}**' if curves is best else text


def build(folder: Path, target: float = TARGET) -> str:
    """Write table.md and figure1.svg of what is kept in `folder`; the table.

    Raises:
        RunError: it is damaged.
    """
    found = read(folder)
    text = page(found, folder.name, target)
    both = [chosen(found, function, target) for function in FUNCTIONS]
    curves = {f'{FUNCTIONS[own.function]}, rate {own.rate:g}': own.records() for own in both if own}
    digest.write_text(folder / 'table.md', text)
    if curves:
        figures.write(folder / 'figure1.svg', figures.render(figures.fig1(curves), 'svg'))
    return text


# -------------------------------------------------------------------------------------- the command


def act(args: argparse.Namespace) -> int:
    """Keep, if there are runs; build; print what it says."""
    if not 0 < args.target < 1:
        raise UsageError('--target is a fraction, as 0.25.')
    if args.runs is not None:
        folders = [keep(args.runs, args.results)]
    else:
        folders = sorted(path for path in args.results.glob('*') if path.is_dir())
    if not folders:
        raise RunError(f'nothing is kept in {args.results} yet; name the --runs of a sweep.')
    missed = False
    for folder in folders:
        found = read(folder)
        missed |= any(chosen(found, function, args.target) is None for function in FUNCTIONS)
        if args.target != TARGET:  # to be looked at; what is kept is the paper's
            print(page(found, folder.name, args.target))
            continue
        print(build(folder))
        log(f'in {folder}')
    return int(missed)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.figure1',
        description='Epochs to 25 % training error with ReLU and tanh, and the figure.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--runs', type=command.path, help="a sweep's folder of workdirs, to be kept first")
    add('--results', type=command.path, default=RESULTS, help='where runs are kept')
    add('--target', type=float, default=TARGET, help='another training error, to look at')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    return command.run('figure1', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
