"""Test figures by the arrays in matplotlib's artists."""

import dataclasses
import io
import itertools
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import config as configuration
from alexnet_jax.analysis import drawing, figures
from alexnet_jax.analysis.figures import Run
from alexnet_jax.data import datasets
from alexnet_jax.errors import UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.model import alexnet as model
from alexnet_jax.model.augment import Statistics
from alexnet_jax.training import checkpoint
from configs import alexnet

pytest.importorskip('matplotlib', reason="pip install -e '.[figures]'")

TEST = 40
ALL = ('fig3', 'fig4_left', 'fig4_right', 'curves')


@pytest.fixture(scope='module')
def workdir(smoke_run):
    return smoke_run


@pytest.fixture
def copy(workdir, tmp_path):
    """Return a copy of the run without its large checkpoints."""
    shutil.copytree(workdir, tmp_path / 'copy', ignore=shutil.ignore_patterns('checkpoints'))
    return tmp_path / 'copy'


@pytest.fixture(scope='module')
def run(workdir):
    return Run(workdir)


@pytest.fixture(scope='module')
def test_images(data_dir):
    return datasets.load('fashion_mnist', data_dir, f'test[:{TEST}]')


def drawn(axes):
    (image,) = axes.images
    return np.asarray(image.get_array())


def colours(rng, count, grey):
    """Return random filters [5, 5, 3, count] without colour, or with colour only."""
    if grey:
        return np.repeat(rng.normal(size=(5, 5, 1, count)), 3, axis=2)
    kernels = rng.normal(size=(5, 5, 3, count))
    return kernels - kernels.mean(axis=2, keepdims=True)


# ---------------------------------------------------------------------------- tower specialisation


def test_saturation_of_known_filters():
    rng = np.random.default_rng(0)
    red, cyan = (np.multiply.outer(np.ones((5, 5)), v)[..., None] for v in ([1, 0, 0], [0, 1, 1]))
    zero = np.zeros((5, 5, 3, 1))
    kernels = (colours(rng, 1, grey=True), colours(rng, 1, grey=False), red, cyan, zero)
    found = drawing.saturation(np.concatenate(kernels, axis=3))
    # Red: (2/3)^2 + 2 (1/3)^2 = 2/3 of 1 remains; cyan: the same 2/3 of 2.
    np.testing.assert_allclose(found, [0, 1, 2 / 3, 1 / 3, 0], atol=1e-12)


def test_saturation_equals_a_plain_loop():
    kernels = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32) + 0.3
    for i, found in enumerate(drawing.saturation(kernels)):
        colour = total = 0.0
        for row, column in itertools.product(range(3), range(3)):
            weights = [float(w) for w in kernels[row, column, :, i]]
            grey = sum(weights) / 3
            colour += sum((w - grey) ** 2 for w in weights)
            total += sum(w**2 for w in weights)
        assert found == pytest.approx(colour / total)


def test_independent_weights_have_two_thirds():
    kernels = np.random.default_rng(2).normal(size=(11, 11, 3, 2000))
    # One filter's deviation is about sqrt(4 / (9 * 121)) / sqrt(3) = 0.035; 2000 make 0.0008.
    assert drawing.saturation(kernels).mean() == pytest.approx(2 / 3, abs=0.004)


def test_a_colour_blind_tower_and_a_colourful_one():
    rng = np.random.default_rng(3)
    kernels = np.concatenate([colours(rng, 4, grey=True), colours(rng, 4, grey=False)], axis=3)
    found = drawing.specialisation(kernels, towers=2)
    assert found.towers == pytest.approx((0, 1), abs=1e-12)
    assert found.gap == pytest.approx(1)
    assert found.chance == pytest.approx(2 / 70)  # 2 of the 70 ways to choose 4 of 8 filters
    assert 'gap 1.000' in str(found)


