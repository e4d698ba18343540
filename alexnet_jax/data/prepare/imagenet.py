"""ILSVRC-2010 and ILSVRC-2012, from the official tar files or from folders they were extracted to.

Nothing is unpacked to disk. An archive's md5 is computed while it is listed, so a hard disk reads
ImageNet's 138 GB once, from front to end. A label is derived from the name of an image (its WordNet
id, or its number and the ground truth for that number), never from its position in an archive.
Every image must be present.
"""

import hashlib
import importlib.resources
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from alexnet_jax.command import log
from alexnet_jax.data.prepare.image_folder import folder_files
from alexnet_jax.data.prepare.shards import File, Source
from alexnet_jax.errors import RunError
from alexnet_jax.progress import progress

BLOCK_BYTES = 2**20  # read at once
# Folders below --source that may contain extracted pictures: as Kaggle packs them, or directly.
PARENTS = ('', 'ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC', 'CLS-LOC')
FOLDERS = {'train': 'train', 'validation': 'val', 'test': 'test'}  # also in names of files


@dataclass(frozen=True)
class Archive:
    """An official tar file of pictures; size and md5 are None if they were not published."""

    name: str
    images: int
    size: int | None = None  # bytes
    md5: str | None = None


@dataclass(frozen=True)
class Challenge:
    """The data set of one year."""

    year: int
    archives: Mapping[str, Archive]  # by split
    devkit: str
    classes: int = 1000


# Sizes: TFDS 4.9.10, datasets/imagenet2012/checksums.tsv. Sums: image-net.org's download page, also
# in torchvision/datasets/imagenet.py.
ILSVRC_2012 = Challenge(
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
)
# Counts: the paper's section 2 and the development kit. No official sums are known.
ILSVRC_2010 = Challenge(
    year=2010,
    archives={
        'train': Archive('ILSVRC2010_images_train.tar', 1_261_406),
        'validation': Archive('ILSVRC2010_images_val.tar', 50_000),
        'test': Archive('ILSVRC2010_images_test.tar', 150_000),
    },
    devkit='ILSVRC2010_devkit-1.0.tar.gz',
)
PATCHES = 'patch_images.tar'  # the organisers' corrections of blank pictures of 2010


class Classes(NamedTuple):
    """The classes of a challenge, by label: sorted by WordNet id, as TFDS has them."""

    wnids: tuple[str, ...]
    words: tuple[str, ...]  # () if unknown
    truths: dict[str, list[int]]  # {split: label of picture number 1, 2, ...}


