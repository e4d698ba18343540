"""Configs: shipped ones against their golden text, and every way of getting one wrong."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from alexnet_jax import config as configuration
from alexnet_jax.analysis import describe
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import Net, geometry
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import mesh
from alexnet_jax.training import splits
from alexnet_jax.training.step import init_state, make_optimizer, make_train_step
from configs import (
    ablation_depth,
    ablation_one_tower,
    ablation_overlap,
    alexnet,
    alexnet_conv6,
    alexnet_paper,
    smoke,
    variant_d2l,
    variant_keras,
    variant_lenet,
    variant_tf2,
)
from tests.golden import configs as golden

NAMES = [name for name, _ in golden.modules()]


def module_of(name: str):
    return importlib.import_module(f'configs.{name}')


def tree_of(config) -> dict:
    return json.loads(configuration.as_json(config))


def net_of(config) -> Net:
    return configuration.unpack(config).net


def parameters(net: Net) -> int:
    return sum(stage.parameters for stage in geometry(net))


# --------------------------------------------------------------------------------- every config


def test_golden_text_of_every_config():
    texts = dict(golden.resolved())
    there = {path.name: path.read_text() for path in golden.FOLDER.iterdir()}
    assert texts.keys() == there.keys(), 'run `make golden` and look at the difference'
    for name, text in texts.items():
        assert text == there[name], f'{name} has drifted: run `make golden` and look at the diff'


@pytest.mark.parametrize('name', NAMES)
def test_every_config_at_every_scale_unpacks_and_is_described(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    module = module_of(name)
    for scale in golden.scales(module):
        config = module.get_config(scale)
        settings = configuration.unpack(tree_of(config))
        assert settings == configuration.unpack(config)
        assert geometry(settings.net)[-1].output == (settings.net.classes,)
        page = describe.page(settings)
        assert f'{parameters(settings.net):,} parameters' in page
        assert page.startswith(f'{config.name}, scale {scale}: ')
    assert not list(tmp_path.iterdir())


def start(settings: Settings, images: int):
    """(step, state's maker, abstract batch, statistics) of a config on one device, without data."""
    layout = mesh.make_layout(MeshShape(data=1, tower=1), settings.batch_size)
    optimizer = make_optimizer(settings, images)
    batch = {
        'image': jax.ShapeDtypeStruct((settings.batch_size, 28, 28, 1), jnp.uint8),
        'label': jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32),
    }
    statistics = Statistics(jnp.full((28, 28, 1), 70.0), jnp.full((1, 1), 90.0))
    step = make_train_step(settings, layout, optimizer, images)
    return step, lambda: init_state(settings, optimizer), batch, statistics


@pytest.mark.parametrize('name', NAMES)
def test_every_config_has_a_training_step(name):
    """Forward, backward and update fit together: all of it evaluated but for the numbers."""
    config = module_of(name).get_config('quickstart')
    config.batch_size = 4
    config = splits.with_data(tree_of(config), 10)
    step, state, batch, statistics = start(configuration.unpack(config), images=1000)
    before = jax.eval_shape(state)
    after, metrics = jax.eval_shape(step, before, batch, statistics)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert metrics['loss'][0].shape == ()


@pytest.mark.parametrize(
    ('name', 'rate'),
    [('ablation_crosstalk', 0.005), ('ablation_overlap', 0.005), ('variant_lenet', 0.1)],
)
def test_the_odd_ones_learn(name, rate):
    """Real steps of the least usual nets, shrunk, on eight images; rates for so small a task."""
    config = module_of(name).get_config('quickstart')
    config.batch_size = 8
    if name != 'variant_lenet':
        config.model.input_px = config.preprocess.resize_px = config.preprocess.image_px = 80
        alexnet.narrow(config.model, 2)
        config.model.dropout.keep = 1.0
    config.optimizer.weights.rate = config.optimizer.biases.rate = rate
    step, state, _, statistics = start(configuration.unpack(config), images=1000)
    images = np.zeros((8, 28, 28, 1), np.uint8)
    for number in range(8):
        images[number, 3 * number : 3 * number + 6] = 255
    batch = {'image': jnp.asarray(images), 'label': jnp.arange(8)}
    quick = {'xla_backend_optimization_level': 0}  # to compile: the steps are few and small
    step, state = (jax.jit(function, compiler_options=quick) for function in (step, state))
    state, losses = state(), []
    for _ in range(30):
        state, metrics = step(state, batch, statistics)
        losses.append(float(metrics['loss'][0]) / 8)
    assert bool(state.all_finite)
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------- ablations, by their words

