"""Start main.py in a process of its own, which a test may kill, stop or signal.

The process is forked from one that has imported all modules: imports take longer than most runs of
tests. What follows the imports is as `python main.py` does it, up to the exit code.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import main
from alexnet_jax import command, config_file
from tests.conftest import REPOSITORY

SECS = 240  # no limit of the program: a hung test ends
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
    [__name__, 'alexnet_jax.analysis.describe', 'alexnet_jax.training.train', 'tensorboardX']
)


class Program:
    """A process of main.py.

    Args:
        words: its command line.
        folder: of the files of its output.
        name: of these files, if several processes share the folder.
        devices: that a CPU appears as; 0: as the config wants.
        cwd: its working directory.
        environ: more environment variables.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        name: str = '',
        devices: int = 0,
        cwd: Path = REPOSITORY,
        **environ: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f'{stream}{name}' for stream in ('out', 'err')]
        for file in self._files:
            file.write_text('')
        args = (list(words), self._files, devices, cwd, environ)
        self._process = FORKS.Process(target=_run_main, args=args, daemon=True)
        self._process.start()

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.strip().splitlines()[-1]

    def running(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int | None:
        """Wait for the end; return the exit code, or minus the signal that ended the process."""
        self._process.join(SECS)
        self._process.kill()
        return self._process.exitcode

    def wait_for_step(self, step: int) -> None:
        """Wait until this process has logged a step from `step` on."""
        deadline = time.monotonic() + SECS
        while not any(int(n) >= step for n in re.findall(r'^step (\d+)/', self.err, re.MULTILINE)):
            assert self.running(), self.err
            assert time.monotonic() < deadline, f'step {step} was never reached: {self.err}'
            time.sleep(0.02)

    def kill(self) -> None:
        """End the process at once."""
        self.send(signal.SIGKILL)
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL, self.err


def _run_main(
    words: list[str], files: list[Path], devices: int, cwd: Path, environ: dict[str, str]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.update(environ)
    jax.config.update('jax_num_cpu_devices', devices or -1)  # conftest.py has set another number
    others, values = config_file.split(words)
    sys.exit(command.run('main.py', main.parser, lambda flags: main.main(flags, values), others))
