"""Measure preparation: images/s, processor time an image, memory, start-up.

    python -m experiments.bench_prepare --pictures=FOLDER [--against=CHECKOUT] [--rounds=5]

FOLDER holds any photographs; JPEGs of 500 x 375 px, ImageNet's commonest size, are cut out of them
into two folders, one with five times as many as the other. `prepare folder` runs on each with one
worker. The difference gives the rate; what remains is the time to start. With `--against`, another
checkout of this repository takes turns, round by round; medians are kept. The result goes to
experiments/results/prepare/<device>.json.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL

from alexnet_jax import command
from experiments import official_tars

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'prepare'
SIZE = (500, 375)
CLASSES = 4
COUNTS = (300, 1500)


def draw(pictures: Path, folder: Path, count: int) -> None:
    """Fill `folder` with `count` JPEGs in CLASSES classes."""
    photos = official_tars.photographs(pictures)
    for i, content in enumerate(official_tars.crops(photos, count, SIZE, seed=count)):
        path = folder / f'class_{i % CLASSES}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def prepare(checkout: Path, source: Path, scratch: Path, storage: str) -> dict[str, float]:
    """Run one preparation; return seconds, processor seconds and the peaks of memory in MiB."""
    words = ['-m', 'alexnet_jax', 'prepare', 'folder', f'--source={source}', '--workers=1',
             f'--data_dir={scratch}', f'--storage={storage}']  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *words], cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    main_mib = worker_mib = 0
    while child.poll() is None:
        main_mib = max(main_mib, _peak_mib(child.pid))
        workers = Path(f'/proc/{child.pid}/task/{child.pid}/children')
        if workers.exists():
            worker_mib = max([worker_mib, *map(_peak_mib, workers.read_text().split())])
        time.sleep(0.02)
    if child.returncode:
        raise command.RunError(
            f'{checkout}: {child.stderr.read().decode() if child.stderr else ""}'
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(scratch)
    return {
        'secs': time.perf_counter() - began,
        'cpu_secs': sum(after[:2]) - sum(before[:2]),
        'main_mib': main_mib,
        'worker_mib': worker_mib,
    }


def _peak_mib(pid: int | str) -> int:
    try:
        match = re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())
    except OSError:
        return 0
    return int(match[1]) // 1024 if match else 0


def measure(checkouts: dict[str, Path], room: Path, rounds: int, storage: str) -> dict[str, Any]:
    """Let the checkouts take turns; return medians."""
    rows: dict[str, list[dict]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            few, many = (
                prepare(checkout, room / f'photos_{n}', room / 'data', storage) for n in COUNTS
            )
            images = COUNTS[1] - COUNTS[0]
            row = {
                f'{k}ms': 1e3 * (many[f'{k}secs'] - few[f'{k}secs']) / images for k in ('', 'cpu_')
            }
            start = few['secs'] - COUNTS[0] * row['ms'] / 1e3
            row |= {'start_secs': start} | {k: many[k] for k in ('main_mib', 'worker_mib')}
            rows[name].append(row)
    found: dict[str, Any] = {
        name: {key: statistics.median(row[key] for row in taken) for key in taken[0]}
        for name, taken in rows.items()
    }
    if len(rows) == 2:
        pairs = list(zip(*rows.values(), strict=True))
        found['rate_ratio'] = statistics.median(other['ms'] / ours['ms'] for ours, other in pairs)
        found['cpu_rate_ratio'] = statistics.median(
            other['cpu_ms'] / ours['cpu_ms'] for ours, other in pairs
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog='python -m experiments.bench_prepare', description=__doc__)
    parser.add_argument(
        '--pictures', type=command.path, required=True, help='folder of photographs'
    )
    parser.add_argument('--against', type=command.path, help='another checkout')
    parser.add_argument('--rounds', type=int, default=5)
    return parser


def _act(flags: argparse.Namespace) -> None:
    checkouts = {'ours': ROOT} | ({'other': flags.against} if flags.against else {})
    with tempfile.TemporaryDirectory() as name:
        for count in COUNTS:
            draw(flags.pictures, Path(name, f'photos_{count}'), count)
        record = dict(device=device(), pillow=PIL.__version__, images=COUNTS, rounds=flags.rounds)
        for storage in ('jpeg', 'raw'):
            record[storage] = measure(checkouts, Path(name), flags.rounds, storage)
    print(json.dumps(record, indent=2))
    RESULTS.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r'\W+', '_', record['device']).strip('_').lower()
    (RESULTS / f'bench_{slug}.json').write_text(json.dumps(record, indent=2) + '\n')


def device() -> str:
    """Return the processor's name."""
    names = re.findall(r'^model name\s*: (.*)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    return f'{os.cpu_count()} x {names[0] if names else "unknown"}'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the head of this file."""
    return command.run('bench_prepare', _parser, _act, argv)


if __name__ == '__main__':
    sys.exit(main())
