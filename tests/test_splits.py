"""Data given with a checkpoint: classes in another order, other classes, other channels."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.analysis import figures, report
from alexnet_jax.data import datasets
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.errors import UsageError
from alexnet_jax.inference import evaluate, features, predict
from alexnet_jax.training import splits, train
from configs import smoke

COLOURS = {'red': (220, 30, 40), 'grün': (30, 200, 60), 'blau蓝': (40, 60, 210)}
EACH = 40


def prepared(folder, prefixes):
    """Prepare {prefix}{colour} folders of pictures as data set `shades` in `folder`."""
    rng = np.random.default_rng(0)
    for colour, prefix in prefixes.items():
        for split in ('train', 'val', 'test'):
            (folder / 'source' / split / f'{prefix}{colour}').mkdir(parents=True)
        for i in range(EACH):
            split = 'train' if i >= 8 else 'val' if i >= 4 else 'test'
            inside = folder / 'source' / split / f'{prefix}{colour}'
            mean = COLOURS.get(colour, (120, 120, 120))
            pixels = np.clip(rng.normal(mean, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(inside / f'{colour}{i}.png')
    words = [f'--source={folder}/source', f'--data_dir={folder}', '--name=shades', '--px=32']
    assert prepare.main(['folder', *words]) == 0
    return folder


def labels_file(folder):
    (path,) = folder.glob('shades/*/label.labels.txt')
    return path


@pytest.fixture(scope='module')
def shades(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp('shades'), dict.fromkeys(COLOURS, ''))


@pytest.fixture(scope='module')
def permuted(tmp_path_factory):
    """The same pictures and names; classes 1red, 2grün, 3blau蓝, renamed."""
    folder = tmp_path_factory.mktemp('permuted')
    prepared(folder, {'red': '1', 'grün': '2', 'blau蓝': '3'})
    labels_file(folder).write_text('red\ngrün\nblau蓝\n')
    return folder


@pytest.fixture(scope='module')
def renamed(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp('renamed'), {'red': 'a_', 'grün': '', 'blau蓝': ''})


@pytest.fixture(scope='module')
def fourth(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp('fourth'), {**dict.fromkeys(COLOURS, ''), 'umber': ''})


def recipe(folder, epochs=2.0):
    config = smoke.get_config()
    config.data.name, config.data.data_dir = 'shades', str(folder)
    config.data.train, config.data.validation, config.data.test = 'train', 'validation', 'test'
    config.model.channels = 3
    config.model.fc8.features = 3
    config.batch_size = 16
    config.epochs = epochs
    config.loop.update(
        log_every_steps=1, checkpoint_every_epochs=0.5, eval_batch_size=16, tensorboard=False
    )
    config.loop.compilation_cache = 'none'
    return config


@pytest.fixture(scope='module')
def workdir(shades, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'shades'
    train.run(recipe(shades), workdir)
    return workdir


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / 'copy')


def test_another_order_of_classes_is_mapped_by_name(copy, shades, permuted):
    expected = evaluate.run([copy], data_dir=str(shades))
    words = [datasets.describe('shades', folder).words for folder in (permuted, shades)]
    assert words[0] != words[1]
    found = evaluate.run([copy], data_dir=str(permuted))
    for view in evaluate.VIEWS:
        assert found[view] == pytest.approx(expected[view], rel=1e-5)
    assert found['class_accuracy'] == expected['class_accuracy']
    with np.load(copy / 'predictions_test.npz') as file:  # in the checkpoint's order
        assert evaluate.scores(file['centre'], file['label']) == found['centre']


@pytest.mark.parametrize('which', ['renamed', 'fourth'])
def test_other_classes_are_refused_in_one_sentence(copy, request, capsys, which):
    folder = request.getfixturevalue(which)
    before = (copy / 'predictions_test.npz').read_bytes()
    with pytest.raises(UsageError, match=r'shades has \d classes that differ') as caught:
        evaluate.run([copy], data_dir=str(folder))
    named = {'renamed': '(a_red, red)', 'fourth': '(umber)'}[which]
    assert named in str(caught.value)
    assert (copy / 'predictions_test.npz').read_bytes() == before
    where = (f'--workdir={copy}', f'--data_dir={folder}')
    assert features.main([*where, '--split=test', '--nearest=1']) == 2
    assert figures.main(['fig4_right', *where, f'--output={copy}/f.png']) == 2
    assert report.main([*where, f'--output={copy}/r.html']) == 0  # what needs no data is shown
    assert 'that differ from the 3 of the checkpoint' in (copy / 'r.html').read_text()
    err = capsys.readouterr().err
    assert err.count('that differ from the 3 of the checkpoint') == 2
    assert 'Traceback' not in err


def test_features_of_permuted_data_have_their_names(copy, shades, permuted):
    trained = evaluate.restore(copy)
    names = {}
    for folder in (shades, permuted):
        found = features.of_split(trained, 'fc7_relu', 'test', str(folder))
        images = [image.astype(float).mean(axis=(0, 1)).argmax() for image in found.rows.images[:]]
        for row, channel in enumerate(images):
            names.setdefault(int(channel), set()).add(found.class_name(row))
    assert names == {0: {'red'}, 1: {'grün'}, 2: {'blau蓝'}}


def test_figures_of_permuted_data_want_predictions_of_it(copy, permuted, capsys):
    words = ['fig4_left', f'--workdir={copy}', f'--data_dir={permuted}', f'--output={copy}/f.png']
    assert figures.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'was computed on other images' in line
    assert line.endswith(f'--workdir={copy} --data_dir={permuted}.')
    evaluate.run([copy], data_dir=str(permuted))
    assert figures.main(words) == 0


def test_an_ensemble_averages_probabilities(copy, shades, tmp_path):
    config = recipe(shades, epochs=1.0)
    config.seed = 1
    train.run(config, tmp_path / 'other')
    both = evaluate.run([copy, tmp_path / 'other'], data_dir=str(shades))
    arrays = [evaluate.load_predictions(path) for path in (copy, tmp_path / 'other')]
    mean = (arrays[0]['centre'] + arrays[1]['centre']) / np.float32(2)
    assert both['centre'] == evaluate.scores(mean, arrays[0]['label'])
    assert both['members'][1]['centre'] == evaluate.scores(arrays[1]['centre'], arrays[1]['label'])


def test_an_ensemble_needs_the_same_classes_in_the_same_order(copy, shades, permuted, tmp_path):
    train.run(recipe(permuted, epochs=0.5), tmp_path / 'other')
    with pytest.raises(UsageError, match='different images or has different classes than'):
        evaluate.run([copy, tmp_path / 'other'], data_dir=str(shades))


def test_resuming_on_data_prepared_again(workdir, shades, permuted, renamed, tmp_path):
    """The last half epoch again, on data whose classes have another order, or other names."""
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    steps = sorted(int(path.name) for path in (copy / 'checkpoints').iterdir())
    for path in (copy / 'checkpoints').iterdir():
        if path.name == str(steps[-1]):
            shutil.rmtree(path)
    with pytest.raises(UsageError, match=r'shades has \d classes that differ'):
        train.run(recipe(renamed), copy)
    train.run(recipe(permuted), copy)
    saved = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
    again = json.loads((copy / 'metrics.jsonl').read_text().splitlines()[-1])
    assert saved['kind'] == again['kind'] == 'test'
    assert evaluate.restore(copy).class_names == ('blau蓝', 'grün', 'red')


# ----------------------------------------------------- names on a terminal that is not UTF-8


@pytest.mark.parametrize(
    ('act', 'words'),
    [
        (predict.main, ['{d}/source/test', '--top=3']),
        (predict.main, ['{d}/source/test', '--json']),
        (features.main, ['--split=test', '--nearest=2']),
        (features.main, ['{d}/source/test', '--nearest=2', '--json']),
        (figures.main, ['fig4_left', '--output={t}/蓝.png']),
        (figures.main, ['fig3', '--output={t}/蓝.svg']),
        (report.main, ['--output={t}/蓝.html']),
    ],
)
def test_names_that_the_terminal_cannot_show(workdir, shades, tmp_path, monkeypatch, act, words):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(printed, 'ascii'))
    words = [word.replace('{d}', str(shades)).replace('{t}', str(tmp_path)) for word in words]
    assert act([f'--workdir={workdir}', *words]) == 0
    sys.stdout.flush()
    text = printed.getvalue().decode('ascii')
    assert r'gr\xfcn' in text or r'gr\u00fcn' in text or r'\u84dd' in text


def test_main_on_such_a_terminal(workdir, repository, tmp_path):
    linked = tmp_path / 'lauf蓝'
    shutil.copytree(workdir, linked)
    done = subprocess.run(
        [sys.executable, 'main.py', '--mode=evaluate', f'--workdir={linked}'],
        cwd=repository,
        env=os.environ | {'PYTHONIOENCODING': 'ascii'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r'\u84dd' in done.stdout
    assert 'Traceback' not in done.stderr


# ------------------------------------------------------------------------------------ one by one


def dataset(names, labels=(0, 1, 2)):
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    labels = np.array(labels, np.int32)
    return datasets.Dataset('fashion_mnist', 'test', images, labels, tuple(names))


@pytest.fixture
def config(data_dir):
    return splits.Data('fashion_mnist', str(data_dir), 'train', 'train', 'test')


def test_labels_are_mapped_where_they_are_known(config):
    found = splits.match(dataset('abc', (2, -1, 0)), ('c', 'a', 'b'), config, 'W')
    assert found.labels.tolist() == [0, -1, 1]
    assert found.class_names == ('c', 'a', 'b')
    assert found.take(np.array([2]))[1].tolist() == [1]


def test_numbers_in_place_of_names_are_counted_only(config):
    """Imported weights may come without names."""
    found = splits.match(dataset('abc'), ('0', '1', '2'), config, 'W')
    assert found.labels.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match='that differ from the'):
        splits.match(dataset('abc'), ('0', '1', '2', '3'), config, 'W')


def test_own_names_count_as_well_as_words(data_dir, tmp_path, config):
    """ImageNet's WordNet ids, where the checkpoint has the words, or has not."""
    shutil.copytree(data_dir / 'fashion_mnist', tmp_path / 'fashion_mnist')
    (folder,) = (tmp_path / 'fashion_mnist').iterdir()
    own = datasets.describe('fashion_mnist', tmp_path).class_names
    (folder / 'label.words.txt').write_text('\n'.join(f'word {name}' for name in own))
    worded = datasets.load('fashion_mnist', tmp_path, 'test[:9]')
    assert worded.class_names[9] == 'word Ankle boot'
    found = splits.match(worded, own, config, 'W', str(tmp_path))
    assert found.class_names == own
    np.testing.assert_array_equal(found.labels, worded.labels)
    with pytest.raises(UsageError, match='that differ from the'):
        splits.match(worded, [f'other {name}' for name in own], config, 'W', str(tmp_path))


