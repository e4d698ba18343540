"""Parts that all commands share: paths, the argument parser, one sentence and an exit code."""

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
    """Return a local path that a person typed, without spaces around it and with `~` expanded.

    Raises:
        UsageError: it is empty, has a scheme such as gs://, or there is no such home directory.
    """
    path = path.strip()
    if not path:
        raise UsageError('a path is empty; name a file or a folder.')
    if re.match(r'[A-Za-z][\w+.-]*://', path):
        raise UsageError(f'{path} is not a local path; copy or mount it, and name that folder.')
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # '~nobody'
        raise UsageError(f'{path}: there is no such home directory; write the path out.') from error


def path(text: str) -> Path:
    """Return `expand(text)` as a Path: the `type=` of every argument that names a file."""
    return Path(expand(text))


def paths(text: str) -> list[Path]:
    """Return several paths with commas between."""
    return [path(word) for word in text.split(',')]


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one sentence, without a usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f'{message} (see {self.prog} --help).')

    def add_workdir(self, **options: Any) -> None:
        """Add --workdir; `options` are those of `add_argument` that differ."""
        self._add('--workdir', options, type=path, required=True, help='the folder of a run')

    def add_step(self, **options: Any) -> None:
        """Add --step, the checkpoint of a run."""
        what = 'the checkpoint: latest, best or a number'
        self._add('--step', options, default='latest', help=what)

    def add_data_dir(self, **options: Any) -> None:
        """Add --data_dir, the folder of all data sets."""
        what = 'the folder of all data sets, if moved since the run'
        self._add('--data_dir', options, type=expand, help=what)

    def _add(self, flag: str, options: dict[str, Any], **defaults: Any) -> None:
        self.add_argument(flag, **defaults | options)


def run(
    name: str,
    parser: Callable[[], argparse.ArgumentParser],
    act: Callable[[Any], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Run a command and return its exit code: 0 done, 1 not done or not all of it, 2 misused."""
    escape_unencodable()
    try:
        try:
            with warnings.catch_warnings():  # Pillow's, of odd files that it reads nevertheless
                warnings.filterwarnings('ignore', module=r'PIL\.')
                return 1 if act(parser().parse_args(argv)) else 0
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can be handled
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        return report(error, name)


def report(error: BaseException, name: str) -> int:
    """Print an error that a person can act on as one sentence, and return its exit code.

    Any other error is raised again: a fault of this program, whose traceback is wanted.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    found = actionable(error)
    if found is None:
        raise error
    print(f'{name}: {found}', file=sys.stderr, flush=True)
    return found.exit_code


def actionable(error: BaseException) -> AlexNetError | None:
    """Return the error as one sentence that a person can act on, or None."""
    if isinstance(error, AlexNetError):
        return error
    if isinstance(error, OSError):
        where = f' ({error.filename})' if error.filename else ''
        return RunError(f'{error.strerror or error}{where}; see to it, and run it again.')
    if 'RESOURCE_EXHAUSTED' in str(error):  # of JAX, whose class has had several names
        return RunError(
            'the device has not enough memory for this: set batch_size or loop.eval_batch_size '
            'smaller; --mode=describe says what fits.'
        )
    wanted = os.environ.get('JAX_PLATFORMS')
    frames = traceback.walk_tb(error.__traceback__)
    if wanted and any(f.f_globals.get('__name__') == 'jax._src.xla_bridge' for f, _ in frames):
        return UsageError(
            f'JAX cannot use the platform of the environment variable JAX_PLATFORMS={wanted}: '
            f'unset it, or install what that platform needs.'
        )
    return None


def escape_unencodable() -> None:
    """Make stdout and stderr escape what their encoding lacks: names come from users' files."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def log(line: str) -> None:
    """Print a line to stderr, as stdout is for the one result."""
    print(line, file=sys.stderr, flush=True)


def library(name: str, extra: str) -> Any:
    """Import a library of one of the extras, when it is wanted.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        what = f"{name.partition('.')[0]} is not installed: pip install 'alexnet_jax[{extra}]'."
        raise RunError(what) from problem
