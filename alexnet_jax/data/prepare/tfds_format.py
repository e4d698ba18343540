"""Write a data set in TFDS's format, without TensorFlow: its folder, records and description."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module as array_record

from alexnet_jax.command import log


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
