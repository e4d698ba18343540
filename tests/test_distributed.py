"""Several processes as one training: real ones on loopback, killed, stopped and misconfigured."""

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

from alexnet_jax.data import datasets
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import distributed, launchers
from alexnet_jax.parallel.launchers import ProcessInfo, detect
from alexnet_jax.training import metrics
from tests.test_train import assert_same, outcome

# A checkpoint every other step, so that kills fall into saves too. Small rates: at the recipe's own
# a rounding error grows tenfold every few steps (tests/test_train.py has more on it).
LONG = ('--config.epochs=2', '--config.loop.checkpoint_every_epochs=0.125',
        '--config.data.validation=train[55000:55064]', '--config.data.test=test[:100]')  # fmt: skip
CALM = ('--config.optimizer.weights.rate=0.0005', '--config.optimizer.biases.rate=0.001')
MESH = ('--config.mesh.tower=2',)  # a device a process, a tower a device, as in 2012
EIGHT = ('--config.mesh.data=4', '--config.mesh.tower=2', '--config.epochs=1')
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
        self.folder, self.processes = folder, {}
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
                self.processes[i] = subprocess.Popen(
                    words, cwd=places[i], stdout=out, stderr=err, env=environment
                )

    def wait(self) -> dict[int, int]:
        """Exit codes."""
        try:
            return {i: process.wait(timeout=SECS) for i, process in self.processes.items()}
        finally:
            for process in self.processes.values():
                process.kill()

    def stderr(self, i: int) -> str:
        return (self.folder / f'err.{i}').read_text()

    def last(self, i: int) -> str:
        return self.stderr(i).strip().splitlines()[-1]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECS
        while time.monotonic() < deadline:
            rows = metrics.read(self.folder / 'run')
            if any(row['kind'] == 'train' and row['step'] >= step for row in rows):
                return
            assert all(g.poll() is None for g in self.processes.values()), self.stderr(0)
            time.sleep(0.02)
        raise AssertionError(f'step {step} was never reached: {self.stderr(0)}')


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
    assert crew.wait() == {0: 0, 1: 0}, crew.stderr(0) + crew.stderr(1)
    return crew


def assert_resumes(undisturbed, command, folder):
    """The same command again ends in the undisturbed run's bits."""
    again = Crew(command, folder, 2, MESH)
    assert again.wait() == {0: 0, 1: 0}, again.stderr(0) + again.stderr(1)
    assert 'resuming at step' in again.stderr(0)
    assert_same(outcome(undisturbed.folder / 'run'), outcome(folder / 'run'))


def test_process_0_alone_prints(undisturbed):
    assert (undisturbed.folder / 'out.0').read_text().startswith('smoke: test accuracy')
    assert len((undisturbed.folder / 'out.0').read_text().splitlines()) == 1
    assert (undisturbed.folder / 'out.1').read_text() == ''
    assert undisturbed.stderr(1) == ''
    assert 'Gloo' not in undisturbed.stderr(0)
    kinds = [row['kind'] for row in metrics.read(undisturbed.folder / 'run')]
    assert kinds.count('test') == 1
    assert kinds.count('validation') == 2
    environment = json.loads((undisturbed.folder / 'run' / 'environment.json').read_text())
    assert environment['processes'] == 2
    assert environment['devices'] == 2


SHARE = """
import sys
import jax, numpy as np
from alexnet_jax.config import MeshShape
from alexnet_jax.parallel import mesh
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
    layout = mesh.make_layout(MeshShape(*shape), 64)
    rows = layout.local_batch_slice(64)
    read = np.arange(64)[rows]
    batch = layout.put_batch({'label': read}, 64)
    assert np.array_equal(layout.to_host(batch)['label'], np.arange(64))
    print(rows.start, rows.stop)
"""


def test_a_process_reads_its_part_of_a_batch_only(repository, tmp_path):
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
    """Sums over processes are taken in another order, and rounding grows over the 16 steps.

    The two read their slices of each batch from the record files, the one from memory.
    """
    in_files = ('--config.data.resident_gib=0.0', '--config.data.workers=2')
    two = Crew(command, tmp_path / 'two', 2, (*EIGHT, *in_files), devices=8)
    assert two.wait() == {0: 0, 1: 0}, two.stderr(0) + two.stderr(1)
    one = Crew(command, tmp_path / 'one', 1, EIGHT, devices=8)
    assert one.wait() == {0: 0}, one.stderr(0)
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


