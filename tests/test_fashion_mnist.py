"""Test every source of MNIST's and Fashion-MNIST's raw files, and failures, on real data."""

import fcntl
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.image_classification import mnist

from alexnet_jax.data import datasets
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import RunError

OFFICIAL = {'train': 60_000, 'test': 10_000}
REPOSITORY = Path(__file__).parents[1]  # where `-m alexnet_jax prepare` is found
COMMAND = [sys.executable, '-m', 'alexnet_jax', 'prepare', 'fashion_mnist']


@pytest.fixture(scope='module')
def raw(data_dir):
    """The first 300 images of each split."""
    parts = {
        split: datasets.load('fashion_mnist', data_dir, f'{split}[:300]') for split in OFFICIAL
    }
    return {split: (part.images[..., 0], part.labels) for split, part in parts.items()}


@pytest.fixture(scope='module')
def raw_dir(raw, tmp_path_factory):
    """Four raw .gz files that hold `raw`."""
    folder = tmp_path_factory.mktemp('raw')
    for file, values in zip(fashion_mnist.FILES, (*raw['train'], *raw['test']), strict=True):
        header = struct.pack(f'>{1 + values.ndim}I', 0x800 + values.ndim, *values.shape)
        content = gzip.compress(header + values.astype(np.uint8).tobytes())
        (folder / file).write_bytes(content)
    return folder


def sums_of(folder):
    """The sums of the raw files in a folder, in the place of the official ones."""
    raw = [gzip.decompress((folder / file).read_bytes()) for file in fashion_mnist.FILES]
    return tuple(hashlib.sha256(content).hexdigest() for content in raw)


@pytest.fixture(autouse=True)
def _as_official(raw_dir, monkeypatch):
    """Take the small files for the official ones."""
    monkeypatch.setitem(fashion_mnist.SUMS, 'fashion_mnist', sums_of(raw_dir))


# The same in a process that a test starts, and the command, after more lines.
SCRIPT = """
import sys
from tests import test_fashion_mnist as t
t.fashion_mnist.SUMS['fashion_mnist'] = t.sums_of(t.Path(sys.argv.pop(1)))
{}
sys.exit(t.prepare.main(sys.argv[1:]))
"""


def started(raw_dir, data_dir, more=''):
    words = [sys.executable, '-c', SCRIPT.format(more), raw_dir, 'fashion_mnist',
             f'--data_dir={data_dir}', f'--source={raw_dir}']  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=REPOSITORY, **pipes)


# ---- contents -----------------------------------------------------------------------------


def test_tfds_reads_it_as_the_official_data_set(data_dir):
    builder = tfds.builder_from_directory(data_dir / 'fashion_mnist/3.0.1')
    info = builder.info
    assert (info.name, str(info.version)) == ('fashion_mnist', '3.0.1')
    assert {name: split.num_examples for name, split in info.splits.items()} == OFFICIAL
    assert info.features['image'].shape == (28, 28, 1)
    assert info.features['image'].np_dtype == np.uint8
    official = mnist.FashionMNIST(data_dir=data_dir)
    assert info.features['label'].names == official.info.features['label'].names
    assert info.description == official.info.description


def test_a_prepared_set_is_left_alone(data_dir):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in (data_dir / 'fashion_mnist').rglob('*')}

    before = stamps()
    assert fashion_mnist.prepare(data_dir) == data_dir / 'fashion_mnist/3.0.1'
    assert stamps() == before


def test_killed_in_the_middle_then_two_at_once_make_one_complete_set(raw_dir, raw, tmp_path):
    stop = """
import time
shards = t.fashion_mnist.shards
write, shards.example = shards.example, lambda *args: (
    args[1] == 9 and (print('in the middle', file=sys.stderr, flush=True) or time.sleep(600))
) or write(*args)
"""
    with started(raw_dir, tmp_path, stop) as victim:
        assert any('in the middle' in line for line in victim.stderr)
        victim.send_signal(signal.SIGKILL)
    assert (tmp_path / '.prepare-fashion_mnist').is_dir()  # what it left
    with pytest.raises(RunError, match='run `python -m'):
        datasets.load('fashion_mnist', tmp_path, 'train')

    with (tmp_path / '.prepare-fashion_mnist.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pair = [started(raw_dir, tmp_path) for _ in range(2)]
        for process in pair:
            assert 'waiting for another process' in process.stderr.readline()
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    folder = tmp_path / 'fashion_mnist/3.0.1'
    assert [out.strip() for out, _ in ends] == [str(folder)] * 2
    assert sum('writing train' in message for _, message in ends) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'fashion_mnist', '.prepare-fashion_mnist.lock'}
    for split, (images, labels) in raw.items():
        made = datasets.load('fashion_mnist', tmp_path, split)
        order = sorted(range(300), key=hashing.Hasher(split).hash_key)
        assert np.array_equal(made.images[..., 0], images[order])
        assert np.array_equal(made.labels, labels[order])


