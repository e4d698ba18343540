"""Measure what each idea of the paper contributes: every ablation against the base, over seeds.

python -m experiments.sweep contribution_table --scale=quickstart --seeds=5     # trains
python -m experiments.contribution_table --runs=workdirs/contribution_table-quickstart
python -m experiments.contribution_table        # rebuild from the archive in the repository
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import config as configuration
from alexnet_jax.analysis import drawing
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.training import workdir
from configs import ABLATIONS, Claim
from experiments import contribution_bfloat16, contribution_rates, intervals, run_archive
from experiments.intervals import Difference
from experiments.output import config_module, markdown, write_text
from experiments.run_archive import MEASURES, ArchivedRun

BASE = 'alexnet'
CONFIGS = (BASE, *ABLATIONS)  # what experiments.sweep runs
SEEDS = 5
# Effects within +-MARGIN on top-1 are called equivalent: the smallest that the paper reports (3.4),
# fixed before any row was compared with it. With ten classes the base's top-5 error is smaller than
# any such margin, so top-5 has none.
MARGIN = 0.003
# Rows that are a config and an override: {row: (config, overrides)}. A net that does not train at
# the base's rate is no evidence against its idea, so such rows appear twice: at the base's rate and
# at the one with the lowest validation error of RATE_SEEDS.
OVERRIDDEN = {
    f'{config}-{name}': (config, values)
    for sweep in (contribution_rates, contribution_bfloat16)
    for config in sweep.CONFIGS
    for name, values in sweep.OVERRIDES.items()
}
RATE_SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / 'results' / 'contribution_table'
Runs = Mapping[int, ArchivedRun]  # of a row, by seed
ONE_VIEW = Claim(
    row='one view instead of ten',
    source='paper 6; run 145',
    data='ILSVRC-2010 test',
    top1=1.55,  # 39.02 - 37.47
    top5=1.30,  # 18.30 - 17.00
    words='',
)

# ----------------------------------------------------------------------------------------- the rows


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the table: a change, its effect here and the effect claimed for it.

    Attributes:
        claim: the change, and what was reported for it.
        found: by measure; {} if not run.
        images_only: the interval is over other images, with these nets.
        untrained: seeds that did not train; the figures are of the others, if there are any.
        total: seeds in all.
    """

    claim: Claim
    found: dict[str, Difference]
    images_only: bool = False
    untrained: int = 0
    total: int = 0

    def finding(self, measure: str) -> str:
        """Return the row's result in a word."""
        if self.untrained:
            count = (
                '' if self.untrained == self.total else f'{self.untrained} of {self.total} seeds '
            )
            return f'{count}did not train'
        if measure not in self.found:
            return 'not run'
        own = self.found[measure]
        if own.low is None:
            return 'too few seeds'
        if own.significant and (own.p_holm or 0.0) < 1 - intervals.LEVEL:
            return 'worse' if own.mean > 0 else 'better'
        if measure == 'top1_error' and own.within(MARGIN):
            return 'equivalent'
        return 'inconclusive, n.s. after Holm' if own.significant else 'inconclusive'


def rows(runs: Sequence[ArchivedRun], folder: Path, view: str = 'ten_views') -> list[Row]:
    """Return the rows of the ablations, of one view against ten, and of the base's ensembles."""
    by_row: dict[str, dict[int, ArchivedRun]] = {}
    for run in runs:
        by_row.setdefault(run.row, {})[run.seed] = run
    base = by_row.get(BASE)
    if not base:
        raise RunError(f'there is no finished run of {BASE} to compare with.')
    lost = run_archive.read_diverged(folder)
    names = []
    for name in ABLATIONS:
        chosen = chosen_rate(name, by_row, lost)
        names += [name, chosen] if chosen else [name]
    names += [row for row in by_row if row.startswith(f'{BASE}-')]
    result = [
        _ablation(row, by_row.get(row, {}), base, view, {*lost.get(row, ())} & {*base})
        for row in names
    ]
    if view == 'ten_views':
        one, ten = ([base[seed].wrong[v] for seed in sorted(base)] for v in ('centre', 'ten_views'))
        result.append(_compared(ONE_VIEW, one, ten))
    correct(result)
    return result + _ensembles(base, folder, view)


def _ablation(name: str, own: Runs, base: Runs, view: str, lost: Set[int]) -> Row:
    """Compare an ablation with the base; `lost` are seeds that ended with infinite numbers.

    A seed that did not train is counted, not averaged: its error is not a sample of the same
    distribution.
    """
    seeds = sorted({*own} & {*base})
    alive = [seed for seed in seeds if not _is_stuck(own[seed])]
    ours, bases = ([runs[seed].wrong[view] for seed in alive or seeds] for runs in (own, base))
    untrained = len(seeds) - len(alive) + len(lost)
    return _compared(
        _claim_of(name), ours, bases, untrained=untrained, total=len(seeds) + len(lost)
    )


