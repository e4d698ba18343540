"""Compute a lower bound on a step's time from its operations and bytes: a roofline.

Each layer takes at least max(FLOPs / rate of matrix products, bytes / rate of copying) in each
direction, and a step at least their sum. FLOPs: two per multiply-add, once forward and twice
backward; the first layer needs no gradient of its input. Bytes: what must come from memory and go
back if all that follows a layer's linear operation were fused with it, and nothing stayed in a
cache between layers:

    forward   input and parameters read, result written
    backward  gradient of the result, input and parameters read; gradients of input and
              parameters written
    update    gradient, parameters and velocity read; parameters and velocity written

activations in the dtype of computing, the rest in float32. Both rates are of this machine, measured
between the steps of the same run: a large product of square matrices in the dtype of computing, and
adding one to a large array in place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alexnet_jax.model.alexnet import Net, Shape, Stage, geometry
from experiments.throughput.results import Row, median
from experiments.throughput.timing import Benchmark, stateful

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Rates:
    """FLOPs a second of this machine in matrix products, and bytes a second in a copy."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Work:
    """Fewest operations and bytes of a computation."""

    flops: int = 0
    bytes: int = 0

    def secs(self, rates: Rates) -> float:
        """Return the longer of the two times."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)

    def bound(self, rates: Rates) -> str:
        """Return which of the two bounds it."""
        return 'FLOPs' if self.flops / rates.flops >= self.bytes / rates.bytes else 'bytes'


def layer(stage: Stage, net: Net, batch_size: int, direction: str) -> Work:
    """Return the work of a layer fused with its ops."""
    return linear(stage, net, batch_size, direction, stage.result)


def linear(
    stage: Stage, net: Net, batch_size: int, direction: str, result: Shape | None = None
) -> Work:
    """Return the work of a layer's linear operation, or of all up to a later `result`."""
    first = stage.layer is net.layers[0]
    flops, parameters = 2 * batch_size * stage.multiply_adds, FLOAT32_BYTES * stage.parameters
    read, written = (activations(net, batch_size, s) for s in (stage.input, result or stage.output))
    if direction == 'forward':
        return Work(flops, read + written + parameters)
    to_input = 0 if first else read + parameters
    return Work(flops if first else 2 * flops, read + written + to_input + parameters)


def follower(before: Shape, after: Shape, net: Net, batch_size: int, direction: str) -> Work:
    """Return the work of one op; backward it reads input and gradient, and writes a gradient."""
    read, written = (activations(net, batch_size, shape) for shape in (before, after))
    return Work(bytes=read + written + (read if direction == 'backward' else 0))


def update(net: Net) -> Work:
    """Return the work of the update of all parameters."""
    return Work(bytes=5 * FLOAT32_BYTES * sum(stage.parameters for stage in geometry(net)))


def activations(net: Net, batch_size: int, shape: Shape) -> int:
    """Return the bytes of a batch of activations."""
    return jnp.dtype(net.compute_dtype).itemsize * batch_size * math.prod(shape)


def step(net: Net, batch_size: int, what: str) -> list[Work]:
    """Return the parts of a 'train' step, or of a 'forward' pass."""
    directions = ('forward', 'backward') if what == 'train' else ('forward',)
    parts = [layer(s, net, batch_size, d) for s in geometry(net) for d in directions]
    return [*parts, update(net)] if what == 'train' else parts


def step_secs(net: Net, batch_size: int, what: str, rates: Rates) -> float:
    """Return the seconds of all parts in sequence."""
    return sum(part.secs(rates) for part in step(net, batch_size, what))


def step_flops(net: Net, batch_size: int, what: str) -> int:
    """Return the FLOPs of all parts."""
    return sum(part.flops for part in step(net, batch_size, what))


def benchmarks(dtype: str) -> dict[str, Callable[[], Benchmark]]:
    """Return the benchmarks that `take_rates` needs."""
    return {'product': lambda: product(dtype), 'copy': copying}


def take_rates(rows: dict[str, Row]) -> Rates:
    """Remove the rows of `benchmarks`, and return the rates."""
    product_secs, copy_secs = (median(rows.pop(name)['secs']) for name in ('product', 'copy'))
    return Rates(2 * product_side() ** 3 / product_secs, copy_bytes() / copy_secs)


def product_side() -> int:
    """Return the side of the square matrices, large enough that the rate no longer grows."""
    return 2048 if jax.default_backend() == 'cpu' else 8192


def product(dtype: str) -> Benchmark:
    """Make products of square matrices, each fed by the one before: 2 * side ** 3 FLOPs."""
    a = jnp.full((product_side(), product_side()), 1 / product_side(), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return stateful(lambda b: (multiply(a, b), ()), a)


def copy_bytes() -> int:
    """Return the bytes read and written by one step of `copying`."""
    return 2 * (2**28 if jax.default_backend() == 'cpu' else 2**30)


def copying() -> Benchmark:
    """Add one to a large float32 array in place: it is read once and written once."""
    increment = functools.partial(jax.jit, donate_argnums=0)(lambda x: x + 1)
    zeros = jnp.zeros(copy_bytes() // 2 // FLOAT32_BYTES, jnp.float32)
    return stateful(lambda x: (increment(x), ()), zeros)
