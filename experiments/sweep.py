"""Several configs, overrides and seeds: planned, run side by side, continued where they stopped.

    python -m experiments.sweep contribution_table --scale=quickstart --seeds=3 --parallel=2
    python -m experiments.sweep my_sweep.py --dry_run        # prints the commands
    python -m experiments.sweep contribution_table --launcher=slurm --partition=gpu --gpus=1

A sweep is a small Python file of plain values, in experiments/ or named by its path:

    CONFIGS = ('alexnet', 'ablation_lrn')       # of configs/, or files; 'ablation_depth:conv3' with
                                                # an argument behind the scale
    OVERRIDES = {                               # optional: each config is run with each of them
        'batch64': {'batch_size': 64},
        'batch256': {'batch_size': 256},
    }
    SCALE, SEEDS = 'quickstart', 3              # optional: what --scale and --seeds are by default

A run lies in workdirs/<sweep>-<scale>/<config>[-<override>]-<seed>, with what it says in log.txt
there. A finished one is passed by, one that was cut off goes on, one that fails is reported at the
end and does not stop the rest. The same command after a Ctrl-C, a SIGTERM or a power cut goes on
where all was, and several machines that share the folder share the work: none takes a run that
another is at. Compiled programs are kept beside the runs, for all of them.
"""

import argparse
import dataclasses
import datetime
import enum
import fcntl
import importlib.util
import json
import re
import shlex
import signal
import sys
import time
from ast import literal_eval
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from alexnet_jax import command, records, workdir
from alexnet_jax import config as configuration
from alexnet_jax.command import say
from alexnet_jax.errors import RunError, UsageError, gist
from experiments import launchers
from experiments.launchers import REPOSITORY, Handle, Place

# ----------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Run:
    """One of a sweep."""

    row: str  # config and override, the same for all seeds
    seed: int
    config: str  # as --config takes it
    overrides: Mapping[str, Any]
    workdir: Path
    epochs: float

    @property
    def name(self) -> str:
        """Of its workdir."""
        return self.workdir.name

    @property
    def log(self) -> Path:
        """What it says."""
        return self.workdir / 'log.txt'

    @property
    def command(self) -> list[str]:
        """By which it is started, and goes on."""
        flags = [f'--config={self.config}', f'--workdir={self.workdir}']
        values = [f'--config.{key}={value}' for key, value in self.overrides.items()]
        return [sys.executable, 'main.py', *flags, *values]


def plan(name: str, folder: Path, scale: str, seeds: int, common: Mapping[str, Any]) -> list[Run]:
    """All runs of a sweep, seed after seed, so that a table fills evenly.

    Args:
        name: of a sweep in experiments/, or the path of its file.
        folder: that holds the workdirs; made a folder of this sweep and scale.
        scale: of the configs; '' for the sweep's own.
        seeds: 0 to seeds - 1; 0 for the sweep's own.
        common: overrides of all runs.

    Raises:
        UsageError: the sweep, a config or an override makes no sense, or a workdir holds a run of
            another config.
    """
    sweep = load(name)
    scale = scale or getattr(sweep, 'SCALE', 'quickstart')
    folder = folder.absolute() / f'{Path(name).stem}-{scale}'
    variants = getattr(sweep, 'OVERRIDES', None) or {'': {}}
    runs = []
    for seed in range(seeds or getattr(sweep, 'SEEDS', 3)):
        for entry in sweep.CONFIGS:
            for variant, values in variants.items():
                overrides = {**values, **common, 'seed': seed}
                stem = '_'.join(Path(part).stem for part in entry.split(':'))
                row = f'{stem}-{variant}' if variant else stem
                place = folder / f'{row}-{seed}'
                runs.append(_run(row, seed, entry, scale, overrides, place))
    if len({run.name for run in runs}) < len(runs):
        raise UsageError(f'{name}: two runs have the same name; name CONFIGS and OVERRIDES apart.')
    return runs


