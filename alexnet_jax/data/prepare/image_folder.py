"""A data set of a user's own pictures, in one folder per class."""

import collections
import hashlib
import itertools
import os
import re
import textwrap
from pathlib import Path

from alexnet_jax.command import log
from alexnet_jax.data import images
from alexnet_jax.data.prepare import archives
from alexnet_jax.data.prepare.shards import Member, Source
from alexnet_jax.data.prepared import FETCHED, OFFICIAL
from alexnet_jax.errors import UsageError

# Names of folders that are splits, here and elsewhere.
SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test'}  # fmt: skip
KINDS = frozenset(
    ('.bmp', '.gif', '.jfif', '.jpe', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
     '.webp', '.avif')
)  # fmt: skip
HEIC = ('.heic', '.heif')
RESERVED = (*FETCHED, *OFFICIAL, 'decoded')
LIST_WIDTH = 4000  # characters of the list of classes that is reported

Pictures = dict[str, list[Member]]  # {class: its pictures}
Counts = collections.Counter[str]


def source(
    folder: Path, name: str | None = None, *, validation: float = 0.1, test: float = 0.1
) -> Source:
    """Return the pictures of `folder`: train/CLASS/..., val/CLASS/..., test/CLASS/...; or CLASS/...

    A single split is divided, class by class, by a hash of the names: nearly all pictures stay in
    their split when others are added.

    Args:
        folder: its subfolders are the classes, or the splits and theirs the classes. Hidden files,
            `archives.LEFTOVERS` and files that are no pictures by their ending are ignored.
        name: of the data set; that of the folder if not given.
        validation: the share of it that validates, if the folder has one split.
        test: the share of it that tests, likewise.

    Raises:
        UsageError: there are no pictures, or the folders do not fit together.
        OSError: a folder or picture cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f'--source={folder} is not a folder: give one with a folder per class.')
    ignored = Counts()
    splits, name = _splits(folder, ignored), _name(name, folder)
    classes = _classes(folder, splits)
    if list(splits) == ['train']:
        splits = _divide(splits['train'], validation=validation, test=test)
    labelled = {
        split: [
            m._replace(label=label) for label, c in enumerate(classes) for m in found.get(c, ())
        ]
        for split, found in splits.items()
    }
    counts = {split: len(members) for split, members in labelled.items()}
    _list(folder, labelled, classes, ignored)
    every = [(split, m) for split, members in labelled.items() for m in members]

    content, times = hashlib.sha256(), hashlib.sha256()
    for split, m in every:  # `content` does not change when pictures are copied elsewhere
        content.update(f'{split} {m.size} {m.name!a}\n'.encode())
        times.update(f'{m.stamp}\n'.encode())
    return Source(
        name=name,
        folder=folder,
        description=f'Pictures of {len(classes)} classes.',
        class_names=tuple(classes),
        words=(),
        made_of=dict(
            images=counts,
            validation=validation,
            test=test,
            names_and_sizes=content.hexdigest(),
        ),
        images=counts,
        stamp=times.hexdigest(),
        members=lambda: iter(every),
    )


def _name(name: str | None, folder: Path) -> str:
    """Return a name in the form that TFDS wants."""
    made = name or re.sub(r'\W+', '_', folder.resolve().name.lower(), flags=re.ASCII).strip('_')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', made) or made in RESERVED:
        raise UsageError(
            f"'{made}' cannot be the name of your data set: choose one with --name, made of "
            'lower-case letters, digits and _.'
        )
    return made


def _splits(folder: Path, ignored: Counts) -> dict[str, Pictures]:
    """Return {split: {class: pictures}}, 'train' alone if no folder is a split."""
    inside = _subfolders(folder)
    named = [(SPLITS[path.name.lower()], path) for path in inside if path.name.lower() in SPLITS]
    has_train = any(split == 'train' for split, _ in named)
    if named and has_train != (len(named) == len(inside)):
        raise UsageError(
            f'{folder} mixes splits and classes, or has no train: give it one folder per class, '
            'or train/ (and val/ and test/) with one folder per class each, and no other folders.'
        )
    found: dict[str, Pictures] = {}
    for split, path in named if has_train else [('train', folder)]:
        if not (classes := _subfolders(path)):
            raise UsageError(f'{path} has no folder of pictures in it: make one per class.')
        pictures = found.setdefault(split, {})
        for one in classes:
            pictures.setdefault(one.name, []).extend(_pictures(folder, one, ignored))
        strays = (one for one in path.iterdir() if one.is_file())
        ignored.update(p.suffix.lower() for p in strays if not archives.is_leftover(p.name))
    return {split: found[split] for split in ('train', 'validation', 'test') if split in found}


def _classes(folder: Path, splits: dict[str, Pictures]) -> list[str]:
    classes = sorted(splits['train'])
    for split, found in splits.items():
        if unknown := sorted(found.keys() - set(classes)):
            raise UsageError(f'{folder}: {split} has class {unknown[0]!a}, but train does not.')
    if len(classes) < 2:
        raise UsageError(
            f'{folder} has {len(classes)} folder(s) of images: at least two are needed.'
        )
    return classes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not archives.is_leftover(p.name))


def _pictures(root: Path, folder: Path, ignored: Counts) -> list[Member]:
    """Return all pictures of a class, however deep."""
    members, others = [], Counts()
    for entry in archives.folder_entries(folder):
        if entry.path.suffix.lower() in KINDS:
            file = entry.path.relative_to(root).as_posix()
            members.append(Member(file, -1, file, 0, entry.size, entry.stamp))
        else:
            others[entry.path.suffix.lower()] += 1
    if not members:
        advice = images.CONVERT_HEIC if any(map(others.get, HEIC)) else 'add some, or remove it'
        raise UsageError(f'{folder} contains no images ({_endings(others)}): {advice}.')
    ignored.update(others)
    return sorted(members)


def _endings(files: Counts) -> str:
    return ', '.join(f'{end or "no suffix"} {n:,}' for end, n in files.most_common()) or 'empty'


def _divide(found: Pictures, **shares: float) -> dict[str, Pictures]:
    """Divide `found` into train and the splits of `shares`, each class in proportion."""
    splits: dict[str, Pictures] = {split: {} for split in ('train', *shares)}
    for label, members in found.items():
        rest = sorted(members, key=lambda m: hashlib.blake2b(os.fsencode(m.name)).digest())
        for split, share in shares.items():
            take = round(share * len(members))
            splits[split][label], rest = rest[:take], rest[take:]
        if not rest:
            raise UsageError(
                f'class {label!a} has too few images ({len(members)}) to split: add some, or '
                'lower --validation and --test.'
            )
        splits['train'][label] = rest
    return {split: parts for split, parts in splits.items() if any(parts.values())}


def _list(
    folder: Path, labelled: dict[str, list[Member]], classes: list[str], ignored: Counts
) -> None:
    """Print the classes and splits found, and the files that are ignored."""
    counts = collections.Counter(m.label for m in itertools.chain(*labelled.values()))
    listed = ', '.join(f'{name} {counts[label]:,}' for label, name in enumerate(classes))
    listed = textwrap.shorten(listed, LIST_WIDTH, placeholder=' ...')
    log(f'{folder}: {len(classes):,} classes: {listed}')
    for split, members in labelled.items():
        log(f'{folder}: {split}, {len(members):,} images')
    if ignored:
        log(f'{folder}: ignored files that are not images of a class: {_endings(ignored)}')
    if any(map(ignored.get, HEIC)):
        log(f'{folder}: {images.CONVERT_HEIC}')