LAYERS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
ACTIVE = (
    *(f'model.{name}.ops' for name in LAYERS[:-1]),
    *(f'model.{name}.bias' for name in ('conv2', 'conv4', 'conv5', 'fc6', 'fc7')),
)
ONE_CHANGE = {
    'ablation_augmentation': ('preprocess.crop', 'preprocess.mirror'),
    'ablation_average_pool': ('model.pool.kind',),
    'ablation_colour': ('preprocess.colour_noise', 'preprocess.noise_divisor'),
    'ablation_crop_chunk': ('preprocess.images_per_crop',),
    'ablation_crosstalk': (
        *(f'model.{name}.reads' for name in ('conv3', 'fc6', 'fc7')),
        *(f'model.{name}.features' for name in ('conv2', 'fc6')),
        *(f'model.{name}.reference_fan_in' for name in ('conv3', 'fc6')),
    ),
    'ablation_depth': ('model.layers',),
    'ablation_dropout': ('model.fc6.ops', 'model.fc7.ops'),
    'ablation_init': tuple(f'model.{name}.init_std' for name in LAYERS[2:5]),
    'ablation_lrn': ('model.conv1.ops', 'model.conv2.ops'),
    'ablation_lrn_paper': ('model.lrn.alpha',),
    'ablation_norm_order': ('model.conv1.ops',),
    'ablation_one_tower': (
        'model.towers',
        'model.conv3.reference_fan_in',
        *(f'model.{name}.features' for name in LAYERS[:4]),
    ),
    'ablation_overlap': (
        *('model.pool.window_px', 'model.pool.rounding'),
        *('model.conv2.padding_px', 'model.conv5.padding_px'),
    ),
    'ablation_sigmoid': ACTIVE,
    'ablation_spatial_norm': ('model.conv2.ops',),
    'ablation_tanh': ACTIVE,
    'ablation_weight_decay': ('optimizer.weight_decay',),
    'alexnet_conv6': ('model.conv6', 'model.layers'),
}


@pytest.mark.parametrize('scale', alexnet.SCALES)
def test_an_ablation_is_the_base_and_one_change(scale):
    base = tree_of(alexnet.get_config(scale))
    found = {
        name: set(configuration.differences(base, tree_of(module_of(name).get_config(scale))))
        for name in configs.ABLATIONS
    }
    assert found == {name: {'name', *keys} for name, keys in ONE_CHANGE.items()}


# Runs of the 2012 program, top-1 and top-5 error, ten views (alexnet_2012.md, section 1).
RUNS_2012 = {'145': (40.66, 18.21), '147': (41.06, 18.51), '148': (42.03, 19.36)}
RUNS_2012['150'] = (41.83, 19.33)
RUNS_2010 = {'145': (37.47, 17.00), '145-half': (39.17, 18.23)}


def test_every_ablation_and_variant_is_listed_with_its_report():
    ablations = {name for name in NAMES if name.startswith('ablation_')}
    assert set(configs.ABLATIONS) == {*ablations, 'alexnet_conv6'}
    assert set(configs.VARIANTS) <= set(NAMES)
    rows = [module_of(name).CLAIM for name in configs.ABLATIONS]
    assert len({claim.row for claim in rows}) == len(rows)
    assert all(claim.source for claim in rows)
    assert all(claim.data != 'none' for claim in rows if claim.top1 is not None)
    reported = {name: module_of(name).REPORTED for name in configs.VARIANTS}
    assert {k: v for k, v in reported.items() if v} == {
        'variant_d2l': 0.885,
        'variant_gluon': 0.866,
    }


