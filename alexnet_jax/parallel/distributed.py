"""Multi-process training: rank, connection, consistency checks, preemption, shared failure.

JAX connects the processes and checks their heartbeats. The launcher (srun, mpirun, a Kubernetes
Job) starts them, terminates the remaining ones after a failure, and restarts all of them.
docs/parallelism.md lists for each fault what detects it, how fast, and the exit code.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from alexnet_jax import command, config_file
from alexnet_jax.errors import AlexNetError, RunError, UsageError

AGAIN = 'start all processes again to resume from the latest checkpoint'
PROGRAM = 'main.py'
# Words of gloo, NCCL and JAX's coordination service for the loss of a process.
LOST = re.compile(r'gloo|nccl|coordination|heartbeat', re.IGNORECASE)
FAILURE = 'alexnet_jax/failure'  # a key of JAX's key-value store
ADDRESS = 'JAX_COORDINATOR_ADDRESS'
# Environment variables: number (of a TPU pod: a list) of processes, index, and where JAX finds the
# address of process 0.
LAUNCHERS = (
    ('JAX_NUM_PROCESSES', 'JOB_COMPLETION_INDEX', ADDRESS),  # Kubernetes
    ('TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID', 'TPU_WORKER_HOSTNAMES'),
    ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_MCA_orte_hnp_uri'),
    ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_STEP_NODELIST'),
    ('PMI_SIZE', 'PMI_RANK', ADDRESS),  # MPICH, Intel MPI
    ('WORLD_SIZE', 'RANK', ADDRESS),  # torchrun
)


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Rank and number of the processes.

    coordinator: 'host:port' of process 0; None if JAX finds it by the launcher's variables.
    """

    process: int
    processes: int
    coordinator: str | None


_joined = ProcessInfo(0, 1, None)
_ending = threading.Lock()  # taken by the error that ends this process, and never released


# ------------------------------------------------------------------------------------ launchers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe this process where no launcher does."""
    add = parser.add_argument
    add('--coordinator_address', metavar='HOST:PORT', help='address of process 0')
    add('--num_processes', type=int, help='number of processes, if no launcher sets it')
    add('--process_id', type=int, help='rank of this process, from 0')


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> ProcessInfo | None:
    """Return the rank of this process, by flags or a launcher's variables; None if it is alone.

    Raises:
        UsageError: the description is impossible, or incomplete: each process would train alone.
    """
    flags: dict[str, Any] = {
        '--coordinator_address': coordinator,
        '--num_processes': processes,
        '--process_id': process,
    }
    try:
        values = _from_launcher(environ) | {k: v for k, v in flags.items() if v is not None}
    except ValueError as error:
        raise UsageError(
            f"a launcher's variable is no whole number ({error}); correct it."
        ) from None
    if not values or values.get('--num_processes') == 1:
        return None
    known = ' '.join(f'{flag}={value}' for flag, value in values.items())
    if missing := [flag for flag in flags if flag not in values]:
        raise UsageError(
            f'this is one of several processes ({known}), but the description is incomplete; '
            f'also give {" and ".join(missing)}, or --num_processes=1 for a single process.'
        )
    address, count, rank = (values[flag] for flag in flags)
    if not 0 <= rank < count or not re.fullmatch(r'.+:\d{1,5}', address or 'host:0'):
        raise UsageError(
            f'{known} is impossible: --process_id must be between 0 and {count - 1}, and '
            f'--coordinator_address must have the form host:port.'
        )
    return ProcessInfo(rank, count, address)


def _from_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags that the first launcher with several processes stands for.

    JAX_NUM_PROCESSES=1 counts too: it separates a process from its launcher.
    """
    own: dict[str, Any] = {}  # the variables that a user sets
    if ADDRESS in environ:
        own['--coordinator_address'] = environ[ADDRESS]
    if 'JAX_PROCESS_ID' in environ:
        own['--process_id'] = int(environ['JAX_PROCESS_ID'])
    for size, index, source in LAUNCHERS:
        value = environ.get(size, '0')
        processes = len(value.split(',')) if size == 'TPU_WORKER_HOSTNAMES' else int(value)
        if processes > 1 or (size == 'JAX_NUM_PROCESSES' and size in environ):
            found: dict[str, Any] = {'--num_processes': processes}
            if index in environ:
                found['--process_id'] = int(environ[index])
            if source in environ:
                found['--coordinator_address'] = None
            return found | own
    return own


def coordinator_port(environ: Mapping[str, str]) -> int:
    """Return a port for this job, and for this step of it; JAX's own is shared by all its steps."""
    if 'OMPI_MCA_orte_hnp_uri' in environ:  # '<job * 4096>.0;tcp://...'
        job = int(environ['OMPI_MCA_orte_hnp_uri'].partition('.')[0]) >> 12
    else:
        job = 8 * int(environ.get('SLURM_JOB_ID', 0)) + int(environ.get('SLURM_STEP_ID', 0))
    return 61440 + job % 4096


