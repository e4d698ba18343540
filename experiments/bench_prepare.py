"""Preparation, images a second and core, against a bare loop of decode, resize and encode.

    python -m experiments.bench_prepare --pictures=FOLDER [--images=1000] [--rounds=5]

FOLDER holds any photographs; JPEGs of 500 x 375 px, about ImageNet's median, are cut out of them.
In one process, in turn: the bare loop over bytes in memory with Pillow, with OpenCV and with
simplejpeg (where they are installed; put them on PYTHONPATH), and a shard written from a tar file
with all that preparation does besides: reading, statistics, records, fsync. Then, in processes of
their own: the memory of a whole preparation of an archive and of one four times as large, and of
the plan of as many pictures as ImageNet has. Then what the quality of a JPEG costs. Writes
experiments/results/prepare/bench_<device>.json.
"""

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, features

from alexnet_jax import archives, command, pictures, shard_writer
from alexnet_jax.shard_writer import Form, Member, Task
from experiments import official_tars

RESULTS = Path(__file__).parent / 'results' / 'prepare'
SIZE = (500, 375)  # ImageNet's commonest
PX = 256
IMAGENET_IMAGES = 1_281_167

# ---- bare loops -----------------------------------------------------------------------------


def by_pillow(encoded: bytes) -> bytes:
    """Decode, resize and encode, and nothing else."""
    picture = Image.open(io.BytesIO(encoded)).convert('RGB')
    picture = ImageOps.fit(picture, (PX, PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, 'jpeg', quality=90)
    return buffer.getvalue()


def by_opencv() -> Callable[[bytes], bytes]:
    """OpenCV has no antialiased cubic filter: the mean over an area is its way to shrink."""
    import cv2  # ty: ignore[unresolved-import] (measured where it is installed)

    cv2.setNumThreads(1)

    def loop(encoded: bytes) -> bytes:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        square = cv2.resize(square, (PX, PX), interpolation=cv2.INTER_AREA)
        return cv2.imencode('.jpg', square, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()

    return loop


def by_simplejpeg() -> Callable[[bytes], bytes]:
    """It has no resizing: Pillow's is taken."""
    import simplejpeg  # ty: ignore[unresolved-import] (measured where it is installed)

    def loop(encoded: bytes) -> bytes:
        picture = Image.fromarray(simplejpeg.decode_jpeg(encoded))
        picture = ImageOps.fit(picture, (PX, PX), Image.Resampling.BICUBIC)
        return simplejpeg.encode_jpeg(np.array(picture), quality=90, colorsubsampling='420')

    return loop


def loops() -> dict[str, Callable[[bytes], bytes]]:
    """The bare loops of the libraries that are installed."""
    found = {'Pillow': by_pillow}
    for name, make in (('OpenCV', by_opencv), ('simplejpeg', by_simplejpeg)):
        try:
            found[name] = make()
        except ImportError:
            command.say(f'{name} is not installed: not run')
    return found


# ---- speed ----------------------------------------------------------------------------------


def make_task(room: Path, encoded: list[bytes]) -> Task:
    """A shard of these pictures, which lie in a tar file."""
    tar = room / 'train.tar'
    named = [(f'n01_{i}.JPEG', content) for i, content in enumerate(encoded)]
    tar.write_bytes(official_tars.tar_bytes(named))
    lines = [
        f'{i:016x} {json.dumps(Member(entry.name, 0, tar.name, entry.offset, entry.size))}\n'
        for i, entry in enumerate(archives.entries(tar))
    ]
    (room / 'plan').write_text(''.join(lines))
    return Task(room / 'plan', room / 'shard', room / 'part', room, Form(PX), summed=True)


def speed(encoded: list[bytes], rounds: int, room: Path) -> dict:
    """Seconds an image of each, taken in turn: of the clock, and of the processor."""
    task, bare = make_task(room, encoded), loops()
    acts = {name: lambda f=f: [f(one) for one in encoded] for name, f in bare.items()}
    acts['preparation'] = lambda: shard_writer.write_shard(task)
    clock: dict[str, list[float]] = {name: [] for name in acts}
    cpu: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name, act in acts.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            act()
            if number:  # the first round warms up
                clock[name].append((time.perf_counter() - began) / len(encoded))
                cpu[name].append((time.process_time() - began_cpu) / len(encoded))
    return {
        name: dict(
            ms=1e3 * statistics.median(clock[name]),
            ms_range=[1e3 * min(clock[name]), 1e3 * max(clock[name])],
            cpu_ms=1e3 * statistics.median(cpu[name]),
            cpu_ms_range=[1e3 * min(cpu[name]), 1e3 * max(cpu[name])],
            images_per_sec=1 / statistics.median(clock[name]),
            of_pillow=ratio(clock, name),
            of_pillow_cpu=ratio(cpu, name),
        )
        for name in acts
    }


def ratio(secs: dict[str, list[float]], name: str) -> float:
    """The rate of `name` over that of the bare loop of Pillow: the median over the rounds."""
    pairs = zip(secs['Pillow'], secs[name], strict=True)
    return statistics.median(bare / ours for bare, ours in pairs)


# ---- memory ---------------------------------------------------------------------------------

PREPARE = """
import json, sys, threading, time
from pathlib import Path
from alexnet_jax import archives, shard_writer
from alexnet_jax.shard_writer import Form, Member, Source
tar, data, fake = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def members(report):
    if fake:
        for i in range(fake):
            wnid = f'n{i % 1000:08d}'
            yield 'train', Member(f'{wnid}_{i}.JPEG', i % 1000, tar.name, i * 110_000, 109_000)
    else:
        for e in archives.entries(tar):
            yield 'train', Member(e.name, 0, tar.name, e.offset, e.size)
source = Source('bench', tar.parent, '', ('a',), (), {}, [tar], members)
def high(pid='self'):  # peak memory of a process, MiB; ru_maxrss would inherit the parent's
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    return next((int(l.split()[1]) // 1024 for l in lines if l.startswith('VmHWM')), 0)
workers, done = [0], threading.Event()
def watch():
    while not done.wait(0.05):
        for task in Path('/proc/self/task').iterdir():
            for pid in (task / 'children').read_text().split():
                try:
                    workers.append(high(pid))
                except OSError:
                    pass
threading.Thread(target=watch).start()
began = time.perf_counter()
if fake:
    room = data / 'room'
    room.mkdir(parents=True)
    shard_writer._begin(source, Form(), room, shard_writer.SHARD_IMAGES, print)
else:
    shard_writer.make(source, data, Form(), lambda line: None, workers=1)
secs = time.perf_counter() - began
done.set()
print(json.dumps(dict(secs=secs, main_mib=high(), worker_mib=max(workers))))
"""


def memory(tar: Path, data_dir: Path, fake: int = 0) -> dict:
    """Peak memory of a preparation in a process of its own: of it, and of its largest worker."""
    words = [sys.executable, '-c', PREPARE, str(tar), str(data_dir), str(fake)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | dict(archive_bytes=tar.stat().st_size)


def memories(encoded: list[bytes], room: Path) -> dict:
    """Of an archive, of one four times as large, and of the plan of ImageNet."""
    found = {}
    for times in (1, 4):
        tar = room / f'times_{times}.tar'
        named = [(f'n_{k}_{i}.JPEG', one) for k in range(times) for i, one in enumerate(encoded)]
        tar.write_bytes(official_tars.tar_bytes(named))
        found[f'{len(named)} images'] = memory(tar, room / f'data_{times}')
    found[f'plan of {IMAGENET_IMAGES} images'] = memory(tar, room / 'plan_only', IMAGENET_IMAGES)
    return found


# ---- the quality of a JPEG ------------------------------------------------------------------


def qualities(encoded: list[bytes]) -> dict:
    """What each quality costs in bytes and in levels of 0-255."""
    images = [pictures.picture(one, PX) for one in encoded]
    found = {}
    for quality in (75, 85, 90, 95):
        stored = [pictures.jpeg(image, quality) for image in images]
        errors = [
            np.abs(pictures.picture(one, PX).astype(int) - image).mean()
            for one, image in zip(stored, images, strict=True)
        ]
        found[str(quality)] = dict(
            bytes=statistics.mean(map(len, stored)), error=statistics.mean(map(float, errors))
        )
    return found


# ---- the whole ------------------------------------------------------------------------------


def device() -> str:
    """The processor."""
    with open('/proc/cpuinfo') as file:
        names = re.findall(r'^model name\s*: (.*)$', file.read(), re.MULTILINE)
    return f'{os.cpu_count()} x {names[0] if names else platform.machine()}'


def main() -> None:
    """Measures, prints a table, and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--pictures', type=command.path, required=True, help='folder of photographs'
    )
    parser.add_argument('--images', type=int, default=1000, help='a shard has 2048')
    parser.add_argument('--rounds', type=int, default=5)
    flags = parser.parse_args()
    photos = official_tars.photographs(flags.pictures)
    encoded = official_tars.crops(photos, flags.images, SIZE, seed=0)
    with tempfile.TemporaryDirectory() as name:
        record = dict(
            device=device(),
            load_1min=os.getloadavg()[0],
            python=platform.python_version(),
            pillow=PIL.__version__,
            libjpeg_turbo=features.version('libjpeg_turbo'),
            images=flags.images,
            image_bytes=statistics.mean(map(len, encoded)),
            rounds=flags.rounds,
            speed=speed(encoded, flags.rounds, Path(name)),
            qualities=qualities(encoded[:100]),
            memory=memories(encoded, Path(name)),
        )
    for kind, row in record['speed'].items():
        print(
            f'{kind:12} {row["images_per_sec"]:6.0f} images/s a core, {row["cpu_ms"]:5.2f} ms of '
            f'processor time, {row["of_pillow"]:.2f} of Pillow ({row["of_pillow_cpu"]:.2f} of '
            'processor time)'
        )
    for kind, row in record['memory'].items():
        print(f'{kind}: main {row["main_mib"]} MiB, worker {row["worker_mib"]} MiB')
    for quality, row in record['qualities'].items():
        print(f'quality {quality}: {row["bytes"]:.0f} bytes, off by {row["error"]:.2f} levels')
    RESULTS.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r'\W+', '_', record['device']).strip('_').lower()
    (RESULTS / f'bench_{slug}.json').write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
