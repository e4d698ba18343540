"""Run sweeps in real processes: stopped, failing, shared and resumed."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_jax import config as configuration
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.training import metrics
from configs import ABLATIONS
from experiments import sweep
from tests.test_train import assert_same, outcome

LIMIT_SECS = 600  # for anything that is waited for: a busy machine takes its time

TINY = '''
"""Two layers, few images: most of a run is its start."""
from configs import smoke

def get_config(scale='quickstart'):
    config = smoke.get_config(scale)
    config.name, config.epochs = 'tiny', 100.0
    config.model.layers = ('conv1', 'fc8')
    config.data.train, config.data.validation = 'train[:256]', 'train[256:320]'
    config.data.test = 'test[:40]'
    config.loop.evaluate_every_epochs = config.loop.checkpoint_every_epochs = 50.0
    config.loop.tensorboard = False
    return config
'''
SWEEP = '''
"""One that trains, and one that cannot: fewer images than a batch."""
CONFIGS = ({tiny!r},)
OVERRIDES = {{'': {{}}, 'none': {{'data.train': 'train[:32]'}}}}
SEEDS = 1
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Make a folder with tiny.py, a config, and two.py and one.py, sweeps of it."""
    path = tmp_path_factory.mktemp('sweep')
    (path / 'tiny.py').write_text(TINY)
    (path / 'two.py').write_text(SWEEP.format(tiny=str(path / 'tiny.py')))
    (path / 'one.py').write_text(f'CONFIGS, SEEDS = ({str(path / "tiny.py")!r},), 1')
    return path


@pytest.fixture(scope='module')
def start(folder, data_dir, cache_dir, repository):
    """Return start(name, workdirs, *flags), which starts a sweep as a process."""
    started = []

    def call(name: str, workdirs: Path, *flags: str) -> subprocess.Popen:
        words = [
            sys.executable, '-m', 'experiments.sweep', str(folder / f'{name}.py'),
            f'--workdirs={workdirs}', f'--config.data.data_dir={data_dir}',
            f'--config.loop.compilation_cache={cache_dir}', *flags,
        ]  # fmt: skip
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, cwd=repository, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield call
    for process in started:  # of tests that failed
        if process.poll() is None:
            process.terminate()
            process.communicate()


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECS
    while not condition():
        assert time.monotonic() < deadline, f'{what} did not happen'
        time.sleep(0.1)


def steps(workdir: Path) -> int:
    return max((record['step'] for record in metrics.read(workdir)), default=0)


