"""Fill the generated parts of README.md and docs/ from configs and from logs in results/.

python -m experiments.readme            # write them
python -m experiments.readme --check    # exit code 1 if a page differs from the logs

A generated part is enclosed by `<!-- MARK: command -->` and `<!-- end of MARK -->`.
"""

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax.training import metrics
from configs import Claim
from experiments.throughput import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / 'results'
# Folders of RESULTS with runs of the recipe as it is.
KEPT_RUNS = ('quickstart', 'gpu', 'variants/fashion_mnist')
NOT_RUN = 'not run'

# ------------------------------------------------------------------------------ runs of the recipe


def archived_runs() -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Yield (config, environment, records) of each finished run of configs/alexnet.py."""
    found = (path for folder in KEPT_RUNS for path in RESULTS.glob(f'{folder}/*/config.json'))
    for path in sorted(found):
        config, records = json.loads(path.read_text()), metrics.read(path.parent)
        if config['name'] == 'alexnet' and any(row['kind'] == 'test' for row in records):
            yield config, json.loads((path.parent / 'environment.json').read_text()), records


def _test(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the last record of kind 'test'."""
    return [row for row in records if row['kind'] == 'test'][-1]


def _device(environment: Mapping[str, Any]) -> str:
    on_cpu = environment['platform'] == 'cpu'
    return f'{environment["cpus"] if on_cpu else environment["devices"]} x {environment["device"]}'


def quickstart() -> str:
    """Return the last line that `make` printed in the archived quickstart run on a CPU."""
    for config, environment, records in archived_runs():
        if config['scale'] == 'quickstart' and environment['platform'] == 'cpu':
            return f'```\n{summary(config, records)}\n```\n\nMeasured on {_device(environment)}.'
    return NOT_RUN


