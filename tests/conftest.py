"""Eight virtual CPU devices, strict numerics, and the real data, for every test."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

REPOSITORY = Path(__file__).resolve().parents[1]

# Compiled programs are kept between tests and test runs: most of a small run is compilation.
CACHE = REPOSITORY / '.cache' / 'jax'
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


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
    from alexnet_jax import prepare

    path = Path(os.environ.get('ALEXNET_DATA_DIR', REPOSITORY / 'data'))
    prepare.fashion_mnist(path)
    return path


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
