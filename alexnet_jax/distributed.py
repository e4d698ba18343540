"""Several processes as one job: finding each other, agreeing, and noticing that one is gone.

What a launcher starts (srun, mpirun, a pod, a shell) is a guard: a small parent without JAX that
runs the real process as its child. The guards meet first, at process 0's address; they compare what
they were asked to do, start their children together, and watch. JAX alone would end a job that
lost a process by SIGABRT, which no Python code can catch, and would not say who is missing.

    guard 0  <--- signs of life, ends, the verdict --->  guard 1, 2, ...     TCP; guard 0 listens
       |  pipe: signs of life, stderr                        |
    child 0  <---------- jax.distributed ---------->  child 1, 2, ...        collectives
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from alexnet_jax.errors import AlexNetError, RunError, UsageError

CHILD = 'ALEXNET_JAX_CHILD'  # the environment variable by which a child knows its place
AGAIN = 'start all processes again: they go on from the latest checkpoint'
TICK_SECS = 0.1
BEAT_SECS = 0.5  # between two signs of life
SETTLE_SECS = 2.0  # one death makes others: how long ends are gathered before one is blamed


# ----------------------------------------------------------------------------- where are we


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where process 0 is met ('host:port')."""

    process: int
    processes: int
    coordinator: str
    local: int = 0  # which of the processes on this host
    locals: int = 1  # how many they are

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.coordinator.rpartition(':')
        return host.strip('[]'), int(port)


