"""Write tables.md from the stored rows.

python -m experiments.throughput --page
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import files
from alexnet_jax.training import metrics
from experiments.throughput import results
from experiments.throughput.timing import Row, median

NOT_RUN = 'not run'
TIME_TO_ACCURACY = 'time_to_accuracy_*.json'


def write(folder: Path) -> None:
    """Write tables.md from the JSON files of a folder."""
    with files.atomic_write(folder / 'tables.md') as scratch:
        scratch.write_text(page(folder))


def stored(folder: Path) -> list[dict[str, list[Row]]]:
    """Return the rows of every device, by part."""
    paths = sorted(path for path in folder.glob('*.json') if not path.match(TIME_TO_ACCURACY))
    return [results.read(path) for path in paths]


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
    parts += ['## Time to accuracy', accuracy_table(folder)]
    return '\n\n'.join(parts) + '\n'


def _device(rows: dict[str, list[Row]]) -> list[str]:
    """Return the sections of one device."""
    found = [row for part in rows.values() for row in part]
    if not found:
        return []
    parts = [f'## {found[0]["device"]}, {found[0]["cpus"]} cores', _versions(found)]
    parts += [
        '### Steps',
        steps_table(rows['steps']),
        '### All variants',
        forms_table(rows['steps']),
    ]
    for row in rows['layers']:
        parts += [f'### Time by layer: {_named(row)}', layer_table(row)]
    parts += ['### Feeding', feeding_table(rows['feeding'])]
    return [*parts, '### Start-up', start_table(rows['start'])]


def _versions(rows: Sequence[Row]) -> str:
    """Return the versions and commits that the rows were measured with."""
    lines = []
    for key in ('jax', 'flax', 'torch_version', 'python', 'commit'):
        shown = metrics.short if key == 'commit' else str
        values = sorted({shown(row[key]) for row in rows if key in row})
        if values:
            lines.append(f'{key.removesuffix("_version")} {" and ".join(values)}')
    return ', '.join(lines) + '.'


def _named(row: Row) -> str:
    return f'{row["net"]}, batch {row["batch_size"]}, {row["dtype"]}'


# ------------------------------------------------------------------------------------------- steps


def steps_table(rows: Sequence[Row]) -> str:
    """Compare ours with PyTorch, naive Flax and the roofline: a row a net, batch and pass."""
    if not rows:
        return NOT_RUN
    head = [
        'net', 'batch', 'dtype', 'pass', 'ours, images/s', 'spread', 'best PyTorch', 'ratio',
        'naive Flax', 'ratio', 'roofline', 'fraction of it', 'GFLOP/s reached',
        'rounds',
    ]  # fmt: skip
    return markdown([head, *map(_step_cells, rows)])


def _step_cells(row: Row) -> list[str]:
    size, forms = row['batch_size'], row['forms']
    pace = {name: size / median(form) for name, form in forms.items() if 'secs' in form}
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
    limit, ours = row['limit_secs'], median(forms['ours'])
    cells += [f'{size / limit:.1f}', f'{limit / ours:.0%}']
    return [*cells, f'{row["flops"] / ours / 1e9:.0f}', str(len(secs))]


def forms_table(rows: Sequence[Row]) -> str:
    """Return images/s of every form; those with one round were too slow for more."""
    if not rows:
        return NOT_RUN
    names = list(dict.fromkeys(name for row in rows for name in row['forms']))
    head = ['form', *(f'{_named(row)}, {row["pass"]}' for row in rows)]
    body = [[name, *(_pace(row, name) for row in rows)] for name in names]
    return markdown([head, *body])


def _pace(row: Row, name: str) -> str:
    form = row['forms'].get(name)
    if form is None:
        return '-'
    if 'failed' in form:
        return f'failed: {form["failed"].split(":")[0]}'
    rounds = '' if len(form['secs']) > 1 else ', one round'
    return f'{row["batch_size"] / median(form):.1f}{rounds}'


README_HEAD = [
    'device', 'net', 'batch', 'pass', 'images/s', 'best PyTorch', 'ratio', 'ratio to naive Flax',
    'fraction of roofline',
]  # fmt: skip


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


# ------------------------------------------------------------------------------------------- layers


def layer_table(row: Row) -> str:
    """Return the time of each operation and direction, its roofline, and the gap between them."""
    head = ['layer', 'operation', 'pass', 'ms', 'roofline, ms', 'bound by', 'share', 'gap, ms']
    body = []
    for piece in row['pieces']:
        secs, limit = statistics.median(piece['secs']), piece['limit_secs']
        cells = [piece['layer'], piece['word'], piece['direction'], f'{1e3 * secs:.2f}']
        cells += [f'{1e3 * limit:.2f}', piece['bound'], f'{limit / secs:.0%}']
        body.append([*cells, f'{1e3 * (secs - limit):.2f}'])
    body += _sums(row)
    return markdown([head, *body]) + (
        f'\n\nProducts {row["flops_per_sec"] / 1e9:.0f} GFLOP/s, copy '
        f'{row["bytes_per_sec"] / 1e9:.1f} GB/s. The roofline of a complete step has each layer '
        f'fused, with no pass over memory between its operations.'
    )


def _sums(row: Row) -> list[list[str]]:
    """Return the sums of the operations, and the complete step as it is run."""
    pieces = row['pieces']
    lines = []
    for what in ('forward', 'train'):
        chosen = [p for p in pieces if what == 'train' or p['direction'] == 'forward']
        if what == 'forward':
            chosen = [p for p in chosen if p['word'] not in ('masks', 'dropout')]
        alone = sum(statistics.median(p['secs']) for p in chosen)
        limit, complete = sum(p['limit_secs'] for p in chosen), row['step_secs'][what]
        fused = row['step_limit_secs'][what]
        for name, secs, least in (('sum', alone, limit), ('as run', complete, fused)):
            lines.append(
                [name, 'all', what, f'{1e3 * secs:.1f}', f'{1e3 * least:.1f}', '',
                 f'{least / secs:.0%}', f'{1e3 * (secs - least):.1f}']
            )  # fmt: skip
    return lines


# ----------------------------------------------------------------------- feeding, start, accuracy


def feeding_table(rows: Sequence[Row]) -> str:
    """Return training on real input beside the step on a resident batch."""
    if not rows:
        return NOT_RUN
    head = [
        'input', 'batch', 'training, images/s', 'resident batch', 'ratio', 'waiting for input',
        'rounds',
    ]  # fmt: skip
    body = []
    for row in rows:
        if 'not_run' in row:
            body.append([row['input'], f'{NOT_RUN}: {row["not_run"]}', *[''] * 5])
            continue
        real, resident = (statistics.median(row[key]) for key in ('real_secs', 'resident_secs'))
        pairs = zip(row['resident_secs'], row['real_secs'], strict=True)
        size = row['batch_size']
        body.append(
            [
                row['input'],
                str(size),
                f'{size / real:.1f}',
                f'{size / resident:.1f}',
                f'**{statistics.median(a / b for a, b in pairs):.3f}**',
                f'{statistics.median(row["stall_share"]):.1%}',
                str(len(row['real_secs'])),
            ]
        )
    return markdown([head, *body])


def start_table(rows: Sequence[Row]) -> str:
    """Return the seconds from the command to the end of the first step, in a fresh process."""
    if not rows:
        return NOT_RUN
    head = ['config', 'nothing compiled, s', 'compiled before, s', 'warm / cold', 'starts']
    body = []
    for row in rows:
        cold, warm = (statistics.median(row[key]) for key in ('cold_secs', 'warm_secs'))
        starts = f'{len(row["cold_secs"])} + {len(row["warm_secs"])}'
        body.append([row['config'], f'{cold:.1f}', f'{warm:.1f}', f'{warm / cold:.2f}', starts])
    return markdown([head, *body])


def accuracy_table(folder: Path) -> str:
    """Return the seconds of training to an accuracy on the test images, by device."""
    head = ['config', 'device', 'target test accuracy', 'seconds of training', 'epoch', 'reached']
    body = []
    for path in sorted(folder.glob(TIME_TO_ACCURACY)):
        row = json.loads(path.read_text())
        net = f'{row["config"]}, {row["dtype"]}'
        cells = [net, row['device'], f'{row["target"]:.4f}']
        if row['secs'] is None:
            cells += ['not reached', '', f'{max(row["test_accuracy"]):.4f}']
        else:
            cells += [f'{row["secs"]:.1f}', str(row['epoch']), f'{row["reached"]:.4f}']
        body.append(cells)
    return markdown([head, *body]) if body else NOT_RUN


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]])
