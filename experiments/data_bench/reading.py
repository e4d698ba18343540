"""Measure reading: start-up at the size of ImageNet, images/s and CPU time per image.

Start-up: a fresh process opens a set of 1,281,167 records in 626 files, as ImageNet's training
split is prepared but with images of 8 x 8 px, and makes its first batch. Rates: batches of 128 in
random order from images of 256 x 256 px, raw and JPEG, in the page cache, by several numbers of
reader threads in turn.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax.data import datasets, prepared
from alexnet_jax.data import images as image_io
from alexnet_jax.data.batches import Batch, TrainStream, prefetch
from alexnet_jax.data.prepare import shards
from alexnet_jax.machine import cores
from alexnet_jax.parallel import cpu
from alexnet_jax.training import metrics
from experiments.data_bench.process import medians
from experiments.output import slug, write_text

RESULTS = Path(__file__).parents[1] / 'results' / 'reading'
RECORDS, FILES, CLASSES, BATCH, PX, QUALITY = 1_281_167, 626, 1000, 128, 256, 90
IMAGES = {'raw': 2000, 'jpeg': 4000}  # 400 MB and about 120 MB
BATCHES = {'raw': 60, 'jpeg': 20}  # a round
Row = dict[str, float]


def write(
    folder: Path, count: int, files: int, px: int, storage: str, encoded: Callable[[int], bytes]
) -> None:
    """Write a data set of one split `train` as TFDS does: `encoded(i)` is image i."""
    version = folder / '1.0.0'
    version.mkdir(parents=True)
    lengths = [len(range(i, count, files)) for i in range(files)]
    numbers = iter(range(count))
    for i, length in enumerate(lengths):
        name = prepared.shard_name(folder.name, 'train', i, files)
        records = (
            shards.example(encoded(number), number % CLASSES)
            for number in itertools.islice(numbers, length)
        )
        shards.write_records(version / name, records)
    features = shards.features((px, px, 3), storage, [f'class {i}' for i in range(CLASSES)])
    about = {'train': [(length, 0) for length in lengths]}
    shards.write_metadata(version, folder.name, '1.0.0', features, about)


def noise(rng: np.random.Generator) -> np.ndarray:
    """Draw noise of several scales, uint8 [PX, PX, 3]; its JPEG is as large as a photograph's."""
    total = np.zeros((PX, PX, 3))
    for side, weight in ((4, 0.5), (16, 0.25), (64, 0.12), (PX, 0.04)):
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        total += weight * np.asarray(image.resize((PX, PX), Image.Resampling.BICUBIC))
    return total.astype(np.uint8)


def encode(storage: str, image: np.ndarray) -> bytes:
    """Return an image as it is stored."""
    return image.tobytes() if storage == 'raw' else image_io.jpeg(image, QUALITY)


def write_all(scratch: Path) -> dict[str, int]:
    """Write the three sets; return the mean bytes of an image in those that are read for rates."""
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (64, 192), np.uint8)
    write(scratch / 'small', RECORDS, FILES, 8, 'raw', lambda i: tiny[i % 64].tobytes())
    np.savez(
        scratch / 'small/1.0.0/statistics.npz',
        count_decoded=RECORDS,
        mean_image=np.zeros((8, 8, 3), np.float32),
        colour_std=np.ones(3, np.float32),
        colour_vectors=np.eye(3, dtype=np.float32),
    )
    images = [noise(rng) for _ in range(100)]
    mean_bytes = {}
    for storage, count in IMAGES.items():
        some = [encode(storage, image) for image in images]
        write(scratch / storage, count, 4, PX, storage, lambda i, some=some: some[i % len(some)])
        mean_bytes[storage] = round(statistics.mean(map(len, some)))
    return mean_bytes


START = """
import json, re, sys, time
begin = time.perf_counter()
from pathlib import Path
from alexnet_jax.data import batches, datasets
dataset = datasets.load('small', sys.argv[1], 'train', workers=2, resident_gib=0.0)
opened = time.perf_counter()
datasets.statistics_of(dataset)
stream = batches.TrainStream(dataset, seed=0, batch_size=128)
stream.batch(0)
batch = time.perf_counter()
for step in range(1, 200):  # of 626 files, most are opened in 25,600 images
    stream.batch(step)
sizes = re.findall(r'(?:RssAnon|RssShmem):\\s+(\\d+)', Path('/proc/self/status').read_text())
print(json.dumps({
    'records': len(dataset),
    'opened_secs': opened - begin,
    'first_batch_secs': batch - begin,
    'total_mib': sum(map(int, sizes)) / 1024,
}))
"""


def start_up(scratch: Path, rounds: int) -> dict[str, Row]:
    """Measure fresh processes that open the set of ImageNet's size."""
    command = [sys.executable, '-c', START, str(scratch)]
    outputs = [subprocess.run(command, stdout=-1, check=True).stdout for _ in range(rounds)]
    return {'ours': medians([json.loads(output) for output in outputs])}


def rates(scratch: Path, storage: str, rounds: int) -> dict[str, Row]:
    """Measure reading by 0, 1, 2 and as many threads as cores, in turn."""
    streams = {f'ours, {n}': batches(scratch, storage, n) for n in sorted({0, 1, 2, cores()})}
    found: dict[str, list[Row]] = {name: [] for name in streams}
    for number in range(rounds + 1):
        for name, stream in streams.items():
            row = sample(stream, BATCHES[storage])
            time.sleep(0.2)  # what is read ahead does not disturb the next one
            if number:  # the first round opens files
                found[name].append(row)
    return {name: medians(rows) for name, rows in found.items()}


def batches(scratch: Path, storage: str, readers: int) -> Iterator[Batch]:
    """Yield training batches without end, read ahead as in training."""
    dataset = datasets.load(storage, scratch, 'train', workers=readers, resident_gib=0.0)
    stream = TrainStream(dataset, 0, BATCH)
    if readers:
        return prefetch(stream.batch, 0, 10**9, depth=2, threads=2)
    return map(stream.batch, range(10**9))


def sample(stream: Iterator[Batch], count: int) -> Row:
    """Measure `count` batches, after those that were read ahead."""
    for _ in range(6):
        next(stream)
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(stream)
    images = count * BATCH
    return {
        'images_per_sec': images / (time.perf_counter() - begin),
        'cpu_ms': 1e3 * (time.process_time() - cpu) / images,
    }


def measure_all(flags: argparse.Namespace) -> None:
    """Write the data sets, measure, and write the record: medians over rounds."""
    result: dict[str, Any] = {'cores': cores(), 'rounds': flags.rounds, 'files': FILES}
    cpu.keep_freed()
    with tempfile.TemporaryDirectory() as name:  # takes 2 GB
        folder = Path(name)
        result['bytes_an_image'] = write_all(folder)
        result['start_up'] = start_up(folder, flags.rounds)
        for storage in IMAGES:
            result[storage] = rates(folder, storage, flags.rounds)
    versions = {name: metadata.version(name) for name in ('array-record', 'pillow', 'simplejpeg')}
    result |= {'environment': metrics.environment() | versions, 'load_average': os.getloadavg()}
    text = json.dumps(result, indent=1) + '\n'
    print(text, end='')
    write_text(RESULTS / f'{slug(metrics.device_name())}.json', text)
