"""Train all combinations of configs, overrides and seeds, and resume them after interruptions.

    python -m experiments.sweep contribution_table --scale=quickstart --seeds=5 --parallel=2
    python -m experiments.sweep my_sweep.py --dry_run        # print the commands
    python -m experiments.sweep contribution_table --launcher=slurm --partition=gpu --gpus=1

A sweep is a Python file of plain values, in experiments/ or named by its path:

    CONFIGS = ('alexnet', 'ablation_lrn')       # of configs/, or files; 'ablation_depth:conv3' with
                                                # an argument behind the scale
    OVERRIDES = {                               # optional: each config is run with each of them
        'batch64': {'batch_size': 64},
        'batch256': {'batch_size': 256},
    }
    SCALE, SEEDS = 'quickstart', 3              # optional: the defaults of --scale and --seeds

A run's workdir is workdirs/<sweep>-<scale>/<config>[-<override>]-<seed>, with its output in log.txt
there. Finished runs are skipped; a run that fails does not stop the rest. After a Ctrl-C, a SIGTERM
or a power cut the same command resumes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_jax import command, config_file
from alexnet_jax import config as configuration
from alexnet_jax.command import log
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.training import metrics

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_SECS = 0.5
Outcomes = Generator[tuple['Run', int]]  # each run with its exit code, when it ends

# ------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    row: str  # config and override, the same for all seeds
    seed: int
    config: str  # as --config takes it
    overrides: Mapping[str, Any]
    workdir: Path

    @property
    def name(self) -> str:
        """Return the name of its workdir."""
        return self.workdir.name

    @property
    def log(self) -> Path:
        """Return the file of its output."""
        return self.workdir / 'log.txt'

    @property
    def command(self) -> list[str]:
        """Return the command that starts or resumes it."""
        flags = [f'--config={self.config}', f'--workdir={self.workdir}']
        values = [f'--config.{key}={value}' for key, value in self.overrides.items()]
        return [sys.executable, 'main.py', *flags, *values]


def finished(workdir: Path) -> bool:
    """Return whether a run was evaluated on the test images at its end."""
    final = any(record['kind'] == 'test' for record in metrics.read(workdir))
    return final and (workdir / 'predictions_test.npz').exists()


def plan(name: str, folder: Path, scale: str, seeds: int, common: Mapping[str, Any]) -> list[Run]:
    """Return all runs of a sweep, seed by seed, so that a table fills evenly.

    `folder` is the parent of all sweeps' folders, `common` are overrides of all runs. A `scale` of
    '' and `seeds` of 0 stand for the sweep's own.
    """
    sweep = load(name)
    scale = scale or sweep.get('SCALE', 'quickstart')
    folder = folder.absolute() / f'{Path(name).stem}-{scale}'
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    variants = sweep.get('OVERRIDES', {'': {}})
    for entry, variant in itertools.product(sweep['CONFIGS'], variants):
        stem = '_'.join(Path(part).stem for part in entry.split(':'))
        row = f'{stem}-{variant}' if variant else stem
        if row in rows:
            raise UsageError(
                f'{name}: two runs have the same name; give CONFIGS and OVERRIDES distinct names.'
            )
        rows[row] = where(entry, scale), {**variants[variant], **common}
        resolve(*rows[row], row)
    return [
        Run(row, seed, config, {**overrides, 'seed': seed}, folder / f'{row}-{seed}')
        for seed in range(seeds or sweep.get('SEEDS', 3))
        for row, (config, overrides) in rows.items()
    ]


def load(name: str) -> dict[str, Any]:
    """Return the values of a sweep's file."""
    path = Path(name) if name.endswith('.py') else Path(__file__).parent / f'{name}.py'
    if not path.is_file():
        raise UsageError(f'there is no sweep {path}; see python -m experiments.sweep --help.')
    values = runpy.run_path(str(path))
    if not values.get('CONFIGS'):
        raise UsageError(f'{path} is not a sweep: it has no CONFIGS.')
    return values


def where(entry: str, scale: str) -> str:
    """Return an entry of CONFIGS as --config takes it: 'configs/alexnet.py:quickstart'."""
    file, _, argument = entry.partition(':')
    file = file if file.endswith('.py') else f'configs/{file}.py'
    return f'{file}:{scale}' + (f',{argument}' if argument else '')


def resolve(config: str, overrides: Mapping[str, Any], row: str) -> Any:
    """Return the ConfigDict that main.py will make of a config, validated."""
    try:
        found = config_file.load(str(REPOSITORY / config), overrides)
        configuration.unpack(found)
    except UsageError as error:
        raise UsageError(f'{row}: {error}') from error
    return found