@pytest.mark.parametrize(
    ('name', 'runs', 'run'),
    [
        ('ablation_lrn', RUNS_2012, '148'),
        ('ablation_overlap', RUNS_2012, '147'),
        ('ablation_crosstalk', RUNS_2012, '150'),
        ('ablation_one_tower', RUNS_2010, '145-half'),
    ],
)
def test_claims_are_the_differences_of_the_runs(name, runs, run):
    """To the rounding of the paper, which prints tenths of a point."""
    claim = module_of(name).CLAIM
    top1, top5 = (without - base for without, base in zip(runs[run], runs['145'], strict=True))
    assert claim.top1 == pytest.approx(top1, abs=0.0501)
    assert claim.top5 == pytest.approx(top5, abs=0.0501)
    assert f'{runs[run][0]:.2f} / {runs[run][1]:.2f} %' in ' '.join(module_of(name).__doc__.split())
    assert claim.data == ('ILSVRC-2012 val' if runs is RUNS_2012 else 'ILSVRC-2010 test')
    assert run in claim.source


def test_a_command_stands_in_every_docstring():
    for name in NAMES:
        assert f'python main.py --config=configs/{name}.py' in module_of(name).__doc__


# ------------------------------------------------------------------------------ parameter counts

# At imagenet2012. The base has 60,965,224 (the paper); by hand: kernel x inputs x maps + maps.
COUNTS = {
    'ablation_one_tower': 59_798_312,  # alexnet_2012.md, section 2
    'ablation_crosstalk': (
        34_944
        + (5 * 5 * 48 + 1) * 320
        + (3 * 3 * 160 + 1) * 384
        + 663_936
        + 442_624
        + (6 * 6 * 128 + 1) * 8192
        + (4096 + 1) * 4096  # layers-150.cfg: fc2048ba and fc2048bb
        + (4096 + 1) * 1000
    ),
    'ablation_depth': 60_965_224 - 663_936,
    'alexnet_conv6': 60_965_224 + (3 * 3 * 256 + 1) * 256,  # run 146
    'variant_keras': 62_378_344,  # by hand: test_parameters_of_one_tower
    'variant_tf2': 62_378_344,
    'variant_pytorch': (
        (34_944 + 614_656 + 885_120 + 1_327_488 + 884_992)
        + (9216 + 1) * 2048
        + (2048 + 1) * 2048
        + (2048 + 1) * 1000
    ),
    'variant_d2l': 62_378_344 - (9216 - 6400) * 4096,
    'variant_gluon': 62_378_344 - (9216 - 6400) * 4096,
    'variant_torchvision': 61_100_840,  # alexnet_2012.md, section 7
}


@pytest.mark.parametrize('name', sorted({*COUNTS, *configs.ABLATIONS}))
def test_parameters_at_full_size(name):
    assert parameters(net_of(module_of(name).get_config('imagenet2012'))) == COUNTS.get(
        name, 60_965_224
    )


def test_parameters_of_one_tower():
    """2012's widths, every layer reading all: conv2, 4 and 5 have twice the weights of run 145."""
    convolutions = 34_944 + 2400 * 256 + 256 + 885_120 + 3456 * 384 + 384 + 3456 * 256 + 256
    assert convolutions + 37_752_832 + 16_781_312 + 4_097_000 == COUNTS['variant_keras']


def test_parameters_reported_by_the_tutorials():
    """d2l's of grey images in ten classes; Keras' of 100 classes, and with 277 px as printed."""
    assert parameters(net_of(variant_d2l.get_config('fashion_mnist'))) == 46_764_746
    config = variant_keras.get_config('imagenet2012')
    config.model.fc8.features = 100
    assert parameters(net_of(config)) == 58_691_044
    config.model.input_px = config.preprocess.image_px = 277
    assert geometry(net_of(config))[5].input == (7, 7, 256)
    lenet = (25 + 1) * 20 + (9 * 20 + 1) * 50 + (25 * 50 + 1) * 128 + (128 + 1) * 10
    assert parameters(net_of(variant_lenet.get_config())) == lenet == 170_988


