"""Look inside: any layer's activations to a file, and the images nearest to an image.

    python -m alexnet_jax.features --workdir=W --layer=fc7_relu --split=test --output=F.npz
    python -m alexnet_jax.features --workdir=W --layer=conv5_relu FOLDER --output=F.parquet
    python -m alexnet_jax.features --workdir=W --nearest=6 IMAGE...

The last is the right half of the paper's figure 4: which training images make the last hidden layer
do most nearly what this one does? `--among=F.npz` names their features if they were written before;
otherwise they are computed on the way and not kept.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alexnet_jax import augment, command, data, evaluate, files, model, parallel, predict
from alexnet_jax.augment import Statistics
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.evaluate import Trained
from alexnet_jax.model import AlexNet, Net
from alexnet_jax.parallel import Layout
from alexnet_jax.records import say

Array = jax.Array
Extract = Callable[[np.ndarray], np.ndarray]

# ------------------------------------------------------------------------------------ activations


def shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """What can be looked at, in the order of the net: {'conv1_linear': (H, W, C), ...}.

    The shapes are those of one image: [H, W, C] of maps, [units] of fully connected layers.
    """
    return {
        name: shape
        for stage in model.geometry(net)
        for name, shape in zip(model.steps(stage.layer), (stage.output, *stage.after), strict=True)
    }


def make_extract(trained: Trained, layer: str) -> Extract:
    """A function from uint8 images [B, H, W, C], as stored, to float32 [B, ...], any B.

    The centre view, as at test time: dropout halves. Images are split over all devices here, each
    of which holds the whole net, and computed in the evaluation's batches.

    Raises:
        UsageError: the net has no such step.
    """
    known = shapes(trained.settings.net)
    if layer not in known:
        raise UsageError(f"there is no '{layer}' in this net; there are {', '.join(known)}.")
    layout = parallel.lay_out(MeshShape(data=-1, tower=1), jax.device_count())
    run = _activations(trained.settings, layout, layer)
    constants = jax.device_put((trained.params, trained.statistics), parallel.whole(layout))
    size = -(-trained.settings.loop.eval_batch_size // layout.replicas) * layout.replicas

    def extract(images: np.ndarray) -> np.ndarray:
        features = np.empty((len(images), *known[layer]), np.float32)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            batch = np.zeros((size, *part.shape[1:]), np.uint8)
            batch[: len(part)] = part
            batch = jax.device_put(batch, parallel.batch_sharding(layout))
            features[start : start + size] = np.asarray(run(*constants, batch))[: len(part)]
        return features

    return extract


def _activations(settings: Settings, layout: Layout, layer: str) -> Callable[..., Array]:
    """(params, statistics, uint8 images [B, H, W, C]) -> float32 [B, ...]."""

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
        compiler_options=parallel.compiler_options(),
    )


# -------------------------------------------------------------------------------------- many images


class Rows(Protocol):
    """Features [N, ...] that need not lie in memory: an array, a memory map, or `Computed`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, and the shape of one."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Some of them, float32."""
        ...


IMAGES_HELD = 512  # 100 MB of 256 px


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Features that are computed each time they are asked for."""

    images: Callable[[slice], np.ndarray]  # uint8 [b, H, W, C], as stored
    extract: Extract
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Float32 [b, ...]; few images are held at a time."""
        start, stop, _ = rows.indices(self.shape[0])
        few = [slice(i, min(i + IMAGES_HELD, stop)) for i in range(start, stop, IMAGES_HELD)]
        return np.concatenate([self.extract(self.images(part)) for part in few or [rows]])


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """One layer's features of many images, with what is known of each image.

    label: int32 [N], or None where it is not known.
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
        """How a person is told which image that is: its path, or 'train[:55000][3]'."""
        if self.path is not None:
            return self.path[row]
        split = self.about['split']
        return f'({split})[{row}]' if '+' in split else f'{split}[{row}]'

    def class_name(self, row: int) -> str | None:
        """Of its label."""
        return None if self.label is None else self.about['class_names'][int(self.label[row])]


def of_split(trained: Trained, layer: str, split: str, data_dir: str = '') -> Features:
    """Of a split of the run's data set; nothing is computed yet.

    Args:
        trained: a checkpoint, opened.
        layer: a key of `shapes`.
        split: 'train', 'validation' or 'test' of the run's config, or an expression of TFDS.
        data_dir: where the data lies, if not where the run had it.

    Raises:
        UsageError: no such layer or split.
        RunError: no data.
    """
    extract = make_extract(trained, layer)
    dataset = evaluate.open_split(trained.settings, split, data_dir)
    shape = (len(dataset), *shapes(trained.settings.net)[layer])
    rows = Computed(lambda rows: dataset.images[rows], extract, shape)
    return Features(rows, dataset.labels, None, _about(trained, layer, dataset.split))


def of_files(trained: Trained, layer: str, words: Sequence[str], faults: list[str]) -> Features:
    """Of image files, folders, globs; nothing is computed yet, but every file has been read once.

    A sentence about each file that is no image is said, and appended to `faults`.

    Raises:
        UsageError: no such layer.
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


