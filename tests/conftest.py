"""Eight virtual CPU devices, strict numerics, and the real data, for every test."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def repository() -> Path:
    """The folder that holds main.py."""
    return REPOSITORY


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """A folder with Fashion-MNIST prepared in it (prepared now if it is not there yet)."""
    from alexnet_jax import prepare

    path = Path(os.environ.get('ALEXNET_DATA_DIR', REPOSITORY / 'data'))
    prepare.fashion_mnist(path)
    return path