def at_work(workdirs: Path) -> list[int]:
    """Return the ids of the processes that train in a folder."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if f'--workdir={workdirs}' in path.read_text():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope='module')
def stopped(start, folder):
    """Stop a sweep by SIGTERM and resume it: (workdirs, first, second)."""
    workdirs = folder / 'stopped'
    process = start('two', workdirs, '--parallel=2')
    run = workdirs / 'two-quickstart' / 'tiny-0'
    wait_for(lambda: steps(run) >= 40, 'step 40')
    process.terminate()
    first = (*process.communicate(timeout=LIMIT_SECS), process.returncode, steps(run))
    assert not at_work(workdirs)
    process = start('two', workdirs, '--parallel=2')
    second = (*process.communicate(timeout=LIMIT_SECS), process.returncode)
    return workdirs / 'two-quickstart', first, second


def test_stopped_all_are_saved_and_none_is_left(stopped):
    _, (out, err, code, reached), _ = stopped
    assert code == 128 + signal.SIGTERM, err
    assert out == ''
    assert 'SIGTERM: runs are saving and stopping.' in err
    assert 'all runs have stopped; the same command resumes.' in err
    assert 40 <= reached < 400


def test_resumed_it_ends_in_the_same_bits(stopped, folder, data_dir, cache_dir):
    workdirs, (_, _, _, reached), (_, err, _) = stopped
    log = (workdirs / 'tiny-0' / 'log.txt').read_text()
    (saved,) = re.findall(r'SIGTERM: saved at step (\d+) of 400', log)
    assert f'resuming at step {saved} of 400' in log
    assert int(saved) >= reached
    common = {'data.data_dir': str(data_dir), 'loop.compilation_cache': str(cache_dir)}
    (undisturbed,) = sweep.plan(str(folder / 'one.py'), folder / 'undisturbed', '', 0, common)
    assert sweep.start(undisturbed, sweep.slots(2)[0]).wait(LIMIT_SECS) == 0  # on one core too
    assert_same(outcome(undisturbed.workdir), outcome(workdirs / 'tiny-0'))
    assert 'tiny-0: done' in err


def test_one_that_fails_does_not_stop_the_rest(stopped):
    workdirs, _, (out, err, code) = stopped
    assert code == 1
    assert out.startswith('1 of 2 done, 1 failed')
    (last,) = [line for line in err.splitlines() if 'failed' in line]
    assert last.startswith('tiny-none-0: failed: train[:32] has 32 images, fewer than one batch')
    assert last.endswith(f'See {workdirs}/tiny-none-0/log.txt')
    assert 'Traceback' not in err


def test_finished_runs_are_skipped(stopped, folder, capsys):
    workdirs, _, _ = stopped
    argv = [str(folder / 'two.py'), f'--workdirs={folder / "stopped"}', '--dry_run']
    assert sweep.main(argv) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f'--workdir={workdirs}/tiny-none-0' in shlex.split(line)
    runs = sweep.plan(argv[0], folder / 'stopped', '', 0, {})
    assert [run.name for run in runs if sweep.finished(run.workdir)] == ['tiny-0']


def test_the_planned_config_is_the_trained_config(stopped, folder):
    workdirs, _, _ = stopped
    (run,) = sweep.plan(str(folder / 'one.py'), folder / 'other', '', 0, {})
    ours = sweep.resolve(run.config, run.overrides, run.row)
    theirs = json.loads((workdirs / 'tiny-0' / 'config.json').read_text())
    keys = configuration.differences(json.loads(configuration.as_json(ours)), theirs)
    assert list(keys) == ['data.data_dir', 'loop.compilation_cache']  # which `start` gives


def test_through_submitit(start, folder):
    """Test the local executor; tests/cluster/test_sweep_slurm.py has a real Slurm."""
    pytest.importorskip('submitit')
    process = start('two', folder / 'jobs', '--launcher=local', '--parallel=2', '--config.epochs=2')
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 1, err
    assert out.startswith('1 of 2 done, 1 failed')
    assert 'tiny-none-0: failed: train[:32] has' in err
    assert list((folder / 'jobs' / 'two-quickstart' / '.submitit').glob('*_result.pkl'))


# ------------------------------------------------------------------------------ without processes


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('no_such_sweep',), 'there is no sweep'),
        (('intervals',), 'it has no CONFIGS'),
        (('contribution_table', '--scale=huge'), "'huge' is not one of quickstart"),
        (('contribution_table', '--config.bach_size=3'), 'alexnet: '),
        (('contribution_table', '--config.batch_size'), 'it must be of type int'),
        (('contribution_table', '--config.batch_size=0'), 'batch_size must be at least 1'),
        (('contribution_table', '--seeds=-1'), 'must be at least 1'),
        (('contribution_table', '--parallel=9999'), 'cores'),
        (('contribution_table', '--sideways'), '--sideways'),
    ],
)
def test_usage_errors(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert sweep.main([*flags, f'--workdirs={tmp_path}']) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # reported before anything starts


def test_the_contribution_table_is_planned(tmp_path):
    runs = sweep.plan('contribution_table', tmp_path, 'quickstart', 3, {'epochs': 2})
    assert len(runs) == 3 * (1 + len(ABLATIONS))
    first, *_, last = runs
    assert first.workdir == tmp_path / 'contribution_table-quickstart' / 'alexnet-0'
    assert last.command[2:] == [
        f'--config=configs/{ABLATIONS[-1]}.py:quickstart', f'--workdir={last.workdir}',
        '--config.epochs=2', '--config.seed=2',
    ]  # fmt: skip
    assert last.seed == 2


def test_an_argument_behind_the_scale(tmp_path):
    (tmp_path / 'depths.py').write_text("CONFIGS = ('ablation_depth:conv3',)")
    run, *_ = sweep.plan(str(tmp_path / 'depths.py'), tmp_path, '', 1, {})
    assert run.name == 'ablation_depth_conv3-0'
    assert run.config == 'configs/ablation_depth.py:quickstart,conv3'


def test_names_must_differ(tmp_path):
    (tmp_path / 'twice.py').write_text("CONFIGS = ('smoke', 'smoke')")
    with pytest.raises(UsageError, match='the same name'):
        sweep.plan(str(tmp_path / 'twice.py'), tmp_path, '', 1, {})


def test_each_run_on_its_own_cores(tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    ask = 'import os; print(*os.sched_getaffinity(0))'
    monkeypatch.setattr(sweep.Run, 'command', [sys.executable, '-c', ask])
    cores = os.sched_getaffinity(0)
    found = []
    for i, slot in enumerate(sweep.slots(len(cores))):
        run = sweep.Run('row', i, 'c', {}, tmp_path / f'row-{i}')
        assert sweep.start(run, slot).wait() == 0
        found.append(run.log.read_text().strip())
    assert found == [str(core) for core in sorted(cores)]
    assert len(sweep.slots(None)) == 1
    with pytest.raises(UsageError, match='lower it'):
        sweep.slots(len(cores) + 1)


def test_gpus_in_turn_and_their_memory_shared(monkeypatch):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
    alone = sweep.slots(None)
    assert [slot.environment for slot in alone] == [
        {'CUDA_VISIBLE_DEVICES': '2'}, {'CUDA_VISIBLE_DEVICES': '5'},
    ]  # fmt: skip
    shared = [slot.environment for slot in sweep.slots(4)]
    assert [own['CUDA_VISIBLE_DEVICES'] for own in shared] == ['2', '5', '2', '5']
    assert {own['XLA_CLIENT_MEM_FRACTION'] for own in shared} == {'0.450'}


def test_no_slurm_here(tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RunError, match='--launcher=processes'):
        next(sweep.run_by_submitit([], 'slurm', tmp_path / 'jobs', timeout_min=1))


def test_a_failed_run_is_reported_with_its_last_line(tmp_path):
    run = sweep.Run('row', 0, 'c', {}, tmp_path)
    assert 'SIGKILL, as the system does when memory runs out' in sweep.outcome(run, -9)
    assert 'no output' in sweep.outcome(run, 3)
    run.log.write_text('step 1\nTraceback\nValueError: so it is\n')
    assert sweep.outcome(run, 1) == f'failed: ValueError: so it is See {run.log}'
