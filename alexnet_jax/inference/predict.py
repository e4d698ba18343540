"""Classify image files or arrays with a trained net, from its checkpoint alone.

    python -m alexnet_jax predict --workdir=W IMAGE...

An image file is converted to the form in which the data set is stored (`images.decode`). From
there on it is treated as an evaluated image is, with the same code, statistics and batches, so the
probabilities are the same bits. In Python:

    classify = predict.load(workdir)
    probability = classify(images)  # uint8 [B, H, W, C] -> float32 [B, classes]
    print(classify.class_names[probability[0].argmax()])
"""

import argparse
import dataclasses
import functools
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.data import batches
from alexnet_jax.data import images as image_io
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.inference.evaluate import Trained
from alexnet_jax.training.checkpoint import Step
from alexnet_jax.training.metrics import log

MOST_BYTES = 2**28  # of one image file: ImageNet's largest has a twentieth of it

# ---------------------------------------------------------------------------------------- images


def find(words: Sequence[str]) -> Iterator[Path]:
    """Yield the files named: files, folders (all files in them, sorted), globs.

    Names in a folder that begin with a dot are left out. A path that does not exist is yielded
    too, so that reading it reports it.
    """
    for word in words:
        found = [Path(word)]
        if glob.has_magic(word) and not found[0].exists():
            found = sorted(map(Path, glob.glob(word, recursive=True))) or found
        for path in found:
            yield from (_inside(path) or [path]) if path.is_dir() else [path]


def _inside(folder: Path) -> list[Path]:
    def shown(path: Path) -> bool:
        return not any(part.startswith('.') for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob('*') if shown(path) and path.is_file())