def summary(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return what a training run prints at its end, without the name of its folder."""
    final = _test(records)
    return (
        f'{config["name"]}: test accuracy {_accuracy(final, "centre")} '
        f'({_accuracy(final, "ten_views")} over ten views) on {final["images"]} images after '
        f'{final["step"]} steps, {final["secs"]:.0f} s of training'
    )


def runs() -> str:
    """Return the table of all archived runs of the recipe."""
    rows = [
        '| scale | device | seed | test accuracy | ten views | training | commit |',
        '|---|---|---|---|---|---|---|',
    ]
    for config, environment, records in archived_runs():
        final = _test(records)
        rows.append(
            f'| {config["scale"]} | {_device(environment)} | {config["seed"]} '
            f'| {_accuracy(final, "centre")} | {_accuracy(final, "ten_views")} '
            f'| {final["secs"]:.0f} s, {config["epochs"]:g} epochs '
            f'| {metrics.short(environment["commit"])} |'
        )
    return '\n'.join(rows)


def _accuracy(final: Mapping[str, Any], view: str) -> str:
    return f'{1 - final[view]["top1_error"]:.4f}'


# ------------------------------------------------------------------------- the results of README


def results() -> str:
    """Return README's table: the recipe at three scales, and the speed."""
    rows = [
        '| result | here | for comparison | command |',
        '|---|---|---|---|',
        f'| Fashion-MNIST, a quarter of the width, 112 px: test accuracy '
        f'| {_scale("quickstart")} | - | `make` |',
        f'| Fashion-MNIST, full net, 224 px: test accuracy | {_scale("fashion_mnist")} '
        f'| {importlib.import_module("configs.variant_d2l").REPORTED} (d2l, one tower, no LRN) '
        f'| `python main.py --config=configs/alexnet.py:fashion_mnist` |',
        f'| ILSVRC-2012 val, full net: top-1 / top-5 error | {_errors("imagenet2012")} '
        f'| 42.34 / 19.58 %, ten views 40.53 / 18.05 % (run 170) '
        f'| `python main.py --config=configs/alexnet.py:imagenet2012` |',
        f'| training speed, full net | {_speed()} | `python -m experiments.throughput` |',
    ]
    return '\n'.join(rows)


def _scale(scale: str) -> str:
    """Return 'one view, ten views' of the first archived run at a scale."""
    for config, _, records in archived_runs():
        if config['scale'] == scale:
            final = _test(records)
            return f'{_accuracy(final, "centre")}, ten views {_accuracy(final, "ten_views")}'
    return NOT_RUN


def _errors(scale: str) -> str:
    """Return 'top-1 / top-5, ten views top-1 / top-5' of the first archived run at a scale."""
    for config, _, records in archived_runs():
        if config['scale'] == scale:
            centre, ten = (
                f'{100 * view["top1_error"]:.2f} / {100 * view["top5_error"]:.2f} %'
                for view in (_test(records)['centre'], _test(records)['ten_views'])
            )
            return f'{centre}, ten views {ten}'
    return NOT_RUN


def _speed() -> str:
    """Return two cells: our images/s for the full net on the first CPU, and PyTorch's best."""
    for line in speed().splitlines()[2:]:
        device, net, batch, what, ours, torch, ratio, *_ = [
            cell.strip(' *') for cell in line.strip('|').split('|')
        ]
        if net.startswith('2012,') and what == 'train':
            return (
                f'{ours} images/s at batch {batch} on {device}, {ratio} times PyTorch '
                f'| {torch.partition(" ")[0]} images/s (fastest PyTorch variant)'
            )
    return f'{NOT_RUN} | -'


# -------------------------------------------------------------------------------- tables of docs/


def configs() -> str:
    """Return what each file of configs/ is, and what was reported for its change in 2012."""
    rows = [
        '| file | description | reported effect on error, top-1 / top-5, points |',
        '|---|---|---|',
    ]
    for path in sorted((ROOT / 'configs').glob('[a-z]*.py')):
        head = ast.get_docstring(ast.parse(path.read_text()))
        assert head is not None, path
        what = head.partition('\n')[0].removeprefix('Ablation: ').rstrip('.')
        claim = getattr(importlib.import_module(f'configs.{path.stem}'), 'CLAIM', None)
        rows.append(f'| `{path.name}` | {what} | {_claim(claim) if claim else "-"} |')
    return '\n'.join(rows)


def _claim(claim: Claim) -> str:
    if claim.top1 is None and claim.top5 is None:
        return f'{claim.words} ({claim.source})'
    points = ' / '.join('-' if x is None else f'{x:+g}' for x in (claim.top1, claim.top5))
    return f'{points} ({claim.source})'


def contribution_short() -> str:
    """Return README's rows of the contribution table, and the counts."""
    path = RESULTS / 'contribution_table/quickstart/short.md'
    return path.read_text().rstrip() if path.exists() else NOT_RUN


def contribution() -> str:
    """Return the complete contribution table."""
    return _table(
        'contribution_table/quickstart',
        {'differences.svg': 'differences, with their intervals', 'curves.svg': 'learning curves'},
    )


def figure1() -> str:
    """Return the epochs to 25 % training error with ReLU and with tanh."""
    return _table('figure1/fashion_mnist', {'figure1.svg': 'training error of both'})


def variants() -> str:
    """Return the results of the tutorials' nets and LeNet."""
    folders = sorted((path.parent for path in RESULTS.glob('variants/*/table.md')), reverse=True)
    return '\n\n'.join(_table(str(folder.relative_to(RESULTS)), {}) for folder in folders)


def _table(kept: str, drawings: Mapping[str, str]) -> str:
    """Return table.md of a folder of results, and its drawings, {file: caption}."""
    folder = RESULTS / kept
    if not (folder / 'table.md').exists():
        return NOT_RUN
    text = (folder / 'table.md').read_text().rstrip()
    for file, name in drawings.items():
        text += f'\n\n![{name}](../{(folder / file).relative_to(ROOT)})'
    return text


def speed() -> str:
    """Return our speed beside PyTorch's best, a naive Flax form and the machine's limit."""
    return tables.readme_table(RESULTS / 'throughput')


def datasets() -> str:
    """Return the costs of preparation and reading, and of the dry run of ImageNet."""
    lines = ['| command | result |', '|---|---|']
    for path in sorted((RESULTS / 'prepare').glob('*.json')):
        lines += [
            f'| `experiments.data_bench preparation` | {fact} |'
            for fact in _prepared(json.loads(path.read_text()))
        ]
    for path in sorted((RESULTS / 'reading').glob('*.json')):
        lines += [
            f'| `experiments.data_bench reading` | {fact} |'
            for fact in _read(json.loads(path.read_text()))
        ]
    path = RESULTS / 'dry_run.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines += [f'| `experiments.data_bench dry_run` | {fact} |' for fact in _dry_run(rows)]
    return '\n'.join(lines)


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


def _dry_run(rows: list[dict]) -> list[str]:
    if not rows:
        return [NOT_RUN]
    by_act = {row['act']: row for row in rows}
    made, again = by_act['prepare'], by_act['prepare, the same command again']
    full = by_act['evaluate run on validation[:]']
    pair = [by_act[f'evaluate {name} on validation[:2000]'] for name in ('run', 'cut_off')]
    alike = all(pair[0][key] == pair[1][key] for key in ('centre', 'ten_views'))
    return [
        f'{sum(made["images"].values()):,} images prepared in {made["secs"]:.0f} s; killed and '
        f'resumed: {"the same bytes" if again["same_bytes"] else "OTHER BYTES"}',
        f'{by_act["train"]["steps"]} steps of a narrow net at 224 px in '
        f'{by_act["train"]["secs"]:.0f} s; killed and resumed: '
        + ('the same errors' if alike else 'OTHER ERRORS'),
        f'{full["images"]:,} images evaluated, ten views each, in {full["secs"]:.0f} s',
    ]


def starts() -> str:
    """Return the standard deviation of the logits at initialisation, by recipe."""
    rows = [
        '| recipe | scale | init scaled by fan-in | pixels | std of the logits across images |',
        '|---|---|---|---|---|',
    ]
    for line in (RESULTS / 'preflight.jsonl').read_text().splitlines():
        row = json.loads(line)
        pixels = '0-255' if row['factor'] == 1 else '0-1'
        low, high = min(row['logit_std']), max(row['logit_std'])
        scaled = 'no' if row['init_scaling'] == 'none' else 'yes'
        rows.append(
            f'| {row["recipe"]} | {row["scale"]} | {scaled} | {pixels} '
            f'| {low:.1e} to {high:.1e}, {len(row["logit_std"])} seeds |'
        )
    return '\n'.join(rows)


def meshes() -> str:
    """Return how far meshes and placements are from one device."""
    rows = [
        "| placement, data x tower | loss | gradients | parameters | loss curve, recipe's rates "
        '| loss curve, rates / 100 |',
        '|---|---|---|---|---|---|',
    ]
    keys = ('loss', 'gradients', 'parameters', 'curve_recipe', 'curve_hundredth')
    for line in (RESULTS / 'meshes.jsonl').read_text().splitlines():
        row = json.loads(line)
        rows.append(f'| {row["row"]} | ' + ' | '.join(f'{row[key]:.1e}' for key in keys) + ' |')
    return '\n'.join(rows)


def communication() -> str:
    """Return the second half of what describe prints for the paper's two GPUs."""
    page = (RESULTS / 'describe_two_devices.txt').read_text()
    table = page[page.index('layer        pass') : page.index('\n\nmemory of a device')]
    return f'```\n{table}\n```'


PAGES = {
    'README.md': {
        'quickstart': quickstart,
        'results': results,
        'contribution': contribution_short,
    },
    'docs/configs.md': {'configs': configs},
    'docs/data.md': {'datasets': datasets},
    'docs/parallelism.md': {'communication': communication, 'meshes': meshes},
    'docs/performance.md': {'speed': speed},
    'docs/reproducibility.md': {'starts': starts},
    'docs/results.md': {
        'runs': runs,
        'contribution': contribution,
        'figure1': figure1,
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
