"""Write any layer's activations to a file, or find the images nearest to an image.

    python -m alexnet_jax features --workdir=W --layer=fc7_relu --split=test --output=F.npy
    python -m alexnet_jax features --workdir=W --layer=conv5_relu FOLDER --output=F.parquet
    python -m alexnet_jax features --workdir=W --nearest=6 IMAGE...

The last command is the right half of the paper's figure 4: the training images whose activations in
the last hidden layer are nearest to the image's. `--among=F.npy` names features written before;
without it they are computed and not kept.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alexnet_jax import command, files
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.data import batches
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate, predict
from alexnet_jax.inference.evaluate import Trained
from alexnet_jax.model import alexnet, augment
from alexnet_jax.model.alexnet import AlexNet, Net
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import cpu, mesh
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training.metrics import log

Array = jax.Array
Extract = Callable[[np.ndarray], np.ndarray]

# ------------------------------------------------------------------------------------ activations


def shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Return the shape of every activation of one image, in the order of the net.

    {'conv1_linear': (H, W, C), ..., 'fc8_linear': (units,)}.
    """
    return {
        name: shape
        for layer, output, after in ((s.layer, s.output, s.after) for s in alexnet.geometry(net))
        for name, shape in zip(alexnet.activation_names(layer), (output, *after), strict=True)
    }


def make_extract(trained: Trained, layer: str) -> Extract:
    """Return a function from uint8 images [B, H, W, C], as stored, to float32 [B, ...], any B.

    It takes the centre view, without dropout masks. Images are split over all devices, each of
    which holds the complete net, and computed in the evaluation's batches.

    Raises:
        UsageError: the net has no such layer.
    """
    known = shapes(trained.settings.net)
    if layer not in known:
        raise UsageError(f"there is no '{layer}' in this net; there are {', '.join(known)}.")
    layout = mesh.make_layout(MeshShape(data=-1, tower=1), jax.device_count())
    run = _activations(trained.settings, layout, layer)
    constants = jax.device_put((trained.params, trained.statistics), layout.replicated)
    size = -(-trained.settings.loop.eval_batch_size // layout.replicas) * layout.replicas

    def extract(images: np.ndarray) -> np.ndarray:
        features = np.empty((len(images), *known[layer]), np.float32)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            batch = np.zeros((size, *part.shape[1:]), np.uint8)
            batch[: len(part)] = part
            batch = jax.device_put(batch, layout.batch_sharding)
            features[start : start + size] = np.asarray(run(*constants, batch))[: len(part)]
        return features

    return extract


def _activations(settings: Settings, layout: Layout, layer: str) -> Callable[..., Array]:
    """Compile (params, statistics, uint8 images [B, H, W, C]) -> float32 [B, ...]."""

    def run(params: Any, statistics: Statistics, images: Array) -> Array:
        draws = augment.fixed(len(images), images.shape[-1], settings.preprocess)
        pixels = augment.apply(images, draws, statistics, settings.preprocess)
        _, variables = AlexNet(settings.net).apply(
            {'params': params}, pixels, None, mutable=['intermediates']
        )
        return variables['intermediates'][layer][0].astype(jnp.float32)

    batch = P('data')
    return jax.jit(
        jax.shard_map(run, mesh=layout.mesh, in_specs=(P(), P(), batch), out_specs=batch),
        compiler_options=cpu.compiler_options(),
    )


# -------------------------------------------------------------------------------------- many images


class Rows(Protocol):
    """Features [N, ...] that need not be in memory: an array, a memory map, or `Computed`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *shape of one)."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Return some rows, float32."""
        ...


IMAGES_HELD = 512  # 100 MB of 256 px


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Features computed whenever they are indexed."""

    images: Callable[[slice], np.ndarray]  # uint8 [b, H, W, C], as stored
    extract: Extract
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Compute rows, float32 [b, ...]; few images are in memory at a time."""
        start, stop, _ = rows.indices(self.shape[0])
        few = [slice(i, min(i + IMAGES_HELD, stop)) for i in range(start, stop, IMAGES_HELD)]
        return np.concatenate([self.extract(self.images(part)) for part in few or [rows]])


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """One layer's features of many images.

    label: int32 [N], -1 or None where unknown.
    path: of image files; None for a split of the data set.
    about: layer, split, class_names; step of the checkpoint and sha256 of its parameters.
    """

    rows: Rows
    label: np.ndarray | None
    path: Sequence[str] | None
    about: dict[str, Any]

    def __len__(self) -> int:
        return self.rows.shape[0]

    def image(self, row: int) -> str:
        """Return the name of an image: its path, or 'train[:55000][3]'."""
        if self.path is not None:
            return self.path[row]
        split = self.about['split']
        return f'({split})[{row}]' if '+' in split else f'{split}[{row}]'

    def class_name(self, row: int) -> str | None:
        """Return the name of an image's class, if its label is known."""
        label = -1 if self.label is None else int(self.label[row])
        return None if label < 0 else self.about['class_names'][label]


def of_split(trained: Trained, layer: str, split: str, data_dir: str = '') -> Features:
    """Return the features of a split of the run's data set; nothing is computed yet.

    Args:
        trained: the checkpoint.
        layer: a key of `shapes`.
        split: 'train', 'validation' or 'test' of the run's config, or an expression of TFDS.
        data_dir: the folder of all data sets; the config's if empty.

    Raises:
        UsageError: the layer or split does not exist, or the data has other classes.
        RunError: the data set does not exist.
    """
    extract = make_extract(trained, layer)
    dataset = evaluate.open_split(trained, split, data_dir)
    shape = (len(dataset), *shapes(trained.settings.net)[layer])
    rows = Computed(lambda rows: dataset.images[rows], extract, shape)
    return Features(rows, dataset.labels, None, _about(trained, layer, dataset.split))


def of_files(trained: Trained, layer: str, words: Sequence[str], faults: list[str]) -> Features:
    """Return the features of image files, folders or globs; each file has been read once.

    A sentence about each file that is no image is printed and appended to `faults`.

    Raises:
        UsageError: the layer does not exist.
        RunError: none of them is an image.
    """
    extract = make_extract(trained, layer)
    paths = []
    for names, _ in predict.read_ahead(list(predict.find(words)), trained.stored, 100, faults):
        paths += names
    if not paths:
        raise RunError('there is no image among the files named.')

    def images(rows: slice) -> np.ndarray:
        return np.stack([predict.read(path, trained.stored) for path in paths[rows]])

    rows = Computed(images, extract, (len(paths), *shapes(trained.settings.net)[layer]))
    return Features(rows, None, [str(path) for path in paths], _about(trained, layer, None))


def _about(trained: Trained, layer: str, split: str | None) -> dict[str, Any]:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trained.params):
        digest.update(np.asarray(leaf).tobytes())
    return {
        'config': trained.settings.name,
        'step': trained.step,
        'parameters_sha256': digest.hexdigest(),
        'layer': layer,
        'data': None if split is None else trained.settings.data.name,
        'split': split,
        'class_names': list(trained.class_names),
    }