ABORTED = -signal.SIGABRT  # JAX's end where its service has noticed first


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_all_and_the_same_command_resumes(undisturbed, command, victim):
    folder = undisturbed.folder.parent / f'killed-{victim}'
    crew = Crew(command, folder, 2, MESH)
    crew.wait_for_step(12)
    crew.processes[victim].kill()
    code = crew.wait()[1 - victim]
    assert code in (1, ABORTED), crew.stderr(1 - victim)
    if code == 1:
        assert 'main.py: another process is gone (' in crew.last(1 - victim)
        assert 'start all processes again to resume from the latest' in crew.last(1 - victim)
    assert 'could not be written' not in crew.stderr(1 - victim)
    if victim == 0:
        assert_resumes(undisturbed, command, folder)


def test_a_frozen_process_ends_the_others(undisturbed, command):
    crew = Crew(command, undisturbed.folder.parent / 'frozen', 2, MESH)
    crew.wait_for_step(4)
    crew.processes[1].send_signal(signal.SIGSTOP)
    assert crew.processes[0].wait(timeout=SECS) in (1, ABORTED), crew.stderr(0)
    assert crew.processes[1].poll() is None
    crew.processes[1].kill()
    crew.wait()


@pytest.mark.parametrize(('asked', 'number'), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_saves_the_same_step_in_all(undisturbed, command, asked, number):
    folder = undisturbed.folder.parent / f'signal-{asked}'
    crew = Crew(command, folder, 2, (*MESH, '--config.loop.checkpoint_every_epochs=2.0'))
    crew.wait_for_step(8)
    crew.processes[asked].send_signal(number)
    assert crew.wait() == {0: 143, 1: 143}, crew.stderr(0) + crew.stderr(1)
    assert crew.last(0).startswith('main.py: SIGTERM: saved at step ')
    if asked == 1:
        assert_resumes(undisturbed, command, folder)


# ------------------------------------------------------------------------------ before the start


@pytest.mark.parametrize('absent', [0, 1])
def test_a_process_that_never_comes(command, tmp_path, absent):
    short = ('--config.processes.join_timeout_secs=3',)
    crew = Crew(command, tmp_path, 2, short, absent=(absent,))
    assert crew.wait() == {1 - absent: 1}
    error = crew.stderr(1 - absent)
    assert 'not all of 2 processes connected at 127.0.0.1:' in error
    assert 'within 3 s (processes.join_timeout_secs)' in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / 'run').exists()


def test_processes_that_disagree(command, tmp_path):
    each = {1: ('--config.seed=1', '--config.batch_size=32')}
    crew = Crew(command, tmp_path, 2, each=each)
    assert crew.wait() == {0: 2, 1: 2}
    why = 'the flags differ from those of process 0 in config.batch_size, config.seed'
    assert crew.last(0).startswith(f'main.py: process 1: {why}')
    assert crew.last(1).startswith(f'main.py: {why}')
    assert not (tmp_path / 'run').exists()


def test_two_with_the_same_index(command, tmp_path):
    short = ('--config.processes.join_timeout_secs=10',)
    crew = Crew(command, tmp_path, 3, short, each={2: ('--process_id=1',)})
    assert 0 not in crew.wait().values()
    assert not (tmp_path / 'run').exists()


def test_an_error_of_one_process_ends_all_with_its_sentence_and_exit_code(undisturbed, command):
    """Only process 0 looks at the workdir, and finds another run's."""
    crew = Crew(command, undisturbed.folder, 2, (*MESH, '--config.seed=5'))
    assert crew.wait() == {0: 2, 1: 2}
    assert 'contains a run with a different config: seed' in crew.last(0)
    assert crew.last(1) == crew.last(0).replace('main.py: ', 'main.py: process 0: ')


@pytest.mark.parametrize('fault', ['different', 'missing'])
def test_data_that_is_not_the_same_everywhere(command, data_dir, tmp_path, fault):
    """The same flags, but process 1 finds other images at that path, or none, as on two hosts."""
    splits = ('--config.data.data_dir=data', '--config.data.name=mine',
              '--config.data.train=train[:256]',
              '--config.data.validation=train[256:320]')  # fmt: skip
    first = ('train[:400]', 'test[:400]')
    train, test = (datasets.load('fashion_mnist', data_dir, split) for split in first)
    places = [tmp_path / 'host0', tmp_path / 'host1']
    for i, place in enumerate(places):
        place.mkdir()
        if i == 0 or fault == 'different':
            images = train.images[..., 0] + np.uint8(i)
            raw = {'train': (images, train.labels), 'test': (test.images[..., 0], test.labels)}
            fashion_mnist.write(raw, place / 'data')
            (place / 'data' / 'fashion_mnist').rename(place / 'data' / 'mine')
    crew = Crew(command, tmp_path / 'w', 2, splits, places=places)
    assert crew.wait() == {0: 2, 1: 2}, crew.stderr(0) + crew.stderr(1)
    if fault == 'different':
        assert any('the training data of process 1 differs' in crew.last(i) for i in (0, 1))
    else:
        assert "process 1: data.train=train[:256]: there is no data set 'mine'" in crew.last(0)


