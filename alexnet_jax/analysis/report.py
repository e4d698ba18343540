"""Write a run's report: one self-contained HTML page, without scripts.

    python -m alexnet_jax report --workdir=W --output=report.html

report.html.jinja contains the page and its text; the functions here compute what it shows. If a
section's data is missing (predictions, metrics, images), one sentence replaces it.
"""

import argparse
import base64
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Return the inside of an <svg> tag that draws a figure in the page's text colour.

    `name` is a prefix that makes its ids unique on the page.
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

    Without saved predictions they come from the record of the run's end.

    Raises:
        RunError: there is neither.
    """
    if not evaluate.predictions_path(run.workdir).exists():
        for record in reversed(run.records):
            if record['kind'] == 'test':
                return record, 'metrics.jsonl'
    return evaluate.summary(run.predictions, run.trained.class_names), 'predictions_test.npz'


def mistakes(probability: np.ndarray, label: np.ndarray, count: int) -> list[int]:
    """Return the rows of the `count` most confident mistakes among [N, classes] for labels [N]."""
    wrong = np.flatnonzero(probability.argmax(axis=1) != label)
    confidence = probability[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind='stable')][:count].tolist()


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
    rows = []
    for view, name in VIEW_NAMES.items():
        own = scores[view]
        errors = percent(own['top1_error']), percent(own['top5_error'])
        rows.append((name, *errors, f'{own["nll"]:.4f}'))
    return {'images': scores['images'], 'source': source, 'rows': rows}


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


def _confusions(run: Run) -> dict[str, Any]:
    """Return the most frequent confusions: label, prediction, share of the label's images."""
    names, label = run.trained.class_names, run.predictions['label']
    share = np.zeros((len(names), len(names)))
    np.add.at(share, (label, run.predictions['centre'].argmax(axis=1)), 1)
    share /= np.maximum(share.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    pairs = np.argsort(-share, axis=None, kind='stable')[:CONFUSIONS]
    rows = [
        (names[own], names[taken], percent(share[own, taken]))
        for own, taken in zip(*np.unravel_index(pairs, share.shape), strict=True)
        if share[own, taken] > 0
    ]
    return {'rows': rows}


def _classes(run: Run) -> dict[str, Any]:
    accuracy = results(run)[0]['class_accuracy']
    worst = sorted(accuracy.items(), key=lambda item: item[1])
    return {'rows': [(name, percent(1 - share)) for name, share in worst]}


def _mistakes(run: Run) -> dict[str, Any]:
    test, probability, found = run.test, run.predictions['centre'], []
    for row in mistakes(probability, test.labels, MISTAKES):
        predicted, label = (
            test.class_names[i] for i in (probability[row].argmax(), test.labels[row])
        )
        share = f'{100 * probability[row].max():.1f}'
        found.append((picture(test.images[row]), row, predicted, share, label))
    return {'mistakes': found}


PARTS: dict[str, Callable[[Run], Any]] = {
    'errors': _errors,
    'curves': lambda run: {'svg': inline_svg(drawing.curves(run.records), 'curves')},
    'filters': _filters,
    'examples': lambda run: {'svg': inline_svg(figures.FIGURES['fig4_left'](run), 'fig4l')},
    'neighbours': _neighbours,
    'confusions': _confusions,
    'classes': _classes,
    'mistakes': _mistakes,
    'environment': lambda run: list(run.environment.items()),
    'config': lambda run: sorted(traverse_util.flatten_dict(run.config, sep='.').items()),
}


# ------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> None:
    """Write the report atomically, and print its path; raises as `page`."""
    output = args.output or args.workdir / 'report.html'
    if args.workdir.is_dir():  # otherwise `page` reports that there is no run
        files.check_writable(output)
    found = Run(args.workdir, args.step, args.data_dir or '', args.among)
    with contextlib.suppress(RunError):  # a missing checkpoint leaves its sections out
        _ = found.trained  # a step that does not exist is a usage error
    body = page(found).encode()
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
