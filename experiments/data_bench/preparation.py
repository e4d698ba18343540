"""Measure `prepare folder`: images/s, CPU time per image, memory and start-up.

JPEGs of 500 x 375 px, the commonest size in ImageNet, are cut out of photographs into a small and a
large folder. One worker prepares each; the difference gives the time per image.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import PIL

from alexnet_jax.training import metrics
from experiments.data_bench import substitute
from experiments.data_bench.process import medians, run
from experiments.output import slug, write_text

RESULTS = Path(__file__).parents[1] / 'results' / 'prepare'
SIZE_PX = (500, 375)
CLASSES = 4
COUNTS = (300, 1500)


def measure_all(flags: argparse.Namespace) -> None:
    """Measure preparation as JPEG and as raw pixels; medians over rounds are the record."""
    device = f'{os.cpu_count()} x {metrics.device_name()}'
    record: dict[str, Any] = {'device': device, 'pillow': PIL.__version__}
    record |= {'images': COUNTS, 'rounds': flags.rounds}
    photos = substitute.photographs(flags.pictures)
    with tempfile.TemporaryDirectory() as name:
        for count in COUNTS:
            for i, content in enumerate(substitute.crops(photos, count, SIZE_PX, seed=count)):
                path = Path(name, f'photos_{count}', f'class_{i % CLASSES}', f'{i}.jpg')
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for storage in ('jpeg', 'raw'):
            found = [measure(Path(name), storage) for _ in range(flags.rounds)]
            record[storage] = {'ours': medians(found)}
    text = json.dumps(record, indent=2) + '\n'
    print(text, end='')
    write_text(RESULTS / f'bench_{slug(device)}.json', text)


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
