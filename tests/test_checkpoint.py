"""Checkpoints: bit-exact round trips, and whatever damages them is found before it is used."""

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.inference import evaluate
from alexnet_jax.parallel import mesh as meshes
from alexnet_jax.training import checkpoint as checkpointing
from alexnet_jax.training.checkpoint import (
    Checkpoints,
    best_step,
    fit_to,
    read,
    read_newest_intact,
    steps,
)


def state_of(step, size=3000):
    """A state that only this step has, in numpy."""
    rng = np.random.default_rng(step)
    return {
        'params': {'conv1': {'kernel': rng.random((size, 2), np.float32), 'bias': rng.random(7)}},
        'step': np.int32(step),
    }


def assert_same(got, want):
    """The same structure, dtypes, shapes and bits (a NaN equals itself, -0.0 is not 0.0)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def resumed(directory):
    restored = read_newest_intact(directory)
    assert restored is not None
    return restored


def read_as(like, directory, step='latest'):
    """A checkpoint, its state in the structure that was saved."""
    found = read(directory, step)
    return found._replace(state=fit_to(like, found.state, directory))


@pytest.fixture
def reports(monkeypatch):
    """The sentences about damaged checkpoints."""
    found = []
    monkeypatch.setattr(checkpointing, 'log', found.append)
    return found


def save_steps(directory, numbers=(1, 2), error=None):
    """Save these steps; the first has the lowest validation error, if any."""
    with Checkpoints(directory) as checkpoints:
        for step in numbers:
            checkpoints.save(step, state_of(step), {'step': step}, error=error and step * error)


# ------------------------------------------------------------------ round trips


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = {
        'float': jnp.array([[0.1, -0.0], [jnp.inf, jnp.nan]]),
        'bfloat16': jnp.linspace(-3, 3, 11, dtype=jnp.bfloat16).reshape(11, 1),
        'ints': (jnp.arange(-4, 4, dtype=jnp.int8), np.arange(3, dtype=np.int64) << 40),
        'bool': jnp.array([True, False, True]),
        'key': jax.random.key_data(jax.random.key(7)),
        'zero_dim': [jnp.float32(2.5), np.float64(0.1), np.uint8(255)],
        'none': None,
        'no_leaf': (),
        'strided': np.arange(12.0).reshape(3, 4).T[::2],
    }
    with Checkpoints(tmp_path / 'new' / 'folder') as checkpoints:
        checkpoints.save(3, state, {'history': [0.5, None], 'name': 'ä'}, error=0.5)
    step, restored, extra = read_as(state, tmp_path / 'new' / 'folder')
    assert_same(restored, state)
    assert (step, extra) == (3, {'history': [0.5, None], 'name': 'ä'})


def test_a_state_comes_back_as_nested_dicts_of_numpy_arrays(tmp_path):
    state = {'params': {'a': jnp.ones(3, jnp.bfloat16)}, 'optimizer': ({'mu': jnp.zeros(2)}, ())}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {'x': 1}, error=None)
    step, restored, extra = read(tmp_path)
    assert (step, extra) == (5, {'x': 1})
    as_named = {'params': {'a': state['params']['a']}, 'optimizer': {'0': {'mu': np.zeros(2, 'f')}}}
    assert_same(restored, as_named)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))


def test_the_source_may_be_donated_or_overwritten_as_soon_as_save_returns(tmp_path):
    train_step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    state = {'w': jnp.arange(500_000.0), 'v': jnp.ones((1000, 300))}
    array = np.arange(300_000)
    wanted = {'w': np.array(state['w']), 'v': np.array(state['v'])}, array.copy()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, (state, array), {}, error=None)
        array[:] = -1
        for _ in range(3):
            state = train_step(state)
    assert_same(read_as((state, array), tmp_path).state, wanted)


def test_a_restored_state_trains_as_the_original(tmp_path):
    # A restored array may share memory with numpy; donating it must not spoil it.
    train_step = jax.jit(lambda s: jax.tree.map(lambda x: jnp.sin(x) + 1, s), donate_argnums=0)
    state = {'w': jnp.arange(100_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, error=None)
    restored = meshes.put_global(read(tmp_path).state, state['w'].sharding)
    for _ in range(3):
        state, restored = train_step(state), train_step(restored)
    assert_same(restored, state)


@pytest.mark.parametrize('to', [(1, 1), (2, 2), (8, 1), (1, 2)])
def test_saved_on_one_mesh_and_restored_on_another(tmp_path, to):
    if jax.device_count() < 8:
        pytest.skip('needs 8 (virtual) devices')

    def on_mesh(shape):
        mesh = jax.make_mesh(
            shape,
            ('data', 'tower'),
            axis_types=(AxisType.Auto,) * 2,
            devices=jax.devices()[: shape[0] * shape[1]],
        )
        specs = {'kernel': P(None, 'tower'), 'bias': P('tower'), 'step': P(), 'batch': P('data')}
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    state = {
        'kernel': np.random.default_rng(0).random((48, 256), np.float32),
        'bias': np.arange(256, dtype=jnp.bfloat16),
        'step': np.int32(9),
        'batch': np.arange(64, dtype=np.uint8).reshape(16, 4),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, on_mesh((4, 2))), {}, error=None)
    restored = meshes.put_global(read(tmp_path).state, on_mesh(to))
    assert_same(restored, state)
    assert {name: x.sharding for name, x in restored.items()} == on_mesh(to)


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path('here'))
    assert_same(read(Path('here')).state, state_of(2))
    assert resumed(Path('here')).step == 2


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize(
    ('errors', 'kept', 'best'),
    [
        ([0.5, 0.3, 0.4, 0.6], [1, 2, 3], 1),
        ([0.5, 0.3, 0.4, 0.2], [2, 3], 3),
        ([0.1, 0.3, 0.4, 0.2], [0, 2, 3], 0),
        ([0.2, 0.2, 0.9, 0.8], [1, 2, 3], 1),
        ([0.2, None, float('nan'), float('inf')], [0, 2, 3], 0),
        ([None, None, None], [1, 2], None),
    ],
)
def test_latest_and_best_are_kept(tmp_path, errors, kept, best):
    with Checkpoints(tmp_path) as checkpoints:
        for step, error in enumerate(errors):
            checkpoints.save(step, state_of(step, 2), {}, error=error)
    assert steps(tmp_path) == kept
    assert best_step(tmp_path) == best
    for step in kept:
        assert_same(read(tmp_path, step).state, state_of(step, 2))
    if best is not None:
        assert read(tmp_path, 'best').step == best


def test_only_a_writer_clears_away_what_a_kill_left(tmp_path):
    save_steps(tmp_path)
    (tmp_path / '3.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    (tmp_path / 'deleted' / '1').mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert steps(tmp_path) == [1, 2]
        assert read(tmp_path).step == 2
        assert (tmp_path / '3.orbax-checkpoint-tmp').exists()
        checkpoints.save(3, state_of(3), {}, error=None)
    assert sorted(os.listdir(tmp_path)) == ['2', '3']


# ------------------------------------------------------------------ damage

DAMAGES = {
    'flip': lambda file, at: _flip(file, at),
    'truncate': lambda file, at: os.truncate(file, int(file.stat().st_size * at)),
    'empty': lambda file, _: os.truncate(file, 0),
    'delete': lambda file, _: file.unlink(),
    'append': lambda file, _: file.write_bytes(file.read_bytes() + b'{}'),
    'zero': lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    'swap': lambda file, at: _swap(file, at),
}


def _flip(file, at):
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 0x10
    file.write_bytes(content)


def _swap(file, at):
    """Exchange a file with one of the same name in step 1, or with another of its folder."""
    newest = next(parent for parent in file.parents if parent.name == '2')
    other = newest.with_name('1') / file.relative_to(newest)
    if not other.exists():  # array files are named at random
        others = files_of(newest)
        other = newest / others[int(at * len(others))]
    ours, theirs = file.read_bytes(), other.read_bytes()
    other.write_bytes(ours)
    file.write_bytes(theirs)


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob('*') if path.is_file())


def largest(checkpoint):
    return max((checkpoint / f for f in files_of(checkpoint)), key=lambda f: f.stat().st_size)


def resume_after(reports, parent, pristine, file, damage, at=0.5):
    """Damage one file of step 2 in a copy and resume; return whether step 2 was set aside."""
    directory = parent / 'copy'
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(pristine, directory)
    DAMAGES[damage](directory / '2' / file, at)
    reports.clear()
    try:
        restored = resumed(directory)
    except RunError as error:  # a swap damages step 1 too
        if damage == 'swap' and all(f'checkpoint {n} in' in str(error) for n in (1, 2)):
            return True
        raise
    assert_same(restored.state, state_of(restored.step))  # never a wrong value, whatever was hit
    assert restored.extra == {'step': restored.step}
    assert steps(directory) == [1, 2][: restored.step]
    assert (directory / 'damaged-2').exists() == (restored.step == 1)
    assert len(reports) == (restored.step == 1)  # never silent
    if reports:
        assert 'checkpoint 2 in' in reports[0]
        assert reports[0].endswith(
            '; other steps: 1; it was renamed to damaged-2; resuming from step 1'
        )
    return restored.step == 1


@pytest.mark.parametrize('damage', list(DAMAGES))
def test_each_file_damaged_is_found_or_was_harmless(tmp_path, reports, damage):
    save_steps(tmp_path / 'pristine')
    newest = tmp_path / 'pristine' / '2'
    found = {
        str(file)
        for file in files_of(newest)
        if resume_after(reports, tmp_path, tmp_path / 'pristine', file, damage)
    }
    # Orbax keeps more than the values depend on (sharding, timestamps, commit marks, metadata kept
    # twice): damage there may do no harm, and resume_after saw that every leaf verified.
    vital = {'manifest/metadata'}
    if damage != 'append':  # Orbax reads the byte ranges that its metadata names
        vital.add(str(largest(newest).relative_to(newest)))
    if damage in ('truncate', 'empty', 'zero', 'append'):
        vital.add('state/_METADATA')
    assert vital <= found


def test_random_damages_give_the_right_values_or_none(tmp_path, reports):
    save_steps(tmp_path / 'pristine')
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    files = files_of(tmp_path / 'pristine' / '2')
    outcomes = []
    for _ in range(50):
        file, damage, at = rng.choice(files), rng.choice(list(DAMAGES)), rng.random()
        try:
            where = tmp_path, tmp_path / 'pristine', file
            outcomes.append(resume_after(reports, *where, damage, at))
        except Exception as error:
            raise AssertionError(f'seed {seed}: {damage} of {file} at {at}') from error
    print(f'seed {seed}: {sum(outcomes)} of 50 were found, the others were harmless')
    assert any(outcomes)


def test_a_checkpoint_in_the_place_of_another_is_damaged(tmp_path):
    save_steps(tmp_path)
    shutil.rmtree(tmp_path / '2')
    shutil.copytree(tmp_path / '1', tmp_path / '2')
    with pytest.raises(
        RunError, match=r'checkpoint 2 in .* is damaged: manifest: .* of another step'
    ):
        read(tmp_path)


def test_a_damaged_array_is_named_when_asked_for_explicitly(tmp_path):
    save_steps(tmp_path)
    DAMAGES['flip'](largest(tmp_path / '2'), 0.5)
    for step in ('latest', 2):
        with pytest.raises(RunError, match=r'checkpoint 2 in .* is damaged: .*; other steps: 1$'):
            read(tmp_path, step)
    assert_same(read(tmp_path, 1).state, state_of(1))
    assert steps(tmp_path) == [1, 2]


def test_a_leaf_that_orbax_restores_without_a_word_is_named(tmp_path):
    # The arrays of step 1 under the manifest of step 2: sound for Orbax, wrong all the same.
    save_steps(tmp_path)
    shutil.rmtree(tmp_path / '2' / 'state')
    shutil.copytree(tmp_path / '1' / 'state', tmp_path / '2' / 'state')
    with pytest.raises(
        RunError, match=r'leaf params/conv1/(bias|kernel) does not match its sha256'
    ):
        read(tmp_path)


def test_several_damaged_ones_are_set_aside_and_none_when_all_are(tmp_path, reports):
    save_steps(tmp_path, (1, 2, 3), error=0.1)
    for step in (2, 3):
        os.truncate(largest(tmp_path / str(step)), 10)
    (tmp_path / 'damaged-3').mkdir()  # from an earlier accident
    assert resumed(tmp_path).step == 1
    assert len(reports) == 2
    assert sorted(os.listdir(tmp_path)) == ['1', 'damaged-2', 'damaged-3', 'damaged-3-1']

    os.truncate(largest(tmp_path / '1'), 10)
    for _ in range(2):  # a second start must not take the workdir for a fresh one
        with pytest.raises(
            RunError, match=r'no checkpoint in .* is intact \(checkpoint 1 in .*start over'
        ):
            read_newest_intact(tmp_path)
    with Checkpoints(tmp_path) as again:
        again.save(2, state_of(2), {}, error=None)
    assert_same(read(tmp_path).state, state_of(2))


def test_damage_does_not_disturb_later_saves_nor_the_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {}, error=0.1)
        checkpoints.wait()
        (tmp_path / '1' / 'manifest' / 'metadata').write_text('{')
        checkpoints.save(2, state_of(2), {}, error=0.5)
    assert best_step(tmp_path) == 2
    assert resumed(tmp_path).step == 2


# ------------------------------------------------------------------ the first format


@pytest.fixture
def first_format(repository, tmp_path):
    """Two checkpoints, written by the last commit with the first format."""
    directory = tmp_path / 'first'
    shutil.unpack_archive(repository / 'tests/golden/checkpoint_format_1.zip', directory)
    return directory


def test_the_first_format_is_read(first_format):
    assert (steps(first_format), best_step(first_format)) == ([3, 7], 3)
    restored = read(first_format)
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3) * 7
    np.testing.assert_array_equal(restored.state['state']['params']['conv1']['kernel'], kernel)
    assert restored.extra == {'config': {'name': 'ä'}, 'history': {'errors': [0.5]}}
    with Checkpoints(first_format) as checkpoints:  # retention ranks them with those of today
        checkpoints.save(8, state_of(8), {}, error=0.6)
        checkpoints.save(9, state_of(9), {}, error=0.7)
    assert (steps(first_format), best_step(first_format)) == ([3, 8, 9], 3)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'delete', 'append', 'zero'])
def test_damage_of_the_first_format_is_found(first_format, reports, damage):
    newest = first_format / '7'
    for file in files_of(newest):
        copy = first_format.with_name('copy')
        shutil.copytree(first_format, copy)
        DAMAGES[damage](copy / '7' / file, 0.5)
        reports.clear()
        restored = resumed(copy)
        assert len(reports) == (restored.step == 3)
        assert restored.step == 3 or 'manifest.json' not in file.name
        assert int(restored.state['state']['step']) == restored.step
        assert restored.state['state']['params']['conv1']['bias'][0] == restored.step
        shutil.rmtree(copy)


def test_a_run_of_the_first_format_is_evaluated(smoke_run, data_dir, tmp_path):
    """Also with another optimizer's state, which evaluation does not look at."""
    found = read(smoke_run / 'checkpoints')
    found.state['state']['opt_state'] = {'trace': {'conv1': np.ones(3, np.float32)}}
    path = tmp_path / 'old' / 'checkpoints' / str(found.step)
    leaves = checkpointing._named_leaves(found.state)
    manifest = {'format': 1, 'step': found.step, 'error': None, 'extra': found.extra}
    manifest['leaves'] = {name: checkpointing.describe(leaf) for name, leaf in leaves.items()}
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as writer:
        writer.save(path / 'state', args=ocp.args.PyTreeSave(found.state))
    (path / 'manifest').mkdir()
    body = json.dumps(manifest, indent=1).encode()
    (path / 'manifest' / 'manifest.json').write_bytes(body)
    line = f'{hashlib.sha256(body).hexdigest()}  manifest.json\n'
    (path / 'manifest' / 'manifest.json.sha256').write_text(line)
    old = evaluate.run([tmp_path / 'old'], data_dir=str(data_dir))
    new = evaluate.run([smoke_run], data_dir=str(data_dir))
    assert old['centre'] == new['centre']