def source(challenge: Challenge, folder: Path) -> Source:
    """Return the pictures of a challenge, from its tar files in `folder` or from folders in it.

    Raises:
        RunError: a file is missing, incomplete, or not the official one.
    """
    folder = folder.absolute()
    paths = {split: _find(challenge, split, folder) for split in challenge.archives}
    classes = _classes(challenge, folder)
    inputs = [path for path in (*paths.values(), folder / PATCHES) if path.exists()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    stamp = hashlib.sha256(repr((stats, classes)).encode()).hexdigest()
    if any(path.is_dir() for path in inputs):
        stamp = ''  # its pictures may be mended in place, which the folder does not show
    return Source(
        name=f'imagenet{challenge.year}',
        description=f'ILSVRC-{challenge.year}: {challenge.classes:,} classes of ImageNet.',
        class_names=classes.wnids,
        words=classes.words,
        made_of={
            archive.name: archive.md5 or f'{archive.images:,} images'
            for archive in challenge.archives.values()
        },
        images={split: archive.images for split, archive in challenge.archives.items()},
        pictures=lambda: _pictures(challenge, folder, paths, classes),
        stamp=stamp,
    )


def _find(challenge: Challenge, split: str, folder: Path) -> Path:
    """Return the tar file of a split, or the folder of its extracted pictures."""
    archive = challenge.archives[split]
    path = folder / archive.name
    if path.exists():
        if archive.size not in (None, path.stat().st_size):
            raise RunError(
                f'{path} has {path.stat().st_size:,} of {archive.size:,} bytes: resume or repeat '
                'its download.'
            )
        return path
    for parent in PARENTS:
        if (extracted := folder / parent / FOLDERS[split]).exists():
            return extracted
    raise RunError(
        f'{path} is missing, and {folder} has no folder {FOLDERS[split]} with its images: download '
        'the official file from image-net.org (after registration).'
    )


# ---- the pictures ---------------------------------------------------------------------------


def _pictures(
    challenge: Challenge, folder: Path, paths: Mapping[str, Path], classes: Classes
) -> Iterator[tuple[str, int, File]]:
    """Yield every picture of every split, replaced by its correction where there is one."""
    patches = {}
    if (folder / PATCHES).exists():
        patches = {file.name: file for file in tar_files(folder / PATCHES)}
    elif challenge.year == 2010:
        log(f'{folder / PATCHES} is missing: the few images that it corrects stay blank')
    for split, path in paths.items():
        archive, seen = challenge.archives[split], set[str]()
        if split == 'train':
            labels = {wnid: label for label, wnid in enumerate(classes.wnids)}
        else:
            start, truth = f'ILSVRC{challenge.year}_{FOLDERS[split]}_', classes.truths[split]
            labels = {f'{start}{i:08d}': label for i, label in enumerate(truth, start=1)}
        log(f'listing {path}')
        for file in folder_files(path) if path.is_dir() else tar_files(path, archive.md5):
            stem, ending = os.path.splitext(file.name)
            label = labels.get(stem.partition('_')[0] if split == 'train' else stem)
            if ending == '.JPEG' and label is not None and file.name not in seen:
                seen.add(file.name)
                yield split, label, patches.get(file.name, file)
        if len(seen) != archive.images:
            raise RunError(
                f'{path} contains {len(seen):,} of {archive.images:,} images: download or extract '
                'it again.'
            )


def tar_files(path: Path, md5: str | None = None) -> Iterator[File]:
    """Yield every plain file of an uncompressed tar file, and of the tar files in it, in order.

    The md5 is compared when all has been read.

    Raises:
        RunError: it is not a tar file, is incomplete, or has another md5.
    """
    size = path.stat().st_size
    with (
        path.open('rb', buffering=0) as opened,
        progress(f'listing {path.name} (bytes)', size) as update,
    ):
        stream = _Hashed(opened)
        try:
            for file in _members(str(path), stream):
                update(file.offset + file.size)
                yield file
            while stream.read(BLOCK_BYTES):
                pass  # the padding behind the last file counts for the md5
            if md5 not in (None, stream.md5.hexdigest()):
                raise tarfile.ReadError(f'its md5 is not {md5}')
        except (tarfile.TarError, EOFError) as error:
            raise RunError(
                f'{path} is not the official tar file or is incomplete ({error}): resume or repeat '
                'its download.'
            ) from None


class _Hashed:
    """A file that is read from front to end, with its md5."""

    def __init__(self, file: IO[bytes]):
        self._file, self.md5 = file, hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.md5.update(block)
        return block


def _members(path: str, stream: Any, start: int = 0) -> Iterator[File]:
    """Yield the files of a tar file that begins at byte `start` of the file `path`."""
    with tarfile.open(fileobj=stream, mode='r|', bufsize=BLOCK_BYTES) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # ty: ignore[missing-attribute] (else it keeps all of them)
            offset = start + member.offset_data
            if member.isreg() and member.name.endswith('.tar'):
                yield from _members(path, tar.extractfile(member), offset)
            elif member.isreg():
                yield File(PurePosixPath(member.name).name, path, offset, member.size)


# ---- the classes ----------------------------------------------------------------------------


def _classes(challenge: Challenge, folder: Path) -> Classes:
    """Return the classes from the development kit, or those of 2012 from TFDS (without words)."""
    kit, number = folder / challenge.devkit, f'ILSVRC{challenge.year}_ID'
    if challenge.year == 2012 and not kit.exists():
        return tfds_lists()
    from scipy.io import loadmat  # here: it takes long to import

    try:
        # The truth of the test images of 2010 is not in the kit.
        files = {path.name: path.read_bytes() for path in folder.glob('*_ground_truth.txt')}
        with tarfile.open(kit, 'r:gz') as tar:
            kept = ((one.name, tar.extractfile(one)) for one in tar)
            files |= {PurePosixPath(name).name: file.read() for name, file in kept if file}
        rows = loadmat(io.BytesIO(files['meta.mat']), squeeze_me=True)['synsets']
        # The nodes above the classes have larger numbers.
        rows = [row for row in rows if 1 <= int(row[number]) <= challenge.classes]
        rows.sort(key=lambda row: str(row['WNID']))
        label = {int(row[number]): place for place, row in enumerate(rows)}
        truths = {
            split: [label[int(line)] for line in files[name].split()]
            for split in challenge.archives
            if split != 'train'
            for name in [f'ILSVRC{challenge.year}_{split}_ground_truth.txt']
        }
    except Exception as error:  # damage raises various exceptions of tarfile, zlib and SciPy
        raise RunError(
            f'{kit} is missing, incomplete or not the official file ({type(error).__name__}: '
            f'{error}): download it.'
        ) from None
    wnids, words = (tuple(str(row[field]) for row in rows) for field in ('WNID', 'words'))
    return Classes(wnids, words, truths)


def tfds_lists() -> Classes:
    """Return the lists of 2012 in TFDS: the classes, and those of the validation pictures."""
    lists = importlib.resources.files('tensorflow_datasets') / 'datasets/imagenet2012'
    wnids = tuple((lists / 'labels.txt').read_text().split())
    label = {wnid: place for place, wnid in enumerate(wnids)}
    truth = [label[wnid] for wnid in (lists / 'validation_labels.txt').read_text().split()]
    return Classes(wnids, (), {'validation': truth})
