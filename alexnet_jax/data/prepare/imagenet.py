"""ILSVRC-2010 and ILSVRC-2012, from the official tar files or from folders they were extracted to.

A label comes from the name of a picture (its WordNet id, or its number and the ground truth of that
number), never from its place in an archive. Every picture has to be there.
"""

import functools
import hashlib
import importlib.util
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from alexnet_jax.data.prepare import archives
from alexnet_jax.data.prepare.shards import Member, Source
from alexnet_jax.data.prepared import Report, progress
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import RunError, UsageError

# Where extracted pictures are found below --source: as Kaggle packs them, or beside each other.
PLACES = ('', 'ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC', 'CLS-LOC')
FOLDERS = {'train': ('train',), 'validation': ('val', 'validation'), 'test': ('test',)}


@dataclass(frozen=True)
class Archive:
    """An official tar file of pictures; size and md5 are None where nobody published them."""

    name: str
    images: int
    size: int | None = None  # bytes
    md5: str | None = None


@dataclass(frozen=True)
class Challenge:
    """The data set of one year."""

    name: str
    year: int
    archives: Mapping[str, Archive]  # by split
    devkit: str
    devkit_md5: str | None
    truths: Mapping[str, str]  # {split: file of its ground truth, in the kit or beside it}
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


@dataclass(frozen=True)
class Classes:
    """The classes of a challenge, by label: sorted by WordNet id, as TFDS has them."""

    wnids: tuple[str, ...]
    words: tuple[str, ...]  # () where they are not known
    train_images: tuple[int, ...]  # () where they are not known
    truths: dict[str, list[int]]  # {split: label of picture number 1, 2, ...}

    @functools.cached_property
    def labels(self) -> dict[str, int]:
        """Return {WordNet id: label}."""
        return {wnid: label for label, wnid in enumerate(self.wnids)}


def source(challenge: Challenge, folder: Path) -> Source:
    """Return the pictures of a challenge, from its tar files in `folder` or from folders in it.

    Raises:
        UsageError: there is no such folder.
        RunError: a file is missing, incomplete, or not the official one.
    """
    if not folder.is_dir():
        raise UsageError(
            f'--source={folder} is no folder: name the one with the official files, or with the '
            'folders train and val.'
        )
    places = {split: _place(challenge, split, folder) for split in challenge.archives}
    classes = _classes(challenge, folder)
    kit = (challenge.devkit, PATCHES, *challenge.truths.values())
    inputs = [path for path in places.values() if path.is_file()]
    folders = [path for path in places.values() if path.is_dir()]
    inputs += [one for path in folders for one in (path, *sorted(path.glob('*/')))]
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
        images={split: archive.images for split, archive in challenge.archives.items()},
        inputs=[*inputs, *(folder / name for name in kit if (folder / name).exists())],
        members=lambda report: _members(challenge, folder, places, classes, report),
        constants=COLOURS,
    )


def _place(challenge: Challenge, split: str, folder: Path) -> Path:
    """Return the tar file of a split, or the folder that holds its extracted pictures."""
    archive = challenge.archives[split]
    path = folder / archive.name
    if not path.is_file():
        names = (*FOLDERS[split], Path(archive.name).stem)
        for found in (folder / place / name for place in PLACES for name in names):
            if found.is_dir():
                return found
        raise RunError(
            f'{path} is missing, and {folder} has no folder {FOLDERS[split][0]} with its pictures: '
            'put the official files there, from image-net.org after registration.'
        )
    size = path.stat().st_size
    if archive.size not in (None, size):
        raise RunError(
            f'{path} has {size:,} bytes and the official file {archive.size:,}: finish its '
            'download, or repeat it.'
        )
    return path


# ---- the pictures ---------------------------------------------------------------------------


def _members(
    challenge: Challenge,
    folder: Path,
    places: Mapping[str, Path],
    classes: Classes,
    report: Report,
) -> Iterator[tuple[str, Member]]:
    """Yield every picture of every split, replaced by its correction where there is one."""
    patches = {}
    if (folder / PATCHES).exists():
        patches = {entry.name: entry for entry in archives.tar_entries(folder / PATCHES)}
    elif challenge.year == 2010:
        report(f'{folder / PATCHES} is not there: the few pictures that it corrects stay blank')
    for split, path in places.items():
        there, numbered = np.zeros(len(classes.wnids), int), set[str]()
        for entry in _entries(path, challenge.archives[split].md5, report):
            label = _label(entry, challenge, split, classes)
            if label is not None:
                if entry.name in numbered:
                    raise RunError(f'{path} holds {entry.name} twice: remove one of them.')
                if split != 'train':  # of a training picture the counts of its class are enough
                    numbered.add(entry.name)
                there[label] += 1
                one = patches.get(entry.name, entry)
                file = one.path.relative_to(folder).as_posix()
                yield split, Member(entry.name, label, file, one.offset, one.size, one.stamp)
        _check_counts(path, challenge.archives[split].images, there, split, classes)


def _entries(path: Path, md5: str | None, report: Report) -> Iterator[archives.Entry]:
    if path.is_dir():
        report(f'listing {path}')
        yield from archives.folder_entries(path)
        return
    with progress(f'listing {path.name} (bytes)', path.stat().st_size, report) as update:
        yield from archives.tar_entries(path, md5, update)


