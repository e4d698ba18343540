"""Processes that read images for this one, as many as there are cores: a parallel gather.

`take(source, numbers)` cuts the numbers into chunks; a thread a process hands them out, and each
process decodes its chunk straight into the memory in which the batch is handed on, so that no image
is sent or copied. There is no order, no position and no state: what is read is a function of the
numbers asked for, whatever the processes do.

The processes know NumPy and Pillow, and not JAX. They end when this one does, however it dies; one
that is killed is an error in whoever waits for its images.

    python -m alexnet_jax.readers CONNECTION MEMORY      # such a process: two file descriptors
"""

import contextlib
import functools
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from alexnet_jax import machine
from alexnet_jax.errors import RunError
from alexnet_jax.stored import Source, Unreadable, close_files

LEAST = 8  # images in a chunk: handing one out costs about 0.1 ms


@functools.cache
def readers(count: int) -> 'Readers':
    """The reader processes, shared by all data sets of this process: `count`, -1 for all cores."""
    return Readers(machine.cores() if count == -1 else count)


class Readers:
    """`count` processes; none at all with 0, and the calling thread reads."""

    def __init__(self, count: int):
        self.count = count
        self._memory = _Memory()
        self._pool = ThreadPoolExecutor(max(count, 1), thread_name_prefix='reader')
        self._own = threading.local()  # a thread's own process
        self._lock = threading.Lock()
        self._images, self._busy_secs = 0, 0.0
        self._processes: list[_Process] = []

    def take(self, source: Source, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [n, H, W, C], labels int32 [n]) of those numbers; from any thread.

        Raises:
            Unreadable: a record is damaged.
            OSError: the system cannot read a file, which may be sound.
            RunError: a process was killed.
        """
        wanted = np.asarray(numbers, np.int64)
        if not self.count:
            images, begin = np.empty((len(wanted), *source.shape), np.uint8), time.perf_counter()
            labels = source.read(wanted.tolist(), images)
            self._note(len(wanted), time.perf_counter() - begin)
            return images, labels
        slot, images = self._memory.array((len(wanted), *source.shape))
        chunk = max(LEAST, -(-len(wanted) // self.count))
        tasks = {
            start: self._pool.submit(self._ask, source, slot, start, wanted[start : start + chunk])
            for start in range(0, len(wanted), chunk)
        }
        labels = np.empty(len(wanted), np.int32)
        try:
            for start, task in tasks.items():
                labels[start : start + chunk] = task.result()
            return images, labels
        finally:  # after an error, others may still write to the memory that is given back here
            for task in tasks.values():
                task.cancel()
            wait(tasks.values())

    @property
    def rate(self) -> float:
        """Images that one of them has read in a second of work, so far."""
        return self._images / self._busy_secs if self._busy_secs else float('nan')

    def _note(self, images: int, secs: float) -> None:
        with self._lock:
            self._images += images
            self._busy_secs += secs

    def _ask(self, source: Source, slot: '_Slot', start: int, numbers: np.ndarray) -> np.ndarray:
        """One chunk, by the process of this thread."""
        if not hasattr(self._own, 'process'):
            self._own.process = _Process(self._memory.descriptor)
            self._processes.append(self._own.process)
        labels, secs = self._own.process.ask(source, (slot.offset, slot.size), start, numbers)
        self._note(len(numbers), secs)
        return labels

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [process.child.pid for process in self._processes if process.child.poll() is None]

    def close(self) -> None:
        """End the processes, which else end with this one."""
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()
        self._memory.close()
        if not self.count:
            close_files()


class _Process:
    """This side of a reader process; one thread's alone."""

    def __init__(self, memory: int):
        self._here, there = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
        words = [sys.executable, '-m', 'alexnet_jax.readers', str(there.fileno()), str(memory)]
        with there:
            self.child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(), memory),
                env=os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'OMP_NUM_THREADS': '1'},
            )
        self._known: dict[Source, int] = {}

    def ask(
        self, source: Source, slot: tuple[int, int], start: int, numbers: np.ndarray
    ) -> tuple[np.ndarray, float]:
        new = source not in self._known
        number = self._known.setdefault(source, len(self._known))
        try:
            self._here.send((number, source if new else None, slot, start, numbers))
            answer = self._here.recv()
        except (EOFError, OSError):
            code = self.child.wait()
            how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
            fewer = max(0, machine.cores() - 1)
            raise RunError(
                f'a process that reads images was ended by {how}; the same command goes on from '
                f'the latest checkpoint, and data.workers={fewer} needs less memory.'
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._here.close()
        self.child.wait()


# ---- memory that is shared ------------------------------------------------------------------


class _Lease:
    """What an array, its views, and JAX while it copies, refer to as long as they look at it."""

    def __init__(self, memory: mmap.mmap, shape: tuple[int, ...]):
        self.memory = memory  # not unmapped before
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self.__array_interface__ = {
            'shape': shape,
            'typestr': '|u1',
            'data': (address, False),
            'version': 3,
        }


@dataclass(eq=False)
class _Slot:
    """A stretch of the shared memory; free when nobody looks at what was lent of it."""

    offset: int
    size: int
    memory: mmap.mmap
    lent: Callable[[], _Lease | None] = lambda: None

    def lend(self, shape: tuple[int, ...]) -> np.ndarray:
        """The uint8 array at its beginning."""
        lease = _Lease(self.memory, shape)
        self.lent = weakref.ref(lease)
        return np.asarray(lease)


class _Memory:
    """Arrays in memory that other processes map too; theirs is used again when they are gone."""

    def __init__(self):
        self.descriptor = _anonymous_file()
        self.close = weakref.finalize(self, os.close, self.descriptor)
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def array(self, shape: tuple[int, ...]) -> tuple[_Slot, np.ndarray]:
        """A uint8 array, not cleared, and where it lies."""
        page = mmap.ALLOCATIONGRANULARITY
        size = -(-max(math.prod(shape), 1) // page) * page
        with self._lock:
            fits = [slot for slot in self._slots if slot.size >= size and slot.lent() is None]
            slot = min(fits, key=lambda slot: slot.size) if fits else self._grow(size)
            return slot, slot.lend(shape)

    def _grow(self, size: int) -> _Slot:
        offset = sum(slot.size for slot in self._slots)
        os.ftruncate(self.descriptor, offset + size)
        memory = mmap.mmap(self.descriptor, size, offset=offset)
        self._slots.append(_Slot(offset, size, memory))
        return self._slots[-1]


def _anonymous_file() -> int:
    """Memory that goes with its last user, and is not bound by the size of /dev/shm."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('images')
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# ---- the other side -------------------------------------------------------------------------


def serve(connection: Connection, memory: int) -> None:
    """Read what is asked for until there is nobody to ask."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the one that asks decides when it is over
        signal.signal(number, signal.SIG_IGN)
    sources: list[Source] = []
    maps: dict[int, mmap.mmap] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            which, source, (offset, size), start, numbers = connection.recv()
            sources += [source] if source is not None else []
            if offset not in maps:
                maps[offset] = mmap.mmap(memory, size, offset=offset)
            connection.send(_read(sources[which], maps[offset], start, numbers))


def _read(
    source: Source, memory: mmap.mmap, start: int, numbers: np.ndarray
) -> tuple[np.ndarray, float] | Exception:
    pixels = int(np.prod(source.shape))
    flat = np.frombuffer(memory, np.uint8, pixels * len(numbers), offset=pixels * start)
    begin = time.perf_counter()
    try:
        labels = source.read(numbers.tolist(), flat.reshape(len(numbers), *source.shape))
    except (Unreadable, OSError) as problem:
        return problem
    return labels, time.perf_counter() - begin


if __name__ == '__main__':
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