def load(name: str) -> Any:
    """The module of a sweep.

    Raises:
        UsageError: there is none of that name, or it lists no CONFIGS.
    """
    own = Path(__file__).parent / f'{name}.py'
    path = Path(name) if name.endswith('.py') else own
    if not path.is_file():
        raise UsageError(f'there is no sweep {path}; see python -m experiments.sweep --help.')
    module = _module(path)
    if not getattr(module, 'CONFIGS', None):
        raise UsageError(f'{path} is no sweep: it has no CONFIGS.')
    return module


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f'{path} is no Python file.')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(
    row: str, seed: int, entry: str, scale: str, overrides: Mapping[str, Any], place: Path
) -> Run:
    """A run, after a look at its config: what is wrong with that is said before anything starts."""
    file, _, argument = entry.partition(':')
    file = file if file.endswith('.py') else f'configs/{file}.py'
    words = ','.join(word for word in (scale, argument) if word)
    if not (REPOSITORY / file).is_file():
        raise UsageError(f'there is no config {file}.')
    config = resolve(REPOSITORY / file, words, overrides, row)
    if (place / 'config.json').exists():
        old = json.loads((place / 'config.json').read_text())
        new = json.loads(configuration.as_json(config))
        keys = {*configuration.differences(old, new)} - {*workdir.MAY_DIFFER}
        last = new['model']['layers'][-1]
        if not new['model'][last]['features']:  # as many as the data had classes
            keys -= {f'model.{last}.features'}
        if keys:
            raise UsageError(
                f'{place} holds a run of another config, different in {", ".join(sorted(keys))}; '
                f'move it away, or name other --workdirs.'
            )
    return Run(row, seed, f'{file}:{words}', overrides, place, float(config.epochs))


def resolve(file: Path, words: str, overrides: Mapping[str, Any], row: str) -> Any:
    """The config that main.py will make of it: a ConfigDict, validated.

    Raises:
        UsageError: it makes no sense.
    """
    try:
        config = _module(file).get_config(words)
        config.lock()
        config.update_from_flattened_dict(overrides)
        configuration.unpack(config)
    except UsageError as error:
        raise UsageError(f'{row}: {error}') from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f'{row}: {gist(error)}') from error
    return config


# ------------------------------------------------------------------------------------ how far it is


class State(enum.Enum):
    """Of a run; the value is how a table says it."""

    WAITING = 'waiting'
    RUNNING = 'running'
    ELSEWHERE = 'elsewhere'  # another process trains it, here or on another machine
    DONE = 'done'
    FAILED = 'failed'
    STOPPED = 'stopped'


BUSY = 'another process is training'  # main.py's sentence of a workdir that is locked


@dataclasses.dataclass
class Progress:
    """How far a run is."""

    run: Run
    state: State
    fraction: float = 0.0  # of its epochs
    error: float | None = None  # on the test images, top-1, ten views
    sentence: str = ''  # why it failed
    again: int = 0  # how often it was started again after a signal from outside

    def look(self) -> None:
        """Take it from the run's own records."""
        found = records.read(self.run.workdir)
        for record in found:
            if record['kind'] == 'train':
                self.fraction = min(1.0, record['epoch'] / max(self.run.epochs, 1e-9))
            elif record['kind'] == 'test':
                self.fraction, self.error = 1.0, record['ten_views']['top1_error']


def finished(run: Run) -> bool:
    """It has its final record and its predictions."""
    if not (run.workdir / 'predictions_test.npz').exists():
        return False
    return any(record['kind'] == 'test' for record in records.read(run.workdir))


def busy(run: Run) -> bool:
    """Whether a process trains in the workdir; tried with a shared lock, and given back at once."""
    try:
        with (run.workdir / '.lock').open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def last_words(run: Run, code: int) -> str:
    """Why a run ended badly: its own sentence, or the signal."""
    lines = run.log.read_text(errors='replace').split('\n') if run.log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    own = [line for line in said if line.startswith('main.py: ')]
    if code < 0:
        name = signal.Signals(-code).name
        memory = ', as the system does when memory runs out' if code == -signal.SIGKILL else ''
        return f'ended by {name}{memory}.'
    if own and own[-1] == said[-1]:
        return own[-1].removeprefix('main.py: ')
    return said[-1] if said else f'exit code {code}, without a word.'


# ---------------------------------------------------------------------------------------- the sweep


