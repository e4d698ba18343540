"""A run that begins with another run's net: what is taken over, what begins afresh, what stays."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import config as configuration
from alexnet_jax.data import datasets
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.model.optimizer import LateFreeze, Schedule, parameter_rates
from alexnet_jax.training import checkpoint, splits, train
from alexnet_jax.training import finetune as finetuning
from alexnet_jax.training.job import open_job, resume_or_start
from alexnet_jax.training.metrics import History
from configs import alexnet, finetune, smoke


@pytest.fixture(scope='module')
def seven(data_dir, tmp_path_factory):
    """A data set of Fashion-MNIST's first seven classes, as somebody's own images."""
    raw = {}
    for split in ('train', 'test'):
        part = datasets.load('fashion_mnist', data_dir, f'{split}[:400]')
        chosen = part.labels < 7
        raw[split] = (part.images[chosen][..., 0], part.labels[chosen])
    folder = tmp_path_factory.mktemp('seven')
    fashion_mnist.write(raw, folder)
    (folder / 'fashion_mnist').rename(folder / 'seven')
    names = folder / 'seven/3.0.1/label.labels.txt'
    names.write_text('\n'.join(names.read_text().splitlines()[:7]) + '\n')
    return folder


def tuned(source, folder, **changes):
    """configs/finetune.py's recipe on the net of the smoke config."""
    recipe, config = finetune.get_config('quickstart'), smoke.get_config()
    for key in ('init_from', 'init_statistics', 'optimizer', 'data', 'name'):
        config[key] = recipe[key]
    config.model.fc8.features = 0
    config.init_from = str(source)
    config.epochs = 1.0
    config.data.name, config.data.data_dir = 'seven', str(folder)
    config.data.train, config.data.validation = 'train[:192]', 'train[192:]'
    config.data.test = 'test[:40]'
    config.loop.update(
        log_every_steps=1, checkpoint_every_epochs=0.5, eval_batch_size=16, tensorboard=False
    )
    config.loop.compilation_cache = 'none'
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def begin(config, workdir):
    """Open a run and start it, without a step."""
    job = open_job(splits.complete(configuration.unpack(config)), workdir)
    job, state, *_ = resume_or_start(job)
    return job, state


@pytest.fixture(scope='module')
def run(smoke_run, seven, tmp_path_factory):
    """A fine-tuned workdir: conv1 frozen, three steps; its source is gone."""
    folder = tmp_path_factory.mktemp('finetune')
    source = shutil.copytree(smoke_run, folder / 'source')
    config = tuned(source, seven, optimizer__multipliers__conv1=0.0)
    train.run(config, folder / 'run')
    shutil.rmtree(source)
    return folder / 'run', config


def test_the_net_is_taken_over_and_the_last_layer_is_as_wide_as_the_data(run, smoke_run):
    workdir, _ = run
    theirs = checkpoint.read(smoke_run / 'checkpoints').state
    ours = checkpoint.read(workdir / 'checkpoints')
    params, before = ours.state['state']['params'], theirs['state']['params']
    assert params['fc8']['kernel'].shape == (before['fc8']['kernel'].shape[0], 7)
    assert json.loads((workdir / 'config.json').read_text())['model']['fc8']['features'] == 7
    assert ours.extra['class_names'][6] == 'Shirt'
    assert evaluate.restore(workdir).stored == tuple(ours.extra['stored']) == (28, 28, 1)
    for kind in ('kernel', 'bias'):  # multiplier 0: no step, no decay
        np.testing.assert_array_equal(params['conv1'][kind], before['conv1'][kind])
        moved = np.abs(params['fc7'][kind] - before['fc7'][kind])
        assert 0 < moved.max() < 0.1  # three steps from where it was
    for name, array in theirs['statistics'].items():
        np.testing.assert_array_equal(ours.state['statistics'][name], array)
    with np.load(workdir / 'predictions_test.npz') as file:
        assert file['ten_views'].shape == (40, 7)