@pytest.mark.parametrize(
    ('gone', 'count'),
    [
        ('conv3', 60_965_224 - 663_936),  # conv4 reads both towers: it has conv3's 885,120
        ('conv4', 60_965_224 - 663_936),
        ('conv5', 60_965_224 - 442_624 + 36 * 128 * 4096),  # fc6 reads 384 maps for 256
    ],
)
def test_any_middle_layer_can_go(gone, count):
    config = ablation_depth.get_config(f'imagenet2012,{gone}')
    assert config.name == f'ablation_depth_{gone}'
    assert config.scale == 'imagenet2012'
    stages = geometry(net_of(config))
    assert [stage.layer.name for stage in stages] == [name for name in LAYERS if name != gone]
    assert sum(stage.parameters for stage in stages) == count
    assert stages[4].input[:2] == (6, 6)


def test_unknown_layers_scales_and_activations_are_refused():
    with pytest.raises(ValueError, match="layer 'conv1' is not one of conv3, conv4, conv5"):
        ablation_depth.get_config('quickstart,conv1')
    with pytest.raises(ValueError, match="'conv3' is not one of quickstart"):
        ablation_depth.get_config('conv3')
    with pytest.raises(ValueError, match='LeNet sees 28 px'):
        variant_lenet.get_config('imagenet2012')
    with pytest.raises(ValueError, match="activation 'tanh' is not one of relu, sigmoid"):
        variant_lenet.get_config('quickstart,tanh')


def test_lenet_with_sigmoid_differs_in_the_function_alone():
    """The scale is optional, and the name is another one, so that the two have workdirs apart."""
    relu = tree_of(variant_lenet.get_config('fashion_mnist'))
    assert relu == tree_of(variant_lenet.get_config('fashion_mnist,relu'))
    sigmoid = variant_lenet.get_config('fashion_mnist,sigmoid')
    layers = ('conv1', 'conv2', 'fc3')
    changed = configuration.differences(relu, tree_of(sigmoid))
    assert list(changed) == sorted([*(f'model.{name}.ops' for name in layers), 'name'])
    assert [sigmoid.model[name].ops[0] for name in layers] == ['sigmoid'] * 3
    alone, both = map(variant_lenet.get_config, ('sigmoid', 'quickstart,sigmoid'))
    assert tree_of(alone) == tree_of(both)
    assert parameters(net_of(alone)) == 170_988


def test_fc7_of_run_150_is_not_widened():
    """layers-150.cfg: fc4096a/b read 4608 maps of their tower, fc2048ba/bb 4096 units."""
    stages = geometry(net_of(module_of('ablation_crosstalk').get_config('imagenet2012')))
    fc6, fc7, fc8 = stages[-3:]
    assert (fc6.groups, fc6.fan_in, fc6.output) == (2, 6 * 6 * 128, (8192,))
    assert (fc7.groups, fc7.fan_in, fc7.output) == (2, 4096, (4096,))
    assert (fc8.groups, fc8.fan_in) == (1, 4096)


@pytest.mark.parametrize('scale', alexnet.SCALES)
def test_conv6_of_run_146_follows_the_last_pooling_and_reads_both_towers(scale):
    stages = {s.layer.name: s for s in geometry(net_of(alexnet_conv6.get_config(scale)))}
    conv6 = stages['conv6']
    assert conv6.groups == 1
    assert conv6.input == conv6.output == conv6.result == stages['conv5'].result
    assert stages['fc6'].input == conv6.result
    assert (conv6.layer.bias, conv6.layer.ops) == (1.0, ('relu',))