def find_place(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Place | None:
    """This process's place from flags, or else from what the launcher set; None when it is alone.

    Flags go before JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in an indexed Job
    of Kubernetes, JOB_COMPLETION_INDEX), these before what Slurm, Open MPI and Cloud TPU (GKE) set.

    Raises:
        UsageError: places that are incomplete or impossible.
    """
    flags: dict[str, Any] = {'coordinator': coordinator, 'processes': processes, 'process': process}
    given = _variables(environ) | {k: v for k, v in flags.items() if v is not None}
    values = _slurm(environ) | _open_mpi(environ) | _cloud_tpu(environ) | given
    if not values:
        return None
    names = {
        'coordinator': '--coordinator_address',
        'processes': '--num_processes',
        'process': '--process_id',
    }
    missing = [flag for name, flag in names.items() if name not in values]
    if missing and values.get('processes') != 1:
        raise UsageError(f'one of several processes, but which? give {" and ".join(missing)} too.')
    if values['processes'] == 1:
        return None
    place = Place(**values)
    if not 0 <= place.process < place.processes:
        raise UsageError(
            f'--process_id is {place.process}; of {place.processes} processes they are 0 to '
            f'{place.processes - 1}.'
        )
    if not re.fullmatch(r'.+:\d{1,5}', place.coordinator):
        raise UsageError(f'--coordinator_address is {place.coordinator}; write host:port.')
    return place


def _variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """JAX's own variables; a pod's index counts only beside a number of processes."""
    values: dict[str, Any] = {}
    if 'JAX_COORDINATOR_ADDRESS' in environ:
        values['coordinator'] = environ['JAX_COORDINATOR_ADDRESS']
    if 'JAX_NUM_PROCESSES' in environ:
        values['processes'] = _number(environ, 'JAX_NUM_PROCESSES')
        if 'JOB_COMPLETION_INDEX' in environ:
            values['process'] = _number(environ, 'JOB_COMPLETION_INDEX')
    if 'JAX_PROCESS_ID' in environ:
        values['process'] = _number(environ, 'JAX_PROCESS_ID')
    return values


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """A task of srun; the batch script itself is none."""
    if not {'SLURM_STEP_NODELIST', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID'} <= environ.keys():
        return {}
    head = nodes = environ['SLURM_STEP_NODELIST']
    if '[' in nodes or ',' in nodes:  # 'node[003-008],other'
        command = ['scontrol', 'show', 'hostnames', nodes]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        head = listed.stdout.split()[0]
    job, step = (_number(environ, f'SLURM_{name}_ID') for name in ('JOB', 'STEP'))
    tasks_here = re.match(r'\d+', environ.get('SLURM_STEP_TASKS_PER_NODE', '1'))
    return {
        'coordinator': f'{head}:{_port(8 * job + step)}',
        'processes': _number(environ, 'SLURM_STEP_NUM_TASKS'),
        'process': _number(environ, 'SLURM_PROCID'),
        'local': _number(environ, 'SLURM_LOCALID'),
        'locals': int(tasks_here[0]) if tasks_here else 1,
    }


def _open_mpi(environ: Mapping[str, str]) -> dict[str, Any]:
    if 'OMPI_COMM_WORLD_RANK' not in environ:
        return {}
    values: dict[str, Any] = {
        'processes': _number(environ, 'OMPI_COMM_WORLD_SIZE'),
        'process': _number(environ, 'OMPI_COMM_WORLD_RANK'),
        'local': _number(environ, 'OMPI_COMM_WORLD_LOCAL_RANK'),
        'locals': _number(environ, 'OMPI_COMM_WORLD_LOCAL_SIZE'),
    }
    # '<job * 4096>.0;tcp://10.0.0.1,10.1.0.1:34911': mpirun's host, where process 0 runs as a rule
    uri = re.match(r'(\d+)\..*?tcp6?://\[?([^,:\]]+)', environ.get('OMPI_MCA_orte_hnp_uri', ''))
    if uri:
        values['coordinator'] = f'{uri[2]}:{_port(int(uri[1]) >> 12)}'
    return values


def _cloud_tpu(environ: Mapping[str, str]) -> dict[str, Any]:
    hosts = environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
    if len(hosts) < 2:
        return {}
    return {
        'coordinator': f'{hosts[0]}:{_port(0)}',
        'processes': len(hosts),
        'process': _number(environ, 'TPU_WORKER_ID'),
    }


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ.get(name, '0'))
    except ValueError:
        raise UsageError(f'{name} is {environ[name]!r}; it must be a whole number.') from None


def _port(job: int) -> int:
    """One that jobs side by side do not share, out of the way of well-known services."""
    return 61440 + job % 4096


# ------------------------------------------------------------------------------- the children


def child() -> Place | None:
    """The place of this process, if a guard started it."""
    known = os.environ.get(CHILD)
    return Place(**json.loads(known)['place']) if known else None


def is_first() -> bool:
    """Whether this process is the one that logs, writes tables and answers: 0, or the only one."""
    place = child()
    return place is None or place.process == 0


@contextlib.contextmanager
def joined() -> Generator[None]:
    """In a child: JAX over all processes inside, an orderly leave behind. Elsewhere: nothing."""
    place = child()
    if place is None:
        yield
        return
    known = json.loads(os.environ[CHILD])
    threading.Thread(target=_beat, args=(known['alive_fd'],), daemon=True).start()
    _keep_stdout_for_python()
    import jax

    peer_secs = int(known['peer_timeout_secs'])
    port = known['jax_coordinator'].rpartition(':')[2]
    try:
        jax.distributed.initialize(
            known['jax_coordinator'],
            place.processes,
            place.process,
            cluster_detection_method='deactivate',  # all devices that this process sees are its own
            # JAX's default needs IPv6.
            coordinator_bind_address=None if socket.has_dualstack_ipv6() else f'0.0.0.0:{port}',
            initialization_timeout=int(known['join_timeout_secs']),
            heartbeat_timeout_seconds=2 * peer_secs + 10,  # the guards notice first
            shutdown_timeout_seconds=peer_secs,
        )
        yield
        jax.distributed.shutdown()
    except AlexNetError as error:
        if error.exit_code >= 128:  # a signal: all processes leave
            jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError:  # most likely a peer is gone: the guards know more
        time.sleep(2 * SETTLE_SECS)
        end(1, traceback.format_exc())
    except Exception:
        end(1, traceback.format_exc())


def _keep_stdout_for_python() -> None:
    """What C++ prints goes to stderr: gloo chats on stdout, where results are."""
    sys.stdout.flush()
    python = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(python, 'w', errors='backslashreplace')


def end(code: int, last_words: str = '') -> int:
    """A child ends at once, without waiting for its peers; any other process gets `code` back."""
    if child() is None:
        return code
    sys.stderr.write(last_words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree(what: str, value: str) -> None:
    """See that all children hold the same.

    Raises:
        UsageError: one does not.
    """
    if child() is None:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(own)
    odd = [i for i, digest in enumerate(every) if digest.tobytes() != every[0].tobytes()]
    if odd:
        raise UsageError(f'{what} of {_names(odd)} differs from that of process 0; see to it.')


def wait_for_all(what: str) -> None:
    """All children go on together."""
    if child() is not None:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def asked_to_leave(step: int) -> bool:
    """Whether a child got SIGTERM: the same answer for the same step in all of them."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def _beat(alive_fd: int) -> None:
    """Signs of life to the guard; without one to hear them a child would run on unseen."""
    while True:
        try:
            os.write(alive_fd, b'.')
        except OSError:
            os._exit(1)
        time.sleep(BEAT_SECS)


# --------------------------------------------------------------------------------- the guards


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended: its exit code (128 + n after signal n), and that in words."""

    process: int
    code: int
    how: str
    blame: int  # of several that end badly the least is the cause, and the others follow from it
    said_why: bool = False


def guard(
    place: Place,
    asked: Mapping[str, Any],
    join_timeout_secs: float = 300.0,
    peer_timeout_secs: float = 60.0,
) -> int:
    """Run this command line as one of several processes, to its end or that of all.

    Args:
        place: of this process.
        asked: what it is to do, as JSON can hold it: the same for all.
        join_timeout_secs: how long to wait for processes that have not come.
        peer_timeout_secs: how long a process may give no sign of life.

    Returns:
        The exit code; the child has said what there is to say.

    Raises:
        UsageError: the processes were asked to do different things.
        RunError: one did not come, or is gone; its exit code is that of the process at fault.
    """
    join_secs, peer_secs = join_timeout_secs, peer_timeout_secs
    if not (join_secs > 0 and peer_secs > 0):
        raise UsageError('processes.join_timeout_secs and peer_timeout_secs must be positive.')
    with contextlib.ExitStack() as stack:
        meet = _call_the_roll if place.process == 0 else _report_for_duty
        peers, jax_coordinator = meet(place, asked, time.monotonic() + join_secs, join_secs)
        for peer in peers:
            stack.enter_context(peer.line)
        return Guard(place, peers, join_secs, peer_secs).run(jax_coordinator)


@dataclasses.dataclass
class Peer:
    """The guard at the other end of a line."""

    process: int
    host: str
    line: connection.Connection
    heard: float = dataclasses.field(default_factory=time.monotonic)
    ended: bool = False

    def tell(self, **message: Any) -> None:
        """Send; whether it arrives is seen by what comes back."""
        with contextlib.suppress(OSError):
            self.line.send_bytes(json.dumps(message).encode())

    def hear(self) -> Generator[dict[str, Any]]:
        """What has come.

        Raises:
            OSError, EOFError: the line is cut; what came before is yielded first.
        """
        while self.line.poll():
            message = json.loads(self.line.recv_bytes(2**24))
            self.heard = time.monotonic()
            yield message


def _call_the_roll(
    place: Place, asked: Mapping[str, Any], deadline: float, join_secs: float
) -> tuple[list[Peer], str]:
    """Guard 0: wait for all, compare what they were asked, and give the sign to start."""
    host, port = place.address
    there: dict[int, Peer] = {}
    try:
        server = _listen(port)
    except OSError as error:
        raise RunError(
            f'process 0 cannot listen at port {port} ({error.strerror}); choose another with '
            f'--coordinator_address={host}:PORT for all processes.'
        ) from error
    with server:
        while len(there) < place.processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                absent = [i for i in range(1, place.processes) if i not in there]
                why = (
                    f'{_names(absent)} of {place.processes} did not come within {join_secs:g} s '
                    f'(processes.join_timeout_secs); see why in their logs, then {AGAIN}.'
                )
                _dismiss(there.values(), 1, why)
                raise RunError(why)
            for _ in connection.wait([server], timeout=min(left, TICK_SECS)):
                with contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                    peer, hello = _welcome(server)
                    _admit(asked, peer, hello, place, there)
            there = {i: peer for i, peer in there.items() if _still_there(peer)}
    jax_coordinator = f'{host}:{_free_port()}'
    for peer in there.values():
        peer.tell(start=jax_coordinator)
    return list(there.values()), jax_coordinator


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ('::', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(('', port), backlog=1024)


def _free_port() -> int:
    with socket.create_server(('', 0)) as probe:
        return probe.getsockname()[1]


def _welcome(server: socket.socket) -> tuple[Peer, dict[str, Any]]:
    """The guard that calls; a stranger's call raises."""
    line = connection.Connection(server.accept()[0].detach())
    if not line.poll(BEAT_SECS):
        raise EOFError('says nothing')
    hello = json.loads(line.recv_bytes(2**24))
    return Peer(int(hello['process']), str(hello['host']), line), hello


def _still_there(peer: Peer) -> bool:
    try:
        for _ in peer.hear():
            pass
    except (OSError, EOFError):  # it may be started again
        return False
    return True


def _admit(
    asked: Mapping[str, Any], peer: Peer, hello: Mapping[str, Any], place: Place, there: dict
) -> None:
    """Take a guard in, if it is one of us and was asked to do what we were.

    Raises:
        UsageError: it is not, and all are told.
    """
    own, why = json.loads(json.dumps(asked)), ''
    if hello['asked'] != own:
        from alexnet_jax import config  # here, because it brings JAX along

        keys = config.differences(own, hello['asked'])
        why = (
            f'process {peer.process} ({peer.host}) was started otherwise than process 0: '
            f'{", ".join(keys)} differ; give all {place.processes} the same flags.'
        )
    if peer.process in there or not 0 < peer.process < place.processes:
        why = (
            f'{peer.host} calls itself process {peer.process}, as another does; of '
            f'{place.processes} each has its own --process_id, from 0 to {place.processes - 1}.'
        )
    if why:
        _dismiss([*there.values(), peer], 2, why)
        raise UsageError(why)
    there[peer.process] = peer


def _dismiss(peers: Iterable[Peer], code: int, why: str) -> None:
    for peer in peers:
        peer.tell(verdict={'process': 0, 'code': code, 'why': why})


def _report_for_duty(
    place: Place, asked: Mapping[str, Any], deadline: float, join_secs: float
) -> tuple[list[Peer], str]:
    """Guards 1, 2, ...: call guard 0 until it answers, and wait for its sign."""
    lost = (
        f'process 0 was not met at {place.coordinator} within {join_secs:g} s '
        f'(processes.join_timeout_secs); see that it runs and that this address is reached from '
        f'here, then {AGAIN}.'
    )
    while time.monotonic() < deadline:
        try:
            call = socket.create_connection(place.address, timeout=5)
        except OSError:
            time.sleep(TICK_SECS)
            continue
        call.setblocking(True)
        head = Peer(0, place.address[0], connection.Connection(call.detach()))
        hello = {'process': place.process, 'host': socket.gethostname(), 'asked': asked}
        head.tell(**hello)
        try:
            while time.monotonic() < deadline + SETTLE_SECS:
                connection.wait([head.line], timeout=TICK_SECS)
                for message in head.hear():
                    if 'start' in message:
                        return [head], message['start']
                    raise _as_error(message['verdict'])
        except (OSError, EOFError):  # it was another program, or guard 0 is started again
            time.sleep(TICK_SECS)
    raise RunError(lost)


def _as_error(verdict: Mapping[str, Any]) -> AlexNetError:
    error = UsageError(verdict['why']) if verdict['code'] == 2 else RunError(verdict['why'])
    error.exit_code = verdict['code']
    return error


class Guard:
    """Watches a child and its peers until all have ended, or one has ended badly."""

    def __init__(self, place: Place, peers: Sequence[Peer], join_secs: float, peer_secs: float):
        self.place, self.peers = place, peers
        self.join_secs, self.peer_secs = join_secs, peer_secs
        self.ends: dict[int, End] = {}
        self.verdict: dict[str, Any] | None = None
        self.signals = 0

    def run(self, jax_coordinator: str) -> int:
        """The child's story."""
        alive, alive_child = os.pipe()
        os.set_blocking(alive, False)
        self.process = self._start(jax_coordinator, alive_child)
        os.close(alive_child)
        self.alive, self.heard = alive, time.monotonic() + self.join_secs
        relay = Relay(self.process, self.place)
        before = {n: signal.signal(n, self._pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._watch()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill()
            os.close(alive)
        own = self.ends[self.place.process]
        verdict = self.verdict or {'process': own.process, 'code': own.code, 'why': self._why(own)}
        at_fault = verdict['process'] == own.process
        relay.finish(crash=at_fault)
        left = own.code == verdict['code'] == 128 + signal.SIGTERM
        if own.said_why and (at_fault or left):
            return own.code
        raise _as_error(verdict)

    def _start(self, jax_coordinator: str, alive_fd: int) -> subprocess.Popen:
        known = {
            'place': dataclasses.asdict(self.place),
            'jax_coordinator': jax_coordinator,
            'alive_fd': alive_fd,
            'join_timeout_secs': self.join_secs,
            'peer_timeout_secs': self.peer_secs,
        }
        environment = {**os.environ, CHILD: json.dumps(known), **_own_gpus(self.place)}
        return subprocess.Popen(
            [sys.executable, *sys.argv],
            env=environment,
            pass_fds=[alive_fd],
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the guard, which passes it on
        )

    def _pass_on(self, number: int, frame: Any) -> None:
        """The first signal asks all children to save and leave; the second kills."""
        del number, frame
        self.signals += 1
        self.process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def _watch(self) -> None:
        own, next_beat, blame_at, kill_at = self.place.process, 0.0, None, None
        while True:
            now = time.monotonic()
            self._look_after_child(now)
            for peer in self.peers:
                self._listen_to(peer, now)
            if now >= next_beat:
                next_beat = now + BEAT_SECS
                for peer in self.peers:
                    peer.tell(alive=True)
            if self.verdict is not None:
                kill_at = kill_at or now + self._patience()
                if own in self.ends:
                    return
                if now >= kill_at:
                    self._kill()
            elif any(e.code for e in self.ends.values()):
                # Guard 0 judges; the others wait for its word, but not for ever.
                blame_at = blame_at or now + SETTLE_SECS * (1 if own == 0 else 2)
                if now >= blame_at:
                    self._judge()
            elif own in self.ends and (own != 0 or len(self.ends) == self.place.processes):
                return
            connection.wait([peer.line for peer in self.peers if not peer.ended], TICK_SECS)

    def _patience(self) -> float:
        """A child that saves, as all do after a signal, gets its time."""
        saving = self.verdict is not None and self.verdict['code'] == 128 + signal.SIGTERM
        return self.peer_secs if saving else 0.0

    def _look_after_child(self, now: float) -> None:
        own = self.place.process
        with contextlib.suppress(BlockingIOError):
            if os.read(self.alive, 4096):
                self.heard = now
        code = self.process.poll()
        if own in self.ends:
            return
        if code is not None:
            self._note(_ended(own, code))
        elif now - self.heard > self.peer_secs:
            self._kill()
            self._note(self._silent(own))

    def _listen_to(self, peer: Peer, now: float) -> None:
        if peer.ended:
            return
        try:
            for message in peer.hear():
                if 'end' in message:
                    peer.ended = peer.process != 0
                    self._note(End(**message['end']))
                if 'verdict' in message:
                    self.verdict = self.verdict or message['verdict']
        except (OSError, EOFError):
            peer.ended = True
            if peer.process not in self.ends:
                self._note(End(peer.process, 1, 'is gone without a word', blame=0))
        if not peer.ended and now - peer.heard > self.peer_secs:
            peer.ended = True
            self._note(self._silent(peer.process))

    def _silent(self, process: int) -> End:
        limit = f'{self.peer_secs:g} s (processes.peer_timeout_secs)'
        return End(process, 1, f'gave no sign of life for {limit}', blame=1)

    def _note(self, end: End) -> None:
        self.ends[end.process] = end
        if end.process == self.place.process:
            for peer in self.peers:
                peer.tell(end=dataclasses.asdict(end))

    def _judge(self) -> None:
        cause = min((e for e in self.ends.values() if e.code), key=lambda e: e.blame)
        self.verdict = {'process': cause.process, 'code': cause.code, 'why': self._why(cause)}
        if self.place.process == 0:
            for peer in self.peers:
                peer.tell(verdict=self.verdict)

    def _why(self, end: End) -> str:
        hosts = {peer.process: peer.host for peer in self.peers}
        host = hosts.get(end.process, 'not this host')
        if end.process == self.place.process:
            host = socket.gethostname()
        advice = 'see its message' if end.code == 2 else AGAIN
        return f'process {end.process} of {self.place.processes} ({host}) {end.how}; {advice}.'

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _ended(process: int, code: int) -> End:
    """A child's end in words; SIGABRT is how JAX ends when another process is gone."""
    if code >= 0:
        blame = {0: 9, 1: 2, 128 + signal.SIGTERM: 4}.get(code, 0)
        how = f'ended with exit code {code}' + ('' if code == 2 else ', see its message')
        return End(process, code, how, blame, said_why=True)
    number = signal.Signals(-code)
    blame = {signal.SIGABRT: 3, signal.SIGTERM: 4}.get(number, 0)
    return End(process, 128 + number, f'was ended by {number.name}', blame)


def _own_gpus(place: Place) -> dict[str, str]:
    """Several processes on a host share its GPUs, unless the launcher has given each its own."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is None:
        visible = ','.join(str(i) for i in range(len(list(Path('/dev').glob('nvidia[0-9]*')))))
    gpus = [gpu for gpu in visible.split(',') if gpu]
    share = len(gpus) // place.locals
    if place.locals == 1 or len(gpus) < 2 or not share:
        return {}
    return {'CUDA_VISIBLE_DEVICES': ','.join(gpus[place.local * share :][:share])}


class Relay:
    """Hands a child's stderr on: each line with its process in front, unless it is 0's.

    A child that lost a peer ends in a stack trace of C++; it is kept back until it is known
    whether the child itself was at fault.
    """

    NOISE = re.compile(
        r'.*\[Gloo\]|.*peer ranks|Additional GRPC error|:UNKNOWN:|'
        r'[IWE]\d{4} .*(preemption_\w+|coordination_\w+|distributed_runtime)'
    )
    CRASH = re.compile(r'F\d{4} \d\d:\d\d:\d\d|terminate called')

    def __init__(self, process: subprocess.Popen, place: Place):
        self.prefix = f'process {place.process}: ' if place.process else ''
        self.kept: list[str] = []
        self.thread = threading.Thread(target=self._run, args=(process.stderr,), daemon=True)
        self.thread.start()

    def _run(self, stderr: Iterable[bytes]) -> None:
        for raw in stderr:
            line = raw.decode(errors='replace')
            if self.kept or self.CRASH.match(line):
                self.kept.append(line)
            elif not self.NOISE.match(line):
                self._say(line)

    def _say(self, line: str) -> None:
        sys.stderr.write(self.prefix + line)
        sys.stderr.flush()

    def finish(self, crash: bool) -> None:
        """The child has ended; `crash`: by itself, so its stack trace is wanted."""
        self.thread.join(timeout=2)
        for line in self.kept if crash else ():
            self._say(line)


def _names(processes: Sequence[int]) -> str:
    return f'process{"es" if len(processes) > 1 else ""} {", ".join(map(str, processes))}'
