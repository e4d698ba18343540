"""Run sweeps on a real Slurm of one node, through submitit: cancelled and resumed.

make test-cluster
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_jax.training import metrics
from tests.cluster import one_node
from tests.test_sweep import TINY

pytest.importorskip('submitit')
LIMIT_SECS = 900  # for anything that is waited for: a busy machine of two cores takes its time


@pytest.fixture(scope='module')
def cluster() -> Iterator[dict[str, str]]:
    with one_node.slurm() as environment:
        yield environment


@pytest.fixture
def start(cluster, tmp_path, repository, data_dir, cache_dir):
    (tmp_path / 'tiny.py').write_text(TINY)
    (tmp_path / 'jobs.py').write_text(f'CONFIGS = ({str(tmp_path / "tiny.py")!r},)')

    def call(*flags: str) -> subprocess.Popen:
        words = [
            sys.executable, '-m', 'experiments.sweep', str(tmp_path / 'jobs.py'), '--seeds=2',
            '--launcher=slurm', '--partition=main', f'--workdirs={tmp_path}',
            f'--config.data.data_dir={data_dir}', f'--config.loop.compilation_cache={cache_dir}',
            *flags,
        ]  # fmt: skip
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=repository, env=cluster, stdout=pipe, stderr=pipe, text=True
        )

    return call


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECS
    while not condition():
        assert time.monotonic() < deadline, f'{what} did not happen'
        time.sleep(0.2)


def steps(workdir: Path) -> int:
    return max((record['step'] for record in metrics.read(workdir)), default=0)


def queue(cluster) -> list[str]:
    command = ['squeue', '--noheader', '--format=%A']
    return subprocess.run(command, env=cluster, capture_output=True, text=True).stdout.split()


def test_two_runs_as_jobs_cancelled_and_resumed(start, cluster, tmp_path):
    runs = [tmp_path / 'jobs-quickstart' / f'tiny-{seed}' for seed in (0, 1)]
    process = start()
    wait_for(lambda: all(steps(run) >= 20 for run in runs), 'both jobs')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 128 + signal.SIGINT, err
    assert 'SIGINT: runs are saving and stopping' in err
    wait_for(lambda: not queue(cluster), 'an empty queue')
    saved = []
    for run in runs:
        log = (run / 'log.txt').read_text()
        saved += re.findall(r'SIGTERM: saved at step (\d+) of 400', log)
    assert len(saved) == 2, err
    process = start()
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 0, err
    assert out.startswith('2 of 2 done')
    for run, step in zip(runs, saved, strict=True):
        assert f'resuming at step {step} of 400' in (run / 'log.txt').read_text()
        assert steps(run) == 400


def test_before_its_time_is_up_a_job_saves_and_queues_again(start, cluster, tmp_path):
    """Send the USR2 of Slurm by hand: submitit checkpoints and requeues."""
    process = start('--seeds=1', '--config.epochs=400')  # long enough for the signal
    run = tmp_path / 'jobs-quickstart' / 'tiny-0'
    wait_for(lambda: steps(run) >= 20, 'step 20')
    (job,) = queue(cluster)
    subprocess.run(['scancel', '--signal=USR2', job], env=cluster, check=True)
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 0, err
    assert out.startswith('1 of 1 done')
    log = (run / 'log.txt').read_text()
    (saved,) = re.findall(r'SIGTERM: saved at step (\d+) of 1600', log) or [log]
    assert f'resuming at step {saved} of 1600' in log


def test_a_partition_that_is_not_there(start):
    process = start('--partition=nowhere')
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 1
    assert out == ''
    assert err.strip().splitlines()[-1].startswith('sweep: the jobs could not be submitted')
