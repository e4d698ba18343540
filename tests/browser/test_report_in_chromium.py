"""The report as a reader sees it: a phone and a desk, light and dark. Run by `make test-browser`.

SCREENSHOTS=FOLDER keeps the pictures, to be looked at.
"""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.analysis import report
from tests.browser import chromium

PHONE_PX, DESK_PX = 390, 1280
SCREENS = [(width, scheme) for width in (PHONE_PX, DESK_PX) for scheme in ('light', 'dark')]


@pytest.fixture(scope='module')
def workdir(smoke_run, tmp_path_factory):
    """Return the smoke run in a folder whose name is long and contains HTML."""
    name = '<img src=x onerror=document.title=1>' + 'long' * 20
    return shutil.copytree(smoke_run, tmp_path_factory.mktemp('runs') / name)


@pytest.fixture(scope='module')
def path(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp('report') / 'report.html'
    path.write_text(report.page(report.Run(workdir)))
    return path


@pytest.fixture(scope='module')
def half(workdir, tmp_path_factory):
    """Return the report of a run that has only its config."""
    folder = tmp_path_factory.mktemp('half')
    (folder / 'config.json').write_bytes((workdir / 'config.json').read_bytes())
    (folder / 'report.html').write_text(report.page(report.Run(folder)))
    return folder / 'report.html'


@pytest.fixture(scope='module')
def page():
    found = chromium.find()
    if found is None:
        pytest.fail('there is no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it.')
    with chromium.start(found) as page:
        yield page


@pytest.mark.parametrize(('width', 'scheme'), SCREENS)
@pytest.mark.parametrize('which', ['path', 'half'])
def test_it_fits_loads_nothing_and_is_visible(page, request, which, width, scheme):
    path = request.getfixturevalue(which)
    page.open(path, width, scheme)
    asked = [url for url in page.requests() if not url.startswith('data:')]
    assert asked == [path.resolve().as_uri()]
    assert page.warnings() == []
    assert page.ask('document.documentElement.scrollWidth <= innerWidth')
    assert page.ask('innerWidth') == width
    picture = page.screenshot()
    if folder := os.environ.get('SCREENSHOTS'):
        Path(folder, f'{which}-{width}-{scheme}.png').write_bytes(picture)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert('L'))
    usual = np.median(pixels)
    assert usual > 240 if scheme == 'light' else usual < 40
    assert np.mean(np.abs(pixels - usual) > 128) > 0.005  # text is visible on the background


# The contrast of two colours: WCAG 2.2, relative luminance; read from what the browser computed.
CONTRAST = """(() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255);
    const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const contrast = (element, property) => {
    const own = light(getComputedStyle(element)[property]);
    return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
  };
  const all = (what, property) =>
    [...document.querySelectorAll(what)].map(element => contrast(element, property));
  return {html: all('h1, h2, p, dt, dd, th, td, figcaption, summary, small', 'color'),
          svg: all('svg text', 'fill')};
})()"""


@pytest.mark.parametrize(('width', 'scheme'), SCREENS)
def test_text_is_legible(page, path, width, scheme):
    page.open(path, width, scheme)
    found = page.ask(CONTRAST)
    assert len(found['html']) > 100
    assert len(found['svg']) > 50
    assert min(found['html'] + found['svg']) > 4.5  # WCAG's AA
    smallest = page.ask(
        "Math.min(...[...document.querySelectorAll('svg text')].map(text => { "
        'const svg = text.ownerSVGElement; '
        'const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width; '
        'return parseFloat(getComputedStyle(text).fontSize) * scale; }))'
    )
    assert smallest > 7  # px; the neighbours' labels; the rest has 8 or more


@pytest.mark.parametrize('width', [PHONE_PX, DESK_PX])
def test_no_part_overflows(page, path, width):
    page.open(path, width, 'light')
    page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    over = page.ask(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg') && "
        'e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))'
    )
    assert over == []
    assert page.ask('document.documentElement.scrollWidth <= innerWidth')
    assert page.ask(
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 300)"
    )


def test_its_text_is_present(page, path, workdir):
    page.open(path, DESK_PX, 'light')
    page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.ask('document.body.innerText')
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    (test,) = [record for record in map(json.loads, lines) if record['kind'] == 'test']
    for view in ('centre', 'ten_views'):
        assert text.count(f'{100 * test[view]["top1_error"]:.2f} %') >= 2
    assert str(workdir) in text
    assert 'optimizer.weights.rate' in text
    drawn = page.ask("[...document.querySelectorAll('svg text')].map(t => t.textContent).join('|')")
    for word in ('tower a', 'tower b', 'epochs', 'Ankle boot', 'validation, top-5'):
        assert word in drawn
    assert page.ask('document.title') == 'smoke, quickstart, seed 0'  # no name ran as a script


def test_pictures_are_shown(page, path):
    page.open(path, PHONE_PX, 'dark')
    loaded = page.ask("[...document.querySelectorAll('img')].map(i => i.naturalWidth)")
    assert loaded == [28] * len(loaded)
    assert loaded
    boxes = page.ask("[...document.querySelectorAll('svg image')].map(i => i.getBBox().width)")
    assert len(boxes) > 20
    assert min(boxes) > 0
