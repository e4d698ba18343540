"""Write images to array_record shards: resumable, with the same bytes on every run.

A worker process writes one shard at a time and renames it when it is complete. The shards of a
killed run stay in a staging directory in `data_dir`, one for each form of images, and the next run
of the same command writes the missing ones. Images are ordered by a hash of their names. The
finished folder is renamed to its final name.
"""

import contextlib
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from array_record.python import array_record_module as array_record  # ty: ignore[missing-module-member]

from alexnet_jax import files
from alexnet_jax.command import log
from alexnet_jax.data import images, prepared, statistics
from alexnet_jax.data.records import StoredImages
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image, [H, W, C]."""
        return self.px, self.px, 3


class File(NamedTuple):
    """A file in a tar file or a folder."""

    name: str  # without any folder
    path: str  # of the file on disk that contains it, absolute in a plan
    offset: int
    size: int
    stamp: int = 0  # changes when a file in a folder does

    def read(self) -> bytes:
        """Return the contents, unpacked where they are gzipped (ILSVRC-2010 has one)."""
        with open(self.path, 'rb', buffering=0) as source:
            content = os.pread(source.fileno(), self.size, self.offset)
        if content[:2] == b'\x1f\x8b':
            with contextlib.suppress(OSError, EOFError, zlib.error):  # the decoder reports it
                return gzip.decompress(content)
        return content


@dataclass(frozen=True)
class Source:
    """The pictures of a data set, and its description."""

    name: str  # of the data set
    description: str
    class_names: tuple[str, ...]
    made_of: dict[str, Any]  # written to preparation.json, as JSON has it
    images: Mapping[str, int]  # by split
    pictures: Callable[[], Iterator[tuple[str, int, File]]]  # (split, label, file), in any order
    stamp: str = ''  # a list of pictures with the same one is used again
    words: tuple[str, ...] = ()  # longer names of the classes, if there are any


# Facts about a shard: its images, the bytes of their records, and why pictures are missing.
Facts = tuple[int, int, list[str]]


def make(
    source: Source,
    data_dir: Path,
    form: Form,
    *,
    workers: int,
    skip_corrupt: int = 0,
    most_pixels: int = images.MOST_PIXELS,
) -> Path:
    """Prepare `source` in `data_dir` by `workers` processes; return its folder, which may exist.

    Up to `skip_corrupt` pictures that cannot be decoded, or have more than `most_pixels`, are left
    out.

    Raises:
        UsageError: the folder exists with another form or other pictures.
        RunError: the source is incomplete, a picture cannot be decoded, or a worker died.
        OSError: a file cannot be read or written.
    """
    folder = data_dir / source.name / VERSION
    with locked_staging_dir(data_dir, source.name) as staging:
        if not folder.exists():
            versions = f'{form}, Pillow {PIL.__version__}, program {PROGRAM}'
            work = staging / hashlib.sha256(versions.encode()).hexdigest()[:16]
            (work / 'set').mkdir(parents=True, exist_ok=True)
            plan = _plan(source, work)
            for left in {*os.listdir(work / 'set')} - plan.keys():
                # Unfinished, or of another plan; a worker that ends late removes its own.
                (work / 'set' / left).unlink(missing_ok=True)
            facts = _write_shards(source, plan, work, form, most_pixels, workers, skip_corrupt)
            _describe(source, plan, facts, work / 'set', form, workers)
            for path in (work / 'set').glob('*.[jt]*'):  # those that TFDS wrote
                files.sync(path)
            folder.parent.mkdir(exist_ok=True)
            (work / 'set').rename(folder)
            log(f'{source.name}: prepared in {folder}')
    prepared.describe(folder)
    try:
        about = json.loads((folder / prepared.PREPARATION).read_text())
    except (OSError, ValueError) as error:
        raise prepared.damaged(folder, f'{prepared.PREPARATION}: {error}') from None
    wanted = dataclasses.asdict(form) | dict(made_of=source.made_of)
    if different := [key for key, value in wanted.items() if about.get(key) != value]:
        what = ', '.join(different).replace('made_of', 'its images')
        raise UsageError(
            f'{folder} already exists and differs in {what}: remove that folder, or choose another '
            '--data_dir.'
        )
    return folder


@contextlib.contextmanager
def locked_staging_dir(data_dir: Path, name: str) -> Generator[Path]:
    """Yield the staging directory, locked for this process; it keeps what an earlier run left.

    It is removed when the block ends well. The system releases the lock of a killed process.

    Raises:
        OSError: `data_dir` cannot be written, or the disk is full.
    """
    staging = data_dir / f'.prepare-{name}'
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(f'{staging}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f'{name}: waiting for another process that is preparing it')
            fcntl.flock(lock, fcntl.LOCK_EX)
        staging.mkdir(exist_ok=True)
        try:
            yield staging
            shutil.rmtree(staging)
        except Exception as error:  # array_record has types of its own for a full disk
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number), str(data_dir)) from error
            raise
        finally:
            with contextlib.suppress(OSError):
                staging.rmdir()  # if it contains nothing to resume from


# ---- the shards -----------------------------------------------------------------------------


def _plan(source: Source, work: Path) -> dict[str, str]:
    """Assign the pictures to shards, {file: its split}; a plan of the same stamp is used again.

    A shard of an earlier plan that contains other pictures is written again. The pictures of each
    shard are in a file, one a line: a hash of the name, the label, the fields of File. They are not
    sent to the workers: before Python 3.11.5 the queue of a pool whose workers have died is blocked
    by more than 64 kB.
    """
    path = work / 'shards.json'
    if path.exists():
        stamp, plan = json.loads(path.read_text())
        if source.stamp and stamp == source.stamp:
            return plan
        path.unlink()  # it is no longer that of the files below
    counts = {split: _shard_count(n) for split, n in source.images.items() if n}
    names = {
        split: [prepared.shard_name(source.name, split, i, count) for i in range(count)]
        for split, count in counts.items()
    }
    plan = {name: split for split, own in names.items() for name in own}
    pictures: dict[str, list[str]] = {name: [] for name in plan}
    for split, label, file in source.pictures():
        key = hashlib.blake2b(os.fsencode(f'{split}/{file.name}'), digest_size=8).hexdigest()
        name = names[split][int(key, 16) % counts[split]]
        pictures[name].append(json.dumps([key, label, *file]))
    for name, lines in pictures.items():
        own, text = work / f'{name}.plan', '\n'.join(sorted(lines))
        if not own.exists() or own.read_text() != text:
            (work / f'{name}.json').unlink(missing_ok=True)
            with files.atomic_write(own) as scratch:
                scratch.write_text(text)
    with files.atomic_write(path) as scratch:
        scratch.write_text(json.dumps([source.stamp, plan]))
    return plan


def _shard_count(pictures: int) -> int:
    """Return the number of shards of a split; a small one has more, to keep several cores busy."""
    return max(1, -(-pictures // SHARD_IMAGES), min(16, -(-pictures // 256)))


def write_shard(name: str, work: Path, form: Form, most_pixels: int) -> Facts:
    """Write one shard, without the pictures that cannot be decoded, and the facts about it."""
    skipped = list[str]()

    def records() -> Iterator[bytes]:
        for line in (work / f'{name}.plan').read_text().splitlines():
            _, label, *fields = json.loads(line)
            file = File(*fields)
            try:
                image = images.decode_image(file.read(), form.shape, most_pixels)
            except images.BadImage as error:
                skipped.append(f'{file.name} {error}')
                continue
            raw = form.storage == 'raw'
            stored = image.tobytes() if raw else images.jpeg(image, form.quality)
            yield example(stored, label, file.name)

    with files.atomic_write(work / 'set' / name) as scratch:
        facts = *write_records(scratch, records()), skipped
    with files.atomic_write(work / f'{name}.json') as scratch:
        scratch.write_text(json.dumps(facts))
    return facts


def _write_shards(
    source: Source,
    plan: Mapping[str, str],
    work: Path,
    form: Form,
    most_pixels: int,
    workers: int,
    skip_corrupt: int,
) -> dict[str, Facts]:
    """Write the shards that are missing, in `workers` processes; return the facts about all.

    A shard that lacks pictures is written again: they may have been repaired, or be accepted now.
    """
    facts = dict[str, Facts]()
    for name in plan:
        about = work / f'{name}.json'
        if about.exists() and (work / 'set' / name).exists():
            facts[name] = json.loads(about.read_text())
    facts = {name: found for name, found in facts.items() if not found[2]}
    done, skipped = sum(count for count, *_ in facts.values()), list[str]()
    if facts:
        log(f'{source.name}: resuming, {len(facts):,} of {len(plan):,} shards are finished')
    context = multiprocessing.get_context('spawn')  # a fork of a process with threads may hang
    with (
        progress(f'{source.name} (images)', sum(source.images.values())) as update,
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
    ):
        try:
            waiting = {
                pool.submit(write_shard, name, work, form, most_pixels): name
                for name in plan
                if name not in facts
            }
            for future in as_completed(waiting):
                facts[waiting[future]] = count, _, lacking = future.result()
                update(done := done + count)
                skipped += lacking
                if len(skipped) > skip_corrupt:
                    raise RunError(
                        f'{len(skipped)} image(s) cannot be decoded: {"; ".join(skipped[:3])}. '
                        'Repair or remove them, or skip up to N such images with --skip_corrupt=N '
                        f'(now {skip_corrupt}). Finished shards are kept.'
                    )
        except BaseException as error:  # Ctrl-C too: it must not wait for shards
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, (BrokenProcessPool, MemoryError)):
                raise RunError(
                    'A worker process died or ran out of memory: run the same command again with '
                    'fewer --workers; it resumes from the finished shards.'
                ) from None
            raise
    return facts


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    warnings.filterwarnings('ignore', module=r'PIL\.')  # of odd pictures that it reads nevertheless
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _describe(
    source: Source,
    plan: Mapping[str, str],
    facts: Mapping[str, Facts],
    folder: Path,
    form: Form,
    workers: int,
) -> None:
    """Write the files beside the shards."""
    shards: dict[str, list[tuple[int, int]]] = {split: [] for split in plan.values()}
    for name, split in plan.items():
        shards[split].append(facts[name][:2])
    skipped = [reason for name in plan for reason in facts[name][2]]
    for reason in skipped:
        log(f'{source.name}: skipped: {reason}')
    kinds = features(form.shape, form.storage, source.class_names)
    write_metadata(folder, source.name, VERSION, kinds, shards, description=source.description)
    if source.words:
        lines = ''.join(f'{line}\n' for line in source.words)
        (folder / 'label.words.txt').write_text(lines, encoding='utf-8')
    preparation = dataclasses.asdict(form) | dict(
        made_of=source.made_of,
        skipped=sorted(skipped),
        versions=dict(program=PROGRAM, pillow=PIL.__version__),
    )
    text = json.dumps(preparation, indent=2, sort_keys=True) + '\n'
    (folder / prepared.PREPARATION).write_text(text)
    log(f'{source.name}: computing the mean image')
    terms = [('train', 0, sum(count for count, _ in shards['train']))]
    stored = StoredImages(folder, prepared.describe(folder), terms, workers)
    result = statistics.of_images(stored)
    statistics.save(folder / 'statistics.npz', result, len(stored))
    stds = ', '.join(f'{std:.2f}' for std in result.colour_std)
    log(f'{source.name}: standard deviations along the colour components {stds}')


# ---- TFDS's format, without TensorFlow --------------------------------------------------------


def write_records(path: Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Write an array_record file; return the number of records and of their bytes."""
    # A group for each record, as TFDS writes them; JPEG cannot be compressed further.
    writer = array_record.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    sizes = list[int]()
    for record in records:
        writer.write(record)
        sizes.append(len(record))
    writer.close()
    return len(sizes), sum(sizes)


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


def features(shape: tuple[int, int, int], storage: str, class_names: Sequence[str]) -> Any:
    """Return TFDS's FeaturesDict of images [H, W, C] stored as 'raw' or 'jpeg'."""
    import tensorflow_datasets as tfds

    if storage == 'raw':
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='bytes')
    else:
        image = tfds.features.Image(shape=shape, encoding_format='jpeg')
    label = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(
        {'file_name': tfds.features.Text(), 'image': image, 'label': label}
    )


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