@pytest.mark.parametrize(
    ('name', 'run'),
    [
        ('ablation_lrn', '148'),
        ('ablation_overlap', '147'),
        ('ablation_crosstalk', '150'),
        ('ablation_one_tower', '145-half'),
        ('alexnet_conv6', '146-2012-2011'),
    ],
)
def test_the_schedule_of_the_run_that_a_config_stands_for_is_cited(name, run):
    """The biases' rates of 2012 differ from run to run, so no two of them have one change alone."""
    text = ' '.join(module_of(name).__doc__.split())
    assert f'layer-params-{run}.cfg' in text
    assert "base's schedule" in text


def test_a_comparison_that_is_confounded_claims_no_figure():
    """Run 167's rates fall 1000-fold, run 170's 250-fold."""
    claim = module_of('ablation_spatial_norm').CLAIM
    assert (claim.top1, claim.top5) == (None, None)
    assert 'confounded' in claim.words


@pytest.mark.parametrize('scale', alexnet.SCALES)
def test_windows_of_run_147_keep_every_dimension_from_conv3_on(scale):
    """The paper: "output of equivalent dimensions" (3.4); conv1's maps alone are pooled to 28."""
    base = geometry(net_of(alexnet.get_config(scale)))
    stages = geometry(net_of(ablation_overlap.get_config(scale)))
    assert [stage.parameters for stage in stages] == [stage.parameters for stage in base]
    assert [stage.input for stage in stages[2:]] == [stage.input for stage in base[2:]]
    assert stages[1].input[0] == base[1].input[0] + 1


def test_layers_of_the_one_tower_net_read_what_a_tower_reads():
    stages = geometry(net_of(ablation_one_tower.get_config('imagenet2012')))
    assert [stage.layer.features for stage in stages] == [48, 128, 192, 192, 256, 4096, 4096, 1000]
    assert all(stage.groups == 1 for stage in stages)


@pytest.mark.parametrize('scale', ['quickstart', 'fashion_mnist'])
@pytest.mark.parametrize('name', [*configs.ABLATIONS, 'alexnet_paper', 'variant_tf2'])
def test_a_narrowed_net_begins_as_strongly_as_the_full_one(name, scale):
    """Fan-in times variance of each layer equals that at full size, in every ablation too."""
    module = module_of(name)
    narrow, full = (geometry(net_of(module.get_config(s))) for s in (scale, 'imagenet2012'))
    for stage, wide in zip(narrow, full, strict=True):
        strength = wide.fan_in * wide.layer.init_std**2
        assert stage.fan_in * stage.layer.init_std**2 == pytest.approx(strength)


@pytest.mark.parametrize('gone', ablation_depth.MIDDLE)
def test_a_narrowed_net_without_a_layer_begins_as_the_full_one(gone):
    narrow, full = (
        geometry(net_of(ablation_depth.get_config(f'{scale},{gone}')))
        for scale in ('quickstart', 'imagenet2012')
    )
    for stage, wide in zip(narrow, full, strict=True):
        strength = wide.fan_in * wide.layer.init_std**2
        assert stage.fan_in * stage.layer.init_std**2 == pytest.approx(strength)


def test_keras_uniform_weights_are_within_a_twentieth():
    """The convolutions alone: its dense layers have Keras' default, Glorot's uniform."""
    layers = net_of(variant_keras.get_config('imagenet2012')).layers
    for layer in layers[:5]:
        assert (layer.init, layer.init_std * math.sqrt(3)) == ('uniform', pytest.approx(0.05))
    assert [layer.init for layer in layers[5:]] == ['xavier'] * 3


def test_tf2_falls_to_its_floor_and_not_below():
    weights = configuration.unpack(variant_tf2.get_config('fashion_mnist')).optimizer.weights
    assert (weights.kind, weights.rate, weights.floor) == ('plateau', 0.01, 1e-5)


