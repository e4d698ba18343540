"""Test shards: TFDS reads them, kills do not change their bytes, bad pictures are named."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils.lazy_imports_utils import array_record_module

from alexnet_jax.data import images, prepared
from alexnet_jax.data.prepare import image_folder
from alexnet_jax.data.prepare import shards as shard_writer
from alexnet_jax.data.prepare.shards import File, Form
from alexnet_jax.errors import RunError, UsageError
from tests import sources

REPOSITORY = Path(__file__).parents[1]
SMALL = Form(px=32)


def draw(root, per_class, size=(60, 40)):
    """Different smooth pictures: {class: how many}."""
    rng = np.random.default_rng(0)
    for label, count in per_class.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
            (root / label / f'{i:04d}.jpg').write_bytes(sources.jpeg(small.resize(size)))
    return root


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """A folder of 330 pictures: with 40 a shard, 7 + 2 shards."""
    return draw(tmp_path_factory.mktemp('source') / 'pets', {'cat': 200, 'dog': 130})


def source(pets):
    return image_folder.source(pets, 'pets', validation=0.2, test=0)


def make(pets, data_dir, form=SMALL, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, 'SHARD_IMAGES', 40)
        return shard_writer.make(source(pets), data_dir, form, **dict(workers=2) | options)


@pytest.fixture(scope='module')
def made(pets, tmp_path_factory):
    """Prepared without disturbance, by two processes."""
    return make(pets, tmp_path_factory.mktemp('data'))


class InThisProcess:
    """A pool that does its work at once: starting processes takes most of the time."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, fn, *args):
        future = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def _in_this_process(made, monkeypatch):
    """No worker processes after those that wrote `made`."""
    monkeypatch.setattr(shard_writer, 'ProcessPoolExecutor', InThisProcess)


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ---- contents -----------------------------------------------------------------------------


def examples(folder):
    """{split: [(file name, image, label)]} as TFDS reads it."""
    builder = tfds.builder_from_directory(folder)
    return {
        split: [
            (row['file_name'].decode(), row['image'], int(row['label']))
            for row in builder.as_data_source(split)
        ]
        for split in builder.info.splits
    }


@pytest.mark.parametrize('storage', ['jpeg', 'raw'])
def test_tfds_reads_every_picture(pets, made, tmp_path, storage):
    folder = made if storage == 'jpeg' else make(pets, tmp_path, Form(32, 'raw'))
    found = examples(folder)
    assert {split: len(rows) for split, rows in found.items()} == {'train': 264, 'validation': 66}
    seen = set()
    for rows in found.values():
        for name, image, label in rows:
            seen.add(name)
            assert label == ['cat', 'dog'].index(name.split('/')[0])
            expected = images.decode((pets / name).read_bytes(), (32, 32, 3))
            if storage == 'raw':
                np.testing.assert_array_equal(image, expected)
            else:
                encoded = images.jpeg(expected, 90)
                np.testing.assert_array_equal(image, images.decode(encoded, (32, 32, 3)))
    assert len(seen) == 330
    info = tfds.builder_from_directory(folder).info
    assert info.features['image'].shape == (32, 32, 3)
    assert info.features['label'].names == ['cat', 'dog']
    assert info.supervised_keys == ('image', 'label')
    assert {path.suffix for path in folder.iterdir()} >= {'.json', '.npz', '.txt'}


def test_the_order_is_mixed_and_shards_are_about_equal(made):
    rows = examples(made)['train']
    labels = [label for _, _, label in rows]
    assert 10 < sum(labels[:60]) < 40  # 24 of 60 on the average, sd 4
    counts = json.loads((made / 'dataset_info.json').read_text())['splits'][0]['shardLengths']
    assert len(counts) == 7
    assert all(15 <= int(count) <= 65 for count in counts)  # 38 on the average, sd 6


@pytest.mark.parametrize('storage', ['jpeg', 'raw'])
def test_statistics_are_of_the_images_as_they_are_read(pets, made, tmp_path, storage):
    folder = made if storage == 'jpeg' else make(pets, tmp_path, Form(32, 'raw'))
    stored = np.stack([image for _, image, _ in examples(folder)['train']]).astype(np.float64)
    found = np.load(folder / 'statistics.npz')
    pixels = stored.reshape(-1, 3)
    variances, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False, bias=True))
    assert found['count_decoded'] == len(stored)
    np.testing.assert_allclose(found['mean_image'], stored.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found['colour_std'], np.sqrt(variances[::-1]), rtol=1e-6)
    signs = np.sign((found['colour_vectors'] * vectors[:, ::-1]).sum(axis=0))
    np.testing.assert_allclose(found['colour_vectors'], vectors[:, ::-1] * signs, atol=1e-6)


