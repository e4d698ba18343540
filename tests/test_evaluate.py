"""Test scores against a plain loop, and predictions of every image at any batch size."""

import math
import shutil

import jax
import numpy as np
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.analysis import figures, report
from alexnet_jax.config import MeshShape
from alexnet_jax.data import datasets
from alexnet_jax.data import statistics as image_statistics
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate, features
from alexnet_jax.model import alexnet
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import mesh as meshes
from alexnet_jax.training import metrics
from configs import smoke


def slow_error(probability, label, k):
    """Sort the classes of each image, most probable first, by number among equals."""
    wrong = 0
    for row, own in zip(probability.tolist(), label.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        wrong += own not in order[:k]
    return wrong / len(label)


def test_scores_with_ties():
    rng = np.random.default_rng(0)
    probability = rng.integers(0, 4, (500, 10)).astype(np.float32) + 1
    probability /= probability.sum(axis=1, keepdims=True)
    label = rng.integers(0, 10, 500)
    found = evaluate.scores(probability, label)
    assert found['top1_error'] == slow_error(probability, label, 1)
    assert found['top5_error'] == slow_error(probability, label, 5)
    mean = sum(math.log(row[own]) for row, own in zip(probability, label, strict=True)) / 500
    assert found['nll'] == pytest.approx(-mean, rel=1e-6)


def test_a_constant_prediction_is_right_once_in_ten():
    label = np.arange(10).repeat(3)
    assert evaluate.scores(np.full((30, 10), 0.1, np.float32), label)['top1_error'] == 0.9


def test_a_probability_of_zero_is_a_finite_loss():
    found = evaluate.scores(np.array([[1.0, 0.0]], np.float32), np.array([1]))
    assert found['nll'] == pytest.approx(-math.log(np.finfo(np.float32).tiny))


def test_nan_counts_as_an_error():
    found = evaluate.scores(np.full((2, 10), np.nan, np.float32), np.array([0, 9]))
    assert found['top1_error'] == found['top5_error'] == 1.0


def test_class_accuracy():
    probability = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    arrays = {'label': np.array([0, 1, 1, 1]), 'centre': probability, 'ten_views': probability}
    found = evaluate.summary(arrays, ('a', 'b', 'c'))
    assert found['class_accuracy'] == {'a': 1.0, 'b': 1 / 3}


@pytest.fixture(scope='module')
def net(data_dir):
    settings = configuration.unpack(smoke.get_config())
    dataset = datasets.load('fashion_mnist', data_dir, 'test[:150]')
    measured = image_statistics.of_images(dataset.images)
    statistics = Statistics(
        measured.mean_image, (measured.colour_vectors * measured.colour_std).astype(np.float32)
    )
    return settings, alexnet.init(jax.random.key(0), settings.net), statistics, dataset


@pytest.mark.parametrize(('batch_size', 'mesh'), [(64, (1, 1)), (150, (2, 1)), (33, (4, 2))])
def test_every_image_is_counted_once(net, batch_size, mesh):
    settings, params, statistics, dataset = net
    layout = meshes.make_layout(MeshShape(*mesh), 64)
    net = params, statistics, dataset, evaluate.CENTRE
    one = evaluate.probabilities(settings, layout, *net, batch_size)['centre']
    assert one.shape == (150, 10)
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-5)
    full = meshes.make_layout(MeshShape(1, 1), 64)
    reference = evaluate.probabilities(settings, full, *net, 150)['centre']
    np.testing.assert_allclose(one, reference, rtol=1e-5)


def test_a_net_that_has_diverged_is_not_evaluated(net):
    settings, params, statistics, dataset = net
    broken = params | {'fc8': params['fc8'] | {'bias': params['fc8']['bias'] + np.inf}}
    layout = meshes.make_layout(MeshShape(1, 1), 64)
    with pytest.raises(RunError, match='the net has diverged'):
        evaluate.probabilities(settings, layout, broken, statistics, dataset)


def test_ten_views_average_probabilities(net):
    settings, params, statistics, dataset = net
    layout = meshes.make_layout(MeshShape(1, 1), 64)
    views = {'ten': range(10)} | {str(view): (view,) for view in range(10)}
    found = evaluate.probabilities(settings, layout, params, statistics, dataset, views)
    each = [found[str(view)] for view in range(10)]
    np.testing.assert_allclose(found['ten'], np.mean(each, axis=0), rtol=1e-5)
    assert np.max(np.abs(each[0] - each[5])) > 1e-4  # the mirror image is another view


def test_predictions_are_optional_in_a_read_only_workdir(smoke_run, tmp_path, read_only, capsys):
    """The scores are printed; predictions that cannot be saved are a warning."""
    copy = shutil.copytree(smoke_run, tmp_path / 'copy')
    (copy / 'predictions_test.npz').unlink()
    read_only(copy)
    found = evaluate.run([copy])
    (end,) = [r for r in metrics.read(copy) if r['kind'] == 'test']
    assert found['centre'] == pytest.approx(end['centre'], rel=1e-5)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
    assert 'predictions_test.npz cannot be written (Read-only file system' in line
    assert not (copy / 'predictions_test.npz').exists()


def test_a_full_disk_keeps_the_old_predictions(net, small_disk, capsys):
    path = evaluate.predictions_path(small_disk)
    path.write_bytes(b'the old ones')
    (small_disk / 'filler').write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    arrays = {name: np.zeros((5000, 10), np.float32) for name in ('centre', 'ten_views')}
    evaluate.keep_predictions(small_disk, 'test', arrays | {'label': np.zeros(5000, np.int32)}, 1)
    assert 'the predictions are not saved' in capsys.readouterr().err
    assert path.read_bytes() == b'the old ones'
    assert sorted(p.name for p in small_disk.iterdir()) == ['filler', path.name]


@pytest.mark.parametrize(
    ('act', 'words', 'file'),
    [
        (features.main, ['--split=test', '--output={f}'], 'f.npy'),
        (figures.main, ['fig4_right', '--output={f}'], 'f.png'),
        (figures.main, ['fig4_right'], 'fig4_right.png'),
        (report.main, ['--output={f}'], 'f.html'),
        (report.main, [], 'report.html'),
    ],
)
def test_the_output_is_checked_before_the_work(
    smoke_run, tmp_path, read_only, capsys, monkeypatch, act, words, file
):
    copy = shutil.copytree(smoke_run, tmp_path / 'copy')
    read_only(copy)
    monkeypatch.setattr(evaluate, 'restore', lambda *_: pytest.fail('work was begun'))
    words = [word.replace('{f}', f'{copy}/{file}') for word in words]
    assert act([f'--workdir={copy}', *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'{copy}/{file}: Read-only file system' in line


def test_damaged_predictions_are_detected(smoke_run, tmp_path):
    """Each of 200 random damages gives an error message or the same numbers."""
    path = tmp_path / 'predictions_test.npz'
    body = (smoke_run / path.name).read_bytes()
    full = evaluate.load_predictions(smoke_run)
    rng = np.random.default_rng(0)
    refused = []
    for number in range(200):
        damaged = bytearray(body)
        at = int(rng.integers(len(body)))
        if number % 4:
            damaged[at] ^= 1 << int(rng.integers(8))
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        try:
            found = evaluate.load_predictions(tmp_path)
        except RunError as error:
            refused.append(str(error))
            continue
        for name, array in full.items():
            np.testing.assert_array_equal(found[name], array)
    assert len(refused) > 150
    assert all('create it with python main.py --mode=evaluate' in line for line in refused)
