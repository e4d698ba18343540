"""Archives in the official layout of ILSVRC, made of whatever pictures a folder holds.

    python -m experiments.official_tars build --pictures=FOLDER --output=TARS [--year=2012]
    python -m experiments.official_tars prepare --source=TARS --data_dir=DATA [--storage=raw]

1000 classes, 50,000 validation pictures (and for 2010 150,000 test pictures), with what is known to
lie in the real archives: CMYK, a PNG called JPEG, grey, turned by EXIF, gzipped; and narrow and
very large pictures. Training pictures are 500 x 375 px crops of those in the folder; most others
are small, so that all takes minutes. `prepare` is the real preparation, told how many pictures
there are. The same folder gives the same bytes.
"""

import argparse
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

from alexnet_jax import command
from alexnet_jax.data.prepare import imagenet, shards
from alexnet_jax.data.prepare.imagenet import ILSVRC_2010, ILSVRC_2012, Challenge

Named = tuple[str, bytes]  # a file's name and contents

# ---- archives -------------------------------------------------------------------------------


def write_tar(path: Path, named: Iterable[Named], mode: str = 'w') -> None:
    """A tar file; `named` are its files in order."""
    with path.open('wb') as file:
        file.write(tar_bytes(named) if mode == 'w' else gzip.compress(tar_bytes(named), mtime=0))


def tar_bytes(named: Iterable[Named]) -> bytes:
    """A tar file in memory."""
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
    """A development kit.

    Args:
        path: of the .tar.gz.
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
    write_tar(path, named, 'w:gz')


def as_built(challenge: Challenge, folder: Path, images: Mapping[str, int]) -> Challenge:
    """`challenge` with the counts, sizes and sums of the archives in `folder`."""
    archives = {}
    for split, archive in challenge.archives.items():
        path = folder / archive.name
        with path.open('rb') as file:
            md5 = hashlib.file_digest(file, 'md5').hexdigest()
        archives[split] = dataclasses.replace(
            archive, images=images[split], size=path.stat().st_size, md5=md5
        )
    return dataclasses.replace(challenge, archives=archives, devkit_md5=None)


# ---- pictures -------------------------------------------------------------------------------


def jpeg(picture: Image.Image, **options: object) -> bytes:
    """`picture` as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, 'jpeg', **({'quality': 92} | options))
    return buffer.getvalue()


def odd_ones(photo: Image.Image) -> dict[str, bytes]:
    """What the real archives hold besides plain JPEGs, and what could come one's way."""
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
    """The colour pictures of a folder, however deep, that are no icons; in the order of names."""
    found = []
    for path in sorted(folder.rglob('*')):
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp') and not path.is_symlink():
            with Image.open(path) as picture:
                if min(picture.size) >= 256:
                    picture.thumbnail((1600, 1200))
                    found.append(picture.convert('RGB'))
    return found


def crops(
    photos: Sequence[Image.Image], count: int, size: tuple[int, int], seed: int
) -> list[bytes]:
    """`count` different JPEGs of `size` (width, height), cut out of the photographs."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = rng.uniform(0.4, 1.0)
        width, height = (max(1, int(side * edge)) for edge in photo.size)
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        found.append(jpeg(photo.resize(size, box=(left, top, left + width, top + height))))
    return found


# ---- the whole ------------------------------------------------------------------------------


def build(photos: Sequence[Image.Image], folder: Path, year: int, per_class: int) -> Challenge:
    """The files of a year, with `per_class` training pictures a class."""
    challenge = ILSVRC_2010 if year == 2010 else ILSVRC_2012
    wnids = imagenet.tfds_lists().wnids
    order = np.random.default_rng(year).permutation(len(wnids))  # the kit's numbers have their own
    numbers = {wnids[place]: i + 1 for i, place in enumerate(order)}
    large = crops(photos, per_class * len(wnids), (500, 375), seed=1)
    for i, content in enumerate(odd_ones(photos[0]).values()):
        large[i * per_class] = content  # one in each of the first classes
    if year == 2010:
        large[per_class * 20] = gzip.compress(large[per_class * 20], mtime=0)
    write_tar(
        folder / challenge.archives['train'].name,
        ((f'{wnid}.tar', tar_bytes(
            (f'{wnid}_{i}.JPEG', large[label * per_class + i]) for i in range(per_class)
        )) for label, wnid in enumerate(wnids)),
    )  # fmt: skip
    counts, truths = {'train': per_class * len(wnids)}, {}
    for split, name in challenge.truths.items():
        counts[split], part = challenge.archives[split].images, 'test' if split == 'test' else 'val'
        small = crops(photos, 500, (64, 48), seed=2)
        prefix = f'{part}/' if year == 2010 else ''
        # In no order, as in the real archive: a label must follow from the number alone.
        places = np.random.default_rng(3).permutation(counts[split])
        write_tar(
            folder / challenge.archives[split].name,
            ((f'{prefix}ILSVRC{year}_{part}_{i + 1:08d}.JPEG', small[i % 500]) for i in places),
        )
        truths[name] = _truth(year, split, wnids, numbers, counts[split])
    synsets = [(wnid, f'words of {wnid}', per_class) for wnid in numbers]
    beside = {name: truths.pop(name) for name in list(truths) if 'test' in name}
    for name, truth in beside.items():
        (folder / name).write_text(''.join(f'{n}\n' for n in truth))
    write_devkit(folder / challenge.devkit, year, synsets, truths)
    (folder / 'counts.json').write_text(json.dumps(dict(year=year, images=counts)))
    return as_built(challenge, folder, counts)


def _truth(
    year: int, split: str, wnids: Sequence[str], numbers: Mapping[str, int], count: int
) -> list[int]:
    """For 2012 the real one, which TFDS has; else made up."""
    if year == 2012:
        return [numbers[wnids[k]] for k in imagenet.tfds_lists().truths[split]]
    return (np.random.default_rng(count).integers(0, len(wnids), count) + 1).tolist()


def built(folder: Path) -> Challenge:
    """What `build` has put there."""
    about = json.loads((folder / 'counts.json').read_text())
    challenge = ILSVRC_2010 if about['year'] == 2010 else ILSVRC_2012
    return as_built(challenge, folder, about['images'])


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog='python -m experiments.official_tars', description=__doc__)
    acts = parser.add_subparsers(dest='act', required=True)
    one = acts.add_parser('build')
    one.add_argument('--pictures', type=command.path, required=True)
    one.add_argument('--output', type=command.path, required=True)
    one.add_argument('--year', type=int, choices=(2010, 2012), default=2012)
    one.add_argument('--per_class', type=int, default=6)
    one = acts.add_parser('prepare')
    one.add_argument('--source', type=command.path, required=True)
    one.add_argument('--data_dir', type=command.path, required=True)
    one.add_argument('--storage', choices=('jpeg', 'raw'), default='jpeg')
    one.add_argument('--workers', type=int)
    return parser


def _act(args: argparse.Namespace) -> None:
    if args.act == 'build':
        args.output.mkdir(parents=True, exist_ok=True)
        photos = photographs(args.pictures)
        challenge = build(photos, args.output, args.year, args.per_class)
        command.log(f'{len(photos)} photographs: {challenge}')
        return
    source = imagenet.source(built(args.source), args.source)
    form = shards.Form(storage=args.storage)
    print(shards.make(source, args.data_dir, form, command.log, workers=args.workers))


if __name__ == '__main__':
    sys.exit(command.run('official_tars', _parser, _act, None))
