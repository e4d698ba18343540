"""Test activations on disk, and retrieval against NumPy in float64, including ties."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import datasets
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate, features

TEST, TRAIN = 40, 256


@pytest.fixture(scope='module')
def workdir(smoke_run):
    return smoke_run


@pytest.fixture(scope='module')
def trained(workdir):
    return evaluate.restore(workdir)


@pytest.fixture(scope='module')
def images(data_dir):
    return datasets.load('fashion_mnist', data_dir, f'test[:{TEST}]').images


# ------------------------------------------------------------------------------- activations


def test_every_activation_has_the_stated_shape(trained, images):
    for layer, shape in (
        ('conv1_linear', (15, 15, 12)), ('conv2_spatial_norm', (7, 7, 32)), ('fc6_relu', (512,)),
    ):  # fmt: skip
        found = trained.extractor(layer)(images[:3])
        assert found.shape == (3, *shape)
        assert found.dtype == np.float32


def test_the_last_layer_gives_the_evaluated_probabilities(trained, images, workdir):
    logits = trained.extractor('fc8_linear')(images)
    with np.load(workdir / 'predictions_test.npz') as file:
        np.testing.assert_allclose(jax.nn.softmax(logits), file['centre'], rtol=1e-5)


def test_dropout_halves_at_test_time(trained, images):
    before, after = (trained.extractor(layer)(images) for layer in ('fc7_relu', 'fc7_dropout'))
    assert before.min() == 0
    np.testing.assert_array_equal(after, before * 0.5)


def test_one_image_alone_has_the_same_features(trained, images):
    extract = trained.extractor('fc7_relu')
    full = extract(images)
    assert len(np.unique(full.round(3), axis=0)) == TEST  # the images differ
    for i in (0, 17, TEST - 1):
        np.testing.assert_array_equal(extract(images[i : i + 1])[0], full[i])
    assert extract(images[:0]).shape == (0, full.shape[1])


def test_an_unknown_layer(trained):
    with pytest.raises(
        UsageError, match=r"this net has no 'fc9_relu'; choose one of conv1_linear, .*"
    ):
        trained.extractor('fc9_relu')


# ---------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize('layer', ['fc7_relu', 'conv2_pool'])
def test_features_on_disk(trained, images, tmp_path, layer):
    of = features.of_split(trained, layer, 'test')
    features.write(of, tmp_path / 'f.npy', block=16)
    expected = trained.extractor(layer)(images)
    np.testing.assert_array_equal(np.load(tmp_path / 'f.npy', allow_pickle=False), expected)
    rest = json.loads((tmp_path / 'f.json').read_text())
    assert rest['label'] == of.label
    about = rest['about']
    assert about['layer'] == layer
    assert about['split'] == f'test[:{TEST}]'
    assert about['step'] == trained.step
    assert about['class_names'][9] == 'Ankle boot'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f.json', 'f.npy']


def test_reading_maps_the_file(trained, images, tmp_path):
    features.write(features.of_split(trained, 'fc7_relu', 'test'), tmp_path / 'f.npy', block=7)
    found = features.read(tmp_path / 'f.npy')
    assert isinstance(found.rows, np.memmap)
    np.testing.assert_array_equal(found.rows, trained.extractor('fc7_relu')(images))
    assert found.image(3) == f'test[:{TEST}][3]'
    assert found.class_name(0) == found.about['class_names'][found.label[0]]


def test_features_of_files(trained, images, tmp_path):
    for i in range(3):
        Image.fromarray(images[i, ..., 0]).save(tmp_path / f'{i}.png')
    (tmp_path / '1b.png').write_text('no image')
    faults = []
    of = features.of_files(trained, 'fc7_relu', [str(tmp_path)], faults)
    features.write(of, tmp_path / 'f.npy', block=16)
    found = features.read(tmp_path / 'f.npy')
    assert [path.rpartition('/')[2] for path in found.path] == ['0.png', '1.png', '2.png']
    assert found.label is None
    assert found.class_name(0) is None
    assert found.image(1) == f'{tmp_path}/1.png'
    assert len(faults) == 1
    assert '1b.png is not an image' in faults[0]
    np.testing.assert_array_equal(found.rows, trained.extractor('fc7_relu')(images[:3]))


def test_a_full_disk_leaves_nothing(trained, small_disk):
    of = features.of_split(trained, 'conv1_linear', 'test[:400]')
    assert 4 * np.prod(of.rows.shape) > 3 * 2**20
    with pytest.raises(OSError, match='No space left on device'):
        features.write(of, small_disk / 'f.npy', block=16)
    assert list(small_disk.iterdir()) == []


def test_damaged_feature_files(trained, tmp_path):
    features.write(features.of_split(trained, 'fc7_relu', 'test'), tmp_path / 'f.npy', block=40)
    body, rest = (tmp_path / 'f.npy').read_bytes(), (tmp_path / 'f.json').read_text()
    bad = {
        'cut': (body[: len(body) // 2], rest),
        'text': (b'no features', rest),
        'empty': (b'', rest),
        'no_json': (body, '{"about":'),
        'other': (body, '[1]'),
        'fewer': (body, json.dumps(json.loads(rest) | {'label': [1, 2]})),
    }
    for name, (array, text) in bad.items():
        (tmp_path / f'{name}.npy').write_bytes(array)
        (tmp_path / f'{name}.json').write_text(text)
        with pytest.raises(
            RunError,
            match=rf'{name}\.npy and its .json file are damaged, or do not contain features',
        ):
            features.read(tmp_path / f'{name}.npy')
    (tmp_path / 'alone.npy').write_bytes(body)
    for name, file in (('missing', 'missing.npy'), ('alone', 'alone.json')):
        with pytest.raises(FileNotFoundError, match=file):
            features.read(tmp_path / f'{name}.npy')


# -------------------------------------------------------------------------------- retrieval


def slow(queries, rows, k):
    """Return the k smallest distances in float64, by index among equals."""
    difference = rows[None].astype(np.float64) - queries[:, None].astype(np.float64)
    squared = np.sum(difference**2, axis=-1)
    index = np.argsort(squared, axis=1, kind='stable')[:, :k]
    return index, np.sqrt(np.take_along_axis(squared, index, 1))


def assert_exact(queries, rows, k, block):
    found, far = features.nearest(queries, rows, k, block)
    index, distance = slow(queries, rows, k)
    np.testing.assert_array_equal(found, index)
    np.testing.assert_allclose(far, distance, rtol=1e-13)  # the order of a sum


@pytest.mark.parametrize(('k', 'block'), [(1, 1), (6, 7), (6, 100), (60, 7), (60, 1000)])
def test_nearest_equals_numpy(k, block):
    rng = np.random.default_rng(k)
    rows = np.maximum(rng.standard_normal((400, 33)), 0).astype(np.float32)
    queries = np.maximum(rng.standard_normal((5, 33)), 0).astype(np.float32)
    assert_exact(queries, rows, k, block)


def hard(name):
    """Return (queries, rows) that |q|^2 - 2 q.f + |f|^2 in float32 ranks wrongly."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 64)).astype(np.float32)
    if name == 'far from the origin':  # |f| is 8,000, distances 0.01: cancellation to the last bit
        rows = 1000 + 0.001 * noise
    elif name == 'duplicates':
        rows = np.repeat(noise[:30], 10, axis=0)
        rng.shuffle(rows)
    elif name == 'all the same':
        rows = np.repeat(noise[:1], 300, axis=0)
    elif name == 'zeros':
        rows = np.zeros_like(noise)
    elif name == 'tiny':  # all squares underflow
        rows = 1e-25 * noise
    elif name == 'small':  # some squares underflow
        rows = 1e-19 * noise
    elif name == 'one is huge':
        rows = noise.copy()
        rows[7] *= 1e30  # its square is larger than float32's largest
    else:  # integers: many at equal distances
        rows = rng.integers(0, 2, (300, 64)).astype(np.float32)
    return rows[:3].copy(), rows.astype(np.float32)