# ------------------------------------------------------------------------------ on this machine


class Slot(NamedTuple):
    """Share of this machine for a run."""

    prefix: tuple[str, ...] = ()  # of the command: taskset and the run's own cores
    environment: Mapping[str, str] = {}  # the run's own device


def slots(parallel: int | None) -> list[Slot]:
    """Divide this machine; by default one slot a GPU, and one in all without GPUs.

    On CPUs each run gets its own cores, as runs that share all cores wait for each other at every
    operation. Runs that share a GPU get equal parts of its memory.
    """
    devices, cores = gpus(), sorted(os.sched_getaffinity(0))
    parallel = parallel or len(devices) or 1
    if not devices:
        if parallel > len(cores):
            raise UsageError(f'--parallel={parallel} exceeds the {len(cores)} cores; lower it.')
        share = len(cores) // parallel
        shares = (cores[i * share : (i + 1) * share] for i in range(parallel))
        return [Slot(('taskset', '-c', ','.join(map(str, own)))) for own in shares]
    each = -(-parallel // len(devices))
    memory = {'XLA_CLIENT_MEM_FRACTION': f'{0.9 / each:.3f}'} if each > 1 else {}
    shared = [memory | {'CUDA_VISIBLE_DEVICES': device} for device in devices]
    return [Slot(environment=shared[i % len(devices)]) for i in range(parallel)]


def gpus() -> list[str]:
    """Return the names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES takes them."""
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


def start(run: Run, slot: Slot) -> subprocess.Popen:
    """Start a run in its slot, in a session of its own: Ctrl-C reaches the sweep alone."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    with run.log.open('ab') as out:
        return subprocess.Popen(
            [*slot.prefix, *run.command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=REPOSITORY,
            env={**os.environ, **slot.environment},
            start_new_session=True,
        )


def run_here(runs: Sequence[Run], free: list[Slot]) -> Outcomes:
    """Run in the free slots; yield each run with its exit code when it ends.

    Closed early, by a signal, it asks the running ones to save, and waits for them.
    """
    waiting, busy = list(runs), list[tuple[Run, Slot, subprocess.Popen]]()
    try:
        while waiting or busy:
            while waiting and free:
                run, slot = waiting.pop(0), free.pop(0)
                log(f'{run.name}: started')
                busy.append((run, slot, start(run, slot)))
            time.sleep(POLL_SECS)
            for one in [one for one in busy if one[2].poll() is not None]:
                busy.remove(one)
                free.append(one[1])
                yield one[0], one[2].returncode
    finally:
        for *_, child in busy:
            child.terminate()
        for *_, child in busy:
            child.wait()


# --------------------------------------------------------------------------------------- on Slurm


class Job:
    """Work of a submitit job, pickled while it waits."""

    def __init__(self, run: Run):
        self.run = run
        self.child: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run it, and return its exit code."""
        # Slurm sends SIGUSR2 to all processes of a job, and it would end main.py. A child inherits
        # that it is ignored.
        ours = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.child = start(self.run, Slot())
        signal.signal(signal.SIGUSR2, ours)
        try:
            while self.child.poll() is None:  # wait() would deadlock with a handler that waits
                time.sleep(0.2)
        except BaseException:  # submitit's local executor cancels by SIGINT
            self.child.terminate()
            raise
        return self.child.returncode

    def checkpoint(self) -> Any:
        """Save and queue again; submitit calls it before the time limit, or when preempted."""
        submitit = command.library('submitit', 'sweep')
        if self.child is not None:
            self.child.terminate()
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.run))


def run_by_submitit(runs: Sequence[Run], cluster: str, folder: Path, **parameters: Any) -> Outcomes:
    """Submit all runs; yield each with its exit code when its job ends.

    `cluster` is 'slurm', or 'local' for submitit's local executor; its files are in `folder`, on a
    disk that all nodes share. `parameters` are those of AutoExecutor.update_parameters.
    """
    os.environ.setdefault('SUBMITIT_LOG_LEVEL', 'NOCONFIG')  # it would log to stdout
    submitit = command.library('submitit', 'sweep')
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**parameters)
        with executor.batch():  # an array; of a method submitit would not find `checkpoint`
            jobs = [executor.submit(Job(run)) for run in runs]
    except Exception as error:  # submitit's own kinds, from sbatch's messages
        what = ' '.join(str(error).split())[-300:]
        raise RunError(
            f'the jobs could not be submitted ({what}); correct this, or try --launcher=processes.'
        ) from error
    waiting = list(zip(runs, jobs, strict=True))
    log(f'{len(waiting)} jobs submitted')
    try:
        while waiting:
            for run, job in [pair for pair in waiting if pair[1].done()]:
                waiting.remove((run, job))
                yield run, _result(job)
            time.sleep(POLL_SECS)
    finally:
        for _, job in waiting:
            job.cancel(check=False)


