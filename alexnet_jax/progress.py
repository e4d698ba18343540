"""Show the progress of long tasks: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_jax import command

LOG_EVERY_SECS = 30


class ProgressBar:
    """A bar on stderr with a text and the time left; plain lines if stderr is not a terminal.

    Args:
        total: amount of work.
        done: amount at the start.
        report: prints a plain line.
        console: stderr by default.
        shown: False for plain lines even on a terminal, as in all processes but the first.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        report: Callable[[str], None] = command.log,
        console: Console | None = None,
        shown: bool = True,
    ):
        console = console or Console(stderr=True)
        text = TextColumn('{task.description}', markup=False)
        columns = BarColumn(), text, TimeRemainingColumn()
        self.plain, self._report = not (shown and console.is_terminal), report
        self._bar = Progress(*columns, console=console, disable=self.plain)
        self._task = self._bar.add_task('', total=total, completed=done)
        self._bar.start()

    def to(self, done: int, text: str | None = None) -> None:
        """Advance the bar, and replace its text."""
        self._bar.update(self._task, completed=done, description=text)

    def line(self, text: str) -> None:
        """Print a permanent line, above the bar if there is one."""
        if self.plain:
            self._report(text)
        else:
            self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


@contextlib.contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """Yield a function that shows how much of `total` is done.

    It draws a bar on a terminal, and elsewhere prints a line every LOG_EVERY_SECS.
    """
    logged = time.monotonic()
    with contextlib.closing(ProgressBar(total)) as bar:

        def update(done: int) -> None:
            nonlocal logged
            bar.to(done, what)
            if bar.plain and time.monotonic() - logged > LOG_EVERY_SECS:
                logged = time.monotonic()
                bar.line(f'{what}: {done:,} of {total:,} ({done / total:.0%})')

        yield update
