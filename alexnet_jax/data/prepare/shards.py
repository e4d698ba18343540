"""Write images to array_record shards: resumable, with the same bytes on every run.

A worker process writes one shard at a time with a file of metadata about it, and renames both when
the shard is complete. The shards of a killed run stay in a staging directory in `data_dir`, one for
each form of images, and the next run of the same command writes the missing ones. Images are
ordered by a hash of their names. The finished folder is renamed to its final name.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from alexnet_jax import files
from alexnet_jax.command import log
from alexnet_jax.data import images as image_io
from alexnet_jax.data import prepared, statistics
from alexnet_jax.data.prepare import archives, tfds_format
from alexnet_jax.data.prepare.archives import File
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.progress import progress

VERSION = '1.0.0'  # of the data sets made here
PROGRAM = 3  # raise it when the bytes change; since 3, statistics are of the images as stored
SHARD_IMAGES = 2048  # ImageNet in 626 files: fewer than the 1,024 that may usually be open


@dataclass(frozen=True)
class Form:
    """The size and the encoding of stored images."""

    px: int = 256  # both sides (paper, section 2)
    storage: str = 'jpeg'  # or 'raw'
    quality: int = 90  # of a JPEG

    def encode(self, image: Image.Image) -> bytes:
        """Return the bytes that a record stores of an RGB image of this size."""
        return image.tobytes() if self.storage == 'raw' else image_io.jpeg(image, self.quality)

    def decode(self, stored: bytes) -> np.ndarray:
        """Return the image that a reader gets from those bytes: uint8 [px, px, 3]."""
        shape = (self.px, self.px, 3)
        if self.storage == 'raw':
            return np.frombuffer(stored, np.uint8).reshape(shape)
        return image_io.decode(stored, shape)


@dataclass(frozen=True)
class Source:
    """The pictures of a data set, and its description."""

    name: str  # of the data set
    description: str
    class_names: tuple[str, ...]
    made_of: dict[str, Any]  # written to preparation.json, as JSON has it
    images: Mapping[str, int]  # by split
    stamp: str  # changes when `pictures` does
    pictures: Callable[[], Iterator[tuple[str, int, File]]]  # (split, label, file), in any order
    words: tuple[str, ...] = ()  # longer names of the classes, if there are any


class Task(NamedTuple):
    """A shard to write."""

    split: str
    plan: Path  # its pictures, a line each, in order
    target: Path
    form: Form
    most_pixels: int  # of a picture

    @property
    def facts(self) -> Path:
        """The path of the file of `Facts`, which is written before `target` gets its name."""
        return self.plan.with_suffix('.npz')

    @property
    def pictures(self) -> Iterator[tuple[int, File]]:
        """The labels and files of the shard, in order."""
        for line in self.plan.read_text().splitlines():
            _, label, *file = json.loads(line)
            yield label, File(*file)

    @property
    def job(self) -> str:
        """A hash of the pictures."""
        return hashlib.sha256(self.plan.read_bytes()).hexdigest()


class Facts(NamedTuple):
    """Facts about a finished shard."""

    job: str  # of its task
    images: int
    record_bytes: int
    skipped: list[str]  # the pictures that cannot be decoded, with the reason


def make(
    source: Source,
    data_dir: Path,
    form: Form,
    *,
    workers: int,
    skip_corrupt: int = 0,
    most_pixels: int = image_io.MOST_PIXELS,
) -> Path:
    """Prepare `source` in `data_dir` and return its folder, at once if it exists.

    Args:
        source: the pictures.
        data_dir: the folder of all data sets.
        form: the size and encoding of stored images.
        workers: processes.
        skip_corrupt: number of pictures to skip if they cannot be decoded.
        most_pixels: a picture with more counts as one that cannot be decoded.

    Raises:
        UsageError: the folder exists with another form or other pictures.
        RunError: the source is incomplete, a picture cannot be decoded, the disk is too small, or a
            worker process died. Finished shards are kept.
        OSError: a file cannot be read or written. Finished shards are kept.
    """
    folder = data_dir / source.name / VERSION
    with tfds_format.locked_staging_dir(data_dir, source.name) as staging:
        if not folder.exists():
            versions = f'{form}, Pillow {PIL.__version__}, program {PROGRAM}'
            work = staging / hashlib.sha256(versions.encode()).hexdigest()[:16]
            tasks = _plan(source, form, work, most_pixels)
            found = _write_shards(source, tasks, workers, skip_corrupt)
            _describe(source, found, work / 'set')
            for path in (work / 'set').glob('*.[jnt]*'):  # descriptions, names, statistics
                _sync(path)
            folder.parent.mkdir(exist_ok=True)
            (work / 'set').rename(folder)
            log(f'{source.name}: prepared in {folder}')
    prepared.describe(folder)
    about = json.loads((folder / prepared.PREPARATION).read_text())
    wanted = dataclasses.asdict(form) | dict(made_of=source.made_of)
    if different := [key for key, value in wanted.items() if about.get(key) != value]:
        raise UsageError(
            f'{folder} already exists and differs in {", ".join(different)}: remove that folder, '
            'or choose another --data_dir.'
        )
    return folder


# ---- the plan -------------------------------------------------------------------------------


def _plan(source: Source, form: Form, work: Path, most_pixels: int) -> list[Task]:
    """Assign the pictures to shards; a plan of the same, unchanged files is used again."""
    shards = {split: _shard_count(n) for split, n in source.images.items() if n}
    tasks = [
        Task(
            split,
            work / 'plan' / f'{split}-{i:05d}.jsonl',
            work / 'set' / prepared.shard_name(source.name, split, i, count),
            form,
            most_pixels,
        )
        for split, count in shards.items()
        for i in range(count)
    ]
    for part in ('plan', 'set'):
        (work / part).mkdir(parents=True, exist_ok=True)
    planned, stamp = work / 'planned', json.dumps([source.made_of, source.stamp, shards])
    if not planned.exists() or planned.read_text() != stamp:
        planned.unlink(missing_ok=True)
        _assign(source, tasks)
        planned.write_text(stamp)
    for other in set((work / 'set').iterdir()) - {task.target for task in tasks}:
        other.unlink(missing_ok=True)  # unfinished; a worker that ends late removes its own
    return tasks


def _shard_count(images: int) -> int:
    """Return the number of shards of a split; a small one has more, to keep several cores busy."""
    return max(1, -(-images // SHARD_IMAGES), min(16, -(-images // 256)))


def _assign(source: Source, tasks: Sequence[Task]) -> None:
    """Write the plan of each shard: its pictures, a line each that begins with their hash."""
    lines: dict[Task, list[str]] = {task: [] for task in tasks}
    own = {split: [task for task in tasks if task.split == split] for split in source.images}
    for split, label, file in source.pictures():
        name = os.fsencode(f'{split}/{file.name}')
        key = hashlib.blake2b(name, digest_size=8).hexdigest()
        task = own[split][int(key, 16) % len(own[split])]
        lines[task].append(json.dumps([key, label, *file]) + '\n')
    for task, listed in lines.items():
        task.plan.write_text(''.join(sorted(listed)))
        _sync(task.plan)


# ---- a shard --------------------------------------------------------------------------------


def write_shard(task: Task) -> Facts:
    """Write one shard, without the pictures that cannot be decoded, and the facts about it."""
    skipped, images, record_bytes = list[str](), 0, 0
    shape = (task.form.px, task.form.px, 3)
    sums = statistics.Sums(shape)
    task.target.unlink(missing_ok=True)  # of an earlier plan: the new facts must not vouch for it
    with files.atomic_write(task.target) as scratch, files.atomic_write(task.facts) as about:
        writer = tfds_format.record_writer(scratch)
        for label, file in task.pictures:
            try:
                stored = task.form.encode(
                    image_io.decode_image(archives.read(file), shape, task.most_pixels)
                )
            except image_io.BadImage as error:
                skipped.append(f'{file.name} {error}')
                continue
            record = tfds_format.example(stored, label, file.name)
            writer.write(record)
            images, record_bytes = images + 1, record_bytes + len(record)
            if task.split == 'train':
                sums.add(task.form.decode(stored)[None])
        writer.close()
        facts = Facts(task.job, images, record_bytes, skipped)
        total = sums.total.astype(np.uint32)  # exact: 2,048 bytes of 255
        with about.open('wb') as file:
            np.savez(file, facts=json.dumps(facts), total=total, products=sums.products)
        _sync(scratch)
        _sync(about)
    return facts


def _sync(path: Path) -> None:
    """Flush a file to the disk, so that a power cut does not leave an empty one under its name."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def read_facts(task: Task) -> Facts | None:
    """Return the facts about a finished shard; None if it is to be written.

    A shard that lacks pictures is written again: they may have been repaired, or be accepted now.
    """
    try:
        facts = Facts(*json.loads(str(files.read_npz(task.facts, ['facts'])['facts'])))
    except RunError:  # it is missing or incomplete
        return None
    return facts if task.target.exists() and facts.job == task.job and not facts.skipped else None


