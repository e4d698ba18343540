"""Small training runs: exact repetition, kills, signals, bad starts, infinite numbers.

The runs are the smoke config's, shrunk further or stretched; processes are real ones.
"""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.errors import AlexNetError, RunError, UsageError
from alexnet_jax.training import checkpoint, train
from alexnet_jax.training import metrics as run_metrics
from alexnet_jax.training.callbacks import Callback
from alexnet_jax.training.job import open_job, preflight, resume_or_start
from alexnet_jax.training.step import inputs
from alexnet_jax.training.workdir import open_workdir
from configs import ablation_lrn, alexnet_paper, smoke
from tests.processes import Program

# At the recipe's own rates a rounding error grows tenfold every few steps, on one device too
# (`python -m experiments.meshes` measures it), so that a few steps show the recipe and not the
# mesh. At a hundredth of them it hardly grows.
CALM = {'optimizer__weights__rate': 0.0002, 'optimizer__biases__rate': 0.0004}


# Each operation and each kind of layer once: most of a small run is tracing and compilation.
LAYERS = ('conv1', 'conv2', 'conv3', 'fc6', 'fc8')


def tiny(data_dir, **changes):
    """The smoke config with LAYERS, at eight steps and low rates.

    Dotted keys are changed ('a__b' for a.b). A changed rate or duration is another program to
    compile, of which tests share few.
    """
    config = smoke.get_config()
    config.data.data_dir = str(data_dir)
    config.data.train = 'train[:256]'
    config.data.validation = 'train[256:384]'
    config.data.test = 'test[:128]'
    config.loop.tensorboard = False
    config.loop.compilation_cache = 'none'  # conftest.py has set one for all tests
    config.loop.log_every_steps = 2
    config.mesh.data = 1
    changes = CALM | {'model__layers': LAYERS} | changes
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def outcome(workdir):
    """All that a run leaves and that must repeat: state, records without times, predictions."""
    restored = checkpoint.read(workdir / 'checkpoints')
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
    }
    timeless = [
        {key: value for key, value in record.items() if key not in run_metrics.TIMES}
        for record in run_metrics.read(workdir)
    ]
    with np.load(workdir / 'predictions_test.npz') as file:
        predictions = {name: file[name] for name in file.files}
    return restored.step, leaves, timeless, predictions


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[2] == b[2]
    for left, right in ((a[1], b[1]), (a[3], b[3])):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.fixture(scope='module')
