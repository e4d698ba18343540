"""Several processes as one training: flags and launchers, agreement, preemption, common failure.

JAX connects the processes and checks their heartbeats; the launcher (srun, mpirun, a Kubernetes
Job) starts them, ends what is left after a failure, and starts all again. docs/parallelism.md lists
each fault with who notices it, how fast, and by which exit code.
"""

import contextlib
import dataclasses
import hashlib
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
FLAGS = {
    'coordinator': '--coordinator_address',
    'processes': '--num_processes',
    'process': '--process_id',
}
ADDRESS = 'JAX_COORDINATOR_ADDRESS'
# Environment variables: number of processes, index, and what JAX takes process 0's address from.
LAUNCHERS = (
    ('JAX_NUM_PROCESSES', ('JAX_PROCESS_ID', 'JOB_COMPLETION_INDEX'), ADDRESS),
    ('TPU_WORKER_HOSTNAMES', ('TPU_WORKER_ID',), 'TPU_WORKER_HOSTNAMES'),
    ('OMPI_COMM_WORLD_SIZE', ('OMPI_COMM_WORLD_RANK',), 'OMPI_MCA_orte_hnp_uri'),
    ('SLURM_STEP_NUM_TASKS', ('SLURM_PROCID',), 'SLURM_STEP_NODELIST'),
    ('PMI_SIZE', ('PMI_RANK',), ADDRESS),  # MPICH, Intel MPI
    ('WORLD_SIZE', ('RANK',), ADDRESS),  # torchrun
)
# How gloo, NCCL and JAX's coordination service word the loss of a process.
LOST = re.compile(r'gloo|nccl|coordination|heartbeat', re.IGNORECASE)
LAST_WORDS = 'alexnet_jax/last_words'  # a key of JAX's key-value store, as is the next one
REQUEST = 'alexnet_jax/request'

# ----------------------------------------------------------------------------- which process


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Index and number of the processes, also on this host; 'host:port', or None: JAX knows it."""

    process: int
    processes: int
    coordinator: str | None
    local: int = 0
    locals: int = 1


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> ProcessInfo | None:
    """Return which process this is, by flags or else by a launcher's variables; None when alone.

    Raises:
        UsageError: what they say is impossible, or not enough, as for a launcher that JAX does not
            know; each process would train alone.
    """
    flags: dict[str, Any] = {'coordinator': coordinator, 'processes': processes, 'process': process}
    values = _from_launcher(environ) | {k: v for k, v in flags.items() if v is not None}
    if not values or values.get('processes') == 1:
        return None
    if missing := [flag for name, flag in FLAGS.items() if name not in values]:
        known = ' '.join(f'{FLAGS[k]}={v}' for k, v in values.items() if k in FLAGS)
        raise UsageError(
            f'one of several processes ({known}), but which? give {" and ".join(missing)} too, or '
            f'--num_processes=1 for a process on its own.'
        )
    info = ProcessInfo(**values)
    if not 0 <= info.process < info.processes:
        raise UsageError(
            f'--process_id is {info.process}; of {info.processes} processes they are 0 to '
            f'{info.processes - 1}.'
        )
    if info.coordinator is not None and not re.fullmatch(r'.+:\d{1,5}', info.coordinator):
        raise UsageError(f'--coordinator_address is {info.coordinator}; write host:port.')
    return info


def _from_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the first launcher of several processes says; JAX_NUM_PROCESSES=1 counts too."""
    address = {'coordinator': environ[ADDRESS]} if ADDRESS in environ else {}
    for size, indices, source in LAUNCHERS:
        hosts = size == 'TPU_WORKER_HOSTNAMES'
        processes = environ.get(size, '').count(',') + 1 if hosts else _number(environ, size)
        if processes > 1 or (size == 'JAX_NUM_PROCESSES' and size in environ):
            index = next((name for name in indices if name in environ), None)
            values = {} if index is None else {'process': _number(environ, index)}
            found = {'coordinator': None} if source in environ else {}
            return {'processes': processes} | values | found | address | _on_this_host(environ)
    return address


def _on_this_host(environ: Mapping[str, str]) -> dict[str, int]:
    if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environ:
        local, locals_ = (_number(environ, f'OMPI_COMM_WORLD_LOCAL_{x}') for x in ('RANK', 'SIZE'))
        return {'local': local, 'locals': locals_}
    if 'SLURM_STEP_TASKS_PER_NODE' in environ:  # such as '2(x3),1': 2, 2, 2, 1
        runs = re.findall(r'(\d+)(?:\(x(\d+)\))?', environ['SLURM_STEP_TASKS_PER_NODE'])
        tasks = [int(count) for count, times in runs for _ in range(int(times or 1))]
        local, node = (_number(environ, f'SLURM_{x}ID') for x in ('LOCAL', 'NODE'))
        return {'local': local, 'locals': tasks[node]}
    return {}


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ.get(name, '0'))
    except ValueError:
        raise UsageError(f'{name} is {environ[name]!r}; it must be a whole number.') from None


