"""Write pictures as array_record shards: resumable, and the same bytes on every run.

A shard is the unit of work. A worker process writes it under a scratch name, puts the facts about
it beside it, and renames it when it is complete. What a killed run wrote stays in a staging
directory of `data_dir`; the next run of the same job writes the shards that are missing. Pictures
are ordered by a hash of their names. One rename gives the finished folder its final name.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from alexnet_jax import files, machine
from alexnet_jax.data import images as image_io
from alexnet_jax.data import prepared, statistics
from alexnet_jax.data.prepare import archives
from alexnet_jax.data.prepared import Report
from alexnet_jax.errors import RunError, UsageError

VERSION = '1.0.0'  # of the data sets made here
PROGRAM = 3  # raise it when the bytes change; since 3, statistics are of the images as stored
SHARD_IMAGES = 2048  # ImageNet in 626 files: fewer than the 1,024 that may usually be open
OPTIONS = 'group_size:1,uncompressed'  # a record each, as TFDS has it; JPEG cannot be compressed
SAMPLE_IMAGES = 32  # encoded to estimate the space needed
LISTED_AT_ONCE = 100_000  # pictures held in memory while they are assigned to shards


@dataclass(frozen=True)
class Form:
    """The size and the encoding of stored images."""

    px: int = 256  # both sides (paper, section 2)
    storage: str = 'jpeg'  # or 'raw'
    quality: int = 90  # of a JPEG

    def encode(self, image: Image.Image) -> bytes:
        """Return the bytes that a record holds of an RGB image of this size."""
        return image.tobytes() if self.storage == 'raw' else image_io.jpeg(image, self.quality)

    def decode(self, stored: bytes) -> np.ndarray:
        """Return the image that a reader gets from those bytes: uint8 [px, px, 3]."""
        shape = (self.px, self.px, 3)
        if self.storage == 'raw':
            return np.frombuffer(stored, np.uint8).reshape(shape)
        return image_io.decode(stored, shape)

    def __str__(self) -> str:
        how = 'raw' if self.storage == 'raw' else f'JPEG of quality {self.quality}'
        return f'{self.px} px and stored as {how}'


class Member(NamedTuple):
    """A picture to be prepared."""

    name: str  # its file name
    label: int
    file: str  # the file that holds it, relative to the source's folder
    offset: int
    size: int
    stamp: int = 0  # changes when the picture does, where the file is its own


@dataclass(frozen=True)
class Source:
    """The pictures of a data set, and its description."""

    name: str  # of the data set
    folder: Path
    description: str
    class_names: tuple[str, ...]
    words: tuple[str, ...]  # for people, a line a class; or none at all
    made_of: dict[str, Any]  # written to preparation.json, as JSON has it
    images: Mapping[str, int]  # by split
    inputs: Iterable[Path]  # files and folders that have changed when `members` has
    members: Callable[[Report], Iterator[tuple[str, Member]]]  # (split, picture), in any order
    constants: statistics.Statistics | None = None  # published colour statistics, if there are any


@dataclass(frozen=True)
class Task:
    """A shard to write."""

    split: str
    plan: Path  # its pictures, a line each
    target: Path
    facts: Path  # see Facts; written before `target` gets its name
    root: Path  # the source's folder
    form: Form
    most_pixels: int  # of a picture

    @property
    def members(self) -> list[Member]:
        """Return the pictures of the shard, in order."""
        with self.plan.open() as file:
            return [Member(*json.loads(line[17:])) for line in sorted(file)]

    @property
    def job(self) -> str:
        """Return a hash of the pictures and of their form."""
        lines = sorted(self.plan.read_bytes().splitlines())
        return hashlib.sha256(b'\n'.join([repr(self.form).encode(), *lines])).hexdigest()


class Facts(NamedTuple):
    """Facts about a finished shard."""

    job: str  # see Task
    images: int
    record_bytes: int
    most_pixels: int
    skipped: Sequence[str]  # names of pictures that could not be decoded


def make(
    source: Source,
    data_dir: Path,
    form: Form,
    report: Report,
    *,
    workers: int | None = None,
    skip_corrupt: int = 0,
    most_pixels: int = image_io.MOST_PIXELS,
    shard_images: int = SHARD_IMAGES,
) -> Path:
    """Prepare `source` in `data_dir` and return its folder, at once if it is there.

    Args:
        source: the pictures.
        data_dir: the folder of all data sets.
        form: the size and encoding of stored images.
        report: called with lines of progress.
        workers: processes; one a core if not given.
        skip_corrupt: how many pictures may be left out because they cannot be decoded.
        most_pixels: a picture with more counts as one that cannot be decoded.
        shard_images: pictures a shard, about.

    Raises:
        UsageError: what is there is of other pictures or of another form.
        RunError: the source is incomplete, a picture cannot be decoded, the disk is too small, or a
            worker process died. Finished shards are kept.
    """
    folder = data_dir / source.name / VERSION
    if not folder.exists() or prepared.staging_dir(data_dir, source.name).exists():
        with prepared.locked_staging_dir(data_dir, source.name, report) as staging:
            if not folder.exists():  # else another process made it while this one waited
                tasks = _plan(source, form, staging, most_pixels, shard_images, report)
                _write_shards(source, tasks, workers or machine.cores(), skip_corrupt, report)
                _describe(source, tasks, staging / 'set', report)
                folder.parent.mkdir(exist_ok=True)
                (staging / 'set').rename(folder)
                report(f'{source.name}: prepared in {folder}')
    _check_same(folder, form, source)
    prepared.check_complete(folder)
    return folder


def _check_same(folder: Path, form: Form, source: Source) -> None:
    try:
        about = json.loads((folder / prepared.PREPARATION).read_text())
        there = Form(about['px'], about['storage'], about['quality'])
        names = tuple((folder / 'label.labels.txt').read_text(encoding='utf-8').splitlines())
        same = (about['made_of'], names) == (source.made_of, source.class_names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise prepared.damaged(folder, f'{prepared.PREPARATION}: {error}') from None
    if there != form or not same:
        raise UsageError(
            f'{folder} is there already, {there if there != form else "made of other pictures"}: '
            'remove that folder, or choose another one with --data_dir.'
        )


# ---- the plan -------------------------------------------------------------------------------


def _plan(
    source: Source,
    form: Form,
    staging: Path,
    most_pixels: int,
    shard_images: int,
    report: Report,
) -> list[Task]:
    """Assign the pictures to shards; a plan of the same, unchanged files is used again."""
    shards = {split: _shard_count(n, shard_images) for split, n in source.images.items() if n}
    tasks = [
        Task(
            split,
            staging / 'plan' / f'{split}-{number:05d}',
            staging / 'set' / prepared.shard_name(source.name, split, number, count),
            staging / 'facts' / f'{split}-{number:05d}.npz',
            source.folder.resolve(),
            form,
            most_pixels,
        )
        for split, count in shards.items()
        for number in range(count)
    ]
    for part in ('plan', 'facts', 'set'):
        (staging / part).mkdir(exist_ok=True)
    _check_form(staging, form)
    files_now, planned = _stamps(source, shards), staging / 'planned'
    if not planned.exists() or planned.read_text() != files_now:
        planned.unlink(missing_ok=True)
        _sweep(staging / 'plan', keep=())
        _assign(source, staging / 'plan', shards, report)
        planned.write_text(files_now)
    _sweep(staging / 'set', keep=[task.target for task in tasks])
    _sweep(staging / 'facts', keep=[task.facts for task in tasks])
    return tasks


def _check_form(staging: Path, form: Form) -> None:
    """Raise UsageError if an interrupted run finished shards of another form: hours of work."""
    file, now = staging / 'form', f'{form}, Pillow {PIL.__version__}, format {PROGRAM}'
    if file.exists() and (then := file.read_text()) != now and any(staging.glob('facts/*')):
        raise UsageError(
            f'An interrupted run has left finished shards in {staging} ({then}; this one: {now}): '
            'give its --px, --storage and --quality, or remove that folder to begin anew.'
        )
    file.write_text(now)


def _sweep(folder: Path, keep: Sequence[Path]) -> None:
    """Remove what a killed run was writing, and what belongs to other pictures."""
    for other in set(folder.iterdir()) - set(keep):
        other.unlink(missing_ok=True)  # a worker that ends late removes its own


def _stamps(source: Source, shards: Mapping[str, int]) -> str:
    """Return a hash of the names, sizes and times of the source's files."""
    digest = hashlib.sha256(json.dumps([source.made_of, shards]).encode())
    for path in source.inputs:
        about = archives.status(path)
        digest.update(f'\n{str(path)!a} {about.st_size} {about.st_mtime_ns}'.encode())
    return digest.hexdigest()


