"""Pictures to shards of one size: all cores, resumable, the same bytes however often it was killed.

The unit of work is a shard. It is written under a scratch name and renamed when it is whole; what a
killed run leaves lies in a work folder of `data_dir`, and the next run of the same job writes the
shards that are missing. The order of the pictures is that of a hash of their names, so it depends
on nothing else; when all is there, the folder gets its final name by one rename.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from alexnet_jax import archives, files, machine, pictures, prepared, statistics
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.prepared import Meter, Report

VERSION = '1.0.0'  # of the data sets made here
PROGRAM = 3  # raise it when what is written changes: half-made sets are then begun anew
SHARD_IMAGES = 2048  # ImageNet in 626 files: fewer than the 1,024 that may usually be open
OPTIONS = 'group_size:1,uncompressed'  # a record each, as TFDS has it; JPEG cannot be compressed
LEAST_BYTES = {'raw': 3.0, 'jpeg': 0.1}  # a pixel; photographs take more than twice that as JPEG
SAMPLE_IMAGES = 48  # on which size and speed are measured beforehand
AHEAD = 4  # pictures that the system is asked to fetch before they are needed
SPLITS = ('train', 'validation', 'test')


@dataclass(frozen=True)
class Form:
    """How an image is stored."""

    px: int = 256  # both sides (paper, section 2)
    storage: str = 'jpeg'  # or 'raw'
    quality: int = 90  # of a JPEG

    def encode(self, image: np.ndarray | Image.Image) -> bytes:
        """uint8 [px, px, 3], or Pillow's image of it, as the bytes that a record holds."""
        return image.tobytes() if self.storage == 'raw' else pictures.jpeg(image, self.quality)

    def decode(self, stored: bytes) -> np.ndarray:
        """The other way."""
        shape = (self.px, self.px, 3)
        if self.storage == 'raw':
            return np.frombuffer(stored, np.uint8).reshape(shape)
        return pictures.decode(stored, shape)

    def __str__(self) -> str:
        return self.storage if self.storage == 'raw' else f'JPEG of quality {self.quality}'


class Member(NamedTuple):
    """One picture to be prepared."""

    name: str  # its file name
    label: int
    file: str  # the file it lies in, seen from the source's folder
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """Where the pictures of a data set come from."""

    name: str  # of the data set
    folder: Path
    description: str
    class_names: tuple[str, ...]
    words: tuple[str, ...]  # for people, a line a class; or none at all
    made_of: Mapping[str, Any]  # what goes into preparation.json
    inputs: Iterable[Path]  # files that must not have changed when a killed run goes on; in order
    members: Callable[[Report], Iterator[tuple[str, Member]]]  # (split, picture), in any order
    constants: statistics.Statistics | None = None  # what its colours are known to be
    images: int = 0  # at least so many


def make(
    source: Source,
    data_dir: Path,
    form: Form,
    report: Report,
    *,
    workers: int | None = None,
    skip_corrupt: int = 0,
    shard_images: int = SHARD_IMAGES,
) -> Path:
    """Prepare `source` in `data_dir` and return its folder, at once if it is there.

    Args:
        source: see Source.
        data_dir: the folder of all data sets.
        form: how the images are stored.
        report: called with a line of progress now and then.
        workers: processes; one a core if not given.
        skip_corrupt: how many pictures may be left out because they cannot be decoded.
        shard_images: pictures a shard, about.

    Raises:
        UsageError: what is there already, or what an interrupted run has finished, is of other
            pictures or stored in another form.
        RunError: the source is not whole or not the official one; a picture cannot be decoded; the
            disk is too small; a worker process died. What is done so far is kept.
    """
    folder = data_dir / source.name / VERSION
    if not folder.exists() or prepared.room(data_dir, source.name).exists():
        with (
            prepared.cannot_write(data_dir),
            prepared.workroom(data_dir, source.name, report, keep=True) as room,
        ):
            if not folder.exists():  # else another process made it while this one waited
                job = _begin(source, form, room, shard_images, report)
                _write_shards(job, workers or machine.cores(), skip_corrupt)
                made = _finish(job)
                folder.parent.mkdir(exist_ok=True)
                made.rename(folder)
                report(f'{source.name}: prepared in {folder}')
            shutil.rmtree(room)
    _same(folder, form, source)
    prepared.check_whole(folder, {k: n for k, (n, _) in prepared.shards(folder).items()})
    return folder


