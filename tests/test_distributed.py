"""Several processes as one: real ones, on loopback, that are started, lost, stopped and misled."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax import data, distributed, fashion_mnist, records
from alexnet_jax.distributed import Place, find_place
from alexnet_jax.errors import UsageError
from tests.test_train import assert_same, outcome

# A checkpoint every other step, so that kills fall into saves too. Small rates: at the recipe's own
# a rounding error grows tenfold every few steps (tests/test_train.py says more).
LONG = ('--config.epochs=2', '--config.loop.checkpoint_every_epochs=0.125',
        '--config.data.validation=train[55000:55064]', '--config.data.test=test[:100]')  # fmt: skip
CALM = ('--config.optimizer.weights.rate=0.0005', '--config.optimizer.biases.rate=0.001')
MESH = ('--config.mesh.tower=2',)  # a device a process, a tower a device, as in 2012
EIGHT = ('--config.mesh.data=4', '--config.mesh.tower=2')
SECS = 240  # no limit of the program: a hung test ends


class Crew:
    """Processes of one job, their output in files."""

    def __init__(
        self,
        command,
        folder: Path,
        processes: int,
        flags=(),
        devices=2,
        absent=(),
        each=None,
        places=None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        places = places or [folder] * processes
        self.folder, self.guards = folder, {}
        with socket.create_server(('127.0.0.1', 0)) as probe:
            port = probe.getsockname()[1]
        environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices // processes)}
        for i in range(processes):
            if i in absent:
                continue
            words = [*command, f'--workdir={folder / "run"}', *flags]
            if processes > 1:
                words += [f'--coordinator_address=127.0.0.1:{port}',
                          f'--num_processes={processes}', f'--process_id={i}']  # fmt: skip
            words += (each or {}).get(i, ())
            with (folder / f'out.{i}').open('w') as out, (folder / f'err.{i}').open('w') as err:
                self.guards[i] = subprocess.Popen(
                    words, cwd=places[i], stdout=out, stderr=err, env=environment
                )

    def wait(self) -> dict[int, int]:
        """Exit codes."""
        try:
            return {i: guard.wait(timeout=SECS) for i, guard in self.guards.items()}
        finally:
            for guard in self.guards.values():
                guard.kill()

    def said(self, i: int) -> str:
        return (self.folder / f'err.{i}').read_text()

    def last(self, i: int) -> str:
        return self.said(i).strip().splitlines()[-1]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECS
        while time.monotonic() < deadline:
            rows = records.read(self.folder / 'run')
            if any(row['kind'] == 'train' and row['step'] >= step for row in rows):
                return
            assert all(g.poll() is None for g in self.guards.values()), self.said(0)
            time.sleep(0.02)
        raise AssertionError(f'step {step} was never reached: {self.said(0)}')

    def child(self, i: int) -> int:
        """The process id of guard i's child."""
        pid = self.guards[i].pid
        return int(Path(f'/proc/{pid}/task/{pid}/children').read_text().split()[0])


@pytest.fixture(scope='module')
def command(repository, data_dir, cache_dir):
    return [
        sys.executable,
        str(repository / 'main.py'),
        f'--config={repository / "configs" / "smoke.py"}',
        f'--config.data.data_dir={data_dir}',
        f'--config.loop.compilation_cache={cache_dir}',
        '--config.processes.peer_timeout_secs=8',
        '--config.loop.tensorboard=False',
        *LONG,
        *CALM,
    ]


@pytest.fixture(scope='module')
def undisturbed(command, tmp_path_factory):
    crew = Crew(command, tmp_path_factory.mktemp('crews') / 'undisturbed', 2, MESH)
    assert crew.wait() == {0: 0, 1: 0}, crew.said(0) + crew.said(1)
    return crew


def assert_resumes(undisturbed, command, folder):
    """The same command again ends in the undisturbed run's bits."""
    again = Crew(command, folder, 2, MESH)
    assert again.wait() == {0: 0, 1: 0}, again.said(0) + again.said(1)
    assert 'going on from step' in again.said(0)
    assert_same(outcome(undisturbed.folder / 'run'), outcome(folder / 'run'))


