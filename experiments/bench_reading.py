"""Reading of large data sets: start-up at ImageNet's size, and images/s by number of processes.

    python -m experiments.bench_reading [--rounds=5] [--scratch=DIR] [--count=1281167]

Start-up: a set of 1,281,167 records in 626 files, as ImageNet's training split is prepared, but of
8 x 8 px. A fresh process opens it and makes its first batch: seconds, memory, the permutation.

Rates: 256 x 256 px, raw and JPEG, drawn by code (noise of several scales), in the page cache. In
alternating rounds of one run: batches of 128 in random order, by our readers and by grain from the
same files (`pip install grain`; its rows are left out where it is not); and grain reading the bare
records, bytes that nobody looks at, in one process. One JSON object goes to
experiments/results/reading/<device>.json.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax import data, records, shard_writer, stored
from alexnet_jax.machine import cores
from alexnet_jax.readers import Readers

RESULTS = Path(__file__).parent / 'results' / 'reading'
FILES, CLASSES, BATCH, PX = 626, 1000, 128, 256
IMAGES = {'raw': 2000, 'jpeg': 4000}  # 400 MB and about 120 MB


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
            writer.write(shard_writer.example(str(number), encoded(number), number % CLASSES))
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


# ---- start-up -------------------------------------------------------------------------------

START = """
import json, resource, sys, time
begin = time.perf_counter()
from alexnet_jax import data
dataset = data.load('small', sys.argv[1], 'train', workers=-1, resident_gib=0.0)
opened = time.perf_counter()
statistics = data.statistics_of(dataset)
stream = data.TrainStream(dataset, seed=0, batch_size=128)
first = stream.batch(0)
batch = time.perf_counter()
data.permutation.cache_clear()
again = time.perf_counter()
data.permutation(0, 1, len(dataset))
end = time.perf_counter()
for step in range(1, 200):  # readers open their files: of 626, most are hit in 25,600 images
    stream.batch(step)

def anonymous(pid):
    lines = open(f'/proc/{pid}/status').read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(('RssAnon', 'RssShmem')))

print(json.dumps({
    'records': len(dataset),
    'opened_secs': opened - begin,
    'first_batch_secs': batch - begin,
    'permutation_secs': end - again,
    'main_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    'reader_mib': [anonymous(pid) / 1024 for pid in dataset.images.readers.pids],
}))
"""


def start_up(scratch: Path, count: int) -> dict[str, Any]:
    """What it takes to open a set of ImageNet's size and to make the first batch."""
    from alexnet_jax import statistics as room

    pixels = np.random.default_rng(0).integers(0, 256, (64, 192), np.uint8)
    begin = time.perf_counter()
    write(scratch / 'small', count, FILES, 8, lambda i: pixels[i % 64].tobytes())
    written = time.perf_counter() - begin
    beside = room.Statistics(
        np.zeros((8, 8, 3), np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32)
    )
    room.save(scratch / 'small/1.0.0/statistics.npz', beside, count)
    words = [sys.executable, '-c', START, str(scratch)]
    found = json.loads(subprocess.check_output(words, text=True))
    found['total_mib'] = found['main_mib'] + sum(found['reader_mib'])
    begin = time.perf_counter()
    labels = data.load('small', scratch, 'train', workers=0, resident_gib=0.0).labels
    assert labels.tolist() == [i % CLASSES for i in range(count)]
    return found | {
        'files': FILES,
        'all_labels_secs': time.perf_counter() - begin,
        'write_secs': written,
    }


# ---- rates ----------------------------------------------------------------------------------


