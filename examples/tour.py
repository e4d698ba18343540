"""From a checkpoint to all that can be made of it, in about a minute on a CPU.

    make                                                       # trains one, if there is none yet
    pip install 'alexnet_jax[figures]'
    python examples/tour.py --workdir=workdirs/alexnet-quickstart-0 --output=tour

Each stop is a function of a few lines, to be taken from here; in `tour` lie, when it is over,

    images/              eight test images as PNG files, which are then classified
    features.npy, .json  the last hidden layer's activations of the test images
    fig3.png, ...        the paper's figures, as PNG and as SVG
    report.html          the run on one page
    net.stablehlo        preprocessing, net and weights in one file that runs with jax alone
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.analysis import figures, report
from alexnet_jax.analysis.figures import Run
from alexnet_jax.errors import AlexNetError, RunError
from alexnet_jax.inference import evaluate, features, predict
from alexnet_jax.interop import weights

AMONG = 'train[:10%]'  # neighbours are looked for in a part of the data: this is a tour


def save_images(run: Run, folder: Path) -> None:
    """Eight test images as files, named by their class."""
    test = evaluate.open_split(run.trained, 'test', run.data_dir)
    folder.mkdir(exist_ok=True)
    for row, (image, label) in enumerate(zip(test.images[:8], test.labels[:8], strict=True)):
        name = ''.join(c if c.isalnum() else '-' for c in test.class_names[label])
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(folder / f'{row}-{name}.png')


def classify_files(run: Run, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image files to (uint8 images [B, H, W, C], probabilities [B, classes])."""
    classify = predict.Classifier(run.trained, 'centre', batch_size=8)  # see also predict.load
    paths = list(predict.find([str(folder)]))
    images = np.stack([predict.read(path, run.trained.stored) for path in paths])
    probability = classify(images)
    for path, own in zip(paths, probability, strict=True):
        first, second = predict.top(own, 2)
        names = classify.class_names
        print(f'{path.name}: {names[first]} {own[first]:.1%}, {names[second]} {own[second]:.1%}')
    return images, probability


def save_features(run: Run, path: Path) -> None:
    """Write the last hidden layer's activations of the test images."""
    layer = figures.last_hidden(run.trained.settings.net)
    activations = features.of_split(run.trained, layer, 'test', run.data_dir)
    features.write(activations, path, block=500)


def find_neighbours(run: Run, path: Path) -> None:
    """Of the first ten of those images, the nearest but for itself, which is at distance 0."""
    found = features.read(path)
    neighbours = features.nearest(found.rows[:10], found.rows, k=2)
    for row, (index, distance) in enumerate(
        zip(neighbours.index[:, 1], neighbours.distance[:, 1], strict=True)
    ):
        names = found.class_name(row), found.class_name(int(index))
        print(f'{found.image(row)} ({names[0]}): {distance:.2f} to [{index}] ({names[1]})')


def draw_figures(run: Run, folder: Path) -> None:
    """All figures of one run, PNG and SVG; what a run cannot show is said."""
    for name in figures.FIGURES:
        try:
            figure = figures.make(name, [run])
        except AlexNetError as error:
            print(f'no {name}: {error}')
            continue
        for form in ('png', 'svg'):
            figures.write(folder / f'{name}.{form}', figures.render(figure, form))


def export_and_run(run: Run, path: Path, images: np.ndarray, expected: np.ndarray) -> None:
    """Export the net, run the file as one would without this code, and compare."""
    print(weights.export_checkpoint(path, run.workdir, run.step))
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    difference = float(np.abs(np.asarray(exported.call(images)) - expected).max())
    print(f'its probabilities differ by {difference:.1e} at most from those above')
    if difference > 1e-4:  # what issues from another order of sums is some 1e-7
        raise RunError(f'{path} computes something else than its checkpoint: report this.')


def tour(workdir: Path, output: Path, data_dir: str) -> None:
    """All stops."""
    run = Run(workdir, data_dir=data_dir, among=AMONG)
    output.mkdir(parents=True, exist_ok=True)
    save_images(run, output / 'images')
    images, probability = classify_files(run, output / 'images')
    save_features(run, output / 'features.npy')
    find_neighbours(run, output / 'features.npy')
    draw_figures(run, output)
    report.write(run, output / 'report.html')
    export_and_run(run, output / 'net.stablehlo', images, probability)
    print(output / 'report.html')


def _parser() -> command.Parser:
    parser = command.Parser(prog='python examples/tour.py', description='A tour of a checkpoint.')
    parser.add_argument('--workdir', type=command.path, required=True, help='of a run')
    parser.add_argument('--output', type=command.path, default=Path('tour'), help='a folder')
    parser.add_argument('--data_dir', type=command.expand, help='where the data lies')
    return parser


def _act(args: argparse.Namespace) -> int:
    try:
        tour(args.workdir, args.output, args.data_dir)
    except OSError as error:
        raise RunError(f'{error.filename}: {error.strerror}; choose another --output.') from error
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Take the tour; returns the exit code."""
    return command.run('tour', _parser, _act, argv)


if __name__ == '__main__':
    sys.exit(main())