def _compared(claim: Claim, ours: Sequence[Mapping], base: Sequence[Mapping], **more: Any) -> Row:
    """Return the row of a change; `ours` and `base` are the images missed, by seed."""
    found = {}
    for measure in MEASURES if ours else ():
        wrong = (np.stack([missed[measure] for missed in runs]) for runs in (ours, base))
        found[measure] = intervals.difference(*wrong)
    return Row(claim, found, **more)


def chosen_rate(
    name: str, by_row: Mapping[str, Runs], lost: Mapping[str, Sequence[int]]
) -> str | None:
    """Return the row of an ablation at the rate with the lowest validation error.

    None if seeds of RATE_SEEDS are missing, or the base's rate is best.
    """
    tried = [name, *(row for row, (config, _) in OVERRIDDEN.items() if config == name != BASE)]
    errors = {row: _validation_error(by_row.get(row, {}), lost.get(row, ())) for row in tried}
    best = min(tried, key=lambda row: errors[row] or 0.0)
    return None if best == name or None in errors.values() else best


def _validation_error(own: Runs, lost: Sequence[int]) -> float | None:
    """Return the mean of the last validation errors of RATE_SEEDS; 1 for a seed that diverged."""
    if not {*RATE_SEEDS} <= {*own, *lost}:
        return None
    return float(np.mean([_last_error(own[s]) if s in own else 1.0 for s in RATE_SEEDS]))


def _last_error(run: ArchivedRun) -> float:
    return [row['top1_error'] for row in run.records if row['kind'] == 'validation'][-1]


def _config_of(row: str, scale: str) -> dict[str, Any]:
    """Return the resolved config of a row, as JSON has it."""
    name, values = OVERRIDDEN.get(row, (row, {}))
    config = config_module(name).get_config(scale)
    config.update_from_flattened_dict(values)
    return json.loads(configuration.as_json(config))


def _claim_of(row: str) -> Claim:
    """Return what was reported for a row."""
    name, values = OVERRIDDEN.get(row, (row, {}))
    if name == BASE:
        return Claim('bfloat16 compute, float32 parameters', 'none', 'none', None, None, '')
    claim = config_module(name).CLAIM
    rate = values.get('optimizer.weights.rate')
    if rate is None:
        return claim
    return claim._replace(row=f'{claim.row}, weight rate {rate:g} (chosen on validation)')


def _is_stuck(run: ArchivedRun) -> bool:
    model = run.config['model']
    chance = 1 - 1 / model[model['layers'][-1]]['features']
    return run.final()['centre']['top1_error'] > 0.99 * chance


def _ensembles(base: Runs, folder: Path, view: str) -> list[Row]:
    """Compare ensembles of the base's seeds with the mean of their members, one row per size."""
    found: dict[int, list[tuple[tuple[int, ...], Any]]] = {}
    for seeds, missed in run_archive.read_ensembles(folder / 'ensembles.jsonl'):
        if {*seeds} <= {*base}:
            found.setdefault(len(seeds), []).append((seeds, missed[view]))
    return [_ensemble(count, own, base, view) for count, own in sorted(found.items())]


def _ensemble(count: int, own: Sequence[tuple[tuple[int, ...], Any]], base: Runs, view: str) -> Row:
    found = {}
    in_all = len({seed for seeds, _ in own for seed in seeds})
    for measure in MEASURES:
        gains = [
            missed[measure] - np.mean([base[seed].wrong[view][measure] for seed in seeds], axis=0)
            for seeds, missed in own
        ]
        error = float(np.mean([missed[measure] for _, missed in own]))
        mean, low, high = intervals.over_images(np.mean(gains, axis=0))
        found[measure] = Difference(mean, in_all, len(gains[0]), low, high, error=error)
    claim = Claim(f'{count} nets averaged, of {in_all} seeds', 'paper 6', 'none', None, None, '')
    if count == 5:  # 38.1 - 40.7 and 16.4 - 18.2
        claim = claim._replace(data='ILSVRC-2012 val', top1=-2.6, top5=-1.8)
    else:
        claim = claim._replace(words='5 nets: -2.6 / -1.8 on ILSVRC-2012 val')
    return Row(claim, found, images_only=True)


