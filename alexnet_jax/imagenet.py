"""The official archives of ILSVRC-2010 and ILSVRC-2012, as they are downloaded.

A label comes from the name of a picture (its WordNet id, or its number and the ground truth of that
number), never from its place in an archive; and all pictures have to be there.
"""

import hashlib
import importlib.util
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from alexnet_jax import archives
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.prepared import Meter, Report
from alexnet_jax.shard_writer import Member, Source
from alexnet_jax.statistics import Statistics

DEVKIT_BYTES = 2**26  # of a file in a development kit, at most: the largest has 1.5 MB


@dataclass(frozen=True)
class Archive:
    """An official tar file of pictures; sums and sizes are None where nobody published them."""

    name: str
    images: int
    size: int | None = None  # bytes
    md5: str | None = None


@dataclass(frozen=True)
class Challenge:
    """One year's data set."""

    name: str
    year: int
    archives: Mapping[str, Archive]  # by split
    devkit: str
    devkit_md5: str | None
    truths: Mapping[str, str]  # {split: file of its ground truth, in the devkit or beside it}
    classes: int = 1000


# Sizes: TFDS 4.9.10, datasets/imagenet2012/checksums.tsv. Sums: image-net.org's download page, also
# in torchvision/datasets/imagenet.py.
ILSVRC_2012 = Challenge(
    name='imagenet2012',
    year=2012,
    archives={
        'train': Archive(
            'ILSVRC2012_img_train.tar',
            1_281_167,
            147_897_477_120,
            '1d675b47d978889d74fa0da5fadfb00e',
        ),
        'validation': Archive(
            'ILSVRC2012_img_val.tar', 50_000, 6_744_924_160, '29b22e2961454d5413ddabcf34fc5622'
        ),
    },
    devkit='ILSVRC2012_devkit_t12.tar.gz',
    devkit_md5='fa75699e90414af021442c21a62c3abf',
    truths={'validation': 'ILSVRC2012_validation_ground_truth.txt'},
)
# Counts: the paper's section 2 and the development kit. No official sums are known.
ILSVRC_2010 = Challenge(
    name='imagenet2010',
    year=2010,
    archives={
        'train': Archive('ILSVRC2010_images_train.tar', 1_261_406),
        'validation': Archive('ILSVRC2010_images_val.tar', 50_000),
        'test': Archive('ILSVRC2010_images_test.tar', 150_000),
    },
    devkit='ILSVRC2010_devkit-1.0.tar.gz',
    devkit_md5=None,
    truths={
        'validation': 'ILSVRC2010_validation_ground_truth.txt',
        'test': 'ILSVRC2010_test_ground_truth.txt',
    },
)
PATCHES = 'patch_images.tar'  # 2010's own corrections of pictures that came out blank

# Colours of the ILSVRC training images: roots of the eigenvalues, and the eigenvectors as columns,
# rows R, G, B. From `make-data/input_meta` of cuda-convnet2: the 2012 program reads them from its
# data's meta file (`color_pca`), which is not in the release.
COLOURS = Statistics(
    mean_image=np.zeros((0, 0, 3), np.float32),  # not known
    colour_std=np.array([121.78, 37.09, 19.72], np.float32),
    colour_vectors=np.array(
        [[-0.5635, -0.7126, 0.4180], [-0.5762, -0.0235, -0.8170], [-0.5920, 0.7012, 0.3973]],
        np.float32,
    ),
)


class Classes(NamedTuple):
    """The classes of a challenge, by label: sorted by WordNet id, as TFDS has them."""

    wnids: tuple[str, ...]
    words: tuple[str, ...]  # () where they are not known
    train_images: tuple[int, ...]  # () where they are not known
    truths: dict[str, list[int]]  # {split: label of picture number 1, 2, ...}


def source(challenge: Challenge, folder: Path) -> Source:
    """The pictures of a challenge from its official files in `folder`.

    Raises:
        UsageError: there is no such folder.
        RunError: a file is missing, not whole, or not the official one.
    """
    if not folder.is_dir():
        raise UsageError(f'--source={folder} is no folder: name the one with the official files.')
    for archive in challenge.archives.values():
        _check_size(folder / archive.name, archive)
    classes = _classes(challenge, folder)
    inputs = [folder / archive.name for archive in challenge.archives.values()]
    inputs += [folder / name for name in (challenge.devkit, PATCHES, *challenge.truths.values())]
    return Source(
        name=challenge.name,
        folder=folder,
        description=f'ILSVRC-{challenge.year}: {challenge.classes:,} classes of ImageNet.',
        class_names=classes.wnids,
        words=classes.words,
        made_of={
            archive.name: archive.md5 or f'{archive.images:,} images'
            for archive in challenge.archives.values()
        },
        inputs=sorted(path for path in inputs if path.exists()),
        members=lambda report: _members(challenge, folder, classes, report),
        constants=COLOURS,
        images=sum(archive.images for archive in challenge.archives.values()),
    )


