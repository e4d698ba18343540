"""Several processes as one training: real ones on loopback, killed, stopped and misconfigured."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.data import datasets
from alexnet_jax.data.prepare import fashion_mnist
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import distributed
from alexnet_jax.parallel.distributed import ProcessInfo, detect
from alexnet_jax.training import metrics
from tests.conftest import REPOSITORY
from tests.processes import SECS, Program
from tests.test_train import LAYERS, assert_same, outcome

# A checkpoint every other step, so that kills fall into saves too. Small rates: at the recipe's own
# a rounding error grows tenfold every few steps (tests/test_train.py has more on it).
LONG = ('--config.epochs=4', '--config.loop.checkpoint_every_epochs=0.125',
        '--config.data.validation=train[55000:55064]', '--config.data.test=test[:100]')  # fmt: skip
CALM = ('--config.optimizer.weights.rate=0.0005', '--config.optimizer.biases.rate=0.001')
MESH = ('--config.mesh.tower=2',)  # a device a process, a tower a device, as in 2012
EIGHT = ('--config.mesh.data=4', '--config.mesh.tower=2', '--config.epochs=1')
ABORTED = -signal.SIGABRT  # JAX's end where its service has noticed first


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return probe.getsockname()[1]


class Crew:
    """Processes of one job.

    Args:
        command: the flags that all tests share.
        folder: of the workdir `run` and of the output.
        processes: their number.
        flags: of this job.
        devices: of all processes together.
        absent: processes that do not start.
        each: more flags, by process.
        places: the working directory of each process.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        processes: int = 2,
        flags: Sequence[str] = (),
        devices: int = 2,
        absent: Sequence[int] = (),
        each: Mapping[int, Sequence[str]] | None = None,
        places: Sequence[Path] = (),
    ):
        self.workdir, port = folder / 'run', free_port()
        self.programs = {}
        for i in range(processes):
            words = [*command, f'--workdir={self.workdir}', *flags]
            if processes > 1:
                words += [f'--coordinator_address=127.0.0.1:{port}',
                          f'--num_processes={processes}', f'--process_id={i}']  # fmt: skip
            words += (each or {}).get(i, ())
            cwd = places[i] if places else REPOSITORY
            if i not in absent:
                self.programs[i] = Program(words, folder, f'.{i}', devices // processes, cwd)

    def wait(self) -> dict[int, int | None]:
        """Return the exit codes."""
        return {i: program.wait() for i, program in self.programs.items()}

    def errors(self) -> str:
        return '\n'.join(program.err for program in self.programs.values())

    def ends_well(self) -> 'Crew':
        assert set(self.wait().values()) == {0}, self.errors()
        return self


@pytest.fixture(scope='module')
def command(data_dir):
    return [
        f'--config={REPOSITORY / "configs" / "smoke.py"}',
        f'--config.data.data_dir={data_dir}',
        '--config.loop.compilation_cache=none',
        '--config.processes.peer_timeout_secs=8',
        '--config.loop.tensorboard=False',
        f'--config.model.layers={LAYERS}',
        *LONG,
        *CALM,
    ]


@pytest.fixture(scope='module')
def undisturbed(command, tmp_path_factory):
    return Crew(command, tmp_path_factory.mktemp('crews') / 'undisturbed', flags=MESH).ends_well()


def test_process_0_alone_prints(undisturbed):
    first, second = undisturbed.programs.values()
    assert first.out.startswith('smoke: test accuracy')
    assert len(first.out.splitlines()) == 1
    assert second.out == second.err == ''
    assert 'Gloo' not in first.err
    kinds = [row['kind'] for row in metrics.read(undisturbed.workdir)]
    assert kinds.count('test') == 1
    assert kinds.count('validation') == 4
    environment = json.loads((undisturbed.workdir / 'environment.json').read_text())
    assert environment['processes'] == 2
    assert environment['devices'] == 2


def test_two_processes_of_four_devices_are_one_of_eight(command, tmp_path):
    """Sums over processes are taken in another order, and rounding grows over the 16 steps.

    The two read their slices of each batch from the record files, the one from memory.
    """
    in_files = ('--config.data.resident_gib=0.0', '--config.data.workers=2')
    two = Crew(command, tmp_path / 'two', 2, (*EIGHT, *in_files), devices=8).ends_well()
    one = Crew(command, tmp_path / 'one', 1, EIGHT, devices=8).ends_well()
    ours, theirs = outcome(two.workdir), outcome(one.workdir)
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


def test_after_every_fault_the_same_command_resumes_to_the_same_bits(undisturbed, command):
    """A process freezes, each is killed, and each gets a signal, in one run."""
    folder = undisturbed.workdir.parent.with_name('disturbed')

    crew = Crew(command, folder, flags=MESH)
    crew.programs[0].wait_for_step(4)
    crew.programs[1].send(signal.SIGSTOP)
    assert crew.programs[0].wait() in (1, ABORTED), crew.errors()
    assert crew.programs[1].running()
    crew.programs[1].kill()

    for victim, step in ((1, 12), (0, 20)):
        crew = Crew(command, folder, flags=MESH)
        crew.programs[0].wait_for_step(step)
        crew.programs[victim].kill()
        other = crew.programs[1 - victim]
        code = other.wait()
        assert code in (1, ABORTED), crew.errors()
        if code == 1:
            assert 'main.py: another process is gone (' in other.last
            assert 'start all processes again to resume from the latest' in other.last
        assert 'could not be written' not in other.err
        assert 'resuming at step' in crew.programs[0].err

    saved = ''
    for asked, number, step in ((0, signal.SIGINT, 32), (1, signal.SIGTERM, 44)):
        crew = Crew(command, folder, flags=(*MESH, '--config.loop.checkpoint_every_epochs=4.0'))
        crew.programs[0].wait_for_step(step)
        crew.programs[asked].send(number)
        assert crew.wait() == {0: 143, 1: 143}, crew.errors()
        assert f'resuming at step {saved}' in crew.programs[0].err
        found = re.match(r'main\.py: SIGTERM: saved at step (\d+) of 64', crew.programs[0].last)
        assert found, crew.errors()
        saved = found[1]

    again = Crew(command, folder, flags=MESH).ends_well()
    assert f'resuming at step {saved} of 64' in again.programs[0].err
    assert_same(outcome(undisturbed.workdir), outcome(again.workdir))


# ------------------------------------------------------------------------------ before the start


def test_a_process_that_never_comes(command, tmp_path):
    short = ('--config.processes.join_timeout_secs=3',)
    folders = [tmp_path / f'without-{absent}' for absent in (0, 1)]
    crews = [Crew(command, folders[i], flags=short, absent=(i,)) for i in (0, 1)]
    for i, crew in enumerate(crews):
        assert crew.wait() == {1 - i: 1}
        assert 'not all of 2 processes connected at 127.0.0.1:' in crew.errors()
        assert 'within 3 s (processes.join_timeout_secs)' in crew.errors()
        assert len(crew.errors().splitlines()) == 1
        assert not crew.workdir.exists()


def test_processes_that_disagree(command, tmp_path):
    each = {1: ('--config.seed=1', '--config.batch_size=32')}
    crew = Crew(command, tmp_path, each=each)
    assert crew.wait() == {0: 2, 1: 2}
    why = 'the flags differ from those of process 0 in config.batch_size, config.seed'
    assert crew.programs[0].last.startswith(f'main.py: process 1: {why}')
    assert crew.programs[1].last.startswith(f'main.py: {why}')
    assert not crew.workdir.exists()


def test_two_with_the_same_index(command, tmp_path):
    short = ('--config.processes.join_timeout_secs=5',)
    crew = Crew(command, tmp_path, 3, short, each={2: ('--process_id=1',)})
    assert 0 not in crew.wait().values()
    assert not crew.workdir.exists()


def test_an_error_of_one_process_ends_all_with_its_sentence_and_exit_code(undisturbed, command):
    """Only process 0 looks at the workdir, and finds another run's."""
    folder = undisturbed.workdir.parent
    crew = Crew(command, folder, flags=(*MESH, '--config.seed=5'))
    assert crew.wait() == {0: 2, 1: 2}
    first, second = crew.programs.values()
    assert 'contains a run with a different config: seed' in first.last
    assert second.last == first.last.replace('main.py: ', 'main.py: process 0: ')


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
    crew = Crew(command, tmp_path / 'w', flags=splits, places=places)
    assert crew.wait() == {0: 2, 1: 2}, crew.errors()
    if fault == 'different':
        assert (
            'process 1: the training data differ from those of process 0 in sha256'
            in crew.programs[0].err
        )
    else:
        missing = "process 1: data.train=train[:256]: there is no data set 'mine'"
        assert missing in crew.programs[0].err


def test_a_port_in_use():
    with socket.create_server(('', 0)) as taken:
        info = ProcessInfo(0, 2, f'127.0.0.1:{taken.getsockname()[1]}')
        with (
            pytest.raises(RunError, match=r'in use.*; choose another with --coordinator_address'),
            distributed.joined(info, {}),
        ):
            pass


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
    'SLURM_STEP_NUM_NODES': '2',
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
        (SLURM, ProcessInfo(3, 4, None)),
        (OPEN_MPI, ProcessInfo(1, 2, None)),
        (SLURM | OPEN_MPI, ProcessInfo(1, 2, None)),  # mpirun in an allocation
        (JAX | {'JOB_COMPLETION_INDEX': '5'}, ProcessInfo(5, 8, 'alexnet-0.alexnet:6000')),
        (JAX | {'JAX_PROCESS_ID': '6'}, ProcessInfo(6, 8, 'alexnet-0.alexnet:6000')),
        (OPEN_MPI_5 | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, ProcessInfo(1, 2, 'a:1')),
        (TPU, ProcessInfo(2, 3, None)),
        ({}, None),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '2'}, None),  # the batch script, not a task of srun
        (SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, None),
        (SLURM | {'JAX_NUM_PROCESSES': '1'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
        ({'JOB_COMPLETION_INDEX': '3'}, None),  # pods that have nothing to do with each other
    ],
)
def test_the_variables_of_launchers(environ, info):
    assert detect(environ) == info