def test_images_without_labels_are_not_scored(copy, shades, monkeypatch):
    load = datasets.load

    def unlabelled(*args, **kwargs):
        found = load(*args, **kwargs)
        labels = np.full_like(found.labels, -1)
        return datasets.Dataset(found.name, found.split, found.images, labels, found.class_names)

    monkeypatch.setattr(datasets, 'load', unlabelled)
    with pytest.raises(UsageError, match='images without labels'):
        evaluate.run([copy])


def test_images_of_other_channels(smoke_run, shades):
    """The net saw grey images; these are coloured."""
    trained = evaluate.restore(smoke_run, overrides={'data.data_dir': str(shades)})
    settings = trained.settings
    other = dataclasses.replace(settings.data, name='shades')
    trained = dataclasses.replace(trained, settings=dataclasses.replace(settings, data=other))
    with pytest.raises(UsageError, match=r'images of 3 channels, but the net in .* takes 1'):
        evaluate.open_split(trained, 'test[:3]')


# ------------------------------------------------------------------------- what the data decides


def taken(there, **wanted):
    tree = {'model': {'layers': ['fc8'], 'fc8': {'features': 0}, 'channels': 0}}
    tree['data'] = dict(name='d', train='auto', validation='auto', test='auto') | wanted
    found = splits.with_data(tree, 22, 3, there)
    assert found['model'] == {'layers': ['fc8'], 'fc8': {'features': 22}, 'channels': 3}
    return tuple(found['data'][key] for key in ('train', 'validation', 'test'))


