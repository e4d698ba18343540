"""Measure reading: start-up at ImageNet's size, images/s and processor time an image.

    python -m experiments.bench_reading [--against=CHECKOUT] [--rounds=7] [--scratch=DIR]

Start-up: a set of 1,281,167 records in 626 files, as ImageNet's training split is prepared, but of
8 x 8 px. A fresh process opens it and makes its first batch.

Rates: batches of 128 in random order from images of 256 x 256 px, raw and JPEG, drawn by code
(noise of several scales), in the page cache.

With `--against`, the same from another checkout of this repository. All processes take turns, round
by round, and medians are kept. The result goes to experiments/results/reading/<device>.json.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax.data import images as image_io
from alexnet_jax.data.prepare import shards
from alexnet_jax.machine import cores
from alexnet_jax.training import metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'reading'
FILES, CLASSES, BATCH, PX, QUALITY = 626, 1000, 128, 256, 90
IMAGES = {'raw': 2000, 'jpeg': 4000}  # 400 MB and about 120 MB
BATCHES = {'raw': 60, 'jpeg': 20}  # a round


# ---- data sets ------------------------------------------------------------------------------


def write(folder: Path, count: int, files: int, px: int, encoded: Callable[[int], bytes]) -> None:
    """A data set `folder/1.0.0` as TFDS would describe it; `encoded(i)` is image i."""
    from array_record.python.array_record_module import ArrayRecordWriter

    version = folder / '1.0.0'
    version.mkdir(parents=True)
    lengths = [len(range(i, count, files)) for i in range(files)]
    number = 0
    for i, length in enumerate(lengths):
        path = version / f'{folder.name}-train.array_record-{i:05d}-of-{files:05d}'
        writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
        for _ in range(length):
            writer.write(shards.example(encoded(number), number % CLASSES, str(number)))
            number += 1
        writer.close()
    split = {'name': 'train', 'shardLengths': [str(length) for length in lengths]}
    info = {'name': folder.name, 'splits': [split]}
    (version / 'dataset_info.json').write_text(json.dumps(info))
    shape = {'dimensions': [str(px), str(px), '3']}
    raw = len(encoded(0)) == px * px * 3
    about = {'shape': shape, 'dtype': 'uint8', 'encoding': 'bytes'}
    image = {'tensor': about} if raw else {'image': {'shape': shape, 'encodingFormat': 'jpeg'}}
    features = {'image': image, 'label': {'classLabel': {'numClasses': str(CLASSES)}}}
    (version / 'features.json').write_text(json.dumps({'featuresDict': {'features': features}}))


def drawn(rng: np.random.Generator) -> np.ndarray:
    """Noise of several scales, which makes a JPEG of a photograph's size; uint8 [PX, PX, 3]."""
    total = np.zeros((PX, PX, 3))
    for side, weight in ((4, 0.5), (16, 0.25), (64, 0.12), (PX, 0.04)):
        noise = rng.integers(0, 256, (side, side, 3), np.uint8)
        part = Image.fromarray(noise).resize((PX, PX), Image.Resampling.BICUBIC)
        total += weight * np.asarray(part)
    return total.astype(np.uint8)


def write_all(scratch: Path, count: int) -> dict[str, int]:
    """Write the three sets; return the mean bytes of an image of those that are read for rates."""
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (64, 192), np.uint8)
    write(scratch / 'small', count, FILES, 8, lambda i: tiny[i % 64].tobytes())
    beside = dict(
        mean_image=np.zeros((8, 8, 3), np.float32),
        colour_std=np.ones(3, np.float32),
        colour_vectors=np.eye(3, dtype=np.float32),
    )  # both names of the count: this version and earlier ones
    np.savez(scratch / 'small/1.0.0/statistics.npz', count=count, count_decoded=count, **beside)
    images = [drawn(rng) for _ in range(100)]
    encoded = {
        'raw': [image.tobytes() for image in images],
        'jpeg': [image_io.jpeg(image, QUALITY) for image in images],
    }
    for name, some in encoded.items():
        write(scratch / name, IMAGES[name], 4, PX, lambda i, some=some: some[i % len(some)])
    return {name: round(statistics.mean(map(len, some))) for name, some in encoded.items()}


# ---- what is measured, in processes of their own --------------------------------------------