def test_process_0_alone_speaks(undisturbed):
    assert (undisturbed.folder / 'out.0').read_text().startswith('smoke: test accuracy')
    assert len((undisturbed.folder / 'out.0').read_text().splitlines()) == 1
    assert (undisturbed.folder / 'out.1').read_text() == ''
    assert undisturbed.said(1) == ''
    assert 'Gloo' not in undisturbed.said(0)
    kinds = [row['kind'] for row in records.read(undisturbed.folder / 'run')]
    assert kinds.count('test') == 1
    assert kinds.count('validation') == 2
    environment = json.loads((undisturbed.folder / 'run' / 'environment.json').read_text())
    assert environment['processes'] == 2
    assert environment['devices'] == 2


SHARE = """
import sys
import jax, numpy as np
from alexnet_jax import parallel
from alexnet_jax.config import MeshShape
port, process = sys.argv[1:]
head = f'127.0.0.1:{port}'
jax.distributed.initialize(
    head,
    2,
    int(process),
    cluster_detection_method='deactivate',
    coordinator_bind_address=head,
)
for shape in ((4, 1), (2, 2), (1, 4), (4, 1, 'one_weird_trick')):
    layout = parallel.lay_out(MeshShape(*shape), 64)
    rows = parallel.own_rows(layout, 64)
    read = np.arange(64)[rows]
    batch = parallel.place_batch(layout, {'label': read}, 64)
    assert np.array_equal(parallel.fetch(batch, layout)['label'], np.arange(64))
    print(rows.start, rows.stop)
"""


def test_a_process_reads_its_own_rows_only(repository, tmp_path):
    """Half of the batch where each process has its own images, all of it where they share them."""
    with socket.create_server(('127.0.0.1', 0)) as probe:
        port = probe.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, '-c', SHARE, str(port), str(i)],
            cwd=repository,
            env={**os.environ, 'JAX_NUM_CPU_DEVICES': '2'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    for process, half in zip(pair, ('0 32', '32 64'), strict=True):
        out, err = process.communicate(timeout=SECS)
        assert process.returncode == 0, err
        rows = [line for line in out.splitlines() if re.fullmatch(r'\d+ \d+', line)]
        assert rows == [half, half, '0 64', half]


def test_two_processes_of_four_devices_are_one_of_eight(command, tmp_path):
    """Sums over processes are taken in another order, and rounding grows over the 32 steps."""
    two = Crew(command, tmp_path / 'two', 2, EIGHT, devices=8)
    assert two.wait() == {0: 0, 1: 0}, two.said(0) + two.said(1)
    one = Crew(command, tmp_path / 'one', 1, EIGHT, devices=8)
    assert one.wait() == {0: 0}, one.said(0)
    ours, theirs = outcome(two.folder / 'run'), outcome(one.folder / 'run')
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, leaf in theirs[1].items():
        scale = np.max(np.abs(leaf))
        np.testing.assert_allclose(ours[1][name], leaf, atol=5e-3 * scale, err_msg=name)
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert a.keys() == b.keys()
        if a['kind'] == 'train':
            assert a['loss'] == pytest.approx(b['loss'], abs=1e-3)
    np.testing.assert_allclose(ours[3]['ten_views'], theirs[3]['ten_views'], atol=5e-3)
    np.testing.assert_array_equal(ours[3]['label'], theirs[3]['label'])


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_all_and_the_job_goes_on(undisturbed, command, victim):
    folder = undisturbed.folder.parent / f'killed-{victim}'
    crew = Crew(command, folder, 2, MESH)
    crew.wait_for_step(12)
    os.kill(crew.child(victim), signal.SIGKILL)
    assert crew.wait() == {0: 137, 1: 137}
    for i in (0, 1):
        assert f'process {victim} of 2' in crew.last(i)
        assert 'was ended by SIGKILL; start all processes again' in crew.last(i)
        assert 'Traceback' not in crew.said(i)
        assert '@ 0x' not in crew.said(i)
    if victim == 0:
        assert_resumes(undisturbed, command, folder)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_lost_host_ends_the_others(undisturbed, command, victim):
    """The guard and its child are gone at once; no child outlives its guard."""
    crew = Crew(command, undisturbed.folder.parent / f'lost-{victim}', 2, MESH)
    crew.wait_for_step(4)
    child = crew.child(victim)
    crew.guards[victim].kill()
    if victim == 0:
        os.kill(child, signal.SIGKILL)
    assert crew.wait()[1 - victim] == 1
    assert f'process {victim} of 2' in crew.last(1 - victim)
    assert 'is gone without a word; start all processes again' in crew.last(1 - victim)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f'/proc/{child}').exists():
        time.sleep(0.1)
    assert not Path(f'/proc/{child}').exists()


