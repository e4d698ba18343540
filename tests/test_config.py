"""Configs: shipped ones against their golden text, and every way of getting one wrong."""

import json

import pytest

from alexnet_jax import config as configuration
from alexnet_jax.errors import UsageError
from alexnet_jax.model import geometry
from configs import ablation_lrn, alexnet, alexnet_paper, smoke
from tests.golden import configs as golden


def test_golden_text_of_every_config():
    texts = dict(golden.resolved())
    there = {path.name: path.read_text() for path in golden.FOLDER.glob('*.json')}
    assert texts.keys() == there.keys(), 'run `make golden` and look at the difference'
    for name, text in texts.items():
        assert text == there[name], f'{name} has drifted: run `make golden` and look at the diff'


@pytest.mark.parametrize('name', sorted(path.name for path in golden.FOLDER.glob('*.json')))
def test_every_config_unpacks_also_from_its_json(name):
    text = (golden.FOLDER / name).read_text()
    settings = configuration.unpack(json.loads(text))
    assert geometry(settings.net)[-1].output == (settings.net.classes,)


def test_unpacking_a_configdict_equals_unpacking_its_json():
    config = alexnet.get_config()
    assert configuration.unpack(config) == configuration.unpack(
        json.loads(configuration.as_json(config))
    )


def test_durations_follow_the_number_of_epochs():
    config = alexnet.get_config('imagenet2012')
    assert config.preprocess.noise_until_epoch == pytest.approx(68)
    assert config.optimizer.late.freeze_epoch == pytest.approx(74)
    config.epochs = 9.5
    assert config.preprocess.noise_until_epoch == pytest.approx(6.8)
    assert config.optimizer.late.freeze_epoch == pytest.approx(7.4)


def test_run_145_is_scheduled_by_hand():
    config = alexnet.get_config('imagenet2010')
    assert config.epochs == 93
    assert config.optimizer.weights.kind == 'steps'
    assert config.optimizer.weights.at_epochs == (23, 51, 78)


def test_as_written_differs_from_as_run_only_where_it_is_said():
    run = json.loads(configuration.as_json(alexnet.get_config('imagenet2012')))
    written = json.loads(configuration.as_json(alexnet_paper.get_config('imagenet2012')))
    assert set(configuration.differences(run, written)) == {
        'epochs',
        'name',
        'model.conv1.then',
        'model.conv2.then',
        'model.conv3.init_std',
        'model.conv4.init_std',
        'model.conv5.init_std',
        'model.conv5.then',
        'model.lrn.alpha',
        'optimizer.biases.factor',
        'optimizer.biases.floor',
        'optimizer.biases.kind',
        'optimizer.biases.rate',
        'optimizer.biases.switches',
        'optimizer.late.freeze_epoch',  # a fraction of the epochs, and without a layer unused
        'optimizer.late.layer',
        'optimizer.late.slow_epoch',
        'optimizer.weights.factor',
        'optimizer.weights.floor',
        'optimizer.weights.kind',
        'optimizer.weights.switches',
        'preprocess.noise_divisor',
        'preprocess.noise_until_epoch',
    }


def test_ablation_is_the_base_and_one_change():
    base = json.loads(configuration.as_json(alexnet.get_config()))
    without = json.loads(configuration.as_json(ablation_lrn.get_config()))
    assert configuration.differences(base, without) == [
        'model.conv1.then',
        'model.conv2.then',
        'name',
    ]


def test_a_narrowed_net_keeps_the_strength_of_its_init():
    config = alexnet.get_config('quickstart')
    full = alexnet.get_config('imagenet2012')
    net, reference = configuration.unpack(config).net, configuration.unpack(full).net
    for narrow, wide in zip(geometry(net), geometry(reference), strict=True):
        assert narrow.fan_in * narrow.layer.init_std**2 == pytest.approx(
            wide.fan_in * wide.layer.init_std**2
        )
    config.model.init_scaling = 'none'
    assert configuration.unpack(config).net.layers[0].init_std == 0.01


