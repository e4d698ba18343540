"""A data set of a user's own pictures, in one folder per class."""

import collections
import hashlib
import os
import re
import textwrap
from pathlib import Path

from alexnet_jax.command import log
from alexnet_jax.data.prepare import archives
from alexnet_jax.data.prepare.shards import Member, Source
from alexnet_jax.data.prepared import FETCHED, OFFICIAL
from alexnet_jax.errors import UsageError

# Names of folders that are splits, here and elsewhere.
SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test'}  # fmt: skip
ORDER = ('train', 'validation', 'test', '')
KINDS = frozenset(
    ('.bmp', '.gif', '.jfif', '.jpe', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
     '.webp', '.avif')
)  # fmt: skip
RESERVED = (*FETCHED, *OFFICIAL, 'decoded')
LIST_WIDTH = 4000  # characters of the list of classes that is reported

Pictures = dict[str, list[Member]]  # {class: its pictures}


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
        UsageError: the name is not usable, or the folders are not those of a data set.
        OSError: a folder or picture cannot be read.
    """
    ignored = collections.Counter[str]()
    splits, name = _splits(folder, ignored), _name(name, folder)
    if splits.keys() == {'train'}:
        splits = _divide(splits['train'], validation=validation, test=test)
    classes = sorted(splits.get('train', ()))
    if reason := _misfit(classes, splits, ignored):
        raise UsageError(
            f'{folder} {reason}: give it one folder per class, or train/ (and val/ and test/) with '
            'one folder per class each, and no other folders.'
        )
    every = [
        (split, member._replace(label=label))
        for split, found in splits.items()
        for label, one in enumerate(classes)
        for member in found.get(one, ())
    ]
    counts = {split: sum(map(len, found.values())) for split, found in splits.items()}
    per_class = collections.Counter(member.label for _, member in every)
    listed = ', '.join(f'{one} {per_class[label]:,}' for label, one in enumerate(classes))
    listed = textwrap.shorten(listed, LIST_WIDTH, placeholder=' ...')
    log(f'{folder}: {len(classes):,} classes: {listed}')
    log(f'{folder}: ' + ', '.join(f'{split} {count:,} images' for split, count in counts.items()))
    if ignored:
        log(f'{folder}: {_endings(ignored)}')

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


def _splits(folder: Path, ignored: collections.Counter[str]) -> dict[str, Pictures]:
    """Return {split: {class: pictures}}, 'train' alone if no folder is a split.

    If some folders are splits, all others count as split ''.
    """
    places = [(SPLITS.get(path.name.lower(), ''), path) for path in _subfolders(folder)]
    if not any(split for split, _ in places):
        places = [('train', folder)]
    found: dict[str, Pictures] = {}
    for split, place in sorted(places, key=lambda one: ORDER.index(one[0])):
        pictures = found.setdefault(split, {})
        for one in _subfolders(place):
            pictures.setdefault(one.name, [])
        for entry in archives.folder_entries(place):
            label, *inside = entry.path.relative_to(place).parts
            if inside and entry.path.suffix.lower() in KINDS:
                file = entry.path.relative_to(folder).as_posix()
                pictures[label].append(Member(file, -1, file, 0, entry.size, entry.stamp))
            else:
                ignored[entry.path.suffix.lower()] += 1
        for members in pictures.values():
            members.sort()
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not archives.is_leftover(p.name))


def _misfit(
    classes: list[str], splits: dict[str, Pictures], ignored: collections.Counter[str]
) -> str:
    """Return why folders are not those of a data set, completing '<folder> ...'; '' if they are."""
    if '' in splits or 'train' not in splits:
        return 'mixes splits and classes, or has no train'
    for one, members in splits['train'].items():
        if not members:
            return f'has no or too few images of class {one!a} to train on ({_endings(ignored)})'
    for split, found in splits.items():
        if unknown := sorted(found.keys() - set(classes)):
            return f'has class {unknown[0]!a} in {split}, but not in train'
        if not any(found.values()):
            return f'has no folder of pictures in {split} ({_endings(ignored)})'
    if len(classes) < 2:
        return 'has only one folder of images, and at least two are needed'
    return ''


def _endings(ignored: collections.Counter[str]) -> str:
    """List the endings of ignored files."""
    listed = ', '.join(f'{end or "no suffix"} {n:,}' for end, n in ignored.most_common())
    hint = '; convert HEIC to JPEG first' if {'.heic', '.heif'} & ignored.keys() else ''
    return f'ignored files: {listed or "none"}{hint}'


def _divide(found: Pictures, **shares: float) -> dict[str, Pictures]:
    """Divide `found` into train and the splits of `shares`, each class in proportion."""
    splits: dict[str, Pictures] = {split: {} for split in ('train', *shares)}
    for label, members in found.items():
        rest = sorted(members, key=lambda m: hashlib.blake2b(os.fsencode(m.name)).digest())
        for split, share in shares.items():
            take = round(share * len(members))
            splits[split][label], rest = rest[:take], rest[take:]
        splits['train'][label] = rest
    return {
        split: parts for split, parts in splits.items() if split == 'train' or any(parts.values())
    }
