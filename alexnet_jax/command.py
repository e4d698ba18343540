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
    expanded = os.path.expanduser(path)  # leaves '~nobody' as it is
    if not path or expanded[0] == '~' or re.match(r'[A-Za-z][\w+.-]*://', path):
        raise UsageError(
            f'{path or "an empty path"} is not a local path; give a local file or folder.'
        )
    return str(Path(expanded))


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


SHARED: dict[str, dict[str, Any]] = {
    'workdir': dict(type=path, required=True, metavar='DIR', help='folder of the run'),
    'step': dict(default='latest', help='checkpoint: latest (the default), best, or a step number'),
    'data_dir': dict(
        type=expand,
        metavar='DIR',
        help='folder of all data sets, if it has moved since training',
    ),
    'among': dict(
        type=expand,
        default='train',
        metavar='SPLIT',
        help='where to search for neighbours: train (the default), or another split',
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one sentence, without a usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f'{message} (see {self.prog} --help).')

    def add_shared(self, *names: str, **options: Any) -> None:
        """Add flags of SHARED; `options` of `add_argument` replace the usual ones."""
        for name in names:
            self.add_argument(f'--{name}', **SHARED[name] | options)


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
    wanted, frames = os.environ.get('JAX_PLATFORMS'), traceback.extract_tb(error.__traceback__)
    if isinstance(error, AlexNetError):
        pass  # one sentence already
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
        file = f'{error.filename}: ' if error.filename else ''
        error = RunError(f'{file}{reason}; correct this and run the command again.')
    elif 'RESOURCE_EXHAUSTED' in str(error):  # JAX's class for it has had several names
        error = RunError(
            'the device does not have enough memory: lower batch_size or loop.eval_batch_size; '
            '--mode=describe prints what a step needs.'
        )
    elif wanted and frames and frames[-1].filename.endswith('xla_bridge.py'):
        error = UsageError(
            f'JAX cannot use the platform set by the environment variable JAX_PLATFORMS={wanted}: '
            'unset it, or install the support for it.'
        )
    else:
        raise error
    print(f'{name}: {error}', file=sys.stderr, flush=True)
    return error.exit_code


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells in columns, the first row as the header.

    rich.table takes 0.6 ms for a row: half a minute for the predictions of a large folder.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def shown(path: Path | str) -> str:
    """Return a name in printable characters, whatever bytes it consists of."""
    text = str(path).encode('utf-8', 'backslashreplace').decode()
    return text if text.isprintable() else ascii(text)[1:-1]


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
