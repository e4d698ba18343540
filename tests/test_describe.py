"""Test the page of `--mode=describe` against the 2012 paper and source."""

import contextlib
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.analysis import describe
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import geometry
from alexnet_jax.parallel import mesh
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


@pytest.fixture(scope='module')
def page_of_one_device(devices, tmp_path_factory) -> str:
    """Return the page of the smallest config, described in a folder without data."""
    folder = tmp_path_factory.mktemp('empty')
    with contextlib.chdir(folder):
        page = describe.run(on(1, 1))
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


def test_the_largest_batch_by_hand():
    peak = describe.Peak(images=512, bytes=10**9, per_image=10**6)
    assert peak.largest_batch(16 * 10**9) == 15_512
    assert peak.largest_batch(16 * 10**9 - 1) == 15_511
    assert peak.largest_batch(10**8) == 0


def test_memory_of_the_compiled_step_is_linear_in_the_batch():
    settings = configuration.unpack(on(1, 1))
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    peak = describe.compiled_peak(settings, layout)
    found = describe.compiled_bytes(settings, layout, 1024)
    line = peak.bytes + (1024 - peak.images) * peak.per_image
    assert line == pytest.approx(found, rel=0.02)  # see Peak; found: 0.7 %
    # At least parameters, velocity and stored images; at most every result twice and the images
    # three times in float32.
    parameters = 4 * describe.totals(geometry(settings.net))['parameters']
    stored = settings.preprocess.resize_px**2
    assert found > 2 * parameters + 1024 * stored
    results = sum(math.prod(x) for s in geometry(settings.net) for x in (s.output, *s.after))
    assert stored < peak.per_image < 4 * (2 * results + 3 * stored)


def test_the_largest_batch_for_each_memory_size(page_of_one_device):
    sizes = r'16 GB: ([\d,]+), 24 GB: ([\d,]+), 80 GB: ([\d,]+)'
    found = re.search(f'largest batch if .*: {sizes}', page_of_one_device)
    assert found
    few, more, most = (int(number.replace(',', '')) for number in found.groups())
    assert 1000 < few < more < most


# -------------------------------------------------------------------------------------- on a mesh


def rows_behind(page: str, title: str) -> dict[tuple[str, ...], list[str]]:
    """Return the rows of the table after a title, by layer and, if there is one, pass."""
    table = page.partition(title)[2].split('\n\n')[1].splitlines()[2:]
    rows = [line.split() for line in table]
    return {tuple(row[:2] if row[1].isalpha() else row[:1]): row for row in rows}


def test_one_device_communicates_nothing(page_of_one_device):
    assert page_of_one_device.endswith('one device: no communication')


def on_mesh(config) -> str:
    """Return the part of the page about a mesh, without `compiled_peak`."""
    if jax.device_count() < 8:
        pytest.skip('eight devices are wanted; tests/conftest.py makes them')
    return '\n\n'.join(describe._on_mesh(configuration.unpack(config)))


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
    assert 'bfloat16' not in page


def test_plain_data_parallelism_splits_no_layer():
    config = on(2, 1)
    config.model.compute_dtype = 'bfloat16'
    page = on_mesh(config)
    assert len(rows_behind(page, 'memory of a device')['state',]) == 3
    assert ('conv3', 'forward') not in rows_behind(page, 'communication of a step')
    assert 'CPUs send bfloat16 as float32' in page


def test_a_mesh_is_described_without_its_devices():
    """A new process has one CPU device. A net of four layers compiles faster than one of eight."""
    net = '--config=experiments/figure1_net.py:fashion_mnist,relu'
    flags = ('--config.mesh.data=4', '--config.mesh.placement=one_weird_trick', '--mode=describe')
    done = subprocess.run(
        [sys.executable, 'main.py', net, *flags],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'communication of a step on data 4 x tower 1, placement one_weird_trick' in done.stdout


@pytest.mark.parametrize(
    ('data', 'tower', 'expected_text'),
    [
        (1024, 1, 'choose at most 512 devices'),
        (3, 1, 'a mesh of data 3 x tower 1 does not match'),
        (1, 3, 'mesh.tower is 3, but the net has 2 tower'),
    ],
)
def test_an_impossible_mesh(data, tower, expected_text):
    with pytest.raises(UsageError, match=expected_text) as caught:
        describe.run(on(data, tower))
    assert '\n' not in str(caught.value)
