"""A run on one page: an HTML file that needs no network, no script and no other file.

    python -m alexnet_jax.report --workdir=W --output=report.html

Images and figures lie in the page itself. It follows the reader's choice of light or dark, and
reads on a phone. What a workdir does not hold (predictions, metrics, data) is said in its place, in
one sentence; the rest is there.
"""

import argparse
import base64
import contextlib
import dataclasses
import html
import io
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from alexnet_jax import command, evaluate, figures, model, predict
from alexnet_jax.data import Dataset
from alexnet_jax.errors import AlexNetError, RunError
from alexnet_jax.figures import INK, Run
from alexnet_jax.records import say

MISTAKES, CONFUSIONS = 12, 10  # how many are shown

# ------------------------------------------------------------------------------------------- HTML


def escape(value: object) -> str:
    """Anything as text of the page, whatever bytes a name is made of."""
    if isinstance(value, float):
        value = f'{value:.6g}'
    return html.escape(predict.shown(str(value)))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box that scrolls by itself; numbers to the right."""
    cells = ''.join(f'<th scope="col">{escape(word)}</th>' for word in head)
    lines = []
    for first, *others in rows:
        rest = ''.join(f'<td>{escape(value)}</td>' for value in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{rest}</tr>\n')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>\n'
        f'<tbody>{"".join(lines)}</tbody></table></div>'
    )


def facts(rows: Iterable[tuple[object, object]]) -> str:
    """Pairs, one below the other; a long value goes on in the next line."""
    lines = ''.join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>\n'
        for key, value in rows
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def folded(summary: str, body: str) -> str:
    """What opens on a click."""
    return f'<details><summary>{escape(summary)}</summary>{body}</details>'


def picture(image: np.ndarray, alt: str) -> str:
    """An image, uint8 [H, W, C], in the page."""
    body = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(body, 'PNG')
    data = base64.b64encode(body.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def drawing(figure: figures.Figure, name: str, caption: str) -> str:
    """A figure in the page, in the page's own ink, so that it is seen on light and on dark.

    Args:
        figure: matplotlib's.
        name: that no other figure of the page has; what has an id in it, has it with this before.
        caption: what is to be seen.
    """
    text = figures.render(figure, 'svg', transparent=True).decode()
    opening, inside = text[text.index('<svg') :].split('>', 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    inside = re.sub(r'<style type="text/css">.*?</style>', '', inside)  # it would rule the page
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', inside)
    inside = inside.replace(INK, 'currentColor')
    svg = f'<svg role="img" aria-label="{escape(caption)}" {box[0] if box else ""}>{inside}'
    return f'<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def percent(share: float) -> str:
    """0.1198 -> '11.98 %'."""
    return f'{100 * share:.2f} %'


# ---------------------------------------------------------------------------------------- results


class Results(NamedTuple):
    """Errors on the test images, and where they are from."""

    scores: Mapping[str, Any]  # as evaluate.summary makes them
    source: str


def results(run: Run) -> Results:
    """Of the predictions that lie there, or else of the record of the run's end.

    Raises:
        RunError: there is neither.
    """
    try:
        scores = evaluate.summary(run.predictions, run.trained.class_names)
        return Results(scores, 'predictions_test.npz')
    except RunError as missing:
        if (recorded := _recorded(run)) is None:
            raise missing
        return Results(recorded, 'metrics.jsonl')


def _recorded(run: Run) -> Mapping[str, Any] | None:
    try:
        return next((r for r in reversed(run.records) if r['kind'] == 'test'), None)
    except RunError:
        return None


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An image that was taken for what it is not."""

    row: int  # of the test images
    label: int
    taken_for: int
    probability: float  # of that


def mistakes(probability: np.ndarray, label: np.ndarray, count: int) -> list[Mistake]:
    """The wrong answers of [N, classes] for [N] that were given most confidently, those first."""
    taken_for = probability.argmax(axis=1)
    confidence = np.where(taken_for == label, -1.0, probability.max(axis=1))
    order = np.argsort(-confidence, kind='stable')[: min(count, int(np.sum(taken_for != label)))]
    return [
        Mistake(int(row), int(label[row]), int(taken_for[row]), float(confidence[row]))
        for row in order
    ]


# --------------------------------------------------------------------------------------- sections


def _head(run: Run) -> str:
    tiles = {
        'parameters': f'{sum(s.parameters for s in model.geometry(run.settings.net)):,}',
        'epochs': f'{run.settings.epochs:g}',
    }
    with contextlib.suppress(AlexNetError):  # what is missing is said among the errors
        scores = results(run).scores
        tiles |= {
            'test images': f'{scores["images"]:,}',
            'test error, one view': percent(scores['centre']['top1_error']),
            'test error, ten views': percent(scores['ten_views']['top1_error']),
        }
    return '<dl class="tiles">' + _terms(tiles) + '</dl>'


def _terms(of: Mapping[str, object]) -> str:
    return ''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in of.items())