def write(features: Features, path: Path, block: int) -> None:
    """Compute and write features, `block` images at a time: a file that is whole or not there.

    `.npz` (NumPy's, not compressed) holds arrays 'features' float32 [N, ...], 'label' int32 [N] and
    'path' [N] where they are known, and 'about', JSON. `.parquet` holds the columns image, path or
    row, label, and features (flattened, a list of fixed size), and 'about' in its metadata.

    Raises:
        UsageError: another ending.
        RunError: it cannot be written.
    """
    if path.suffix not in WRITERS:
        raise UsageError(f'--output={path} must end in {" or ".join(WRITERS)}.')
    try:
        with files.whole(path) as scratch:
            WRITERS[path.suffix](features, scratch, _blocks(features.rows, block))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # pyarrow's own words are long
        raise RunError(
            f'{path} cannot be written ({reason}); make room, or choose another --output.'
        ) from error


def _blocks(rows: Rows, block: int) -> Generator[np.ndarray]:
    """All rows in order, float32 [b, ...], while a thread computes or reads the next ones."""

    def one(number: int) -> np.ndarray:
        return np.array(rows[number * block : (number + 1) * block], np.float32)

    return data.prefetch(one, 0, -(-rows.shape[0] // block))


def _write_npz(features: Features, path: Path, blocks: Iterator[np.ndarray]) -> None:
    header = {'descr': '<f4', 'fortran_order': False, 'shape': features.rows.shape}
    rest = {'label': features.label, 'path': features.path, 'about': json.dumps(features.about)}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        with archive.open('features.npy', 'w', force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for block in blocks:
                file.write(block.astype('<f4', copy=False).data)
        for name, values in rest.items():
            if values is not None:
                with archive.open(f'{name}.npy', 'w') as file:
                    np.lib.format.write_array(file, np.asarray(values), allow_pickle=False)


def _write_parquet(features: Features, path: Path, blocks: Iterator[np.ndarray]) -> None:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise RunError(
            '.parquet needs pyarrow: pip install pyarrow, or choose an --output that ends in .npz.'
        ) from None
    width = int(np.prod(features.rows.shape[1:]))
    about = features.about | {'shape': features.rows.shape[1:]}
    fields = [('row', arrow.int64()), ('path', arrow.string()), ('label', arrow.int32())]
    schema = arrow.schema(
        [*fields, ('features', arrow.list_(arrow.float32(), width))],
        metadata={'about': json.dumps(about)},
    )
    start = 0
    with parquet.ParquetWriter(path, schema, compression='zstd') as file:
        for block in blocks:
            rows = range(start, start + len(block))
            none = [None] * len(block)
            columns = [
                list(rows),
                none if features.path is None else [predict.shown(features.path[i]) for i in rows],
                none if features.label is None else features.label[start : rows.stop],
            ]
            arrays = [arrow.array(c, kind) for c, (_, kind) in zip(columns, fields, strict=True)]
            flat = arrow.array(block.reshape(-1))
            arrays.append(arrow.FixedSizeListArray.from_arrays(flat, width))
            file.write_table(arrow.Table.from_arrays(arrays, schema=schema))
            start = rows.stop


WRITERS: dict[str, Callable[[Features, Path, Iterator[np.ndarray]], None]] = {
    '.npz': _write_npz,
    '.parquet': _write_parquet,
}


def read(path: Path) -> Features:
    """Open an .npz that `write` made; the features stay on disk and are mapped into memory.

    Raises:
        RunError: it is not there, or no such file.
    """
    try:
        rows = _mapped(path, 'features')
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file['about']))
            label, names = file.get('label'), file.get('path')
    except OSError as error:
        raise RunError(f'{path} cannot be read: {error.strerror or error}.') from error
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f'{path} is no file of features, or damaged ({error}); make it with --output={path}.'
        ) from error
    return Features(rows, label, None if names is None else names.tolist(), about)