class Sweep:
    """Works through a plan; every state in it can be seen from the workdirs."""

    LOOK_SECS = 5.0  # between looks at what others do
    MOST_AGAIN = 3  # starts of a run that is ended from outside: preempted, or its node gone

    def __init__(self, runs: Sequence[Run], launcher: Any, places: Sequence[Place]):
        self.progress = [Progress(run, State.WAITING) for run in runs]
        self.launcher, self.free = launcher, list(places)
        self.started: dict[str, tuple[Progress, Handle, Place]] = {}
        self.looked, self.begin = -float('inf'), time.monotonic()
        for own in self.progress:
            own.look()
            if finished(own.run):
                own.state = State.DONE
        self.fraction_before = self.fraction()

    def of(self, *states: State) -> list[Progress]:
        """The runs in these states, in the plan's order."""
        return [own for own in self.progress if own.state in states]

    def fraction(self) -> float:
        """How much of the sweep's epochs is done."""
        total = sum(own.run.epochs for own in self.progress)
        return sum(own.fraction * own.run.epochs for own in self.progress) / max(total, 1e-9)

    def secs_left(self) -> float | None:
        """At the pace since this sweep began; None before there is one."""
        done, gained = self.fraction(), self.fraction() - self.fraction_before
        return (1 - done) * (time.monotonic() - self.begin) / gained if gained > 0 else None

    def work(self, screen: 'Screen', poll_secs: float = 0.5) -> int:
        """To the end, or to a signal: the exit code."""
        with Signals() as asked:
            while self.of(State.WAITING, State.RUNNING, State.ELSEWHERE):
                if asked.number:
                    return self.leave(asked, screen, poll_secs)
                self.collect()
                self.look_at_others()
                self.start()
                screen.show(self)
                time.sleep(poll_secs)
        screen.show(self)
        return 1 if self.of(State.FAILED) else 0

    def start(self) -> None:
        """Fill the free places."""
        for own in self.of(State.WAITING):
            if not self.free:
                return
            if finished(own.run):
                own.state = State.DONE
                continue
            if busy(own.run):
                own.state = State.ELSEWHERE
                continue
            place = self.free.pop(0)
            own.run.workdir.mkdir(parents=True, exist_ok=True)
            try:
                handle = self.launcher.start(own.run.command, own.run.log, place)
            except RunError:
                self.free.append(place)
                if not self.started:
                    raise
                return  # a cluster takes so many jobs at a time: later
            self.started[own.run.name] = (own, handle, place)
            own.state = State.RUNNING

    def collect(self) -> None:
        """See how the started ones are; take those that have ended."""
        for name, (own, handle, place) in list(self.started.items()):
            code = handle.poll()
            own.look()
            if code is None:
                continue
            del self.started[name]
            self.free.append(place)
            self.settle(own, code)

    def settle(self, own: Progress, code: int) -> None:
        """What a run that has ended has come to."""
        if finished(own.run):
            own.state = State.DONE
            return
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM) and own.again < self.MOST_AGAIN:
            own.again, own.state = own.again + 1, State.WAITING
            return
        own.sentence = last_words(own.run, code)
        # The log is shared: whoever has the lock may have written behind the sentence that says so.
        elsewhere = BUSY in own.sentence or busy(own.run)
        own.state = State.ELSEWHERE if elsewhere else State.FAILED

    def look_at_others(self) -> None:
        """Runs that another process had: done meanwhile, or left behind and to be taken over."""
        if time.monotonic() - self.looked < self.LOOK_SECS:
            return
        self.looked = time.monotonic()
        for own in self.of(State.WAITING, State.ELSEWHERE):
            own.look()
            if finished(own.run):
                own.state = State.DONE
            elif own.state is State.ELSEWHERE and not busy(own.run):
                own.state = State.WAITING

    def leave(self, asked: 'Signals', screen: 'Screen', poll_secs: float) -> int:
        """Ask all to save and wait for them; at a second signal end them."""
        number, killed = asked.number, False
        screen.line(f'{signal.Signals(number).name}: {len(self.started)} under way save and leave.')
        for _, handle, _ in self.started.values():
            handle.stop()
        while self.started:
            if asked.times > 1 and not killed:
                killed = True
                for _, handle, _ in self.started.values():
                    handle.kill()
            for name, (own, handle, _) in list(self.started.items()):
                code = handle.poll()
                # The local executor of submitit does not wait for those it cancels.
                if code is not None and not busy(own.run):
                    del self.started[name]
                    own.look()
                    own.state = State.DONE if finished(own.run) else State.STOPPED
            screen.show(self)
            time.sleep(poll_secs)
        screen.line('all have left; the same command goes on.')
        return 128 + number


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP, and how often they came."""

    KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.number, self.times = 0, 0

    def __enter__(self) -> 'Signals':
        self._before = {kind: signal.signal(kind, self._note) for kind in self.KINDS}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.number, self.times = number, self.times + 1


# --------------------------------------------------------------------------------------- the screen


class Screen:
    """A table that lives on a terminal; on anything else a line for each thing that happens."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._said: dict[str, State] = {}

    def __enter__(self) -> 'Screen':
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def show(self, sweep: Sweep) -> None:
        """How all is now."""
        if self._live is not None:
            self._live.update(table(sweep), refresh=True)
            return
        for own in sweep.progress:
            if self._said.get(own.run.name, State.WAITING) is not own.state:
                self._said[own.run.name] = own.state
                result = f' {own.error:.2%}' if own.state is State.DONE and own.error else ''
                self.line(f'{own.run.name}: {own.state.value}{result}; {summary(sweep)}')


def table(sweep: Sweep) -> Table:
    """A row a config, a column a seed; the error is of ten views on all test images."""
    seeds = sorted({own.run.seed for own in sweep.progress})
    shown = Table('run', *(f'seed {seed}' for seed in seeds), title=summary(sweep), box=None)
    rows = dict.fromkeys(own.run.row for own in sweep.progress)
    cells = {(own.run.row, own.run.seed): _cell(own) for own in sweep.progress}
    for row in rows:
        shown.add_row(row, *(cells.get((row, seed), '') for seed in seeds))
    return shown