@pytest.mark.parametrize('name', ['variant_d2l', 'variant_gluon', 'variant_lenet'])
def test_tutorials_train_on_uncropped_images_by_plain_descent(name):
    """All have 60,000 images at full size, batches of 128, 0.01, pixels / 255, nothing else."""
    settings = configuration.unpack(module_of(name).get_config('fashion_mnist'))
    recipe, update = settings.preprocess, settings.optimizer
    assert (settings.batch_size, settings.data.train) == (128, 'train')
    assert settings.data.validation == 'test'  # the curve that is reported there
    assert settings.epochs == (5 if name == 'variant_lenet' else 10)
    assert module_of(name).get_config('quickstart').epochs == settings.epochs
    assert recipe.resize_px == recipe.image_px == settings.net.input_px
    assert (recipe.mean, recipe.scale, recipe.colour_noise) == ('none', 1 / 255, 0)
    assert (recipe.crop, recipe.mirror) == (False, False)
    assert (update.momentum, update.weight_decay) == (0, 0)
    assert update.weights == update.biases
    assert (update.weights.kind, update.weights.rate) == ('constant', 0.01)
    assert {layer.init for layer in settings.net.layers} == {'xavier'}


# ----------------------------------------------------------------------------------- the base


def test_unpacking_a_configdict_equals_unpacking_its_json():
    config = alexnet.get_config()
    assert configuration.unpack(config) == configuration.unpack(
        json.loads(configuration.as_json(config))
    )


def test_durations_follow_the_number_of_epochs():
    config = alexnet.get_config('imagenet2012')
    assert config.preprocess.noise_until_epoch == pytest.approx(68)
    assert config.optimizer.late_freeze.freeze_epoch == pytest.approx(74)
    config.epochs = 9.5
    assert config.preprocess.noise_until_epoch == pytest.approx(6.8)
    assert config.optimizer.late_freeze.freeze_epoch == pytest.approx(7.4)


def test_run_145_is_scheduled_by_hand():
    config = alexnet.get_config('imagenet2010')
    assert config.epochs == 93
    assert config.optimizer.weights.kind == 'steps'
    assert config.optimizer.weights.at_epochs == (23, 51, 78)