def test_a_run_resumes_without_its_source(run, tmp_path):
    """Its last checkpoint taken away, it resumes from the one before and ends in the same bits."""
    finished, config = run
    workdir = shutil.copytree(finished, tmp_path / 'run')
    final = checkpoint.read(finished / 'checkpoints').state
    steps = checkpoint.steps(workdir / 'checkpoints')
    assert steps == [2, 3]
    shutil.rmtree(workdir / 'checkpoints/3')
    train.run(config, workdir)
    restored = checkpoint.read(workdir / 'checkpoints', 3).state
    jax.tree.map(np.testing.assert_array_equal, restored, final)


def test_statistics_of_the_data_instead(smoke_run, seven, tmp_path):
    job, _ = begin(tuned(smoke_run, seven, init_statistics='data'), tmp_path)
    images = datasets.load('seven', seven, 'train[:192]').images
    np.testing.assert_allclose(job.statistics.mean_image, images.mean(axis=0), rtol=1e-5)


def test_the_same_classes_keep_the_last_layer(smoke_run, data_dir, capsys):
    config = tuned('there', data_dir, data__name='fashion_mnist', model__fc8__features=10)
    settings = configuration.unpack(config)
    restored = finetuning.read(f'{smoke_run}:8')
    theirs = restored.state['state']['params']
    fresh = jax.tree.map(np.zeros_like, theirs)
    classes = restored.extra['class_names']
    kept = finetuning.parameters(settings, restored, fresh, [['0'], classes])
    np.testing.assert_array_equal(kept['fc8']['kernel'], theirs['fc8']['kernel'])
    assert 'starting from step 8 of there: copied conv1, conv2,' in (err := capsys.readouterr().err)
    assert err.endswith('fc7, fc8; initialised from scratch: no layer\n')
    others = [classes[::-1], [str(i) for i in range(10)]]
    found = finetuning.parameters(settings, restored, fresh, others)
    assert found['fc8'] is fresh['fc8']
    assert found['fc7'] is theirs['fc7']
    assert 'fc7; initialised from scratch: fc8 (other classes)' in capsys.readouterr().err
    fresh['fc8'] = {'kernel': np.zeros((3, 5), np.float32), 'bias': np.zeros(5, np.float32)}
    found = finetuning.parameters(settings, restored, fresh, [classes])
    assert found['fc8'] is fresh['fc8']
    assert 'fc7; initialised from scratch: fc8 (512x10 there, 3x5 here)' in capsys.readouterr().err


def test_layers_are_carried_over_by_name_where_shapes_agree(smoke_run, seven, tmp_path, capsys):
    """conv2 is wider here and conv4 gone: what remains is theirs, and the seams are named."""
    changes = {'model__conv2__features': 48, 'optimizer__multipliers': {}, 'epochs': 0.1}
    config = tuned(smoke_run, seven, **changes)
    config.model.layers = tuple(x for x in config.model.layers if x != 'conv4')
    begin(config, tmp_path / 'w')
    err = capsys.readouterr().err
    assert (
        'conv1, conv5, fc6, fc7; initialised from scratch: conv2 (5x5x6x32 there, 5x5x6x48 ' in err
    )
    assert 'was trained with different values of model.conv5.follows\n' in err


def test_a_net_that_shares_no_layer_is_refused(smoke_run, seven, tmp_path):
    config = tuned(smoke_run, seven)
    for name in config.model.layers[:-1]:
        config.model[name].features //= 2
    with pytest.raises(UsageError, match=r'lacks layers of this net: conv1 \(') as error:
        train.run(config, tmp_path / 'w')
    assert 'conv1 (11x11x1x12 there, 11x11x1x6 here), conv2 (' in str(error.value)
    assert str(error.value).endswith('choose a config that matches that net, or other init_layers.')


def test_layers_to_carry_over_are_named(smoke_run, seven, tmp_path, capsys):
    config = tuned(smoke_run, seven, init_layers=('conv2', 'conv1'))
    begin(config, tmp_path / 'w')
    assert 'conv1, conv2; initialised from scratch: conv3, conv4, conv5,' in capsys.readouterr().err
    config.init_layers = ('conv1', 'fc8')
    with pytest.raises(UsageError, match=r'lacks .*: fc8 \(512x10 there, 512x7 here\);'):
        begin(config, tmp_path / 'v')
    config.init_layers = ('conv9',)
    with pytest.raises(UsageError, match=r"init_layers: 'conv9' is not one of conv1"):
        configuration.unpack(config)