def correct(found: Sequence[Row]) -> None:
    """Store in each row its p-values, corrected for the number of rows (Holm), by measure."""
    for measure in MEASURES:
        tested = [row.found for row in found if row.found and not row.untrained]
        tested = [own for own in tested if own[measure].p is not None]
        values = intervals.holm([own[measure].p or 0.0 for own in tested])
        for own, value in zip(tested, values, strict=True):
            own[measure] = dataclasses.replace(own[measure], p_holm=value)


# ---------------------------------------------------------------------------------------- the table


HEAD = [
    'change', 'top-1 error', 'top-1, points', 'p', 'top-5, points', 'seeds', 'std of seeds',
    'reported in 2012: top-1 / top-5, points',
]  # fmt: skip


def short(found: Sequence[Row]) -> str:
    """Return README's table, at most ten rows, and a count of the findings.

    The rows with a figure of 2012 come first, then the rows that are decided, by size of effect.
    """
    single = [row for row in found if row.found and not row.images_only and not row.untrained]
    without = 'inconclusive', 'too few'
    decided = [row for row in single if not row.finding('top1_error').startswith(without)]
    decided.sort(key=lambda row: -abs(row.found['top1_error'].mean))
    chosen = [row for row in single if row.claim.top1 is not None]
    chosen += [row for row in decided if row.claim.top1 is None]
    head = ['change', 'top-1 error, points', 'seeds', 'reported in 2012, points']
    cells = [
        [row.claim.row, _difference(row, 'top1_error'), row.found['top1_error'].seeds, _top1(row)]
        for row in chosen[:10]
    ]
    return f'{markdown([head, *cells])}\n\n{count(found)}\n'


def _top1(row: Row) -> str:
    """Return the claimed effect on the top-1 error and its data, or a dash."""
    claim = row.claim
    return f'{_points(claim.top1)} on {claim.data}' if claim.top1 is not None else '-'


def count(found: Sequence[Row]) -> str:
    """Return how many rows are significant, equivalent and inconclusive, in a sentence."""
    tested = [row for row in found if (row.found or row.untrained) and not row.images_only]
    words = [row.finding('top1_error') for row in tested]
    significant = sum(word in ('worse', 'better') for word in words)
    untrained = sum('did not train' in word for word in words)
    open_ = sum(word.startswith(('inconclusive', 'too few')) for word in words)
    return (
        f'Top-1, of the {len(tested)} rows that were run: {significant} significant, '
        f'{words.count("equivalent")} equivalent (no effect larger than {100 * MARGIN:g} points), '
        f'{open_} inconclusive, {untrained} with seeds that did not train.'
    )


def _base_cells(runs: Sequence[ArchivedRun]) -> list[str]:
    wrong = [run.wrong['ten_views'] for run in runs if run.row == BASE]
    top1, top5 = (np.array([own[measure].mean() for own in wrong]) for measure in MEASURES)
    std = f'{100 * top1.std(ddof=1):.2f}' if len(wrong) > 1 else ''
    errors = f'{top1.mean():.2%}', '', '', f'*{top5.mean():.2%} top-5 error*'
    return ['*the recipe as run*', *errors, str(len(wrong)), std, '']


def _cells(row: Row) -> list[str]:
    if not row.found:
        return [row.claim.row, *[row.finding('top1_error')] * 6, _claim(row.claim)]
    top1 = row.found['top1_error']
    p = top1.p_holm
    return [
        row.claim.row,
        f'{top1.error:.2%}',
        _difference(row, 'top1_error'),
        '' if p is None else f'{p:.3f}' if p >= 0.001 else '<0.001',
        _difference(row, 'top5_error'),
        str(top1.seeds),
        '' if top1.spread is None else f'{100 * top1.spread:.2f}',
        _claim(row.claim),
    ]


def _difference(row: Row, measure: str) -> str:
    own = row.found[measure]
    word = row.finding(measure)
    if row.untrained == row.total > 0:  # constant predictions: an interval would have no meaning
        return word
    if own.low is None or own.high is None:
        return f'{100 * own.mean:+.2f}, {word}'
    mark = ' †' if row.images_only else ''
    return f'{100 * own.mean:+.2f} [{100 * own.low:+.2f}, {100 * own.high:+.2f}]{mark} {word}'


def _claim(claim: Claim) -> str:
    """Return the claimed effect, its data, and further words."""
    text = f'{_points(claim.top1)} / {_points(claim.top5)}' if claim.top1 is not None else ''
    if claim.data != 'none':
        text += f' on {claim.data}' if text else f'on {claim.data}'
    return '; '.join(word for word in (text, claim.words) if word)


def _points(value: float | None) -> str:
    return '-' if value is None else f'{value:+.2f}'.removesuffix('0')


