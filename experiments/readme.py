"""Fill the generated parts of README.md and docs/ from configs and from logs in results/.

    python -m experiments.readme            # write them
    python -m experiments.readme --check    # exit code 1 if a page differs from the logs

A generated part is enclosed by `<!-- MARK: command -->` and `<!-- end of MARK -->`.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from configs import Claim
from experiments import run_archive
from experiments.output import NOT_RUN, config_module, markdown, read_lines, short_commit
from experiments.run_archive import ArchivedRun
from experiments.throughput import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / 'results'
# Folders of RESULTS with runs of the recipe as it is.
KEPT_RUNS = ('quickstart', 'gpu', 'variants/fashion_mnist')
CONTRIBUTION = 'contribution_table/quickstart'

# ------------------------------------------------------------------------------ runs of the recipe


def archived_runs(scale: str = '') -> Iterator[ArchivedRun]:
    """Yield the finished runs of configs/alexnet.py in KEPT_RUNS, of one scale if it is given."""
    found = (path.parent for kept in KEPT_RUNS for path in RESULTS.glob(f'{kept}/*/config.json'))
    for run in map(run_archive.read_run, sorted(found)):
        config = run.config
        if config['name'] == 'alexnet' and scale in ('', config['scale']) and run.final():
            yield run


def _device(run: ArchivedRun) -> str:
    on_cpu = run.environment['platform'] == 'cpu'
    return f'{run.environment["cpus" if on_cpu else "devices"]} x {run.environment["device"]}'


def _accuracy(run: ArchivedRun, view: str) -> str:
    return f'{run.accuracy(view):.4f}'


def quickstart() -> str:
    """Return the last line that `make` printed in the archived quickstart run on a CPU."""
    for run in archived_runs('quickstart'):
        if run.environment['platform'] == 'cpu':
            return f'```\n{summary(run)}\n```\n\nMeasured on {_device(run)}.'
    return NOT_RUN


def summary(run: ArchivedRun) -> str:
    """Return what a training run prints at its end, without the name of its folder."""
    final = run.final()
    return (
        f'{run.config["name"]}: test accuracy {_accuracy(run, "centre")} '
        f'({_accuracy(run, "ten_views")} over ten views) on {final["images"]} images after '
        f'{final["step"]} steps, {final["secs"]:.0f} s of training'
    )


def runs() -> str:
    """Return the table of all archived runs of the recipe."""
    head = ['scale', 'device', 'seed', 'test accuracy', 'ten views', 'training', 'commit']
    body = []
    for run in archived_runs():
        config, views = run.config, [_accuracy(run, view) for view in ('centre', 'ten_views')]
        training = f'{run.final()["secs"]:.0f} s, {config["epochs"]:g} epochs'
        commit = short_commit(run.environment['commit'])
        body.append([config['scale'], _device(run), config['seed'], *views, training, commit])
    return markdown([head, *body])


# ------------------------------------------------------------------------- the results of README


def results() -> str:
    """Return README's table: the recipe at three scales, and speeds."""
    d2l = config_module('variant_d2l').REPORTED
    train = 'python main.py --config=configs/alexnet.py'
    rows = [
        ['result', 'here', 'for comparison', 'command'],
        [
            'Fashion-MNIST, a quarter of the width, 112 px: test accuracy',
            *(_first('quickstart'), '-', '`make`'),
        ],
        [
            'Fashion-MNIST, full net, 224 px: test accuracy',
            *(_first('fashion_mnist'), f'{d2l} (d2l, one tower, no LRN)'),
            f'`{train}:fashion_mnist`',
        ],
        [
            'ILSVRC-2012 val, full net: top-1 / top-5 error',
            _first('imagenet2012', _errors),
            '42.34 / 19.58 %, ten views 40.53 / 18.05 % (run 170)',
            f'`{train}:imagenet2012`',
        ],
    ]
    return markdown(rows + _speeds())