def test_the_same_weights_in_another_net_differ(smoke_run, seven):
    config = tuned(smoke_run, seven)
    theirs = finetuning.read(str(smoke_run)).extra['config']
    tree = configuration.plain(config)
    layers = tree['model']['layers']
    # What differs is about beginnings and training.
    assert finetuning.differences(theirs, tree, layers[:-1]) == []
    tree['model']['conv1']['ops'] = ['relu', 'lrn', 'pool']
    tree['preprocess']['scale'] = 0.5
    changed = ['model.conv1.ops', 'preprocess.scale']
    assert finetuning.differences(theirs, tree, layers[:-1]) == changed
    assert finetuning.differences(theirs, tree, ['fc7']) == changed[1:]


@pytest.mark.parametrize(
    ('init_from', 'error', 'message'),
    [
        ('', UsageError, r'set --config\.init_from=WORKDIR'),
        ('/nowhere', RunError, 'no checkpoint in /nowhere/checkpoints'),
        ('{smoke}:7', UsageError, '7'),
    ],
)
def test_missing_sources(smoke_run, seven, tmp_path, init_from, error, message):
    config = tuned(init_from.format(smoke=smoke_run), seven)
    with pytest.raises(error, match=message):
        train.run(config, tmp_path / 'w')


def test_images_of_other_channels_need_statistics_of_their_own(smoke_run, seven, tmp_path):
    saved = checkpoint.read(smoke_run / 'checkpoints')
    saved.state['statistics'] = {
        'mean_image': np.zeros((8, 8, 3), np.float32),
        'colour_basis': np.eye(3),
    }
    with checkpoint.Checkpoints(tmp_path / 'coloured' / 'checkpoints') as checkpoints:
        checkpoints.save(saved.step, saved.state, saved.extra, error=None)
    with pytest.raises(UsageError, match=r'3 channel\(s\), but seven has 1; set init_statistics'):
        train.run(tuned(tmp_path / 'coloured', seven), tmp_path / 'w')


def test_rates_a_layer():
    rate = Schedule(**alexnet.schedule('steps', 0.01, at_epochs=(1.0,)))
    bias = Schedule(**alexnet.schedule('constant', 0.02))
    late = LateFreeze(layer='conv1', slow_epoch=1.0, slow_multiplier=0.5, freeze_epoch=9.0)
    multipliers = (('conv1', 3.0), ('conv2', 0.0), ('fc8', 10.0))
    rates = parameter_rates(rate, bias, late, multipliers, total_steps=20, steps_per_epoch=10)

    def at(layer, kind, step):
        return float(rates((layer, kind))(jnp.int32(step), 0))

    assert [at('fc7', 'kernel', s) for s in (0, 10)] == pytest.approx([0.01, 0.001])
    assert [at('fc8', 'kernel', s) for s in (0, 10)] == pytest.approx([0.1, 0.01])
    assert at('fc8', 'bias', 0) == pytest.approx(0.2)
    assert at('conv2', 'kernel', 0) == at('conv2', 'bias', 10) == 0
    assert [at('conv1', 'kernel', s) for s in (0, 10)] == pytest.approx([0.03, 0.0015])


def test_multipliers_are_checked():
    config = finetune.get_config()
    settings = configuration.unpack(config)
    assert dict(settings.optimizer.multipliers)['fc8'] == 10
    assert settings.net.classes == 0
    config.optimizer.multipliers = {'fc9': 1.0}
    with pytest.raises(UsageError, match=r"optimizer\.multipliers: 'fc9' is not one of"):
        configuration.unpack(config)
    config = finetune.get_config()
    config.model.fc7.features = 0
    with pytest.raises(UsageError, match=r'model\.fc7\.features must be at least 1'):
        configuration.unpack(config)


@pytest.mark.parametrize('base', ['imagenet2012,variant_torchvision', 'imagenet2010', 'quickstart'])
def test_the_recipe_is_for_any_of_our_nets(base):
    settings = configuration.unpack(finetune.get_config(base))
    assert settings.optimizer.weights.rate < 0.005
    assert settings.net.classes == 0


def test_a_config_from_before_fine_tuning_still_loads(smoke_run):
    tree = json.loads((smoke_run / 'config.json').read_text())
    assert not {'init_from', 'init_statistics', 'init_layers'} & set(tree)
    settings = configuration.unpack(tree)
    assert (settings.init_from, settings.init_layers) == ('none', ())
    assert settings.optimizer.multipliers == ()
    assert settings.data.workers == -1