class Way:
    """A way to read: `images(n)` reads that many in random order; `close` ends it."""

    def __init__(self, batches: Iterator[Any], size: int, close: Callable[[], None] | None = None):
        self.batches, self.size, self.close = batches, size, close or (lambda: None)

    def rate(self, images: int) -> float:
        """Images a second, once what was read ahead is used up."""
        for _ in range(1 + 6 * BATCH // self.size):
            next(self.batches)
        begin, count = time.perf_counter(), 0
        while count < images:
            next(self.batches)
            count += self.size
        secs = time.perf_counter() - begin
        time.sleep(1.0)  # reading ahead ends, and does not disturb who comes next
        return count / secs


def ours(folder: Path, name: str, workers: int) -> tuple[Way, Readers]:
    """By `workers` reader processes; two batches ahead, as in training."""
    dataset: Any = data.load(name, folder, 'train', workers=0, resident_gib=0.0)
    pool = dataset.images.readers = Readers(workers)
    stream = data.TrainStream(dataset, 0, BATCH)
    if not workers:
        return Way((stream.batch(step) for step in range(10**9)), BATCH), pool
    batches = data.prefetch(stream.batch, 0, 10**9, depth=2, threads=2)

    def close() -> None:
        batches.close()
        pool.close()

    return Way(batches, BATCH, close), pool


def paths(folder: Path, name: str) -> list[str]:
    """The files of a set."""
    return sorted(map(str, (folder / name / '1.0.0').glob('*.array_record-*')))


def grain_bare(folder: Path, name: str, workers: int) -> Way:
    """Grain's records, bytes one by one: its source alone in this process, or by its workers."""
    import grain

    source = grain.sources.ArrayRecordDataSource(paths(folder, name))
    if not workers:
        order = np.random.default_rng(0).permutation(len(source)).tolist()
        return Way((source[order[i % len(order)]] for i in range(10**9)), 1)
    return by_grain(grain.MapDataset.source(source).shuffle(seed=0).repeat(None), workers, 1)


class Decode:
    """A record to what a batch is made of, with our parser."""

    def __init__(self, raw: bool):
        self.raw = raw

    def __call__(self, record: bytes) -> dict[str, Any]:
        """{'image', 'label'}."""
        from alexnet_jax import pictures

        image, label = stored.image_and_label(record)
        shape = (PX, PX, 3)
        if self.raw:
            pixels = np.frombuffer(image, np.uint8).reshape(shape)
        else:
            pixels = pictures.decode(bytes(image), shape)
        return {'image': pixels, 'label': np.int32(label)}


def grain_batches(folder: Path, name: str, workers: int) -> Way:
    """The same batches through grain, in this process (0) or by its worker processes."""
    import grain

    source = grain.sources.ArrayRecordDataSource(paths(folder, name))
    chain = grain.MapDataset.source(source).shuffle(seed=0).repeat(None)
    return by_grain(chain.map(Decode(name == 'raw')).batch(BATCH), workers, BATCH)


def by_grain(chain: Any, workers: int, size: int) -> Way:
    """A chain of grain's, run in this process (0) or by its worker processes."""
    import grain
    from absl import flags

    with contextlib.suppress(flags.Error):
        flags.FLAGS.mark_as_parsed()  # grain's workers ask for it
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    iterable = chain.to_iter_dataset(options)
    if workers:
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(iterable)
    return Way(iterator, size, getattr(iterator, 'close', None) if workers else None)


def workers_of_grain() -> dict[str, Any]:
    """What grain's worker processes hold; they are the children that are not ours."""
    found: dict[str, Any] = {'anonymous_mib': [], 'import_jax': []}
    for task in Path('/proc/self/task').glob('*/children'):
        for pid in task.read_text().split():
            line = Path(f'/proc/{pid}/cmdline').read_bytes()
            if b'spawn_main' in line:
                status = Path(f'/proc/{pid}/status').read_text()
                anonymous = re.search(r'RssAnon:\s+(\d+)', status)
                found['anonymous_mib'].append(int(anonymous[1]) / 1024 if anonymous else 0)
                found['import_jax'].append('jaxlib' in Path(f'/proc/{pid}/maps').read_text())
    return found


def rates(folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """Median images/s of each way, measured in turn."""
    rng = np.random.default_rng(0)
    form = shard_writer.Form(storage=name)
    encoded = [form.encode(drawn(rng)) for _ in range(100)]
    count = IMAGES[name]
    write(folder / name, count, 4, PX, lambda i: encoded[i % len(encoded)])
    counts = sorted({1, 2, cores()})
    ways: dict[str, Way] = {}
    for workers in (0, *counts):
        ways[f'ours, {workers}'], _ = ours(folder, name, workers)
    about: dict[str, Any] = {'bytes_an_image': round(statistics.mean(map(len, encoded)))}
    with contextlib.suppress(ImportError):
        ways |= {f'grain, bare records, {n}': grain_bare(folder, name, n) for n in (0, *counts)}
        ways |= {f'grain, {n}': grain_batches(folder, name, n) for n in (0, *counts)}
    found: dict[str, list[float]] = {key: [] for key in ways}
    images = {'raw': 16, 'jpeg': 4}[name] * BATCH
    for way in ways.values():  # files opened, processes started
        way.rate(BATCH)
    about['grain_workers'] = workers_of_grain()
    for _ in range(rounds):
        for key, way in ways.items():
            found[key].append(way.rate(images))
    for way in ways.values():
        way.close()
    medians = {key: round(statistics.median(values)) for key, values in found.items()}
    ratios = {
        f'{ours_} to {theirs}': round(
            statistics.median(a / b for a, b in zip(found[ours_], found[theirs], strict=True)), 3
        )
        for ours_, theirs in pairs(found)
    }
    return about | {'images_per_sec': medians, 'ratios': ratios, 'rounds': found}


def pairs(found: dict[str, list[float]]) -> Iterator[tuple[str, str]]:
    """Ours against grain's batches and its bare records, for the same number of processes."""
    for key in found:
        for theirs in ('grain', 'grain, bare records'):
            other = key.replace('ours', theirs)
            if key.startswith('ours') and other in found:
                yield key, other


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog='python -m experiments.bench_reading')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--count', type=int, default=1_281_167, help='records of the start-up')
    parser.add_argument('--scratch', type=Path, help='about 2 GB are needed')
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix='bench_reading.', dir=args.scratch))
    result: dict[str, Any] = {'cores': cores()}
    try:
        result['start_up'] = start_up(scratch, args.count)
        print(json.dumps(result['start_up']))
        for name in IMAGES:
            result[name] = rates(scratch, name, args.rounds)
            print(name, json.dumps({k: v for k, v in result[name].items() if k != 'rounds'}))
    finally:
        shutil.rmtree(scratch)
    versions = {}
    for package in ('grain', 'array-record', 'pillow'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    result |= {'environment': records.environment() | versions, 'load_average': os.getloadavg()}
    device = re.sub(r'\W+', '_', records.device_name()).strip('_').lower()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f'{device}.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'{path.name} is written; this process took {peak:.0f} MiB at most')


if __name__ == '__main__':
    main()
