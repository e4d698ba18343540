"""Test data sets that stay in their files: contents, batches, damage, statistics, complete runs.

Real array_record files, as TFDS writes them.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax import config as configuration
from alexnet_jax.config_file import as_json
from alexnet_jax.data import batches, datasets, records
from alexnet_jax.data import images as image_io
from alexnet_jax.data import statistics as image_statistics
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.training import callbacks, train
from alexnet_jax.training.workdir import MAY_DIFFER
from tests.conftest import smoke_config
from tests.processes import Program
from tests.test_train import assert_same, outcome

SIZES = {'train': 300, 'test': 70}
PX = 16


def encode(image, form):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def drawn(number, split, height=PX, width=PX):
    """A smooth picture, another for each number."""
    rng = np.random.default_rng([number, len(split)])
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def any_size(number):
    """Sides of 20 to 300 px."""
    return (20 + number * 37 % 280, 20 + number * 53 % 280)


def write(folder, form):
    """A data set of labelled pictures whose records hold 'pixels', 'picture' or 'any size'."""
    features = {
        'pixels': tfds.features.Tensor(shape=(PX, PX, 3), dtype=np.uint8, encoding='bytes'),
        'picture': tfds.features.Image(shape=(PX, PX, 3), encoding_format='jpeg'),
        'any size': tfds.features.Image(encoding_format='jpeg'),
    }

    class Drawn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            label = tfds.features.ClassLabel(names=['n0', 'n1', 'n2', 'n3', 'n4'])
            name = tfds.features.Text()
            kinds = {'image': features[form], 'label': label, 'file_name': name}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, n) for split, n in SIZES.items()}

        def _generate_examples(self, split, n):
            for i in range(n):
                image = drawn(i, split, *(any_size(i) if form == 'any size' else ()))
                if form != 'pixels':
                    image = io.BytesIO(encode(image, 'png' if i % 7 == 0 else 'jpeg'))
                yield i, {'image': image, 'label': i % 5, 'file_name': f'{i}.JPEG'}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        config = tfds.download.DownloadConfig(num_shards=3)
        builder = Drawn(data_dir=folder, file_format='array_record')
        builder.download_and_prepare(download_config=config)
    return folder


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """{form: data_dir}."""
    forms = ('pixels', 'picture', 'any size')
    return {form: write(tmp_path_factory.mktemp('sets'), form) for form in forms}


@pytest.fixture
def copy(sets, tmp_path):
    """A copy of the JPEGs to damage."""
    return shutil.copytree(sets['picture'], tmp_path / 'data')


def large(folder, split='train', workers=2):
    return datasets.load('drawn', folder, split, workers=workers, resident_gib=0.0)


# ---- contents -------------------------------------------------------------------------------


@pytest.mark.parametrize('split', ['train', 'test', 'train[50:120]+test[-7:]', 'train[98:102]'])
@pytest.mark.parametrize('form', ['pixels', 'picture', 'any size'])
def test_images_and_labels_equal_those_of_tfds(sets, form, split):
    builder = tfds.builder_from_directory(sets[form] / 'drawn/1.0.0')
    assert all(len(info.shard_lengths) == 3 for info in builder.info.splits.values())
    skip = None if form == 'pixels' else {'image': tfds.decode.SkipDecoding()}
    examples = list(builder.as_data_source(split, decoders=skip))
    dataset = large(sets[form], split)
    assert not isinstance(dataset.images, np.ndarray)
    assert len(dataset) == len(examples)
    shape = (PX, PX, 3) if form != 'any size' else (256, 256, 3)
    assert dataset.images.shape == (len(examples), *shape)
    for image, label, example in zip(dataset.images[:], dataset.labels, examples, strict=True):
        if form == 'pixels':
            np.testing.assert_array_equal(image, example['image'])
        else:
            np.testing.assert_array_equal(image, image_io.decode(example['image'], shape))
        assert label == example['label']


@pytest.mark.parametrize('form', ['pixels', 'picture', 'any size'])
def test_small_and_large_sets_are_equal(sets, form, tmp_path):
    folder = shutil.copytree(sets[form], tmp_path / 'data')
    small, big = datasets.load('drawn', folder, 'train[7:]'), large(folder, 'train[7:]')
    assert isinstance(small.images, np.ndarray)
    assert not isinstance(big.images, np.ndarray)
    np.testing.assert_array_equal(small.images, big.images[:])
    np.testing.assert_array_equal(small.labels, big.labels)
    assert big.labels.dtype == small.labels.dtype


def test_a_record_is_parsed_as_protobuf_does():
    """Values of both encodings of a list of integers, a negative label, features in any order."""
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    rng = np.random.default_rng(0)
    for label in (0, 1, 127, 128, 999, 2**31 - 1, -1):
        example = proto.Example()
        image = rng.bytes(rng.integers(1, 100_000))
        example.features.feature['image'].bytes_list.value.append(image)
        example.features.feature['label'].int64_list.value.append(label)
        example.features.feature['weights'].float_list.value.extend([1.0, 2.0])
        example.features.feature['file_name'].bytes_list.value.append(b'image')
        found = records.image_and_label(example.SerializeToString())
        assert (bytes(found[0]), found[1]) == (image, label)
    unpacked = b'\x0a\x1d\x0a\x0e\x0a\x05label\x12\x05\x1a\x03\x08\xac\x02'
    unpacked = (
        unpacked[:0] + bytes.fromhex('0a22') + bytes.fromhex('0a0e0a056c6162656c12051a0308ac02')
    )
    unpacked += bytes.fromhex('0a100a05696d61676512070a050a03616263')
    assert records.image_and_label(unpacked) == (memoryview(b'abc'), 300)


@pytest.mark.parametrize('record', [b'', b'\x0a', b'\x0a\x05abc', b'\x00\x01', b'\xff' * 20])
def test_malformed_records_are_refused(record):
    with pytest.raises((ValueError, LookupError)):
        records.image_and_label(record)


def test_indexing_by_number_slice_and_array(sets):
    dataset = large(sets['pixels'])
    everything = dataset.images[:]
    numbers = np.array([[3, 299], [0, 3]])
    np.testing.assert_array_equal(dataset.images[numbers], everything[numbers])
    np.testing.assert_array_equal(dataset.images[-1], everything[-1])
    np.testing.assert_array_equal(dataset.images[[2, -3]], everything[[2, -3]])
    np.testing.assert_array_equal(dataset.images[290:5:-90], everything[290:5:-90])
    mask = np.arange(300) % 50 == 7
    np.testing.assert_array_equal(dataset.images[mask], everything[mask])
    assert dataset.images[5:5].shape == (0, PX, PX, 3)
    for wrong in (300, -301, 1.5, 'train'):
        with pytest.raises(IndexError):
            dataset.images[wrong]


# ---- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_equal_those_of_a_set_in_memory(sets, tmp_path, workers):
    folder = shutil.copytree(sets['picture'], tmp_path / 'data')
    small, big = datasets.load('drawn', folder, 'train'), large(folder, workers=workers)
    for rows in (slice(None), slice(0, 32), slice(32, 64)):
        ours, theirs = (batches.TrainStream(d, 3, 64, rows) for d in (big, small))
        for step in (0, 4, 10**6):  # 4: the batch that spans the first two epochs
            batch, expected = ours.batch(step), theirs.batch(step)
            assert batch.keys() == expected.keys()
            for key in batch:
                assert batch[key].dtype == expected[key].dtype
                np.testing.assert_array_equal(batch[key], expected[key])
        for batch, expected in zip(
            batches.eval_batches(big, 64, rows), batches.eval_batches(small, 64, rows), strict=True
        ):
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key])


def test_concurrent_reads(sets):
    dataset = large(sets['pixels'])
    everything = large(sets['pixels'], workers=0).images[:]
    orders = [np.random.default_rng(i).permutation(300)[:100] for i in range(40)]
    found = batches.prefetch(lambda i: dataset.take(orders[i]), 0, 40, depth=8, threads=8)
    for order, (images, labels) in zip(orders, found, strict=True):
        np.testing.assert_array_equal(images, everything[order])
        assert len(labels) == 100


@pytest.mark.parametrize('workers', [0, 2])
def test_a_system_error_is_not_reported_as_damage(sets, repository, workers):
    """With no file descriptor left the data set is intact: nobody should remove it."""
    script = (
        'import resource\n'
        'from alexnet_jax.data import datasets, records\n'
        'records._raise_file_limit()\n'  # once: raised again later, the limit below would be gone
        f'd = datasets.load("drawn", {str(sets["picture"])!r}, "train", workers={workers},'
        ' resident_gib=0.0)\n'
        'resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))\n'
        'try: d.images[:300]\n'
        'except Exception as error: print(type(error).__name__, error)\n'
    )
    message = subprocess.check_output([sys.executable, '-c', script], cwd=repository, text=True)
    assert message.startswith('OSError [Errno 24] Too many open files'), message


def test_taking_no_image(sets):
    images, labels = large(sets['picture']).take(np.arange(0))
    assert images.shape == (0, PX, PX, 3)
    assert len(labels) == 0


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, None])
def test_a_killed_reader_leaves_nothing_behind(sets, repository, how):
    """While it reads it has no child processes and no file in /dev/shm."""
    script = (
        'import time, numpy as np\n'
        'from alexnet_jax.data import datasets\n'
        f'd = datasets.load("drawn", {str(sets["picture"])!r}, "train", workers=2,'
        ' resident_gib=0.0)\n'
        'd.take(np.arange(300)); print("read", flush=True)\n'
        f'while {how is not None}: d.take(np.arange(300))\n'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', script], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'read\n'
    if how:
        children = Path(f'/proc/{process.pid}/task').glob('*/children')
        assert not any(path.read_text() for path in children)
        assert '/dev/shm' not in Path(f'/proc/{process.pid}/maps').read_text()
        process.send_signal(how)
    assert process.wait(timeout=60) == (-how if how else 0)
    process.stdout.close()


# ---- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_record_is_named(copy, workers):
    path = next((copy / 'drawn/1.0.0').glob('*train*-00001-of-*'))
    content = bytearray(path.read_bytes())
    for offset in range(len(content) // 3, len(content) // 2, 40):
        content[offset] ^= 0xFF
    path.write_bytes(content)
    dataset = large(copy, workers=workers)
    with pytest.raises(
        RunError, match=r'is damaged \(drawn-train\S+-00001-of-\d+, records from \d+: '
    ) as e:
        dataset.images[:]
    assert '\n' not in str(e.value)
    assert dataset.images[:90].shape[0] == 90  # intact records can still be read


def test_descriptions_of_other_data_are_refused(copy):
    path = copy / 'drawn/1.0.0/features.json'
    good = path.read_text()
    for before, after, expected in (
        ('uint8', 'float32', 'but must be uint8'),
        ('"image": {', '"picture": {', 'its description .* is missing or wrong'),
        (good, '{"featuresDict"', 'its description .* is missing or wrong'),
    ):
        assert before in good
        path.write_text(good.replace(before, after))
        with pytest.raises(RunError, match=expected):
            large(copy)


# ---- labels, names, statistics --------------------------------------------------------------


def test_labels_are_kept_until_the_records_change(copy, monkeypatch):
    expected = large(copy).labels
    read = []
    monkeypatch.setattr(records.StoredImages, 'read', lambda *_: read.append(1) or 1 / 0)
    np.testing.assert_array_equal(large(copy).labels, expected)
    assert not read
    path = next((copy / 'drawn/1.0.0').glob('*train*-00001-of-*'))
    os.utime(path, (1, 1))
    with pytest.raises(ZeroDivisionError):
        _ = large(copy).labels


def test_statistics_of_a_large_set(copy, caplog):
    dataset = large(copy)
    with caplog.at_level(logging.WARNING):
        result = datasets.statistics_of(dataset)
        again = datasets.statistics_of(large(copy))
    assert len(caplog.records) == 1  # the second call finds them on disk
    images = dataset.images[:].astype(np.float64)
    np.testing.assert_allclose(result.mean_image, images.mean(axis=0), rtol=1e-6)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    vectors = result.colour_vectors.astype(np.float64)
    np.testing.assert_allclose(
        vectors @ np.diag(result.colour_std.astype(np.float64) ** 2) @ vectors.T,
        covariance,
        atol=1e-6 * covariance.max(),
    )
    for name in vars(result):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    os.utime(next((copy / 'drawn/1.0.0').glob('*train*-00001-of-*')), (1, 1))  # other records
    with caplog.at_level(logging.WARNING):
        datasets.statistics_of(large(copy))
    assert len(caplog.records) == 2


def test_statistics_beside_the_records_are_used(copy):
    own = datasets.statistics_of(large(copy, 'train[:100%]'))
    mine = datasets.Statistics(own.mean_image + 1, own.colour_std, own.colour_vectors)
    beside = copy / 'drawn/1.0.0/statistics.npz'
    image_statistics.save(beside, mine, SIZES['train'])
    np.testing.assert_array_equal(datasets.statistics_of(large(copy)).mean_image, mine.mean_image)
    part = datasets.statistics_of(large(copy, 'train[:299]')).mean_image  # not of that part
    assert np.abs(part - own.mean_image).max() < 0.9
    image_statistics.save(beside, mine, SIZES['train'] - 1)  # of another preparation
    np.testing.assert_array_equal(datasets.statistics_of(large(copy)).mean_image, own.mean_image)
    # Earlier versions stored those of the images before encoding, under another name.
    np.savez(beside, count=SIZES['train'], **vars(mine))
    np.testing.assert_array_equal(datasets.statistics_of(large(copy)).mean_image, own.mean_image)


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """A data set of noisy pictures, stored as JPEG, which changes them much."""
    folder = tmp_path_factory.mktemp('noise')
    rng = np.random.default_rng(0)
    for number in range(60):
        path = folder / 'pictures' / str(number % 3) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 32, 3), np.uint8) // 2 + 4 * number % 128
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    args = ['folder', f'--source={folder / "pictures"}', f'--data_dir={folder / "data"}',
            '--name=noise', '--px=32', '--validation=0.2', '--test=0']  # fmt: skip
    assert prepare.main(args) == 0
    return folder / 'data'


@pytest.mark.parametrize('split', ['train', 'train[:100%]', 'train[:-1]'])
def test_one_mean_image_in_memory_and_in_files(noise, split, tmp_path):
    """In memory, in the files, as prepared, and without what preparation has summed up."""
    folder = shutil.copytree(noise, tmp_path / 'data')
    ways = [dict(workers=w, resident_gib=g) for w, g in ((0, 4.0), (2, 4.0), (0, 0.0), (2, 0.0))]
    found = [datasets.statistics_of(datasets.load('noise', folder, split, **how)) for how in ways]
    (folder / 'noise/1.0.0/statistics.npz').unlink()
    found.append(datasets.statistics_of(datasets.load('noise', folder, split, resident_gib=0.0)))
    for other in found[1:]:
        for name, value in vars(other).items():
            np.testing.assert_array_equal(value, getattr(found[0], name), name)


def test_class_words(copy):
    assert large(copy).class_names == ('n0', 'n1', 'n2', 'n3', 'n4')
    words = copy / 'drawn/1.0.0/label.words.txt'
    words.write_text('tench, Tinca tinca\ncrane\ncock\ncrane\nostrich\n')
    names = ('tench, Tinca tinca', 'crane (n1)', 'cock', 'crane (n3)', 'ostrich')
    assert large(copy).class_names == names
    assert datasets.describe('drawn', copy).words == names
    words.write_text('tench\n')
    with pytest.raises(RunError, match=r'its description .* is missing or wrong'):
        large(copy)


def test_a_set_prepared_here_is_preferred_to_a_newer_version(copy):
    shutil.copytree(copy / 'drawn/1.0.0', copy / 'drawn/5.1.0')
    assert large(copy).images.folder.name == '5.1.0'
    (copy / 'drawn/1.0.0/preparation.json').write_text('{}')
    assert large(copy).images.folder.name == '1.0.0'


# ---- runs -----------------------------------------------------------------------------------


def as_smoke_run(data_dir, **changes):
    """The config of the fixture smoke_run, with the data in its files."""
    config = smoke_config(data_dir)
    config.data.workers, config.data.resident_gib = 2, 0.0
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def test_a_run_on_a_large_set_equals_one_in_memory(
    smoke_run, data_dir, tmp_path, capsys, monkeypatch
):
    """To the bit; and a run that waits for images prints that once.

    Whatever else is listed as changing no number is changed with it, but for meshes.
    """
    monkeypatch.setattr(callbacks, 'STALL_SHARE', -1.0)
    workdir = tmp_path / 'large'
    shutil.copytree(data_dir / 'fashion_mnist', tmp_path / 'data' / 'fashion_mnist')
    changes = {
        'data.data_dir': str(tmp_path / 'data'),
        'loop.prefetch_batches': 5,
        'loop.checkpoint_every_epochs': 0.25,
        'loop.on_collapsed_init': 'warn',
    }
    config = as_smoke_run(tmp_path / 'data')
    for key, value in changes.items():
        group, name = key.split('.')
        assert key in MAY_DIFFER
        config[group][name] = value
    train.run(config, workdir)
    assert_same(outcome(smoke_run), outcome(workdir))
    message = re.findall(r'training waits for its input .*data\.workers', capsys.readouterr().err)
    assert len(message) == 1


def test_the_size_of_evaluation_batches_changes_no_number(smoke_run):
    """Beyond rounding: a compiler may sum a batch of another size in another order."""
    found = []
    for size in (16, 7, 64):
        trained = evaluate.restore(smoke_run, overrides={'loop.eval_batch_size': size})
        dataset = evaluate.open_split(trained, 'test')
        net = trained.settings, trained.layout, trained.params, trained.statistics
        scored = evaluate.probabilities(*net, dataset)
        found.append(scored['centre'])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-7)


def test_a_run_without_validation(smoke_run, data_dir, tmp_path, capsys, monkeypatch):
    """It trains to the same bits, and no checkpoint of it is the best one.

    Its data is in memory, so nothing is printed about slow input.
    """
    monkeypatch.setattr(callbacks, 'STALL_SHARE', -1.0)
    config = smoke_config(data_dir)
    config.data.validation = 'none'
    train.run(config, tmp_path / 'run')
    assert 'waits for its input' not in capsys.readouterr().err
    step, leaves, written, predictions = outcome(tmp_path / 'run')
    expected = outcome(smoke_run)
    unvalidated = [record for record in expected[2] if record['kind'] != 'validation']
    assert len(unvalidated) < len(expected[2])
    assert_same((step, leaves, written, predictions), (*expected[:2], unvalidated, expected[3]))
    with pytest.raises(
        UsageError, match=r'no checkpoint with a validation error in .*; choose another'
    ):
        evaluate.restore(tmp_path / 'run', 'best')
    with pytest.raises(UsageError, match=r'data\.validation=none: '):
        evaluate.run([tmp_path / 'run'], split='validation')
    config.optimizer.weights.kind = 'plateau'
    with pytest.raises(UsageError, match=r"'plateau' follows the validation error"):
        configuration.unpack(config)


@pytest.fixture
def stopped_config(data_dir, cache_dir):
    return as_smoke_run(data_dir, loop__compilation_cache=str(cache_dir), mesh__data=8)


def test_a_stopped_run_on_a_large_set_resumes(smoke_run, stopped_config, tmp_path, capsys):
    config = tmp_path / 'config.json'
    config.write_text(as_json(stopped_config))
    words = [f'--config={config}', f'--workdir={tmp_path}/run']
    program = Program(words, tmp_path, devices=8)
    program.wait_for_step(2)
    program.send(signal.SIGTERM)
    assert program.wait() == 143, program.err
    assert 'Traceback' not in program.err
    train.run(stopped_config, tmp_path / 'run')
    assert 'resuming at step' in capsys.readouterr().err
    assert_same(outcome(smoke_run), outcome(tmp_path / 'run'))