def test_a_frozen_process_ends_all(undisturbed, command):
    crew = Crew(command, undisturbed.folder.parent / 'frozen', 2, MESH)
    crew.wait_for_step(4)
    os.kill(crew.child(1), signal.SIGSTOP)
    assert crew.wait() == {0: 1, 1: 1}
    for i in (0, 1):
        assert 'process 1 of 2' in crew.last(i)
        assert 'gave no sign of life for 8 s (processes.peer_timeout_secs)' in crew.last(i)


@pytest.mark.parametrize('asked', [0, 1])
def test_sigterm_on_any_saves_on_all(undisturbed, command, asked):
    folder = undisturbed.folder.parent / f'sigterm-{asked}'
    crew = Crew(command, folder, 2, (*MESH, '--config.loop.checkpoint_every_epochs=2.0'))
    crew.wait_for_step(8)
    crew.guards[asked].send_signal(signal.SIGTERM)
    assert crew.wait() == {0: 143, 1: 143}, crew.said(0) + crew.said(1)
    assert crew.last(0).startswith('main.py: SIGTERM: saved at step ')
    if asked == 1:
        assert_resumes(undisturbed, command, folder)


# ------------------------------------------------------------------------------ before the start


def test_a_process_that_never_comes(command, tmp_path):
    short = ('--config.processes.join_timeout_secs=3',)
    crew = Crew(command, tmp_path / 'w', 3, short, absent=(1, 2))
    assert crew.wait() == {0: 1}
    assert 'processes 1, 2 of 3 did not come within 3 s (processes.join_timeout_secs)' in (
        crew.last(0)
    )
    crew = Crew(command, tmp_path / 'v', 2, short, absent=(0,))
    assert crew.wait() == {1: 1}
    assert 'process 0 was not met at 127.0.0.1:' in crew.last(1)
    assert not (tmp_path / 'w' / 'run').exists()


def test_processes_that_disagree(command, tmp_path):
    each = {1: ('--config.seed=1', '--config.batch_size=32')}
    crew = Crew(command, tmp_path / 'w', 2, each=each)
    assert crew.wait() == {0: 2, 1: 2}
    for i in (0, 1):
        assert 'was started otherwise than process 0: config.batch_size, config.seed differ' in (
            crew.last(i)
        )
        assert len(crew.said(i).splitlines()) == 1
    assert not (tmp_path / 'w' / 'run').exists()


def test_two_that_claim_one_place(command, tmp_path):
    crew = Crew(command, tmp_path / 'w', 3, each={2: ('--process_id=1',)}, absent=())
    assert set(crew.wait().values()) == {2}
    assert 'each has its own --process_id, from 0 to 2' in crew.last(0)


def test_an_error_of_one_process_ends_all_with_its_exit_code(undisturbed, command):
    """Process 0 alone looks at the workdir, and finds it another run's."""
    crew = Crew(command, undisturbed.folder, 2, (*MESH, '--config.seed=5'))
    assert crew.wait() == {0: 2, 1: 2}
    assert 'holds a run of another config, different in seed' in crew.said(0)
    assert 'process 0 of 2' in crew.last(1)


def test_different_data(command, data_dir, tmp_path):
    """The same flags, but each process finds other images at that place, as on two hosts."""
    splits = ('--config.data.data_dir=data', '--config.data.name=mine',
              '--config.data.train=train[:256]',
              '--config.data.validation=train[256:320]')  # fmt: skip
    train, test = (data.load('fashion_mnist', data_dir, f'{s}[:400]') for s in ('train', 'test'))
    for i in (0, 1):
        images = train.images[..., 0] + np.uint8(i)
        raw = {'train': (images, train.labels), 'test': (test.images[..., 0], test.labels)}
        folder = tmp_path / f'host{i}' / 'data'
        fashion_mnist.write(raw, folder, report=lambda line: None)
        (folder / 'fashion_mnist').rename(folder / 'mine')
    places = [tmp_path / 'host0', tmp_path / 'host1']
    crew = Crew(command, tmp_path / 'w', 2, splits, places=places)
    assert crew.wait() == {0: 2, 1: 2}
    assert any('the training data of process 1 differs' in crew.said(i) for i in (0, 1))


