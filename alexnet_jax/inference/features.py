"""Write any layer's activations to a file, or find the images nearest to an image.

    python -m alexnet_jax features --workdir=W --layer=fc7_relu --split=test --output=F.npy
    python -m alexnet_jax features --workdir=W --layer=conv5_relu FOLDER --output=F.npy
    python -m alexnet_jax features --workdir=W --nearest=6 IMAGE...

The last command computes the right half of the paper's figure 4: the training images whose
activations in the last hidden layer are nearest to the image's. `--among=F.npy` searches saved
features; without it the features are computed and not saved.
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import command, files
from alexnet_jax.data import image_files
from alexnet_jax.data.records import StoredImages
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.inference.evaluate import Extract, Trained
from alexnet_jax.training.metrics import log

BLOCK = 256  # rows in memory at a time: images of 256 px take 50 MB, features of conv1 300 MB
SPARE = 8  # candidates of a block beyond k, as a matrix product rounds

# ------------------------------------------------------------------------------------- many images


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files as uint8 [N, H, W, C], read whenever they are indexed."""

    paths: list[Path]
    stored: tuple[int, int, int]  # [H, W, C]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        images = [image_files.read(path, self.stored) for path in self.paths[rows]]
        return np.array(images, np.uint8).reshape(-1, *self.stored)


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Features [N, ...] that are computed whenever they are indexed, in place of an array."""

    images: np.ndarray | StoredImages | ImageFiles  # uint8 [N, H, W, C], as stored
    extract: Extract  # to float32 [b, ...], see Trained.extractor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, ...)."""
        return len(self.images), *self[:0].shape[1:]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Compute rows, float32 [b, ...]."""
        return self.extract(self.images[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """One layer's features of many images."""

    rows: np.ndarray | Computed  # float32 [N, ...]
    label: list[int] | None  # [N], -1 for an unknown one; None if all are unknown
    path: Sequence[str] | None  # of image files; None for a split of the data set
    about: dict[str, Any]  # see `_about`

    def __len__(self) -> int:
        return self.rows.shape[0]

    def image(self, row: int) -> str:
        """Return the name of an image: its path, or 'train[:55000][3]'."""
        return f'{self.about["split"]}[{row}]' if self.path is None else self.path[row]

    def class_name(self, row: int) -> str | None:
        """Return the name of an image's class, or None if it is unknown."""
        label = -1 if self.label is None else self.label[row]
        return None if label < 0 else self.about['class_names'][label]


def of_split(trained: Trained, layer: str, split: str, data_dir: str = '') -> Features:
    """Return the features of a split of the run's data set; they are computed when indexed.

    For arguments and errors see `Trained.extractor` and `evaluate.open_split`.
    """
    dataset = evaluate.open_split(trained, split, data_dir)
    rows = Computed(dataset.images, trained.extractor(layer))
    return Features(rows, dataset.labels.tolist(), None, _about(trained, layer, dataset.split))


def of_files(trained: Trained, layer: str, words: Sequence[str], faults: list[str]) -> Features:
    """Return the features of image files, folders or globs. Each file is read once to check it.

    A sentence about each file that is not an image is printed and appended to `faults`. For errors
    see `Trained.extractor`.
    """
    extract = trained.extractor(layer)  # before the files are read
    found = image_files.read_ahead(image_files.find(words), trained.stored, 100, faults)
    images = ImageFiles([path for names, _ in found for path in names], trained.stored)
    about = _about(trained, layer, None)
    return Features(Computed(images, extract), None, [str(path) for path in images.paths], about)


def _about(trained: Trained, layer: str, split: str | None) -> dict[str, Any]:
    body = b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained.params))
    return {
        'config': trained.settings.name,
        'step': trained.step,
        'parameters_sha256': hashlib.sha256(body).hexdigest(),
        'layer': layer,
        'data': None if split is None else trained.settings.data.name,
        'split': split,
        'class_names': list(trained.class_names),
    }


# ----------------------------------------------------------------------------------------- on disk


def write(features: Features, path: Path, block: int) -> None:
    """Compute and write features, `block` images at a time, atomically.

    The .npy file contains the features, float32 [N, ...]. The accompanying .json file has 'about',
    and 'label' [N] and 'path' [N] where they are known.

    Raises:
        OSError: a file cannot be written.
    """
    rest = {'about': features.about, 'label': features.label, 'path': features.path}
    header = {'descr': '<f4', 'fortran_order': False, 'shape': features.rows.shape}
    with (
        files.atomic_write(path) as scratch,
        files.atomic_write(path.with_suffix('.json')) as beside,
    ):
        beside.write_text(json.dumps(rest))
        with scratch.open('wb') as file:
            np.lib.format.write_array_header_2_0(file, header)
            for start in range(0, len(features), block):
                rows = np.ascontiguousarray(features.rows[start : start + block], '<f4')
                file.write(rows.data)


