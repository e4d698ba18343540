"""The folder of a prepared data set, and its description."""

import collections
import json
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_jax.errors import RunError

FETCHED = ('fashion_mnist', 'mnist')  # prepared without being given any files
OFFICIAL = ('imagenet2010', 'imagenet2012')  # their archives are available on request only
PREPARATION = 'preparation.json'  # beside the records of a set that prepare/shards.py wrote
PX = 256  # the side to which images of different sizes are brought (paper, section 2)


class Description(NamedTuple):
    """The description of a prepared data set."""

    files: dict[str, list[tuple[Path, int]]]  # {split: [(array_record file, number of examples)]}
    shape: tuple[int, int, int]  # of the decoded images, [H, W, C]
    encoded: bool  # JPEG or PNG; False for the uint8 arrays themselves
    class_names: tuple[str, ...]  # by label: TFDS's names, else '0', '1', ...
    words: tuple[str, ...]  # longer names ('tabby, tabby cat'), unique; else `class_names`


def describe(folder: Path) -> Description:
    """Read the description of a prepared data set from TFDS's files, without TFDS.

    Raises:
        RunError: the description or a record file is missing, or the set has no uint8 images
            [H, W, 1 or 3] with class labels.
        OSError: the system cannot open a file, which may be intact.
    """
    try:
        info = json.loads((folder / 'dataset_info.json').read_text())
        features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
        files = {
            split['name']: [
                (folder / shard_name(info['name'], split['name'], i, len(lengths)), int(count))
                for i, count in enumerate(lengths)
            ]
            for split in info['splits']
            for lengths in [split['shardLengths']]
        }
        for path in (path for split in files.values() for path, _ in split):
            path.stat()  # it is there
        classes = int(features['label']['classLabel']['numClasses'])
        found = _lines(folder / 'label.labels.txt') or tuple(map(str, range(classes)))
        words = _lines(folder / 'label.words.txt') or found
        counted = collections.Counter(words)
        unique = tuple(
            word if counted[word] == 1 else f'{word} ({name})'
            for word, name in zip(words, found, strict=True)
        )
        return Description(files, *_image_format(features['image']), found, unique)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        # Other OSErrors are of the system: too many open files, no permission.
        reason = error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'
        raise damaged(folder, f'its description or a file is missing or wrong, {reason}') from None


def _image_format(feature: Any) -> tuple[tuple[int, int, int], bool]:
    """Return `shape` and `encoded`, see `Description`, of a feature of TFDS."""
    encoded = 'image' in feature
    about = feature['image' if encoded else 'tensor']
    height, width, channels = map(int, about['shape']['dimensions'])
    readable = encoded or about['encoding'].lower() == 'bytes'
    if about.get('dtype', 'uint8') != 'uint8' or channels not in (1, 3) or not readable:
        raise ValueError(f'images are {about}, but must be uint8 [H, W, 1 or 3] as bytes')
    if encoded and min(height, width) < 1:  # pictures of any size
        return (PX, PX, 3), encoded
    return (height, width, channels), encoded


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding='utf-8').splitlines()) if path.is_file() else ()


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """Return TFDS's file name for shard `number` of `count`."""
    return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def command(name: str, data_dir: str | Path) -> str:
    """Return the command line that prepares data set `name`."""
    if name in OFFICIAL:
        name = f'{name} --source=FOLDER'
    elif name not in FETCHED:
        name = f'folder --name={name} --source=FOLDER'
    return f'python -m alexnet_jax prepare {name} --data_dir={data_dir}'


def damaged(folder: Path, reason: str) -> RunError:
    """Return the error for a data set that cannot be used: what to remove and to run."""
    again = command(folder.parent.name, folder.parent.parent)
    if not (folder / PREPARATION).exists() and folder.parent.name not in (*FETCHED, *OFFICIAL):
        again = 'tfds build NAME --file_format=array_record'
    return RunError(
        f'The data set in {folder} is damaged ({reason}): remove that folder and run `{again}`.'
    )
