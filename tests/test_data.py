"""Test the real Fashion-MNIST, damage to its decoded copy, batches, prefetching and statistics."""

import errno
import gc
import hashlib
import logging
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.core import hashing

from alexnet_jax.data import batches as batching
from alexnet_jax.data import datasets, records, statistics
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import RunError, UsageError

SMALL = {'train': 600, 'test': 200}


@pytest.fixture(scope='module')
def train(data_dir):
    return datasets.load('fashion_mnist', data_dir, 'train')


@pytest.fixture(scope='module')
def small_master(data_dir, tmp_path_factory):
    """The first images of each split, prepared as a data set of their own."""
    raw = {}
    for split, n in SMALL.items():
        part = datasets.load('fashion_mnist', data_dir, f'{split}[:{n}]')
        raw[split] = (part.images[..., 0], part.labels)
    folder = tmp_path_factory.mktemp('small')
    fashion_mnist.write(raw, folder)
    return folder


@pytest.fixture
def small(small_master, tmp_path):
    """A copy of it to damage, not decoded yet."""
    return shutil.copytree(small_master, tmp_path / 'data')


def record_file(folder, split='train'):
    return folder / f'fashion_mnist/3.0.1/fashion_mnist-{split}.array_record-00000-of-00001'


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def same(a, b):
    return np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)


# ---- contents -------------------------------------------------------------------------------


@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_image_and_label_is_the_original_in_tfds_order(data_dir, split):
    """Undo TFDS's shuffle (a sort by hashed index), and compare the raw files' checksums."""
    dataset = datasets.load('fashion_mnist', data_dir, split)
    hasher = hashing.Hasher(split)
    order = sorted(range(len(dataset)), key=hasher.hash_key)
    images, labels = np.empty_like(dataset.images), np.empty(len(dataset), np.uint8)
    images[order], labels[order] = dataset.images, dataset.labels
    which = slice(0, 2) if split == 'train' else slice(2, 4)
    image_sum, label_sum = fashion_mnist.SUMS['fashion_mnist'][which]
    raw_images = struct.pack('>4I', 0x803, len(dataset), 28, 28) + images.tobytes()
    raw_labels = struct.pack('>2I', 0x801, len(dataset)) + labels.tobytes()
    assert hashlib.sha256(raw_images).hexdigest() == image_sum
    assert hashlib.sha256(raw_labels).hexdigest() == label_sum