def _errors(run: Run) -> str:
    scores, source = results(run)
    names = {'centre': 'one view', 'ten_views': 'ten views'}
    rows = [
        (name, *map(percent, _top(scores[view])), f'{scores[view]["nll"]:.4f}')
        for view, name in names.items()
    ]
    text = f'<p>Errors on {scores["images"]:,} test images; from {escape(source)}.'
    recorded = _recorded(run)
    if recorded is not None and any(recorded[view] != scores[view] for view in names):
        text += (
            f' The run itself ended, at step {recorded["step"]}, with '
            f'{percent(recorded["centre"]["top1_error"])} in one view and '
            f'{percent(recorded["ten_views"]["top1_error"])} in ten (metrics.jsonl): the '
            f'predictions were made again since, from another step or on other devices.'
        )
    head = ('', 'top-1', 'top-5', 'loss, nats')
    return text + '</p>' + table(head, rows)


def _top(scores: Mapping[str, float]) -> tuple[float, float]:
    return scores['top1_error'], scores['top5_error']


def _curves(run: Run) -> str:
    caption = (
        'Loss and errors against epochs. Those of training are means over the batches since the '
        'point before, under dropout and on augmented images.'
    )
    rows = [
        (f'{r["epoch"]:.2f}', r['step'], *map(percent, _top(r)), f'{r["nll"]:.4f}')
        for r in run.records
        if r['kind'] == 'validation'
    ]
    head = ('epoch', 'step', 'top-1', 'top-5', 'loss, nats')
    body = drawing(figures.curves(run.records), 'curves', caption)
    return body + (folded('Validation, in numbers', table(head, rows)) if rows else '')


def _filters(run: Run) -> str:
    net = run.trained.settings.net
    caption = (
        f'The {net.layers[0].features} filters of {net.layers[0].name}, tower by tower (paper, '
        f'figure 3), at step {run.trained.step}. Grey is 0; each is scaled by itself.'
    )
    return drawing(figures.fig3(run.kernels, net.towers), 'fig3', caption)


def _towers(run: Run) -> str:
    found = figures.of_run(run)
    caption = (
        'How colourful each filter is: the share of its energy that is left when the mean over '
        'red, green and blue is taken away; independent weights have 2/3 on the average. The '
        'authors saw one tower become colour-blind and the other colour-specific in every run '
        f'(section 6.1). Found: {found}.'
    )
    figure = figures.towers_figure(run.kernels, run.trained.settings.net.towers)
    return drawing(figure, 'towers', caption)


def _examples(run: Run) -> str:
    caption = (
        'Test images, at even distances in the data set, with their five most probable classes '
        '(paper, figure 4, left). The right class stands over the image; its bar is orange.'
    )
    return drawing(figures.FIGURES['fig4_left'](run), 'fig4l', caption)


def _neighbours(run: Run) -> str:
    caption = (
        f'Test images, and the six of {run.among} nearest to each by the Euclidean distance of '
        f'{figures.last_hidden(run.settings.net)} (paper, figure 4, right). Those of another '
        'class have an orange frame.'
    )
    return drawing(figures.FIGURES['fig4_right'](run), 'fig4r', caption)


def _classes(run: Run) -> str:
    accuracy = results(run).scores['class_accuracy']
    worst = sorted(accuracy.items(), key=lambda item: item[1])
    rows = [(name, percent(1 - share)) for name, share in worst]
    numbers = table(('class', 'top-1 error, one view'), rows)
    return numbers if len(rows) <= 30 else folded(f'All {len(rows)} classes', numbers)


def _confusion(run: Run) -> str:
    caption = (
        'Of the images of each class (a row), the share in % that is taken for each class (a '
        'column), in one view.'
    )
    return drawing(figures.FIGURES['confusion'](run), 'confusion', caption)


def _confused(run: Run) -> str:
    names = run.trained.class_names
    share = figures.confusion_matrix(run.predictions['centre'], run.predictions['label'])
    np.fill_diagonal(share, 0)
    pairs = np.argsort(-share, axis=None, kind='stable')[:CONFUSIONS]
    rows = [
        (names[own], names[taken], percent(share[own, taken]))
        for own, taken in zip(*np.unravel_index(pairs, share.shape), strict=True)
        if share[own, taken] > 0
    ]
    return folded('The most frequent confusions', table(('is', 'taken for', 'share'), rows))


def _mistakes(run: Run) -> str:
    test = run.test
    found = mistakes(run.predictions['centre'], test.labels, MISTAKES)
    if not found:
        return '<p>There is none: every test image was recognised.</p>'
    return '<div class="gallery">' + ''.join(_mistake(test, one) for one in found) + '</div>'


def _mistake(test: Dataset, one: Mistake) -> str:
    names = test.class_names
    image = picture(test.images[one.row], f'test image {one.row}')
    return (
        f'<figure>{image}<figcaption><b>{escape(names[one.taken_for])}</b> '
        f'{100 * one.probability:.1f}&nbsp;%<br>is {escape(names[one.label])}<br>'
        f'<small>image {one.row}</small></figcaption></figure>\n'
    )


