"""A real Slurm of one node and experiments/cluster/slurm.sh: kills, freezes, preemption, misuse.

    make test-cluster

Two tasks of four virtual CPU devices each train the smoke config on a mesh of data 4, tower 2, with
a checkpoint every other step. However often they are disturbed, they end in the undisturbed run's
bits. The same with Open MPI's mpirun.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alexnet_jax.training import metrics
from tests.cluster import one_node
from tests.test_distributed import CONNECT
from tests.test_train import assert_same, outcome

LIMIT_SECS = 900  # for anything that is waited for: a busy machine of two cores takes its time
ENDS = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'OUT_OF_MEMORY', 'BOOT_FAIL')


@pytest.fixture(scope='module')
def cluster(repository) -> Iterator[dict[str, str]]:
    """The environment in which the commands of a private Slurm work."""
    with one_node.slurm() as environment:
        one_node.install({'mpirun': 'openmpi-bin', 'shellcheck': 'shellcheck'})
        programs = f'{Path(sys.executable).parent}:{environment["PATH"]}'
        yield environment | {'PATH': programs, 'JAX_NUM_CPU_DEVICES': '4'}


class Job:
    """A training run in the hands of Slurm."""

    def __init__(self, cluster: dict[str, str], workdir: Path, words: list[str]):
        self.cluster, self.workdir = cluster, workdir
        self.log = workdir.with_suffix('.log')
        options = ('--parsable', '--nodes=1', '--ntasks-per-node=2', f'--output={self.log}')
        self.id = self.call('sbatch', *options, 'experiments/cluster/slurm.sh', *words)

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def shown(self) -> dict[str, str]:
        """Return Slurm's description of the job."""
        words = self.call('scontrol', 'show', 'job', '--oneliner', self.id).split()
        return dict(word.split('=', 1) for word in words if '=' in word)

    def output(self) -> str:
        """Return the log."""
        return self.log.read_text() if self.log.exists() else '(no log)'

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECS
        while not condition():
            assert self.shown()['JobState'] not in ENDS, f'ended before {what}:\n{self.output()}'
            assert time.monotonic() < deadline, f'no {what} in time:\n{self.output()}'
            time.sleep(0.3)

    def reach(self, step: int) -> None:
        """Wait until `step` is logged."""
        self.wait(lambda: self.steps() >= step, f'step {step}')

    def steps(self) -> int:
        return max((r['step'] for r in metrics.read(self.workdir)), default=0)

    def come_back(self, restart: int) -> None:
        """Wait until the job has gone through the queue and resumes."""
        self.wait(lambda: self.output().count('resuming at step') >= restart, f'restart {restart}')

    def finish(self) -> dict[str, str]:
        """Wait for the end."""
        deadline = time.monotonic() + LIMIT_SECS
        while (shown := self.shown())['JobState'] not in ENDS:
            assert time.monotonic() < deadline, f'no end in time:\n{self.output()}'
            time.sleep(0.5)
        return shown


def flags(workdir: Path, data_dir: Path, cache_dir: Path) -> list[str]:
    """64 steps on a mesh of two processes."""
    return [
        '--config=configs/smoke.py', f'--workdir={workdir}',
        f'--config.data.data_dir={data_dir}', f'--config.loop.compilation_cache={cache_dir}',
        '--config.mesh.data=4', '--config.mesh.tower=2', '--config.epochs=4',
        '--config.loop.checkpoint_every_epochs=0.125', '--config.loop.log_every_steps=2',
    ]  # fmt: skip


@pytest.fixture(scope='module')
def submit(cluster, repository, data_dir, cache_dir, tmp_path_factory):
    """Starts a job: submit(name, *more_flags, **environment)."""
    folder = tmp_path_factory.mktemp('jobs')

    def call(name: str, *words: str, **environment: str) -> Job:
        workdir = folder / name
        with contextlib.chdir(repository):
            return Job(
                cluster | environment, workdir, [*flags(workdir, data_dir, cache_dir), *words]
            )

    return call


