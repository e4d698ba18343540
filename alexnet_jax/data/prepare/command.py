"""Prepare a data set: find or download its raw files, and store them as TFDS's array_record.

    python -m alexnet_jax prepare fashion_mnist
    python -m alexnet_jax prepare mnist --source=FOLDER         # four raw files
    python -m alexnet_jax prepare imagenet2012 --source=FOLDER  # tar files, or extracted folders
    python -m alexnet_jax prepare imagenet2010 --source=FOLDER
    python -m alexnet_jax prepare folder --source=FOLDER        # your own: one folder per class
    python -m alexnet_jax prepare tfds --name=cifar10           # a set of TFDS

TensorFlow is not needed. A data set is renamed to its final name once it is complete, so an
interrupted run never leaves an incomplete one; the same command resumes it. The result is read by
`tfds.builder_from_directory(folder)` and by `data.datasets.load`.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import command, machine
from alexnet_jax.command import log
from alexnet_jax.data import prepared
from alexnet_jax.data.images import MOST_PIXELS
from alexnet_jax.data.prepare import fashion_mnist, image_folder, imagenet, shards
from alexnet_jax.data.prepare.shards import Form
from alexnet_jax.errors import RunError, UsageError

# ---- data sets of TFDS ----------------------------------------------------------------------


def from_tfds(name: str, data_dir: Path, tfds_dir: Path) -> Path:
    """Link to a data set that TFDS has prepared as array_record.

    Args:
        name: as TFDS calls it: 'cifar10', or with a config 'imagenet_resized/64x64'.
        data_dir: the folder of all data sets.
        tfds_dir: the folder of the data sets that TFDS prepared.

    Raises:
        RunError: it is not prepared, or has no labelled images.
    """
    found = _newest(name, data_dir) or _newest(name, tfds_dir)
    if found is None:
        raise RunError(
            f'{name} is not stored as array_record in {data_dir} or {tfds_dir}: set --tfds_dir to '
            f'the folder that contains it, or run `tfds build {name} --file_format=array_record`, '
            "which needs TensorFlow (pip install 'alexnet_jax[tf]')."
        )
    prepared.describe(found)
    folder = data_dir / name.partition('/')[0] / found.name
    if folder.resolve() != found.resolve():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.unlink(missing_ok=True)  # its target was moved, or is another config
        folder.symlink_to(found.resolve(), target_is_directory=True)
        log(f'{name}: linked to {found}')
    return folder


def _newest(name: str, folder: Path) -> Path | None:
    """Return the newest version of a data set in array_record in a folder of TFDS's."""
    base, _, config = name.partition('/')
    places = [folder / base / config] if config else [folder / base, *(folder / base).glob('*')]
    found = []
    for info in (info for place in places for info in place.glob('*/dataset_info.json')):
        with contextlib.suppress(OSError, ValueError, KeyError):  # what an interrupted TFDS left
            if json.loads(info.read_text())['fileFormat'] == 'array_record':
                version = [int(part) for part in info.parent.name.split('.')]
                found.append((version, info.parent))
    return max(found)[1] if found else None


# ---- the command ----------------------------------------------------------------------------

CHALLENGES = {c.name: c for c in (imagenet.ILSVRC_2012, imagenet.ILSVRC_2010)}
RANGES = {'px': (8, 4096), 'quality': (1, 100), 'workers': (1, 1024), 'skip_corrupt': (0, 10**9),
          'max_megapixels': (1, 10_000), 'validation': (0, 1), 'test': (0, 1)}  # fmt: skip


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax prepare', description='Prepare a data set.', allow_abbrev=False
    )
    sets = parser.add_subparsers(dest='set', required=True, metavar='DATASET')

    def add(name: str, about: str) -> argparse.ArgumentParser:
        one = sets.add_parser(name, help=about, description=about, allow_abbrev=False)
        where = {'default': Path('data'), 'help': 'folder of all data sets'}
        one.add_shared('data_dir', type=command.path, **where)
        return one

    for name, what in (('fashion_mnist', 'clothes'), ('mnist', 'handwritten digits')):
        one = add(name, f'70,000 images of {what}, 28 x 28 px')
        one.add_argument('--source', type=command.path, help='folder with the four raw .gz files')
    for name, challenge in CHALLENGES.items():
        tars = ', '.join(archive.name for archive in challenge.archives.values())
        one = add(name, f'from {tars} and {challenge.devkit}, or from the extracted folders')
        _add_pictures(one, 'folder with these files, or with the folders train and val')
    one = add(
        'folder', 'your own pictures: one folder per class, or train/, val/, test/ with these'
    )
    _add_pictures(one, 'folder of the pictures')
    one.add_argument('--name', help="name of the data set; the folder's by default")
    for split in ('validation', 'test'):
        share = f'share of the pictures held out for {split}, without split folders (default: 0.1)'
        one.add_argument(f'--{split}', type=float, default=0.1, metavar='SHARE', help=share)
    one = add('tfds', 'a set that TFDS has prepared as array_record')
    one.add_argument('--name', required=True, help='as TFDS calls it')
    tfds_dir = command.path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
    one.add_argument('--tfds_dir', type=command.path, default=tfds_dir, help="TFDS's data folder")
    return parser


def _add_pictures(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument('--source', type=command.path, required=True, help=source)
    about = 'raw is about ten times as large, and faster to read'
    parser.add_argument('--storage', choices=('jpeg', 'raw'), default=Form.storage, help=about)
    for name, default, what in (
        ('quality', Form.quality, 'quality of the JPEGs'),
        ('px', Form.px, 'side of the stored images'),
        ('workers', machine.cores(), 'processes; one per core by default'),
        ('skip_corrupt', 0, 'skip at most this number of images that cannot be decoded'),
        ('max_megapixels', MOST_PIXELS / 1e6, 'largest image to accept, if you trust its source'),
    ):
        parser.add_argument(
            f'--{name}', type=type(default), default=default, metavar='N', help=what
        )


def _prepare(args: argparse.Namespace) -> Path:
    if args.set in prepared.FETCHED:
        return fashion_mnist.prepare(args.data_dir, args.source, name=args.set)
    if args.set == 'tfds':
        return from_tfds(args.name, args.data_dir, args.tfds_dir)
    if args.set == 'folder':
        shares = dict(validation=args.validation, test=args.test)
        source = image_folder.source(args.source, args.name, **shares)
    else:
        source = imagenet.source(CHALLENGES[args.set], args.source)
    return shards.make(
        source,
        args.data_dir,
        Form(args.px, args.storage, args.quality),
        workers=args.workers,
        skip_corrupt=args.skip_corrupt,
        most_pixels=round(args.max_megapixels * 1e6),
    )


def _act(args: argparse.Namespace) -> None:
    if (source := getattr(args, 'source', None)) and not source.is_dir():
        raise UsageError(f'--source={source} is not a folder: give the one with the images.')
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(args, name, least)) <= most:
            raise UsageError(f'--{name} must be from {least} to {most:,}, but is {value:,}.')
    print(_prepare(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data set of the command line and print its folder; return the exit code."""
    return command.run('prepare', _parser, _act, argv)
