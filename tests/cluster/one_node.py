"""A Slurm of one node on loopback, for tests: set up in seconds, taken down without a trace.

    python -m tests.cluster.one_node COMMAND...     # runs it with this Slurm

Its configuration, key, ports, state and logs are its own, in a folder that is removed at
the end. It needs root, and installs Debian's slurm-wlm and munge by apt-get if they are missing.
Tried with Slurm 22.05 (Debian 12), without systemd.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

PROGRAMS = {'munged': 'munge', 'slurmctld': 'slurm-wlm', 'slurmd': 'slurm-wlm'}  # program: package

# Two tasks, however few processors there are. A job that is put into the queue again stays there
# until its old credential has expired (120 s by default), and one that is to end gets KillWait
# seconds from SIGTERM to SIGKILL.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
KillWait=120
MinJobAge=36000
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SetupError(Exception):
    """Slurm cannot be set up here; the sentence names the reason."""


@contextlib.contextmanager
def slurm() -> Generator[dict[str, str]]:
    """The environment in which sbatch, srun, squeue, ... mean a Slurm of our own.

    Raises:
        SetupError: not root, another Slurm runs, or it did not come up.
    """
    refuse_if_impossible()
    install(PROGRAMS)
    folder = Path(tempfile.mkdtemp(prefix='slurm-'))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        environment = configure(folder)
        stack.callback(kill_the_rest, environment)
        for command in daemons(folder):
            stack.enter_context(running(command, folder, environment))
        stack.callback(cancel_all, environment)
        wait_until(lambda: _call(environment, 'sinfo', '-h', '-o', '%T') == 'idle', 120, folder)
        yield environment


def refuse_if_impossible() -> None:
    """Raise in a case where setting up would fail, or be in somebody's way."""
    if os.geteuid():
        raise SetupError('slurmd starts the tasks of others, so it wants root: run this as root.')
    for path in Path('/proc').glob('[0-9]*/comm'):
        with contextlib.suppress(OSError):
            name = path.read_text().strip()
            if name in ('slurmctld', 'slurmd'):
                raise SetupError(
                    f'{name} runs on this machine already (process {path.parent.name}); this '
                    f'test wants a Slurm of its own: stop that one, or test elsewhere.'
                )


def install(programs: dict[str, str]) -> None:
    """Get what is missing of {program: Debian package}."""
    missing = sorted({package for program, package in programs.items() if not _which(program)})
    if not missing:
        return
    for command in (['update'], ['install', '-y', '--no-install-recommends', *missing]):
        done = subprocess.run(
            ['apt-get', '-q', *command],
            env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SetupError(f'apt-get {" ".join(command)} failed:\n{done.stdout}')


def configure(folder: Path) -> dict[str, str]:
    """Write what the daemons read; the environment by which all commands find it."""
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    key = folder / 'munge.key'
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().partition('.')[0]
    text = CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(2))
    (folder / 'slurm.conf').write_text(text)
    (folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')  # 22.05 wants one named
    return {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf')}


def daemons(folder: Path) -> tuple[Sequence[str | Path], ...]:
    """Their command lines, in the foreground, in the order of starting."""
    own = {
        'key-file': 'munge.key',
        'socket': 'munge.socket',
        'pid-file': 'munged.pid',
        'seed-file': 'munged.seed',
        'log-file': 'munged.log',
    }
    munged = (f'--{option}={folder / name}' for option, name in own.items())
    return (
        ('munged', '--foreground', '--force', *munged),  # force: the folder is not munge's
        ('slurmctld', '-D', '-f', folder / 'slurm.conf'),
        ('slurmd', '-D', '-f', folder / 'slurm.conf'),
    )


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str]
) -> Generator[None]:
    """A daemon, while the block lasts."""
    program, *words = command
    with (folder / f'{program}.out').open('w') as log:
        process = subprocess.Popen(
            [_which(str(program)) or program, *words], env=environment, stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def cancel_all(environment: dict[str, str]) -> None:
    """Ask all jobs to end, and give them a little time."""
    _call(environment, 'scancel', '--user=root')
    deadline = time.monotonic() + 10
    while _call(environment, 'squeue', '-h') and time.monotonic() < deadline:
        time.sleep(0.2)


def kill_the_rest(environment: dict[str, str]) -> None:
    """End what would outlive slurmd: all that Slurm started is known by its SLURM_CONF."""
    mark = f'\0SLURM_CONF={environment["SLURM_CONF"]}\0'.encode()
    for path in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark in b'\0' + path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def wait_until(condition: Callable[[], bool], secs: float, folder: Path) -> None:
    """Wait; on timeout, show the output of the daemons."""
    deadline = time.monotonic() + secs
    while not condition():
        if time.monotonic() > deadline:
            logs = ''.join(f'\n{p.name}:\n{p.read_text()}' for p in sorted(folder.glob('*.out')))
            raise SetupError(f'Slurm is not up after {secs:g} s.{logs}')
        time.sleep(0.2)


def _call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def _which(program: str) -> str | None:
    return shutil.which(program, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(('127.0.0.1', 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def main() -> int:
    """Run a command with a Slurm at hand; its exit code."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes Slurm down too
    try:
        with slurm() as environment:
            return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    except SetupError as error:
        print(f'one_node: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
