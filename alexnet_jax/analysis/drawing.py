"""Draw arrays with matplotlib: the paper's figures and learning curves.

Matplotlib is installed by pip install 'alexnet_jax[figures]'.
"""

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from alexnet_jax import command

Figure = Any  # matplotlib's, which may not be installed
Record = Mapping[str, Any]

# -------------------------------------------------------------------------------------- the style

INK = '#1b1c1d'  # a report replaces it by the page's text colour
# Each has a contrast of 3:1 or more on white and on black. Colour is never the only mark.
BLUE, ORANGE, GREEN, VIOLET, RED = COLOURS = '#2f7de1', '#d95926', '#199e70', '#8a6fe8', '#d6456b'
WIDTH = 4.8  # inches: legible on a phone
DPI = 200
STYLE: dict[str, Any] = {
    'axes.facecolor': 'none',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'font.size': 9.0,
    'axes.titlesize': 9.0,
    'legend.frameon': False,
    'grid.alpha': 0.15,
    'lines.linewidth': 1.6,
    'svg.fonttype': 'none',  # letters stay text
    'svg.hashsalt': 'alexnet_jax',  # the same figure gives the same file
    'text.parse_math': False,  # a class may be called $x$
    'text.color': INK,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'grid.color': INK,
}


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function draw in STYLE, independent of the machine's matplotlibrc."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with command.library('matplotlib.style', 'figures').context([STYLE], after_reset=True):
            return draw(*args, **kwargs)

    return inner


def blank(height: float) -> Figure:
    """Return a figure without axes, WIDTH x height inches."""
    return command.library('matplotlib.figure', 'figures').Figure(
        figsize=(WIDTH, height), layout='constrained'
    )


def _show(axes: Any, image: np.ndarray) -> None:
    """Draw an image [H, W, C] without a frame: uint8 grey where C is 1."""
    grey = image.shape[-1] == 1
    how = {'cmap': 'gray', 'vmin': 0, 'vmax': 255} if grey else {}
    axes.imshow(image[..., 0] if grey else image, interpolation='nearest', **how)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _short(name: str, letters: int = 22) -> str:
    name = command.shown(name)
    return name if len(name) <= letters else name[: letters - 1] + '…'


def _stacked(name: str, letters: int) -> str:
    """Return the first two words, one below the other."""
    return '\n'.join(_short(word, letters) for word in name.split()[:2])


@styled
def render(figure: Figure, form: str, *, transparent: bool = False) -> bytes:
    """Return a figure as a 'png' or 'svg' file; the same figure gives the same bytes."""
    body = io.BytesIO()
    omitted = ('Date', 'Creator', 'Format', 'Type') if form == 'svg' else ('Software',)
    how = {'metadata': dict.fromkeys(omitted), 'transparent': transparent}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the font lacks a letter of a class name
        figure.savefig(body, format=form, dpi=DPI, **how)
    return body.getvalue()


# --------------------------------------------------------------------------------------- filters


class Specialisation(NamedTuple):
    """Colour saturation of the towers' filters; see `specialisation`."""

    towers: tuple[float, ...]  # mean saturation of each tower's filters
    gap: float  # between the most and the least colourful tower
    chance: float  # share of random divisions of the filters that have as large a gap

    def __str__(self) -> str:
        each = ', '.join(f'{mean:.3f}' for mean in self.towers)
        return (
            f'colour saturation of the towers {each}: gap {self.gap:.3f}, '
            f'as large in {self.chance:.2%} of random divisions'
        )


def saturation(kernels: np.ndarray) -> np.ndarray:
    """Return the share of each filter's energy that is colour, in 0..1: [kh, kw, 3, n] -> [n].

    saturation = sum of (w - mean of w over channels)^2 / sum of w^2, both over all positions and
    channels. It is 0 for equal weights of red, green and blue, 1 for a filter without response to
    grey, 2/3 on average for independent Gaussian weights, and 0 for a filter of zeros.
    """
    kernels = kernels.astype(np.float64)
    colour = kernels - kernels.mean(axis=2, keepdims=True)
    energy = np.sum(kernels**2, axis=(0, 1, 2))
    return np.sum(colour**2, axis=(0, 1, 2)) / np.where(energy == 0, 1, energy)