def _mapped(path: Path, name: str) -> np.ndarray:
    """An array of an .npz that is not compressed, as a read-only memory map."""
    with zipfile.ZipFile(path) as archive, path.open('rb') as file:
        entry = archive.getinfo(f'{name}.npy')
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError('it is compressed')
        file.seek(entry.header_offset + 26)  # of zip's local header of 30 bytes, two lengths
        lengths = int.from_bytes(file.read(2), 'little') + int.from_bytes(file.read(2), 'little')
        file.seek(lengths, os.SEEK_CUR)
        if np.lib.format.read_magic(file) != (2, 0):
            raise ValueError('its header is not of version 2')
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        return np.memmap(path, dtype, 'r', file.tell(), shape)


# --------------------------------------------------------------------------------------- retrieval


class Neighbours(NamedTuple):
    """Of Q queries, nearest first.

    index: int64 [Q, k], rows of the features.
    distance: float64 [Q, k], Euclidean.
    """

    index: np.ndarray
    distance: np.ndarray


SPARE = 16  # candidates a query and block beyond k
BLOCK_BYTES = 2**27


def nearest(queries: np.ndarray, features: Rows, k: int, block: int | None = None) -> Neighbours:
    """The k nearest rows by Euclidean distance, exactly: paper, figure 4, right.

    The device searches block after block by one matrix product each, |q|^2 - 2 q.f + |f|^2 in
    float32, less a bound on what rounding can have added: so a row that is out is out. What may be
    in is measured on the host, in float64 and without cancellation, so that a duplicate is at
    distance 0. Rows at the same distance are ranked by their index.

    Memory on the device: 4 bytes x (block D + Q D + 4 Q block), with the default under 1 GiB beside
    the queries; on the host four blocks of 4 block D bytes. `features` may be larger than either:
    see `Rows`.

    Args:
        queries: float32 [Q, D], or [Q, ...], which is flattened.
        features: float32 [N, D], or [N, ...].
        k: how many.
        block: rows at a time; by default 128 MiB of features, or of products with the queries.

    Raises:
        UsageError: shapes that do not fit, or k not in 1..N.
        RunError: numbers that are not finite, or too large for their squares to be.
    """
    count, width = features.shape[0], int(np.prod(features.shape[1:]))
    queries = np.ascontiguousarray(queries, np.float32).reshape(len(queries), -1)
    if queries.shape[1] != width:
        raise UsageError(f'the queries have {queries.shape[1]} features, the others {width}.')
    if not 1 <= k <= count:
        raise UsageError(f'k must lie in 1..{count}, the number of images, and is {k}.')
    most = BLOCK_BYTES // (4 * max(width, len(queries), 1))
    block = min(block or max(most, 1), count)
    search = jax.jit(functools.partial(_search, kept=min(k + SPARE, block)))
    best = _Best(np.full((len(queries), k), np.inf), np.full((len(queries), k), count))
    on_device = jax.device_put(queries)
    with contextlib.closing(_blocks(features, block)) as blocks:
        for number, rows in enumerate(blocks):
            rows = rows.reshape(len(rows), -1)
            padded = np.pad(rows, ((0, block - len(rows)), (0, 0))) if len(rows) < block else rows
            bound, row, sound = jax.device_get(search(on_device, padded, len(rows)))
            if not sound:
                raise RunError('some features are not finite, or too large to be squared.')
            best = _take_in(best, queries, rows, number * block, bound, row.astype(np.int64))
    return Neighbours(best.index, np.sqrt(best.squared))


class _Best(NamedTuple):
    """The best so far: squared distances, ascending, and rows; both [Q, k]."""

    squared: np.ndarray
    index: np.ndarray


def _search(queries: Array, rows: Array, valid: int, *, kept: int) -> tuple[Array, Array, Array]:
    """Lower bounds of squared distances, the `kept` smallest of each query, [Q, kept]; whose rows.

    Summing D products in any order is off by at most D u |q| |f| with u = 2^-24 (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1); the norms are off likewise. Twice that, and
    a few units for the sums outside and for products that underflow, is taken away.
    """
    units = queries.shape[1] + 8
    product = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    of_query = jnp.sum(queries * queries, axis=1)[:, None]
    of_row = jnp.sum(rows * rows, axis=1)[None, :]
    norms = of_query + of_row
    slack = units * 2.0**-23 * (norms + 2 * jnp.sqrt(of_query) * jnp.sqrt(of_row))
    bound = norms - 2 * product - slack - units * 2.0**-125
    bound = jnp.where(jnp.arange(rows.shape[0])[None, :] < valid, bound, jnp.inf)
    smallest, row = jax.lax.top_k(-bound, kept)
    return -smallest, row, jnp.isfinite(jnp.max(of_query) + jnp.max(of_row))


