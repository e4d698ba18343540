"""Prepare a data set: find or download its raw files, and store them as TFDS's array_record.

    python -m alexnet_jax prepare fashion_mnist
    python -m alexnet_jax prepare mnist --source=FOLDER         # four raw files
    python -m alexnet_jax prepare imagenet2012 --source=FOLDER  # tar files, or extracted folders
    python -m alexnet_jax prepare imagenet2010 --source=FOLDER
    python -m alexnet_jax prepare folder --source=FOLDER        # your own: one folder per class

TensorFlow is not needed. A data set is renamed to its final name once it is complete, so an
interrupted run never leaves an incomplete one; the same command resumes it. The result is read by
`tfds.builder_from_directory(folder)` and by `data.datasets.load`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import command, machine
from alexnet_jax.data import prepared
from alexnet_jax.data.images import MOST_PIXELS
from alexnet_jax.data.prepare import fashion_mnist, image_folder, imagenet, shards
from alexnet_jax.data.prepare.shards import Form
from alexnet_jax.errors import UsageError

CHALLENGES = {f'imagenet{c.year}': c for c in (imagenet.ILSVRC_2012, imagenet.ILSVRC_2010)}
RANGES = {'px': (8, 4096), 'quality': (1, 100), 'workers': (1, 1024), 'skip_corrupt': (0, 10**9),
          'max_megapixels': (1, 10_000), 'validation': (0, 1), 'test': (0, 1)}  # fmt: skip


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax prepare', description='Prepare a data set.', allow_abbrev=False
    )
    sets = parser.add_subparsers(dest='set', required=True, metavar='DATASET')

    def add(name: str, about: str) -> argparse.ArgumentParser:
        one = sets.add_parser(name, help=about, description=about, allow_abbrev=False)
        what, default = 'folder of all data sets', Path('data')
        one.add_argument('--data_dir', type=command.path, default=default, metavar='DIR', help=what)
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
        kind: Any = type(default)
        parser.add_argument(f'--{name}', type=kind, default=default, metavar='N', help=what)


def _prepare(args: argparse.Namespace) -> Path:
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(args, name, least)) <= most:
            raise UsageError(f'--{name} must be from {least} to {most:,}, but is {value:,}.')
    if args.source and not args.source.is_dir():
        raise UsageError(f'--source={args.source} is not a folder.')
    if args.set in prepared.FETCHED:
        return fashion_mnist.prepare(args.data_dir, args.source, name=args.set)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data set of the command line and print its folder; return the exit code."""
    return command.run('prepare', _parser, lambda args: print(_prepare(args)), argv)