# ----------------------------------------------------------------------------------------- on disk

ENDINGS = ('.npy', '.parquet')


def write(features: Features, path: Path, block: int) -> None:
    """Compute and write features, `block` images at a time, atomically.

    `.npy` holds the features, float32 [N, ...]; a `.json` beside it holds 'about', and 'label' [N]
    and 'path' [N] where they are known. `.parquet` holds the columns row, path, label and features
    (flattened, a list of fixed size), and 'about' in its metadata.

    Raises:
        UsageError: `path` has another ending.
        RunError: it cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f'--output={path} must end in {" or ".join(ENDINGS)}.')
    blocks = _blocks(features.rows, block)
    try:
        if path.suffix == '.npy':
            _write_npy(features, path, blocks)
        else:
            with files.atomic_write(path) as scratch:
                _write_parquet(features, scratch, blocks)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # pyarrow's own words are long
        raise RunError(
            f'{path} cannot be written ({reason}); make room, or choose another --output.'
        ) from error


def _blocks(rows: Rows, block: int) -> Generator[np.ndarray]:
    """Yield all rows in order, float32 [b, ...], while a thread computes or reads the next ones."""

    def one(number: int) -> np.ndarray:
        return np.array(rows[number * block : (number + 1) * block], np.float32)

    return batches.prefetch(one, 0, -(-rows.shape[0] // block))


def _write_npy(features: Features, path: Path, blocks: Iterator[np.ndarray]) -> None:
    header = {'descr': '<f4', 'fortran_order': False, 'shape': features.rows.shape}
    label = None if features.label is None else features.label.tolist()
    rest = {'about': features.about, 'label': label, 'path': features.path}
    with files.atomic_write(path.with_suffix('.json')) as text, files.atomic_write(path) as scratch:
        text.write_text(json.dumps(rest))
        with scratch.open('wb') as file:
            np.lib.format.write_array_header_2_0(file, header)
            for block in blocks:
                file.write(block.astype('<f4', copy=False).data)


def _write_parquet(features: Features, path: Path, blocks: Iterator[np.ndarray]) -> None:
    arrow = command.library('pyarrow', 'parquet')
    parquet = command.library('pyarrow.parquet', 'parquet')
    width = int(np.prod(features.rows.shape[1:]))
    about = features.about | {'shape': features.rows.shape[1:]}
    schema = arrow.schema(
        {
            'row': arrow.int64(),
            'path': arrow.string(),
            'label': arrow.int32(),
            'features': arrow.list_(arrow.float32(), width),
        },
        metadata={'about': json.dumps(about)},
    )
    unknown = [None] * len(features)
    paths = unknown if features.path is None else [predict.shown(path) for path in features.path]
    labels = unknown if features.label is None else features.label
    stop = 0
    with parquet.ParquetWriter(path, schema, compression='zstd') as file:
        for block in blocks:
            start, stop = stop, stop + len(block)
            flat = arrow.FixedSizeListArray.from_arrays(arrow.array(block.reshape(-1)), width)
            columns = [range(start, stop), paths[start:stop], labels[start:stop], flat]
            file.write_table(arrow.table(dict(zip(schema.names, columns, strict=True)), schema))


def read(path: Path) -> Features:
    """Open an .npy file that `write` made, as a memory map.

    Raises:
        RunError: it or its .json does not exist, is damaged, or is of other features.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode='r')
        rest = json.loads(path.with_suffix('.json').read_text())
        about, label, names = (rest[key] for key in ('about', 'label', 'path'))
        for known in (label, names):
            if known is not None and len(known) != len(rows):
                raise ValueError(f'{len(rows)} rows in one, {len(known)} in the other')
    except OSError as error:
        raise RunError(
            f'{error.filename or path} cannot be read ({error.strerror or error}).'
        ) from error
    except (KeyError, TypeError, ValueError, EOFError) as error:
        raise RunError(
            f'{path} and the .json beside it are no features, or damaged ({error}); make them with '
            f'--output={path}.'
        ) from error
    return Features(rows, None if label is None else np.array(label, np.int32), names, about)