def test_splits_are_those_of_the_data():
    assert taken(('train', 'validation', 'test')) == ('train', 'validation', 'test')
    assert taken(('train', 'val', 'test')) == ('train', 'val', 'test')


def test_a_split_that_is_not_there_is_a_tenth_of_training():
    assert taken(('train', 'test')) == ('train[:90%]', 'train[90%:100%]', 'test')
    assert taken(('train', 'validation')) == ('train[:90%]', 'validation', 'train[90%:100%]')
    tenths = ('[:80%]', '[80%:90%]', '[90%:100%]')
    assert taken(('train',)) == tuple(f'train{tenth}' for tenth in tenths)
    assert taken(('all',)) == tuple(f'all{tenth}' for tenth in tenths)


def test_splits_that_are_named_stay():
    assert taken(('train', 'test'), validation='test') == ('train', 'test', 'test')
    assert taken(('a', 'b'), train='a', validation='b', test='b') == ('a', 'b', 'b')


@pytest.mark.parametrize(
    ('there', 'wanted', 'key'),
    [
        (('a', 'b'), {}, 'train'),
        (('train', 'test'), {'train': 'train[:100]'}, 'validation'),
    ],
)
def test_there_is_nothing_to_take_a_split_from(there, wanted, key):
    with pytest.raises(UsageError, match=f"data.{key} is 'auto'"):
        taken(there, **wanted)
