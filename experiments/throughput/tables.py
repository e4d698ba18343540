"""Format the stored rows as tables.

python -m experiments.throughput --page
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import NOT_RUN, markdown, short_commit
from experiments.run_archive import read_run
from experiments.throughput import results
from experiments.throughput.results import Row, median

TARGET = 0.885  # the tutorials' figure, which they reach in 10 epochs at about 4,150 images/s
README_HEAD = [
    'device', 'net', 'batch', 'pass', 'images/s', 'best PyTorch', 'ratio', 'ratio to naive Flax',
    'fraction of roofline',
]  # fmt: skip


def stored(folder: Path) -> list[dict[str, list[Row]]]:
    """Return the rows of every device, by part."""
    return [results.read(path) for path in sorted(folder.glob('*.json'))]


def page(folder: Path) -> str:
    """Return the text of tables.md."""
    parts = [
        '# Throughput',
        'Written by `python -m experiments.throughput`. The files in `experiments/throughput/` '
        'describe the measurements. Values are medians over rounds in which this package and the '
        'baseline alternate. On a CPU each pair runs in its own process; the best variant of '
        'PyTorch is determined in another.',
    ]
    for rows in stored(folder):
        parts += _device(rows)
    timed = accuracy_table(timed_runs(folder.parent))
    return '\n\n'.join([*parts, '## Time to accuracy', timed]) + '\n'


def timed_runs(results: Path) -> Iterable[Path]:
    """Return the archived runs whose time to accuracy is of interest."""
    return (path.parent for path in results.glob('time_to_accuracy*/metrics.jsonl'))


def _device(rows: dict[str, list[Row]]) -> list[str]:
    """Return the sections of one device."""
    found = [row for part in rows.values() for row in part]
    if not found:
        return []
    parts = [f'## {found[0]["device"]}, {found[0]["cpus"]} cores', _versions(found)]
    parts += ['### Steps', steps_tables(rows['steps'])]
    parts += [layer_tables(rows['layers'])] if rows['layers'] else []
    parts += ['### Feeding', feeding_table(rows['feeding'])]
    return [*parts, '### Start-up', start_table(rows['start'])]


def _versions(rows: Sequence[Row]) -> str:
    """Return the versions and commits that the rows were measured with."""
    lines = []
    for key in ('jax', 'flax', 'torch_version', 'python', 'commit'):
        shown = short_commit if key == 'commit' else str
        values = sorted({shown(row[key]) for row in rows if key in row})
        if values:
            lines.append(f'{key.removesuffix("_version")} {" and ".join(values)}')
    return ', '.join(lines) + '.'


def _named(row: Row) -> str:
    return f'{row["net"]}, batch {row["batch_size"]}, {row["dtype"]}'


def steps_tables(rows: Sequence[Row]) -> str:
    """Return the comparison of each row with the others, and the table of all variants."""
    return f'{steps_table(rows)}\n\n### All variants\n\n{forms_table(rows)}'


def steps_table(rows: Sequence[Row]) -> str:
    """Compare ours with PyTorch, naive Flax and the roofline: a row a net, batch and pass."""
    head = [
        'net', 'batch', 'dtype', 'pass', 'ours, images/s', 'spread', 'best PyTorch', 'ratio',
        'naive Flax', 'ratio', 'roofline', 'fraction of it', 'GFLOP/s reached',
        'rounds',
    ]  # fmt: skip
    return markdown([head, *map(_step_cells, rows)])


def _step_cells(row: Row) -> list[str]:
    size, forms = row['batch_size'], row['forms']
    pace = {name: size / median(form['secs']) for name, form in forms.items() if 'secs' in form}
    ratios, torch = row.get('ratios', {}), row['torch']
    cells = [row['net'], str(size), row['dtype'], row['pass']]
    if 'ours' not in pace:
        return [*cells, *[NOT_RUN] * 10]
    secs = forms['ours']['secs']
    cells += [f'**{pace["ours"]:.1f}**', f'{size / max(secs):.1f} to {size / min(secs):.1f}']
    cells += [f'{pace[torch]:.1f} ({torch.removeprefix("torch, ")})' if torch else NOT_RUN]
    cells += [f'**{ratios[torch]:.2f}**' if torch else NOT_RUN]
    cells += [f'{pace["naive"]:.1f}' if 'naive' in pace else NOT_RUN]
    cells += [f'{ratios["naive"]:.2f}' if 'naive' in ratios else NOT_RUN]
    limit, ours = row['limit_secs'], median(secs)
    cells += [f'{size / limit:.1f}', f'{limit / ours:.0%}']
    return [*cells, f'{row["flops"] / ours / 1e9:.0f}', str(len(secs))]


def forms_table(rows: Sequence[Row]) -> str:
    """Return images/s of every form; those with one round were too slow for more."""
    names = dict.fromkeys(name for row in rows for name in row['forms'])
    head = ['form', *(f'{_named(row)}, {row["pass"]}' for row in rows)]
    return markdown([head, *([name, *(_pace(row, name) for row in rows)] for name in names)])


def _pace(row: Row, name: str) -> str:
    form = row['forms'].get(name)
    if form is None:
        return '-'
    if 'failed' in form:
        return f'failed: {form["failed"].split(":")[0]}'
    rounds = '' if len(form['secs']) > 1 else ', one round'
    return f'{row["batch_size"] / median(form["secs"]):.1f}{rounds}'


def readme_rows(folder: Path) -> list[list[str]]:
    """Return the main columns of the steps of all devices, for the README."""
    body = []
    for row in (row for parts in stored(folder) for row in parts['steps']):
        if 'secs' in row['forms'].get('ours', {}):
            net, size, dtype, what, ours, _, torch, ratio, _, naive, _, share, *_ = _step_cells(row)
            where = f'{row["cpus"]} x ' * (row['platform'] == 'cpu') + row['device']
            cells = [where, f'{net}, {dtype}', size, what, ours, torch, ratio, naive, share]
            body.append(cells)
    return body


def layer_tables(rows: Sequence[Row]) -> str:
    """Return a headed table for each net; '' for none."""
    return '\n\n'.join(f'### Time by layer: {_named(row)}\n\n{layer_table(row)}' for row in rows)


def layer_table(row: Row) -> str:
    """Return the time of each operation and direction, its roofline, and the gap between them."""
    head = ['layer', 'operation', 'pass', 'ms', 'roofline, ms', 'bound by', 'share', 'gap, ms']
    body = []
    for piece in row['pieces']:
        name = piece['layer'], piece['word'], piece['direction']
        cells = _against(median(piece['secs']), piece['limit_secs'], piece['bound'], 2)
        body.append([*name, *cells])
    for what in ('forward', 'train'):
        alone = [piece for piece in row['pieces'] if what == 'train' or _at_test_time(piece)]
        secs, limits = zip(*((median(p['secs']), p['limit_secs']) for p in alone), strict=True)
        body.append(['sum', 'all', what, *_against(sum(secs), sum(limits), '', 1)])
        complete = row['step_secs'][what], row['step_limit_secs'][what]
        body.append(['as run', 'all', what, *_against(*complete, '', 1)])
    return markdown([head, *body]) + (
        f'\n\nProducts {row["flops_per_sec"] / 1e9:.0f} GFLOP/s, copy '
        f'{row["bytes_per_sec"] / 1e9:.1f} GB/s. The roofline of a complete step has each layer '
        f'fused, with no pass over memory between its operations.'
    )


def _against(secs: float, limit: float, bound: str, digits: int) -> list[str]:
    """Return milliseconds, those of the roofline, what bounds it, the share and the gap."""
    times = (f'{1e3 * value:.{digits}f}' for value in (secs, limit))
    return [*times, bound, f'{limit / secs:.0%}', f'{1e3 * (secs - limit):.{digits}f}']


def _at_test_time(piece: Row) -> bool:
    return piece['direction'] == 'forward' and piece['word'] not in ('masks', 'dropout')


def feeding_table(rows: Sequence[Row]) -> str:
    """Return training on real input beside the step on a resident batch."""
    head = [
        'input', 'batch', 'training, images/s', 'resident batch', 'ratio', 'waiting for input',
        'rounds',
    ]  # fmt: skip
    return markdown([head, *map(_feeding_cells, rows)])


def _feeding_cells(row: Row) -> list[Any]:
    size, real, resident = row['batch_size'], row['real_secs'], row['resident_secs']
    ratio = statistics.median(a / b for a, b in zip(resident, real, strict=True))
    speeds = (f'{size / median(secs):.1f}' for secs in (real, resident))
    waiting = f'{median(row["stall_share"]):.1%}'
    return [row['input'], size, *speeds, f'**{ratio:.3f}**', waiting, len(real)]


def start_table(rows: Sequence[Row]) -> str:
    """Return the seconds from the command to the end of the first step, in a fresh process."""
    head = ['config', 'nothing compiled, s', 'compiled before, s', 'warm / cold', 'starts']
    body = []
    for row in rows:
        cold, warm = (median(row[key]) for key in ('cold_secs', 'warm_secs'))
        starts = f'{len(row["cold_secs"])} + {len(row["warm_secs"])}'
        body.append([row['config'], f'{cold:.1f}', f'{warm:.1f}', f'{warm / cold:.2f}', starts])
    return markdown([head, *body])


def accuracy_table(folders: Iterable[Path]) -> str:
    """Return the seconds of training to TARGET on the test images, of runs that validate on them.

    They include compilation of the step, but not evaluations or checkpoints.
    """
    head = ['config', 'device', 'target test accuracy', 'seconds of training', 'epoch', 'reached']
    return markdown([head, *(_accuracy_cells(folder) for folder in sorted(folders))])


def _accuracy_cells(folder: Path) -> list[Any]:
    run = read_run(folder)
    config, records = run.config, run.records
    timed = [(row['step'], row['secs']) for row in records if row['kind'] == 'train']
    found = [row for row in records if row['kind'] == 'validation']
    net = f'{config["name"]}:{config["scale"]}, {config["model"]["compute_dtype"]}'
    cells = [net, run.environment['device'], f'{TARGET:.4f}']
    for row in found:
        if 1 - row['top1_error'] >= TARGET:
            secs = np.interp(row['step'], *zip((0, 0.0), *timed, strict=True))
            return [*cells, f'{secs:.1f}', f'{row["epoch"]:.0f}', f'{1 - row["top1_error"]:.4f}']
    best = max(1 - row['top1_error'] for row in found)
    return [*cells, 'not reached', '', f'{best:.4f}']
