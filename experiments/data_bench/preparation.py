"""Measure `prepare folder`: images/s, CPU time per image, memory and start-up.

JPEGs of 500 x 375 px, the commonest size in ImageNet, are cut out of photographs into two folders,
one with five times as many images as the other. Each is prepared by one worker. The difference
gives the time per image, and the remainder is the start-up time. Medians over rounds are written to
experiments/results/prepare/bench_<device>.json.
"""

import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import PIL

from alexnet_jax.training import metrics
from experiments.data_bench import substitute
from experiments.data_bench.process import run
from experiments.output import slug

RESULTS = Path(__file__).parents[1] / 'results' / 'prepare'
SIZE_PX = (500, 375)
CLASSES = 4
COUNTS = (300, 1500)


def measure_all(pictures: Path, rounds: int) -> None:
    """Measure preparation as JPEG and as raw pixels, and write the record."""
    device = f'{os.cpu_count()} x {metrics.device_name()}'
    record: dict[str, Any] = dict(
        device=device, pillow=PIL.__version__, images=COUNTS, rounds=rounds
    )
    with tempfile.TemporaryDirectory() as name:
        for count in COUNTS:
            write_pictures(pictures, Path(name, f'photos_{count}'), count)
        for storage in ('jpeg', 'raw'):
            found = [measure(Path(name), storage) for _ in range(rounds)]
            medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
            record[storage] = {'ours': medians}
    text = json.dumps(record, indent=2) + '\n'
    print(text, end='')
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f'bench_{slug(device)}.json').write_text(text)


def write_pictures(pictures: Path, folder: Path, count: int) -> None:
    """Fill `folder` with `count` JPEGs in CLASSES classes."""
    photos = substitute.photographs(pictures)
    for i, content in enumerate(substitute.crops(photos, count, SIZE_PX, seed=count)):
        path = folder / f'class_{i % CLASSES}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def measure(folder: Path, storage: str) -> dict[str, float]:
    """Prepare few and many images; return milliseconds an image, start-up and peaks of memory."""
    data = folder / 'data'
    found = []
    for count in COUNTS:
        words = ['-m', 'alexnet_jax', 'prepare', 'folder', f'--source={folder}/photos_{count}']
        words += [f'--data_dir={data}', f'--storage={storage}', '--workers=1']
        found.append(run(words, folder / 'log.txt'))
        shutil.rmtree(data)
    few, many = found
    images = COUNTS[1] - COUNTS[0]
    ms = 1e3 * (many['secs'] - few['secs']) / images
    return {
        'ms': ms,
        'cpu_ms': 1e3 * (many['cpu_secs'] - few['cpu_secs']) / images,
        'start_secs': few['secs'] - COUNTS[0] * ms / 1e3,
        'main_mib': many['main_process_mib'],
        'worker_mib': many['worker_mib'],
    }