def test_flags_win_over_launchers():
    assert detect(SLURM, 'here:1', 2, 0) == ProcessInfo(0, 2, 'here:1')
    assert detect({}, 'here:1', 2, 1) == ProcessInfo(1, 2, 'here:1')
    assert detect(OPEN_MPI_5, processes=1) is None


def test_a_list_of_nodes_needs_no_program(monkeypatch):
    """JAX reads it; `scontrol` may fail, or be missing in a container."""
    monkeypatch.setenv('PATH', '')
    assert detect(SLURM | {'SLURM_STEP_NODELIST': 'n[03-05],m'}) == detect(SLURM)


def test_steps_of_a_job_side_by_side_have_ports_of_their_own():
    ports = [distributed.coordinator_port(SLURM | {'SLURM_STEP_ID': step}) for step in '012']
    assert len({*ports, distributed.coordinator_port(OPEN_MPI)}) == 4
    assert all(61440 <= port < 65536 for port in ports)


@pytest.mark.parametrize(
    ('environ', 'flags', 'message'),
    [
        ({}, ('here:1', None, None), 'also give --num_processes and --process_id,'),
        ({}, (None, 2, 0), 'also give --coordinator_address,'),
        (
            {},
            ('here:1', 2, 2),
            '--process_id=2 is impossible: --process_id must be between 0 and 1',
        ),
        ({}, ('here:1', 2, -1), '--process_id=-1 is impossible'),
        ({}, ('here', 2, 1), 'must have the form host:port'),
        (
            {'JAX_NUM_PROCESSES': 'two'},
            (None, None, None),
            "a launcher's variable is no whole number (invalid literal for int() with base 10: "
            "'two'); correct it.",
        ),
        (JAX, (None, None, None), 'also give --process_id,'),
        (
            {'JAX_PROCESS_ID': '1'},
            (None,) * 3,
            'also give --coordinator_address and --num_processes',
        ),
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
    ('visible', 'launcher', 'own'),
    [
        ('0,1,2,3', OPEN_MPI, [2, 3]),
        ('0,1,2,3', SLURM, [2, 3]),
        ('4', OPEN_MPI, []),  # the launcher has given each its own
        ('0,1', SLURM | {'SLURM_STEP_NUM_NODES': '4'}, []),  # one process a host takes all
        ('0,1', {}, []),
        ('', OPEN_MPI, []),
    ],
)
def test_processes_of_a_host_share_its_gpus(visible, launcher, own):
    environ = launcher | {'CUDA_VISIBLE_DEVICES': visible}
    assert distributed.local_gpus(environ) == own
    assert distributed.local_gpus(environ | {'JAX_LOCAL_DEVICE_IDS': '0'}) is None


CONNECT = """
import os
import numpy as np
from alexnet_jax.parallel import distributed
info = distributed.detect(os.environ)
with distributed.joined(info, {}):
    import jax
    from alexnet_jax.config import MeshShape
    from alexnet_jax.parallel import mesh
    assert (jax.process_index(), jax.process_count()) == (info.process, 2)
    distributed.agree('the values', {'is': 'the same'})
"""
SHARES = """
    for shape in ((4, 1), (2, 2), (1, 4), (4, 1, 'one_weird_trick')):
        layout = mesh.make_layout(MeshShape(*shape), 64)
        rows = layout.local_batch_slice(64)
        read = np.arange(64)[rows]
        batch = layout.put_batch({'label': read}, 64)
        assert np.array_equal(layout.to_host(batch)['label'], np.arange(64))
        print(rows.start, rows.stop)
"""
BUG = """
    if info.process == 1:
        raise KeyError('a bug')
    distributed.wait_for_all('never')
"""


def pair(script: str, environ: Mapping[str, str], index: str) -> list[tuple[int, str, str]]:
    """Run a script in two processes of a launcher: exit code, stdout and stderr of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', script],
            cwd=REPOSITORY,
            env={**os.environ, 'JAX_NUM_CPU_DEVICES': '2', **environ, index: i},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in '01'
    ]
    texts = [process.communicate(timeout=SECS) for process in processes]
    return [(p.returncode, *both) for p, both in zip(processes, texts, strict=True)]


def test_slurms_processes_read_their_parts_of_a_batch_only():
    """Half of the batch where each process has its own images, all of it where they share them."""
    slurm = SLURM | {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_TASKS': '2',
                     'SLURM_NTASKS': '2', 'SLURM_JOB_ID': str(os.getpid())}  # fmt: skip
    ends = pair(CONNECT + SHARES, slurm, 'SLURM_PROCID')
    for (code, out, err), half in zip(ends, ('0 32', '32 64'), strict=True):
        assert code == 0, err
        assert out.splitlines() == [half, half, '0 64', half]


def test_a_bug_in_one_of_open_mpis_processes_ends_the_other_where_it_waits():
    mpi = OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': f'{4096 * os.getpid()}.0;tcp://127.0.0.1:1'}
    (code0, _, err0), (code1, _, err1) = pair(CONNECT + BUG, mpi, 'OMPI_COMM_WORLD_RANK')
    assert (code0, code1) == (1, 1)
    assert err0.endswith("main.py: process 1: KeyError: 'a bug'\n")
    assert err1.endswith("KeyError: 'a bug'\n")
    assert 'Traceback' in err1