# ---- all shards -----------------------------------------------------------------------------


def _write_shards(
    source: Source, tasks: Sequence[Task], workers: int, skip_corrupt: int
) -> dict[Task, Facts]:
    """Write the shards that are missing, in `workers` processes."""
    found = {task: facts for task in tasks if (facts := read_facts(task))}
    missing = [task for task in tasks if task not in found]
    if found:
        log(f'{source.name}: resuming, {len(found):,} of {len(tasks):,} shards are finished')
    total, skipped = sum(source.images.values()), list[str]()
    to_come = total * len(missing) // len(tasks)
    _check_space(source.name, tasks[0].form, to_come, tasks[0].target.parent)
    # A fork of a process with threads may hang.
    context, size = multiprocessing.get_context('spawn'), max(1, min(workers, len(missing)))
    others = set(multiprocessing.active_children())
    with (
        progress(f'{source.name} (images)', total) as update,
        ProcessPoolExecutor(size, context, _start_worker) as pool,
    ):
        try:
            waiting = {pool.submit(write_shard, task): task for task in missing}
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                update(sum(facts.images for facts in found.values()))
                skipped += found[waiting[future]].skipped
                _check_skipped(skipped, skip_corrupt)
        except BaseException as error:  # Ctrl-C too: it must not wait for shards
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            if isinstance(error, (BrokenProcessPool, MemoryError)):
                raise RunError(
                    'A worker process died or ran out of memory: run the same command again with '
                    'fewer --workers; it resumes from the finished shards.'
                ) from None
            raise
    return {task: found[task] for task in tasks}