@pytest.fixture(scope='module')
def undisturbed(submit) -> Path:
    job = submit('undisturbed')
    shown = job.finish()
    assert (shown['JobState'], shown['Restarts']) == ('COMPLETED', '0'), job.output()
    assert 'resuming at step' not in job.output()
    return job.workdir


def processes(workdir: Path) -> dict[int, int]:
    """Return the ids of the run's processes, {task: pid}."""
    found = {}
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = (path / 'cmdline').read_text().split('\0')
            if 'main.py' not in words[1:2] or f'--workdir={workdir}' not in words:
                continue
            lines = (path / 'environ').read_text().split('\0')
            environ = dict(line.split('=', 1) for line in lines if '=' in line)
            rank = environ.get('OMPI_COMM_WORLD_RANK', environ.get('SLURM_PROCID'))
            found[int(str(rank))] = int(path.name)
    return found


def send(workdir: Path, number: signal.Signals, task: int) -> None:
    found = processes(workdir)
    assert set(found) == {0, 1}
    os.kill(found[task], number)


def test_killed_and_frozen_tasks_are_started_again_and_end_in_the_same_bits(undisturbed, submit):
    job = submit('killed', '--config.processes.peer_timeout_secs=10')
    job.reach(10)
    send(job.workdir, signal.SIGKILL, 1)
    job.come_back(1)
    job.reach(26)
    send(job.workdir, signal.SIGSTOP, 1)
    job.come_back(2)
    job.reach(42)
    send(job.workdir, signal.SIGKILL, 0)
    shown = job.finish()
    assert (shown['JobState'], shown['ExitCode']) == ('COMPLETED', '0:0'), job.output()
    assert shown['Restarts'] == '3', job.output()
    assert 'goes into the queue again, restart 3' in job.output()
    assert 'could not be written' not in job.output()
    steps = [int(step) for step in re.findall(r'resuming at step (\d+) of 64', job.output())]
    assert len(steps) == 3, job.output()
    # Logged, not saved yet: a kill may take with it the save under way and the one before.
    for step, reached in zip(steps, (10, 26, 42), strict=True):
        assert step >= reached - 4, job.output()
    assert_same(outcome(undisturbed), outcome(job.workdir))


def test_asked_to_leave_they_save_and_resume_where_they_were(undisturbed, submit):
    """Before the time limit, by preemption, by scancel: saved at the very step."""
    rarely = '--config.loop.checkpoint_every_epochs=4.0'
    job = submit('asked', rarely)
    job.reach(6)
    job.call('scancel', '--signal=TERM', job.id)  # what --signal=TERM@120 does: tasks alone get it
    job.come_back(1)
    job.reach(20)
    job.call('scontrol', 'requeue', job.id)  # what preemption does: the script gets it too
    job.come_back(2)
    job.reach(36)
    job.call('scancel', job.id)
    shown = job.finish()
    assert (shown['JobState'], shown['Restarts']) == ('CANCELLED', '2'), job.output()
    job = submit('asked', rarely)  # by hand
    shown = job.finish()
    assert (shown['JobState'], shown['Restarts']) == ('COMPLETED', '0'), job.output()
    saved = re.findall(r'^main.py: SIGTERM: saved at step (\d+) of 64', job.output(), re.MULTILINE)
    resumed = re.findall(r'resuming at step (\d+) of 64', job.output())
    assert len(resumed) == 3, job.output()
    assert resumed == saved, job.output()
    assert job.output().count('goes into the queue again') == 1, job.output()
    assert_same(outcome(undisturbed), outcome(job.workdir))


def test_nonsense_is_not_started_again(submit):
    job = submit('nonsense', '--config.mesh.tower=3')
    shown = job.finish()
    assert (shown['JobState'], shown['ExitCode']) == ('FAILED', '2:0'), job.output()
    assert shown['Restarts'] == '0', job.output()
    assert 'main.py: mesh.tower' in job.output()
    assert 'not started again: correct the command' in job.output()