def local_gpus(environ: Mapping[str, str]) -> list[int] | None:
    """Return this task's share of the GPUs of its host; [] for all that it sees.

    JAX's default is one GPU a task. None leaves it to JAX_LOCAL_DEVICE_IDS.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in environ:
        return None
    rank, tasks = 0, 1
    if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environ:
        rank, tasks = (int(environ[f'OMPI_COMM_WORLD_LOCAL_{x}']) for x in ('RANK', 'SIZE'))
    elif 'SLURM_STEP_NUM_NODES' in environ:
        rank, nodes = int(environ['SLURM_LOCALID']), int(environ['SLURM_STEP_NUM_NODES'])
        tasks = -(-int(environ['SLURM_STEP_NUM_TASKS']) // nodes)
    devices = ','.join(map(str, Path('/dev').glob('nvidia[0-9]*')))
    visible = environ.get('CUDA_VISIBLE_DEVICES', devices)
    share = len([*filter(None, visible.split(','))]) // tasks  # 0: each task sees its own
    return list(range(rank * share, (rank + 1) * share)) if tasks > 1 else []


# ------------------------------------------------------------------------------------ connection


@contextlib.contextmanager
def joined(
    info: ProcessInfo | None,
    request: Mapping[str, Any],
    join_timeout_secs: float = 300.0,
    peer_timeout_secs: float = 60.0,
) -> Generator[None]:
    """Connect JAX over all processes, and end them together; do nothing for a single process.

    An error inside ends this process and, with its sentence and exit code, the others.

    Args:
        info: of this process; None if it is alone.
        request: flags and config, as JSON can hold them; must be the same in all processes.
        join_timeout_secs: time limit for all processes to connect.
        peer_timeout_secs: time after which a process without a heartbeat counts as lost.

    Raises:
        RunError: the port of process 0 is in use, or the processes do not connect.
    """
    if info is None:
        yield
        return
    import jax

    global _joined
    _initialize(info, int(join_timeout_secs), int(peer_timeout_secs))
    _joined = info
    listener = threading.Thread(target=_follow_failures, daemon=True)
    listener.start()
    try:
        agree('the flags', request)
        yield
        jax.distributed.shutdown()
        listener.join()  # Python crashes if a thread returns from C++ at exit
    except Exception as error:
        _end(error)


def _initialize(info: ProcessInfo, join_secs: int, peer_secs: int) -> None:
    import jax

    os.environ.setdefault('JAX_COORDINATOR_PORT', str(coordinator_port(os.environ)))
    port = int((info.coordinator or os.environ['JAX_COORDINATOR_PORT']).rpartition(':')[2])
    where = f'at {info.coordinator or f"port {port} of process 0"}'
    if info.process == 0:  # gRPC would share the port with another program unnoticed
        try:
            socket.create_server(('', port), reuse_port=False).close()
        except OSError as error:
            raise RunError(
                f'process 0 cannot listen on port {port} ({error.strerror}); choose another with '
                f'--coordinator_address=HOST:PORT for all processes.'
            ) from error
    _keep_stdout_for_python()
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    jax.config.update('jax_enable_preemption_service', False)  # see preempted
    why = (
        f'not all of {info.processes} processes connected {where} within {join_secs} s '
        f'(processes.join_timeout_secs); see the logs of the other processes, then {AGAIN}.'
    )
    alarm = threading.Timer(join_secs, lambda: _exit(command.report(RunError(why), PROGRAM)))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            info.coordinator,
            info.processes,
            info.process,
            local_device_ids=local_gpus(os.environ),
            # JAX's default needs IPv6.
            coordinator_bind_address=None if socket.has_dualstack_ipv6() else f'0.0.0.0:{port}',
            initialization_timeout=join_secs + 60,  # JAX would end by SIGABRT: the alarm is first
            heartbeat_timeout_seconds=peer_secs,
            shutdown_timeout_seconds=peer_secs,
        )
    except (ValueError, RuntimeError) as error:
        raise RunError(f'the processes cannot connect {where} ({error}); {AGAIN}.') from error
    finally:
        alarm.cancel()


def _keep_stdout_for_python() -> None:
    """Discard the stdout of C++ code: gloo prints its connections there."""
    sys.stdout.flush()
    python = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(python, 'w', errors='backslashreplace')


# --------------------------------------------------------------------------------- failure


def _store() -> Any:
    """Return JAX's key-value store; it has no public name."""
    from jax._src.distributed import global_state

    return global_state.client