def test_equal_towers_have_no_gap():
    own = colours(np.random.default_rng(4), 4, grey=False) + 0.5
    found = drawing.specialisation(np.concatenate([own, own], axis=3), towers=2)
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.chance == 1


def test_grey_images_repeated_for_three_channels_have_no_colour(run):
    class Colourful(Run):
        kernels = np.ones((3, 3, 3, 2))

    assert run.specialisation is None
    assert Colourful(run.workdir).specialisation is None


@pytest.fixture(scope='module')
def colourful(tmp_path_factory):
    """Return a workdir with an untrained checkpoint of a net for colour images."""
    config = alexnet.get_config('imagenet2012')
    config.model.input_px = config.preprocess.resize_px = 64
    config.preprocess.image_px = 68
    alexnet.narrow(config.model, 16)
    config.model.init_scaling = 'fan_in'
    settings = configuration.unpack(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), settings.net))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    mean = Statistics(np.zeros((64, 64, 3), np.float32), np.eye(3, dtype=np.float32))
    workdir = tmp_path_factory.mktemp('colourful')
    with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
        extra = {'config': json.loads(configuration.as_json(config)), 'class_names': ['a'] * 1000}
        tree = {'state': {'params': params}, 'statistics': mean._asdict()}
        checkpoints.save(0, tree, extra, error=None)
    return workdir, np.asarray(params['conv1']['kernel'])


def test_the_towers_of_a_colour_net_by_the_command(colourful, tmp_path, capsys):
    workdir, kernels = colourful
    output = tmp_path / 'fig3.svg'
    assert figures.main(['fig3', f'--workdir={workdir}', f'--output={output}']) == 0
    found = drawing.specialisation(kernels, 2)
    assert capsys.readouterr().out == f'{found}\n{output}\n'
    assert found.towers == pytest.approx((2 / 3, 2 / 3), abs=0.1)  # untrained, 6 filters each
    text = ''.join(ElementTree.parse(output).getroot().itertext())
    for tower, mean in zip('ab', found.towers, strict=True):
        assert f'tower {tower}, mean colour saturation {mean:.2f}' in text


