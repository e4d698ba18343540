"""Multi-process training: connection, consistency checks, preemption and shared failure handling.

JAX connects the processes and checks their heartbeats. The launcher (srun, mpirun, a Kubernetes
Job) starts them, terminates the remaining ones after a failure, and restarts all of them.
docs/parallelism.md lists for each fault what detects it, how fast, and the exit code.
"""

import contextlib
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
from typing import Any, NoReturn

from alexnet_jax import command, config_file
from alexnet_jax.errors import AlexNetError, RunError, UsageError
from alexnet_jax.parallel import launchers
from alexnet_jax.parallel.launchers import ProcessInfo

AGAIN = 'start all processes again to resume from the latest checkpoint'
PROGRAM = 'main.py'
# Words of gloo, NCCL and JAX's coordination service for the loss of a process.
LOST = re.compile(r'gloo|nccl|coordination|heartbeat', re.IGNORECASE)
# Keys of JAX's key-value store.
FAILURE = 'alexnet_jax/failure'
REQUEST = 'alexnet_jax/request'

_joined = ProcessInfo(0, 1, None)
_ending = threading.Lock()  # taken by the error that ends this process, and never released


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
        _check_request(request, 1000 * int(join_timeout_secs))
        yield
        jax.distributed.shutdown()
        listener.join()  # Python crashes if a thread returns from C++ at exit
    except Exception as error:
        _end(error)


def _initialize(info: ProcessInfo, join_secs: int, peer_secs: int) -> None:
    import jax

    if info.coordinator is None:
        os.environ.setdefault('JAX_COORDINATOR_PORT', str(launchers.coordinator_port(os.environ)))
        port = launchers.number(os.environ, 'JAX_COORDINATOR_PORT')
    else:
        port = int(info.coordinator.rpartition(':')[2])
    if info.process == 0:
        _check_port(port)
    _keep_stdout_for_python()
    signal.signal(signal.SIGINT, _interrupt)
    jax.config.update('jax_enable_preemption_service', False)  # see preempted
    where = f'at {info.coordinator}' if info.coordinator else f'at port {port} of process 0'
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
            local_device_ids=launchers.local_gpus(info, os.environ),
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


def _check_port(port: int) -> None:
    """Raise RunError if another program listens at the port; gRPC would share it unnoticed."""
    try:
        socket.create_server(('', port), reuse_port=False).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise RunError(
            f'process 0 cannot listen on port {port} ({why}); choose another with '
            f'--coordinator_address=HOST:PORT for all processes.'
        ) from error


def _keep_stdout_for_python() -> None:
    """Discard the stdout of C++ code: gloo prints its connections there."""
    sys.stdout.flush()
    python = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(python, 'w', errors='backslashreplace')


def _interrupt(number: int, frame: Any) -> None:
    """Turn the first Ctrl-C into a SIGTERM; the second ends the process at once."""
    del number, frame
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _check_request(request: Mapping[str, Any], timeout_ms: int) -> None:
    """Raise UsageError, with the keys that differ, if process 0 has another request."""
    own = json.dumps(request)
    if is_first():
        _store().key_value_set(REQUEST, own)
    first = json.loads(_store().blocking_key_value_get(REQUEST, timeout_ms))
    if keys := config_file.differences(first, json.loads(own)):
        raise UsageError(
            f'the flags differ from those of process 0 in {", ".join(keys)}; give all processes '
            f'the same flags.'
        )
    _store().wait_at_barrier(REQUEST, timeout_ms)


# --------------------------------------------------------------------------------- failure


def _store() -> Any:
    """Return JAX's key-value store; it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


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
    _wait_for_readers(1 if lost else 10)
    _exit(code)


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
    if sys.stderr.isatty():
        sys.stderr.write('\x1b[?25h\n')  # a progress bar has hidden the cursor
    print(f'{PROGRAM}: process {failure["process"]}: {failure["why"]}', file=sys.stderr)
    _wait_for_readers(10)
    _exit(failure['code'])


def _wait_for_readers(secs: int) -> None:
    """Acknowledge a failure; process 0, which hosts the store, waits until all have."""
    with contextlib.suppress(Exception):
        _store().key_value_set(f'{FAILURE}/{_joined.process}', 'read')
        for other in range(1, _joined.processes) if is_first() else ():
            _store().blocking_key_value_get(f'{FAILURE}/{other}', 1000 * secs)
    if is_first():
        time.sleep(1)  # the others are ending; JAX aborts a process that loses the store


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


def agree(what: str, value: bytes) -> None:
    """Check that this process has the same value as process 0.

    Raises:
        UsageError: it has not.
    """
    digest = hashlib.sha256(value).hexdigest()
    if is_first():
        _store().key_value_set(what, digest)
    elif digest != _store().blocking_key_value_get(what, 10**8):
        raise UsageError(
            f'{what} of process {_joined.process} differs from that of process 0; give all '
            f'processes the same.'
        )


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
    from jax._src import distributed
    from jax.experimental import multihost_utils

    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update('jax_enable_preemption_service', True)
        distributed.global_state.initialize_preemption_sync_manager()
    return multihost_utils.reached_preemption_sync_point(step)
