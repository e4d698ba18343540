"""Draw the paper's figures and others from a workdir, as PNG or SVG.

    python -m alexnet_jax figures fig3 --workdir=W --output=fig3.svg

    fig1        training error against epochs for several runs, --workdir=A,B (paper, figure 1)
    fig3        the first layer's filters, grouped by tower (paper, figure 3); of colour images also
                the towers' colour saturation (paper, section 6.1)
    fig4_left   test images with their five most probable classes (paper, figure 4)
    fig4_right  test images and the training images nearest to them (paper, figure 4)
    curves      loss and errors against epochs

Figures need matplotlib: pip install 'alexnet_jax[figures]'.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import command, config_file, files
from alexnet_jax import config as configuration
from alexnet_jax.analysis import drawing
from alexnet_jax.analysis.drawing import Figure, Specialisation
from alexnet_jax.config import Settings
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.inference.evaluate import Trained
from alexnet_jax.inference.features import Computed, nearest
from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import Net
from alexnet_jax.training import metrics
from alexnet_jax.training.checkpoint import Step
from alexnet_jax.training.metrics import log

# ------------------------------------------------------------------------------------------ a run


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A workdir, of which each property reads one part at its first use.

    Each property raises RunError or OSError if what it reads is missing or damaged.
    """

    workdir: Path
    step: Step = 'latest'
    data_dir: str = ''  # of all data sets; the config's if empty
    among: str = 'train'  # the split in which neighbours are searched

    @functools.cached_property
    def settings(self) -> Settings:
        """Return its config.json, validated."""
        return configuration.unpack(config_file.read_json(self.workdir / 'config.json'))

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """Return its metrics.jsonl, which has a training record."""
        found = metrics.read(self.workdir)
        if 'train' not in [record['kind'] for record in found]:
            raise RunError(
                f'{self.workdir}/metrics.jsonl has no training record, or is damaged: train first.'
            )
        return found

    @functools.cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """Return its predictions_test.npz, of this step; see `evaluate.load_predictions`."""
        found, step = evaluate.load_predictions(self.workdir), self.trained.step
        if found.get('step', step) != step:
            raise RunError(
                f'{self.workdir}/predictions_test.npz is of step {found["step"]}, not of {step}: '
                f'create it with python main.py --mode=evaluate --workdir={self.workdir} '
                f'--step={step}.'
            )
        return found

    @functools.cached_property
    def trained(self) -> Trained:
        """Return its checkpoint, verified."""
        return evaluate.restore(self.workdir, self.step)

    @functools.cached_property
    def scores(self) -> dict[str, Any]:
        """Return the scores of `predictions`, see `evaluate.summary`."""
        return evaluate.summary(self.predictions, self.trained.class_names)

    @functools.cached_property
    def test(self) -> Dataset:
        """Return the test split, whose images `predictions` are of."""
        predicted = self.predictions['label']  # before the data is opened
        found = evaluate.open_split(self.trained, 'test', self.data_dir)
        if not np.array_equal(predicted, found.labels):
            where = f'--workdir={self.workdir} --data_dir={self.data_dir}'
            raise RunError(
                f'{self.workdir}/predictions_test.npz was computed on other images: create it '
                f'again with python main.py --mode=evaluate {where.removesuffix(" --data_dir=")}.'
            )
        return found

    @property
    def kernels(self) -> np.ndarray:
        """Return the first layer's filters: float32 [kh, kw, C, features], tower by tower."""
        first = self.trained.settings.net.layers[0]
        return np.asarray(self.trained.params[first.name]['kernel'])

    @functools.cached_property
    def specialisation(self) -> Specialisation | None:
        """Return how far the towers specialise in colour; None with one tower or grey images."""
        net = self.trained.settings.net
        if net.towers == 1 or self.trained.stored[2] != 3:
            return None
        return drawing.specialisation(self.kernels, net.towers)

    def choose(self, count: int) -> list[int]:
        """Return the test images to show: `count`, at even distances."""
        total = len(self.test)
        return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


# ----------------------------------------------------------------------------- figures of a run


def _fig4_left(run: Run) -> Figure:
    rows, test = run.choose(8), run.test
    probability = run.predictions['centre'][rows]
    return drawing.fig4_left(test.images[rows], probability, test.labels[rows], test.class_names)


def _fig4_right(run: Run) -> Figure:
    trained, test, chosen = run.trained, run.test, run.choose(5)
    layer = last_hidden(trained.settings.net)
    among = evaluate.open_split(trained, run.among, run.data_dir)
    log(f'{run.workdir}: {layer} of {len(among)} images of {among.split}')
    images, features = test.images[chosen], Computed(among.images, trained.extractor(layer))
    found, _ = nearest(features.extract(images), features, k=6)
    labels = test.labels[chosen], among.labels[found]
    return drawing.fig4_right(images, among.images[found], *labels, test.class_names)


def last_hidden(net: Net) -> str:
    """Return the activation that figure 4 of the paper compares: 'fc7_relu', before dropout."""
    layer = net.layers[-2]
    return [name for name in alexnet.activation_names(layer) if name != f'{layer.name}_dropout'][-1]


FIGURES: dict[str, Callable[[Run], Figure]] = {
    'fig3': lambda run: drawing.fig3(
        run.kernels, run.trained.settings.net.towers, run.specialisation
    ),
    'fig4_left': _fig4_left,
    'fig4_right': _fig4_right,
    'curves': lambda run: drawing.curves(run.records),
}


def make(name: str, runs: Sequence[Run]) -> Figure:
    """Draw one of FIGURES of a run, or 'fig1' of several.

    Raises:
        UsageError: there are too many runs.
        RunError, OSError: what the figure needs is missing, or matplotlib is not installed.
    """
    command.library('matplotlib', 'figures')  # before a minute of computing
    if name == 'fig1':
        return drawing.fig1({str(run.workdir): run.records for run in runs})
    if len(runs) > 1:
        raise UsageError(f'{name} takes one --workdir; only fig1 takes several.')
    return FIGURES[name](runs[0])


# ---------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> None:
    """Draw and write a figure, and print its path; raises as `make`."""
    runs = [Run(path, args.step, args.data_dir or '', args.among) for path in args.workdir]
    output = args.output or runs[0].workdir / f'{args.figure}.png'
    if runs[0].workdir.is_dir():  # otherwise `make` reports that there is no run
        files.check_writable(output)
    body = drawing.render(make(args.figure, runs), output.suffix[1:])
    if args.figure == 'fig3' and (found := runs[0].specialisation):
        print(found)
    with files.atomic_write(output) as scratch:
        scratch.write_bytes(body)
    print(output)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax figures',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('figure', metavar='NAME', choices=('fig1', *FIGURES), help='one of the names above')
    what = 'folder of the run; for fig1 several, as A,B'
    parser.add_shared('workdir', type=command.paths, help=what)
    what = '.png or .svg (default: NAME.png in the workdir)'
    add('--output', type=command.ending('.png', '.svg'), metavar='FILE', help=what)
    parser.add_shared('step', 'data_dir', 'among')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return command.run('figures', _parser, run, argv)