WRONG = {
    'batch_size': ('64', 'batch_size must be of type int'),
    'seed': (-1, 'seed must be at least 0'),
    'epochs': (float('nan'), 'epochs must be finite'),
    'learning_rate': (0.1, 'learning_rate is not a key'),
    'model.layers': ((), 'model.layers is empty'),
    'model.layers[2]': (('conv1', 'conv1'), 'twice'),
    'model.layers[9]': (('conv1', 'conv9'), 'there is no model.conv9'),
    'model.init_scaling': ('None', "'None' is not one of none, fan_in"),
    'model.towers': (3, '3 towers do not divide'),
    'model.input_px': (3, 'conv1: a kernel of 11 px does not fit'),
    'model.conv1.features': (13, '2 towers do not divide'),
    'model.conv2.then': (('relu', 'lnr'), "'lnr' is not one of relu"),
    'model.conv2.kernel_px': (50, 'a kernel of 50 px does not fit its input'),
    'model.conv3.then': (('pool', 'relu'), 'conv5: a pooling window of 3 px does not fit'),
    'model.conv4.reads': ('both', "'both' is not one of own, all"),
    'model.conv4.padding_px': (((1, 1),), 'must hold 2 values'),
    'model.fc6.then': (('pool',), "'pool' needs maps"),
    'model.fc7.then': (('dropout', 'dropout'), 'twice'),
    'model.fc7.init': ('None', "'None'; to say that there is none, write 'none'"),
    'model.conv1.stride_px': (0, 'must be at least 1'),
    'model.lrn.size': (4, 'must be odd'),
    'model.pool.kind': ('median', 'not one of max, average'),
    'model.dropout.keep': (0.0, 'must lie in (0, 1]'),
    'model.compute_dtype': ('float16', 'not one of float32, bfloat16'),
    'preprocess.image_px': (32, 'smaller than the crop'),
    'preprocess.resize_px': (80, 'smaller than preprocess.resize_px'),
    'preprocess.mean': ('None', "write 'none'"),
    'optimizer.weights.kind': ('cosine', 'not one of constant, steps, dexp, plateau'),
    'optimizer.weights.at_epochs': ((3.0, 2.0), 'must ascend'),
    'optimizer.late.layer': ('conv7', "'conv7' is not one of none, conv1"),
    'mesh.tower': (3, 'choose a divisor of 2'),
    'mesh.data': (0, 'must be positive'),
    'mesh.placement': ('two_weird_tricks', 'not one of towers, one_weird_trick'),
    'processes.peer_timeout_secs': (0.0, 'must be at least 1'),
    'processes.join_timeout_secs': (-5.0, 'must be at least 1'),
    'loop.on_dead_start': ('panic', 'not one of warn, error'),
}


@pytest.mark.parametrize('key', sorted(WRONG))
def test_what_is_wrong_is_said_in_one_sentence(key):
    value, words = WRONG[key]
    tree = json.loads(configuration.as_json(smoke.get_config()))
    *path, last = key.partition('[')[0].split('.')
    section = tree
    for name in path:
        section = section[name]
    section[last] = value
    with pytest.raises(UsageError) as caught:
        configuration.unpack(tree)
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)
    assert caught.value.exit_code == 2


def test_towers_that_a_net_or_a_placement_does_not_have():
    tree = json.loads(configuration.as_json(smoke.get_config()))
    tree['mesh'] = {'data': -1, 'tower': 2, 'placement': 'one_weird_trick'}
    with pytest.raises(UsageError, match=r'has no tower axis; set mesh\.tower=1'):
        configuration.unpack(tree)
    tree['mesh']['tower'], tree['model']['fc7']['reads'] = 1, 'own'
    with pytest.raises(UsageError, match='fc7 reads its own only'):
        configuration.unpack(tree)
    tree['mesh'] = {'data': 1, 'tower': 2, 'placement': 'towers'}
    tree['model']['towers'] = 1
    with pytest.raises(UsageError, match='the net has 1 tower'):
        configuration.unpack(tree)


def test_configs_of_the_first_checkpoints_still_unpack():
    tree = json.loads(configuration.as_json(smoke.get_config()))
    del tree['processes'], tree['mesh']['placement'], tree['model']['lrn_reads']
    settings = configuration.unpack(tree)
    assert settings.processes.peer_timeout_secs == 60
    assert settings.mesh.placement == 'towers'
    assert settings.net.lrn_reads == 'own'


@pytest.mark.parametrize('key', ['model', 'optimizer.weights', 'model.conv3.bias', 'epochs'])
def test_what_is_missing_is_named(key):
    tree = json.loads(configuration.as_json(smoke.get_config()))
    *path, last = key.split('.')
    section = tree
    for name in path:
        section = section[name]
    del section[last]
    with pytest.raises(UsageError, match=last):
        configuration.unpack(tree)


def test_unknown_scale():
    with pytest.raises(ValueError, match='not one of quickstart'):
        alexnet.get_config('huge')