def _take_in(
    best: _Best,
    queries: np.ndarray,
    rows: np.ndarray,
    start: int,
    bound: np.ndarray,
    row: np.ndarray,
) -> _Best:
    """The best of those so far and of one block: `rows` [b, D] from row `start` on."""
    hopeful = (row < len(rows)) & (bound <= best.squared[:, -1:])
    query, column = np.nonzero(hopeful)
    squared = np.full(bound.shape, np.inf)
    squared[query, column] = _squared(queries, query, rows, row[query, column])
    merged = _merge(best, squared, row + start)
    if bound.shape[1] < len(rows):  # a row that was not returned may be as near as the last of them
        every = np.arange(len(rows))
        for q in np.nonzero(bound[:, -1] <= merged.squared[:, -1])[0]:
            squared = _squared(queries, np.full(len(rows), q), rows, every)[None]
            before = _Best(best.squared[q : q + 1], best.index[q : q + 1])
            after = _merge(before, squared, every[None] + start)
            merged.squared[q], merged.index[q] = after.squared[0], after.index[0]
    return merged


def _squared(
    queries: np.ndarray, query: np.ndarray, rows: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """Squared distances of pairs (query[i], row[i]), float64 [pairs], some 64 MB at a time."""
    squared = np.empty(len(query))
    step = max(1, 2**23 // rows.shape[1])
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        difference = np.subtract(rows[row[part]], queries[query[part]], dtype=np.float64)
        squared[part] = np.sum(difference * difference, axis=1)
    return squared


def _merge(best: _Best, squared: np.ndarray, index: np.ndarray) -> _Best:
    squared = np.concatenate([best.squared, squared], axis=1)
    index = np.concatenate([best.index, index], axis=1)
    order = np.lexsort((index, squared), axis=1)[:, : best.squared.shape[1]]
    return _Best(np.take_along_axis(squared, order, 1), np.take_along_axis(index, order, 1))


# ---------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Write features, or print nearest images; returns how many files were no image.

    Raises:
        UsageError: what was asked for does not go together, or is not there.
        RunError: no checkpoint, no data, no image, or no way to write.
    """
    if bool(args.images) == bool(args.split):
        raise UsageError('name either IMAGE files or a --split.')
    if (args.output is None) == (args.nearest is None):
        raise UsageError('give either --output=FILE, to write features, or --nearest=K.')
    if args.output is not None and args.output.suffix not in WRITERS:
        raise UsageError(f'--output={args.output} must end in {" or ".join(WRITERS)}.')
    trained = evaluate.restore(args.workdir, args.step)
    faults: list[str] = []
    if args.split:
        features = of_split(trained, args.layer, args.split, args.data_dir)
    else:
        features = of_files(trained, args.layer, args.images, faults)
    say(f'{args.workdir}: step {trained.step}, {args.layer} of {len(features)} image(s)')
    if args.output is not None:
        write(features, args.output, trained.settings.loop.eval_batch_size)
        print(args.output)
    else:
        among = _among(trained, features, args)
        _print_nearest(features, among, args.nearest, args.json)
    return len(faults)


def _among(trained: Trained, queries: Features, args: argparse.Namespace) -> Features:
    if Path(args.among).suffix != '.npz':
        return of_split(trained, args.layer, args.among, args.data_dir)
    among = read(Path(args.among))
    for key in ('layer', 'step', 'parameters_sha256'):
        if among.about.get(key) != queries.about[key]:
            raise UsageError(
                f'--among={args.among} holds {among.about.get("layer")} of '
                f'{among.about.get("config")} at step {among.about.get("step")}, which is not what '
                f'is looked for: make it from this checkpoint, with --layer={args.layer}.'
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
        prog='python -m alexnet_jax.features',
        description="Write a layer's activations, or find the images nearest to an image.",
        epilog='Exit code 1 if a file was no image; the others are taken all the same.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('images', nargs='*', type=command.expand, metavar='IMAGE', help='files, folders or globs')
    add('--workdir', type=command.path, required=True, help='of a run')
    add('--step', default='latest', help='latest, best or a number')
    add('--layer', default='fc7_relu', help='a step of the net, as fc7_relu (the default)')
    add('--split', help='train, validation, test, or an expression of TFDS, instead of IMAGE')
    add('--data_dir', type=command.expand, help='where the data lies, if not where the run had it')
    add('--output', type=command.path, metavar='FILE', help='.npz or .parquet')
    add('--nearest', type=int, metavar='K', help='print the K nearest images of each')
    add(
        '--among',
        type=command.expand,
        default='train',
        help='of which: a split, or an .npz made before',
    )
    add('--json', action='store_true', help='of --nearest, one object a line')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    return command.run('features', _parser, run, argv)


if __name__ == '__main__':
    sys.exit(main())