def specialisation(kernels: np.ndarray, towers: int) -> Specialisation:
    """Score whether one tower is colour-blind and another colour-specific (paper, section 6.1).

    The score is the gap between the towers' mean saturations. A permutation test gives the share of
    the divisions of the filters into towers that have as large a gap: of all divisions, or of 9,999
    random ones (seed 0) if there are more.

    Args:
        kernels: the first layer's, [kh, kw, 3, features], tower by tower.
        towers: their number, at least 2.
    """

    def gap(*values: np.ndarray, axis: int) -> np.ndarray:
        return np.ptp([own.mean(axis=axis) for own in values], axis=0)

    each = np.split(saturation(kernels), towers)
    found = stats.permutation_test(each, gap, alternative='greater', rng=np.random.default_rng(0))
    means = tuple(float(own.mean()) for own in each)
    return Specialisation(means, float(found.statistic), float(found.pvalue))


@styled
def fig3(kernels: np.ndarray, towers: int, found: Specialisation | None = None) -> Figure:
    """Draw the filters [kh, kw, C, features], tower by tower (paper, figure 3).

    C is 1 or 3. Each filter is scaled by its largest absolute weight; grey is 0. The towers'
    saturations are in the titles if `found` is given.
    """
    each = np.split(np.moveaxis(kernels, -1, 0), towers)
    columns = min(len(each[0]), 12 if len(each[0]) > 24 else 6)
    tiles = [_tile(own, columns) for own in each]
    figure = blank(sum(WIDTH * tile.shape[0] / tile.shape[1] + 0.3 for tile in tiles))
    column = figure.subplots(towers, 1, squeeze=False)[:, 0]
    for tower, (axes, tile) in enumerate(zip(column, tiles, strict=True)):
        _show(axes, tile)
        title = f'tower {chr(ord("a") + tower)}' if towers > 1 else 'filters'
        if found is not None:
            title += f', mean colour saturation {found.towers[tower]:.2f}'
        axes.set_title(title, loc='left')
    return figure


def _tile(filters: np.ndarray, columns: int) -> np.ndarray:
    """Tile [n, h, w, 1 or 3] as one image in 0..1, [H, W, 4], transparent between the filters."""
    count, height, width, _ = filters.shape
    rows = -(-count // columns)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pixels = np.ones((count, height, width, 4))
    pixels[..., :3] = 0.5 + filters / np.where(largest == 0, 1, 2 * largest)
    pixels = np.pad(pixels, ((0, rows * columns - count), (0, 1), (0, 1), (0, 0)))
    grid = pixels.reshape(rows, columns, height + 1, width + 1, 4).swapaxes(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), 4)[:-1, :-1]


# -------------------------------------------------------------------------------------- learning


def _plot(axes: Any, found: Sequence[Record], kind: str, key: str, **style: Any) -> None:
    """Plot a value of the records of one kind against epochs; errors in %."""
    chosen = [record for record in found if record['kind'] == kind and key in record]
    unit = 100 if key.endswith('error') else 1
    if len(chosen) == 1 or kind == 'validation':
        style |= {'marker': 'o', 'markersize': 4}
    if chosen:
        epochs = [record['epoch'] for record in chosen]
        axes.plot(epochs, [unit * record[key] for record in chosen], **style)