def _errors(run: ArchivedRun, view: str) -> str:
    scores = run.final()[view]
    return f'{100 * scores["top1_error"]:.2f} / {100 * scores["top5_error"]:.2f} %'


def _first(scale: str, show: Callable[[ArchivedRun, str], str] = _accuracy) -> str:
    """Return both views of the first archived run at a scale."""
    for run in archived_runs(scale):
        return f'{show(run, "centre")}, ten views {show(run, "ten_views")}'
    return NOT_RUN


def _speeds() -> list[list[str]]:
    """Return our images/s for the full net and PyTorch's best: the first row of each dtype."""
    rows = {}
    for where, net, batch, what, ours, torch, ratio, *_ in tables.readme_rows(
        RESULTS / 'throughput'
    ):
        if net.startswith('2012,') and what == 'train':
            here, times = ours.strip('*'), ratio.strip('*')
            row = [
                f'training speed, full net, {net.removeprefix("2012, ")}',
                f'{here} images/s at batch {batch} on {where}, {times} times PyTorch',
                f'{torch.partition(" ")[0]} images/s (fastest PyTorch variant)',
                '`python -m experiments.throughput`',
            ]
            rows.setdefault(net, row)
    return list(rows.values())


# -------------------------------------------------------------------------------- tables of docs/


def configs() -> str:
    """Return what each file of configs/ is, and what was reported for its change in 2012."""
    head = ['file', 'description', 'reported effect on error, top-1 / top-5, points']
    body = []
    for path in sorted((ROOT / 'configs').glob('[a-z]*.py')):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ''
        what = doc.partition('\n')[0].removeprefix('Ablation: ').rstrip('.')
        claim = getattr(config_module(path.stem), 'CLAIM', None)
        body.append([f'`{path.name}`', what, _claim(claim) if claim else '-'])
    return markdown([head, *body])


def _claim(claim: Claim) -> str:
    points = ' / '.join('-' if x is None else f'{x:+g}' for x in (claim.top1, claim.top5))
    return f'{claim.words if points == "- / -" else points} ({claim.source})'


def contribution() -> str:
    """Return the complete contribution table."""
    drawn = 'differences, with their intervals'
    return _table(CONTRIBUTION, {'differences.svg': drawn, 'curves.svg': 'learning curves'})


def variants() -> str:
    """Return the results of the tutorials' nets and LeNet."""
    folders = sorted((path.parent for path in RESULTS.glob('variants/*/table.md')), reverse=True)
    return '\n\n'.join(_table(str(folder.relative_to(RESULTS)), {}) for folder in folders)


def _table(kept: str, drawings: Mapping[str, str]) -> str:
    """Return table.md of a folder of results, and its drawings, {file: caption}."""
    folder = RESULTS / kept
    shown = [f'![{name}](../{(folder / f).relative_to(ROOT)})' for f, name in drawings.items()]
    return '\n\n'.join([(folder / 'table.md').read_text().rstrip(), *shown])


def datasets() -> str:
    """Return the costs of preparation and reading."""
    rows = [['command', 'result']]
    for measure, facts in (('prepare', _prepared), ('reading', _read)):
        for path in sorted((RESULTS / measure).glob('*.json')):
            name = {'prepare': 'preparation'}.get(measure, measure)
            found = facts(json.loads(path.read_text()))
            rows += [[f'`experiments.data_bench {name}`', fact] for fact in found]
    return markdown(rows)


def _prepared(found: dict) -> list[str]:
    jpeg, raw = (found[storage]['ours'] for storage in ('jpeg', 'raw'))
    return [
        f'{found["device"]}, images of 500 x 375 px: {jpeg["cpu_ms"]:.2f} ms of CPU time per '
        f'image stored as JPEG, {raw["cpu_ms"]:.2f} ms raw; {jpeg["main_mib"]:.0f} MiB, and '
        f'{jpeg["worker_mib"]:.0f} MiB per worker',
    ]