def test_as_written_differs_from_as_run_only_where_documented():
    run = json.loads(configuration.as_json(alexnet.get_config('imagenet2012')))
    written = json.loads(configuration.as_json(alexnet_paper.get_config('imagenet2012')))
    assert set(configuration.differences(run, written)) == {
        'epochs',
        'name',
        'model.conv1.ops',
        'model.conv2.ops',
        'model.conv3.init_std',
        'model.conv4.init_std',
        'model.conv5.init_std',
        'model.conv5.ops',
        'model.lrn.alpha',
        'optimizer.biases.factor',
        'optimizer.biases.floor',
        'optimizer.biases.kind',
        'optimizer.biases.rate',
        'optimizer.biases.switches',
        'optimizer.late_freeze.freeze_epoch',  # a fraction of the epochs, unused without a layer
        'optimizer.late_freeze.layer',
        'optimizer.late_freeze.slow_epoch',
        'optimizer.weights.factor',
        'optimizer.weights.floor',
        'optimizer.weights.kind',
        'optimizer.weights.switches',
        'preprocess.noise_divisor',
        'preprocess.noise_until_epoch',
    }


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
    'data.data_dir': ('gs://bucket/data', 'data.data_dir: gs://bucket/data is not a local path'),
    'data.data_dir[1]': ('', 'data.data_dir: an empty path is not a local path'),
    'init_from': ('s3://bucket/run:best', 'init_from: s3://bucket/run:best is not a local path'),
    'loop.compilation_cache': ('gs://b/c', 'loop.compilation_cache: gs://b/c is not a local path'),
    'seed': (-1, 'seed must be at least 0'),
    'epochs': (float('nan'), 'epochs must be at least 0 and below'),
    'learning_rate': (0.1, 'learning_rate is not a key'),
    'model.layers': ((), 'model.layers is empty'),
    'model.layers[2]': (('conv1', 'conv1'), 'twice'),
    'model.layers[9]': (('conv1', 'conv9'), "model.layers: 'conv9' is not one of conv1"),
    'model.init_scaling': ('None', "'None' is not one of none, fan_in"),
    'model.towers': (3, '3 towers do not divide'),
    'model.input_px': (3, 'conv1: a kernel of 11 px does not fit'),
    'model.conv1.features': (13, '2 towers do not divide'),
    'model.conv2.ops': (('relu', 'lnr'), "'lnr' is not one of relu"),
    'model.conv2.kernel_px': (50, 'a kernel of 50 px does not fit its input'),
    'model.conv3.ops': (('pool', 'relu'), 'conv5: a pooling window of 3 px does not fit'),
    'model.conv4.reads': ('both', "'both' is not one of own, all"),
    'model.conv4.padding_px': (((1, 1),), 'must have 2 values'),
    'model.fc6.ops': (('pool',), "'pool' needs feature maps"),
    'model.fc7.ops': (('dropout', 'dropout'), 'twice'),
    'model.conv1.stride_px': (0, 'must be at least 1'),
    'model.lrn.size': (4, 'must be odd'),
    'model.pool.kind': ('median', 'not one of max, average'),
    'model.pool.rounding': ('nearest', 'not one of down, up'),
    'model.dropout.keep': (1.5, 'must be in (0, 1]'),
    'model.compute_dtype': ('float16', 'not one of float32, bfloat16'),
    'preprocess.image_px': (32, 'set it to 64 or more'),
    'preprocess.resize_px': (80, 'set it to 80 or more'),
    'preprocess.mean': ('None', "'None' is not one of image, channel, none"),
    'optimizer.weights.kind': ('cosine', 'not one of constant, steps, dexp, plateau'),
    'optimizer.biases.kind': ('plateau', 'requires the same rule for the weights'),
    'optimizer.momentum': (1.0, 'must be in [0, 1)'),
    'preprocess.noise_divisor': (0.0, 'must be positive'),
    'optimizer.weight_decay': (-0.1, 'must be at least 0'),
    'model.conv1.reference_fan_in': (0, 'must be at least 1'),
    'mesh.cpu_devices': (-1, 'must be at least 0'),
    'optimizer.late_freeze.layer': ('conv7', "'conv7' is not one of none, conv1"),
    'mesh.tower': (3, 'choose a divisor of 2'),
    'mesh.data': (0, 'must be positive'),
    'mesh.data[1]': (-2, 'must be at least -1'),
    'optimizer.multipliers': ({'conv1': -1.0}, 'multipliers.conv1 must be at least 0'),
    'mesh.placement': ('two_weird_tricks', 'not one of towers, one_weird_trick'),
    'processes.peer_timeout_secs': (0.0, 'must be at least 1'),
    'processes.join_timeout_secs': (-5.0, 'must be at least 1'),
    'loop.on_collapsed_init': ('panic', 'not one of warn, error'),
}


@pytest.mark.parametrize('key', sorted(WRONG))
def test_what_is_wrong_is_refused_in_one_sentence(key):
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
    with pytest.raises(UsageError, match='fc7 reads only its own'):
        configuration.unpack(tree)
    tree['mesh'] = {'data': 1, 'tower': 2, 'placement': 'towers'}
    tree['model']['towers'] = 1
    with pytest.raises(UsageError, match='the net has 1 tower'):
        configuration.unpack(tree)


@pytest.mark.parametrize('values', [{'kind': 'average'}, {'window_px': 1, 'stride_px': 2}])
def test_only_maxima_without_gaps_hang_over_the_edge(values):
    tree = json.loads(configuration.as_json(smoke.get_config()))
    tree['model']['pool'].update(values, rounding='up')
    with pytest.raises(UsageError, match="set it to 'down'"):
        configuration.unpack(tree)


def test_configs_of_the_first_checkpoints_still_unpack():
    tree = json.loads(configuration.as_json(smoke.get_config()))
    del tree['processes'], tree['mesh']['placement'], tree['model']['lrn_reads']
    del tree['model']['pool']['rounding']
    settings = configuration.unpack(tree)
    assert settings.processes.peer_timeout_secs == 60
    assert settings.mesh.placement == 'towers'
    assert settings.net.lrn_reads == 'own'
    assert settings.net.pool.rounding == 'down'


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
