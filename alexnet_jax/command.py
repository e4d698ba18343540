"""Code shared by all commands: paths, the argument parser, error messages, exit codes."""

import argparse
import importlib
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from alexnet_jax.errors import AlexNetError, RunError, UsageError


def expand(path: str) -> str:
    """Return a local path from the command line, without outer spaces and with `~` expanded.

    Raises:
        UsageError: it is empty, has a scheme such as gs://, or the home directory is unknown.
    """
    path = path.strip()
    if not path:
        raise UsageError('a path is empty; give a file or a folder.')
    if re.match(r'[A-Za-z][\w+.-]*://', path):
        raise UsageError(
            f'{path} is not a local path; copy or mount it, and give the local folder.'
        )
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # '~nobody'
        raise UsageError(f'{path}: there is no such home directory; give the full path.') from error


def path(text: str) -> Path:
    """Return `expand(text)` as a Path; the `type=` of arguments that name a file."""
    return Path(expand(text))


def ending(*endings: str) -> Callable[[str], Path]:
    """Return the `type=` of an argument that names a file with one of these endings."""

    def parse(text: str) -> Path:
        file = path(text)
        if file.suffix not in endings:
            raise argparse.ArgumentTypeError(f'{file} must end in {" or ".join(endings)}')
        return file

    return parse


def paths(text: str) -> list[Path]:
    """Return the paths in a list separated by commas."""
    return [path(word) for word in text.split(',')]


def positive(text: str) -> int:
    """Return a whole number of at least 1; the `type=` of counts."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{number} must be at least 1')
    return number


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one sentence, without a usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f'{message} (see {self.prog} --help).')

    def add_workdir(self, **options: Any) -> None:
        """Add --workdir; `options` of `add_argument` replace the usual ones."""
        usual: dict[str, Any] = dict(type=path, required=True, help='folder of the run')
        self.add_argument('--workdir', metavar='DIR', **usual | options)

    def add_step(self) -> None:
        """Add --step, a checkpoint of the run."""
        what = 'checkpoint: latest (the default), best, or a step number'
        self.add_argument('--step', default='latest', help=what)

    def add_data_dir(self, **options: Any) -> None:
        """Add --data_dir, the folder of all data sets."""
        what = 'folder of all data sets, if it has moved since training'
        usual: dict[str, Any] = dict(type=expand, help=what)
        self.add_argument('--data_dir', metavar='DIR', **usual | options)

    def add_among(self, more: str = '') -> None:
        """Add --among, the images in which neighbours are searched."""
        what = f'where to search for neighbours: train (the default), or another split{more}'
        self.add_argument('--among', type=expand, default='train', metavar='SPLIT', help=what)

    def add_output(self, *endings: str, help: str) -> None:
        """Add --output, a path with one of the endings."""
        self.add_argument('--output', type=ending(*endings), metavar='FILE', help=help)


def run(
    name: str,
    parser: Callable[[], argparse.ArgumentParser],
    act: Callable[[Any], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Run a command and return its exit code: 0 success, 1 failure of all or a part, 2 misuse.

    Args:
        name: the command's, for error messages.
        parser: returns the parser of `argv`.
        act: takes the parsed arguments; returns a number of failures, or None.
        argv: the command line; `sys.argv` if None.
    """
    for stream in (sys.stdout, sys.stderr):  # names come from users' files
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        try:
            with warnings.catch_warnings():  # Pillow's, about unusual files that it can read
                warnings.filterwarnings('ignore', module=r'PIL\.')
                return 1 if act(parser().parse_args(argv)) else 0
        finally:
            sys.stdout.flush()  # here, to catch BrokenPipeError
    except BrokenPipeError:  # the reader of stdout has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        return report(error, name)


def report(error: BaseException, name: str) -> int:
    """Print an error that the user can act on as one sentence, and return its exit code.

    Any other error is a fault of this program, and is raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    found = actionable(error)
    if found is None:
        raise error
    print(f'{name}: {found}', file=sys.stderr, flush=True)
    return found.exit_code


def actionable(error: BaseException) -> AlexNetError | None:
    """Return the error as one sentence that the user can act on, or None."""
    if isinstance(error, AlexNetError):
        return error
    if isinstance(error, OSError):
        file = f'{error.filename}: ' if error.filename else ''
        return RunError(f'{file}{error.strerror or error}; correct this and run the command again.')
    if 'RESOURCE_EXHAUSTED' in str(error):  # JAX's class for it has had several names
        return RunError(
            'the device does not have enough memory: lower batch_size or loop.eval_batch_size; '
            '--mode=describe estimates what fits.'
        )
    wanted = os.environ.get('JAX_PLATFORMS')
    frames = traceback.walk_tb(error.__traceback__)
    if wanted and any(f.f_globals.get('__name__') == 'jax._src.xla_bridge' for f, _ in frames):
        return UsageError(
            f'JAX cannot use the platform set by the environment variable JAX_PLATFORMS={wanted}: '
            f'unset it, or install the support for that platform.'
        )
    return None


def log(line: str) -> None:
    """Print a line to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def library(name: str, extra: str) -> Any:
    """Import a module of a library that one of the extras installs.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        what = f"{name.partition('.')[0]} is not installed: pip install 'alexnet_jax[{extra}]'."
        raise RunError(what) from problem
