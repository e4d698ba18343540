"""Write the figures of README.md and docs/results.md from the logs in experiments/results/.

python -m experiments.readme            # write them
python -m experiments.readme --check    # exit code 1 if a page differs from the logs
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from alexnet_jax import config_file
from alexnet_jax.training import metrics
from experiments.throughput import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / 'results'


def quickstart() -> str:
    """Return the results of `make` on each machine with a stored log."""
    rows = [
        '| device | seed | test accuracy | ten views | training | commit |',
        '|---|---|---|---|---|---|',
    ]
    for folder in sorted((RESULTS / 'quickstart').glob('*')):
        where = json.loads((folder / 'environment.json').read_text())
        config = config_file.read_json(folder / 'config.json')
        (final,) = [row for row in metrics.read(folder) if row['kind'] == 'test']
        rows.append(
            f'| {where["cpus"]} x {where["device"]} | {config["seed"]} '
            f'| {1 - final["centre"]["top1_error"]:.4f} '
            f'| {1 - final["ten_views"]["top1_error"]:.4f} '
            f'| {final["secs"]:.0f} s, {config["epochs"]:g} epochs '
            f'| {metrics.short(where["commit"])} |'
        )
    return '\n'.join(rows)


def contribution_short() -> str:
    """Return the rows of the contribution table that have a figure of 2012, and the counts."""
    path = RESULTS / 'contribution_table/quickstart/short.md'
    return path.read_text().rstrip() if path.exists() else 'not run'


def contribution() -> str:
    """Return the complete contribution table."""
    return _table(
        'contribution_table/quickstart',
        {'differences.svg': 'differences, with their intervals', 'curves.svg': 'learning curves'},
    )


def figure1() -> str:
    """Epochs to 25 % training error with ReLU and with tanh."""
    return _table('figure1/fashion_mnist', {'figure1.svg': 'training error of both'})


def variants() -> str:
    """The tutorials' nets and LeNet, trained here."""
    return _table('variants/quickstart', {})


def _table(kept: str, drawings: Mapping[str, str]) -> str:
    """table.md of a folder of results, and drawings by what they show."""
    folder = RESULTS / kept
    if not (folder / 'table.md').exists():
        return 'not run'
    text = (folder / 'table.md').read_text().rstrip()
    for file, name in drawings.items():
        text += f'\n\n![{name}](../{(folder / file).relative_to(ROOT)})'
    return text


def speed() -> str:
    """Ours, PyTorch's best, a naive Flax form and the machine's limit, as throughput measured."""
    return tables.readme_table(RESULTS / 'throughput')


def datasets() -> str:
    """Preparation and reading, and the dry run of the ImageNet pipeline, by command."""
    lines = ['| measured by | |', '|---|---|']
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
        f'{found["device"]}, pictures of 500 x 375 px: {jpeg["cpu_ms"]:.2f} ms of processor time '
        f'an image stored as JPEG, {raw["cpu_ms"]:.2f} ms raw; {jpeg["main_mib"]:.0f} MiB, and '
        f'{jpeg["worker_mib"]:.0f} MiB a worker',
    ]


def _read(found: dict) -> list[str]:
    start = found['start_up']['ours']

    def rate(form: str, readers: int) -> str:
        row = found[form][f'ours, {readers}']
        return f'{row["images_per_sec"]:,.0f} images/s ({row["cpu_ms"]:.2f} ms of processor time)'

    return [
        f'{found["cores"]} cores at a load of {found["load_average"][0]:.1f}; '
        f'256 x 256 px raw: {rate("raw", 0)} in one thread, {rate("raw", 2)} with two readers',
        f'as JPEG: {rate("jpeg", 0)} in one thread, {rate("jpeg", 2)} with two readers',
        f'{start["records"]:,.0f} images in {found["files"]} files: first batch after '
        f'{start["first_batch_secs"]:.1f} s, {start["total_mib"]:.0f} MiB with two readers',
    ]


def _dry_run(rows: list[dict]) -> list[str]:
    if not rows:
        return ['not run']
    by_act = {row['act']: row for row in rows}
    made, again = by_act['prepare'], by_act['prepare, the same command again']
    full = by_act['evaluate run on validation[:]']
    pair = [by_act[f'evaluate {name} on validation[:2000]'] for name in ('run', 'cut_off')]
    alike = all(pair[0][key] == pair[1][key] for key in ('centre', 'ten_views'))
    return [
        f'{sum(made["images"].values()):,} pictures prepared in {made["secs"]:.0f} s; killed and '
        f'resumed: {"the same bytes" if again["same_bytes"] else "OTHER BYTES"}',
        f'{by_act["train"]["steps"]} steps of a narrow net at 224 px in '
        f'{by_act["train"]["secs"]:.0f} s; killed and resumed: '
        + ('the same errors' if alike else 'OTHER ERRORS'),
        f'{full["images"]:,} pictures evaluated, ten views each, in {full["secs"]:.0f} s',
    ]


def starts() -> str:
    """The signal at the logits by recipe, as preflight measured it."""
    rows = [
        '| recipe | scale | init scaled by the fan-in | pixels | logits across images, std |',
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
    """Return the distances of meshes and placements from one device (experiments.meshes)."""
    rows = [
        "| placement, data x tower | loss | gradients | parameters | loss curve, recipe's rates "
        '| a hundredth of them |',
        '|---|---|---|---|---|---|',
    ]
    keys = ('loss', 'gradients', 'parameters', 'curve_recipe', 'curve_hundredth')
    for line in (RESULTS / 'meshes.jsonl').read_text().splitlines():
        row = json.loads(line)
        rows.append(f'| {row["row"]} | ' + ' | '.join(f'{row[key]:.1e}' for key in keys) + ' |')
    return '\n'.join(rows)


def communication() -> str:
    """The second half of the page that describe prints for the paper's two GPUs."""
    page = (RESULTS / 'describe_two_devices.txt').read_text()
    table = page[page.index('layer        pass') : page.index('\n\nmemory of a device')]
    return f'```\n{table}\n```'


PAGES = {
    'README.md': {
        'figures': quickstart,
        'datasets': datasets,
        'starts': starts,
        'communication': communication,
        'meshes': meshes,
        'speed': speed,
        'contribution': contribution_short,
    },
    'docs/results.md': {
        'contribution': contribution,
        'figure1': figure1,
        'variants': variants,
    },
}


def filled(page: str) -> str:
    """Return a page of PAGES, its figures put in between their marks."""
    text = (ROOT / page).read_text()
    for mark, table in PAGES[page].items():
        figures = table()
        pattern = rf'(<!-- {mark}: .*? -->\n).*?(<!-- end of {mark} -->)'
        text, found = re.subn(
            pattern, lambda m, f=figures: f'{m[1]}{f}\n{m[2]}', text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f'{page} needs one pair of marks for {mark}, and has {found}.')
    return text


def main() -> int:
    """Write or check; see the head of this file."""
    if '--check' in sys.argv[1:]:
        return int(any(filled(page) != (ROOT / page).read_text() for page in PAGES))
    for page in PAGES:
        (ROOT / page).write_text(filled(page))
    return 0


if __name__ == '__main__':
    sys.exit(main())