def test_shapes_types_and_names(data_dir, train):
    assert train.images.shape == (60_000, 28, 28, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert len(datasets.load('fashion_mnist', data_dir, 'test')) == 10_000
    assert np.array_equal(np.bincount(train.labels), [6000] * 10)
    assert train.class_names[0] == 'T-shirt/top'
    assert train.class_names[9] == 'Ankle boot'


# ---- splits ---------------------------------------------------------------------------------


LENGTHS = {'train': [20_000, 20_000, 20_000], 'test': [10_000]}


@pytest.mark.parametrize(
    ('expression', 'terms'),
    [
        ('train', [('train', 0, 60_000)]),
        ('train[:5]+test[50%:]', [('train', 0, 5), ('test', 5_000, 10_000)]),
        ('train + test', [('train', 0, 60_000), ('test', 0, 10_000)]),
        ('test[12.5%:37.5%]', [('test', 1_250, 3_750)]),
        ('train[-60_000:-1]', [('train', 0, 59_999)]),
        ('train[1shard:]', [('train', 20_000, 60_000)]),
        ('all', [('train', 0, 60_000), ('test', 0, 10_000)]),
    ],
)
def test_split_expressions(expression, terms):
    assert datasets.parse_split(expression, LENGTHS) == terms


@pytest.mark.parametrize(
    'expression',
    ['', 'trian', 'none', 'train[', 'train[5]', 'train[:60_001]', 'train[:101%]', 'train[:1.5]',
     'a b', 'train[5:5]', 'train[-1:1]'],
)  # fmt: skip
def test_a_wrong_split_is_refused_in_one_sentence(expression):
    with pytest.raises(UsageError, match='train') as error:
        datasets.parse_split(expression, LENGTHS)
    assert '\n' not in str(error.value)


def test_slices_and_sums_of_splits(data_dir, train):
    part = datasets.load('fashion_mnist', data_dir, 'train[55000:]+test[:10]')
    test = datasets.load('fashion_mnist', data_dir, 'test')
    assert np.array_equal(part.images[:5000], train.images[55_000:])
    assert np.array_equal(part.labels[5000:], test.labels[:10])
    assert len(part) == 5010


# ---- missing data ----------------------------------------------------------------------------


def test_unknown_names_and_absent_data(data_dir, tmp_path):
    with pytest.raises(
        UsageError, match=r"no data set 'fashion'.*found: fashion_mnist.*--name=fashion "
    ):
        datasets.load('fashion', data_dir, 'train')
    with pytest.raises(UsageError, match=r"Unknown split 'valid': choose from train, test"):
        datasets.load('fashion_mnist', data_dir, 'valid')
    with pytest.raises(RunError, match=r'run `python -m alexnet_jax prepare fashion_mnist'):
        datasets.load('fashion_mnist', tmp_path, 'train')


# ---- the decoded copy -----------------------------------------------------------------------


def test_the_second_load_reads_the_copy_and_none_imports_anything_heavy(small, monkeypatch):
    script = (
        'import sys; from alexnet_jax.data import datasets\n'
        f'images = datasets.load("fashion_mnist", {str(small)!r}, "train").images\n'
        'heavy = {"jax", "tensorflow", "tensorflow_datasets", "alexnet_jax.data.prepare",'
        ' "multiprocessing"} & set(sys.modules)\n'
        'print(len(images), sorted(heavy))\n'
    )
    words, cwd = [sys.executable, '-c', script], Path(__file__).parents[1]
    assert subprocess.check_output(words, cwd=cwd, text=True) == '600 []\n'
    monkeypatch.setattr(records.StoredImages, 'take', None)
    assert len(datasets.load('fashion_mnist', small, 'train')) == 600


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_a_damaged_copy_is_rebuilt(small, damage):
    good = datasets.load('fashion_mnist', small, 'train')
    (path,) = (small / 'decoded').iterdir()
    content = path.read_bytes()
    if damage == 'flip':
        flip(path, len(content) // 2)
    elif damage == 'truncate':
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    assert same(datasets.load('fashion_mnist', small, 'train'), good)
    assert path.read_bytes() == content
    assert len(list(path.parent.iterdir())) == 1


def test_a_stale_copy_is_not_used(small, small_master, tmp_path):
    before = datasets.load('fashion_mnist', small, 'train')
    reversed_raw = {
        split: (part.images[::-1, ..., 0], part.labels[::-1])
        for split in SMALL
        for part in [datasets.load('fashion_mnist', small, split)]
    }
    fashion_mnist.write(reversed_raw, tmp_path / 'other')
    shutil.rmtree(small / 'fashion_mnist')
    shutil.copytree(tmp_path / 'other/fashion_mnist', small / 'fashion_mnist')
    after = datasets.load('fashion_mnist', small, 'train')
    assert not same(before, after)
    assert np.array_equal(np.sort(before.labels), np.sort(after.labels))


def test_a_copy_that_cannot_be_stored_is_logged(small, caplog):
    (small / 'decoded').write_text('a file where the folder should be')
    with caplog.at_level(logging.WARNING):
        dataset = datasets.load('fashion_mnist', small, 'test')
    assert len(dataset) == 200
    assert 'cannot be stored' in caplog.text


def test_a_truncated_or_missing_record_file_is_refused(small):
    path = record_file(small)
    datasets.load('fashion_mnist', small, 'train')  # a decoded copy must not hide the damage
    content = path.read_bytes()
    for rest in (content[: len(content) // 2], b''):
        path.write_bytes(rest)
        with pytest.raises(RunError, match=r'is damaged .*remove that folder and run `python'):
            datasets.load('fashion_mnist', small, 'train')
    path.unlink()
    with pytest.raises(RunError, match='No such file'):
        datasets.load('fashion_mnist', small, 'train')


def test_a_flipped_byte_in_a_record_file_never_gives_wrong_images(small):
    path = record_file(small)
    good = datasets.load('fashion_mnist', small, 'train')
    content = path.read_bytes()
    used = len(content.rstrip(b'\0'))
    refused = 0
    for offset in np.linspace(0, used - 1, 12).astype(int):
        path.write_bytes(content)
        flip(path, offset)
        try:
            assert same(datasets.load('fashion_mnist', small, 'train'), good), offset
        except RunError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize('error', [OSError(errno.EMFILE, 'Too many open files'), MemoryError()])
def test_what_the_system_cannot_do_is_not_called_damage(small, monkeypatch, error):
    """Its sentence would advise to remove intact data."""

    def fail(*_):
        raise error

    opened = datasets.load('fashion_mnist', small, 'test', resident_gib=0)
    monkeypatch.setattr(records, 'image_and_label', fail)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            opened.take(np.arange(3))
    monkeypatch.setattr(Path, 'read_text', fail)
    with pytest.raises(type(error)):
        datasets.load('fashion_mnist', small, 'test')


def test_a_damaged_description_is_refused(small):
    (small / 'fashion_mnist/3.0.1/dataset_info.json').write_text('{"name": ')
    with pytest.raises(RunError, match=r'is damaged \(its description .*JSONDecodeError'):
        datasets.load('fashion_mnist', small, 'train')


# ---- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 1000, 60_000])
def test_every_epoch_is_a_full_permutation(n):
    for epoch in range(3):
        order = batching.permutation(7, epoch, n)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))


def test_permutations_differ_between_seeds_and_epochs_and_never_change():
    orders = {tuple(batching.permutation(s, e, 100)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    # Philox's raw stream is fixed by its definition, so these never change.
    assert batching.permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert batching.permutation(3, 2, 8).tolist() == [2, 4, 1, 3, 6, 5, 0, 7]


@pytest.mark.parametrize('batch_size', [1, 3, 10, 25])
def test_batches_cover_every_epoch(batch_size):
    n, seed = 10, 4
    steps = 3 * n  # full epochs, whatever the batch size
    chain = np.concatenate([batching.batch_indices(seed, s, batch_size, n) for s in range(steps)])
    for epoch in range(steps * batch_size // n):
        part = chain[epoch * n : (epoch + 1) * n]
        assert np.array_equal(part, batching.permutation(seed, epoch, n))


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_slices_of_processes_make_up_the_global_batch(train, processes):
    share = 64 // processes
    full = batching.TrainStream(train, seed=1, batch_size=64)
    shares = [slice(i * share, (i + 1) * share) for i in range(processes)]
    parts = [batching.TrainStream(train, 1, 64, rows) for rows in shares]
    for step in (0, 937, 10**6):  # 937: the batch that spans the first two epochs
        indices = batching.batch_indices(1, step, 64, len(train))
        batch = full.batch(step)
        assert np.array_equal(batch['image'], train.images[indices])
        for key in ('image', 'label'):
            joined = np.concatenate([part.batch(step)[key] for part in parts])
            assert joined.dtype == batch[key].dtype
            assert np.array_equal(joined, batch[key])


@pytest.mark.parametrize('batch_size', [4, 64, 600, 1000])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_counts_every_image_once(small_master, batch_size, processes):
    dataset = datasets.load('fashion_mnist', small_master, 'train[:597]')
    share = batch_size // processes
    streams = [
        batching.eval_batches(dataset, batch_size, slice(i * share, (i + 1) * share))
        for i in range(processes)
    ]
    images, labels = [], []
    for batches in zip(*streams, strict=True):
        for batch in batches:
            assert batch['image'].shape == (share, 28, 28, 1)
            assert batch['mask'].dtype == np.float32
            assert not batch['image'][batch['mask'] == 0].any()
            images.append(batch['image'][batch['mask'] == 1])
            labels.append(batch['label'][batch['mask'] == 1])
    assert np.array_equal(np.concatenate(images), dataset.images)
    assert np.array_equal(np.concatenate(labels), dataset.labels)


# ---- prefetch -------------------------------------------------------------------------------


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith('prefetch')]


@pytest.mark.parametrize('depth', [1, 2, 5])
def test_prefetch_keeps_order_and_ends(depth):
    assert list(batching.prefetch(lambda i: i * i, 3, 20, depth)) == [i * i for i in range(3, 20)]
    assert list(batching.prefetch(lambda i: i, 5, 5, depth)) == []
    assert not prefetch_threads()


def test_prefetch_works_ahead_up_to_its_depth():
    called = {i: threading.Event() for i in range(10)}
    stream = batching.prefetch(lambda i: called[i].set() or i, 0, 10, depth=3)
    assert next(stream) == 0
    assert called[3].wait(timeout=30)  # while the caller holds item 0
    assert not called[4].wait(timeout=0.1)
    stream.close()


def test_prefetch_raises_at_the_failing_item():
    def fail_at_three(i):
        if i == 3:
            raise ValueError('item 3')
        return i

    stream = batching.prefetch(fail_at_three, 0, 10)
    assert [next(stream), next(stream), next(stream)] == [0, 1, 2]
    with pytest.raises(ValueError, match='item 3'):
        next(stream)
    assert not prefetch_threads()


def test_prefetch_leaves_no_thread_when_the_consumer_stops_early():
    stream = batching.prefetch(lambda i: i, 0, 1000)
    next(stream)
    assert prefetch_threads()
    stream.close()
    assert not prefetch_threads()
    stream = batching.prefetch(lambda i: i, 0, 1000)
    next(stream)
    del stream
    gc.collect()
    assert not prefetch_threads()


# ---- statistics -----------------------------------------------------------------------------


def test_statistics_of_the_training_images(train):
    images = train.images[::4]
    result = statistics.of_images(images)
    direct = images.astype(np.float64)
    # float32 rounds to 6e-8; the float64 sums themselves are exact.
    np.testing.assert_allclose(result.mean_image, direct.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(result.colour_std, [direct.std()], rtol=1e-7)
    assert result.colour_vectors.tolist() == [[1.0]]
    assert result.mean_image.dtype == np.float32
    assert result.mean_image.shape == (28, 28, 1)


def test_statistics_in_colour_are_the_principal_components(train):
    grey = train.images[:1500, ..., 0].astype(np.float64)
    colour = np.stack([grey, 0.5 * grey + 60, 0.9 * np.roll(grey, 1, axis=0)], axis=-1)
    images = colour.astype(np.uint8)  # 1500: the last chunk is a part
    result = statistics.of_images(images)
    covariance = np.cov(images.reshape(-1, 3).T.astype(np.float64), bias=True)
    vectors, std = result.colour_vectors.astype(np.float64), result.colour_std.astype(np.float64)
    # float32 entries: 1e-6 of the largest variance
    np.testing.assert_allclose(
        vectors @ np.diag(std**2) @ vectors.T, covariance, atol=1e-6 * covariance.max()
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-6)
    assert (np.diff(std) < 0).all()
    assert (np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0) > 0).all()
    np.testing.assert_allclose(result.mean_image, images.mean(axis=0, dtype=np.float64), rtol=1e-7)
