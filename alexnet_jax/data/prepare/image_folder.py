"""A data set of a user's own pictures, in one folder per class."""

import collections
import hashlib
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from alexnet_jax.command import log
from alexnet_jax.data import images
from alexnet_jax.data.prepare.shards import File, Source
from alexnet_jax.data.prepared import FETCHED, OFFICIAL
from alexnet_jax.errors import UsageError

# Names of folders that are splits, here and elsewhere.
SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test'}  # fmt: skip
RESERVED = (*FETCHED, *OFFICIAL, 'decoded')

# What file systems, desktops and tools leave in folders, besides hidden files; in lower case.
LEFTOVERS = frozenset((
    '$recycle.bin', 'system volume information', 'thumbs.db', 'desktop.ini', '__macosx',
    'lost+found', '@eadir', '#recycle', '#snapshot', '__pycache__',
))  # fmt: skip

Pictures = dict[str, list[File]]  # {class: its pictures}


def source(
    folder: Path, name: str | None = None, *, validation: float = 0.1, test: float = 0.1
) -> Source:
    """Return the pictures of `folder`: train/CLASS/..., val/CLASS/..., test/CLASS/...; or CLASS/...

    A single split is divided, class by class, by a hash of the names: nearly all pictures stay in
    their split when others are added. `validation` and `test` are the shares of the other two. The
    data set has the folder's name if none is given. Hidden files, LEFTOVERS and files without the
    suffix of a picture are ignored.

    Raises:
        UsageError: the name is not usable, or the folders are not those of a data set.
        OSError: a folder or picture cannot be read.
    """
    folder, ignored = folder.absolute(), collections.Counter[str]()
    splits, name = _splits(folder, ignored), _name(name, folder)
    if not splits['validation'] and not splits['test']:
        splits = _divide(splits['train'], validation=validation, test=test)
    passed_over = ', '.join(f'{n:,} {end}' for end, n in ignored.most_common()) or 'none'
    if {'.heic', '.heif'} & ignored.keys():
        passed_over += '; convert HEIC to JPEG first'
    classes = sorted(splits['train'])
    lacking = [one for found in splits.values() for one in found if not splits['train'].get(one)]
    if lacking or len(classes) < 2:
        problem = f'no images of class {lacking[0]!a}' if lacking else 'fewer than two classes'
        raise UsageError(
            f'{folder} has {problem} to train on (ignored files: {passed_over}): give it one '
            'folder of images per class, or train/ (and val/ and test/) with the same classes.'
        )
    every = [
        (split, label, file)
        for split, found in splits.items()
        for label, one in enumerate(classes)
        for file in found.get(one, ())
    ]
    counts = dict(collections.Counter(split for split, _, _ in every))
    listed = textwrap.shorten(', '.join(classes), 1000, placeholder=' ...')
    log(f'{folder}: {len(classes):,} classes: {listed}')
    shown = ', '.join(f'{split} {count:,}' for split, count in counts.items())
    log(f'{folder}: images: {shown}; ignored files: {passed_over}')
    # Not the times: the same pictures may be copied elsewhere.
    content = ''.join(f'{split} {file.size} {file.name!a}\n' for split, _, file in every)
    return Source(
        name=name,
        description=f'Pictures of {len(classes)} classes.',
        class_names=tuple(classes),
        made_of=dict(
            images=counts,
            validation=validation,
            test=test,
            names_and_sizes=hashlib.sha256(content.encode()).hexdigest(),
        ),
        images=counts,
        pictures=lambda: iter(every),
    )


def folder_files(folder: str | Path) -> Iterator[File]:
    """Yield every file below `folder`, links followed, without the leftovers of systems."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith('.') or entry.name.lower() in LEFTOVERS:
            continue
        if entry.is_dir():
            yield from folder_files(entry.path)
        else:
            about = entry.stat()
            yield File(entry.name, entry.path, 0, about.st_size, about.st_mtime_ns)


def _name(name: str | None, folder: Path) -> str:
    """Return a name in the form that TFDS wants."""
    made = name or re.sub(r'\W+', '_', folder.resolve().name.lower(), flags=re.ASCII).strip('_')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', made) or made in RESERVED:
        raise UsageError(
            f"'{made}' cannot be the name of your data set: choose one with --name, made of "
            'lower-case letters, digits and _.'
        )
    return made


def _splits(folder: Path, ignored: collections.Counter[str]) -> dict[str, Pictures]:
    """Return {split: {class: pictures}}, all in 'train' if no folder is a split.

    Other files, and those in no class, are ignored and counted by suffix.
    """
    known = Image.registered_extensions().items()
    suffixes = {end for end, kind in known if kind in images.FORMATS}
    files = sorted(
        file._replace(name=Path(file.path).relative_to(folder).as_posix())
        for file in folder_files(folder)
    )
    tops = {file.name.partition('/')[0].lower() for file in files if '/' in file.name}
    has_splits, others = bool(tops & SPLITS.keys()), ', '.join(sorted(tops - SPLITS.keys()))
    if has_splits and others:
        raise UsageError(
            f'{folder} has other folders beside those of the splits ({others}): rename them to '
            'train, val or test, or move them elsewhere.'
        )
    found: dict[str, Pictures] = {'train': {}, 'validation': {}, 'test': {}}
    for file in files:
        *inside, last = file.name.split('/')
        split = SPLITS[inside.pop(0).lower()] if has_splits and inside else 'train'
        pictures = found[split].setdefault(inside[0], []) if inside else None
        suffix = Path(last).suffix.lower()
        if pictures is not None and suffix in suffixes:
            pictures.append(file)
        else:
            ignored[suffix or 'no suffix'] += 1
    return found


def _divide(found: Pictures, **shares: float) -> dict[str, Pictures]:
    """Divide `found` into train and the splits of `shares`, each class in proportion."""
    splits: dict[str, Pictures] = {split: {} for split in ('train', *shares)}
    for label, files in found.items():
        rest = sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.name)).digest())
        for split, share in shares.items():
            take = round(share * len(files))
            splits[split][label], rest = rest[:take], rest[take:]
        splits['train'][label] = rest
    return splits
