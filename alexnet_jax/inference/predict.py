"""Classify image files or arrays with a trained net, from its checkpoint alone.

    python -m alexnet_jax predict --workdir=W IMAGE...

An image file is converted to the format in which the data set is stored (`images.decode`). The
evaluation's code, statistics and batches do the rest, so the probabilities are bitwise identical.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.data import image_files
from alexnet_jax.data import images as image_io
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.inference.evaluate import Trained
from alexnet_jax.training.checkpoint import Step
from alexnet_jax.training.metrics import log

# ----------------------------------------------------------------------------------- the classifier


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained net as a function from images to probabilities; see `load`."""

    trained: Trained
    views: str  # a key of evaluate.VIEWS
    batch_size: int = 0  # see `load`

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names by label."""
        return self.trained.class_names

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return class probabilities, float32 [B, classes], of uint8 [B, H, W, C], any B.

        Images of another size are resized as files are. C is 1 (grey), 3 (RGB) or 4 (RGB, alpha).

        Raises:
            UsageError: the images are not uint8, or of another shape.
        """
        images, trained = np.asarray(images), self.trained
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
            raise UsageError(
                f'images must be uint8 [B, H, W, C] with 1, 3 or 4 channels, but are '
                f'{images.dtype} {list(images.shape)}.'
            )
        if images.shape[1:] != trained.stored:
            pictures = [
                Image.fromarray(own[..., 0] if own.shape[-1] == 1 else own) for own in images
            ]
            converted = [np.asarray(image_io.stored(own, trained.stored)) for own in pictures]
            images = np.array(converted, np.uint8).reshape(-1, *trained.stored)
        unused_labels = np.zeros(len(images), np.int32)
        dataset = Dataset('images', 'all', images, unused_labels, self.class_names)
        net = trained.settings, trained.layout, trained.params, trained.statistics
        views = {'': evaluate.VIEWS[self.views]}
        return evaluate.probabilities(*net, dataset, views, self.batch_size)['']


def load(
    workdir: str | Path, step: Step = 'latest', *, views: str = 'centre', batch_size: int = 0
) -> Classifier:
    """Return a function from uint8 images [B, H, W, C] to probabilities, compiled once.

    For workdir, step and errors see `evaluate.restore`.

    Args:
        views: 'centre', or 'ten_views' for the average over the paper's ten.
        batch_size: images computed at once; fewer are padded. 0, the default, is the evaluation's,
            which gives the bits of predictions_<split>.npz; others differ by rounding. On a CPU, a
            small one is faster for single images.
    """
    return Classifier(evaluate.restore(workdir, step), views, batch_size)


# ---------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Print the most probable classes of every image; return the number of files that were none."""
    views = 'ten_views' if args.views == 10 else 'centre'
    classify = load(args.workdir, args.step, views=views, batch_size=args.batch_size)
    trained, paths, faults = classify.trained, image_files.find(args.images), list[str]()
    log(f'{args.workdir}: step {trained.step}, {len(paths)} file(s)')
    block = args.batch_size or trained.settings.loop.eval_batch_size
    rows = [('image', 'probability', 'class')]
    for names, images in image_files.read_ahead(paths, trained.stored, block, faults):
        for path, probability in zip(names, classify(images), strict=True):
            found: list[dict[str, Any]] = [
                {'class': trained.class_names[i], 'label': i, 'probability': float(probability[i])}
                for i in evaluate.top(probability, args.top)
            ]
            if args.json:
                print(json.dumps({'image': str(path), 'top': found}), flush=True)
            for own in found:
                share, name = f'{own["probability"]:>11.2%}', command.shown(own['class'])
                rows.append((command.shown(path), share, name))
    if rows[1:] and not args.json:
        print(command.table(rows))
    return len(faults)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax predict',
        description='Classify images with a trained net.',
        epilog='If a file cannot be read as an image, the others are still classified, and the '
        'exit code is 1.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('images', nargs='+', type=command.expand, metavar='IMAGE', help='files, folders or globs')
    parser.add_shared('workdir', 'step')
    views = 'number of views to average: 1 (the default), or 10 as in the paper'
    add('--views', type=int, choices=(1, 10), default=1, help=views)
    what = 'classes to print (default: 5)'
    add('--top', type=command.positive, default=5, metavar='K', help=what)
    add('--json', action='store_true', help='print one JSON object per line')
    what = (
        "images per batch; the default is the evaluation's, for bitwise identical results; on a "
        'CPU a small value is faster for single images'
    )
    add('--batch_size', type=command.positive, default=0, metavar='N', help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Classify the images of the command line; return the exit code."""
    return command.run('predict', _parser, run, argv)