# ------------------------------------------------------------------ kill -9

CHILD = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.test_checkpoint import assert_same, state_of
    from alexnet_jax.training.checkpoint import Checkpoints, read_newest_intact

    checkpoints = Checkpoints(Path(sys.argv[2]))
    restored = read_newest_intact(checkpoints.directory)
    first = restored.step + 1 if restored else 0
    print('ready', first, flush=True)
    for step in range(first, first + 1000):
        checkpoints.save(step, state_of(step, 300_000), {'step': step}, error=1 / (1 + step % 7))
"""


def test_killed_at_any_moment_every_checkpoint_is_complete(tmp_path, reports):
    rng = random.Random(0)
    root = Path(__file__).parent.parent
    reached, left_half_written = -1, 0
    for round_ in range(3):
        child = subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(CHILD), str(root), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline().split() == ['ready', str(reached + 1)]
            while not any(path.name.isdigit() for path in tmp_path.iterdir()):  # a complete one
                assert child.poll() is None
            time.sleep(rng.uniform(0, 0.5))
            if round_ % 2:
                while not any(tmp_path.glob('*.orbax-checkpoint-tmp*')):
                    assert child.poll() is None
            child.send_signal(signal.SIGKILL)
        left_half_written += any(tmp_path.glob('*.orbax-checkpoint-tmp*'))

        newest = resumed(tmp_path)
        assert reports == []
        assert newest.step >= reached
        reached = newest.step
        for step in steps(tmp_path):
            restored = read(tmp_path, step)
            assert_same(restored.state, state_of(step, 300_000))
            assert restored.extra == {'step': step}
    assert left_half_written
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(reached + 1, state_of(reached + 1), {}, error=None)
    assert_same(read(tmp_path).state, state_of(reached + 1))
    assert not any(tmp_path.glob('*.orbax-checkpoint-tmp*'))


# ------------------------------------------------------------------ disks


def noise(n_bytes):
    return {'w': np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8)}


@pytest.mark.parametrize('raised_by', ['save', 'wait', 'with'])
def test_a_full_disk_is_reported_in_a_sentence_and_loses_nothing(small_disk, raised_by):
    checkpoints = Checkpoints(small_disk / 'checkpoints')
    checkpoints.save(1, noise(10**6), {}, error=None)
    checkpoints.save(2, noise(4 * 10**6), {}, error=None)
    sentence = r'^the checkpoint of step 2 could not be written to .*No space left on device.*$'
    with pytest.raises(RunError, match=sentence):  # noqa: PT012 (three places that may raise it)
        if raised_by == 'save':
            checkpoints.save(3, noise(10**6), {}, error=None)
        elif raised_by == 'with':
            with checkpoints:
                pass
        else:
            checkpoints.wait()
    assert os.listdir(small_disk / 'checkpoints') == ['1']
    assert_same(read(small_disk / 'checkpoints').state, noise(10**6))
    checkpoints.wait()  # raised once
    with checkpoints:
        checkpoints.save(2, noise(10**6), {}, error=None)
    assert steps(small_disk / 'checkpoints') == [1, 2]


def test_folder_that_cannot_be_written_to(small_disk):
    with Checkpoints(small_disk) as checkpoints:
        checkpoints.save(1, noise(100), {}, error=None)
        checkpoints.wait()
        subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
        with pytest.raises(RunError, match=r'step 2 could not be written .*Read-only file system'):
            checkpoints.save(2, noise(100), {}, error=None)
        assert steps(small_disk) == [1]
        os.sync()
        assert_same(resumed(small_disk).state, noise(100))


def test_folder_under_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with (
        pytest.raises(RunError, match=r'step 0 could not be written to .*Not a directory'),
        Checkpoints(tmp_path / 'file' / 'checkpoints') as checkpoints,
    ):
        checkpoints.save(0, noise(100), {}, error=None)


# ------------------------------------------------------------------ what is asked wrongly


@pytest.mark.parametrize('exists', [True, False])
def test_a_folder_without_checkpoints(tmp_path, exists):
    directory = tmp_path / 'checkpoints'
    if exists:
        (directory / 'damaged-5').mkdir(parents=True)
    assert read_newest_intact(directory) is None
    assert (steps(directory), best_step(directory)) == ([], None)
    for step in ('latest', 'best', 3):
        with pytest.raises(RunError, match=r'no checkpoint in .*; train first with'):
            read(directory, step)
    assert directory.exists() == exists


def test_a_step_that_is_not_there(tmp_path):
    save_steps(tmp_path)
    for step in (3, 'newest', '9', 'best'):
        what = 'with a validation error' if step == 'best' else f'of step {step}'
        sentence = rf'no checkpoint {what} in .*; choose another of latest, best, 1, 2\.$'
        with pytest.raises(UsageError, match=sentence):
            read(tmp_path, step)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (
            lambda s: s['params'].update(fc=np.zeros(2)),
            r'params/fc is absent in the checkpoint and float64\[2\] in this run',
        ),
        (
            lambda s: s.pop('step'),
            r'step is int32\[\] in the checkpoint and absent in this run',
        ),
        (
            lambda s: s['params']['conv1'].update(bias=np.zeros(8)),
            r'params/conv1/bias is float64\[7\] in the checkpoint and float64\[8\]',
        ),
        (
            lambda s: s['params']['conv1'].update(bias=np.zeros(7, np.float32)),
            r'params/conv1/bias is float64\[7\] in the checkpoint and float32\[7\]',
        ),
    ],
)
def test_a_state_of_another_structure(tmp_path, change, sentence):
    like = state_of(0)
    change(like)
    with pytest.raises(RunError, match=sentence):
        fit_to(like, state_of(1), tmp_path)


# ------------------------------------------------------------------ on disk and on the console


def test_the_manifest_is_plain_json(tmp_path):
    save_steps(tmp_path, (1,))
    manifest = json.loads((tmp_path / '1/manifest/metadata').read_text())
    assert manifest['leaves']['params/conv1/bias']['shape'] == [7]


def test_orbax_is_quiet_and_others_are_not(tmp_path):
    class Heard(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    logger, handler, heard = logging.getLogger('absl'), Heard(), []
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        save_steps(tmp_path)
        read(tmp_path)
        assert heard == []
        absl.logging.info('heard')
        assert heard == ['heard']
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_the_import_changes_nothing(repository):
    code = """
        import logging, sys
        hook = sys.unraisablehook
        import alexnet_jax.training.checkpoint
        assert sys.unraisablehook is hook
        assert not [name for name in ('absl', 'asyncio') if logging.getLogger(name).filters]
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=repository, check=True)