START = """
import json, sys, time
begin = time.perf_counter()
from pathlib import Path
from alexnet_jax.data import datasets
from alexnet_jax.data.batches import TrainStream
dataset = datasets.load('small', sys.argv[1], 'train', workers=2, resident_gib=0.0)
opened = time.perf_counter()
datasets.statistics_of(dataset)
stream = TrainStream(dataset, seed=0, batch_size=128)
stream.batch(0)
batch = time.perf_counter()
for step in range(1, 200):  # of 626 files, most are opened in 25,600 images
    stream.batch(step)

def memory(pid):
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(('RssAnon', 'RssShmem')))

children = ' '.join(path.read_text() for path in Path('/proc/self/task').glob('*/children'))
print(json.dumps({
    'records': len(dataset),
    'opened_secs': opened - begin,
    'first_batch_secs': batch - begin,
    'total_mib': sum(memory(pid) for pid in ['self', *children.split()]) / 1024,
}))
"""

RATES = """
import json, sys, time
from pathlib import Path
from alexnet_jax.data import datasets
from alexnet_jax.data.batches import TrainStream, prefetch
from alexnet_jax.parallel import cpu
folder, name, workers, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dataset = datasets.load(name, folder, 'train', workers=workers, resident_gib=0.0)
stream = TrainStream(dataset, 0, 128)
if workers:  # as in training
    batches = prefetch(stream.batch, 0, 10**9, depth=2, threads=2)
else:
    batches = (stream.batch(step) for step in range(10**9))
next(batches)
cpu.keep_freed()

def processor_secs():
    children = ' '.join(path.read_text() for path in Path('/proc/self/task').glob('*/children'))
    stats = [Path(f'/proc/{pid}/schedstat').read_text().split()[0] for pid in children.split()]
    return time.process_time() + sum(map(int, stats)) / 1e9

for _ in sys.stdin:
    for _ in range(6):  # what was read ahead is used up
        next(batches)
    begin, spent = time.perf_counter(), processor_secs()
    for _ in range(count):
        next(batches)
    images = count * 128
    print(json.dumps({
        'images_per_sec': images / (time.perf_counter() - begin),
        'cpu_ms': 1e3 * (processor_secs() - spent) / images,
    }), flush=True)
"""


def python(code: Path, script: str, *args: object) -> subprocess.Popen:
    """Start a script on the package of a checkout."""
    return subprocess.Popen(
        [sys.executable, '-c', script, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=code,
        env=os.environ | {'PYTHONPATH': str(code)},
    )


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key over rounds."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def start_up(codes: dict[str, Path], scratch: Path, rounds: int) -> dict[str, Any]:
    """Measure fresh processes that open the set of ImageNet's size, in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            output, _ = python(code, START, scratch).communicate()
            found[name].append(json.loads(output))
    return {name: medians(rows) for name, rows in found.items()}


def rates(codes: dict[str, Path], scratch: Path, form: str, rounds: int) -> dict[str, Any]:
    """Measure reading by 0, 1, 2 and all cores' readers, in turn; the processes stay open."""
    ways = {
        f'{name}, {readers}': python(code, RATES, scratch, form, readers, BATCHES[form])
        for readers in sorted({0, 1, 2, cores()})
        for name, code in codes.items()
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, process in ways.items():
            assert process.stdin
            assert process.stdout
            process.stdin.write('\n')
            process.stdin.flush()
            row = json.loads(process.stdout.readline())
            time.sleep(0.2)  # what it reads ahead does not disturb the next one
            if number:  # the first round opens files
                found[way].append(row)
    for process in ways.values():
        process.communicate()
    return {way: medians(rows) for way, rows in found.items()}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table of medians."""
    print(title)
    for way, row in rows.items():
        print(f'  {way:12}', *(f'{key} {value:,.3f}' for key, value in row.items()), sep='  ')


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog='python -m experiments.bench_reading')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--count', type=int, default=1_281_167, help='records of the start-up')
    parser.add_argument('--scratch', type=Path, help='about 2 GB are needed')
    parser.add_argument('--against', type=Path, help='another checkout of this repository')
    args = parser.parse_args()
    codes = {'ours': ROOT} | ({'against': args.against.resolve()} if args.against else {})
    scratch = Path(tempfile.mkdtemp(prefix='bench_reading.', dir=args.scratch))
    result: dict[str, Any] = {'cores': cores(), 'rounds': args.rounds, 'files': FILES}
    try:
        result['bytes_an_image'] = write_all(scratch, args.count)
        result['start_up'] = start_up(codes, scratch, args.rounds)
        show('start-up', result['start_up'])
        for form in IMAGES:
            result[form] = rates(codes, scratch, form, args.rounds)
            show(form, result[form])
    finally:
        shutil.rmtree(scratch)
    packages = ('array-record', 'pillow', 'simplejpeg')
    versions = {package: metadata.version(package) for package in packages}
    result |= {'environment': metrics.environment() | versions, 'load_average': os.getloadavg()}
    device = re.sub(r'\W+', '_', metrics.device_name()).strip('_').lower()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f'{device}.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(f'{path} is written')


if __name__ == '__main__':
    main()