def _end(error: BaseException) -> NoReturn:
    """End this process with its error, and the others through the key-value store.

    After a preemption, when all have saved, shut down in order.
    """
    _ending.acquire()
    if isinstance(error, AlexNetError) and error.exit_code >= 128:
        import jax

        jax.distributed.shutdown()
        _exit(command.report(error, PROGRAM) if is_first() else error.exit_code)
    if lost := _is_loss(error):
        with contextlib.suppress(Exception):  # the lost process may have stored its failure
            _follow(_store().blocking_key_value_get(FAILURE, 1000))
        error = RunError(f'another process is gone ({lost}); {AGAIN}.')
    try:
        code, why = command.report(error, PROGRAM), str(error)
    except Exception:
        traceback.print_exc()
        code, why = 1, f'{type(error).__name__}: {error}'
    with contextlib.suppress(Exception):
        failure = {'process': _joined.process, 'code': code, 'why': why}
        _store().key_value_set(FAILURE, json.dumps(failure))
    _end_together(code, 1 if lost else 10)


def _is_loss(error: BaseException | None) -> str:
    """Return the message of a lost process, from anywhere in the chain of causes, or ''."""
    while error is not None:
        if not isinstance(error, AlexNetError) and LOST.search(text := str(error)):
            return f'{type(error).__name__}: {text.strip().splitlines()[0][:200]}'
        error = error.__cause__ or error.__context__
    return ''


def _follow_failures() -> None:
    """Wait for a failure of any process, and end with its exit code."""
    with contextlib.suppress(Exception):  # an orderly shutdown cancels it
        failure = _store().blocking_key_value_get(FAILURE, 10**10)
        _ending.acquire()
        _follow(failure)


def _follow(text: str) -> NoReturn:
    """Print another process's failure, and end with its exit code."""
    failure = json.loads(text)
    print(f'{PROGRAM}: process {failure["process"]}: {failure["why"]}', file=sys.stderr)
    _end_together(failure['code'], 10)


def _end_together(code: int, secs: int) -> NoReturn:
    """Exit when all processes know of the failure, process 0 last, as it hosts the store."""
    with contextlib.suppress(Exception):
        _store().wait_at_barrier(FAILURE, 1000 * secs)
    if is_first():
        time.sleep(1)  # the others are ending; JAX aborts a process that loses the store
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -------------------------------------------------------------------------- while running


def several() -> bool:
    """Return whether this is one of several processes."""
    return _joined.processes > 1


def is_first() -> bool:
    """Return whether this is process 0, which logs and writes files."""
    return _joined.process == 0


def agree(what: str, value: Mapping[str, Any]) -> None:
    """Wait for all processes, and check that they have the same values, which JSON can hold.

    Raises:
        UsageError: this process has others than process 0; names their keys.
    """
    if not several():
        return
    own, key, wait_ms = json.dumps(value), f'alexnet_jax/{what}', 10**8
    if is_first():
        _store().key_value_set(key, own)
    first = json.loads(_store().blocking_key_value_get(key, wait_ms))
    if keys := config_file.differences(first, json.loads(own)):
        raise UsageError(
            f'{what} differ from those of process 0 in {", ".join(keys)}; give all processes the '
            f'same.'
        )
    _store().wait_at_barrier(key, wait_ms)


def wait_for_all(what: str) -> None:
    """Wait until all processes reach this point."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def preempted(step: int) -> bool:
    """Return whether any process got SIGTERM, the same in all processes for the same step.

    Before the first call SIGTERM ends a process at once, as there is nothing to save.
    """
    import jax
    from jax._src.distributed import global_state
    from jax.experimental import multihost_utils

    if global_state.preemption_sync_manager is None:
        jax.config.update('jax_enable_preemption_service', True)
        global_state.initialize_preemption_sync_manager()
    return multihost_utils.reached_preemption_sync_point(step)
