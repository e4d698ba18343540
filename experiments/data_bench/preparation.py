"""Measure `prepare folder`: images/s, CPU time per image, memory and start-up.

JPEGs of 500 x 375 px, the commonest size in ImageNet, are cut out of photographs into a small and a
large folder. One worker prepares each; the difference gives the time per image.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from alexnet_jax.errors import UsageError
from alexnet_jax.training import metrics
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
    photos = photographs(flags.pictures)
    with tempfile.TemporaryDirectory() as name:
        for count in COUNTS:
            for i, content in enumerate(crops(photos, count)):
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


def photographs(folder: Path) -> list[Image.Image]:
    """Return the pictures below a folder of at least 256 px, at most 1600 x 1200 px, by name."""
    found = []
    for path in sorted(folder.rglob('*')):
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp') and not path.is_symlink():
            with Image.open(path) as picture:
                if min(picture.size) >= 256:
                    picture.thumbnail((1600, 1200))
                    found.append(picture.convert('RGB'))
    if not found:
        raise UsageError(f'{folder} has no photographs of at least 256 px; name a folder of some.')
    return found


def crops(photos: Sequence[Image.Image], count: int) -> list[bytes]:
    """Cut `count` different JPEGs of SIZE_PX out of the photographs."""
    rng, found = np.random.default_rng(count), []
    for i in range(count):
        photo, buffer = photos[i % len(photos)], io.BytesIO()
        side = rng.uniform(0.4, 1.0)
        width, height = (max(1, int(side * edge)) for edge in photo.size)
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        crop = photo.resize(SIZE_PX, box=(left, top, left + width, top + height))
        crop.save(buffer, 'jpeg', quality=92)
        found.append(buffer.getvalue())
    return found