BUG = """
import sys
from alexnet_jax.parallel import distributed, launchers
with distributed.joined(launchers.detect({}, sys.argv[1], 2, int(sys.argv[2])), {}):
    distributed.wait_for_all('start')
    if sys.argv[2] == '1':
        raise KeyError('a bug')
    distributed.wait_for_all('never')
"""


def test_a_bug_in_one_process_ends_the_other_where_it_waits(repository):
    with socket.create_server(('127.0.0.1', 0)) as probe:
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    (code0, err0), (code1, err1) = pair(repository, [BUG, address], each=(['0'], ['1']))
    assert (code0, code1) == (1, 1)
    assert err0.endswith("main.py: process 1: KeyError: 'a bug'\n")
    assert err1.endswith("KeyError: 'a bug'\n")
    assert 'Traceback' in err1


def pair(repository, words, each=([], []), environs=({}, {})) -> list[tuple[int, str]]:
    """Run a script in two processes; their exit codes and what they wrote to stderr."""
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', *words, *own],
            cwd=repository,
            env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own, environ in zip(each, environs, strict=True)
    ]
    errors = [process.communicate(timeout=SECS)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def test_a_port_in_use(command, tmp_path):
    with socket.create_server(('', 0)) as taken:
        words = [*command, f'--workdir={tmp_path / "w"}', '--num_processes=2', '--process_id=0',
                 f'--coordinator_address=127.0.0.1:{taken.getsockname()[1]}']  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECS, cwd=tmp_path)
    assert done.returncode == 1
    assert 'cannot listen on port' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_lost_connection_is_recognised_behind_the_error_that_hides_it():
    """Find the error of gloo behind the sentence about a full disk."""
    hidden = RunError('the checkpoint could not be written; free space')
    assert not distributed._is_loss(hidden)
    hidden.__cause__ = ValueError('UNKNOWN: Gloo AllGather failed: Connection closed by peer')
    assert 'Gloo AllGather failed' in distributed._is_loss(hidden)


# ------------------------------------------------------------------------------------ launchers

SLURM = {
    'SLURM_JOB_ID': '1234', 'SLURM_STEP_ID': '2', 'SLURM_STEP_NODELIST': 'node7',
    'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_NODEID': '1',
    'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
}  # fmt: skip
OPEN_MPI = {
    'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
    'OMPI_MCA_orte_hnp_uri': f'{4096 * 77}.0;tcp://127.0.0.1,10.1.0.1:34911',
}  # fmt: skip
OPEN_MPI_5 = {k: v for k, v in OPEN_MPI.items() if 'uri' not in k}
JAX = {'JAX_COORDINATOR_ADDRESS': 'alexnet-0.alexnet:6000', 'JAX_NUM_PROCESSES': '8'}
TPU = {'TPU_WORKER_HOSTNAMES': 't0,t1,t2', 'TPU_WORKER_ID': '2'}


@pytest.mark.parametrize(
    ('environ', 'info'),
    [
        (SLURM, ProcessInfo(3, 4, None, 1, 2)),
        (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '2,1(x2)'}, ProcessInfo(3, 4, None, 1, 1)),
        (OPEN_MPI, ProcessInfo(1, 2, None, 1, 2)),
        (SLURM | OPEN_MPI, ProcessInfo(1, 2, None, 1, 2)),  # mpirun in an allocation
        (JAX | {'JOB_COMPLETION_INDEX': '5'}, ProcessInfo(5, 8, 'alexnet-0.alexnet:6000')),
        (JAX | {'JAX_PROCESS_ID': '6'}, ProcessInfo(6, 8, 'alexnet-0.alexnet:6000')),
        (TPU, ProcessInfo(2, 3, None)),
        (OPEN_MPI_5 | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, ProcessInfo(1, 2, 'a:1', 1, 2)),
        ({}, None),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '2'}, None),  # the batch script, not a task of srun
        (SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, None),
        (SLURM | {'JAX_NUM_PROCESSES': '1'}, None),
        ({'JOB_COMPLETION_INDEX': '3'}, None),  # pods that have nothing to do with each other
        ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
    ],
)
def test_the_variables_of_launchers(environ, info):
    assert detect(environ) == info