# --------------------------------------------------------------------------------------- retrieval


class Neighbours(NamedTuple):
    """The neighbours of Q queries, nearest first.

    index: int64 [Q, k], rows of the features.
    distance: float64 [Q, k], Euclidean.
    """

    index: np.ndarray
    distance: np.ndarray


SPARE = 16  # candidates of a query and block beyond k, for what float32 ranks wrongly
BLOCK_BYTES = 2**27


def nearest(queries: np.ndarray, features: Rows, k: int, block: int | None = None) -> Neighbours:
    """Find the k nearest rows by Euclidean distance (paper, figure 4, right).

    Candidates come from one float32 matrix product a block of rows, as |f|^2 - 2 q.f, relative to
    the first query (so that features far from the origin do not cancel). The k best are chosen from
    them by float64 distances: a duplicate is at distance 0, and rows at the same distance are
    ranked by index. A row is missed only if more than SPARE others are as near in float32.

    Args:
        queries: float32 [Q, D], or [Q, ...], which is flattened.
        features: float32 [N, D], or [N, ...].
        k: neighbours of each query.
        block: rows at a time; by default 128 MiB of features, or of products with the queries.

    Raises:
        UsageError: the shapes do not fit, or k is not in 1..N.
        RunError: features are not finite, or too large for their squares to be.
    """
    count, width = features.shape[0], int(np.prod(features.shape[1:]))
    queries = np.ascontiguousarray(queries, np.float32).reshape(len(queries), -1)
    if queries.shape[1] != width:
        raise UsageError(f'the queries have {queries.shape[1]} features, the others {width}.')
    if not 1 <= k <= count:
        raise UsageError(f'k must be in 1..{count}, the number of images, and is {k}.')
    block = min(block or max(BLOCK_BYTES // (4 * max(width, len(queries), 1)), 1), count)
    _, exponent = np.frexp(np.abs(queries).max(initial=0))
    scale = np.float32(2.0**-exponent)  # a power of two, so that scaling rounds nothing
    squared = np.full((len(queries), k), np.inf)
    index = np.full((len(queries), k), count)
    with contextlib.closing(_blocks(features, block)) as blocks:
        for number, rows in enumerate(blocks):
            padded = np.zeros((block, width), np.float32)
            padded[: len(rows)] = rows.reshape(len(rows), -1)
            kept = min(k + SPARE, block)
            chosen = _candidates(queries, padded, len(rows), scale, kept=kept)
            row, finite = jax.device_get(chosen)
            if not finite:
                raise RunError('some features are not finite, or too large to be squared.')
            found = np.where(row < len(rows), _squared(queries, padded, row), np.inf)
            squared = np.concatenate([squared, found], axis=1)
            index = np.concatenate([index, row.astype(np.int64) + number * block], axis=1)
            order = np.lexsort((index, squared), axis=1)[:, :k]
            squared = np.take_along_axis(squared, order, 1)
            index = np.take_along_axis(index, order, 1)
    return Neighbours(index, np.sqrt(squared))


@functools.partial(jax.jit, static_argnames='kept')
def _candidates(
    queries: np.ndarray, rows: np.ndarray, valid: int, scale: np.float32, *, kept: int
) -> tuple[Array, Array]:
    """Return the `kept` of the first `valid` rows that seem nearest, [Q, kept], and all_finite."""
    origin = queries[:1]
    queries, rows = (queries - origin) * scale, (rows - origin) * scale
    squared = jnp.sum(rows * rows, axis=1)
    product = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    is_row = jnp.arange(len(rows)) < valid
    score = jnp.where(is_row[None, :], squared[None, :] - 2 * product, jnp.inf)
    row = jax.lax.top_k(-score, kept)[1]
    all_finite = jnp.isfinite(jnp.max(squared)) & jnp.all(jnp.isfinite(queries))
    return row, all_finite


def _squared(queries: np.ndarray, rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return squared distances of each query to its candidates, float64 [Q, kept]."""
    return np.stack(
        [
            np.sum(np.subtract(rows[own], query, dtype=np.float64) ** 2, axis=1)
            for query, own in zip(queries, row, strict=True)
        ]
    )


# ---------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Write features, or print nearest images; return how many files were no image.

    Raises:
        UsageError: the options do not go together, or name what does not exist.
        RunError: there is no checkpoint, data or image, or the output cannot be written.
    """
    if bool(args.images) == bool(args.split):
        raise UsageError('name either IMAGE files or a --split.')
    if (args.output is None) == (args.nearest is None):
        raise UsageError('give either --output=FILE, to write features, or --nearest=K.')
    if args.output is not None and args.output.suffix not in ENDINGS:
        raise UsageError(f'--output={args.output} must end in {" or ".join(ENDINGS)}.')
    if args.output is not None:
        files.check_writable(args.output)
    trained = evaluate.restore(args.workdir, args.step)
    faults: list[str] = []
    if args.split:
        features = of_split(trained, args.layer, args.split, args.data_dir or '')
    else:
        features = of_files(trained, args.layer, args.images, faults)
    log(f'{args.workdir}: step {trained.step}, {args.layer} of {len(features)} image(s)')
    if args.output is not None:
        write(features, args.output, trained.settings.loop.eval_batch_size)
        print(args.output)
    else:
        among = _among(trained, features, args)
        _print_nearest(features, among, args.nearest, args.json)
    return len(faults)


def _among(trained: Trained, queries: Features, args: argparse.Namespace) -> Features:
    if Path(args.among).suffix != '.npy':
        return of_split(trained, args.layer, args.among, args.data_dir or '')
    among = read(Path(args.among))
    for key in ('layer', 'step', 'parameters_sha256'):
        if among.about.get(key) != queries.about[key]:
            raise UsageError(
                f'--among={args.among} holds {among.about.get("layer")} of '
                f'{among.about.get("config")} at step {among.about.get("step")}, other features '
                f'than the queries have: make it from this checkpoint, with --layer={args.layer}.'
            )
    return among


def _print_nearest(queries: Features, among: Features, k: int, as_json: bool) -> None:
    found = nearest(queries.rows[:], among.rows, k)
    names = [predict.shown(queries.image(row)) for row in range(len(queries))]
    width = max(map(len, names))
    if not as_json:
        print(f'{"query":<{width}}  {"distance":>12}  neighbour')
        print('-' * (width + 40))
    for row, name in enumerate(names):
        neighbours = list(zip(found.index[row].tolist(), found.distance[row].tolist(), strict=True))
        if as_json:
            print(json.dumps(_as_json(queries, row, among, neighbours)), flush=True)
            continue
        for rank, (index, distance) in enumerate(neighbours):
            what = ', '.join(filter(None, (among.image(index), among.class_name(index))))
            cell = '' if rank else name
            print(f'{cell:<{width}}  {distance:>12.6g}  {predict.shown(what)}', flush=True)


def _as_json(
    queries: Features, row: int, among: Features, neighbours: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    return {
        'query': queries.image(row),
        'class': queries.class_name(row),
        'neighbours': [
            {'image': among.image(i), 'row': i, 'class': among.class_name(i), 'distance': distance}
            for i, distance in neighbours
        ],
    }


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax features',
        description="Write a layer's activations, or find the images nearest to an image.",
        epilog='Exit code 1 if a file was no image; the others are used.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('images', nargs='*', type=command.expand, metavar='IMAGE', help='files, folders or globs')
    parser.add_workdir()
    parser.add_step()
    add('--layer', default='fc7_relu', help='of the net, as fc7_relu (the default)')
    add('--split', help='train, validation, test, or an expression of TFDS, instead of IMAGE')
    parser.add_data_dir()
    add('--output', type=command.path, metavar='FILE', help='.npy (with a .json) or .parquet')
    add('--nearest', type=int, metavar='K', help='print the K nearest images of each')
    among = 'of which: a split, or an .npy made before'
    add('--among', type=command.expand, default='train', help=among)
    add('--json', action='store_true', help='of --nearest, one object a line')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return command.run('features', _parser, run, argv)