def _check_skipped(skipped: Sequence[str], allowed: int) -> None:
    if len(skipped) > allowed:
        raise RunError(
            f'{len(skipped)} image(s) cannot be decoded: {"; ".join(skipped[:3])}. Repair or '
            f'remove them, or skip up to N such images with --skip_corrupt=N (now {allowed}). '
            'Finished shards are kept.'
        )


def _check_space(name: str, form: Form, images: int, folder: Path) -> None:
    """Raise RunError if the disk is too full for `images` more."""
    pixel_bytes = 3 if form.storage == 'raw' else 0.4  # of ImageNet at quality 90: 26 kB a picture
    needed, free = images * form.px**2 * pixel_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f'{name} needs about {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free: '
            'free some space, or choose another --data_dir.'
        )


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    warnings.filterwarnings('ignore', module=r'PIL\.')  # of odd pictures that it reads nevertheless
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


# ---- the description ------------------------------------------------------------------------


def _describe(source: Source, found: Mapping[Task, Facts], folder: Path) -> None:
    """Write the files beside the shards, and flush them to the disk."""
    form = next(iter(found)).form
    shards: dict[str, list[tuple[int, int]]] = {task.split: [] for task in found}
    sums, skipped = statistics.Sums((form.px, form.px, 3)), list[str]()
    for task, facts in found.items():
        shards[task.split].append((facts.images, facts.record_bytes))
        skipped += facts.skipped
        if task.split == 'train':
            advice = 'remove it and run the command again'
            arrays = files.read_npz(task.facts, ['total', 'products'], advice)
            sums.merge(facts.images, **arrays)
    for reason in skipped:
        log(f'{source.name}: skipped: {reason}')
    features = tfds_format.features((form.px, form.px, 3), form.storage, source.class_names)
    about = dict(description=source.description)
    tfds_format.write_metadata(folder, source.name, VERSION, features, shards, **about)
    if source.words:
        lines = ''.join(f'{line}\n' for line in source.words)
        (folder / 'label.words.txt').write_text(lines, encoding='utf-8')
    preparation = dict(
        **dataclasses.asdict(form),
        made_of=source.made_of,
        skipped=sorted(skipped),
        versions=dict(program=PROGRAM, pillow=PIL.__version__),
    )
    text = json.dumps(preparation, indent=2, sort_keys=True) + '\n'
    (folder / prepared.PREPARATION).write_text(text)
    result = sums.result()
    statistics.save(folder / 'statistics.npz', result, sums.count)
    stds = ', '.join(f'{std:.2f}' for std in result.colour_std)
    log(f'{source.name}: standard deviations along the colour components {stds}')