def _label(entry: archives.Entry, challenge: Challenge, split: str, classes: Classes) -> int | None:
    """Return the label of a picture by its name; None for a file that is no picture of the split.

    Raises:
        RunError: the picture is in the folder of another class.
    """
    if split == 'train':
        match = re.fullmatch(r'(n\d+)_\d+\.JPEG', entry.name)
        return classes.labels.get(match[1]) if match else None
    part = 'test' if split == 'test' else 'val'
    match = re.fullmatch(rf'ILSVRC{challenge.year}_{part}_(\d{{8}})\.JPEG', entry.name)
    if not match or not 1 <= int(match[1]) <= len(classes.truths[split]):
        return None
    label = classes.truths[split][int(match[1]) - 1]
    if classes.labels.get(entry.parent, label) != label:
        raise RunError(
            f'{entry.path} is of class {classes.wnids[label]} in the ground truth, and not of '
            f'{entry.parent}: move it, or remove the folders of classes.'
        )
    return label


def _check_counts(
    path: Path, expected: int, there: np.ndarray, split: str, classes: Classes
) -> None:
    """Raise RunError unless a split has all its pictures, in all and of each class."""
    if split == 'train':
        wanted = np.array(classes.train_images or np.maximum(there, 1))
    else:
        wanted = np.bincount(classes.truths[split], minlength=len(there))
    if there.sum() == expected and (there == wanted).all():
        return
    first = int(np.argmax(there != wanted))
    raise RunError(
        f'{path} holds {there.sum():,} of {expected:,} pictures, and of class '
        f'{classes.wnids[first]} {there[first]:,} of {wanted[first]:,}: download or extract it '
        'again.'
    )


# ---- the classes ----------------------------------------------------------------------------


def _classes(challenge: Challenge, folder: Path) -> Classes:
    """Return the classes from the development kit, or those of 2012 from TFDS (without words)."""
    devkit = folder / challenge.devkit
    extracted = folder / challenge.devkit.removesuffix('.tar.gz')
    wanted = ('meta.mat', *challenge.truths.values())
    if devkit.exists():
        files = _unpack(challenge, devkit, wanted)
    elif extracted.is_dir():
        paths = (path for path in extracted.rglob('*') if path.name in wanted)
        files = {path.name: path.read_bytes() for path in paths}
    elif challenge.year == 2012:
        return tfds_lists()
    else:
        raise RunError(f'{devkit} is missing: it names the classes and the validation labels.')
    beside = (name for name in wanted if name not in files and (folder / name).exists())
    files |= {name: (folder / name).read_bytes() for name in beside}
    for name in wanted:
        if name not in files:
            raise RunError(f'{folder / name} is missing, in the development kit and beside it.')
    try:
        return _read_kit(challenge, files)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _not_official(devkit, f'{type(error).__name__}: {error}') from None


def _unpack(challenge: Challenge, devkit: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return the wanted files of a development kit, whatever folders it has them in."""
    content = devkit.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if challenge.devkit_md5 not in (None, md5):
        raise _not_official(devkit, f'its md5 is {md5}')
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode='r:gz') as tar:
            return {
                PurePosixPath(member.name).name: file.read()
                for member in tar
                if PurePosixPath(member.name).name in wanted and (file := tar.extractfile(member))
            }
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _not_official(devkit, f'{type(error).__name__}: {error}') from None


def _read_kit(challenge: Challenge, files: Mapping[str, bytes]) -> Classes:
    from scipy.io import loadmat  # JAX needs SciPy, so it is there

    rows = loadmat(io.BytesIO(files['meta.mat']), squeeze_me=True)['synsets']
    number = f'ILSVRC{challenge.year}_ID'  # the nodes above the classes have larger ones
    rows = [row for row in rows if 1 <= int(row[number]) <= challenge.classes]
    if len(rows) != challenge.classes:
        raise ValueError(f'it lists {len(rows):,} classes, not {challenge.classes:,}')
    rows.sort(key=lambda row: str(row['WNID']))
    label = {int(row[number]): place for place, row in enumerate(rows)}
    truths = {}
    for split, name in challenge.truths.items():
        truths[split] = [label[int(line)] for line in files[name].split()]
        expected = challenge.archives[split].images
        if len(truths[split]) != expected:
            raise ValueError(f'{name} holds {len(truths[split]):,} labels, not {expected:,}')
    return Classes(
        wnids=tuple(str(row['WNID']) for row in rows),
        words=tuple(str(row['words']) for row in rows),
        train_images=tuple(int(row['num_train_images']) for row in rows),
        truths=truths,
    )


def tfds_lists() -> Classes:
    """Return what TFDS ships of 2012: the classes, and those of the validation pictures."""
    spec = importlib.util.find_spec('tensorflow_datasets')  # found, not imported: that takes long
    if spec is None or not spec.submodule_search_locations:
        raise RunError('tensorflow-datasets, which lists the classes, is not installed.')
    folder = Path(spec.submodule_search_locations[0], 'datasets', 'imagenet2012')
    wnids = tuple((folder / 'labels.txt').read_text().split())
    label = {wnid: place for place, wnid in enumerate(wnids)}
    truth = [label[wnid] for wnid in (folder / 'validation_labels.txt').read_text().split()]
    return Classes(wnids, (), (), {'validation': truth})


def _not_official(path: Path, reason: str) -> RunError:
    return RunError(f'{path} is not the official file ({reason}): download it again.')
