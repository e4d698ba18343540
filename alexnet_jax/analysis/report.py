"""Write a run's report: one self-contained HTML page, without scripts.

    python -m alexnet_jax report --workdir=W --output=report.html

report.html.jinja contains the page and its text; the functions here compute what it shows. If a
section's data is missing (predictions, metrics, images), one sentence replaces it.
"""

import argparse
import base64
import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from PIL import Image

from alexnet_jax import command, config_file, files
from alexnet_jax.analysis import drawing, figures
from alexnet_jax.analysis.figures import Run
from alexnet_jax.errors import AlexNetError, RunError
from alexnet_jax.model import alexnet
from alexnet_jax.training.metrics import log

MISTAKES, CONFUSIONS = 12, 10  # largest numbers shown

# --------------------------------------------------------------------------------------- rendering


def page(run: Run) -> str:
    """Return the HTML of a run's report.

    Raises:
        RunError, OSError: the folder has no run, or matplotlib or Jinja2 is not installed.
    """
    settings = run.settings
    command.library('matplotlib', 'figures')
    jinja2 = command.library('jinja2', 'figures')
    environment = jinja2.Environment(
        autoescape=True, finalize=_text, undefined=jinja2.StrictUndefined
    )
    environment.filters['percent'] = percent
    parts, missing = {}, {}
    for name, find in PARTS.items():
        try:
            parts[name] = find(run)
        except (AlexNetError, OSError) as error:
            missing[name] = error
    source = Path(__file__).with_name('report.html.jinja').read_text(encoding='utf-8')
    values = {'run': run, 'parts': parts, 'missing': missing}
    hidden, stages = figures.last_hidden(settings.net), alexnet.geometry(settings.net)
    return environment.from_string(source).render(values, hidden=hidden, stages=stages)


def _text(value: Any) -> Any:
    """Return a value as printable text; Jinja2 escapes it."""
    if hasattr(value, '__html__'):
        return value
    return f'{value:.6g}' if isinstance(value, float) else command.shown(str(value))


def percent(share: float) -> str:
    """Format a share: 0.1198 -> '11.98 %'."""
    return f'{100 * share:.2f} %'


def _svg(run: Run, name: str) -> str:
    """Return the rest of an <svg> tag that draws one of FIGURES.

    Its ids are unique on the page, and its lines and letters are in the page's text colour.
    """
    text = drawing.render(figures.FIGURES[name](run), 'svg', transparent=True).decode()
    text = text.partition('<svg')[2].replace(drawing.INK, 'currentColor')
    text = re.sub(r'<style type="text/css">.*?</style>', '', text)  # would apply to the page
    return re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', text)


def picture(image: np.ndarray) -> str:
    """Return an image, uint8 [H, W, C], as the data URL of a PNG."""
    body = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(body, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(body.getvalue()).decode()}'


# --------------------------------------------------------------------------------------- sections


def _classes(run: Run) -> list[tuple[str, str]]:
    accuracy = run.scores['class_accuracy']
    return [(name, percent(1 - accuracy[name])) for name in sorted(accuracy, key=accuracy.get)]


def _confusions(run: Run) -> list[tuple[str, str, str]]:
    """Return the most frequent confusions: label, prediction, share of the label's images."""
    names, label = run.trained.class_names, run.predictions['label']
    both = np.stack([label, run.predictions['centre'].argmax(axis=1)])
    pairs, count = np.unique(both[:, both[0] != both[1]], axis=1, return_counts=True)
    share = count / np.bincount(label)[pairs[0]]
    order = np.argsort(-share, kind='stable')[:CONFUSIONS]
    return [
        (names[own], names[taken], percent(part))
        for (own, taken), part in zip(pairs.T[order], share[order], strict=True)
    ]


def mistakes(run: Run) -> list[tuple[str, int, str, float, str]]:
    """Return the most confident mistakes: image, row, prediction, its probability, label."""
    probability, names, label = run.predictions['centre'], run.test.class_names, run.test.labels
    taken, share = probability.argmax(axis=1), probability.max(axis=1)
    wrong = np.flatnonzero(taken != label)
    rows = wrong[np.argsort(-share[wrong], kind='stable')][:MISTAKES].tolist()
    return [
        (picture(run.test.images[i]), i, names[taken[i]], share[i], names[label[i]]) for i in rows
    ]


PARTS: dict[str, Callable[[Run], Any]] = {
    'errors': lambda run: run.scores,
    'classes': _classes,
    'confusions': _confusions,
    'mistakes': mistakes,
    'environment': lambda run: config_file.read_json(run.workdir / 'environment.json'),
    'config': lambda run: traverse_util.flatten_dict(run.settings.tree, sep='.'),
    **{name: functools.partial(_svg, name=name) for name in figures.FIGURES},
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
    with files.atomic_write(output) as scratch:
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
