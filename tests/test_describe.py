"""The page of `--mode=describe` against shared knowledge of the 2012 net (its paper and source)."""

import math

import pytest

from alexnet_jax import config as configuration
from alexnet_jax import describe
from alexnet_jax.model import geometry
from configs import ablation_lrn, alexnet, smoke


def cells(page: str) -> dict[str, list[str]]:
    """The table's rows by layer."""
    lines = [line for line in page.splitlines() if line[:4] in ('conv', 'fc6 ', 'fc7 ', 'fc8 ')]
    return {line.split()[0]: [c.strip() for c in line.split('  ') if c.strip()] for line in lines}


def test_the_net_of_2012():
    page = describe.run(alexnet.get_config('imagenet2012'))
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
    config = alexnet.get_config('imagenet2012')
    config.model.towers = 1
    for name, features in zip(config.model.layers, (48, 128, 192, 192, 256), strict=False):
        config.model[name].features = features
    assert '59,798,312 parameters' in describe.run(config)


def test_every_scale_and_ablation_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    for scale in alexnet.SCALES:
        assert 'lrn' not in ''.join(
            row[-1] for row in cells(describe.run(ablation_lrn.get_config(scale))).values()
        )
    assert not list(tmp_path.iterdir())


def test_memory_by_hand():
    settings = configuration.unpack(alexnet.get_config('imagenet2012'))
    stages = geometry(settings.net)
    held = describe.memory_bytes(settings, stages)
    assert held['parameters'] == held['velocity'] == 4 * 60_965_224
    conv1 = 55 * 55 * 96 * 2 + 27 * 27 * 96 * 2  # linear, lrn; pool, relu
    assert math.prod(stages[0].output) + sum(map(math.prod, stages[0].after)) == conv1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_activations_follow_the_compute_dtype(dtype):
    config = smoke.get_config()
    base = configuration.unpack(config)
    config.model.compute_dtype = dtype
    settings = configuration.unpack(config)
    bytes_ = [describe.memory_bytes(s, geometry(s.net))['activations'] for s in (settings, base)]
    assert bytes_[0] * (1 if dtype == 'float32' else 2) == bytes_[1]