def _read(found: dict) -> list[str]:
    start = found['start_up']['ours']

    def rate(form: str, readers: int) -> str:
        row = found[form][f'ours, {readers}']
        return f'{row["images_per_sec"]:,.0f} images/s ({row["cpu_ms"]:.2f} ms of CPU time)'

    return [
        f'{found["cores"]} cores, load {found["load_average"][0]:.1f}; '
        f'256 x 256 px raw: {rate("raw", 0)} in one thread, {rate("raw", 2)} with two readers',
        f'as JPEG: {rate("jpeg", 0)} in one thread, {rate("jpeg", 2)} with two readers',
        f'{start["records"]:,.0f} images in {found["files"]} files: first batch after '
        f'{start["first_batch_secs"]:.1f} s, {start["total_mib"]:.0f} MiB with two readers',
    ]


def starts() -> str:
    """Return the standard deviation of the logits at initialisation, by recipe."""
    head = ['recipe', 'scale', 'init scaled by fan-in', 'pixels']
    body = []
    for row in read_lines(RESULTS / 'preflight.jsonl'):
        pixels, stds = '0-255' if row['factor'] == 1 else '0-1', row['logit_std']
        scaled = 'no' if row['init_scaling'] == 'none' else 'yes'
        shown = f'{min(stds):.1e} to {max(stds):.1e}, {len(stds)} seeds'
        body.append([row['recipe'], row['scale'], scaled, pixels, shown])
    return markdown([[*head, 'std of the logits across images'], *body])


def meshes() -> str:
    """Return how far meshes and placements are from one device."""
    columns = {
        'loss': 'loss',
        'gradients': 'gradients',
        'parameters': 'parameters',
        'curve_recipe': "loss curve, recipe's rates",
        'curve_hundredth': 'loss curve, rates / 100',
    }
    rows = read_lines(RESULTS / 'meshes.jsonl')
    body = [[row['row'], *(f'{row[key]:.1e}' for key in columns)] for row in rows]
    return markdown([['placement, data x tower', *columns.values()], *body])


def communication() -> str:
    """Return the second half of what describe prints for the paper's two GPUs."""
    page = (RESULTS / 'describe_two_devices.txt').read_text()
    table = page[page.index('layer  pass') : page.index('\n\nmemory of a device')]
    return f'```\n{table}\n```'


PAGES = {
    'README.md': {
        'quickstart': quickstart,
        'results': results,
        'contribution': lambda: (RESULTS / CONTRIBUTION / 'short.md').read_text().rstrip(),
    },
    'docs/configs.md': {'configs': configs},
    'docs/data.md': {'datasets': datasets},
    'docs/parallelism.md': {'communication': communication, 'meshes': meshes},
    'docs/performance.md': {
        'speed': lambda: markdown(
            [tables.README_HEAD, *tables.readme_rows(RESULTS / 'throughput')]
        ),
        'accuracy': lambda: tables.accuracy_table(tables.timed_runs(RESULTS)),
    },
    'docs/reproducibility.md': {'starts': starts},
    'docs/results.md': {
        'runs': runs,
        'contribution': contribution,
        'figure1': lambda: _table(
            'figure1/fashion_mnist', {'figure1.svg': 'training error of both'}
        ),
        'variants': variants,
    },
}


def filled(page: str) -> str:
    """Return a page of PAGES with its generated parts filled in."""
    text = (ROOT / page).read_text()
    for mark, make in PAGES[page].items():
        figures = make()
        pattern = rf'(<!-- {mark}: .*? -->\n).*?(<!-- end of {mark} -->)'
        text, found = re.subn(
            pattern, lambda m, f=figures: f'{m[1]}{f}\n{m[2]}', text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f'{page} needs one pair of marks for {mark}, and has {found}.')
    return text


def main() -> int:
    """Write the pages, or compare them; see the head of this file."""
    if '--check' in sys.argv[1:]:
        return int(any(filled(page) != (ROOT / page).read_text() for page in PAGES))
    for page in PAGES:
        (ROOT / page).write_text(filled(page))
    return 0


if __name__ == '__main__':
    sys.exit(main())