# ------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize(('channels', 'features'), [(3, 12), (1, 12), (3, 96)])
def test_fig3_shows_each_filter_in_its_tower(channels, features):
    kernels = np.random.default_rng(6).normal(size=(5, 5, channels, features))
    kernels[..., 0] = 0
    kernels[2, 2, 0, 0] = 3.0  # the rest of this filter is grey
    axes = drawing.fig3(kernels, towers=2).axes
    columns = 6 if features == 12 else 12
    for i in range(features):
        tower, number = divmod(i, features // 2)
        row, column = divmod(number, columns)
        own = drawn(axes[tower])[6 * row : 6 * row + 5, 6 * column : 6 * column + 5]
        expected = 0.5 + 0.5 * kernels[..., i] / np.abs(kernels[..., i]).max()
        np.testing.assert_allclose(own[..., :3], np.broadcast_to(expected, (5, 5, 3)), atol=1e-6)
        assert np.all(own[..., 3] == 1)
    assert drawn(axes[0])[2, 2, 0] == 1
    assert drawn(axes[0])[0, 0, 0] == 0.5
    assert np.all(drawn(axes[0])[:, 5] == 0)  # transparent between the filters


def test_fig3_of_a_run_has_the_checkpoints_filters(run):
    saved = checkpoint.read(run.workdir / 'checkpoints').state['state']['params']
    np.testing.assert_array_equal(run.kernels, saved['conv1']['kernel'])
    assert len(figures.make('fig3', [run]).axes) == 2


# --------------------------------------------------------------------------------------- learning


def test_curves_are_the_records(run):
    loss, errors = figures.make('curves', [run]).axes
    records = [
        json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()
    ]
    training = [r for r in records if r['kind'] == 'train']
    validation = [r for r in records if r['kind'] == 'validation']
    assert len(training) == 8
    assert loss.lines[0].get_xdata().tolist() == [r['epoch'] for r in training]
    assert loss.lines[0].get_ydata().tolist() == [r['loss'] for r in training]
    assert loss.lines[1].get_ydata().tolist() == [r['nll'] for r in validation]
    shown = [line.get_ydata().tolist() for line in errors.lines]
    assert shown[0] == [100 * r['top1_error'] for r in training]
    assert shown[1] == [100 * r['top1_error'] for r in validation]
    assert shown[2] == [100 * r['top5_error'] for r in validation]


def test_fig1_compares_runs(run, copy):
    record = {'kind': 'train', 'step': 4, 'epoch': 1.0, 'loss': 1.0, 'top1_error': 0.75}
    (copy / 'metrics.jsonl').write_text(json.dumps(record) + '\n' + '{"kind": "tr')
    (axes,) = figures.make('fig1', [run, Run(copy)]).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [drawing._short(str(w), 40) for w in (run.workdir, copy)]
    expected = [100 * r['top1_error'] for r in run.records if r['kind'] == 'train']
    assert axes.lines[0].get_ydata().tolist() == expected
    assert axes.lines[1].get_ydata().tolist() == [75.0]
    assert axes.lines[2].get_ydata() == [25, 25]


def test_the_number_of_runs_of_a_figure(run):
    with pytest.raises(UsageError, match='curves takes one --workdir'):
        figures.make('curves', [run, run])


# ---------------------------------------------------------------------------------------- classes


def test_fig4_left_shows_the_five_most_probable(run, test_images):
    rows = (0, 6, 11, 17, 22, 28, 33, 39)  # at even distances
    axes = figures.make('fig4_left', [run]).axes
    names = test_images.class_names
    for row, picture, bars in zip(rows, axes[::2], axes[1::2], strict=True):
        np.testing.assert_array_equal(drawn(picture), test_images.images[row][..., 0])
        right, probability = test_images.labels[row], run.predictions['centre'][row]
        assert picture.get_title(loc='left') == names[right]
        ranked = sorted(range(10), key=lambda c, p=probability: (-p[c], c))[:5]
        assert [bar.get_width() for bar in bars.patches] == probability[ranked].tolist()
        for own, text, bar in zip(ranked, bars.texts, bars.patches, strict=True):
            assert text.get_text().startswith(names[own])
            assert (text.get_weight() == 'bold') == (own == right)
            of_right = bar.get_facecolor()[0] > bar.get_facecolor()[2]  # more red than blue
            assert of_right == (own == right)


def test_fig4_right_shows_the_nearest_that_numpy_finds(run, test_images, data_dir):
    axes = figures.make('fig4_right', [run]).axes
    extract = run.trained.extractor('fc7_relu')
    among = datasets.load('fashion_mnist', data_dir, 'train[:256]')
    rows = extract(among.images).astype(np.float64)
    for place, row in enumerate((0, 10, 20, 29, 39)):
        own = axes[8 * place : 8 * place + 8]
        np.testing.assert_array_equal(drawn(own[0]), test_images.images[row][..., 0])
        query = extract(test_images.images[row : row + 1])[0]
        order = np.argsort(((rows - query) ** 2).sum(axis=1), kind='stable')[:6]
        for found, axis in zip(order, own[2:], strict=True):
            np.testing.assert_array_equal(drawn(axis), among.images[found][..., 0])
            wrong = among.labels[found] != test_images.labels[row]
            name = among.class_names[among.labels[found]]
            assert axis.get_xlabel() == ('\n'.join(name.split()) if wrong else '')


def test_the_activation_before_dropout(run):
    net = run.settings.net
    assert figures.last_hidden(net) == 'fc7_relu'
    bare = dataclasses.replace(net.layers[-2], ops=('dropout',))
    layers = (*net.layers[:-2], bare, net.layers[-1])
    assert figures.last_hidden(dataclasses.replace(net, layers=layers)) == 'fc7_linear'


# --------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize('name', ALL)
def test_every_figure_by_its_command(workdir, tmp_path, capsys, name):
    for form in ('png', 'svg'):
        output = tmp_path / f'{name}.{form}'
        assert figures.main([name, f'--workdir={workdir}', f'--output={output}']) == 0
        assert capsys.readouterr().out == f'{output}\n'
    with Image.open(tmp_path / f'{name}.png') as picture:
        picture.load()
        assert picture.width == drawing.WIDTH * drawing.DPI
        assert len(picture.convert('L').getcolors(256)) > 10  # it is not blank
    root = ElementTree.parse(tmp_path / f'{name}.svg').getroot()
    assert root.tag == '{http://www.w3.org/2000/svg}svg'
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{name}.png', f'{name}.svg']


def test_the_default_output_is_in_the_workdir(copy, capsys):
    assert figures.main(['curves', f'--workdir={copy}']) == 0
    assert capsys.readouterr().out == f'{copy / "curves.png"}\n'
    assert (copy / 'curves.png').stat().st_size > 10_000


def test_the_same_figure_gives_the_same_bytes(run):
    for form in ('png', 'svg'):
        first, second = (drawing.render(drawing.curves(run.records), form) for _ in range(2))
        assert first == second


def test_special_characters_in_class_names():
    names = ['$x^2$', '<b>&"', 'Ⲁ漢字', 'a\nb\x00\x1b', 'n' * 99]
    probability = np.eye(5, dtype=np.float32)
    images = np.zeros((5, 4, 4, 3), np.uint8)
    drawings = (
        drawing.fig4_left(images, probability, np.arange(5), names),
        drawing.fig4_right(images[:1], images[None], np.array([0]), np.arange(5)[None], names),
    )
    for figure in drawings:
        drawing.render(figure, 'png')
        body = io.BytesIO(drawing.render(figure, 'svg'))
        text = ''.join(ElementTree.parse(body).getroot().itertext())
        assert all(short in text for short in ('$x^2$', '<b>&"', 'nnn…'))


def test_a_matplotlibrc_changes_nothing(run):
    import matplotlib

    plain = drawing.render(drawing.curves(run.records), 'svg')
    with matplotlib.rc_context({'font.size': 30, 'axes.facecolor': 'red', 'svg.fonttype': 'path'}):
        assert drawing.render(drawing.curves(run.records), 'svg') == plain


# ----------------------------------------------------------------------------------------- failures


def run_and_fail(capsys, *words):
    """Run a command that fails; return the exit code and its one line on stderr."""
    code = figures.main([str(word) for word in words])
    expected_text = capsys.readouterr()
    assert expected_text.out == ''
    (line,) = expected_text.err.splitlines()
    return code, line


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('name', ['fig4_left', 'fig4_right'])
def test_no_predictions(copy, capsys, name, monkeypatch, run):
    (copy / 'predictions_test.npz').unlink()
    trained = run.trained  # restored before the function is replaced
    monkeypatch.setattr(evaluate, 'restore', lambda *_: trained)
    code, line = run_and_fail(capsys, name, f'--workdir={copy}')
    assert code == 1
    assert 'no predictions_test.npz: create it with python main.py --mode=evaluate --w' in line
    assert not list(copy.glob('*.png*'))


@pytest.mark.parametrize('left', [0, 100, -200])
def test_damaged_predictions(copy, capsys, left):
    path = copy / 'predictions_test.npz'
    path.write_bytes(path.read_bytes()[:left])
    code, line = run_and_fail(capsys, 'fig4_left', f'--workdir={copy}')
    assert code == 1
    assert 'predictions_test.npz is damaged' in line


def test_predictions_of_other_images(copy, capsys, run, monkeypatch):
    monkeypatch.setattr(evaluate, 'restore', lambda *_: run.trained)
    arrays = dict(run.predictions)
    np.savez(copy / 'predictions_test.npz', **(arrays | {'label': arrays['label'][::-1]}))
    line = run_and_fail(capsys, 'fig4_left', f'--workdir={copy}')[1]
    assert 'predictions_test.npz was computed on other images' in line


def test_no_metrics(copy, capsys):
    (copy / 'metrics.jsonl').unlink()
    code, line = run_and_fail(capsys, 'curves', f'--workdir={copy}')
    assert (code, line.count('has no training record')) == (1, 1)


def test_damaged_metrics(copy, capsys):
    for text in ('3\n', '{"a": 1}\n', b'\xff'):
        (copy / 'metrics.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
        code, line = run_and_fail(capsys, 'curves', f'--workdir={copy}')
        assert code == 1
        assert 'metrics.jsonl has no training record, or is damaged' in line


def test_curves_of_an_interrupted_run(copy, capsys):
    """The run was killed before its first evaluation, in the middle of a line."""
    text = (copy / 'metrics.jsonl').read_text()
    (copy / 'metrics.jsonl').write_text(text[: text.index('\n') + 40])
    assert figures.main(['curves', f'--workdir={copy}']) == 0
    _, errors = drawing.curves(Run(copy).records).axes
    assert len(errors.lines) == 1


def test_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        code, line = run_and_fail(capsys, 'fig3', f'--workdir={folder}')
        assert code == 1
        assert f'no checkpoint in {folder}/checkpoints; train first' in line
        code, line = run_and_fail(capsys, 'fig4_left', f'--workdir={folder}')
        assert code == 1
        assert 'has no predictions_test.npz' in line
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['fig5', '--workdir=W'], "invalid choice: 'fig5'"),
        (['fig3'], 'required: --workdir'),
        (['fig3', '--workdir=W', '--output=F.gif'], 'must end in .png or .svg'),
        (['fig3', '--workdir=W', '--step=3'], 'no checkpoint of step 3'),
    ],
)
def test_usage_errors(workdir, capsys, words, sentence):
    code, line = run_and_fail(capsys, *(word.replace('=W', f'={workdir}') for word in words))
    assert code == 2
    assert sentence in line