@pytest.mark.parametrize(
    'name',
    [
        'far from the origin', 'duplicates', 'all the same', 'zeros', 'tiny', 'small',
        'one is huge', 'full numbers',
    ],
)  # fmt: skip
@pytest.mark.parametrize('block', [50, 300])
def test_nearest_where_float32_ranks_wrongly(name, block):
    queries, rows = hard(name)
    _, far = features.nearest(queries, rows, 6, block)
    assert np.all(far[:, 0] == 0)  # each query is among the rows
    if name == 'all the same':  # more rows than candidates: rounding decides which are chosen
        assert np.all(far == 0)
    else:
        assert_exact(queries, rows, 6, block)


def test_float32_alone_ranks_wrongly():
    """The plain formula finds other neighbours, so the test above is not vacuous."""
    queries, rows = hard('far from the origin')
    plain = (queries**2).sum(1)[:, None] - 2 * queries @ rows.T + (rows**2).sum(1)[None]
    assert np.any(np.argsort(plain, axis=1, kind='stable')[:, :6] != slow(queries, rows, 6)[0])


def test_nearest_of_maps_from_a_memory_map(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / 'a.npy', rng.standard_normal((90, 3, 3, 4)).astype(np.float32))
    rows = np.load(tmp_path / 'a.npy', mmap_mode='r')
    found, far = features.nearest(rows[5:8], rows, 4, block=16)
    index, distance = slow(rows[5:8].reshape(3, -1), rows.reshape(90, -1), 4)
    np.testing.assert_array_equal(found, index)
    np.testing.assert_allclose(far, distance, rtol=1e-13)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_rows_that_are_not_finite_come_last(bad):
    rows = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    rows[3, 1] = bad
    with np.errstate(invalid='ignore'):
        found, far = features.nearest(rows[:2], rows, k=20, block=4)
    finite = np.delete(np.arange(10), 3)
    index, distance = slow(rows[:2], rows[finite], 9)
    np.testing.assert_array_equal(found, np.hstack([finite[index], [[3], [3]]]))
    np.testing.assert_allclose(far[:, :9], distance, rtol=1e-13)
    assert not np.isfinite(far[:, 9]).any()