def _same(folder: Path, form: Form, source: Source) -> None:
    try:
        about = json.loads((folder / prepared.PREPARATION).read_text())
        there = Form(about['px'], about['storage'], about['quality'])
        made_of = about['made_of']
        names = tuple((folder / 'label.labels.txt').read_text(encoding='utf-8').splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise prepared.damaged(folder, f'{prepared.PREPARATION}: {error}') from None
    if there != form:
        raise UsageError(
            f'{folder} is there already, {there.px} px and stored as {there}: remove that folder, '
            'or choose another one with --data_dir.'
        )
    if (made_of, names) != (json.loads(json.dumps(dict(source.made_of))), source.class_names):
        raise UsageError(
            f'{folder} is there already, made of other pictures: remove that folder, or choose '
            'another one with --data_dir.'
        )


# ---- the plan -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A plan on disk, and where its parts lie."""

    source: Source
    form: Form
    room: Path
    report: Report
    images: dict[str, int]  # by split
    shards: dict[str, int]

    def tasks(self) -> list['Task']:
        """A task a shard."""
        return [
            Task(
                plan=_plan(self.room, split, number),
                target=self.room
                / 'set'
                / prepared.shard_name(self.source.name, split, number, count),
                partial=self.room / 'partial' / f'{split}-{number:05d}.npz',
                root=self.source.folder,
                form=self.form,
                summed=split == 'train',
            )
            for split, count in self.shards.items()
            for number in range(count)
        ]


def _plan(room: Path, split: str, number: int) -> Path:
    return room / 'plan' / f'{split}-{number:05d}'


def _begin(source: Source, form: Form, room: Path, shard_images: int, report: Report) -> Job:
    """The job that a killed run left in `room`, if it is the same; else a new plan.

    Raises:
        UsageError: another one left finished shards there, which may be hours of work.
    """
    identity = {
        'program': PROGRAM,
        **dataclasses.asdict(form),
        'shard_images': shard_images,
        'Pillow': PIL.__version__,
        'files of the source': _stamps(source),
    }
    file = room / 'job.json'
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        job = json.loads(file.read_text())
        differ = [key for key, value in identity.items() if job['identity'].get(key) != value]
        if not differ:
            report(f'{source.name}: going on where an interrupted run stopped')
            for scratch in room.glob('*/.*'):
                with contextlib.suppress(OSError):  # a worker that dies late has done it
                    scratch.unlink()  # what was being written then
            return Job(source, form, room, report, job['images'], job['shards'])
        if any(room.glob('partial/*.npz')):
            raise UsageError(
                f'An interrupted run has left finished shards in {room}, and this one differs in '
                f'{", ".join(differ)}: give the flags and files of then, or remove that folder to '
                'begin anew.'
            )
        report(f'{source.name}: what an interrupted run left is of other files or flags: anew')
    _sweep(room)
    _check_space(room, source.name, form, source.images * LEAST_BYTES[form.storage] * form.px**2)
    for part in ('plan', 'partial', 'set'):
        (room / part).mkdir()
    images = _list(source, room, report)
    shards = {split: _shard_count(n, shard_images) for split, n in images.items()}
    for split, count in shards.items():
        _deal(room, split, count)
    with files.whole(file) as scratch:
        scratch.write_text(json.dumps(dict(identity=identity, images=images, shards=shards)))
    return Job(source, form, room, report, images, shards)


def _stamps(source: Source) -> str:
    """Changes when a file of the source does: a hash of names, sizes and times."""
    digest = hashlib.sha256(json.dumps(source.made_of).encode())
    for path in source.inputs:
        try:
            status = path.stat()
        except OSError as error:
            raise archives.unreadable(path, error) from None
        name = str(path.relative_to(source.folder))
        digest.update(f'\n{name!a} {status.st_size} {status.st_mtime_ns}'.encode())
    return digest.hexdigest()


def _sweep(room: Path) -> None:
    for entry in room.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _shard_count(images: int, shard_images: int) -> int:
    """A small set is cut finer, so that several cores have work."""
    return max(1, -(-images // shard_images), min(16, -(-images // 256)))


def _list(source: Source, room: Path, report: Report) -> dict[str, int]:
    """Write down all pictures, a line each that begins with a hash; returns their number."""
    images: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        lists: dict[str, io.TextIOBase] = {}
        for split, member in source.members(report):
            if split not in lists:
                lists[split] = stack.enter_context((room / 'plan' / split).open('w'))
                images[split] = 0
            images[split] += 1
            key = hashlib.blake2b(os.fsencode(f'{split}/{member.name}'), digest_size=8)
            lists[split].write(f'{key.hexdigest()} {json.dumps(member)}\n')
    return {split: images[split] for split in SPLITS if split in images}


def _deal(room: Path, split: str, count: int) -> None:
    """Distribute the lines of a split over `count` shards by their hash, in bounded memory."""
    hands: list[list[str]] = [[] for _ in range(count)]

    def lay_down() -> None:
        for number, hand in enumerate(hands):
            with _plan(room, split, number).open('a') as file:
                file.writelines(hand)
            hand.clear()

    lines = room / 'plan' / split
    with lines.open() as file:
        for number, line in enumerate(file, start=1):
            hands[int(line[:16], 16) % count].append(line)
            if number % 100_000 == 0:
                lay_down()
    lay_down()
    lines.unlink()


def _members(plan: Path) -> list[Member]:
    """The pictures of a shard, in order."""
    with plan.open() as file:
        return [Member(*json.loads(line[17:])) for line in sorted(file)]


# ---- a shard --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    plan: Path
    target: Path
    partial: Path  # what is to be known of it later: see _Part
    root: Path
    form: Form
    summed: bool  # its images count for the statistics


class _Part(NamedTuple):
    """What is known of a finished shard."""

    images: int
    record_bytes: int
    skipped: list[str]


class Stopped(Exception):
    """Another shard failed."""


def write_shard(task: Task, most_skipped: int = 0, tick: Callable[[], None] = lambda: None) -> int:
    """Write one shard; `tick` is called after each picture. Returns how many were left out.

    Raises:
        RunError: more than `most_skipped` pictures cannot be decoded.
    """
    px = task.form.px
    sums = statistics.Sums((px, px, 3)) if task.summed else None
    members, skipped, written, record_bytes = _members(task.plan), list[str](), 0, 0
    with files.whole(task.target) as scratch:
        writer = _writer(scratch)
        for member, later in zip(members, [*members[AHEAD:], *[None] * AHEAD], strict=False):
            if later:
                archives.read_soon(task.root / later.file, later.offset, later.size)
            try:
                image = pictures.decode_image(_read(task.root, member), (px, px, 3))
            except pictures.BadImage as error:
                skipped.append(member.name)
                if len(skipped) > most_skipped:
                    raise RunError(_corrupt(member, str(error))) from None
            except MemoryError:
                raise RunError(
                    f'{ascii(member.name)[1:-1]} in {ascii(member.file)[1:-1]} needs more memory '
                    'than there is: run the same command again with fewer --workers; it goes on '
                    'from here.'
                ) from None
            else:
                encoded = task.form.encode(image)
                record = example(member.name, encoded, member.label)
                writer.write(record)
                record_bytes += len(record)
                written += 1
                if sums:
                    sums.add(task.form.decode(encoded)[None])  # as training reads it
            tick()
        writer.close()
        _sync(scratch)
        with files.whole(task.partial) as partial, partial.open('wb') as file:
            found: dict[str, Any] = dict(
                images=written, record_bytes=record_bytes, skipped=json.dumps(skipped)
            )
            if sums:
                found |= dict(total=sums.total, products=sums.products)
            np.savez(file, **found)
            file.flush()
            os.fsync(file.fileno())
    return len(skipped)


def _done(task: Task) -> _Part | None:
    """What is known of a shard that was finished before; None if it is to be written."""
    if not task.target.exists():
        return None
    try:
        if task.summed:
            _read_sums(task.partial)  # they are whole; of all shards at once they are a gigabyte
        return _read_part(task.partial)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # the disk lost it: the shard is written again


def _read_part(path: Path) -> _Part:
    with np.load(path) as file:
        skipped = json.loads(str(file['skipped']))
        return _Part(int(file['images']), int(file['record_bytes']), skipped)


def _read_sums(path: Path) -> statistics.Sums:
    with np.load(path) as file:
        return statistics.Sums.of(int(file['images']), file['total'], file['products'])


def _corrupt(member: Member, reason: str) -> str:
    return (
        f'{ascii(member.name)[1:-1]} in {ascii(member.file)[1:-1]} {reason}: mend it, or leave out '
        'up to N such pictures with --skip_corrupt=N. What is done so far is kept.'
    )


def _read(root: Path, member: Member) -> bytes:
    if member.size > archives.MOST_BYTES:
        raise pictures.BadImage(f'has {member.size:,} bytes, which can be no picture')
    return archives.read(root / member.file, member.offset, member.size)


def _writer(path: Path) -> Any:
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,  # a compiled module without stubs
    )

    return ArrayRecordWriter(str(path), OPTIONS)


def _sync(path: Path) -> None:
    """On the disk before it gets its name: a power cut must not leave an empty file under it."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def example(name: str, image: bytes, label: int) -> bytes:
    """A record: a serialised tf.train.Example of `file_name`, `image` and `label`.

    Written out here, its map in alphabetical order, so that the bytes depend on the contents alone
    (protobuf promises no order), and so that a worker need not import TFDS.
    """
    values = (
        (b'file_name', _field(1, _field(1, os.fsencode(name)))),
        (b'image', _field(1, _field(1, image))),
        (b'label', _field(3, _field(1, _varint(label)))),
    )
    entries = [_field(1, _field(1, key) + _field(2, value)) for key, value in values]
    return _field(1, b''.join(entries))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, or of a message: tag, length, content."""
    return b''.join((bytes([number << 3 | 2]), _varint(len(content)), content))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


# ---- all shards -----------------------------------------------------------------------------


def _write_shards(job: Job, workers: int, skip_corrupt: int) -> None:
    """Write the shards that are missing, in `workers` processes."""
    tasks = job.tasks()
    before = [_done(task) for task in tasks]
    missing = [task for task, part in zip(tasks, before, strict=True) if part is None]
    parts = [part for part in before if part is not None]
    images, done = sum(job.images.values()), sum(part.images for part in parts)
    skipped = sum(len(part.skipped) for part in parts)
    if skipped > skip_corrupt:  # an earlier run was allowed more, or was stopped by them
        raise _too_many(tasks, skip_corrupt)
    if missing:
        _foretell(job, missing[0], images, images - done, workers)
    context = multiprocessing.get_context('spawn')  # a fork of a process with threads may hang
    counter, stop = context.Value('q', 0), context.Event()
    with (
        Meter(job.source.name, images, 'images', job.report) as meter,
        ProcessPoolExecutor(
            max(1, min(workers, len(missing))), context, _start_worker, (counter, stop)
        ) as pool,
    ):
        try:
            waiting = {pool.submit(_work, task, skip_corrupt) for task in missing}
            while waiting:
                meter.to(done + counter.value)
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                skipped += sum(future.result() for future in ready)
                if skipped > skip_corrupt:
                    raise _too_many(tasks, skip_corrupt)
        except BrokenProcessPool:
            raise RunError(
                'A worker process died, for want of memory perhaps: run the same command again, '
                'with a smaller --workers; it goes on from here.'
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _too_many(tasks: Sequence[Task], allowed: int) -> RunError:
    names = [name for task in tasks if (part := _done(task)) for name in part.skipped]
    shown = ', '.join(ascii(name)[1:-1] for name in names[:5])
    return RunError(
        f'{len(names)} pictures cannot be decoded ({shown}{", ..." if names[5:] else ""}), and '
        f'--skip_corrupt={allowed} allows fewer: mend them, or allow more. What is done so far is '
        'kept.'
    )


_worker: tuple[Any, Any] = (None, None)  # of a worker process: the counter of all, and 'stop'


def _start_worker(counter: Any, stop: Any) -> None:
    global _worker
    _worker = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says stop
    warnings.filterwarnings('ignore', module=r'PIL\.')  # of odd pictures that it reads nevertheless
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: Task, most_skipped: int) -> int:
    counter, stop = _worker

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise Stopped

    return write_shard(task, most_skipped, tick)


# ---- beforehand -----------------------------------------------------------------------------


def _foretell(job: Job, task: Task, images: int, left: int, workers: int) -> None:
    """Say how large and how fast either storage would be, and check that the disk has room.

    Raises:
        RunError: it has not.
    """
    trials = {
        form: _trial(task, form)
        for form in (dataclasses.replace(job.form, storage=name) for name in ('jpeg', 'raw'))
    }
    job.report(f'{job.source.name}: {images:,} images of {job.form.px} x {job.form.px} px')
    for form, trial in trials.items():
        if trial:
            secs = left * trial.write_secs / min(workers, machine.cores())
            job.report(
                f'  {form}{" (chosen)" if form == job.form else ""}: '
                f'{images * trial.image_bytes / 1e9:,.1f} GB, '
                f'{prepared.clock(secs)} to make with {workers} processes, '
                f'read back at {1 / trial.read_secs:,.0f} images/s a core'
            )
    trial = trials[job.form]
    if trial:
        partial = 4 * 3 * job.form.px**2 * job.shards.get('train', 0)
        needed = int(1.02 * left * trial.image_bytes) + partial
        _check_space(job.room, job.source.name, job.form, needed)


def _check_space(room: Path, name: str, form: Form, needed: float) -> None:
    free = shutil.disk_usage(room).free
    if needed > free:
        other = ' or --storage=jpeg' if form.storage == 'raw' else ''
        raise RunError(
            f'{name} needs {needed / 1e9:,.1f} GB more in {room.parent}, and {free / 1e9:,.1f} GB '
            f'are free: make space, or choose another folder with --data_dir{other}.'
        )


class _Trial(NamedTuple):
    """Of one image, on the average over a sample."""

    image_bytes: float
    write_secs: float
    read_secs: float


def _trial(task: Task, form: Form) -> _Trial | None:
    """Prepare a sample, which the hashed order makes a random one, and read it again."""
    records, began = [], time.perf_counter()
    for member in _members(task.plan)[:SAMPLE_IMAGES]:
        with contextlib.suppress(pictures.BadImage):
            records.append(form.encode(pictures.picture(_read(task.root, member), form.px)))
    made = time.perf_counter()
    for record in records:
        form.decode(record).copy()
    read = time.perf_counter()
    if not records:
        return None
    n = len(records)
    return _Trial(sum(map(len, records)) / n + 64, (made - began) / n, (read - made) / n)


# ---- afterwards -----------------------------------------------------------------------------


def _finish(job: Job) -> Path:
    """Describe the finished shards as TFDS does; returns their folder."""
    folder, source = job.room / 'set', job.source
    parts = {task.target.name: _read_part(task.partial) for task in job.tasks()}
    skipped = sorted(name for part in parts.values() for name in part.skipped)
    written = sum(part.images for part in parts.values())
    if written + len(skipped) != sum(job.images.values()):
        raise RunError(f'Pictures are missing in the shards: remove {job.room} and run this again.')
    splits = []
    for split, count in job.shards.items():
        names = [prepared.shard_name(source.name, split, i, count) for i in range(count)]
        splits.append(
            dict(
                filepathTemplate='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                name=split,
                numBytes=str(sum(parts[name].record_bytes for name in names)),
                shardLengths=[str(parts[name].images) for name in names],
            )
        )
    _write_json(folder / 'dataset_info.json', _info(source, splits))
    _write_json(folder / 'features.json', _features(job.form, len(source.class_names)))
    _write_lines(folder / 'label.labels.txt', source.class_names)
    if source.words:
        _write_lines(folder / 'label.words.txt', source.words)
    _write_statistics(job)
    preparation = dict(
        **dataclasses.asdict(job.form),
        made_of=dict(source.made_of),
        skipped=skipped,
        versions=dict(program=PROGRAM, pillow=PIL.__version__),
    )
    _write_json(folder / prepared.PREPARATION, preparation)
    for name in skipped:
        job.report(f'{source.name}: left out, as it cannot be decoded: {ascii(name)[1:-1]}')
    for file in folder.glob('*.[jnt]*'):  # descriptions, words, statistics
        _sync(file)
    return folder


def _write_statistics(job: Job) -> None:
    """Write the statistics of the stored images as they are read: see statistics.py."""
    sums = statistics.Sums((job.form.px, job.form.px, 3))
    for task in job.tasks():
        if task.summed:
            sums.merge(_read_sums(task.partial))
    if sums.count == 0:
        return
    found = sums.result()
    statistics.save(job.room / 'set' / 'statistics.npz', found, sums.count)
    stds = ', '.join(f'{std:.2f}' for std in found.colour_std)
    job.report(f'{job.source.name}: standard deviations along the colour components {stds}')
    if job.source.constants and (far := statistics.far_from(found, job.source.constants)):
        job.report(f'{job.source.name}: WARNING: {far}: are these the official pictures?')


def _info(source: Source, splits: Sequence[dict]) -> dict[str, Any]:
    keys = [{'featureKey': key} for key in ('image', 'label')]
    return dict(
        description=source.description,
        fileFormat='array_record',
        moduleName='alexnet_jax.prepare',
        name=source.name,
        splits=list(splits),
        supervisedKeys={'tuple': {'items': keys}},
        version=VERSION,
    )


def _features(form: Form, classes: int) -> dict[str, Any]:
    """What TFDS's FeaturesDict writes of itself for these features."""
    package = 'tensorflow_datasets.core.features'
    about = dict(shape={'dimensions': [str(form.px), str(form.px), '3']}, dtype='uint8')
    if form.storage == 'raw':
        image = dict(
            tensor=about | dict(encoding='bytes'),
            pythonClassName=f'{package}.tensor_feature.Tensor',
        )
    else:
        image = dict(
            image=about | dict(encodingFormat='jpeg'),
            pythonClassName=f'{package}.image_feature.Image',
        )
    label = dict(
        classLabel={'numClasses': str(classes)},
        pythonClassName=f'{package}.class_label_feature.ClassLabel',
    )
    name = dict(text={}, pythonClassName=f'{package}.text_feature.Text')
    return dict(
        featuresDict={'features': dict(file_name=name, image=image, label=label)},
        pythonClassName=f'{package}.features_dict.FeaturesDict',
    )


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