def _check_size(path: Path, archive: Archive) -> None:
    if not path.is_file():
        raise RunError(
            f'{path} is missing: put the official files there, from image-net.org after '
            'registration.'
        )
    there = path.stat().st_size
    if archive.size is not None and there < archive.size:
        raise RunError(
            f'{path} is a partial download ({there:,} of {archive.size:,} bytes): go on with it.'
        )
    if archive.size is not None and there > archive.size:
        raise RunError(
            f'{path} is not the official file ({there:,} bytes, not {archive.size:,}): fetch it '
            'again.'
        )


# ---- the pictures ---------------------------------------------------------------------------


def _members(
    challenge: Challenge, folder: Path, classes: Classes, report: Report
) -> Iterator[tuple[str, Member]]:
    """Every picture of every split, replaced by its correction where there is one."""
    patches = _patches(folder, report) if challenge.year == 2010 else {}
    for split, archive in challenge.archives.items():
        path = folder / archive.name
        with Meter(
            f'looking through {archive.name}', path.stat().st_size, 'GB', report, 10**9
        ) as m:
            found = archives.entries(path, archive.md5, m.to)
            read = _train if split == 'train' else _numbered
            for member in read(challenge, split, path, found, classes):
                yield split, patches.get(member.name, member)._replace(label=member.label)


def _train(
    challenge: Challenge,
    split: str,
    path: Path,
    found: Iterator[archives.Entry],
    classes: Classes,
) -> Iterator[Member]:
    """The training pictures: a tar file a class, named by its WordNet id, as they are."""
    labels = {wnid: label for label, wnid in enumerate(classes.wnids)}
    counts = [0] * len(labels)
    seen: set[str] = set()  # of the class at hand
    inside = None
    for entry in found:
        name, wnid = PurePosixPath(entry.name).name, PurePosixPath(entry.inside).stem
        if wnid not in labels or not name.startswith(f'{wnid}_'):
            raise RunError(
                f'{path} holds {entry.name!a} in {entry.inside!a}, which is no picture of '
                f'a class of {challenge.name}: this is not the official file.'
            )
        if entry.inside != inside:
            if counts[labels[wnid]]:
                raise _twice(path, entry.inside)
            inside, seen = entry.inside, set()
        if name in seen:
            raise _twice(path, name)
        seen.add(name)
        counts[labels[wnid]] += 1
        yield Member(name, labels[wnid], path.name, entry.offset, entry.size)
    expected = challenge.archives[split].images
    for wnid, label in labels.items():
        wanted = classes.train_images[label] if classes.train_images else max(1, counts[label])
        if counts[label] != wanted:
            raise RunError(
                f'{path} holds {counts[label]:,} pictures of class {wnid}, not {wanted:,}, and '
                f'{sum(counts):,} of {expected:,} in all: it is not whole; fetch it again.'
            )
    _check_count(path, sum(counts), expected)


def _numbered(
    challenge: Challenge,
    split: str,
    path: Path,
    found: Iterator[archives.Entry],
    classes: Classes,
) -> Iterator[Member]:
    """Validation or test pictures, whose labels follow from the numbers in their names."""
    expected, truth = challenge.archives[split].images, classes.truths[split]
    part = 'test' if split == 'test' else 'val'
    pattern = re.compile(rf'ILSVRC{challenge.year}_{part}_(\d{{8}})\.JPEG')
    seen = np.zeros(expected + 1, bool)
    for entry in found:
        name = PurePosixPath(entry.name).name
        match = pattern.fullmatch(name)
        if entry.inside or match is None or not 1 <= int(match[1]) <= expected:
            raise RunError(
                f'{path} holds {entry.name!a}, which is no {split} picture of '
                f'{challenge.name}: this is not the official file.'
            )
        number = int(match[1])
        if seen[number]:
            raise _twice(path, name)
        seen[number] = True
        yield Member(name, truth[number - 1], path.name, entry.offset, entry.size)
    first = int(np.argmin(seen[1:])) + 1
    _check_count(path, int(seen.sum()), expected, f', number {first:,} the first of them')


def _check_count(path: Path, there: int, expected: int, which: str = '') -> None:
    if there != expected:
        raise RunError(
            f'{path} holds {there:,} of {expected:,} pictures: {expected - there:,} are missing'
            f'{which}; it is not whole: fetch it again.'
        )


def _twice(path: Path, name: str) -> RunError:
    return RunError(f'{path} holds {name!a} twice: this is not the official file.')