def read(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image file as the data set would hold it: uint8, of `shape` (H, W, C).

    The first frame of an animation is taken, or the first of several pages.

    Raises:
        RunError: it does not exist, or is no image.
    """
    try:
        if path.is_dir():
            raise RunError(f'{shown(path)} holds no file.')
        if path.stat().st_size > MOST_BYTES:
            raise RunError(f'{shown(path)} is too large to be a picture.')
        return image_io.decode(path.read_bytes(), shape)
    except image_io.BadImage as error:
        raise RunError(f'{shown(path)} {error}.') from None
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f'{shown(path)} cannot be read as an image: {reason}.') from None


def read_ahead(
    paths: Sequence[Path], shape: tuple[int, int, int], block: int, faults: list[str]
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Read all images among `paths`, up to `block` at a time; a thread reads the next ones.

    Yields:
        Their paths, and uint8 [b, H, W, C]. A sentence about each file that is no image is printed
        and appended to `faults`.
    """

    def one_block(number: int) -> tuple[list[Path], list[np.ndarray], list[str]]:
        names, images, found = [], [], []
        for path in paths[number * block : (number + 1) * block]:
            try:
                images.append(read(path, shape))
                names.append(path)
            except RunError as error:
                found.append(str(error))
        return names, images, found

    for names, images, found in batches.prefetch(one_block, 0, -(-len(paths) // block), depth=1):
        for sentence in found:
            log(sentence)
        faults += found
        if names:
            yield names, np.stack(images)


def shown(path: Path | str) -> str:
    """Return a name for the terminal, whatever bytes or control characters it is made of."""
    text = str(path).encode('utf-8', 'backslashreplace').decode()
    return text if text.isprintable() else ascii(text)[1:-1]


# ----------------------------------------------------------------------------------- the classifier


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained net as a function from images to probabilities; see `load`."""

    trained: Trained
    views: str  # a key of evaluate.VIEWS
    batch_size: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return self.trained.class_names

    @functools.cached_property
    def _predict(self) -> evaluate.Predict:
        return evaluate.make_predict(self.trained.settings, self.trained.layout)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return class probabilities, float32 [B, classes], of uint8 [B, H, W, C], any B.

        Images of another size than the stored one are resized as files are. C is 1 (grey), 3 (RGB)
        or 4 (RGB and alpha).

        Raises:
            UsageError: not uint8, or of another shape.
        """
        images = self._stored(np.asarray(images))
        if not len(images):
            return np.zeros((0, len(self.class_names)), np.float32)
        labels = np.zeros(len(images), np.int32)  # not known, and not used
        return evaluate.probabilities(
            self._predict,
            self.trained.params,
            self.trained.statistics,
            Dataset('images', 'all', images, labels, self.class_names),
            layout=self.trained.layout,
            batch_size=self.batch_size,
            views=evaluate.VIEWS[self.views],
        )

    def _stored(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
            raise UsageError(
                f'images must be uint8 [B, H, W, C] with 1, 3 or 4 channels, and are '
                f'{images.dtype} {list(images.shape)}.'
            )
        shape = self.trained.stored
        if images.shape[1:] == shape:
            return images
        stored = np.empty((len(images), *shape), np.uint8)
        for row, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            stored[row] = image_io.stored(picture, shape)
        return stored


def load(
    workdir: str | Path,
    step: Step = 'latest',
    *,
    views: str = 'centre',
    batch_size: int | None = None,
) -> Classifier:
    """Return a function from uint8 images [B, H, W, C] to probabilities, compiled once.

    Args:
        workdir: the run's folder.
        step: of its checkpoints: a number, 'latest' or 'best'.
        views: 'centre', or 'ten_views' for the average over the paper's ten.
        batch_size: images computed at once; fewer are padded. The default is the evaluation's,
            which gives the bits of predictions_<split>.npz. Others differ by rounding; a small one
            is quicker for single images on a CPU.

    Raises:
        UsageError: the step, views or batch size do not exist.
        RunError: there is no checkpoint, or it is damaged.
    """
    if views not in evaluate.VIEWS:
        raise UsageError(f"views '{views}' is not one of {', '.join(evaluate.VIEWS)}.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f'batch_size must be at least 1, and is {batch_size}.')
    trained = evaluate.restore(workdir, step)
    return Classifier(trained, views, batch_size or trained.settings.loop.eval_batch_size)


def top(probability: np.ndarray, count: int) -> list[int]:
    """Return the `count` most probable of [classes], by label among equals."""
    return np.argsort(-probability, kind='stable')[:count].tolist()


# ---------------------------------------------------------------------------------- the command


def run(
    words: Sequence[str],
    workdir: Path,
    *,
    step: Step = 'latest',
    views: str = 'centre',
    count: int = 5,
    as_json: bool = False,
    batch_size: int | None = None,
) -> int:
    """Print the `count` most probable classes of every image.

    Returns:
        The number of files that were no image; each is named on stderr.

    Raises:
        UsageError, RunError: as `load`.
    """
    if count < 1:
        raise UsageError(f'--top must be at least 1, and is {count}.')
    classify = load(workdir, step, views=views, batch_size=batch_size)
    paths, faults = list(find(words)), list[str]()
    log(f'{workdir}: step {classify.trained.step}, {len(paths)} file(s)')
    width = max(len(shown(path)) for path in paths)
    if not as_json:
        print(f'{"image":<{width}}  probability  class')
        print('-' * (width + 30))
    blocks = read_ahead(paths, classify.trained.stored, classify.batch_size, faults)
    for names, images in blocks:
        for path, probability in zip(names, classify(images), strict=True):
            ranked = [(label, float(probability[label])) for label in top(probability, count)]
            if as_json:
                print(_json_line(path, ranked, classify.class_names), flush=True)
            else:
                print(_rows(path, ranked, classify.class_names, width), flush=True)
    return len(faults)


def _rows(path: Path, ranked: Sequence[tuple[int, float]], names: Sequence[str], width: int) -> str:
    cells = [shown(path)] + [''] * (len(ranked) - 1)
    return '\n'.join(
        f'{name:<{width}}  {probability:>11.2%}  {shown(names[label])}'
        for name, (label, probability) in zip(cells, ranked, strict=True)
    )


def _json_line(path: Path, ranked: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    found = [{'class': names[label], 'label': label, 'probability': p} for label, p in ranked]
    return json.dumps({'image': str(path), 'top': found})


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax predict',
        description='Classify images with a trained net.',
        epilog='Exit code 1 if a file was no image; the others are classified.',
        allow_abbrev=False,
    )
    parser.add_argument(
        'images', nargs='+', type=command.expand, metavar='IMAGE', help='files, folders or globs'
    )
    parser.add_workdir()
    parser.add_step()
    parser.add_argument('--views', type=int, choices=(1, 10), default=1, help='to average over')
    parser.add_argument('--top', type=int, default=5, metavar='K', help='classes to print')
    parser.add_argument('--json', action='store_true', help='one object a line')
    parser.add_argument(
        '--batch_size',
        type=int,
        metavar='N',
        help="images computed at once; the evaluation's by default, which gives its bits; a small "
        'one is quicker for single images on a CPU',
    )
    return parser


def _act(args: argparse.Namespace) -> int:
    return run(
        args.images,
        args.workdir,
        step=args.step,
        views='ten_views' if args.views == 10 else 'centre',
        count=args.top,
        as_json=args.json,
        batch_size=args.batch_size,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Classify what the command line names; return the exit code."""
    return command.run('predict', _parser, _act, argv)