def _result(job: Any) -> int:
    try:
        return int(job.result())
    except Exception:  # the traceback is beside submitit's log
        return 1


# ---------------------------------------------------------------------------------------- command


def stop_on_signals() -> None:
    """Exit on the first SIGINT, SIGTERM or SIGHUP; ignore the next while the runs save."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: Any) -> None:
        del frame
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN)
        log(f'{signal.Signals(number).name}: runs are saving and stopping.')
        sys.exit(128 + number)

    for kind in kinds:
        signal.signal(kind, stop)


def outcome(run: Run, code: int) -> str:
    """Return the outcome of a run: 'done', or 'failed' and the error."""
    if finished(run.workdir):
        return 'done'
    text = run.log.read_text(errors='replace').strip() if run.log.exists() else ''
    last = text.rpartition('\n')[2].removeprefix('main.py: ') or 'no output'
    if code < 0:
        memory = ', as the system does when memory runs out' if code == -signal.SIGKILL else ''
        last = f'ended by {signal.Signals(-code).name}{memory}.'
    return f'failed: {last} See {run.log}'


def act(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Plan, and run or print; return 1 if a run failed."""
    runs = plan(args.sweep, args.workdirs, args.scale, args.seeds, overrides)
    left = [run for run in runs if not finished(run.workdir)]
    if args.dry_run:
        for run in left:
            print(shlex.join(run.command))
        return 0
    failed = []
    stop_on_signals()
    try:
        with contextlib.closing(launch(args, left)) as ended:
            for run, code in ended:
                text = outcome(run, code)
                log(f'{run.name}: {text}')
                failed += [run] if text.startswith('failed') else []
    except SystemExit:
        log('all runs have stopped; the same command resumes.')
        raise
    done = sum(finished(run.workdir) for run in runs)
    print(f'{done} of {len(runs)} done, {len(failed)} failed, in {runs[0].workdir.parent}')
    return 1 if failed else 0


SUBMITIT = (
    'slurm_partition', 'slurm_account', 'slurm_array_parallelism', 'gpus_per_node',
    'cpus_per_task', 'timeout_min',
)  # fmt: skip


def launch(args: argparse.Namespace, runs: Sequence[Run]) -> Outcomes:
    """Start the runs by the launcher asked for."""
    if args.launcher == 'processes' or not runs:
        return run_here(runs, slots(args.parallel))
    folder, given = runs[0].workdir.parent, vars(args) | {'slurm_array_parallelism': args.parallel}
    given = {key: given[key] for key in SUBMITIT if given[key] is not None}
    return run_by_submitit(runs, args.launcher, folder / '.submitit', name=folder.name, **given)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.sweep',
        description='Train all combinations of configs, overrides and seeds, and resume them.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = 'name of a sweep in experiments/, for example figure1, or a file'
    add('sweep', type=command.expand, help=what)
    add('--scale', default='', help='scale of the configs, for example quickstart')
    add('--seeds', type=command.positive, default=0, help='number of seeds, starting at 0')
    what = 'concurrent runs (default: one per GPU, or one)'
    add('--parallel', type=command.positive, help=what)
    add('--workdirs', type=command.path, default=Path('workdirs'), help='folder for all sweeps')
    add('--dry_run', action='store_true', help='print the commands of unfinished runs')
    kinds = ('processes', 'local', 'slurm')
    add('--launcher', choices=kinds, default=kinds[0], help='local and slurm use submitit')
    job = parser.add_argument_group('submitit jobs').add_argument
    job('--partition', dest='slurm_partition', help='Slurm partition')
    job('--account', dest='slurm_account', help='Slurm account')
    job('--gpus', dest='gpus_per_node', type=int, default=0, help='GPUs per job')
    job('--cpus', dest='cpus_per_task', type=int, default=1, help='CPUs per job')
    what = 'time limit of a job, after which it saves and requeues'
    job('--minutes', dest='timeout_min', type=int, default=1440, help=what)
    add('--config.KEY', metavar='VALUE', help='override one value in all configs; may be repeated')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words, overrides = config_file.split(sys.argv[1:] if argv is None else argv)
    return command.run('sweep', _parser, lambda args: act(args, overrides), words)


if __name__ == '__main__':
    sys.exit(main())