def _port(environ: Mapping[str, str]) -> int:
    """Return a port that jobs, and steps of a job, do not share; JAX's own is a whole job's."""
    if 'OMPI_MCA_orte_hnp_uri' in environ:  # '<job * 4096>.0;tcp://...'
        job = int(environ['OMPI_MCA_orte_hnp_uri'].partition('.')[0]) >> 12
    else:
        job = 8 * _number(environ, 'SLURM_JOB_ID') + _number(environ, 'SLURM_STEP_ID')
    return 61440 + job % 4096


def _own_gpus(info: ProcessInfo, environ: Mapping[str, str]) -> list[int] | None:
    """Return this process's share of the visible GPUs; empty: all. JAX's default is one a task.

    None leaves it to JAX_LOCAL_DEVICE_IDS.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in environ:
        return None
    visible = environ.get('CUDA_VISIBLE_DEVICES')
    if visible is None:
        gpus = len(list(Path('/dev').glob('nvidia[0-9]*')))
    else:
        gpus = len([gpu for gpu in visible.split(',') if gpu])
    share = gpus // info.locals
    if info.locals == 1 or not share:  # with fewer GPUs than processes, each was given its own
        return []
    return list(range(info.local * share, (info.local + 1) * share))


# ------------------------------------------------------------------------------------- start

_joined = ProcessInfo(0, 1, None)
_ending = threading.Lock()  # taken by the error that ends this process, and never released


@contextlib.contextmanager
def joined(
    info: ProcessInfo | None,
    request: Mapping[str, Any],
    join_timeout_secs: float = 300.0,
    peer_timeout_secs: float = 60.0,
) -> Generator[None]:
    """Connect JAX over all processes, and end together; for a process on its own do nothing.

    An error inside ends this process and, with its sentence and exit code, the others.

    Args:
        info: of this process.
        request: what it is to do, as JSON can hold it: must be the same in all processes.
        join_timeout_secs: how long to wait for all processes.
        peer_timeout_secs: how long a process may send no heartbeat.

    Raises:
        RunError: the port of process 0 is in use, or the processes do not connect.
    """
    if info is None:
        yield
        return
    import jax

    global _joined
    _initialize(info, max(1, int(join_timeout_secs)), max(1, int(peer_timeout_secs)))
    _joined = info
    listener = threading.Thread(target=_obey_last_words, daemon=True)
    listener.start()
    try:
        _check_request(request, 1000 * max(1, int(join_timeout_secs)))
        yield
        jax.distributed.shutdown()
        listener.join()  # Python would not survive its return from C++ at exit
    except Exception as error:
        _end(error)


def _initialize(info: ProcessInfo, join_secs: int, peer_secs: int) -> None:
    import jax

    if info.coordinator is None:
        os.environ.setdefault('JAX_COORDINATOR_PORT', str(_port(os.environ)))
        port = _number(os.environ, 'JAX_COORDINATOR_PORT')
    else:
        port = int(info.coordinator.rpartition(':')[2])
    if info.process == 0:
        _check_port(port)
    _keep_stdout_for_python()
    signal.signal(signal.SIGINT, _interrupt)
    jax.config.update('jax_enable_preemption_service', False)  # see asked_to_leave
    where = f'at {info.coordinator}' if info.coordinator else f'at port {port} of process 0'
    why = (
        f'not all of {info.processes} processes connected {where} within {join_secs} s '
        f'(processes.join_timeout_secs); see the logs of the others, then {AGAIN}.'
    )
    alarm = threading.Timer(join_secs, lambda: _exit(command.report(RunError(why), PROGRAM)))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            info.coordinator,
            info.processes,
            info.process,
            local_device_ids=_own_gpus(info, os.environ),
            # JAX's default needs IPv6.
            coordinator_bind_address=None if socket.has_dualstack_ipv6() else f'0.0.0.0:{port}',
            initialization_timeout=join_secs + 60,  # JAX would end by SIGABRT: the alarm is first
            heartbeat_timeout_seconds=peer_secs,
            shutdown_timeout_seconds=peer_secs,
        )
    except (ValueError, RuntimeError) as error:
        raise RunError(f'the processes do not connect {where} ({error}); {AGAIN}.') from error
    finally:
        alarm.cancel()


def _check_port(port: int) -> None:
    """Raise RunError where another program listens: gRPC would share the port with its own kind."""
    try:
        socket.create_server(('', port), reuse_port=False).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise RunError(
            f'process 0 cannot listen at port {port} ({why}); choose another with '
            f'--coordinator_address=HOST:PORT for all processes.'
        ) from error


def _keep_stdout_for_python() -> None:
    """Send what C++ prints on stdout to nowhere: gloo reports its connections there."""
    sys.stdout.flush()
    python = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(python, 'w', errors='backslashreplace')


def _interrupt(number: int, frame: Any) -> None:
    """Make the first Ctrl-C a SIGTERM; the second ends the process at once."""
    del number, frame
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _check_request(request: Mapping[str, Any], timeout_ms: int) -> None:
    """Raise UsageError, with the keys that differ, in a process not started as process 0 was."""
    own = json.dumps(request)
    if is_first():
        _store().key_value_set(REQUEST, own)
    first = json.loads(_store().blocking_key_value_get(REQUEST, timeout_ms))
    if keys := config_file.differences(first, json.loads(own)):
        raise UsageError(
            f'the flags differ from those of process 0 in {", ".join(keys)}; give all processes '
            f'the same.'
        )
    _store().wait_at_barrier(REQUEST, timeout_ms)


# --------------------------------------------------------------------------------------- end


def _store() -> Any:
    """Return JAX's key-value store; it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def _end(error: BaseException) -> NoReturn:
    """End this process without waiting for the others, and them by its last words.

    After a preemption, where all have saved, they end in order.
    """
    _ending.acquire()
    if isinstance(error, AlexNetError) and error.exit_code >= 128:
        import jax

        jax.distributed.shutdown()
        _exit(command.report(error, PROGRAM) if is_first() else error.exit_code)
    if lost := _is_loss(error):
        with contextlib.suppress(Exception):  # the process that is gone may have left a reason
            _follow(_store().blocking_key_value_get(LAST_WORDS, 1000))
        error = RunError(f'another process is gone ({lost}); {AGAIN}.')
    try:
        code, why = command.report(error, PROGRAM), str(error)
    except Exception:
        traceback.print_exc()
        code, why = 1, f'{type(error).__name__}: {error}'
    with contextlib.suppress(Exception):
        words = {'process': _joined.process, 'code': code, 'why': why}
        _store().key_value_set(LAST_WORDS, json.dumps(words))
    _let_others_hear(1 if lost else 10)
    _exit(code)


