"""Write a run's report: one self-contained HTML page, without scripts.

    python -m alexnet_jax report --workdir=W --output=report.html

report.html.jinja contains the page and its text; the functions here compute what it shows. The page
follows the reader's choice of a light or dark theme, and fits a phone. If a section's data is
missing (predictions, metrics, images), one sentence replaces it.
"""

import argparse
import base64
import contextlib
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from PIL import Image

from alexnet_jax import command, files
from alexnet_jax.analysis import drawing, figures
from alexnet_jax.analysis.figures import Run
from alexnet_jax.errors import AlexNetError, RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.model import alexnet
from alexnet_jax.training.metrics import log

MISTAKES, CONFUSIONS = 12, 10  # largest numbers shown
VIEW_NAMES = {'centre': 'one view', 'ten_views': 'ten views'}

# --------------------------------------------------------------------------------------- rendering


def page(run: Run) -> str:
    """Return the HTML of a run's report.

    Raises:
        RunError: the folder has no run, or matplotlib or Jinja2 is not installed.
    """
    settings = run.settings
    command.library('matplotlib', 'figures')
    jinja2 = command.library('jinja2', 'figures')
    environment = jinja2.Environment(
        autoescape=True, finalize=_text, undefined=jinja2.StrictUndefined
    )
    source = Path(__file__).with_name('report.html.jinja').read_text(encoding='utf-8')
    return environment.from_string(source).render(
        title=f'{settings.name}, {settings.scale}, seed {settings.seed}',
        workdir=run.workdir,
        tiles=_tiles(run),
        parts={name: _part(run, find) for name, find in PARTS.items()},
    )


def _text(value: Any) -> Any:
    """Return a value as printable text; Jinja2 escapes it."""
    if hasattr(value, '__html__'):
        return value
    return f'{value:.6g}' if isinstance(value, float) else command.shown(str(value))


def _part(run: Run, find: Callable[[Run], Any]) -> Any:
    """Return the content of a section, or a sentence about what is missing."""
    try:
        return find(run)
    except AlexNetError as error:
        return str(error)