def read(path: Path) -> Features:
    """Open an .npy file that `write` made, as a memory map.

    Raises:
        RunError: it or its .json does not exist, is damaged, or is of other features.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode='r')
        found = Features(rows, **json.loads(path.with_suffix('.json').read_text()))
        if any(len(own) != len(rows) for own in (found.label, found.path) if own is not None):
            raise ValueError('they have different numbers of rows')
        return found
    except (TypeError, ValueError, EOFError) as error:
        raise RunError(
            f'{path} and its .json file are damaged, or do not contain features ({error}); '
            f'create them again with --output={path}.'
        ) from error


# ---------------------------------------------------------------------------------- nearest images


def nearest(
    queries: np.ndarray, features: np.ndarray | Computed, k: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest rows by Euclidean distance, in float64.

    In each block, |r|^2 - 2 q.r selects k + SPARE candidates. Their distances are sums of squared
    differences, so a duplicate is at distance 0, and rows at the same distance are ranked by index.
    The result is exact unless more than k + SPARE rows of a block are as near as the k-th, up to
    rounding (about 1e-16 of |q|^2 + |r|^2): any of these may then be among the k.

    Args:
        queries: float32 [Q, D], or [Q, ...], which is flattened.
        features: float32 [N, D], or [N, ...]; a row that is not finite is ranked last.
        k: neighbours of each query; all N rows if there are fewer.
        block: rows in memory at a time.

    Returns:
        The numbers of the rows, int64 [Q, k], nearest first, and their distances, float64 [Q, k].
    """
    width = math.prod(features.shape[1:])
    queries = np.asarray(queries, np.float64).reshape(len(queries), width)
    squared, index = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    for start in range(0, features.shape[0], block):
        rows = np.asarray(features[start : start + block], np.float64).reshape(-1, width)
        rough = np.sum(rows**2, axis=1) - 2 * queries @ rows.T  # without |q|^2, the same for all
        near = np.argsort(rough, axis=1, kind='stable')[:, : k + SPARE]
        exact = np.empty(near.shape)
        for own, query, candidates in zip(exact, queries, near, strict=True):
            own[:] = np.sum((rows[candidates] - query) ** 2, axis=1)
        squared, index = np.hstack([squared, exact]), np.hstack([index, start + near])
        order = np.lexsort((index, squared))[:, :k]  # by distance, then by index
        squared, index = (np.take_along_axis(x, order, 1) for x in (squared, index))
    return index, np.sqrt(squared)


# ---------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Write features, or print nearest images; return the number of files that were no image."""
    if args.output is not None:
        files.check_writable(args.output)
    trained, faults = evaluate.restore(args.workdir, args.step), list[str]()
    if args.split:
        features = of_split(trained, args.layer, args.split, args.data_dir or '')
    else:
        features = of_files(trained, args.layer, args.images, faults)
    if not len(features):  # each is reported
        return len(faults)
    log(f'{args.workdir}: step {trained.step}, {args.layer} of {len(features)} image(s)')
    if args.output is not None:
        write(features, args.output, trained.settings.loop.eval_batch_size)
        print(args.output)
    else:
        _print_nearest(features, _among(trained, features, args), args.nearest, args.json)
    return len(faults)


def _among(trained: Trained, queries: Features, args: argparse.Namespace) -> Features:
    if Path(args.among).suffix != '.npy':
        return of_split(trained, args.layer, args.among, args.data_dir or '')
    among = read(Path(args.among))
    keys = ('layer', 'parameters_sha256', 'class_names')
    same = all(among.about.get(key) == queries.about[key] for key in keys)
    labels_fit = max(among.label or [0]) < len(trained.class_names)
    if not same or not labels_fit or among.rows.shape[1:] != queries.rows.shape[1:]:
        raise UsageError(
            f'--among={args.among} contains other features than those of the queries: create it '
            f'from this checkpoint, with --layer={args.layer}.'
        )
    return among


def _print_nearest(queries: Features, among: Features, k: int, as_json: bool) -> None:
    blocks = [queries.rows[i : i + BLOCK] for i in range(0, len(queries), BLOCK)]
    found = nearest(np.concatenate(blocks), among.rows, k)
    table = [('query', 'distance', 'neighbour', 'class')]
    for row, (index, distances) in enumerate(zip(*map(np.ndarray.tolist, found), strict=True)):
        near: list[dict[str, Any]] = [
            {'image': among.image(i), 'row': i, 'class': among.class_name(i), 'distance': distance}
            for i, distance in zip(index, distances, strict=True)
        ]
        query = {'query': queries.image(row), 'class': queries.class_name(row)}
        if as_json:
            print(json.dumps(query | {'neighbours': near}))
        for own in near:
            names = queries.image(row), own['image'], own['class'] or ''
            shown, image, name = map(command.shown, names)
            table.append((shown, f'{own["distance"]:>12.6g}', image, name))
    if not as_json:
        print(command.table(table))


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax features',
        description="Write a layer's activations, or find the images nearest to an image.",
        epilog='If a file cannot be read as an image, the others are still used, and the '
        'exit code is 1.',
        allow_abbrev=False,
    )
    images = parser.add_mutually_exclusive_group(required=True)
    what = 'files, folders or globs'
    images.add_argument(
        'images', nargs='*', default=(), type=command.expand, metavar='IMAGE', help=what
    )
    what = 'images to use instead of files: train, validation, test, or a TFDS split'
    images.add_argument('--split', help=what)
    parser.add_shared('workdir', 'step')
    parser.add_argument('--layer', default='fc7_relu', help='LAYER_OPERATION (default: fc7_relu)')
    parser.add_shared('data_dir')
    result = parser.add_mutually_exclusive_group(required=True)
    what = 'save the features: .npy, with a .json file beside it'
    result.add_argument('--output', type=command.ending('.npy'), metavar='FILE', help=what)
    what = 'print the K nearest images to each image'
    result.add_argument('--nearest', type=command.positive, metavar='K', help=what)
    what = 'where to search for neighbours: train (the default), another split, or an .npy file'
    parser.add_shared('among', help=what)
    parser.add_argument('--json', action='store_true', help='print one JSON object per line')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return command.run('features', _parser, run, argv)