def test_a_port_in_use(command, tmp_path):
    with socket.create_server(('', 0)) as taken:
        words = [*command, f'--workdir={tmp_path / "w"}', '--num_processes=2', '--process_id=0',
                 f'--coordinator_address=127.0.0.1:{taken.getsockname()[1]}']  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECS, cwd=tmp_path)
    assert done.returncode == 1
    assert 'cannot listen at port' in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------ launchers

SLURM = {
    'SLURM_JOB_ID': '1234', 'SLURM_STEP_ID': '2', 'SLURM_STEP_NODELIST': 'node7',
    'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1',
    'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
}  # fmt: skip
OPEN_MPI = {
    'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
    'OMPI_MCA_orte_hnp_uri': f'{4096 * 77}.0;tcp://10.0.0.1,10.1.0.1:34911',
}  # fmt: skip
JAX = {'JAX_COORDINATOR_ADDRESS': 'alexnet-0.alexnet:6000', 'JAX_NUM_PROCESSES': '8'}
TPU = {'TPU_WORKER_HOSTNAMES': 't0,t1,t2', 'TPU_WORKER_ID': '2'}


@pytest.mark.parametrize(
    ('environ', 'place'),
    [
        (SLURM, Place(3, 4, f'node7:{61440 + (8 * 1234 + 2) % 4096}', 1, 2)),
        (OPEN_MPI, Place(1, 2, f'10.0.0.1:{61440 + 77}', 1, 2)),
        (JAX | {'JOB_COMPLETION_INDEX': '5'}, Place(5, 8, 'alexnet-0.alexnet:6000')),
        (JAX | {'JAX_PROCESS_ID': '6'}, Place(6, 8, 'alexnet-0.alexnet:6000')),
        (TPU, Place(2, 3, 't0:61440')),
        ({}, None),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '2'}, None),  # the batch script, not a task of srun
        (SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, None),
        ({'JOB_COMPLETION_INDEX': '3'}, None),  # pods that have nothing to do with each other
        ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
    ],
)
def test_what_launchers_say(environ, place):
    assert find_place(environ) == place


def test_flags_go_before_launchers():
    assert find_place(SLURM, 'here:1', 2, 0) == Place(0, 2, 'here:1', 1, 2)
    assert find_place({}, 'here:1', 2, 1) == Place(1, 2, 'here:1')


def test_a_list_of_nodes_is_scontrols_to_read(tmp_path, monkeypatch):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[03-05],m" ] && printf "n03\\nn04"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    place = find_place(SLURM | {'SLURM_STEP_NODELIST': 'n[03-05],m'})
    assert place is not None
    assert place.address[0] == 'n03'


@pytest.mark.parametrize(
    ('environ', 'flags', 'says'),
    [
        ({}, ('here:1', None, None), 'give --num_processes and --process_id too'),
        ({}, (None, 2, 0), 'give --coordinator_address too'),
        ({}, ('here:1', 2, 2), '--process_id is 2; of 2 processes they are 0 to 1'),
        ({}, ('here:1', 2, -1), '--process_id is -1'),
        ({}, ('here', 2, 1), 'write host:port'),
        ({'JAX_NUM_PROCESSES': 'two'}, (None, None, None), "JAX_NUM_PROCESSES is 'two'"),
        ({k: v for k, v in OPEN_MPI.items() if 'uri' not in k}, (None,) * 3, 'coordinator_address'),
    ],
)
def test_places_that_cannot_be(environ, flags, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        find_place(environ, *flags)


@pytest.mark.parametrize(
    ('visible', 'place', 'own'),
    [
        ('0,1,2,3', Place(1, 2, 'a:1', 1, 2), {'CUDA_VISIBLE_DEVICES': '2,3'}),
        ('4', Place(1, 2, 'a:1', 1, 2), {}),  # the launcher has given each its own
        ('0,1', Place(1, 2, 'a:1', 0, 1), {}),  # one process a host takes all
        ('', Place(1, 2, 'a:1', 1, 2), {}),
    ],
)
def test_processes_of_a_host_share_its_gpus(monkeypatch, visible, place, own):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert distributed._own_gpus(place) == own