def notes(found: Sequence[Row], runs: Sequence[ArchivedRun]) -> str:
    """Return the notes below the table: how to read it, the runs, and its limits."""
    config, images = runs[0].config, len(runs[0].wrong['centre']['top1_error'])
    hours = sum(run.final()['secs'] for run in runs) / 3600
    return (
        f'Scale {config["scale"]}: {config["data"]["name"]}, all {images} images of '
        f'`{config["data"]["test"]}`, ten views. Points: error with the change minus error '
        f'without it, in percentage points; positive is worse. Brackets: 95 % interval over seeds '
        f'and images (experiments/intervals.py). p: for top-1, corrected for the number of rows '
        f'(Holm). "Equivalent": not significant, and the top-1 interval is within '
        f'+-{100 * MARGIN:g} points, so there is no larger effect. "n.s. after Holm": the interval '
        f'excludes zero, but p >= 0.05. "Did not train": these seeds ended at the error of a '
        f'constant prediction or with non-finite numbers; the figures are for the other seeds. '
        f'†: interval over images only, for these particular nets. "std of seeds": standard '
        f'deviation over seeds of the difference; in the first row, of the error itself.\n\n'
        f'{count(found)}\n\n'
        f'{len(runs)} runs, {hours:.1f} h of training in total, {run_archive.trained_on(runs)}.\n\n'
        f"The table shows the effect of a change on this recipe at this scale, with the recipe's "
        f'learning rates unless the row gives another. It does not show the effect on ImageNet: '
        f'the last column is from other data, with a single run and seed each.'
    )


def table_csv(runs: Sequence[ArchivedRun], folder: Path) -> str:
    """Return every number, as fractions to 6 places: one line per row, view and measure."""
    out = io.StringIO()
    names = (
        'change,view,measure,seeds,images,error,difference,low,high,p,p_holm,std_of_seeds,'
        'interval_over,finding,claimed_points,claimed_on,claim_source'
    )
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(names.split(','))
    for view in evaluate.VIEWS:
        for row, measure in itertools.product(rows(runs, folder, view), MEASURES):
            writer.writerow([row.claim.row, view, measure, *_csv_values(row, measure)])
    return out.getvalue()


def _csv_values(row: Row, measure: str) -> list[Any]:
    values: list[Any] = [''] * 9
    if own := row.found.get(measure):
        numbers = own.error, own.mean, own.low, own.high, own.p, own.p_holm, own.spread
        texts = ('' if x is None else f'{x:.6f}' for x in numbers)
        values = [own.seeds, own.images, *texts]
    over = 'images' if row.images_only else 'seeds and images'
    claim = row.claim
    claimed = {'top1_error': claim.top1, 'top5_error': claim.top5}[measure]
    return [*values, over, row.finding(measure), claimed, claim.data, claim.source]


# -------------------------------------------------------------------------------------- the figures


@drawing.styled
def differences_figure(found: Sequence[Row]) -> drawing.Figure:
    """Draw the differences in top-1 error with their intervals, and the claims as diamonds."""
    figure = drawing.blank(0.24 * len(found) + 1.0)
    axes = figure.subplots()
    limit = _limit(found)
    for place, row in enumerate(found):
        _interval(axes, place, row, limit)
        if row.claim.top1 is not None:
            axes.plot(row.claim.top1, place + 0.25, 'D', color=drawing.ORANGE, markersize=4)
    axes.axvline(0, color=drawing.INK, linewidth=0.8)
    names = [row.claim.row + ' †' * row.images_only for row in found]
    axes.set_yticks(range(len(found)), names, fontsize=7)
    axes.set(ylim=(len(found) - 0.4, -0.6), xlim=(-limit, limit))
    axes.set_xlabel('change of the top-1 error, points; worse to the right', fontsize=8)
    axes.tick_params(axis='x', labelsize=7)
    axes.plot([], [], 'o-', color=drawing.BLUE, label='here, 95 %', markersize=4)
    axes.plot([], [], 'D', color=drawing.ORANGE, label='claimed in 2012, other data', markersize=4)
    figure.legend(loc='outside upper right', ncols=2, fontsize=7)
    axes.grid(axis='x')
    return figure


def _limit(found: Sequence[Row]) -> float:
    """Return the end of the axis, points: all claims and all intervals, but at most 6."""
    ends = [row.claim.top1 for row in found]
    for own in [row.found['top1_error'] for row in found if row.found]:
        ends += [None if end is None else 100 * end for end in (own.mean, own.low, own.high)]
    return min(1.1 * max((abs(end) for end in ends if end is not None), default=1.0), 6.0)


