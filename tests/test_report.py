"""Test the report: its content, well-formed HTML, one file."""

import base64
import dataclasses
import io
import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from alexnet_jax.analysis import drawing, report
from alexnet_jax.analysis.figures import Run
from alexnet_jax.data import datasets
from alexnet_jax.inference import evaluate

pytest.importorskip('matplotlib', reason="pip install -e '.[figures]'")

TEST = 40
EVIL = '<script>alert("1")</script>&\'$x$'
VOID = {'meta', 'img', 'br', 'link', 'input'}


@pytest.fixture(scope='module')
def workdir(smoke_run):
    return smoke_run


@pytest.fixture
def copy(workdir, tmp_path):
    """Return a copy of the run."""
    return shutil.copytree(workdir, tmp_path / 'copy')


class Document(HTMLParser):
    """A page's tags and text; checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f'<{tag}> has an attribute twice: {names}'
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] not in ('style', 'script'):
            self.words.append(text)

    @property
    def text(self):
        return ' '.join(' '.join(self.words).split())

    def values(self, *attributes):
        return [own[name] for _, own in self.tags for name in attributes if name in own]


@pytest.fixture(scope='module')
def html(workdir, tmp_path_factory):
    output = tmp_path_factory.mktemp('report') / 'r.html'
    assert report.main([f'--workdir={workdir}', f'--output={output}']) == 0
    assert [path.name for path in output.parent.iterdir()] == ['r.html']
    return output.read_text()


@pytest.fixture(scope='module')
def document(html):
    return Document(html)


# -------------------------------------------------------------------------------- one complete file


def test_it_links_to_no_other_file(html, document):
    for link in document.values('src', 'href', 'xlink:href', 'srcset', 'data', 'poster', 'action'):
        assert link.startswith(('data:image/png;base64,', '#')), link
    for address in re.findall(r'url\(\s*[\'"]?(.)', html):
        assert address == '#'
    assert '@import' not in html
    tags = {tag for tag, _ in document.tags}
    assert not tags & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'}
    assert not [name for _, own in document.tags for name in own if name.startswith('on')]
    (policy,) = [own['content'] for _, own in document.tags if 'http-equiv' in own]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_ids_are_unique_and_references_resolve(html, document):
    ids = document.values('id')
    assert len(ids) > 50  # four drawings
    assert len(set(ids)) == len(ids)
    wanted = re.findall(r'(?:href="#|url\(#)([^")]*)', html)
    assert wanted
    assert set(wanted) <= set(ids)


def test_every_picture_has_a_text_alternative(document):
    drawings = [own for tag, own in document.tags if tag == 'svg']
    assert len(drawings) == 4
    assert all(own['aria-label'] and own['viewbox'] for own in drawings)
    images = [own for tag, own in document.tags if tag == 'img']
    assert images
    assert all(own['alt'] for own in images)


def test_drawings_use_the_text_colour_of_the_page(html):
    assert html.count('currentColor') > 20
    assert drawing.INK not in html[html.index('<body') :]
    assert '(prefers-color-scheme: dark)' in html
    assert 'color-scheme: light dark' in html


def test_it_has_a_viewport_for_phones(document):
    assert ('meta', {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'}) in (
        document.tags
    )


# ---------------------------------------------------------------------------------------- content


def test_it_shows_the_metrics(workdir, document):
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    (test,) = [record for record in found if record['kind'] == 'test']
    for view, name in (('centre', 'one view'), ('ten_views', 'ten views')):
        own = test[view]
        row = f'{name} {100 * own["top1_error"]:.2f} % {100 * own["top5_error"]:.2f} % '
        assert row + f'{own["nll"]:.4f}' in document.text
        assert f'test error, {name} {100 * own["top1_error"]:.2f} %' in document.text
    for name, share in test['class_accuracy'].items():
        assert f'{name} {100 * (1 - share):.2f} %' in document.text
    assert f'Errors on {TEST} test images, from predictions_test.npz.' in document.text


def test_it_shows_config_and_environment(workdir, document):
    for name in ('config.json', 'environment.json'):
        tree = json.loads((workdir / name).read_text())
        for key, value in traverse_util.flatten_dict(tree, sep='.').items():
            shown = f'{value:.6g}' if isinstance(value, float) else str(value)
            assert f'{key} {shown}' in document.text
    assert 'optimizer.weights.rate 0.02' in document.text


def test_what_does_not_apply_is_left_out(document):
    """The net was trained on grey images, for which colour saturation is not defined."""
    assert not [own for tag, own in document.tags if own.get('class') == 'missing']
    assert 'saturation' not in document.text
    assert 'Colour saturation' not in document.text


def test_a_net_that_saw_colour_has_its_towers(run_in_colour):
    document = Document(report.page(run_in_colour))
    assert f'Found: {run_in_colour.specialisation}.' in document.text
    assert '2/3 on average' in document.text


@pytest.fixture
def run_in_colour(copy):
    """Return the smoke run, changed to one on colour images."""
    run = Run(copy)
    params = run.trained.params
    kernel = np.random.default_rng(0).normal(size=(11, 11, 3, 12)).astype(np.float32)
    run.__dict__['trained'] = dataclasses.replace(
        run.trained, stored=(28, 28, 3), params=params | {'conv1': {'kernel': kernel}}
    )
    (copy / 'predictions_test.npz').unlink()  # of the original net
    return run


def mistaken_rows(probability, label):
    names, images = tuple('abcd'), np.zeros((len(label), 2, 2, 1), np.uint8)
    test = datasets.Dataset('letters', 'test', images, label, names)
    run = types.SimpleNamespace(test=test, predictions={'centre': probability})
    return [row for _, row, *_ in report.mistakes(run)]


def test_mistakes_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    probability = rng.integers(1, 5, (100, 4)) / 10  # many ties
    label = rng.integers(0, 4, 100)
    wrong = []
    for row, (own, right) in enumerate(zip(probability.tolist(), label.tolist(), strict=True)):
        if own.index(max(own)) != right:
            wrong.append((-max(own), row))
    expected = [row for _, row in sorted(wrong)]
    assert len(expected) > report.MISTAKES
    assert mistaken_rows(probability, label) == expected[: report.MISTAKES]
    assert mistaken_rows(np.eye(3), np.arange(3)) == []


def test_the_mistakes_are_shown_with_their_images(workdir, document, data_dir):
    test = datasets.load('fashion_mnist', data_dir, f'test[:{TEST}]')
    probability = evaluate.load_predictions(workdir)['centre']
    found = [row for _, row, *_ in report.mistakes(Run(workdir))]
    images = [own for tag, own in document.tags if tag == 'img']
    assert [own['alt'] for own in images] == [f'test image {row}' for row in found]
    for own, row in zip(images, found, strict=True):
        body = base64.b64decode(own['src'].removeprefix('data:image/png;base64,'))
        with Image.open(io.BytesIO(body)) as picture:
            np.testing.assert_array_equal(np.asarray(picture), test.images[row][..., 0])
        taken, right = (test.class_names[i] for i in (probability[row].argmax(), test.labels[row]))
        caption = f'{taken} {100 * probability[row].max():.1f} % is {right} image {row}'
        assert caption in document.text


def test_the_most_frequent_confusions_equal_a_plain_loop(workdir, document):
    with np.load(workdir / 'predictions_test.npz') as file:
        taken, label = file['centre'].argmax(axis=1).tolist(), file['label'].tolist()
    pairs = [pair for pair in zip(label, taken, strict=True) if pair[0] != pair[1]]
    share = {pair: pairs.count(pair) / label.count(pair[0]) for pair in pairs}
    names = evaluate.restore(workdir).class_names
    for own, other in sorted(share, key=lambda pair: (-share[pair], pair))[: report.CONFUSIONS]:
        row = f'{names[own]} {names[other]} {100 * share[own, other]:.2f} %'
        assert row in document.text


def test_html_in_names_is_escaped(workdir, tmp_path):
    """A class name, a folder and a config value contain HTML."""
    folder = tmp_path / EVIL.replace('/', '∕')
    shutil.copytree(workdir, folder)
    config = json.loads((folder / 'config.json').read_text()) | {'name': EVIL}
    (folder / 'config.json').write_text(json.dumps(config))
    run = Run(folder)
    names = (EVIL, *run.trained.class_names[1:])
    for what in ('test', 'trained'):
        evil = dataclasses.replace(getattr(run, what), class_names=names)
        run.__dict__[what] = evil  # a cached property stores its value there
    html = report.page(run)
    document = Document(html)
    assert '<script' not in html
    assert not {tag for tag, _ in document.tags} & {'script', 'x'}
    assert document.text.count(EVIL) >= 4  # title, heading, config, class table
    assert str(folder) in document.text


# ---------------------------------------------------------------------------------- incomplete runs


def test_a_report_without_predictions(copy):
    (copy / 'predictions_test.npz').unlink()
    document = Document(report.page(Run(copy)))
    wanted = f'{copy} has no predictions_test.npz: create it with python main.py --mode=evaluate'
    # Errors, examples, neighbours, confusions, classes, mistakes.
    assert document.text.count(wanted) == 6
    assert [tag for tag, _ in document.tags].count('svg') == 2  # curves and filters


def test_a_report_of_another_step_than_the_predictions(copy):
    with np.load(copy / 'predictions_test.npz') as file:
        np.savez(copy / 'predictions_test.npz', **dict(file) | {'step': 4})
    document = Document(report.page(Run(copy)))
    assert document.text.count('predictions_test.npz is of step 4, not of 8: create it with') == 6


def test_a_report_of_an_interrupted_run(copy):
    """There are no predictions and no final record, and the last line is incomplete."""
    (copy / 'predictions_test.npz').unlink()
    lines = (copy / 'metrics.jsonl').read_text().splitlines()
    (copy / 'metrics.jsonl').write_text('\n'.join(lines[:3]) + '\n' + lines[3][:50])
    (copy / 'environment.json').unlink()
    document = Document(report.page(Run(copy)))
    assert [tag for tag, _ in document.tags].count('svg') == 2
    assert f'{copy}/environment.json cannot be read (No such file or directory)' in document.text
    assert 'test error' not in document.text


def test_a_report_of_a_config_alone(workdir, tmp_path):
    shutil.copy(workdir / 'config.json', tmp_path)
    document = Document(report.page(Run(tmp_path)))
    assert f'{tmp_path}/metrics.jsonl has no training record' in document.text
    assert f'no checkpoint in {tmp_path}/checkpoints; train first' in document.text
    assert 'optimizer.weights.rate 0.02' in document.text


# ----------------------------------------------------------------------------------------- failures


def run_and_fail(capsys, *words):
    """Run a command that fails; return the exit code and its one line on stderr."""
    code = report.main([str(word) for word in words])
    expected_text = capsys.readouterr()
    assert expected_text.out == ''
    (line,) = expected_text.err.splitlines()
    return code, line


def test_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        output = tmp_path / 'r.html'
        code, line = run_and_fail(capsys, f'--workdir={folder}', f'--output={output}')
        assert code == 1
        assert f'{folder}/config.json cannot be read (No such file or directory)' in line
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_config(tmp_path, capsys):
    for text in ('{', '{}', '[1]'):
        (tmp_path / 'config.json').write_text(text)
        assert run_and_fail(capsys, f'--workdir={tmp_path}')[0] in (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_without_matplotlib(workdir, tmp_path, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.split('.')[0] == 'matplotlib':
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    code, line = run_and_fail(capsys, f'--workdir={workdir}', f'--output={tmp_path}/r.html')
    assert code == 1
    assert line == "report: matplotlib is not installed: pip install 'alexnet_jax[figures]'."
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(workdir, tmp_path, capsys, small_disk):
    words = f'--workdir={workdir}', '--among=train[:8]'
    output = tmp_path / 'nowhere' / 'r.html'
    line = run_and_fail(capsys, *words, f'--output={output}')[1]
    assert f'{output}: No such file or directory' in line
    old = small_disk / 'r.html'
    old.write_bytes(b'the old one')
    (small_disk / 'filler').write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    assert report.main([*words, f'--output={old}']) == 1
    assert f'{old}: No space left on device' in capsys.readouterr().err
    assert old.read_bytes() == b'the old one'
    assert sorted(path.name for path in small_disk.iterdir()) == ['filler', 'r.html']
