"""Create archives in the official layout of ILSVRC-2012 from arbitrary photographs.

1000 classes, six training pictures each, and 50,000 validation pictures, with the unusual files of
the real archives. Training pictures are 500 x 375 px crops of the photographs; most others are
small, so that everything takes minutes. The same photographs give the same bytes.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_jax.data.prepare import imagenet, shards
from alexnet_jax.data.prepare.imagenet import ILSVRC_2012, Challenge
from alexnet_jax.errors import UsageError
from alexnet_jax.machine import cores

PER_CLASS = 6  # training pictures
Named = tuple[str, bytes]  # a file's name and contents


def write_tar(path: Path, named: Iterable[Named]) -> None:
    """Write a tar file; `named` are its files in order."""
    path.write_bytes(tar_bytes(named))


def tar_bytes(named: Iterable[Named]) -> bytes:
    """Return a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, content in named:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_devkit(
    path: Path, year: int, synsets: Sequence[tuple[str, str, int]], truths: Mapping[str, list[int]]
) -> None:
    """Write a development kit.

    Args:
        path: the .tar.gz file.
        year: 2010 or 2012.
        synsets: WordNet id, words and number of training pictures of number 1, 2, ...
        truths: {file name: numbers of the classes}.
    """
    from scipy.io import savemat

    rows = np.zeros(
        len(synsets) + 1,
        [(f'ILSVRC{year}_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('num_train_images', 'O')],
    )
    for i, (wnid, words, count) in enumerate(synsets):
        rows[i] = (float(i + 1), wnid, words, float(count))
    # The real kit lists the nodes above the classes, too.
    rows[-1] = (float(max(1000, len(synsets)) + 1), 'n00001740', 'entity', 0.0)
    meta = io.BytesIO()
    savemat(meta, {'synsets': rows[:, None]})
    # savemat writes the time into the header.
    content = b'MATLAB 5.0 MAT-file'.ljust(116) + meta.getvalue()[116:]
    folder = 'devkit-1.0/data' if year == 2010 else 'ILSVRC2012_devkit_t12/data'
    named = [(f'{folder}/meta.mat', content)]
    for name, numbers in truths.items():
        named.append((f'{folder}/{name}', ''.join(f'{n}\n' for n in numbers).encode()))
    path.write_bytes(gzip.compress(tar_bytes(named), mtime=0))


def as_built(challenge: Challenge, folder: Path, images: Mapping[str, int]) -> Challenge:
    """Return `challenge` with the counts, sizes and md5 sums of the archives in `folder`."""
    archives = {}
    for split, archive in challenge.archives.items():
        path = folder / archive.name
        with path.open('rb') as file:
            md5 = hashlib.file_digest(file, 'md5').hexdigest()
        archives[split] = dataclasses.replace(
            archive, images=images[split], size=path.stat().st_size, md5=md5
        )
    return dataclasses.replace(challenge, archives=archives)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    """Return a picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, 'jpeg', **({'quality': 92} | options))
    return buffer.getvalue()


def odd_ones(photo: Image.Image) -> dict[str, bytes]:
    """Return the kinds of file in the real archives that are no plain JPEGs, and other odd ones."""
    png, exif = io.BytesIO(), Image.Exif()
    photo.save(png, 'png')
    exif[0x0112] = 6  # held upright: to be turned by 90 degrees
    return {
        'CMYK': jpeg(photo.convert('CMYK')),
        'PNG': png.getvalue(),
        'grey': jpeg(photo.convert('L')),
        'EXIF': jpeg(photo, exif=exif),
        'progressive': jpeg(photo, progressive=True),
        'narrow': jpeg(photo.resize((1, 500))),
        'flat': jpeg(photo.resize((500, 1))),
        'tiny': jpeg(photo.resize((1, 1))),
        'large': jpeg(photo.resize((8000, 6000))),
        'more bytes than it needs': jpeg(photo) + b'\0',
    }


def photographs(folder: Path) -> list[Image.Image]:
    """Return the pictures below a folder of at least 256 px, at most 1600 x 1200 px, by name."""
    found = []
    for path in sorted(folder.rglob('*')):
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp') and not path.is_symlink():
            with Image.open(path) as picture:
                if min(picture.size) >= 256:
                    picture.thumbnail((1600, 1200))
                    found.append(picture.convert('RGB'))
    if not found:
        raise UsageError(f'{folder} has no photographs of at least 256 px; name a folder of some.')
    return found


def crops(
    photos: Sequence[Image.Image], count: int, size: tuple[int, int], seed: int
) -> list[bytes]:
    """Cut `count` different JPEGs of `size` (width, height) out of the photographs."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = rng.uniform(0.4, 1.0)
        width, height = (max(1, int(side * edge)) for edge in photo.size)
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        found.append(jpeg(photo.resize(size, box=(left, top, left + width, top + height))))
    return found


def build(photos: Sequence[Image.Image], folder: Path, per_class: int = PER_CLASS) -> None:
    """Write the archives, the development kit and counts.json into a folder."""
    lists = imagenet.tfds_lists()
    wnids = lists.wnids
    order = np.random.default_rng(2012).permutation(len(wnids))  # the kit numbers in its own order
    numbers = {wnids[place]: i + 1 for i, place in enumerate(order)}
    large = crops(photos, per_class * len(wnids), (500, 375), seed=1)
    for i, content in enumerate(odd_ones(photos[0]).values()):
        large[i * per_class] = content  # one in each of the first classes
    write_tar(
        folder / ILSVRC_2012.archives['train'].name,
        ((f'{wnid}.tar', tar_bytes(
            (f'{wnid}_{i}.JPEG', large[label * per_class + i]) for i in range(per_class)
        )) for label, wnid in enumerate(wnids)),
    )  # fmt: skip
    archive, small = ILSVRC_2012.archives['validation'], crops(photos, 500, (64, 48), seed=2)
    # In no order, as in the real archive: a label must follow from the number alone.
    places = np.random.default_rng(3).permutation(archive.images)
    named = ((f'ILSVRC2012_val_{i + 1:08d}.JPEG', small[i % 500]) for i in places)
    write_tar(folder / archive.name, named)
    truth = [numbers[wnids[k]] for k in lists.truths['validation']]  # the real one, from TFDS
    synsets = [(wnid, f'words of {wnid}', per_class) for wnid in numbers]
    truths = {ILSVRC_2012.truths['validation']: truth}
    write_devkit(folder / ILSVRC_2012.devkit, 2012, synsets, truths)
    counts = {'train': per_class * len(wnids), 'validation': archive.images}
    (folder / 'counts.json').write_text(json.dumps(counts))


def built(folder: Path) -> Challenge:
    """Return the description of the archives that `build` has written."""
    return as_built(ILSVRC_2012, folder, json.loads((folder / 'counts.json').read_text()))


def prepare(folder: Path, data_dir: Path) -> None:
    """Run the real preparation, with the counts of these archives."""
    source = imagenet.source(built(folder), folder)
    print(shards.make(source, data_dir, shards.Form(), workers=cores()))


if __name__ == '__main__':  # a process of its own, which dry_run.py kills
    prepare(*map(Path, sys.argv[1:]))
