"""Sweeps as a person runs them: real processes, stopped, failing, shared, and continued."""

import contextlib
import fcntl
import io
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
from rich.console import Console

from alexnet_jax import config as configuration
from alexnet_jax import records
from alexnet_jax.errors import RunError, UsageError
from configs import ABLATIONS
from experiments import launchers, sweep
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
    """With tiny.py, a config, and two.py, a sweep of it."""
    path = tmp_path_factory.mktemp('sweep')
    (path / 'tiny.py').write_text(TINY)
    (path / 'two.py').write_text(SWEEP.format(tiny=str(path / 'tiny.py')))
    (path / 'one.py').write_text(f'CONFIGS, SEEDS = ({str(path / "tiny.py")!r},), 1')
    return path


@pytest.fixture(scope='module')
def start(folder, data_dir, cache_dir, repository):
    """Starts a sweep as a process; start(name, workdirs, *flags). None outlives the tests."""
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
        assert time.monotonic() < deadline, f'waited in vain for {what}'
        time.sleep(0.1)


def steps(workdir: Path) -> int:
    return max((record['step'] for record in records.read(workdir)), default=0)


def at_work(workdirs: Path) -> list[int]:
    """Ids of the processes that train in there."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if f'--workdir={workdirs}' in path.read_text():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope='module')
def stopped(start, folder):
    """Stopped in the middle by SIGTERM, then continued: (workdirs, first, second)."""
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
    assert 'SIGTERM: 1 under way save and leave.' in err
    assert 'all have left; the same command goes on.' in err
    assert 40 <= reached < 400


def test_started_again_it_goes_on_and_ends_in_the_same_bits(stopped, start, folder):
    workdirs, (_, _, _, reached), (_, err, _) = stopped
    log = (workdirs / 'tiny-0' / 'log.txt').read_text()
    (saved,) = re.findall(r'SIGTERM: saved at step (\d+) of 400', log)
    assert f'going on from step {saved} of 400' in log
    assert int(saved) >= reached
    process = start('one', folder / 'undisturbed', '--parallel=2')  # on one core too
    process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 0
    undisturbed = folder / 'undisturbed' / 'one-quickstart' / 'tiny-0'
    assert_same(outcome(undisturbed), outcome(workdirs / 'tiny-0'))
    assert 'tiny-0: done' in err


def test_one_that_fails_does_not_stop_the_rest(stopped):
    workdirs, _, (out, err, code) = stopped
    assert code == 1
    assert out.startswith('1 of 2 done, 1 failed')
    last = err.strip().splitlines()[-1]
    assert last.startswith('tiny-none-0 failed: train[:32] holds 32 images, fewer than one batch')
    assert last.endswith(f'See {workdirs}/tiny-none-0/log.txt')
    assert 'Traceback' not in err


def test_what_is_finished_is_passed_by(stopped, folder, capsys):
    workdirs, _, _ = stopped
    argv = [str(folder / 'two.py'), f'--workdirs={folder / "stopped"}', '--dry_run']
    assert sweep.main(argv) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f'--workdir={workdirs}/tiny-none-0' in shlex.split(line)
    runs = sweep.plan(argv[0], folder / 'stopped', '', 0, {})
    done = sweep.Sweep(runs, None, []).of(sweep.State.DONE)
    assert [own.run.name for own in done] == ['tiny-0']


def test_the_plan_is_what_main_makes_of_it(stopped, folder):
    """The config that is checked beforehand is the config that is trained."""
    workdirs, _, _ = stopped
    (run,) = sweep.plan(str(folder / 'one.py'), folder / 'other', '', 0, {})
    ours = sweep.resolve(folder / 'tiny.py', 'quickstart', run.overrides, run.row)
    theirs = json.loads((workdirs / 'tiny-0' / 'config.json').read_text())
    keys = configuration.differences(json.loads(configuration.as_json(ours)), theirs)
    assert keys == ['data.data_dir', 'loop.compilation_cache']  # which `start` gives


def test_two_sweeps_share_the_work(start, folder):
    """As two hosts do: each run is trained once, and both see all to the end."""
    workdirs = folder / 'shared'
    flags = ('--seeds=2', '--config.epochs=2')
    both = [start('one', workdirs, *flags) for _ in range(2)]
    said = [process.communicate(timeout=LIMIT_SECS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for seed in (0, 1):
        log = (workdirs / 'one-quickstart' / f'tiny-{seed}' / 'log.txt').read_text()
        assert log.count('pre-flight') == 1, log
    assert all('2 of 2 done' in text for text in said)


def test_a_run_that_another_process_is_at_waits(start, folder):
    """And is taken over when that one has left it unfinished."""
    workdir = folder / 'locked' / 'one-quickstart' / 'tiny-0'
    workdir.mkdir(parents=True)
    with (workdir / '.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start('one', folder / 'locked')
        assert process.stderr is not None
        assert process.stderr.readline().startswith('tiny-0: elsewhere')
        assert not (workdir / 'log.txt').exists()
    assert process.stderr.readline().startswith('tiny-0: running')
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 128 + signal.SIGINT
    assert not at_work(folder / 'locked')


def test_through_submitit(start, folder):
    """Its local executor; tests/cluster/test_sweep_slurm.py has a real Slurm."""
    pytest.importorskip('submitit')
    process = start('two', folder / 'jobs', '--launcher=local', '--parallel=2', '--config.epochs=2')
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 1, err
    assert out.startswith('1 of 2 done, 1 failed')
    assert 'tiny-none-0 failed: train[:32] holds' in err
    assert list((folder / 'jobs' / 'two-quickstart' / '.submitit').glob('*_result.pkl'))


# ------------------------------------------------------------------------------ without processes


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('no_such_sweep',), 'there is no sweep'),
        (('intervals',), 'it has no CONFIGS'),
        (('contribution_table', '--scale=huge'), "'huge' is not one of quickstart"),
        (('contribution_table', '--config.bach_size=3'), 'alexnet: '),
        (('contribution_table', '--config.batch_size'), 'should be KEY=VALUE'),
        (('contribution_table', '--config.batch_size=0'), 'batch_size must be at least 1'),
        (('contribution_table', '--seeds=-1'), 'are counts'),
        (('contribution_table', '--parallel=9999'), 'cores'),
        (('contribution_table', '--sideways'), '--sideways'),
    ],
)
def test_what_makes_no_sense(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert sweep.main([*flags, f'--workdirs={tmp_path}']) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # said before anything starts


def test_a_workdir_of_another_config_is_said_beforehand(stopped, folder, capsys):
    argv = [str(folder / 'two.py'), f'--workdirs={folder / "stopped"}', '--config.batch_size=16']
    assert sweep.main(argv) == 2
    assert 'different in batch_size' in capsys.readouterr().err


def test_the_contribution_table_is_planned(tmp_path):
    runs = sweep.plan('contribution_table', tmp_path, 'quickstart', 3, {'epochs': 2})
    assert len(runs) == 3 * (1 + len(ABLATIONS))
    first, *_, last = runs
    assert first.workdir == tmp_path / 'contribution_table-quickstart' / 'alexnet-0'
    assert last.command[2:] == [
        f'--config=configs/{ABLATIONS[-1]}.py:quickstart', f'--workdir={last.workdir}',
        '--config.epochs=2', '--config.seed=2',
    ]  # fmt: skip
    assert (first.epochs, last.seed) == (2.0, 2)


def test_an_argument_behind_the_scale(tmp_path):
    (tmp_path / 'depths.py').write_text("CONFIGS = ('ablation_depth:conv3',)")
    run, *_ = sweep.plan(str(tmp_path / 'depths.py'), tmp_path, '', 1, {})
    assert run.name == 'ablation_depth_conv3-0'
    assert run.config == 'configs/ablation_depth.py:quickstart,conv3'


def test_names_must_differ(tmp_path):
    (tmp_path / 'twice.py').write_text("CONFIGS = ('smoke', 'smoke')")
    with pytest.raises(UsageError, match='the same name'):
        sweep.plan(str(tmp_path / 'twice.py'), tmp_path, '', 1, {})


def test_each_run_on_its_own_cores(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    cores = os.sched_getaffinity(0)
    places = launchers.places(len(cores))
    assert sorted(core for place in places for core in place.cores) == sorted(cores)
    assert len(launchers.places(None)) == 1
    with pytest.raises(UsageError, match='would only wait'):
        launchers.places(len(cores) + 1)


def test_a_child_is_where_it_was_put(tmp_path):
    every = os.sched_getaffinity(0)
    place = launchers.Place((max(every),), {'HERE': 'yes'})
    ask = 'import os; print(os.sched_getaffinity(0), os.environ["HERE"])'
    child = launchers.Processes().start([sys.executable, '-c', ask], tmp_path / 'log', place)
    wait_for(lambda: child.poll() is not None, 'the child')
    assert (tmp_path / 'log').read_text() == f'{{{max(every)}}} yes\n'
    assert os.sched_getaffinity(0) == every


def test_gpus_in_turn_and_their_memory_shared(monkeypatch):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
    alone = launchers.places(None)
    assert [place.environment for place in alone] == [
        {'CUDA_VISIBLE_DEVICES': '2'}, {'CUDA_VISIBLE_DEVICES': '5'},
    ]  # fmt: skip
    shared = [place.environment for place in launchers.places(4)]
    assert [own['CUDA_VISIBLE_DEVICES'] for own in shared] == ['2', '5', '2', '5']
    assert {own['XLA_CLIENT_MEM_FRACTION'] for own in shared} == {'0.450'}


def test_no_slurm_here(tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RunError, match='--launcher=processes'):
        launchers.Submitit('slurm', tmp_path / 'jobs', timeout_min=1)


def test_a_killed_run_says_by_what(tmp_path):
    run = sweep.Run('row', 0, 'c', {}, tmp_path, 1.0)
    assert 'SIGKILL, as the system does when memory runs out' in sweep.last_words(run, -9)
    assert 'without a word' in sweep.last_words(run, 3)
    run.log.write_text('step 1\nTraceback\nValueError: so it is\n')
    assert sweep.last_words(run, 1) == 'ValueError: so it is'


class Preempted:
    """A launcher whose jobs are all ended from outside."""

    def __init__(self):
        self.starts = 0

    def start(self, command, log, place):
        del command, log, place
        self.starts += 1
        return self

    def poll(self):
        return 128 + signal.SIGTERM


def test_what_is_ended_from_outside_is_started_again_but_not_for_ever(folder, tmp_path):
    runs = sweep.plan(str(folder / 'one.py'), tmp_path, '', 1, {})
    launcher = Preempted()
    own = sweep.Sweep(runs, launcher, [launchers.Place()])
    assert own.work(sweep.Screen(Console(file=io.StringIO())), poll_secs=0.0) == 1
    assert launcher.starts == 1 + own.MOST_AGAIN
    assert own.progress[0].state is sweep.State.FAILED


def test_a_terminal_shows_a_table(stopped, folder):
    """Rows and columns, and the errors of what is done."""
    runs = sweep.plan(str(folder / 'two.py'), folder / 'stopped', '', 2, {})
    own = sweep.Sweep(runs, None, [])
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with sweep.Screen(console) as screen:
        screen.show(own)
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r'\x1b\[[^A-Za-z]*[A-Za-z]', '', console.file.getvalue())
    shown = shown[shown.rindex('1 of 4 done') :]  # the last of what was drawn over each other
    done = next(r for r in records.read(runs[0].workdir) if r['kind'] == 'test')
    assert f'{done["ten_views"]["top1_error"]:.2%}' in shown
    assert 'seed 1' in shown
    assert shown.count('waiting') == 3