def _cell(own: Progress) -> str:
    if own.state is State.DONE and own.error is not None:
        return f'[green]{own.error:.2%}[/green]'
    if own.state in (State.RUNNING, State.ELSEWHERE, State.STOPPED) and own.fraction:
        return f'{own.state.value} {own.fraction:.0%}'
    return f'[red]{own.state.value}[/red]' if own.state is State.FAILED else own.state.value


def summary(sweep: Sweep) -> str:
    """The sweep in a line."""
    count = {state: len(sweep.of(state)) for state in State}
    words = [f'{count[State.DONE]} of {len(sweep.progress)} done']
    rest = (State.RUNNING, State.ELSEWHERE, State.STOPPED, State.FAILED)
    words += [f'{count[state]} {state.value}' for state in rest if count[state]]
    left = sweep.secs_left()
    if left and count[State.RUNNING]:
        words.append(f'{datetime.timedelta(seconds=round(left))} left')
    return ', '.join(words)


# -------------------------------------------------------------------------------------- the command


def act(args: argparse.Namespace) -> int:
    """Plan, and run or print; 1 if a run failed.

    Raises:
        UsageError: the plan makes no sense.
        RunError: nothing can be started here.
    """
    if args.seeds < 0 or (args.parallel is not None and args.parallel < 1):
        raise UsageError('--seeds and --parallel are counts, from 1.')
    runs = plan(args.sweep, args.workdirs, args.scale, args.seeds, dict(args.override))
    if args.dry_run:
        for run in runs:
            if not finished(run):
                print(shlex.join(run.command))
        return 0
    launcher, places = _launcher(args, runs)
    sweep = Sweep(runs, launcher, places)
    with Screen() as screen:
        code = sweep.work(screen)
    for own in sweep.of(State.FAILED):
        say(f'{own.run.name} failed: {own.sentence} See {own.run.log}')
    if code > 1:
        sys.exit(code)
    print(f'{summary(sweep)}; they lie in {runs[0].workdir.parent}')
    return code


def _launcher(args: argparse.Namespace, runs: Sequence[Run]) -> tuple[Any, Sequence[Place]]:
    if args.launcher == 'processes':
        return launchers.Processes(), launchers.places(args.parallel)
    parameters = {
        'name': runs[0].workdir.parent.name,
        'timeout_min': args.minutes,
        'cpus_per_task': args.cpus,
        'gpus_per_node': args.gpus,
    }
    if args.launcher == 'slurm':
        named = {'slurm_partition': args.partition, 'slurm_account': args.account}
        parameters |= {key: value for key, value in named.items() if value}
    folder = runs[0].workdir.parent / '.submitit'
    count = args.parallel or (len(runs) if args.launcher == 'slurm' else 1)
    return launchers.Submitit(args.launcher, folder, **parameters), [Place()] * count


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.sweep',
        description='Train several configs, overrides and seeds; the same command goes on.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('sweep', help='a sweep in experiments/, as contribution_table or figure1, or a file')
    add('--scale', default='', help='of the configs, as quickstart')
    add('--seeds', type=int, default=0, help='how many, from 0')
    add('--parallel', type=int, help='runs side by side; by default one a GPU, or one')
    add('--workdirs', type=Path, default=Path('workdirs'), help='the folder for all sweeps')
    add('--dry_run', action='store_true', help='print the commands of what is not done')
    kinds = ('processes', 'local', 'slurm')
    add('--launcher', choices=kinds, default=kinds[0], help="local and slurm are submitit's")
    add('--partition', default='', help="Slurm's")
    add('--account', default='', help="Slurm's")
    add('--gpus', type=int, default=0, help='of a job of submitit')
    add('--cpus', type=int, default=1, help='of a job of submitit')
    add('--minutes', type=int, default=1440, help='of a job, until it saves and queues again')
    add('--override', type=_override, action='append', default=[], metavar='KEY=VALUE',
        help='of a config value, in all runs; --config.KEY=VALUE means the same')  # fmt: skip
    return parser


def _override(text: str) -> tuple[str, Any]:
    """'epochs=2' -> ('epochs', 2), for argparse."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' should be KEY=VALUE")
    try:
        return key, literal_eval({'true': 'True', 'false': 'False'}.get(value, value))
    except (ValueError, SyntaxError):
        return key, value


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    # As main.py takes them.
    words = [re.sub(r'^--config\.', '--override=', word) for word in words]
    return command.run('sweep', _parser, act, words)


if __name__ == '__main__':
    sys.exit(main())