def test_every_process_writes_the_same_bytes(raw_dir, tmp_path):
    """TFDS's writer did not: it serialises a map of features in an order of the process."""
    processes = [started(raw_dir, tmp_path / name) for name in '123']
    for process in processes:
        process.communicate()
    made = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob('fashion_mnist/*/*')}
        for name in '123'
    ]
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 5


# ---- the digits -----------------------------------------------------------------------------


@pytest.fixture
def digits(raw_dir, monkeypatch):
    """A folder with four files in the place of MNIST's."""
    monkeypatch.setitem(fashion_mnist.SUMS, 'mnist', fashion_mnist.SUMS['fashion_mnist'])
    return raw_dir


def test_digits_from_a_folder(digits, raw, tmp_path, capsys):
    words = ['mnist', f'--source={digits}', f'--data_dir={tmp_path}']
    assert prepare.main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'mnist/3.0.1')
    dataset = datasets.load('mnist', tmp_path, 'test')
    assert dataset.class_names == tuple('0123456789')
    assert dataset.images.shape == (300, 28, 28, 1)
    assert np.array_equal(np.bincount(dataset.labels), np.bincount(raw['test'][1]))
    info = tfds.builder_from_directory(tmp_path / 'mnist/3.0.1').info
    assert info.description == mnist.MNIST(data_dir=tmp_path).info.description


def test_other_files_are_refused_as_digits(raw_dir, tmp_path):
    with pytest.raises(
        RunError, match=r'train-images-idx3-ubyte.gz is .*not the original file \(its sha256'
    ):
        fashion_mnist.prepare(tmp_path, raw_dir, name='mnist')