def _label(axes: Any, ylabel: str) -> None:
    axes.set(xlabel='epochs', ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    axes.grid(axis='y')
    axes.legend()


@styled
def fig1(runs: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw the training error of several runs against epochs, by name (paper, figure 1).

    The dashed line is the paper's 25 %.
    """
    figure = blank(3.2)
    axes = figure.subplots()
    for number, (name, found) in enumerate(runs.items()):
        style = {'color': COLOURS[number % 5], 'linestyle': ('-', '--', '-.', ':')[number % 4]}
        _plot(axes, found, 'train', 'top1_error', label=_short(name, 40), **style)
    axes.axhline(25, color=INK, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.6)
    _label(axes, 'training error, %')
    return figure


@styled
def curves(found: Sequence[Record]) -> Figure:
    """Draw loss (nats an image) and errors (%) of training and validation against epochs.

    Training values are means over the batches since the last record, with dropout and on augmented
    images, so they may be higher than validation values.
    """
    figure = blank(5.0)
    loss, errors = figure.subplots(2, 1, sharex=True)
    for axes, kind, key, name, colour, dash in (
        (loss, 'train', 'loss', 'training', BLUE, '-'),
        (loss, 'validation', 'nll', 'validation', ORANGE, '--'),
        (errors, 'train', 'top1_error', 'training, top-1', BLUE, '-'),
        (errors, 'validation', 'top1_error', 'validation, top-1', ORANGE, '--'),
        (errors, 'validation', 'top5_error', 'validation, top-5', GREEN, '-.'),
    ):
        _plot(axes, found, kind, key, label=name, color=colour, linestyle=dash)
    _label(loss, 'loss, nats')
    _label(errors, 'error, %')
    loss.set_xlabel('')
    return figure


# --------------------------------------------------------------------------------------- classes


@styled
def fig4_left(
    images: np.ndarray, probability: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> Figure:
    """Draw images [B, H, W, C] with their five most probable classes (paper, figure 4, left).

    The correct class, `label` [B], is written above the image. If it is among the five most
    probable of [B, classes], its bar is orange and its name bold.
    """
    rows = -(-len(images) // 2)
    figure = blank(1.15 * rows)
    grid = figure.subplots(rows, 4, squeeze=False, width_ratios=[1, 1.6, 1, 1.6]).reshape(-1, 2)
    for axes in grid[len(images) :].flat:
        axes.set_axis_off()
    for (picture, bars), image, own, right in zip(grid, images, probability, label, strict=False):
        _show(picture, image)
        picture.set_anchor('NW')  # a long title then passes over the bars, not through them
        picture.set_title(_short(names[right]), fontsize=8, loc='left', weight='bold')
        _bars(bars, own, right, names)
    return figure


def _bars(axes: Any, probability: np.ndarray, label: int, names: Sequence[str]) -> None:
    """Draw the five most probable of [classes], the most probable at the top, named on the bars."""
    ranked = np.argsort(-probability, kind='stable')[:5].tolist()
    colours = [ORANGE if own == label else BLUE for own in ranked]
    axes.barh(range(len(ranked)), probability[ranked], color=colours, alpha=0.5, height=0.86)
    for place, own in enumerate(ranked):
        text = f'{_short(names[own], 14)} {100 * probability[own]:.0f} %'
        weight = 'bold' if own == label else 'normal'
        axes.text(0.02, place, text, va='center', fontsize=8, weight=weight)
    axes.set(xlim=(0, 1), ylim=(4.6, -0.6), xticks=[], yticks=[])
    axes.spines[['bottom']].set_visible(False)


@styled
def fig4_right(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_label: np.ndarray,
    label: np.ndarray,
    names: Sequence[str],
) -> Figure:
    """Draw images [Q, H, W, C], each followed by its neighbours [Q, k, H, W, C] (paper, figure 4).

    The queries' classes [Q] are written at the left. A neighbour whose class in `label` [Q, k] is
    another has an orange frame and the name of its class below.
    """
    count, k = label.shape
    ratios = [1, 0.15] + [1] * k
    cell = (WIDTH - 0.9) / sum(ratios)
    figure = blank(count * (cell + 0.25))
    grid = figure.subplots(count, k + 2, squeeze=False, width_ratios=ratios)
    for row in range(count):
        grid[row, 1].set_axis_off()
        _show(grid[row, 0], queries[row])
        own = _stacked(names[query_label[row]], 12)
        grid[row, 0].set_ylabel(own, rotation=0, ha='right', va='center', fontsize=8)
        for axes, image, other in zip(
            grid[row, 2:], neighbours[row], label[row].tolist(), strict=True
        ):
            _show(axes, image)
            if other != query_label[row]:
                axes.set_xlabel(_stacked(names[other], 11), fontsize=7, labelpad=2)
                axes.spines[:].set(visible=True, color=ORANGE, linewidth=1.5)
    return figure