def _environment(run: Run) -> str:
    found = run.json('environment.json')
    trained = [r for r in _records(run) if r['kind'] == 'train' and 'images_per_sec' in r]
    if trained:
        found |= {
            'training, s': round(trained[-1]['secs'], 1),
            'images/s, median of the records': round(
                statistics.median(r['images_per_sec'] for r in trained), 1
            ),
        }
    return facts(found.items())


def _records(run: Run) -> Sequence[Mapping[str, Any]]:
    try:
        return run.records
    except RunError:
        return ()


def _config(run: Run) -> str:
    return folded('Every value', facts(flat(run.config)))


def flat(tree: Mapping[str, Any], prefix: str = '') -> list[tuple[str, object]]:
    """A nested config as (dotted key, value), sorted."""
    rows: list[tuple[str, object]] = []
    for key, value in sorted(tree.items()):
        inner = isinstance(value, Mapping)
        rows += flat(value, f'{prefix}{key}.') if inner else [(prefix + key, value)]
    return rows


SECTIONS: tuple[tuple[str, tuple[Callable[[Run], str], ...]], ...] = (
    ('Errors', (_errors,)),
    ('Learning', (_curves,)),
    ('Filters', (_filters, _towers)),
    ('Some test images', (_examples,)),
    ('Nearest training images', (_neighbours,)),
    ('Classes', (_confusion, _confused, _classes)),
    ('The most confident mistakes', (_mistakes,)),
    ('Environment', (_environment,)),
    ('Config', (_config,)),
)


# ---------------------------------------------------------------------------------------- the page

CSS = """
:root { color-scheme: light dark; --ink: #1b1c1d; --soft: #5c6066; --page: #fcfcfb;
  --line: #d9dadd; --box: #f1f2f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9eaec; --soft: #a3a8b0; --page: #17181a;
  --line: #3a3d42; --box: #222427; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
main { columns: 27rem; column-gap: 2.5rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
section > * { break-inside: avoid; } h2 { break-after: avoid; }
.soft, figcaption, dt { color: var(--soft); }
figcaption, dt { font-size: .875rem; }
figure { margin: 0 0 1rem; max-width: 34rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.tiles div { background: var(--box); border-radius: .5rem; padding: .75rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 400; color: var(--soft); } tr > :first-child { text-align: left; }
tbody th { color: inherit; }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr));
  gap: .75rem; }
.gallery figure { margin: 0; } .gallery figcaption { color: inherit; line-height: 1.35; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
small { color: var(--soft); }
.missing { background: var(--box); border-left: 3px solid #d95926; padding: .5rem .75rem; }
summary { cursor: pointer; padding: .25rem 0; }
"""


def page(run: Run) -> str:
    """The HTML of a run's report.

    Raises:
        RunError: the folder holds no run, or matplotlib is not installed.
    """
    settings = run.settings
    command.library('matplotlib', 'figures')
    title = f'{settings.name}, {settings.scale}, seed {settings.seed}'
    sections = ''.join(_section(run, name, parts) for name, parts in SECTIONS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(run.workdir)}</p>
{_head(run)}
</header>
<main>
{sections}</main>
</body>
</html>
"""


def _section(run: Run, name: str, parts: Sequence[Callable[[Run], str]]) -> str:
    body = '\n'.join(dict.fromkeys(_part(run, part) for part in parts))  # a complaint but once
    return f'<section>\n<h2>{escape(name)}</h2>\n{body}\n</section>\n'


def _part(run: Run, part: Callable[[Run], str]) -> str:
    """What a part has to show, or the sentence that says why it has not."""
    try:
        return part(run)
    except AlexNetError as error:
        return f'<p class="missing">{escape(error)}</p>'


# ------------------------------------------------------------------------------------- the command


def write(run: Run, output: Path) -> None:
    """Write a run's report: a file that is whole or not there.

    Raises:
        RunError: the folder holds no run, the file cannot be written, or matplotlib is missing.
    """
    if not output.parent.is_dir():  # said before a minute of work, not after it
        raise RunError(f'{output} cannot be written: {output.parent} is no folder.')
    figures.write(output, page(run).encode())


def _act(args: argparse.Namespace) -> int:
    output = args.output or args.workdir / 'report.html'
    run = Run(args.workdir, args.step, args.data_dir, args.among)
    write(run, output)
    say(f'{args.workdir}: {output.stat().st_size:,} bytes')
    print(output)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax.report',
        description="A run's errors, figures and mistakes on one page that needs no network.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--workdir', type=command.path, required=True, help='of a run')
    add('--output', type=command.path, metavar='FILE', help='W/report.html if not given')
    add('--step', default='latest', help='of the checkpoints: latest, best or a number')
    add('--data_dir', default='', help='where the data lies, if not where the run had it')
    add('--among', default='train', help="where neighbours are looked for: a split, or TFDS's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; returns the exit code."""
    return command.run('report', _parser, _act, argv)


if __name__ == '__main__':
    sys.exit(main())