def test_without_matplotlib(workdir, tmp_path, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.split('.')[0] == 'matplotlib':
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for name in ALL:
        code, line = run_and_fail(
            capsys, name, f'--workdir={workdir}', f'--output={tmp_path}/f.png'
        )
        assert code == 1
        assert line == "figures: matplotlib is not installed: pip install 'alexnet_jax[figures]'."
    assert files(tmp_path) == []


def test_an_output_that_cannot_be_written(workdir, tmp_path, capsys):
    (tmp_path / 'folder.png').mkdir()
    for output, reason in (
        (tmp_path / 'nowhere' / 'f.png', 'No such file or directory'),
        (tmp_path / 'folder.png', 'Is a directory'),
    ):
        code, line = run_and_fail(capsys, 'curves', f'--workdir={workdir}', f'--output={output}')
        assert code == 1
        assert f'{output}: {reason}' in line
    assert files(tmp_path) == ['folder.png']
    assert files(tmp_path / 'folder.png') == []


def test_a_full_disk_keeps_the_old_figure(workdir, small_disk, capsys):
    output = small_disk / 'curves.png'
    output.write_bytes(b'the old one')
    (small_disk / 'filler').write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    code, line = run_and_fail(capsys, 'curves', f'--workdir={workdir}', f'--output={output}')
    assert code == 1
    assert f'{output}: No space left on device' in line
    assert output.read_bytes() == b'the old one'
    assert files(small_disk) == ['curves.png', 'filler']


def test_help_describes_every_figure(capsys):
    with pytest.raises(SystemExit, match='0'):
        figures.main(['--help'])
    first_words = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert all([name] in first_words for name in ('fig1', *figures.FIGURES))