def reference(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'reference'
    train.run(tiny(data_dir), workdir)
    return workdir


def test_one_seed_repeats_to_the_bit(reference, data_dir, tmp_path):
    train.run(tiny(data_dir), tmp_path / 'again')
    assert_same(outcome(reference), outcome(tmp_path / 'again'))


def test_a_run_of_an_earlier_version_resumes_to_the_same_bits(reference, data_dir, tmp_path):
    """Its checkpoint and its config.json have the keys of before they were renamed."""
    workdir = tmp_path / 'run'
    shutil.copytree(reference, workdir)
    *_, before, last = checkpoint.steps(workdir / 'checkpoints')
    _, state, extra = checkpoint.read(workdir / 'checkpoints', before)
    for new, old in (('num_lr_drops', 'drops'), ('all_finite', 'sound')):
        state['state'][old] = state['state'].pop(new)
    loop = extra['config']['loop']
    loop['on_dead_start'] = loop.pop('on_collapsed_init')
    (workdir / 'config.json').write_text(json.dumps(extra['config']))
    shutil.rmtree(workdir / 'checkpoints')
    with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
        checkpoints.save(before, state, extra, error=extra['history']['errors'][0])
    train.run(tiny(data_dir), workdir)
    assert checkpoint.steps(workdir / 'checkpoints') == [before, last]
    assert_same(outcome(reference), outcome(workdir))


def test_two_seeds_differ(reference, data_dir, tmp_path):
    train.run(tiny(data_dir, seed=1), tmp_path / 'other')
    first, second = outcome(reference), outcome(tmp_path / 'other')
    assert np.any(first[1]["['state']['params']['conv1']['kernel']"] !=
                  second[1]["['state']['params']['conv1']['kernel']"])  # fmt: skip
    assert first[2] != second[2]


TRICK = 'one_weird_trick'
MESHES = [(1, 2), (4, 2), (8, 1), (8, 1, TRICK)]


def on(mesh):
    """The overrides for a mesh of (data, tower) or (data, tower, placement)."""
    data, tower, placement = (*mesh, 'towers')[:3]
    return {'mesh__data': data, 'mesh__tower': tower, 'mesh__placement': placement}


def some_steps(data_dir, workdir, mesh):
    """The loss of each of eight steps, and the velocity after the first."""
    job = open_job(configuration.unpack(tiny(data_dir, **on(mesh))), workdir)
    state = job.start()
    curve, velocity = [], None
    for step in range(job.total_steps):
        state, metrics = job.train_step(state, job.batch(step), job.statistics)
        total, count = jax.device_get(metrics['loss'])  # waits: eight devices share few cores
        curve.append(float(total) / float(count))
        velocity = velocity or jax.device_get(jax.tree.leaves(state.opt_state))
    assert job.layout.mesh.size == mesh[0] * mesh[1]
    return np.array(curve), velocity


@pytest.fixture(scope='module')
def on_one_device(data_dir, tmp_path_factory):
    return some_steps(data_dir, tmp_path_factory.mktemp('curves'), (1, 1))


@pytest.mark.parametrize('mesh', MESHES)
def test_training_is_the_same_on_every_mesh(on_one_device, data_dir, tmp_path, mesh):
    """Crops, mirrors, colour noise, dropout, update: loss and gradients (all that the velocity of
    the first step is) to 1e-5, the curves to 1e-3. The rates fall and conv1 freezes meanwhile."""
    curve, velocity = some_steps(data_dir, tmp_path, mesh)
    expected, first_velocity = on_one_device
    np.testing.assert_allclose(curve[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(curve, expected, atol=1e-3)
    for ours, reference in zip(velocity, first_velocity, strict=True):
        assert np.max(np.abs(reference)) > 0
        assert np.max(np.abs(ours - reference)) <= 1e-5 * np.max(np.abs(reference))


@pytest.mark.parametrize('mesh', [(4, 2), (8, 1, TRICK)])
def test_a_run_resumes_on_another_mesh(reference, data_dir, tmp_path, mesh):
    """The state is restored to the bit, batches are the same, and the result is close."""
    workdir = tmp_path / 'moved'
    shutil.copytree(reference, workdir)
    steps = checkpoint.steps(workdir / 'checkpoints')
    shutil.rmtree(workdir / 'checkpoints' / str(steps[-1]))
    config = tiny(data_dir, **on(mesh))
    job = open_job(configuration.unpack(config), workdir)
    job, state, *_ = resume_or_start(job)
    before = outcome(workdir)[1]
    found = checkpoint.read(workdir / 'checkpoints').state
    jax.tree.map(np.testing.assert_array_equal, job.statistics._asdict(), found['statistics'])
    saved = found['state']
    assert int(state.step) == saved['step'] == steps[-2]
    for name, layer in saved['params'].items():
        for kind, leaf in layer.items():
            np.testing.assert_array_equal(np.asarray(state.params[name][kind]), leaf)
    kernel = state.params['fc6']['kernel']
    held = kernel.addressable_shards[0].data.shape[1]
    assert held * (mesh[1] if len(mesh) == 2 else mesh[0]) == kernel.shape[1]
    np.testing.assert_array_equal(
        np.asarray(job.batch(int(state.step))['label']), job.host_batch(int(state.step))['label']
    )
    train.run(config, workdir)
    first, second = outcome(reference), outcome(workdir)
    assert first[0] == second[0]
    for name, leaf in first[1].items():
        if 'params' in name:
            moved = np.max(np.abs(leaf - before[name]))
            assert np.max(np.abs(second[1][name] - leaf)) <= 1e-3 * moved


def test_the_records_of_a_run(reference):
    rows = run_metrics.read(reference)
    kinds = [row['kind'] for row in rows]
    assert kinds == ['train', 'train', 'validation', 'train', 'train', 'validation', 'test']
    assert rows[2]['epoch'] == 1.0
    assert rows[-1]['images'] == 128
    for row in rows:
        if row['kind'] == 'train':
            assert {'loss', 'top1_error', 'images_per_sec', 'stall_secs', 'secs'} <= row.keys()


def test_an_ablation_trains(data_dir, tmp_path):
    ablation, config = ablation_lrn.get_config(), tiny(data_dir)
    for name in config.model.layers:
        config.model[name].ops = ablation.model[name].ops
    job = open_job(configuration.unpack(config), tmp_path)
    state, metrics = job.train_step(job.start(), job.batch(0), job.statistics)
    assert state.all_finite
    assert np.isfinite(metrics['loss'][0])


def test_the_step_compiles_once(data_dir, tmp_path):
    config = tiny(data_dir)
    settings = configuration.unpack(config)
    job = open_job(settings, tmp_path)
    state = job.start()
    for step in range(3):
        state, _ = job.train_step(state, job.batch(step), job.statistics)
    assert job.train_step._cache_size() == 1


def test_all_seeds_share_one_program(data_dir, tmp_path):
    """So a sweep over seeds compiles once. The seeds are none the less at work."""
    texts, starts = [], []
    for seed in (0, 1):
        config = tiny(data_dir, seed=seed)
        job = open_job(configuration.unpack(config), tmp_path)
        state = job.start()
        texts.append(job.train_step.lower(state, job.batch(0), job.statistics).as_text())
        starts.append(np.asarray(state.params['conv1']['kernel']))
    assert texts[0] == texts[1]
    assert np.any(starts[0] != starts[1])


def test_a_rate_divided_on_the_plateau(data_dir, tmp_path):
    """A rate of zero never improves: the plateau rule divides as often as it may."""
    config = tiny(
        data_dir,
        epochs=1.0,
        loop__evaluate_every_epochs=0.25,
        optimizer__weights__kind='plateau',
        optimizer__weights__rate=0.0,
        optimizer__weights__patience_epochs=0.25,
        optimizer__weights__max_drops=2,
        optimizer__biases__kind='plateau',
        optimizer__biases__rate=0.0,
    )
    train.run(config, tmp_path / 'plateau')
    assert int(outcome(tmp_path / 'plateau')[1]["['state']['num_lr_drops']"]) == 2


# ------------------------------------------------------------------------------------- bad starts


def test_a_collapsed_initialisation_is_a_warning_or_an_error(data_dir, tmp_path, capsys):
    small = tiny(data_dir, model__init_scaling='none')
    paper = alexnet_paper.get_config()
    for name in small.model.layers:
        small.model[name].init_std = paper.model[name].init_std

    job = open_job(configuration.unpack(small), tmp_path)
    state = job.start()

    def change(**sections):
        changed = {
            name: dataclasses.replace(getattr(job.settings, name), **values)
            for name, values in sections.items()
        }
        return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **changed))

    preflight(job, state)
    err = capsys.readouterr().err
    assert (
        'warning: collapsed initialisation: the standard deviation of the logits across images is'
        in err
    )
    assert "set model.init_scaling='fan_in'" in err
    error = {'on_collapsed_init': 'error'}
    with pytest.raises(RunError, match='collapsed initialisation'):
        preflight(change(loop=error), state)
    with pytest.raises(RunError, match=r'must be in 0-255 units: set preprocess\.scale=1'):
        preflight(change(loop=error, preprocess={'scale': 1 / 255}), state)
    job = open_job(configuration.unpack(tiny(data_dir)), tmp_path)
    preflight(job, job.start())
    assert 'collapsed' not in capsys.readouterr().err


def test_infinite_numbers_stop_the_run_and_are_located(data_dir, tmp_path):
    """The loop finds them without a log, and names the first layer at fault."""
    job = open_job(configuration.unpack(tiny(data_dir)), tmp_path)
    state = job.start()
    params = dict(state.params)
    params['conv3'] = params['conv3'] | {'bias': params['conv3']['bias'].at[3].set(jnp.inf)}
    where = 'first in the activations of conv3_linear'
    with pytest.raises(RunError, match=f'step 1: .* is not finite, {where}') as caught:
        train.train(job, state.replace(params=params), run_metrics.History(), [])
    assert '\n' not in str(caught.value)


class Recorder(Callback):
    """Callback that records its events, and stops after a step."""

    def __init__(self, last):
        self.last, self.events = last, []

    def on_metrics(self, step, metrics, wait_secs):
        self.events.append(('metrics', step))

    def on_evaluation(self, step, scores):
        self.events.append(('evaluation', step))

    def should_stop(self, step):
        return step == self.last

    def on_save(self, step, state, error):
        self.events.append(('save', step, error is not None))


def test_a_callback_stops_the_loop_after_it_has_saved(data_dir, tmp_path):
    config = tiny(data_dir, loop__checkpoint_every_epochs=9.0)  # evaluation every 4 steps
    job = open_job(configuration.unpack(config), tmp_path)
    recorder, history = Recorder(last=5), run_metrics.History()
    state = train.train(job, job.start(), history, [recorder])
    assert int(state.step) == 5
    assert len(history.errors) == 1
    metrics = [('metrics', step) for step in range(1, 6)]
    assert recorder.events == [*metrics[:4], ('evaluation', 4), metrics[4], ('save', 5, False)]


def test_a_step_that_is_not_finite_changes_nothing(data_dir, tmp_path):
    config = tiny(data_dir)
    job = open_job(configuration.unpack(config), tmp_path)
    state = job.start()
    params = dict(state.params)
    params['fc8'] = params['fc8'] | {'bias': params['fc8']['bias'].at[0].set(jnp.nan)}
    broken = state.replace(params=params)
    before = jax.tree.map(np.asarray, broken)
    after, _ = job.train_step(jax.tree.map(jnp.array, broken), job.batch(0), job.statistics)
    assert not after.all_finite
    assert int(after.step) == 0
    for name in ('params', 'opt_state'):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_a_workdir_in_use(reference, data_dir):
    settings = configuration.unpack(tiny(data_dir))
    with open_workdir(settings, reference), pytest.raises(RunError, match='another'):
        train.run(tiny(data_dir), reference)


def test_more_classes_than_the_data(data_dir, tmp_path):
    with pytest.raises(UsageError, match=r'set model\.fc8\.features=10'):
        train.run(tiny(data_dir, model__fc8__features=11), tmp_path / 'w')


def test_a_batch_larger_than_the_data(data_dir, tmp_path):
    with pytest.raises(UsageError, match='lower batch_size'):
        train.run(tiny(data_dir, batch_size=512), tmp_path / 'w')


@pytest.mark.parametrize(
    'impossible',
    [
        {'mesh__data': 2, 'batch_size': 63},
        {'data__name': 'no_such_data'},
        {'model__fc8__features': 11},
        {'data__train': 'train[:10]'},
        {'loop__on_collapsed_init': 'error', 'loop__min_logit_std': 1e9},
        {'data__data_dir': '/dev/null/data'},
    ],
)
def test_a_start_that_failed_leaves_the_workdir_free(data_dir, tmp_path, impossible):
    with pytest.raises((AlexNetError, OSError)):
        train.run(tiny(data_dir, **impossible), tmp_path / 'w')
    other = tiny(data_dir, epochs=0.25, batch_size=32)
    with open_workdir(configuration.unpack(other), tmp_path / 'w'):
        written = json.loads((tmp_path / 'w' / 'config.json').read_text())
    assert written == json.loads(configuration.as_json(other))


def test_a_workdir_with_a_step_or_a_checkpoint_is_taken(reference, data_dir, tmp_path):
    other = tiny(data_dir, batch_size=32)
    for left_out in ('checkpoints', 'metrics.jsonl'):
        workdir = tmp_path / left_out
        shutil.copytree(reference, workdir, ignore=shutil.ignore_patterns(left_out))
        with pytest.raises(UsageError, match='a different config: batch_size; choose another'):
            train.run(other, workdir)


# ------------------------------------------------------------------------------ extensions

CONSTANT = {
    'optimizer__weights__kind': 'constant',
    'optimizer__biases__kind': 'constant',
    'optimizer__late_freeze__layer': 'none',
    'optimizer__late_freeze__slow_epoch': 9.0,
    'optimizer__late_freeze__freeze_epoch': 9.0,
    'preprocess__noise_until_epoch': 9.0,
}


def test_an_extension_with_constant_rates_is_a_run_as_long(data_dir, tmp_path):
    train.run(tiny(data_dir, epochs=2.0, **CONSTANT), tmp_path / 'long')
    train.run(tiny(data_dir, epochs=1.0, **CONSTANT), tmp_path / 'extended')
    train.run(tiny(data_dir, epochs=2.0, **CONSTANT), tmp_path / 'extended', extend=True)
    long, extended = outcome(tmp_path / 'long'), outcome(tmp_path / 'extended')
    added = [row for row in extended[2] if row not in long[2]]
    assert [(row['kind'], row['step']) for row in added] == [('test', 4), ('extension', 4)]
    assert added[1]['changed'] == {'epochs': [1.0, 2.0]}
    assert_same(long, (*extended[:2], [r for r in extended[2] if r not in added], extended[3]))
    tree = json.loads((tmp_path / 'extended' / 'config.json').read_text())
    assert tree['epochs'] == 2.0


def test_extensions_that_are_refused(reference, data_dir, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / 'w')
    before = {path.name: path.read_bytes() for path in workdir.glob('*.json*')}
    longer = tiny(data_dir, epochs=3.0)
    other_seed = tiny(data_dir, epochs=3.0, seed=1)
    short = r'8 steps, but an extension to 1 epochs ends after 4 steps;'
    for config, extend, sentence in (
        (longer, False, r'a different config: epochs, .*--extend allows other values of epochs,'),
        (other_seed, False, r'a different config: epochs, .*, seed;'),
        (other_seed, True, r'a different config: seed; .*--extend allows other values of epochs,'),
        (tiny(data_dir, epochs=1.0), True, short),
        (tiny(data_dir, epochs=3.0, data__train='train[:10]'), True, r'data\.train'),
    ):
        with pytest.raises(UsageError, match=sentence):
            train.run(config, workdir, extend=extend)
    with pytest.raises((AlexNetError, OSError)):  # it fails after the config was accepted
        train.run(tiny(data_dir, epochs=3.0, data__data_dir='/dev/null/data'), workdir, extend=True)
    now = {path.name: path.read_bytes() for path in workdir.glob('*.json*')}
    assert {k: v for k, v in now.items() if k != 'environment.json'} == {
        k: v for k, v in before.items() if k != 'environment.json'
    }
    with pytest.raises(UsageError, match=r'contains no checkpoint to extend; remove --extend'):
        train.run(longer, tmp_path / 'empty', extend=True)
    assert not (tmp_path / 'empty').exists()


def test_a_killed_extension_ends_in_the_same_bits(reference, data_dir, tmp_path, monkeypatch):
    """The rates are stretched over the epochs; twice extended, twice killed, it is the same run."""
    once, killed = (shutil.copytree(reference, tmp_path / name) for name in ('once', 'killed'))
    longer = tiny(data_dir, epochs=3.0, loop__checkpoint_every_epochs=0.5)
    train.run(longer, once, extend=True)

    class Kill(BaseException):
        pass

    save, saves = train.CheckpointSaver.on_save, [True, False, True]

    def save_or_die(self, step, state, error):
        if saves and saves.pop():
            raise Kill
        save(self, step, state, error)

    monkeypatch.setattr(train.CheckpointSaver, 'on_save', save_or_die)
    for extend in (True, False):  # the flag is needed once
        with pytest.raises(Kill):
            train.run(longer, killed, extend=extend)
    assert not saves
    train.run(longer, killed, extend=True)
    assert_same(outcome(once), outcome(killed))
    rows = [row for row in run_metrics.read(killed) if row['kind'] == 'extension']
    assert [row['step'] for row in rows] == [8]
    assert rows[0]['changed']['epochs'] == [2.0, 3.0]
    assert 'optimizer.late_freeze.freeze_epoch' in rows[0]['changed']


# ------------------------------------------------------------------------------ kills and signals


def test_a_full_disk_loses_nothing(reference, data_dir, small_disk):
    with pytest.raises(RunError, match='No space left on device'):
        train.run(tiny(data_dir), small_disk / 'run')
    subprocess.run(['mount', '-o', 'remount,size=64m', str(small_disk)], check=True)
    assert checkpoint.steps(small_disk / 'run/checkpoints') == [4]
    train.run(tiny(data_dir), small_disk / 'run')
    assert_same(outcome(reference), outcome(small_disk / 'run'))


def start(data_dir, workdir, checkpoint_every_epochs=0.125):
    """Start a run; by default with a checkpoint every other step, so that kills fall into saves."""
    words = (
        '--config=configs/smoke.py',
        f'--workdir={workdir}',
        f'--config.data.data_dir={data_dir}',
        '--config.mesh.data=1',
        f'--config.model.layers={LAYERS}',
        '--config.epochs=4',
        '--config.data.validation=train[55000:55064]',
        '--config.data.test=test[:100]',
        '--config.loop.compilation_cache=none',
        f'--config.loop.checkpoint_every_epochs={checkpoint_every_epochs}',
    )
    return Program(words, workdir.with_suffix('.log'))


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('kills') / 'undisturbed'
    program = start(data_dir, workdir)
    assert program.wait() == 0, program.err
    return workdir


def test_killed_and_stopped_again_and_again_it_ends_in_the_same_bits(undisturbed, data_dir):
    """SIGKILL at random moments (the seed is printed on failure), then both signals to stop."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    workdir = undisturbed.parent / 'killed'
    for step in (4, 20):
        program = start(data_dir, workdir)
        program.wait_for_step(step)
        time.sleep(rng.uniform(0, 0.3))
        program.kill()
    saved = 0
    for step, number in ((36, signal.SIGINT), (48, signal.SIGTERM)):
        program = start(data_dir, workdir, checkpoint_every_epochs=4.0)
        program.wait_for_step(step)
        program.send(number)
        assert program.wait() == 128 + number, (seed, program.err)
        assert program.out == ''
        found = re.fullmatch(
            rf'main\.py: {number.name}: saved at step (\d+) of 64; .*', program.last
        )
        assert found, (seed, program.err)
        assert f'--workdir={workdir}' in program.last
        assert f'resuming at step {saved}' in program.err or not saved, (seed, program.err)
        saved = int(found[1])
        assert saved >= step
    program = start(data_dir, workdir)
    assert program.wait() == 0, (seed, program.err)
    assert f'resuming at step {saved} of 64' in program.err, (seed, program.err)
    assert_same(outcome(undisturbed), outcome(workdir))


def test_config_json_is_the_config(undisturbed):
    tree = json.loads((undisturbed / 'config.json').read_text())
    assert tree['epochs'] == 4.0
    assert configuration.unpack(tree).name == 'smoke'


def test_draws_do_not_depend_on_the_batch_before(data_dir, tmp_path):
    """Step 5 alone sees what step 5 of a run sees: inputs are a function of (seed, step)."""
    config = tiny(data_dir)
    settings = configuration.unpack(config)
    job = open_job(settings, tmp_path)
    at_5, at_6 = (job.start().replace(step=jnp.int32(step)) for step in (5, 6))
    first = inputs(settings, 256, at_5, job.batch(5), job.statistics)
    trained, _ = job.train_step(job.start(), job.batch(0), job.statistics)
    after_another = trained.replace(step=at_5.step)
    second = inputs(settings, 256, after_another, job.batch(5), job.statistics)
    other = inputs(settings, 256, at_6, job.batch(6), job.statistics)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert np.any(np.asarray(first[0]) != np.asarray(other[0]))
