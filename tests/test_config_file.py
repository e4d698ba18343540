"""Config files, overrides and what a config takes from the data: every way of getting one wrong."""

import json

import pytest

from alexnet_jax import command, config_file
from alexnet_jax import config as configuration
from alexnet_jax.errors import UsageError
from configs import finetune, smoke
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / 'configs'


def load(where='smoke.py', **overrides):
    return config_file.load(f'{CONFIGS}/{where}', overrides)


# ------------------------------------------------------------------------------------------ paths


def test_home_is_expanded_and_spaces_are_cut(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert str(command.path(' ~/runs/a ')) == '/home/me/runs/a'
    assert [str(path) for path in command.paths('~/A, B')] == ['/home/me/A', 'B']
    assert command.expand('W:best') == 'W:best'


@pytest.mark.parametrize(
    'path', ['gs://bucket/x', 'file:///tmp/x', 'https://host/x.png', '', ' ', '~nobody-of-this/x']
)
def test_what_is_no_local_path_is_refused(path):
    with pytest.raises(UsageError, match='is not a local path'):
        command.path(path)


def test_every_argument_that_is_a_path_is_expanded():
    """`type=Path` takes '~' and gs://bucket for names of local folders."""
    for folder in ('alexnet_jax', 'examples'):
        for file in (REPOSITORY / folder).glob('*.py'):
            assert 'type=Path' not in file.read_text(), file


# ------------------------------------------------------------------------------------------ files


def test_a_config_of_a_run_is_a_config(tmp_path):
    """The file of one run starts another: also with overrides, of tuples too."""
    config = smoke.get_config()
    file = tmp_path / 'config.json'
    file.write_text(config_file.as_json(config))
    assert config_file.load(str(file), {}) == config_file.plain(config)
    overrides = {'model.conv1.ops': "('relu', 'pool')", 'epochs': '3', 'seed': '7'}
    found = config_file.load(str(file), overrides)
    config.model.conv1.ops, config.seed = ('relu', 'pool'), 7
    expected = config_file.plain(config) | {'epochs': 3.0}  # what derives from it stays as it was
    assert config_file.plain(found) == expected


@pytest.mark.parametrize(
    ('name', 'text', 'words'),
    [
        ('nothing.py', None, 'there is no config file'),
        ('a.py', 'import nonsense', "No module named 'nonsense'"),
        ('a.py', 'def get_config(): return 1 +', 'SyntaxError'),
        ('a.py', 'def get_config(): return undefined', "name 'undefined' is not defined"),
        ('a.py', 'def get_config(): raise ValueError("not so")', 'not so'),
        ('a.json', '{"mod', 'a.json'),
        ('a.json', '[1]', 'no JSON object'),
        ('a.json', '{"model": {}}', 'is missing from this config'),
        ('a.py', 'def get_config(): return None', 'gives no config'),
        ('a.py', 'x = 1', "'get_config' (KeyError); correct it, as configs/smoke.py shows"),
        ('a.json:quickstart', '{"model": {}}', 'there is no config file'),
    ],
)
def test_what_is_no_config_file(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name.partition(':')[0]).write_text(text)
    with pytest.raises(UsageError) as caught:
        config_file.load(str(tmp_path / name), {})
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


# -------------------------------------------------------------------------------------- overrides


def test_overrides_are_split_from_the_command_line():
    words = ['--mode=train', '--config.seed=3', '--config=x.py', '--config.epochs', '2']
    words.append('--config.model.conv1.ops=a=b')
    others, overrides = config_file.split(words)
    assert others == ['--mode=train', '--config=x.py']
    assert overrides == {'seed': '3', 'epochs': '2', 'model.conv1.ops': 'a=b'}


@pytest.mark.parametrize(
    ('key', 'text', 'value'),
    [
        ('seed', '7', 7),
        ('epochs', '7', 7.0),
        ('epochs', '1e-1', 0.1),
        ('loop.tensorboard', 'false', False),
        ('loop.tensorboard', 'True', True),
        ('data.train', 'train[:5]', 'train[:5]'),
        ('data.name', '', ''),
        ('model.conv1.ops', 'relu', ('relu',)),
        ('model.conv1.ops', "('relu', 'pool')", ('relu', 'pool')),
        ('model.conv1.ops', '()', ()),
        ('model.conv1.padding_px', '((1, 2), (3, 4))', ((1, 2), (3, 4))),
        ('optimizer.weights.at_epochs', '1.5', (1.5,)),
    ],
)
def test_the_value_of_a_text(key, text, value):
    section = load(**{key: text})
    for name in key.split('.'):
        section = section[name]
    assert section == value
    assert type(section) is type(value)


def test_a_group_is_replaced_by_a_dict():
    config = finetune.get_config('quickstart')
    config_file.override(config, 'optimizer.multipliers', "{'conv1': 0.0}")
    assert config.optimizer.multipliers.to_dict() == {'conv1': 0.0}


def test_what_depends_on_a_value_follows_it():
    assert load(epochs='4').preprocess.noise_until_epoch == pytest.approx(4 * 68 / 95)


@pytest.mark.parametrize(
    ('key', 'text', 'words'),
    [
        ('optimizer.multipliers.conv1', '0', 'no such key; configs/finetune.py has it.'),
        ('init_from', 'W', 'configs/finetune.py has it.'),
        ('bach_size', '3', 'did you mean batch_size?'),
        ('optimzer.late_freeze.layer', 'conv1', 'did you mean optimizer.late_freeze.layer'),
        ('model.conv9.features', '3', 'did you mean model.conv'),
        ('model.conv1.features.x', '3', 'did you mean model.conv1.features'),
        ('model.conv1.padding_px[0]', '3', 'did you mean model.conv1.padding_px'),
        ('zzz', '3', 'the groups of keys are data, loop, mesh'),
        ('', '3', 'no such key'),
        ('batch_size', 'many', 'must be of type int; now it is 64'),
        ('batch_size', '3.5', 'must be of type int'),
        ('batch_size', '', 'must be of type int'),
        ('epochs', 'None', 'must be of type float'),
        ('loop.tensorboard', 'maybe', 'must be of type bool'),
        ('model.conv1.ops', "('relu'", 'must be of type tuple'),
        ('model', '3', 'it is a group of keys'),
        ('model', '{', 'it is a group of keys'),
    ],
)
def test_what_is_wrong_with_an_override(key, text, words):
    with pytest.raises(UsageError) as caught:
        load(**{key: text})
    assert str(caught.value).startswith(f'--config.{key}')
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


# ------------------------------------------------------------------------------------------- JSON


def test_json_of_a_config_is_plain():
    config = smoke.get_config()
    assert config_file.plain(config) == json.loads(config_file.as_json(config))
    assert config_file.plain(config_file.plain(config)) == config_file.plain(config)


# ---------------------------------------------------------------------------------- old keys

OLD = {
    'loop': {'on_dead_start': 'warn'},
    'model': {'layers': ['conv1'], 'conv1': {'fan_in_2012': 363, 'then': ['relu']}},
    'optimizer': {
        'late': {'layer': 'none'},
        'multipliers': {'late': 1.0},
        'biases': {'drop': 10.0},
        'weights': {'drop': 10.0, 'kind': 'steps'},
    },
    'preprocess': {'share': 1},
    'share': 2,
}


def test_renamed_keys_are_translated_where_they_are_and_nowhere_else():
    assert config_file.translated(OLD) == {
        'loop': {'on_collapsed_init': 'warn'},
        'model': {'layers': ['conv1'], 'conv1': {'reference_fan_in': 363, 'ops': ['relu']}},
        'optimizer': {
            'late_freeze': {'layer': 'none'},
            'multipliers': {'late': 1.0},
            'biases': {'divisor': 10.0},
            'weights': {'divisor': 10.0, 'kind': 'steps'},
        },
        'preprocess': {'images_per_crop': 1},
        'share': 2,
    }
    assert config_file.translated(config_file.translated(OLD)) == config_file.translated(OLD)


@pytest.mark.parametrize('folder', ['quickstart/2-cpus-seed0', 'variants/quickstart/variant_d2l-0'])
def test_archived_runs_have_todays_keys_and_values(folder):
    """Their config.json were written with old keys; the recipe is still the one of today."""
    archived = config_file.read_json(
        config_file.ROOT / 'experiments/results' / folder / 'config.json'
    )
    config = config_file.load(f'configs/{archived["name"]}.py', {})
    changed = config_file.differences(archived, config_file.plain(config))
    assert {key.split('.')[0] for key in changed} <= {'data', 'loop', 'mesh', 'processes', 'seed'}
    assert configuration.unpack(archived).net == configuration.unpack(config).net


def test_a_runs_folder_leads_to_its_config(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UsageError, match=f'use --config={tmp_path}/config.json'):
        config_file.load(str(tmp_path), {})