def _shard_count(images: int, shard_images: int) -> int:
    """Return how many shards a split has; a small one has more, to keep several cores busy."""
    return max(1, -(-images // shard_images), min(16, -(-images // 256)))


def _assign(source: Source, folder: Path, shards: Mapping[str, int], report: Report) -> None:
    """Write the plan of each shard: its pictures, a line each that begins with their hash."""
    held: dict[str, list[str]] = {
        f'{split}-{i:05d}': [] for split, count in shards.items() for i in range(count)
    }

    def flush() -> None:
        for name, lines in held.items():
            with (folder / name).open('a') as file:
                file.writelines(lines)
            lines.clear()

    for number, (split, member) in enumerate(source.members(report), start=1):
        name = os.fsencode(f'{split}/{member.name}')
        key = hashlib.blake2b(name, digest_size=8).hexdigest()
        line = f'{key} {json.dumps(member)}\n'
        held[f'{split}-{int(key, 16) % shards[split]:05d}'].append(line)
        if number % LISTED_AT_ONCE == 0:
            flush()
    flush()


# ---- a shard --------------------------------------------------------------------------------


def write_shard(task: Task, most_skipped: int = 0) -> Facts:
    """Write one shard and the facts about it.

    Raises:
        RunError: more than `most_skipped` pictures cannot be decoded.
    """
    px, skipped, images, record_bytes = task.form.px, list[str](), 0, 0
    sums = statistics.Sums((px, px, 3)) if task.split == 'train' else None
    with files.atomic_write(task.target) as scratch:
        writer = record_writer(scratch)
        for member in task.members:
            try:
                stored = _encode(task, member)
            except image_io.BadImage as error:
                skipped.append(member.name)
                if len(skipped) > most_skipped:
                    raise _corrupt(member, error) from None
                continue
            record = example(stored, member.label, member.name)
            writer.write(record)
            images, record_bytes = images + 1, record_bytes + len(record)
            if sums:
                sums.add(task.form.decode(stored)[None])
        writer.close()
        sync(scratch)
        facts = Facts(task.job, images, record_bytes, task.most_pixels, skipped)
        about: dict[str, Any] = {'facts': json.dumps(facts)}
        if sums:
            # Of bytes: 2048 images fit.
            about |= {'total': sums.total.astype(np.uint32), 'products': sums.products}
        with files.atomic_write(task.facts) as other:
            with other.open('wb') as file:
                np.savez(file, **about)
            sync(other)
    return facts


def _encode(task: Task, member: Member) -> bytes:
    """Return the image of a picture as it is stored."""
    if member.size > archives.MOST_BYTES:
        raise image_io.BadImage(f'has {member.size:,} bytes, more than a picture can have')
    content = archives.read(task.root / member.file, member.offset, member.size)
    shape = (task.form.px, task.form.px, 3)
    try:
        return task.form.encode(image_io.decode_image(content, shape, task.most_pixels))
    except MemoryError:
        raise RunError(
            f'{_printable(member)} needs more memory than there is: run the same command again '
            'with fewer --workers; it resumes from the finished shards.'
        ) from None


def read_facts(task: Task) -> tuple[Facts, statistics.Sums | None] | None:
    """Return the facts about a finished shard and the sums over its images.

    None if the shard is to be written: it is not there, or is of other pictures, or pictures were
    left out of it under another limit of pixels.
    """
    if not task.target.exists():
        return None
    try:
        with np.load(task.facts) as file:
            facts = Facts(*json.loads(str(file['facts'])))
            sums = None
            if task.split == 'train':
                sums = statistics.Sums.of(facts.images, file['total'], file['products'])
    except Exception:  # the disk lost it; np.load promises no set of exceptions
        return None
    limits_differ = facts.skipped and facts.most_pixels != task.most_pixels
    return None if facts.job != task.job or limits_differ else (facts, sums)


def _corrupt(member: Member, error: image_io.BadImage) -> RunError:
    megapixels = -(-error.pixels // 10**6) if isinstance(error, image_io.TooLarge) else 0
    allow = f'allow it with --max_megapixels={megapixels} if you trust it, ' if megapixels else ''
    return RunError(
        f'{_printable(member)} {error}: {allow}mend or remove it, or leave out up to N such '
        'pictures with --skip_corrupt=N. Finished shards are kept.'
    )


def _printable(member: Member) -> str:
    inside = '' if member.name == member.file else f' in {ascii(member.file)[1:-1]}'
    return ascii(member.name)[1:-1] + inside


def record_writer(path: Path) -> Any:
    """Return array_record's writer of a file."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,  # a compiled module without stubs
    )

    return ArrayRecordWriter(str(path), OPTIONS)


def sync(path: Path) -> None:
    """Flush a file to the disk, so that a power cut does not leave an empty one under its name."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def example(image: bytes, label: int, name: str | None = None) -> bytes:
    """Return a record: a serialised tf.train.Example of `image`, `label` and `file_name`.

    TFDS's own serialiser writes the map of features in an order that varies with the process.
    """
    from tensorflow_datasets.proto import tf_example_pb2 as proto

    message: Any = proto.Example()  # ty: ignore[missing-attribute] (made at import)
    features = message.features.feature
    features['image'].bytes_list.value.append(image)
    features['label'].int64_list.value.append(label)
    if name is not None:
        features['file_name'].bytes_list.value.append(os.fsencode(name))
    return message.SerializeToString(deterministic=True)


# ---- all shards -----------------------------------------------------------------------------


def _write_shards(
    source: Source, tasks: Sequence[Task], workers: int, skip_corrupt: int, report: Report
) -> None:
    """Write the shards that are missing, in `workers` processes."""
    found = {task: there[0] for task in tasks if (there := read_facts(task))}
    missing = [task for task in tasks if task not in found]
    if found:
        report(f'{source.name}: resuming, {len(found):,} of {len(tasks):,} shards are finished')
    _check_skipped(found.values(), skip_corrupt)  # an earlier run may have allowed more
    _check_space(source.name, missing)
    # A fork of a process with threads may hang.
    context, size = multiprocessing.get_context('spawn'), max(1, min(workers, len(missing)))
    others = set(multiprocessing.active_children())
    with (
        prepared.progress(f'{source.name} (images)', sum(source.images.values()), report) as update,
        ProcessPoolExecutor(size, context, _start_worker) as pool,
    ):
        try:
            waiting = {pool.submit(write_shard, task, skip_corrupt): task for task in missing}
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                update(sum(facts.images for facts in found.values()))
                _check_skipped(found.values(), skip_corrupt)
        except BaseException as error:  # Ctrl-C too: it must not wait for shards
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RunError(
                    'A worker process died, perhaps for want of memory: run the same command again '
                    'with fewer --workers; it resumes from the finished shards.'
                ) from None
            raise


def _check_skipped(found: Iterable[Facts], allowed: int) -> None:
    names = [name for facts in found for name in facts.skipped]
    if len(names) > allowed:
        shown = ', '.join(ascii(name)[1:-1] for name in names[:5])
        raise RunError(
            f'{len(names)} pictures cannot be decoded ({shown}{", ..." if names[5:] else ""}), and '
            f'--skip_corrupt={allowed} allows fewer: mend or remove them, or allow more. Finished '
            'shards are kept.'
        )


def _check_space(name: str, missing: Sequence[Task]) -> None:
    """Raise RunError if the disk has no room for the shards, by a sample of the first one."""
    sizes = []
    for member in missing[0].members[:SAMPLE_IMAGES] if missing else ():
        with contextlib.suppress(image_io.BadImage):
            sizes.append(len(_encode(missing[0], member)))
    if not sizes:
        return
    images = sum(len(task.members) for task in missing)
    sums = 4 * 3 * missing[0].form.px ** 2 * len(missing)
    needed = images * (sum(sizes) / len(sizes) + 64) + sums
    free = shutil.disk_usage(missing[0].plan).free
    if needed > free:
        other = ' or --storage=jpeg' if missing[0].form.storage == 'raw' else ''
        raise RunError(
            f'{name} needs {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: make '
            f'space, or choose another folder with --data_dir{other}.'
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


def _describe(source: Source, tasks: Sequence[Task], folder: Path, report: Report) -> None:
    """Write what belongs beside the shards, and flush it to the disk."""
    form = tasks[0].form
    sums = statistics.Sums((form.px, form.px, 3))
    splits: dict[str, list[Facts]] = {task.split: [] for task in tasks}
    for task in tasks:
        there = read_facts(task)
        if there is None:
            raise RunError(f'{task.facts} has been lost: run the same command again.')
        splits[task.split].append(there[0])
        if there[1]:
            sums.merge(there[1])
    skipped = sorted(name for facts in splits.values() for one in facts for name in one.skipped)
    written = sum(one.images for facts in splits.values() for one in facts)
    if written + len(skipped) != sum(source.images.values()):
        raise RunError(f'Pictures are missing in the shards: remove {folder.parent}; run it again.')
    shards = {s: [(f.images, f.record_bytes) for f in facts] for s, facts in splits.items()}
    features = _features(form, source.class_names)
    write_metadata(folder, source.name, VERSION, features, shards, description=source.description)
    if source.words:
        lines = ''.join(f'{line}\n' for line in source.words)
        (folder / 'label.words.txt').write_text(lines, encoding='utf-8')
    for name in skipped:
        report(f'{source.name}: left out, as it cannot be decoded: {ascii(name)[1:-1]}')
    preparation = dict(
        **dataclasses.asdict(form),
        made_of=source.made_of,
        skipped=skipped,
        versions=dict(program=PROGRAM, pillow=PIL.__version__),
    )
    text = json.dumps(preparation, indent=2, sort_keys=True) + '\n'
    (folder / prepared.PREPARATION).write_text(text)
    if sums.count:
        found = sums.result()
        statistics.save(folder / 'statistics.npz', found, sums.count)
        stds = ', '.join(f'{std:.2f}' for std in found.colour_std)
        report(f'{source.name}: standard deviations along the colour components {stds}')
        if source.constants and (far := statistics.far_from(found, source.constants)):
            report(f'{source.name}: WARNING: {far}: are these the official pictures?')
    for path in folder.glob('*.[jnt]*'):  # descriptions, names, statistics
        sync(path)


def _features(form: Form, class_names: Sequence[str]) -> Any:
    import tensorflow_datasets as tfds

    shape = (form.px, form.px, 3)
    if form.storage == 'raw':
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='bytes')
    else:
        image = tfds.features.Image(shape=shape, encoding_format='jpeg')
    label = tfds.features.ClassLabel(names=list(class_names))
    features = {'file_name': tfds.features.Text(), 'image': image, 'label': label}
    return tfds.features.FeaturesDict(features)


def write_metadata(
    folder: Path,
    name: str,
    version: str,
    features: Any,
    shards: Mapping[str, Sequence[tuple[int, int]]],
    **description: Any,
) -> None:
    """Describe a folder of array_record files as TFDS does.

    `shards` is {split: (examples, bytes of records) of each file}; `features` is TFDS's
    FeaturesDict; `description` are further arguments of TFDS's `write_metadata`.
    """
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=folder, filetype_suffix='array_record'
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        version=version,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[images for images, _ in about],
                num_bytes=sum(size for _, size in about),
                filename_template=template,
            )
            for split, about in shards.items()
        ],
        supervised_keys=('image', 'label'),
        check_data=False,  # it needs TensorFlow
        **description,
    )