# ----------------------------------------------------------- 2012's chain: 145, 146, 146 once more


@pytest.fixture(scope='module')
def pictures(data_dir, tmp_path_factory):
    """Two sets from folders of pictures: 'small' of three classes, 'big' of five others."""
    part = datasets.load('fashion_mnist', data_dir, 'train[:400]')
    folder = tmp_path_factory.mktemp('pictures')
    for name, classes in (('small', (7, 8, 9)), ('big', (0, 1, 2, 3, 4))):
        for label in classes:
            home = folder / 'source' / name / part.class_names[label].replace('/', ' ')
            home.mkdir(parents=True)
            for number, image in enumerate(part.images[part.labels == label][:24]):
                Image.fromarray(image[..., 0]).save(home / f'{number}.png')
        source, out = str(folder / 'source' / name), str(folder)
        words = ['folder', '--source', source, '--data_dir', out, '--px=28', '--workers=1']
        assert prepare.main([*words, '--storage=raw']) == 0
    return folder


def link(name, folder, source='', **changes):
    """One link of the chain, by the commands of configs/alexnet_conv6.py, shrunk."""
    module, scale = (finetune, 'quickstart,alexnet_conv6') if source else (alexnet, 'quickstart')
    config = module.get_config(scale)
    gone = ('conv3', 'conv4')  # a net of fewer layers compiles faster
    config.model.layers = tuple(x for x in config.model.layers if x not in gone)
    for layer in gone if source else ():
        del config.optimizer.multipliers[layer]
    config.model.fc8.features = 0
    config.data.update(name=name, data_dir=str(folder), train='train', validation='validation')
    config.model.channels, config.batch_size, config.epochs = 3, 16, 1.0
    config.model.input_px = config.preprocess.resize_px = 64
    config.preprocess.image_px = 68
    alexnet.narrow(config.model, 2)
    config.loop.update(eval_batch_size=16, tensorboard=False, compilation_cache='none')
    if source:
        config.init_from = str(source)
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def test_the_chain_of_1_cnn_star(pictures, tmp_path, capsys):
    """145 -> 146 on a larger set of labels -> the set that is wanted (paper 6.1; runs 145, 146)."""
    convolutions = ('conv1', 'conv2', 'conv5')
    job, state = begin(link('small', pictures), tmp_path / '145')
    with checkpoint.Checkpoints(tmp_path / '145/checkpoints') as checkpoints:
        train.CheckpointSaver(job, History(), checkpoints).on_save(0, state, None)
    assert 'initialised from scratch' not in capsys.readouterr().err
    first = {'seed': 1, 'init_layers': convolutions, 'optimizer__multipliers__conv1': 0.0}
    train.run(link('big', pictures, tmp_path / '145', **first), tmp_path / '146-big')
    err = capsys.readouterr().err
    assert 'conv2, conv5; initialised from scratch: conv6 (missing there), fc6' in err
    assert 'warning: ' + str(tmp_path) not in err
    second = {'optimizer__multipliers__conv1': 0.0, 'optimizer__multipliers__conv6': 0.0}
    train.run(link('small', pictures, tmp_path / '146-big', **second), tmp_path / '146')
    err = capsys.readouterr().err
    assert 'conv5, conv6, fc6, fc7; initialised from scratch: fc8 (512x5 there, 512x3 here)' in err
    base, big, last = (
        checkpoint.read(tmp_path / name / 'checkpoints').state['state']['params']
        for name in ('145', '146-big', '146')
    )
    for kind in ('kernel', 'bias'):
        np.testing.assert_array_equal(last['conv1'][kind], base['conv1'][kind])  # frozen, twice
        np.testing.assert_array_equal(last['conv6'][kind], big['conv6'][kind])
    assert [tree['fc8']['bias'].shape for tree in (base, big, last)] == [(3,), (5,), (3,)]
    assert np.abs(last['fc7']['kernel'] - big['fc7']['kernel']).max() < 0.1
    assert np.abs(big['fc7']['kernel'] - base['fc7']['kernel']).max() > 0.02  # drawn anew