def test_nonsense_that_one_task_alone_meets_is_not_started_again(undisturbed, submit):
    """The first looks at the workdir; the other, in a collective then, ends with its exit code."""
    job = submit('anothers', f'--workdir={undisturbed}', '--config.seed=5')
    shown = job.finish()
    assert (shown['JobState'], shown['ExitCode']) == ('FAILED', '2:0'), job.output()
    assert shown['Restarts'] == '0', job.output()
    assert 'main.py: process 0: ' in job.output()
    assert 'contains a run with a different config: seed' in job.output()


def test_two_steps_of_a_job_side_by_side(cluster, repository):
    """Each has a port of its own; JAX's would be the job's."""
    srun = 'srun --overlap --ntasks=2'
    script = f"""#!/bin/bash
        {srun} python -c "$CONNECT" & first=$!
        {srun} python -c "$CONNECT" && wait $first
    """
    done = subprocess.run(
        ['sbatch', '--wait', '--ntasks=2', '--output=/dev/null'],
        input=script, cwd=repository, env=cluster | {'CONNECT': CONNECT},
        capture_output=True, text=True, timeout=LIMIT_SECS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_started_again_so_often_and_no_more(submit):
    job = submit('hopeless', '--workdir=/proc/nowhere', MOST_RESTARTS='1')
    shown = job.finish()
    assert (shown['JobState'], shown['ExitCode']) == ('FAILED', '1:0'), job.output()
    assert shown['Restarts'] == '1', job.output()
    assert '/proc/nowhere: No such file or directory' in job.output()
    assert job.output().strip().endswith('exit code 1, not started again after 1 restarts')


@pytest.fixture
def mpirun(cluster, repository, data_dir, cache_dir):
    """Starts two processes under Open MPI: mpirun(workdir, *more_flags)."""

    def call(workdir: Path, *words: str) -> subprocess.Popen:
        launcher = [
            'mpirun',
            '--allow-run-as-root',
            '--oversubscribe',
            '--bind-to',
            'none',
            '-n',
            '2',
        ]
        command = [
            *launcher,
            sys.executable,
            'main.py',
            *flags(workdir, data_dir, cache_dir),
            *words,
        ]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=repository, env=cluster, stdout=pipe, stderr=pipe, text=True
        )

    return call


def test_mpirun_ends_in_the_same_bits_after_a_kill(undisturbed, mpirun):
    workdir = undisturbed.with_name('mpi')
    killed = mpirun(workdir)
    deadline = time.monotonic() + LIMIT_SECS
    while max((r['step'] for r in metrics.read(workdir)), default=0) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    send(workdir, signal.SIGKILL, 1)
    killed.communicate(timeout=LIMIT_SECS)
    assert killed.returncode != 0
    assert not processes(workdir)
    again = mpirun(workdir)
    out, err = again.communicate(timeout=LIMIT_SECS)
    assert again.returncode == 0, err
    assert 'resuming at step' in err
    assert 'test accuracy' in out
    assert_same(outcome(undisturbed), outcome(workdir))


def test_mpirun_reports_a_usage_error_of_one_process(undisturbed, mpirun):
    refused = mpirun(undisturbed, '--config.seed=5')
    _, err = refused.communicate(timeout=LIMIT_SECS)
    assert refused.returncode == 2, err
    assert 'contains a run with a different config: seed' in err


def test_the_script_is_clean(cluster, repository):
    script = repository / 'experiments/cluster/slurm.sh'
    done = subprocess.run(['shellcheck', script], env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_another_slurm_on_the_machine_is_left_alone(cluster):
    with pytest.raises(one_node.SetupError, match='runs on this machine already'):
        one_node.refuse_if_impossible()