# ------------------------------------------------------------------------------ the command


def run_command(capsys, *words):
    code = features.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_nearest_from_the_command_line(workdir, images, tmp_path, capsys):
    """Features from a file and features computed now give the same neighbours."""
    file = tmp_path / 'train.npy'
    for i in range(2):
        Image.fromarray(images[i, ..., 0]).save(tmp_path / f'{i}.png')
    where = f'--workdir={workdir}'
    assert run_command(capsys, where, '--split=train', f'--output={file}')[:2] == (0, f'{file}\n')
    ask = (where, '--nearest=3', '--json')
    _, by_split, _ = run_command(capsys, *ask, '--split=test[:2]', f'--among={file}')
    _, by_files, _ = run_command(capsys, *ask, f'{tmp_path}/?.png', '--among=train')
    by_split, by_files = ([json.loads(x) for x in out.splitlines()] for out in (by_split, by_files))
    known = features.read(file)
    extract = evaluate.restore(workdir).extractor('fc7_relu')
    index, distance = slow(extract(images[:2]), np.asarray(known.rows), 3)
    for row, (a, b) in enumerate(zip(by_split, by_files, strict=True)):
        assert a['query'] == f'test[:2][{row}]'
        assert b['query'] == f'{tmp_path}/{row}.png'
        assert a['class'] in known.about['class_names']
        assert b['class'] is None
        assert a['neighbours'] == b['neighbours']
        assert [n['row'] for n in a['neighbours']] == index[row].tolist()
        distances = [n['distance'] for n in a['neighbours']]
        np.testing.assert_allclose(distances, distance[row], rtol=1e-13)
        first = a['neighbours'][0]
        assert first['image'] == f'train[:{TRAIN}][{first["row"]}]'
        assert first['class'] == known.class_name(first['row'])


def test_a_table_of_neighbours(workdir, capsys):
    code, out, _ = run_command(
        capsys, f'--workdir={workdir}', '--nearest=2', '--split=train[:2]', '--layer=fc6_relu'
    )
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ['query', 'distance', 'neighbour', 'class']
    assert len(lines) == 2 + 2 * 2
    for i in range(2):  # an image of the training set is nearest to itself
        assert lines[2 + 2 * i].split()[:3] == [f'train[:2][{i}]', '0', f'train[:{TRAIN}][{i}]']


def test_features_of_another_net_are_refused(workdir, tmp_path, capsys):
    file = tmp_path / 'f.npy'
    where = f'--workdir={workdir}'
    run_command(capsys, where, '--split=train[:32]', '--layer=fc6_relu', f'--output={file}')
    code, out, err = run_command(
        capsys, where, '--split=test[:1]', '--nearest=1', f'--among={file}'
    )
    assert (code, out) == (2, '')
    assert 'contains other features than those of the queries' in err


@pytest.mark.parametrize('damage', ['columns', 'label', 'about'])
def test_saved_features_that_do_not_fit_are_refused(workdir, tmp_path, capsys, damage):
    file, where = tmp_path / 'f.npy', f'--workdir={workdir}'
    run_command(capsys, where, '--split=train[:32]', f'--output={file}')
    rest = json.loads(file.with_suffix('.json').read_text())
    if damage == 'columns':
        np.save(file, np.load(file)[:, :100])
    elif damage == 'label':
        rest['label'][0] = 99
    else:
        rest['about'] = {}
    file.with_suffix('.json').write_text(json.dumps(rest))
    code, out, err = run_command(
        capsys, where, '--split=test[:1]', '--nearest=1', f'--among={file}'
    )
    assert (code, out) == (2, '')
    assert 'contains other features than those of the queries' in err


@pytest.mark.parametrize(
    ('words', 'code', 'expected_text'),
    [
        (('--nearest=3',), 2, 'one of the arguments IMAGE --split is required'),
        (('a.png', '--split=test', '--nearest=3'), 2, 'not allowed with argument'),
        (('--split=test',), 2, 'one of the arguments --output --nearest is required'),
        (('--split=test', '--output=a.npy', '--nearest=3'), 2, 'not allowed with argument'),
        (('--split=test', '--output=a.csv'), 2, 'must end in .npy'),
        (('--split=test', '--output=a.npy', '--layer=fc7'), 2, 'fc7_linear, fc7_relu'),
        (('--split=tset', '--output=a.npy'), 2, "Unknown split 'tset'"),
        (('--split=test[:1]', '--output={t}/no/a.npy'), 1, 'No such file or directory'),
        (('--split=test[:1]', '--nearest=1', '--among={t}/a.npy'), 1, 'a.npy: No such file'),
        (('nothing.png', '--nearest=3'), 1, 'nothing.png cannot be read as an image'),
    ],
)  # fmt: skip
def test_error_messages(workdir, tmp_path, capsys, words, code, expected_text):
    words = [word.replace('{t}', str(tmp_path)) for word in words]
    found, out, err = run_command(capsys, f'--workdir={workdir}', *words)
    assert found == code, err
    assert out == ''
    assert expected_text in err.splitlines()[-1]
