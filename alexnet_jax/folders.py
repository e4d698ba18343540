"""Anyone's own pictures: a folder a class."""

import collections
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from alexnet_jax import archives
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.prepared import OFFICIAL, Report
from alexnet_jax.shard_writer import Member, Source

# What folders of splits are called, here and elsewhere.
CALLED = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test'}  # fmt: skip
KINDS = frozenset(
    ('.bmp', '.gif', '.jfif', '.jpe', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
     '.webp', '.avif')
)  # fmt: skip
RESERVED = ('fashion_mnist', *OFFICIAL, 'decoded')

Pictures = dict[str, list[str]]  # {class: its pictures, as names seen from the source's folder}


def source(
    folder: Path, name: str | None = None, *, validation: float = 0.1, test: float = 0.1
) -> Source:
    """The pictures of `folder`: train/CLASS/..., val/CLASS/..., test/CLASS/...; or CLASS/...

    Where there is one split only it is divided, class by class, by a hash of the names: so nearly
    all pictures stay in their split when others are added.

    Args:
        folder: its subfolders are the classes, or the splits and theirs the classes. Hidden files
            are passed over, and those that do not end as pictures do or lie in no class's folder;
            of these it is said.
        name: of the data set; that of the folder if not given.
        validation: the share of it that validates, where the folder has no split of its own.
        test: likewise.

    Raises:
        UsageError: there are no pictures, or the folders do not fit together.
        RunError: a folder or picture cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f'--source={folder} is no folder: name one with a folder a class.')
    name = _name(name, folder)
    splits = _splits(folder)
    classes = sorted(splits['train'])
    for split, found in splits.items():
        for unknown in sorted(found.keys() - set(classes)):
            raise UsageError(f'{folder}: {split} has class {unknown!a}, which train has not.')
    if len(classes) < 2:
        raise UsageError(
            f'{folder} has {len(classes)} class(es) of pictures: two at least, please.'
        )
    if list(splits) == ['train']:
        splits = _divide(folder, splits['train'], validation=validation, test=test)
    labels = {label: place for place, label in enumerate(classes)}
    counts = {split: sum(map(len, found.values())) for split, found in splits.items()}
    return Source(
        name=name,
        folder=folder,
        description=f'Pictures of {len(classes)} classes.',
        class_names=tuple(classes),
        words=(),
        made_of=dict(
            images=counts, validation=validation, test=test, names_and_sizes=_digest(folder, splits)
        ),
        inputs=(
            folder / file for found in splits.values() for one in found.values() for file in one
        ),
        members=lambda report: _members(folder, splits, labels, report),
        images=sum(counts.values()),
    )


def _digest(folder: Path, splits: dict[str, Pictures]) -> str:
    """Changes with the pictures, and not when they are copied elsewhere."""
    digest = hashlib.sha256()
    for split, found in splits.items():
        for name in (name for names in found.values() for name in names):
            digest.update(f'{split} {_size(folder / name)} {name!a}\n'.encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise archives.unreadable(path, error) from None


def _name(name: str | None, folder: Path) -> str:
    """A name as TFDS wants it."""
    made = name or re.sub(r'\W+', '_', folder.resolve().name.lower(), flags=re.ASCII).strip('_')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', made):
        raise UsageError(
            f"A data set cannot be called '{made}': --name it with small letters, digits and _."
        )
    if made in RESERVED:
        raise UsageError(f"'{made}' is the name of another data set: choose one with --name.")
    return made


def _splits(folder: Path) -> dict[str, Pictures]:
    """What lies there: {split: {class: pictures}}, 'train' alone where no folder is a split."""
    inside = _folders(folder)
    named = [path for path in inside if path.name.lower() in CALLED]
    if not any(CALLED[path.name.lower()] == 'train' for path in named):
        if named and len(named) == len(inside):
            raise UsageError(f'{folder} has splits, and no folder train among them.')
        return {'train': {path.name: _pictures(folder, path) for path in inside}}
    found: dict[str, Pictures] = {}
    for path in named:
        split = CALLED[path.name.lower()]
        if split in found:
            raise UsageError(f'{folder} has two folders for the split {split}: leave one.')
        found[split] = {one.name: _pictures(folder, one) for one in _folders(path)}
        if not found[split]:
            raise UsageError(
                f'{path} has no folder a class: sort its pictures into such folders, or move it '
                'away.'
            )
    for path in inside:
        if path not in named:
            raise UsageError(
                f'{folder} has train and {path.name!a}, which is no split: are the classes in '
                'it, or is it a class? Move it away.'
            )
    return {split: found[split] for split in ('train', 'validation', 'test') if split in found}


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _pictures(root: Path, folder: Path) -> list[str]:
    """All pictures of a class, however deep."""
    if not folder.name.isprintable():
        raise UsageError(f'{folder.name!a} is no name for a class: rename that folder.')
    names = []
    for place, inside, found in os.walk(folder, onerror=_refuse):
        inside[:] = [name for name in inside if not name.startswith('.')]
        for link in (Path(place, name) for name in inside if Path(place, name).is_symlink()):
            raise UsageError(
                f'{link} is a link, and links within a class are not followed: put its pictures '
                'there, or remove it.'
            )
        names += [
            Path(place, name).relative_to(root).as_posix() for name in found if _is_picture(name)
        ]
    if not names:
        raise UsageError(f'{folder} holds no picture: put some there, or remove it.')
    return sorted(names)


def _refuse(error: OSError) -> None:
    raise RunError(
        f'{error.filename} cannot be read ({error.strerror}): its pictures would be missing; give '
        'read permission, or move it away.'
    ) from None


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in KINDS and not name.startswith('.')


def _passed_over(folder: Path, splits: dict[str, Pictures]) -> str:
    """How many files belong to no class, by their endings: '.heic 812, .jpg 1'; or ''."""
    taken = {name for found in splits.values() for names in found.values() for name in names}
    paths = (Path(place, name) for place, _, found in os.walk(folder) for name in found)
    endings = collections.Counter(
        path.suffix.lower() or 'without an ending'
        for path in paths
        if not path.name.startswith('.') and path.relative_to(folder).as_posix() not in taken
    )
    return ', '.join(f'{ending} {count:,}' for ending, count in endings.most_common())


def _divide(folder: Path, found: Pictures, **shares: float) -> dict[str, Pictures]:
    """Part `found` into train and the splits of `shares`, each class in proportion."""
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        said = ' and '.join(f'--{split}={share}' for split, share in shares.items())
        raise UsageError(f'{said} are shares, 0 or more each, and leave something to train on.')
    splits: dict[str, Pictures] = {split: {} for split in ('train', *shares)}
    for label, names in found.items():
        rest = sorted(names, key=lambda name: hashlib.blake2b(os.fsencode(name)).digest())
        for split, share in shares.items():
            take = round(share * len(names))
            splits[split][label], rest = rest[:take], rest[take:]
        if not rest:
            raise UsageError(f'{folder / label} has too few pictures ({len(names)}) to be divided.')
        splits['train'][label] = rest
    return {split: parts for split, parts in splits.items() if any(parts.values())}


def _members(
    folder: Path, splits: dict[str, Pictures], labels: dict[str, int], report: Report
) -> Iterator[tuple[str, Member]]:
    if passed_over := _passed_over(folder, splits):
        report(f'{folder}: passed over, as no pictures in the folder of a class: {passed_over}')
    for split, found in splits.items():
        report(f'{folder}: {split}, {sum(map(len, found.values())):,} pictures')
        for label, names in found.items():
            for name in names:
                yield split, Member(name, labels[label], name, 0, _size(folder / name))