def _interval(axes: Any, place: int, row: Row, limit: float) -> None:
    if not row.found:
        axes.text(0, place, ' not run', fontsize=7, va='center')
        return
    own, word = row.found['top1_error'], row.finding('top1_error')
    mean = 100 * own.mean
    style = {'color': drawing.BLUE, 'alpha': 1.0 if word in ('worse', 'better') else 0.45}
    if abs(mean) > limit:
        side, text = ('right', f'{mean:+.0f} →') if mean > 0 else ('left', f'← {mean:+.0f}')
        at = 0.98 * limit * np.sign(mean)
        axes.text(at, place, text, ha=side, va='center', fontsize=7, color=drawing.BLUE)
        return
    if own.low is not None and own.high is not None:
        axes.plot([100 * own.low, 100 * own.high], [place, place], **style)
    axes.plot(mean, place, 'o', markersize=4, **style)


@drawing.styled
def curves_figure(runs: Sequence[ArchivedRun], panels: Sequence[str]) -> drawing.Figure:
    """Draw training (dashed) and validation error against epochs, every seed; the base in grey."""
    rows = -(-len(panels) // 3)
    figure = drawing.blank(1.25 * rows + 0.7)
    # Twice the base's worst: nets that do not train are above the axis.
    worst = [100 * r['top1_error'] for run in runs if run.row == BASE for r in run.records[:2]]
    top = min(100.0, 2 * max(worst, default=50.0))
    grid = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axes, name in itertools.zip_longest(grid.reshape(-1), panels):
        if name is None:
            axes.set_axis_off()
            continue
        for row, colour in ((BASE, '#999999'), (name, drawing.BLUE)):
            for run in runs:
                if run.row == row:
                    _curve(axes, run, colour)
        title = 'the recipe' if name == BASE else _claim_of(name).row
        axes.set_title(title, fontsize=6, loc='left')
        axes.set(xlim=(0, None), ylim=(0, top))
        axes.grid(axis='y')
        axes.tick_params(labelsize=7)
    figure.supxlabel('epochs', fontsize=8)
    figure.supylabel('error, %: validation, training dashed', fontsize=8)
    return figure


def _curve(axes: Any, run: ArchivedRun, colour: str) -> None:
    for kind, dash in (('validation', '-'), ('train', '--')):
        chosen = [record for record in run.records if record['kind'] == kind]
        errors = [100 * record['top1_error'] for record in chosen]
        axes.plot([record['epoch'] for record in chosen], errors, dash, color=colour, linewidth=0.8)


# ----------------------------------------------------------------------------------------- command


def archive(folder: Path, results: Path) -> Path:
    """Archive the finished runs of a sweep and the base's ensembles; return their folder."""
    target, found = run_archive.archive_all(folder, results, (*CONFIGS, *OVERRIDDEN))
    base = {seed: workdir for (row, seed), workdir in found.items() if row == BASE}
    if base:
        run_archive.archive_ensembles(base, target / 'ensembles.jsonl')
    return target


def build(folder: Path) -> str:
    """Write tables and figures from the archive in `folder`; return the table."""
    runs = run_archive.read(folder)
    found = rows(runs, folder)
    _check_recipes(runs, folder)
    table = markdown([HEAD, _base_cells(runs), *map(_cells, found)])
    table = f'{table}\n\n{notes(found, runs)}\n'
    names = [name for name in CONFIGS if any(run.row == name for run in runs)]
    panels = names[1:] or names
    bodies = {
        'table.md': table,
        'short.md': short(found),
        'table.csv': table_csv(runs, folder),
        'differences.svg': drawing.render(differences_figure(found), 'svg').decode(),
        'curves.svg': drawing.render(curves_figure(runs, panels), 'svg').decode(),
    }
    for name, body in bodies.items():
        write_text(folder / name, body)
    return table


def _check_recipes(runs: Sequence[ArchivedRun], folder: Path) -> None:
    """Check that each run differs from the base in what its config changes, and nothing else."""
    base = next(run for run in runs if run.row == BASE)
    recipes = {row: _config_of(row, base.config['scale']) for row in {run.row for run in runs}}
    for run in runs:
        should = {*configuration.differences(recipes[BASE], recipes[run.row])}
        does = {*configuration.differences(base.config, run.config)}
        if odd := sorted((does ^ should) - {'seed', *workdir.MAY_DIFFER}):
            raise RunError(
                f'{folder}/{run.row}-{run.seed} has another recipe than {BASE}-{base.seed}: see '
                f'{", ".join(odd)}; build the table from a single sweep.'
            )


main = functools.partial(run_archive.main, 'contribution_table', RESULTS, archive, build)

if __name__ == '__main__':
    sys.exit(main())
