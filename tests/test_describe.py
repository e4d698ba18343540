"""Test the page of `--mode=describe` against the 2012 paper and source."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.analysis import describe
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import geometry
from configs import ablation_lrn, alexnet, smoke


@pytest.fixture(autouse=True, scope='module')
def devices():
    """Initialise the devices of the tests before `describe` creates others."""
    return jax.devices()


def on(data: int, tower: int, config=None, placement: str = 'towers'):
    """Return a config, the smallest one by default, on a mesh."""
    config = config or smoke.get_config()
    config.mesh.update(data=data, tower=tower, placement=placement)
    return config


def two_layers(data: int, tower: int):
    """Return a config whose net compiles in a quarter of the time of one with eight layers."""
    config = on(data, tower)
    config.model.layers = ('conv1', 'fc8')
    return config


@pytest.fixture(scope='module')
def page_of_one_device(devices, tmp_path_factory) -> str:
    """Return the page of a small config, described in a folder without data."""
    folder = tmp_path_factory.mktemp('empty')
    with contextlib.chdir(folder):
        page = describe.run(two_layers(1, 1))
    assert not list(folder.iterdir())
    return page


def cells(page: str) -> dict[str, list[str]]:
    """Return the table's rows by layer."""
    lines = [line for line in page.splitlines() if line[:4] in ('conv', 'fc6 ', 'fc7 ', 'fc8 ')]
    return {line.split()[0]: [c.strip() for c in line.split('  ') if c.strip()] for line in lines}


def described(config) -> str:
    """Return the part of the page that needs no compilation."""
    return describe.page(configuration.unpack(config))


def test_the_net_of_2012():
    page = described(alexnet.get_config('imagenet2012'))
    assert '60,965,224 parameters, 659,272 neurons, 724.4 M multiply-adds' in page
    rows = cells(page)
    assert list(rows) == ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert rows['conv1'] == [
        'conv1', 'the image', '224 x 224 x 3', '11/4/0,3,0,3', '55 x 55 x 96', '0.01', '0',
        '34,944', '105,415,200', 'lrn, pool -> 27 x 27 x 96, relu',
    ]  # fmt: skip
    assert [rows[name][1] for name in rows] == [
        'the image', 'own tower', 'all towers', 'own tower', 'own tower', 'all towers',
        'all towers', 'all towers',
    ]  # fmt: skip
    assert rows['conv2'][-1] == 'relu, lrn, spatial_norm, pool -> 13 x 13 x 256'
    assert rows['conv5'][-1] == 'pool -> 6 x 6 x 256, relu'


def test_one_tower():
    config = on(1, 1, alexnet.get_config('imagenet2012'))
    config.model.towers = 1
    for name, features in zip(config.model.layers, (48, 128, 192, 192, 256), strict=False):
        config.model[name].features = features
    assert '59,798,312 parameters' in described(config)


def test_every_scale_and_ablation_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder without data
    for scale in alexnet.SCALES:
        rows = cells(described(ablation_lrn.get_config(scale)))
        assert 'lrn' not in ''.join(row[-1] for row in rows.values())


def test_the_memory_of_a_step_is_printed(page_of_one_device):
    held = rows_behind(page_of_one_device, 'memory of a device on data 1 x tower 1')
    settings = configuration.unpack(two_layers(1, 1))
    parameters = sum(stage.parameters for stage in geometry(settings.net))
    assert held['state',][1] == f'{2 * 4 * parameters / 2**20:.1f}'
    # The stored images at least; at most every result twice and the images three times in float32.
    images, stored = settings.batch_size, settings.preprocess.resize_px**2
    results = sum(math.prod(x) for s in geometry(settings.net) for x in (s.output, *s.after))
    temporaries = float(held['temporaries',][1]) * 2**20
    assert images * stored < temporaries < 4 * images * (2 * results + 3 * stored)


# -------------------------------------------------------------------------------------- on a mesh


def rows_behind(page: str, title: str) -> dict[tuple[str, ...], list[str]]:
    """Return the rows of the table after a title, by layer and, if there is one, pass."""
    table = page.partition(title)[2].split('\n\n')[1].splitlines()[2:]
    rows = [line.split() for line in table]
    return {tuple(row[:2] if row[1].isalpha() else row[:1]): row for row in rows}


def test_one_device_communicates_nothing(page_of_one_device):
    assert 'one device: no communication' in page_of_one_device


def on_mesh(config) -> str:
    """Return the part of the page about the compiled step."""
    if jax.device_count() < 8:
        pytest.skip('eight devices are wanted; tests/conftest.py makes them')
    return '\n\n'.join(describe.compiled(configuration.unpack(config)))


def test_communication_and_memory_of_a_mesh():
    page = on_mesh(on(2, 2))
    sent = rows_behind(page, 'communication of a step on data 2 x tower 2, placement towers')
    # Half of 64 images, 3 x 3 x 32 float32 each; a device of two sends half of that.
    assert sent['conv3', 'forward'][2:] == ['all-gather', 'tower', '2', '36,864', '18,432']
    assert sent['fc7', 'gradient'][2:4] == ['all-reduce', 'data']
    held = rows_behind(page, 'memory of a device on data 2 x tower 2, placement towers')
    # Parameters and velocity, 2 x 322,210 x 4 bytes: half of it, and all of it.
    assert held['state',][1:] == ['1.2', 'MiB', '2.5', 'MiB']
    assert set(held) == {('state',), ('arguments',), ('outputs',), ('temporaries',)}
    assert 'on data 2 x tower 1, placement towers' in page


def test_plain_data_parallelism_splits_no_layer():
    config = two_layers(2, 1)
    config.model.compute_dtype = 'bfloat16'
    page = on_mesh(config)
    assert len(rows_behind(page, 'memory of a device')['state',]) == 3
    phases = {key[1] for key in rows_behind(page, 'communication of a step') if len(key) > 1}
    assert phases == {'gradient'}


def test_a_mesh_is_described_without_its_devices():
    """A new process has one CPU device."""
    flags = ('--config.mesh.data=4', '--config.mesh.placement=one_weird_trick', '--mode=describe')
    net = ('--config=configs/smoke.py', "--config.model.layers=('conv1', 'fc8')")
    done = subprocess.run(
        [sys.executable, 'main.py', *net, *flags],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'communication of a step on data 4 x tower 1, placement one_weird_trick' in done.stdout


@pytest.mark.parametrize(
    ('data', 'tower', 'expected_text'),
    [
        (3, 1, 'a mesh of data 3 x tower 1 does not match'),
        (1, 3, 'mesh.tower is 3, but the net has 2 tower'),
    ],
)
def test_an_impossible_mesh(data, tower, expected_text):
    with pytest.raises(UsageError, match=expected_text) as caught:
        describe.run(on(data, tower))
    assert '\n' not in str(caught.value)