def test_flags_win_over_launchers():
    assert detect(SLURM, 'here:1', 2, 0) == ProcessInfo(0, 2, 'here:1', 1, 2)
    assert detect({}, 'here:1', 2, 1) == ProcessInfo(1, 2, 'here:1')
    assert detect(OPEN_MPI_5, processes=1) is None


def test_a_list_of_nodes_needs_no_program(monkeypatch):
    """JAX reads it; `scontrol` may fail, or be missing in a container."""
    monkeypatch.setenv('PATH', '')
    assert detect(SLURM | {'SLURM_STEP_NODELIST': 'n[03-05],m'}) == detect(SLURM)


def test_steps_of_a_job_side_by_side_have_ports_of_their_own():
    ports = [launchers.coordinator_port(SLURM | {'SLURM_STEP_ID': step}) for step in '012']
    assert len({*ports, launchers.coordinator_port(OPEN_MPI)}) == 4
    assert all(61440 <= port < 65536 for port in ports)


@pytest.mark.parametrize(
    ('environ', 'flags', 'message'),
    [
        ({}, ('here:1', None, None), 'also give --num_processes and --process_id,'),
        ({}, (None, 2, 0), 'also give --coordinator_address,'),
        ({}, ('here:1', 2, 2), '--process_id is 2; with 2 processes it must be between 0 and 1'),
        ({}, ('here:1', 2, -1), '--process_id is -1'),
        ({}, ('here', 2, 1), 'must have the form host:port'),
        ({'JAX_NUM_PROCESSES': 'two'}, (None, None, None), "JAX_NUM_PROCESSES is 'two'"),
        (JAX, (None, None, None), 'also give --process_id,'),
        # Launchers that JAX knows not at all, or by another version: each would train alone.
        (OPEN_MPI_5, (None, None, None), 'also give --coordinator_address,'),
        ({'PMI_RANK': '1', 'PMI_SIZE': '4'}, (None,) * 3, 'also give --coordinator_address,'),
        ({'RANK': '1', 'WORLD_SIZE': '4'}, (None,) * 3, 'also give --coordinator_address,'),
    ],
)
def test_descriptions_that_cannot_be(environ, flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        detect(environ, *flags)


@pytest.mark.parametrize(
    ('visible', 'info', 'own'),
    [
        ('0,1,2,3', ProcessInfo(1, 2, 'a:1', 1, 2), [2, 3]),
        ('4', ProcessInfo(1, 2, 'a:1', 1, 2), []),  # the launcher has given each its own
        ('0,1', ProcessInfo(1, 2, 'a:1', 0, 1), []),  # one process a host takes all
        ('', ProcessInfo(1, 2, 'a:1', 1, 2), []),
    ],
)
def test_processes_of_a_host_share_its_gpus(visible, info, own):
    environ = {'CUDA_VISIBLE_DEVICES': visible}
    assert launchers.local_gpus(info, environ) == own
    assert launchers.local_gpus(info, environ | {'JAX_LOCAL_DEVICE_IDS': '0'}) is None


CONNECT = """
import os
from alexnet_jax.parallel import distributed, launchers
info = launchers.detect(os.environ)
with distributed.joined(info, {}):
    import jax
    distributed.agree('the value', 'the same')
    assert (jax.process_index(), jax.process_count()) == (info.process, 2)
"""


@pytest.mark.parametrize('launcher', ['SLURM', 'OMPI'])
def test_jax_connects_by_a_launchers_variables(repository, launcher):
    base = {
        'SLURM': SLURM | {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_TASKS': '2',
                          'SLURM_NTASKS': '2', 'SLURM_JOB_ID': str(os.getpid())},
        'OMPI': OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': f'{4096 * os.getpid()}.0;tcp://127.0.0.1:1'},
    }[launcher]  # fmt: skip
    index = {'SLURM': 'SLURM_PROCID', 'OMPI': 'OMPI_COMM_WORLD_RANK'}[launcher]
    ends = pair(repository, [CONNECT], environs=[base | {index: i} for i in '01'])
    assert [code for code, _ in ends] == [0, 0], ends
