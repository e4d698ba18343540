"""Eight virtual CPU devices, strict numerics, and the real data, for every test."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

REPOSITORY = Path(__file__).resolve().parents[1]

# Most of a small run is compilation. It is therefore brief, and compiled programs are shared by
# tests, their processes, and test runs.
CACHE = REPOSITORY / '.cache' / 'jax'
for name, value in (
    ('jax_compilation_cache_dir', str(CACHE)),
    ('jax_persistent_cache_min_compile_time_secs', 0),
    ('jax_disable_most_optimizations', True),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

# Files of few but long tests go first, so that the workers end together; see the Makefile.
LONG = (
    'test_sweep.py',
    'test_train.py',
    'test_distributed.py',
    'test_communication.py',
    'test_describe.py',
    'test_main.py',
    'test_model.py',
    'test_weights.py',
    'test_tour.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file the order stays."""
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.name) in LONG else len(LONG))


@pytest.fixture(scope='session')
def repository() -> Path:
    """The folder that holds main.py."""
    return REPOSITORY


@pytest.fixture(scope='session')
def cache_dir() -> Path:
    """The folder of compiled programs, for processes that tests start."""
    return CACHE


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """A folder with Fashion-MNIST prepared in it (prepared now if it is not there yet)."""
    from alexnet_jax.data.prepare import fashion_mnist

    path = Path(os.environ.get('ALEXNET_DATA_DIR', REPOSITORY / 'data'))
    fashion_mnist.prepare(path)
    return path


def smoke_config(data_dir: Path) -> ConfigDict:
    """A smoke run, shrunk: 256 images to train on, 64 to validate, 40 to test, 16 at a time."""
    from configs import smoke

    config = smoke.get_config()
    config.data.data_dir = str(data_dir)
    config.data.train, config.data.validation = 'train[:256]', 'train[256:320]'
    config.data.test = 'test[:40]'
    config.loop.log_every_steps = 1
    config.loop.eval_batch_size = 16  # the last batch is not full
    config.loop.tensorboard = False
    config.loop.compilation_cache = 'none'  # one is set above for all tests
    return config


@pytest.fixture(scope='session')
def smoke_run(data_dir, tmp_path_factory) -> Path:
    """The workdir of a smoke run, shrunk; to be looked at, or copied, not changed."""
    from alexnet_jax.training import train

    workdir = tmp_path_factory.mktemp('runs') / 'smoke'
    train.run(smoke_config(data_dir), workdir)
    return workdir


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'none', str(disk)]
    if os.geteuid() or shutil.which('mount') is None or subprocess.run(command).returncode:
        pytest.skip('mounting a tmpfs needs root')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """A function that makes a folder unwritable for everybody, root too, until the test ends."""
    mounted = []

    def make(folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o555)
            return
        commands = (['--bind', folder, folder], ['-o', 'remount,ro,bind', folder])
        if any(subprocess.run(['mount', *map(str, words)]).returncode for words in commands):
            pytest.skip('a read-only mount needs root with its rights')
        mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(['umount', '-l', str(folder)], check=True)
