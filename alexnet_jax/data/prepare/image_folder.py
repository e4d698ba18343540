"""Pictures of one's own: a folder a class."""

import collections
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from alexnet_jax.data import images
from alexnet_jax.data.prepare import archives
from alexnet_jax.data.prepare.shards import Member, Source
from alexnet_jax.data.prepared import FETCHED, OFFICIAL, Report
from alexnet_jax.errors import UsageError

# What folders of splits are called, here and elsewhere.
CALLED = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test'}  # fmt: skip
KINDS = frozenset(
    ('.bmp', '.gif', '.jfif', '.jpe', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
     '.webp', '.avif')
)  # fmt: skip
RESERVED = (*FETCHED, *OFFICIAL, 'decoded')
LISTED = 100  # classes in the report

Pictures = dict[str, list[Member]]  # {class: its pictures}


def source(
    folder: Path, name: str | None = None, *, validation: float = 0.1, test: float = 0.1
) -> Source:
    """Return the pictures of `folder`: train/CLASS/..., val/CLASS/..., test/CLASS/...; or CLASS/...

    If there is one split only it is divided, class by class, by a hash of the names: nearly all
    pictures stay in their split when others are added.

    Args:
        folder: its subfolders are the classes, or the splits and theirs the classes. Hidden files,
            what systems leave behind (`archives.LEFTOVERS`) and what does not end like a picture
            are passed over.
        name: of the data set; that of the folder if not given.
        validation: the share of it that validates, if the folder has one split.
        test: the share of it that tests, likewise.

    Raises:
        UsageError: there are no pictures, or the folders do not fit together.
        RunError: a folder or picture cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f'--source={folder} is no folder: name one with a folder a class.')
    name = _name(name, folder)
    passed_over: collections.Counter[str] = collections.Counter()
    splits = _splits(folder, passed_over)
    classes = sorted(splits['train'])
    for split, found in splits.items():
        if unknown := sorted(found.keys() - set(classes)):
            raise UsageError(f'{folder}: {split} has class {unknown[0]!a}, which train has not.')
    if len(classes) < 2:
        raise UsageError(f'{folder} has {len(classes)} class(es) of pictures: give two at least.')
    if list(splits) == ['train']:
        splits = _divide(folder, splits['train'], validation=validation, test=test)
    labelled = {
        split: [
            m._replace(label=label) for label, c in enumerate(classes) for m in found.get(c, ())
        ]
        for split, found in splits.items()
    }
    counts = {split: len(members) for split, members in labelled.items()}
    return Source(
        name=name,
        folder=folder,
        description=f'Pictures of {len(classes)} classes.',
        class_names=tuple(classes),
        words=(),
        made_of=dict(
            images=counts, validation=validation, test=test, names_and_sizes=_digest(splits)
        ),
        images=counts,
        inputs=(folder / m.file for members in labelled.values() for m in members),
        members=lambda report: _members(folder, labelled, classes, passed_over, report),
    )


def _name(name: str | None, folder: Path) -> str:
    """Return a name in the form that TFDS wants."""
    made = name or re.sub(r'\W+', '_', folder.resolve().name.lower(), flags=re.ASCII).strip('_')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', made):
        raise UsageError(
            f"A data set cannot be called '{made}': --name it with small letters, digits and _."
        )
    if made in RESERVED:
        raise UsageError(f"'{made}' is the name of another data set: choose one with --name.")
    return made


def _splits(folder: Path, passed_over: collections.Counter[str]) -> dict[str, Pictures]:
    """Return {split: {class: pictures}}, 'train' alone if no folder is a split."""
    inside = _subfolders(folder)
    named = [path for path in inside if path.name.lower() in CALLED]
    if not any(CALLED[path.name.lower()] == 'train' for path in named):
        if named and len(named) == len(inside):
            raise UsageError(f'{folder} has splits, and no folder train among them.')
        named = [folder]
    elif other := [path.name for path in inside if path not in named]:
        raise UsageError(
            f'{folder} has train and {other[0]!a}, which is no split: move it away, or give the '
            'folder that has the classes.'
        )
    found: dict[str, Pictures] = {}
    for path in named:
        split = 'train' if path == folder else CALLED[path.name.lower()]
        if split in found:
            raise UsageError(f'{folder} has two folders for the split {split}: leave one.')
        found[split] = {one.name: _pictures(folder, one, passed_over) for one in _subfolders(path)}
        if not found[split]:
            raise UsageError(f'{path} has no folder of pictures in it: give one to each class.')
        for stray in (one for one in path.iterdir() if one.is_file()):
            if not archives.is_leftover(stray.name):
                passed_over[stray.suffix.lower()] += 1
    return {split: found[split] for split in ('train', 'validation', 'test') if split in found}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not archives.is_leftover(p.name))


def _pictures(root: Path, folder: Path, passed_over: collections.Counter[str]) -> list[Member]:
    """Return all pictures of a class, however deep."""
    if not folder.name.isprintable():
        raise UsageError(f'{folder.name!a} is no name for a class: rename that folder.')
    members, others = [], collections.Counter[str]()
    for entry in archives.folder_entries(folder):
        if entry.path.suffix.lower() in KINDS:
            file = entry.path.relative_to(root).as_posix()
            members.append(Member(file, -1, file, 0, entry.size, entry.stamp))
        else:
            others[entry.path.suffix.lower()] += 1
    if not members:
        raise UsageError(f'{folder} holds no picture{_heic(others)}: put some there, or remove it.')
    passed_over.update(others)
    return sorted(members)


def _heic(endings: collections.Counter[str]) -> str:
    count = endings['.heic'] + endings['.heif']
    return f' but {count:,} in HEIC, and {images.CONVERT_HEIC}' if count else ''


def _divide(folder: Path, found: Pictures, **shares: float) -> dict[str, Pictures]:
    """Part `found` into train and the splits of `shares`, each class in proportion."""
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        given = ' and '.join(f'--{split}={share}' for split, share in shares.items())
        raise UsageError(f'{given} are shares, 0 or more each, and leave something to train on.')
    splits: dict[str, Pictures] = {split: {} for split in ('train', *shares)}
    for label, members in found.items():
        rest = sorted(members, key=lambda m: hashlib.blake2b(os.fsencode(m.name)).digest())
        for split, share in shares.items():
            take = round(share * len(members))
            splits[split][label], rest = rest[:take], rest[take:]
        if not rest:
            raise UsageError(f'{folder / label} has too few pictures ({len(members)}) to divide.')
        splits['train'][label] = rest
    return {split: parts for split, parts in splits.items() if any(parts.values())}


def _digest(splits: dict[str, Pictures]) -> str:
    """Return a hash that changes with the pictures, and not when they are copied elsewhere."""
    digest = hashlib.sha256()
    for split, found in splits.items():
        for member in (m for members in found.values() for m in members):
            digest.update(f'{split} {member.size} {member.name!a}\n'.encode())
    return digest.hexdigest()


def _members(
    folder: Path,
    labelled: dict[str, list[Member]],
    classes: list[str],
    passed_over: collections.Counter[str],
    report: Report,
) -> Iterator[tuple[str, Member]]:
    counts = collections.Counter(m.label for members in labelled.values() for m in members)
    listed = [f'{name} {counts[label]:,}' for label, name in enumerate(classes[:LISTED])]
    more = f' and {len(classes) - LISTED:,} more' if len(classes) > LISTED else ''
    report(f'{folder}: {len(classes):,} classes: {", ".join(listed)}{more}')
    for split, members in labelled.items():
        report(f'{folder}: {split}, {len(members):,} pictures')
    if passed_over:
        kinds = ', '.join(f'{end or "no ending"} {n:,}' for end, n in passed_over.most_common())
        report(f'{folder}: passed over, as no pictures of a class ({kinds}){_heic(passed_over)}')
    for split, members in labelled.items():
        yield from ((split, member) for member in members)
