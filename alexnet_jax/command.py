"""What the commands `python -m alexnet_jax.ROOM` share: one sentence and an exit code."""

import argparse
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from alexnet_jax.errors import RunError, UsageError, complain


class Parser(argparse.ArgumentParser):
    """One sentence about a wrong command line, and no usage page with it."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UsageError(f'{message} (see {self.prog} --help).')


def run(
    name: str,
    parser: Callable[[], argparse.ArgumentParser],
    act: Callable[[Any], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Run a command to its exit code: 0 done; 1 not, or not all of it; 2 it makes no sense."""
    escape_unencodable()
    try:
        with warnings.catch_warnings():  # Pillow's, of odd files that it reads nevertheless
            warnings.filterwarnings('ignore', module=r'PIL\.')
            return 1 if act(parser().parse_args(argv)) else 0
    except BrokenPipeError:  # who reads stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        return complain(error, name)


def escape_unencodable() -> None:
    """Make stdout and stderr escape what their encoding lacks: names come from users' files."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def say(line: str) -> None:
    """For a person: on stderr, as stdout is for the one result."""
    print(line, file=sys.stderr, flush=True)


def library(name: str, extra: str) -> Any:
    """A library of one of the extras, imported when it is wanted.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        what = f"{name.partition('.')[0]} is not installed: pip install 'alexnet_jax[{extra}]'."
        raise RunError(what) from problem