def test_a_set_of_this_name_in_another_version_is_used(tmp_path):
    """A link to what TFDS prepared, or pictures of one's own: nothing is downloaded."""
    (tmp_path / 'mnist/1.0.0').mkdir(parents=True)
    (tmp_path / 'mnist/1.0.0/dataset_info.json').write_text('{}')
    fashion_mnist.ensure('mnist', tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mnist']


def test_no_source_has_the_digits(tmp_path, monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(mnist.MNIST, 'URL', 'http://127.0.0.1:9/')  # nobody listens
    with pytest.raises(RunError, match=r'internet, or put its .*prepare mnist .*--source=FOLDER'):
        fashion_mnist.ensure('mnist', tmp_path)


# ---- sources of the raw files -----------------------------------------------------------------


def test_the_next_source_is_used_if_one_is_damaged(raw_dir, raw, tmp_path, monkeypatch, capsys):
    """Debian's package is incomplete; the download is complete."""
    monkeypatch.setattr(fashion_mnist, '_fetch_from_debian', lambda *_: tmp_path)
    monkeypatch.setattr(fashion_mnist, '_download', lambda *_: raw_dir)
    found = fashion_mnist._fetch('fashion_mnist', tmp_path, tmp_path)
    for split in raw:
        for ours, theirs in zip(found[split], raw[split], strict=True):
            assert np.array_equal(ours, theirs)
    first, second = capsys.readouterr().err.splitlines()
    assert 'train-images-idx3-ubyte.gz is missing' in first
    assert "from TFDS's download URL" in second


@pytest.mark.skipif(not shutil.which('dpkg-deb'), reason='packages are made by dpkg-deb')
def test_apt_updates_its_lists_in_a_folder_of_its_own(raw_dir, raw, tmp_path, monkeypatch):
    """A stand-in for apt-get that has the package only after an update of its own lists."""
    share = tmp_path / 'package/usr/share/datasets'
    share.mkdir(parents=True)
    shutil.copytree(raw_dir, share / 'not-installed')
    folder = Path('/usr/share/datasets/not-installed')
    monkeypatch.setattr(fashion_mnist, 'DEBIAN_FOLDER', folder)
    control = tmp_path / 'package/DEBIAN/control'
    control.parent.mkdir()
    control.write_text(
        'Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\n'
        'Maintainer: Nobody <nobody@example.org>\nDescription: stand-in\n'
    )
    build = ['dpkg-deb', '-Znone', '-b', str(tmp_path / 'package'), str(tmp_path / 'one.deb')]
    subprocess.run(build, check=True, capture_output=True)
    stand_in = tmp_path / 'bin/apt-get'
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/sh\n'
        'for word; do case $word in Dir::State=*) state=${word#*=};; esac; done\n'
        'case "$*" in\n'
        '*update) touch "$state/lists/updated";;\n'
        f'*) test -e "$state/lists/updated" && cp {tmp_path}/one.deb . || exit 100;;\n'
        'esac\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv('PATH', f'{stand_in.parent}:{os.environ["PATH"]}')
    found = fashion_mnist.read_raw(
        fashion_mnist._fetch_from_debian('fashion_mnist', tmp_path / 'scratch')
    )
    assert np.array_equal(found['train'][0], raw['train'][0])


def test_a_download_from_a_server(raw_dir, raw, tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            """Print nothing."""

    handler = functools.partial(Quiet, directory=str(raw_dir))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f'http://127.0.0.1:{server.server_address[1]}/'
        monkeypatch.setattr(mnist.FashionMNIST, 'URL', url)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        try:
            found = fashion_mnist.read_raw(fashion_mnist._download('fashion_mnist', tmp_path))
        finally:
            server.shutdown()
            thread.join()
    assert np.array_equal(found['test'][1], raw['test'][1])


def test_the_error_names_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(mnist.FashionMNIST, 'URL', 'http://127.0.0.1:9/')  # nobody listens
    with pytest.raises(RunError, match=r'internet, or put its four raw files'):
        fashion_mnist.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.prepare-fashion_mnist.lock']


# ---- bad input ------------------------------------------------------------------------------


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize('name', ['train-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'])
@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (flip, 'CRC|Error|invalid|sha256'),
        (lambda content: content[:-100], 'end-of-stream'),
        (lambda content: gzip.compress(flip(gzip.decompress(content)), 1), 'its sha256'),
        (lambda content: b'<html>moved</html>', 'Not a gzipped file'),
    ],
)
def test_a_damaged_raw_file_is_named(raw_dir, tmp_path, name, damage, sentence):
    for path in raw_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match=f'{name} is missing'):
        fashion_mnist.read_raw(tmp_path)
    (tmp_path / name).write_bytes(damage((raw_dir / name).read_bytes()))
    with pytest.raises(
        RunError, match=f'{name} is missing or not the original file .*({sentence})'
    ) as error:
        fashion_mnist.read_raw(tmp_path)
    assert '\n' not in str(error.value)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(raw_dir, tmp_path):
    """A limit on file sizes stands in for the full disk."""
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))'
    with started(raw_dir, tmp_path, limit) as process:
        _, message = process.communicate()
    assert process.returncode == 1
    assert 'File too large' in message.splitlines()[-1]
    assert str(tmp_path) in message.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ['.prepare-fashion_mnist.lock']


@pytest.mark.parametrize(
    ('words', 'code', 'sentence'),
    [
        ([], 2, 'DATASET'),
        (['fashion'], 2, "invalid choice: 'fashion'"),
        (
            ['fashion_mnist', '--source=not/there', '--data_dir={tmp}'],
            2,
            'not/there is not a folder',
        ),
        (['fashion_mnist', '--data_dir={file}/data'], 1, 'Not a directory'),
        (['fashion_mnist', '--data_dir={tmp}', '--source={tmp}'], 1, 'idx3-ubyte.gz is missing'),
    ],
)
def test_the_command_ends_badly_in_one_sentence(words, code, sentence, tmp_path, capsys):
    file = tmp_path / 'file'
    file.touch()
    assert prepare.main([word.format(file=file, tmp=tmp_path) for word in words]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('prepare: ')
    assert sentence in lines[0]