def _patches(folder: Path, report: Report) -> dict[str, Member]:
    """2010's corrected pictures, by name."""
    path = folder / PATCHES
    if not path.exists():
        report(f'{path} is not there: the few pictures that it corrects stay blank')
        return {}
    found = {}
    for entry in archives.entries(path):
        name = PurePosixPath(entry.name).name
        found[name] = Member(name, -1, path.name, entry.offset, entry.size)
    return found


# ---- the classes ----------------------------------------------------------------------------


def _classes(challenge: Challenge, folder: Path) -> Classes:
    """From the development kit, or for 2012 from the lists that TFDS ships, which have no words."""
    devkit = folder / challenge.devkit
    if devkit.exists():
        return _from_devkit(challenge, folder, devkit)
    if challenge.year == 2012:
        return tfds_lists()
    raise RunError(f'{devkit} is missing: it names the classes and the validation labels.')


def _from_devkit(challenge: Challenge, folder: Path, devkit: Path) -> Classes:
    content = devkit.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if challenge.devkit_md5 not in (None, md5):
        raise _not_official(devkit, f'its md5 is {md5}')
    wanted = ('meta.mat', *challenge.truths.values())
    try:
        found = _take(content, wanted)
        rows = _synsets(found['meta.mat'], f'ILSVRC{challenge.year}_ID')
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError, ValueError) as error:
        raise _not_official(devkit, f'{type(error).__name__}: {error}') from None
    rows = {i: row for i, row in rows.items() if 1 <= i <= challenge.classes}
    if len(rows) != challenge.classes:
        raise _not_official(devkit, f'it lists {len(rows):,} classes, not {challenge.classes:,}')
    order = sorted(rows, key=lambda i: rows[i].wnid)
    label = {i: place for place, i in enumerate(order)}
    return Classes(
        wnids=tuple(rows[i].wnid for i in order),
        words=tuple(rows[i].words for i in order),
        train_images=tuple(rows[i].train_images for i in order),
        truths={
            split: _truth(challenge, split, folder, name, found, label)
            for split, name in challenge.truths.items()
        },
    )


def _truth(
    challenge: Challenge,
    split: str,
    folder: Path,
    name: str,
    found: Mapping[str, bytes],
    label: Mapping[int, int],
) -> list[int]:
    """The labels of the numbered pictures of a split, from the kit or from a file beside it."""
    if name in found:
        text = found[name].decode('ascii', 'replace')
    elif (folder / name).exists():
        text = (folder / name).read_text('ascii', 'replace')
    else:
        raise RunError(f'{folder / name} is missing: it holds the labels of the {split} pictures.')
    try:
        truth = [label[int(line)] for line in text.split()]
    except (ValueError, KeyError) as error:
        raise _not_official(folder / name, f'it holds {error}, which is no class') from None
    expected = challenge.archives[split].images
    if len(truth) != expected:
        raise _not_official(folder / name, f'it holds {len(truth):,} labels, not {expected:,}')
    return truth


def _take(content: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The files of these names out of a development kit, wherever in it they lie."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode='r:gz') as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            file = tar.extractfile(member) if name in names and member.isreg() else None
            if file is not None:
                if member.size > DEVKIT_BYTES:
                    raise ValueError(f'{name} has {member.size:,} bytes')
                found[name] = file.read()
    return found


class _Synset(NamedTuple):
    wnid: str
    words: str
    train_images: int


def _synsets(meta: bytes, id_field: str) -> dict[int, _Synset]:
    """The rows of meta.mat, by the number that the challenge gave them."""
    from scipy.io import loadmat  # JAX needs SciPy, so it is there

    rows = loadmat(io.BytesIO(meta), squeeze_me=True)['synsets']
    return {
        int(row[id_field]): _Synset(
            str(row['WNID']), str(row['words']), int(row['num_train_images'])
        )
        for row in rows
    }


def tfds_lists() -> Classes:
    """What TFDS ships of 2012: the classes, and those of the validation pictures by number."""
    spec = importlib.util.find_spec('tensorflow_datasets')  # found, not imported: that takes long
    if spec is None or not spec.submodule_search_locations:
        raise RunError('tensorflow-datasets, which lists the classes, is not installed.')
    folder = Path(spec.submodule_search_locations[0], 'datasets', 'imagenet2012')
    wnids = tuple((folder / 'labels.txt').read_text().split())
    label = {wnid: place for place, wnid in enumerate(wnids)}
    truth = [label[wnid] for wnid in (folder / 'validation_labels.txt').read_text().split()]
    return Classes(wnids, (), (), {'validation': truth})


def _not_official(path: Path, reason: str) -> RunError:
    return RunError(f'{path} is not the official file ({reason}): fetch it again.')