def _is_loss(error: BaseException | None) -> str:
    """Return the words of the library that lost a process, wherever in the chain of causes."""
    while error is not None:
        if not isinstance(error, AlexNetError) and LOST.search(text := str(error)):
            return f'{type(error).__name__}: {text.strip().splitlines()[0][:200]}'
        error = error.__cause__ or error.__context__
    return ''


def _obey_last_words() -> None:
    """End with the exit code of the first process that fails, whatever this one waits for."""
    with contextlib.suppress(Exception):  # an orderly shutdown cancels it
        words = _store().blocking_key_value_get(LAST_WORDS, 10**10)
        _ending.acquire()
        _follow(words)


def _follow(text: str) -> NoReturn:
    words = json.loads(text)
    if sys.stderr.isatty():
        sys.stderr.write('\x1b[?25h\n')  # a progress bar has hidden the cursor
    print(f'{PROGRAM}: process {words["process"]}: {words["why"]}', file=sys.stderr)
    _let_others_hear(10)
    _exit(words['code'])


def _let_others_hear(secs: int) -> None:
    """Note that this process ends; process 0, which keeps the store, waits for the others."""
    with contextlib.suppress(Exception):
        _store().key_value_set(f'{LAST_WORDS}/{_joined.process}', 'heard')
        for other in range(1, _joined.processes) if is_first() else ():
            _store().blocking_key_value_get(f'{LAST_WORDS}/{other}', 1000 * secs)
    if is_first():
        time.sleep(1)  # they have noted it and are ending: without the store JAX would abort them


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------- in the middle


def several() -> bool:
    """Return whether this is one of several processes."""
    return _joined.processes > 1


def is_first() -> bool:
    """Return whether this process is the one that logs and writes: 0, or the only one."""
    return _joined.process == 0


def agree(what: str, value: str) -> None:
    """Check that all processes have the same value.

    Raises:
        UsageError: one does not.
    """
    if not several():
        return
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(own)
    odd = [str(i) for i, digest in enumerate(every) if digest.tobytes() != every[0].tobytes()]
    if odd:
        raise UsageError(
            f'{what} of process {", ".join(odd)} differs from that of process 0; give all '
            f'processes the same.'
        )


def wait_for_all(what: str) -> None:
    """Wait until all processes have come to this point."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def asked_to_leave(step: int) -> bool:
    """Return whether a process got SIGTERM: the same answer for the same step in all of them.

    Before the first call SIGTERM ends a process at once, as there is nothing to save.
    """
    import jax
    from jax._src import distributed
    from jax.experimental import multihost_utils

    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update('jax_enable_preemption_service', True)
        distributed.global_state.initialize_preemption_sync_manager()
    return multihost_utils.reached_preemption_sync_point(step)
