"""How the runs of a sweep are started: as processes of this machine, or as jobs of a cluster.

A launcher has `start(run, place) -> Handle`; a handle is asked whether its run has ended, asked to
save and leave, or killed. No jax here: who starts the runs must not hold the memory they want.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from alexnet_jax import command
from alexnet_jax.errors import RunError, UsageError

REPOSITORY = Path(__file__).resolve().parents[1]


class Place(NamedTuple):
    """Where a run is put on this machine: its own cores, or its own share of a device."""

    cores: tuple[int, ...] = ()  # () for any
    environment: Mapping[str, str] = {}


class Handle(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code, -n after signal n; None while it goes on."""
        ...

    def stop(self) -> None:
        """Ask it to save and leave."""
        ...

    def kill(self) -> None:
        """End it as it stands."""
        ...


# ----------------------------------------------------------------------------------- this machine


def places(parallel: int | None) -> list[Place]:
    """For so many runs side by side; by default one a GPU, and without GPUs one alone.

    On CPUs each run gets its own cores (two runs that share all cores wait for each other at every
    operation). On GPUs they go round; runs that share one get equal parts of its memory.

    Raises:
        UsageError: more runs than cores.
    """
    devices, cores = gpus(), sorted(os.sched_getaffinity(0))
    parallel = parallel or len(devices) or 1
    if not devices:
        if parallel > len(cores):
            raise UsageError(
                f'--parallel={parallel}: there are {len(cores)} cores; {parallel} runs would only '
                f'wait for each other.'
            )
        share = len(cores) // parallel
        return [Place(tuple(cores[i * share : (i + 1) * share])) for i in range(parallel)]
    each = -(-parallel // len(devices))
    memory = {'XLA_CLIENT_MEM_FRACTION': f'{0.9 / each:.3f}'} if each > 1 else {}
    return [
        Place(environment={'CUDA_VISIBLE_DEVICES': devices[i % len(devices)]} | memory)
        for i in range(parallel)
    ]


def gpus() -> list[str]:
    """Names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES takes them."""
    if os.environ.get('JAX_PLATFORMS') == 'cpu':
        return []
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    if named is not None:
        return [name for name in named.split(',') if name]
    if shutil.which('nvidia-smi') is None:
        return []
    query = ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader']
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


class Processes:
    """Runs as children of this process."""

    def start(self, command: Sequence[str], log: Path, place: Place) -> 'Process':
        """Start one; what it says goes to the end of `log`."""
        return Process(command, log, place)


class Process:
    """A child in a session of its own, so that a Ctrl-C at the terminal reaches the sweep alone."""

    def __init__(self, command: Sequence[str], log: Path, place: Place):
        every = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, place.cores or every)  # a child begins with its parent's
            with log.open('ab') as out:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=REPOSITORY,
                    env={**os.environ, **place.environment},
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, every)

    def poll(self) -> int | None:
        """Its exit code, or None."""
        return self._child.poll()

    def stop(self) -> None:
        """SIGTERM: main.py saves at the next step and leaves."""
        self._child.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._child.kill()


# ---------------------------------------------------------------------------------------- submitit


class Submitit:
    """Runs as jobs, through submitit: on Slurm, or by its local executor.

    Args:
        cluster: 'slurm' or 'local'.
        folder: for scripts, pickles and logs; all nodes must see it.
        parameters: as submitit's AutoExecutor.update_parameters takes them.

    Raises:
        RunError: submitit or Slurm is not there.
        UsageError: a parameter makes no sense.
    """

    def __init__(self, cluster: str, folder: Path, **parameters: Any):
        submitit = command.library('submitit', 'sweep')
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except RuntimeError as error:
            raise RunError(f'no {cluster} here ({error}); --launcher=processes?') from error
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f'submitit: {error}.') from error
        self._queue = Queue() if cluster == 'slurm' else None

    def start(self, command: Sequence[str], log: Path, place: Place) -> 'Job':
        """Submit one; the cluster finds the place."""
        del place
        try:
            return Job(self._executor.submit(Work(command, log)), self._queue)
        except Exception as error:  # submitit's own kinds, of sbatch's complaints
            what = ' '.join(str(error).split())
            raise RunError(f'the job could not be submitted: {what[-300:]}') from error


class Work:
    """What a job does; pickled, so it holds plain values while it waits."""

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = list(command), str(log)
        self.child: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run it to its exit code."""
        # Slurm sends the signal to all processes of a job, and main.py would die of it; what is
        # ignored here is ignored by a child.
        ours = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with open(self.log, 'ab') as out:
            self.child = subprocess.Popen(self.command, stdout=out, stderr=out, cwd=REPOSITORY)
        signal.signal(signal.SIGUSR2, ours)
        try:
            # Not wait(): a signal's handler that waits too would lock itself out.
            while self.child.poll() is None:
                time.sleep(0.2)
        except BaseException:  # submitit's local executor cancels by SIGINT
            self.child.terminate()
            raise
        return self.child.returncode

    def checkpoint(self) -> Any:
        """Submitit calls it before the time limit, or when preempted: save, and queue again."""
        submitit = command.library('submitit', 'sweep')
        if self.child is not None:
            self.child.terminate()
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Work(self.command, Path(self.log)))


class Job:
    """A job of submitit's."""

    def __init__(self, job: Any, queue: 'Queue | None'):
        self._job, self._queue = job, queue
        self._seen = time.monotonic()  # when it was last known to be waiting or running

    def poll(self) -> int | None:
        """Its exit code; -SIGTERM when it was ended before it could say one."""
        if self._job.paths.result_pickle.exists():
            return self._result()
        now = time.monotonic()
        if self._queue.holds(self._job.job_id) if self._queue else not self._job.done():
            self._seen = now
        patience = 3 * Queue.EVERY_SECS if self._queue else 1.0  # file systems take a moment
        return None if now - self._seen < patience else -signal.SIGTERM

    def _result(self) -> int:
        try:
            return int(self._job.result())
        except Exception:  # whatever it was; submitit keeps the traceback beside the job's log
            return 1

    def stop(self) -> None:
        """Cancel: Slurm sends SIGTERM to all its processes, and SIGKILL after its KillWait."""
        self._job.cancel(check=False)

    def kill(self) -> None:
        """No more can be done than that."""
        self.stop()


class Queue:
    """Which jobs Slurm still has; asked seldom, and without the accounting that sacct wants."""

    EVERY_SECS = 5.0

    def __init__(self):
        self._asked, self._jobs = -float('inf'), frozenset[str]()

    def holds(self, job_id: str) -> bool:
        """Waiting or running, as of some seconds ago."""
        now = time.monotonic()
        if now - self._asked > self.EVERY_SECS:
            query = ['squeue', '--me', '--noheader', '--format=%A']
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            if done.returncode:  # the controller is away, and the jobs are as they were
                return True
            self._jobs, self._asked = frozenset(done.stdout.split()), now
        return job_id in self._jobs