def inline_svg(figure: drawing.Figure, name: str) -> str:
    """Return the inside of an <svg> tag that draws `figure` in the page's text colour.

    Args:
        figure: matplotlib's.
        name: a prefix that makes the figure's ids unique on the page.
    """
    text = drawing.render(figure, 'svg', transparent=True).decode()
    opening, inside = text[text.index('<svg') :].split('>', 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    inside = re.sub(r'<style type="text/css">.*?</style>', '', inside)  # would apply to the page
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', inside)
    return f'{box[0] if box else ""}>{inside.replace(drawing.INK, "currentColor")}'


def picture(image: np.ndarray) -> str:
    """Return an image, uint8 [H, W, C], as the data URL of a PNG."""
    body = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(body, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(body.getvalue()).decode()}'


def percent(share: float) -> str:
    """Format a share: 0.1198 -> '11.98 %'."""
    return f'{100 * share:.2f} %'


# ---------------------------------------------------------------------------------------- results


def results(run: Run) -> tuple[Mapping[str, Any], str]:
    """Return the test errors, as `evaluate.summary` does, and the file that they come from.

    They come from the saved predictions, or else from the record of the run's end.

    Raises:
        RunError: there is neither.
    """
    try:
        summary = evaluate.summary(run.predictions, run.trained.class_names)
        return summary, 'predictions_test.npz'
    except RunError:
        for recorded in _records(run, 'test')[-1:]:
            return recorded, 'metrics.jsonl'
        raise


def _records(run: Run, kind: str) -> list[dict[str, Any]]:
    """Return a run's records of one kind, if they can be read."""
    try:
        return [record for record in run.records if record['kind'] == kind]
    except RunError:
        return []


class Mistake(NamedTuple):
    """A test image with a wrong prediction."""

    row: int  # of the test images
    label: int
    taken_for: int
    probability: float  # of the wrong class


def mistakes(probability: np.ndarray, label: np.ndarray, count: int) -> list[Mistake]:
    """Return the `count` most confident wrong predictions of [N, classes] for labels [N]."""
    taken_for, confidence = probability.argmax(axis=1), probability.max(axis=1)
    wrong = np.flatnonzero(taken_for != label)
    rows = wrong[np.argsort(-confidence[wrong], kind='stable')][:count]
    columns = (rows, label[rows], taken_for[rows], confidence[rows])
    return [Mistake(*values) for values in zip(*(own.tolist() for own in columns), strict=True)]


# --------------------------------------------------------------------------------------- sections


def _tiles(run: Run) -> dict[str, str]:
    tiles = {
        'parameters': f'{sum(s.parameters for s in alexnet.geometry(run.settings.net)):,}',
        'epochs': f'{run.settings.epochs:g}',
    }
    with contextlib.suppress(AlexNetError):  # the section on errors names what is missing
        scores, _ = results(run)
        tiles['test images'] = f'{scores["images"]:,}'
        for view, name in VIEW_NAMES.items():
            tiles[f'test error, {name}'] = percent(scores[view]['top1_error'])
    return tiles


def _errors(run: Run) -> dict[str, Any]:
    scores, source = results(run)
    rows = [(name, *_row(scores[view])) for view, name in VIEW_NAMES.items()]
    found = {'images': scores['images'], 'source': source, 'rows': rows, 'recorded': None}
    for recorded in _records(run, 'test')[-1:]:
        if any(recorded[view] != scores[view] for view in VIEW_NAMES):
            ends = {view: percent(recorded[view]['top1_error']) for view in VIEW_NAMES}
            found['recorded'] = {'step': recorded['step'], **ends}
    return found


def _row(scores: Mapping[str, float]) -> tuple[str, str, str]:
    return percent(scores['top1_error']), percent(scores['top5_error']), f'{scores["nll"]:.4f}'


def _curves(run: Run) -> dict[str, Any]:
    rows = [
        (f'{r["epoch"]:.2f}', r['step'], *_row(r)) for r in run.records if r['kind'] == 'validation'
    ]
    return {'svg': inline_svg(drawing.curves(run.records), 'curves'), 'rows': rows}


def _filters(run: Run) -> dict[str, Any]:
    net, found = run.trained.settings.net, run.specialisation
    return {
        'svg': inline_svg(drawing.fig3(run.kernels, net.towers, found), 'fig3'),
        'layer': net.layers[0],
        'step': run.trained.step,
        'specialisation': found,
    }


def _neighbours(run: Run) -> dict[str, Any]:
    svg = inline_svg(figures.FIGURES['fig4_right'](run), 'fig4r')
    return {'svg': svg, 'among': run.among, 'layer': figures.last_hidden(run.settings.net)}


def _confusion(run: Run) -> dict[str, Any]:
    names = run.trained.class_names
    share = drawing.confusion_matrix(run.predictions['centre'], run.predictions['label'])
    np.fill_diagonal(share, 0)
    pairs = np.argsort(-share, axis=None, kind='stable')[:CONFUSIONS]
    rows = [
        (names[own], names[taken], percent(share[own, taken]))
        for own, taken in zip(*np.unravel_index(pairs, share.shape), strict=True)
        if share[own, taken] > 0
    ]
    return {'svg': inline_svg(figures.FIGURES['confusion'](run), 'confusion'), 'rows': rows}


def _classes(run: Run) -> dict[str, Any]:
    accuracy = results(run)[0]['class_accuracy']
    worst = sorted(accuracy.items(), key=lambda item: item[1])
    return {'rows': [(name, percent(1 - share)) for name, share in worst]}


def _mistakes(run: Run) -> dict[str, Any]:
    test = run.test
    found = mistakes(run.predictions['centre'], test.labels, MISTAKES)
    images = [picture(test.images[one.row]) for one in found]
    return {'mistakes': list(zip(images, found, strict=True)), 'names': test.class_names}


def _environment(run: Run) -> list[tuple[str, Any]]:
    found = dict(run.environment)
    if timed := [r for r in _records(run, 'train') if 'images_per_sec' in r]:
        rate = statistics.median(r['images_per_sec'] for r in timed)
        found['training, s'] = round(timed[-1]['secs'], 1)
        found['images/s, median of the records'] = round(rate, 1)
    return list(found.items())


PARTS: dict[str, Callable[[Run], Any]] = {
    'errors': _errors,
    'curves': _curves,
    'filters': _filters,
    'examples': lambda run: {'svg': inline_svg(figures.FIGURES['fig4_left'](run), 'fig4l')},
    'neighbours': _neighbours,
    'confusion': _confusion,
    'classes': _classes,
    'mistakes': _mistakes,
    'environment': _environment,
    'config': lambda run: sorted(traverse_util.flatten_dict(run.config, sep='.').items()),
}


# ------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> None:
    """Write the report atomically, and print its path.

    Raises:
        RunError: the folder has no run, the file cannot be written, or a library is missing.
    """
    output = args.output or args.workdir / 'report.html'
    if args.workdir.is_dir():  # otherwise `page` reports that there is no run
        files.check_writable(output)
    body = page(Run(args.workdir, args.step, args.data_dir or '', args.among)).encode()
    with files.output(output) as scratch:
        scratch.write_bytes(body)
    log(f'{args.workdir}: {len(body):,} bytes')
    print(output)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax report',
        description="Write a run's errors, figures and mistakes as one self-contained HTML page.",
        allow_abbrev=False,
    )
    what = '.html (default: report.html in the workdir)'
    parser.add_argument('--output', type=command.ending('.html'), metavar='FILE', help=what)
    parser.add_shared('workdir', 'step', 'data_dir', 'among')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for; return the exit code."""
    return command.run('report', _parser, run, argv)