def test_a_record_has_its_features_in_one_order():
    """Written out by hand; protobuf promises no order of a map, and varies it by process."""
    entries = [
        b'\x0a\x09file_name\x12\x05\x0a\x03\x0a\x01b',
        b'\x0a\x05image\x12\x06\x0a\x04\x0a\x02xy',
        b'\x0a\x05label\x12\x06\x1a\x04\x0a\x02\xac\x02',
    ]
    features = b''.join(b'\x0a' + bytes([len(entry)]) + entry for entry in entries)
    expected = b'\x0a' + bytes([len(features)]) + features
    assert shard_writer.example(b'xy', 300, 'b') == expected


@pytest.mark.parametrize('pool', [InThisProcess, ProcessPoolExecutor])
def test_one_process_makes_the_same_bytes(pets, made, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(shard_writer, 'ProcessPoolExecutor', pool)
    assert sums(make(pets, tmp_path, workers=1)) == sums(made)


def test_a_prepared_set_is_kept_and_another_form_refused(pets, made):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert make(pets, made.parents[1]) == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    with pytest.raises(UsageError, match='already exists and differs in storage: remove'):
        make(pets, made.parents[1], Form(32, 'raw'))


def test_a_prepared_set_with_a_damaged_description(pets, made, tmp_path):
    shutil.copytree(made, tmp_path / 'pets' / made.name)
    (tmp_path / 'pets' / made.name / 'preparation.json').write_text('{')
    with pytest.raises(RunError, match=r'is damaged \(preparation.json: .*remove that folder'):
        make(pets, tmp_path)


# ---- kill and resume ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """1,100 pictures, enough for several shards and some seconds."""
    root = tmp_path_factory.mktemp('many') / 'many'
    return draw(root, {'a': 550, 'b': 550}, size=(375, 250))


def start(many, data_dir, *more):
    words = [sys.executable, '-m', 'alexnet_jax', 'prepare', 'folder', f'--source={many}',
             f'--data_dir={data_dir}', '--workers=2', '--px=64', '--test=0', *more]  # fmt: skip
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's & ignores it, inherited
    try:
        return subprocess.Popen(words, cwd=REPOSITORY, text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def finished(data_dir):
    found = data_dir.glob('.prepare-many/*/set/many-*')
    return [path.name for path in found if path.stat().st_size]


def workers_of(pid):
    """Its child processes."""
    found = []
    for entry in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(')')[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def gone(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True


def wait_until(condition, secs=120):
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(many, tmp_path):
    calm, killed = tmp_path / 'calm', tmp_path / 'killed'
    with start(many, calm) as undisturbed:
        out, _ = undisturbed.communicate(timeout=300)
    folder = calm / 'many/1.0.0'
    assert out.strip() == str(folder)
    shards = len(list(folder.glob('many-*')))
    assert shards == 4 + 1  # of 990 and of 110 pictures
    before = 0
    for after_shards in (0, 2):  # one is dead before it wrote a shard
        with start(many, killed) as victim:
            wait_until(lambda n=after_shards: len(finished(killed)) >= n and workers_of(victim.pid))
            children = workers_of(victim.pid)
            victim.send_signal(signal.SIGKILL)
        assert children
        wait_until(lambda pids=children: all(gone(pid) for pid in pids))
        assert not (killed / 'many').exists()
        assert before <= len(finished(killed)) < shards
        before = len(finished(killed))
    with start(many, killed) as last:
        _, message = last.communicate(timeout=300)
    assert last.returncode == 0
    assert 'many: resuming, ' in message
    assert sums(killed / 'many/1.0.0') == sums(folder)
    assert {path.name for path in killed.iterdir()} == {'many', '.prepare-many.lock'}


def test_a_worker_that_dies_is_one_sentence_and_loses_nothing(many, tmp_path):
    with start(many, tmp_path) as process:
        wait_until(lambda: finished(tmp_path))
        # Not the process that only keeps count of shared memory.
        lines = {pid: Path(f'/proc/{pid}/cmdline').read_text() for pid in workers_of(process.pid)}
        os.kill(next(pid for pid, line in lines.items() if 'spawn_main' in line), signal.SIGKILL)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'A worker process died' in message.splitlines()[-1]
    assert finished(tmp_path)


def test_ctrl_c_ends_at_once_without_a_traceback(many, tmp_path):
    for attempt in range(5):  # on a busy machine it may be done before the signal comes
        with start(many, tmp_path / str(attempt)) as process:
            wait_until(lambda p=process: len(workers_of(p.pid)) >= 2)
            children = workers_of(process.pid)
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130
    assert 'Traceback' not in message
    wait_until(lambda: all(gone(pid) for pid in children))  # Python's tracker ends a moment later


def test_other_pictures_under_the_same_name_are_refused(made, tmp_path):
    others = draw(tmp_path / 'pets', {'cat': 20, 'dog': 20})
    with pytest.raises(UsageError, match='differs in its images'):
        make(others, made.parents[1])


def test_the_same_number_of_other_pictures_is_refused(pets, made, tmp_path):
    others = shutil.copytree(pets, tmp_path / 'pets')
    assert make(others, made.parents[1]) == made  # copied elsewhere they are the same
    with (others / 'cat/0000.jpg').open('ab') as file:
        file.write(b'one byte more')
    with pytest.raises(UsageError, match='differs in its images'):
        make(others, made.parents[1])


def test_a_staging_directory_left_by_a_kill_is_removed(pets, made, tmp_path):
    """The folder has its final name, and the staging directory was not removed yet."""
    shutil.copytree(made.parents[1], tmp_path / 'data')
    (tmp_path / 'data/.prepare-pets/some').mkdir(parents=True)
    make(pets, tmp_path / 'data')
    assert not (tmp_path / 'data/.prepare-pets').exists()


@pytest.fixture
def half(pets, tmp_path):
    """A copy of the pictures, and a data folder in which a stopped run left all shards."""
    copy = shutil.copytree(pets, tmp_path / 'pets')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, '_describe', interrupt)
        with pytest.raises(InterruptedError):
            make(copy, tmp_path / 'data')
    return copy, tmp_path / 'data'


def interrupt(*_):
    raise InterruptedError


def shard_stamps(data_dir):
    return {
        path.name: path.stat().st_mtime_ns for path in data_dir.glob('.prepare-pets/*/set/pets-*')
    }


@pytest.mark.parametrize('form', [Form(32, quality=50), Form(32, 'raw'), Form(64)])
def test_shards_of_another_form_are_kept(half, form, made):
    """They may be hours of work; with a wrong flag once they must not be lost."""
    copy, data_dir = half
    before = shard_stamps(data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, '_write_shards', interrupt)
        with pytest.raises(InterruptedError):
            make(copy, data_dir, form)
    assert shard_stamps(data_dir) == before
    assert sums(make(copy, data_dir)) == sums(made)
    assert not (data_dir / '.prepare-pets').exists()


@pytest.mark.parametrize('change', ['mended', 'removed', 'added'])
def test_shards_of_unchanged_pictures_are_kept(half, pets, tmp_path, change):
    """A picture that was mended or removed costs its own shard only."""
    copy, data_dir = half
    before = shard_stamps(data_dir)
    if change == 'mended':
        (copy / 'cat/0000.jpg').write_bytes(sources.jpeg(Image.new('RGB', (50, 50))))
    if change == 'removed':
        (copy / 'cat/0000.jpg').unlink()
    if change == 'added':
        shutil.copy(copy / 'cat/0000.jpg', copy / 'cat/new.jpg')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, '_describe', interrupt)
        with pytest.raises(InterruptedError):
            make(copy, data_dir)
    kept = [name for name, stamp in shard_stamps(data_dir).items() if before[name] == stamp]
    # The split is divided again: another picture may have changed its side.
    assert len(before) - 4 <= len(kept) < len(before)
    left = make(copy, data_dir)
    assert sums(left) == sums(make(copy, tmp_path / 'undisturbed'))


def test_a_shard_without_its_facts_is_written_again(half, made):
    copy, data_dir = half
    next(data_dir.glob('.prepare-pets/*/pets-train*.json')).unlink()
    make(copy, data_dir)
    assert sums(data_dir / 'pets/1.0.0') == sums(made)


def test_facts_without_their_shard_are_not_believed(half, made):
    """Pictures changed, and changed back: the first shards are gone, their facts are not."""
    copy, data_dir = half
    next(data_dir.glob('.prepare-pets/*/set/pets-train*')).unlink()
    make(copy, data_dir)
    assert sums(data_dir / 'pets/1.0.0') == sums(made)


def test_finished_shards_are_used_and_not_written_again(half, made):
    copy, data_dir = half
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, 'ProcessPoolExecutor', NoPool)
        folder = make(copy, data_dir)
    assert sums(folder) == sums(made)


class NoPool(InThisProcess):
    """Takes no work."""

    submit = None


# ---- failures ------------------------------------------------------------------------------


@pytest.fixture
def spoilt(pets, tmp_path):
    """Three pictures that cannot be decoded: truncated, a text, empty."""
    copy = shutil.copytree(pets, tmp_path / 'pets')
    full = (copy / 'cat/0001.jpg').read_bytes()
    (copy / 'cat/0001.jpg').write_bytes(full[: len(full) // 2])
    (copy / 'dog/0002.jpg').write_text('moved')
    (copy / 'dog/0003.jpg').write_bytes(b'')
    return copy


def test_a_bad_picture_is_named_and_allowed_by_number_only(spoilt, tmp_path, capsys):
    data_dir = tmp_path / 'data'
    message = r'(cat/0001|dog/000[23]).jpg (is no|cannot).*--skip_corrupt=N'
    with pytest.raises(RunError, match=message) as caught:
        make(spoilt, data_dir)
    assert '\n' not in str(caught.value)
    for _ in range(2):  # pictures that an earlier run left out count again
        with pytest.raises(RunError, match=r'3 image\(s\) .*cat/0001.jpg.*\(now 2\)'):
            make(spoilt, data_dir, skip_corrupt=2)
    assert not (data_dir / 'pets').exists()
    folder = make(spoilt, data_dir, skip_corrupt=3)
    lines = capsys.readouterr().err.splitlines()
    bad = ['cat/0001.jpg', 'dog/0002.jpg', 'dog/0003.jpg']
    skipped = json.loads((folder / 'preparation.json').read_text())['skipped']
    assert [line.split()[0] for line in skipped] == bad
    assert sorted(line.split()[2] for line in lines if ': skipped: ' in line) == bad
    rows = [row for part in examples(folder).values() for row in part]
    assert len(rows) == 327
    assert not {name for name, _, _ in rows} & set(bad)
    count = np.load(folder / 'statistics.npz')['count_decoded']
    assert count == len(examples(folder)['train'])


def test_a_missing_picture_is_named(pets, tmp_path):
    copy = shutil.copytree(pets, tmp_path / 'pets')
    (copy / 'cat/link.jpg').symlink_to('nowhere.jpg')
    with pytest.raises(FileNotFoundError, match=r'cat/link.jpg'):
        make(copy, tmp_path / 'data')
    (copy / 'cat/link.jpg').unlink()
    seen = source(copy)
    (copy / 'cat/0000.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'cat/0000.jpg'):
        shard_writer.make(seen, tmp_path / 'data', SMALL, workers=1)


def test_a_disk_that_fills_up_leaves_nothing_incomplete(pets, small_disk):
    """A disk of 3 MB."""
    with pytest.raises(OSError, match=r'No space left on device'):
        make(pets, small_disk, Form(64, 'raw'))
    assert not (small_disk / 'pets').exists()


def test_a_shard_that_lacks_pictures_is_written_again(pets, tmp_path):
    """Finished shards that lack a large picture are written again when it is allowed."""
    copy = shutil.copytree(pets, tmp_path / 'pets')
    Image.new('RGB', (1500, 1000)).save(copy / 'cat/large.png')
    message = r'cat/large.png has 1,500,000 pixels.* \(`prepare .* --max_megapixels=2` accepts it\)'
    with pytest.raises(RunError, match=message):
        make(copy, tmp_path / 'data', most_pixels=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, '_describe', interrupt)
        with pytest.raises(InterruptedError):
            make(copy, tmp_path / 'data', most_pixels=10**6, skip_corrupt=1)
    folder = make(copy, tmp_path / 'data', most_pixels=2 * 10**6)
    assert sums(folder) == sums(make(copy, tmp_path / 'undisturbed'))


def test_a_shard_by_itself(pets, tmp_path):
    """`write_shard` alone, without pool and lock."""
    (tmp_path / 'set').mkdir()
    names = [f'cat/{i:04d}.jpg' for i in range(5)]
    pictures = [
        json.dumps(['', i, *File(name, str(path), 0, path.stat().st_size)])
        for i, name in enumerate(names)
        for path in [pets / name]
    ]
    (tmp_path / 'out.plan').write_text('\n'.join(pictures))
    count, record_bytes, skipped = shard_writer.write_shard('out', tmp_path, SMALL, 10**8)
    assert (count, skipped) == (5, [])
    reader = array_record_module.ArrayRecordReader(str(tmp_path / 'set/out'))
    found = reader.read_all()
    assert sum(map(len, found)) == record_bytes
    assert all(name.encode() in record for name, record in zip(names, found, strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {'set', 'out.json', 'out.plan'}


def test_shards_of_imagenet_are_fewer_than_the_limit_of_open_files():
    assert shard_writer._shard_count(1_281_167) == 626
    assert shard_writer._shard_count(50_000) == 25
    assert shard_writer._shard_count(1) == 1
    assert prepared.shard_name('a', 'train', 3, 626) == 'a-train.array_record-00003-of-00626'
