"""How fast a step could be: its operations and bytes over what the machine was measured to do.

A roofline, layer by layer and direction by direction: each takes at least

    max(FLOPs / rate of matrix products, bytes / rate of copying)

and a step at least their sum. FLOPs: two a multiply-add, once forward and twice backward; the first
layer needs no gradient of its input. Bytes: what must come from memory and go back if all that
follows a layer's linear operation were fused with it, and nothing stayed in a cache between layers:

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

import jax
import jax.numpy as jnp

from alexnet_jax.model import Net, Shape, Stage, geometry
from experiments.peers import Contestant

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine does in a second: FLOPs in matrix products, bytes in a copy."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What has to be done at least."""

    flops: int = 0
    bytes: int = 0

    def secs(self, rates: Rates) -> float:
        """The longer of the two."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)

    def bound(self, rates: Rates) -> str:
        """By which of the two it is limited."""
        return 'FLOPs' if self.flops / rates.flops >= self.bytes / rates.bytes else 'bytes'


def layer(stage: Stage, net: Net, batch_size: int, direction: str) -> Work:
    """A layer with all that follows it in one piece."""
    return linear(stage, net, batch_size, direction, result=stage.result)


def linear(
    stage: Stage, net: Net, batch_size: int, direction: str, result: Shape | None = None
) -> Work:
    """A layer's linear operation alone, or up to a later `result`."""
    first = stage.layer is net.layers[0]
    flops, parameters = 2 * batch_size * stage.multiply_adds, FLOAT32_BYTES * stage.parameters
    read, written = (activations(net, batch_size, s) for s in (stage.input, result or stage.output))
    if direction == 'forward':
        return Work(flops, read + written + parameters)
    to_input = 0 if first else read + parameters
    return Work(flops if first else 2 * flops, read + written + to_input + parameters)


def follower(before: Shape, after: Shape, net: Net, batch_size: int, direction: str) -> Work:
    """A word of `then` alone; backward it reads its input and a gradient, and writes one."""
    read, written = (activations(net, batch_size, shape) for shape in (before, after))
    return Work(bytes=read + written + (read if direction == 'backward' else 0))


def update(net: Net) -> Work:
    """Of all parameters."""
    return Work(bytes=5 * FLOAT32_BYTES * sum(stage.parameters for stage in geometry(net)))


def activations(net: Net, batch_size: int, shape: Shape) -> int:
    """Bytes of a batch of them."""
    return jnp.dtype(net.compute_dtype).itemsize * batch_size * math.prod(shape)


def step(net: Net, batch_size: int, what: str) -> list[Work]:
    """The parts of a 'train' step, or of a 'forward' pass."""
    directions = ('forward', 'backward') if what == 'train' else ('forward',)
    parts = [layer(s, net, batch_size, d) for s in geometry(net) for d in directions]
    return [*parts, update(net)] if what == 'train' else parts


def step_secs(net: Net, batch_size: int, what: str, rates: Rates) -> float:
    """Of all parts, one after the other."""
    return sum(part.secs(rates) for part in step(net, batch_size, what))


def step_flops(net: Net, batch_size: int, what: str) -> int:
    """Of all parts."""
    return sum(part.flops for part in step(net, batch_size, what))


# ------------------------------------------------------------------------------ the machine's rates


def product_side() -> int:
    """Side of the square matrices: large enough that the rate no longer grows."""
    return 2048 if jax.default_backend() == 'cpu' else 8192


def product(dtype: str) -> Contestant:
    """Products of square matrices, one feeding the next: 2 * side ** 3 FLOPs each."""
    side = product_side()
    a = jnp.full((side, side), 1 / side, dtype)
    multiply = jax.jit(lambda a, b: a @ b)

    def run(steps: int):
        b = a
        for _ in range(steps):
            b = multiply(a, b)
        return jax.block_until_ready(b)

    return Contestant(run)


def copy_bytes() -> int:
    """Read and written by one step of `copying`."""
    return 2 * (2**28 if jax.default_backend() == 'cpu' else 2**30)


def copying() -> Contestant:
    """One added to a large float32 array, in place: it is read once and written once."""
    increment = functools.partial(jax.jit, donate_argnums=0)(lambda x: x + 1)
    arrays = [jnp.zeros(copy_bytes() // 2 // FLOAT32_BYTES, jnp.float32)]

    def run(steps: int):
        x = arrays.pop()
        for _ in range(steps):
            x = increment(x)
        arrays.append(jax.block_until_ready(x))
        return x[0]

    return Contestant(run)


def rates(product_secs: float, copy_secs: float) -> Rates:
    """From the seconds that a step of each took."""
    return Rates(2 * product_side() ** 3 / product_secs, copy_bytes() / copy_secs)
