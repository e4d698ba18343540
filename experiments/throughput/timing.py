"""Time benchmarks in turn, and compare them by the medians of rounds."""

import dataclasses
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np

from alexnet_jax.parallel import cpu
from experiments.throughput.results import Row, median


def as_array(result: Any) -> np.ndarray:
    """Return a loss or logits."""
    return np.asarray(result, np.float32)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A computation to time.

    Attributes:
        run: does n steps, waits, and returns the result of the last one.
        value: (that result, a loss or logits) -> NumPy array.
    """

    run: Callable[[int], Any]
    value: Callable[[Any], np.ndarray] = as_array


def repeated(step: Callable[[], Any], value: Callable = as_array) -> Benchmark:
    """Make a benchmark that repeats a computation and keeps only the last result."""

    def run(steps: int) -> Any:
        for _ in range(steps):
            result = step()
            cpu.block_on_cpu(result)
        return jax.block_until_ready(result)

    return Benchmark(run, value)


def stateful(step: Callable, start: Any, value: Callable = as_array) -> Benchmark:
    """Make a benchmark of a step whose state may be donated: (state) -> (state, result)."""
    states = [start]

    def run(steps: int) -> Any:
        state, result = states.pop(), None
        for _ in range(steps):
            state, result = step(state)
            cpu.block_on_cpu(result)
        states.append(jax.block_until_ready(state))
        return result

    return Benchmark(run, value)


def alternate(
    makers: Mapping[str, Callable[[], Benchmark]], rounds: int, sample_secs: float
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Run benchmarks in turn; one of PyTorch's that cannot be made or run is a row with the reason.

    Returns:
        {name: {'secs': [of a step, a value a round], 'cpu_secs': [...], 'steps': in a sample}} or
        {name: {'failed': sentence}}; and the last result of each, by name.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Benchmark] = {}
    values: dict[str, np.ndarray] = {}
    for name, make in makers.items():
        try:
            ready[name], rows[name] = _warmed(make, sample_secs)
        except Exception as error:  # PyTorch's compiler may fail in any way; ours may not
            if not name.startswith('torch'):
                raise
            rows[name] = {'failed': f'{type(error).__name__}: {str(error).strip()[:200]}'}
    for _ in range(rounds):
        gc.collect()
        for name, benchmark in ready.items():
            values[name] = _sample(benchmark, rows[name])
    return rows, values


def _warmed(make: Callable[[], Benchmark], sample_secs: float) -> tuple[Benchmark, Row]:
    """Compile and run twice; return the benchmark and the number of steps that fill a sample."""
    start = time.perf_counter()
    benchmark = make()
    benchmark.run(1)
    cpu.keep_freed()
    first_secs = time.perf_counter() - start
    start = time.perf_counter()
    benchmark.run(1)
    steps = max(1, round(sample_secs / (time.perf_counter() - start)))
    return benchmark, {'first_secs': first_secs, 'steps': steps, 'secs': [], 'cpu_secs': []}


def _sample(benchmark: Benchmark, row: Row) -> np.ndarray:
    start, start_cpu = time.perf_counter(), time.process_time()
    result = benchmark.run(row['steps'])
    row['secs'].append((time.perf_counter() - start) / row['steps'])
    row['cpu_secs'].append((time.process_time() - start_cpu) / row['steps'])
    return benchmark.value(result)


def ratio(slow: Row, fast: Row) -> float:
    """Return how many times as fast, the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(slow['secs'], fast['secs'], strict=True))


def best_torch(rows: Mapping[str, Row]) -> str | None:
    """Return the fastest form of PyTorch that ran, if any."""
    torch = [name for name, row in rows.items() if name.startswith('torch') and 'secs' in row]
    return min(torch, key=lambda name: median(rows[name]['secs']), default=None)


def run_alone(cpu_devices: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), on a CPU computed in a process of its own.

    The process gets as many CPU devices as the trainer would use. On an accelerator the function is
    called here, as another process would compete for the memory.
    """
    if jax.default_backend() != 'cpu':
        return function(*arguments)
    os.environ['JAX_NUM_CPU_DEVICES'] = str(max(1, cpu_devices))  # read when JAX is imported
    context = multiprocessing.get_context('spawn')
    try:
        with ProcessPoolExecutor(1, context, cpu.set_up_cpu, (0,)) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        del os.environ['JAX_NUM_CPU_DEVICES']
