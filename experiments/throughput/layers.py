"""Time each layer's operations alone, forward and backward, and compare with their rooflines.

An operation is run as the net runs it, jitted by itself, on noise of the real shapes; backward is
the transposed program alone, given what forward saved. In the complete step the compiler fuses
neighbours, so that it may take less than the sum.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import AlexNet, Layer, Linear, Net, Shape, Stage, geometry
from alexnet_jax.parallel import cpu
from alexnet_jax.training.step import make_optimizer
from experiments.throughput import baselines, roofline, steps
from experiments.throughput.baselines import Case
from experiments.throughput.results import Row, environment, median
from experiments.throughput.roofline import Work
from experiments.throughput.timing import Benchmark, alternate, repeated, run_alone, stateful

BATCH = {'cpu': 64, 'gpu': 128}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One operation of one layer, in one direction."""

    layer: str
    op: str  # 'linear', one of the layer's ops, 'update' or 'masks'
    direction: str
    work: Work
    make: Callable[[], Benchmark]

    @property
    def name(self) -> str:
        """Return the name of its benchmark."""
        return f'{self.layer} {self.op} {self.direction}'


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure the nets asked for, at one batch size each; yield their rows."""
    for net in flags.nets:
        usual = steps.QUICKSTART_BATCH if net == 'quickstart' else BATCH[steps.platform()]
        batch_size = (flags.batches or (usual,))[0]
        yield run_alone(steps.config_of(net).mesh.cpu_devices, measure, net, batch_size, flags)


def measure(net: str, batch_size: int, flags: argparse.Namespace) -> Row:
    """Measure one net: every piece and the complete step, in turn."""
    case = baselines.case_of(steps.config_of(net), batch_size, flags.dtype)
    found = list(pieces(case))
    makers = {piece.name: piece.make for piece in found}
    makers |= {what: lambda what=what: baselines.ours(case, what) for what in baselines.PASSES}
    makers |= roofline.benchmarks(flags.dtype)
    rows, _ = alternate(makers, flags.rounds, min(flags.sample_secs, 0.1))
    rates = roofline.take_rates(rows)

    def row(piece: Piece) -> Row:
        times = {key: rows[piece.name][key] for key in ('secs', 'cpu_secs')}
        names = {'layer': piece.layer, 'word': piece.op, 'direction': piece.direction}
        bound = {'limit_secs': piece.work.secs(rates), 'bound': piece.work.bound(rates)}
        return {**names, **times, **bound, **dataclasses.asdict(piece.work)}

    limits = {
        what: roofline.step_secs(case.net, batch_size, what, rates) for what in baselines.PASSES
    }
    return {
        'net': net,
        'batch_size': batch_size,
        'dtype': flags.dtype,
        'rounds': flags.rounds,
        'flops_per_sec': rates.flops,
        'bytes_per_sec': rates.bytes,
        'step_secs': {what: median(rows[what]['secs']) for what in baselines.PASSES},
        'step_limit_secs': limits,
        'pieces': [row(piece) for piece in found],
        **environment(),
    }


def pieces(case: Case) -> Iterator[Piece]:
    """Yield every operation of the step in the order of the net, then masks and update."""
    net, size = case.net, case.settings.batch_size
    bind = functools.partial
    for stage in geometry(net):
        layer, shape = stage.layer, stage.output
        work = bind(roofline.linear, stage, net, size)
        yield from _both(layer.name, 'linear', work, bind(_linear, stage, case))
        for op, after in zip(layer.ops, stage.after, strict=True):
            work = bind(roofline.follower, shape, after, net, size)
            yield from _both(layer.name, op, work, bind(_op, layer, op, shape, case))
            shape = after
    draw = jax.jit(lambda key: alexnet.draw_masks(key, net, size))
    units = sum(mask.size for mask in jax.eval_shape(draw, jax.random.key(0)).values())
    masks = bind(_forward, draw, (jax.random.key(0),))
    yield Piece('all', 'masks', 'forward', Work(bytes=units), masks)
    yield Piece('all', 'update', 'backward', roofline.update(net), bind(_update, case))


def _both(
    layer: str, op: str, work: Callable[[str], Work], arguments: Callable[[], tuple]
) -> Iterator[Piece]:
    for direction, make in (('forward', _forward), ('backward', _backward)):
        yield Piece(layer, op, direction, work(direction), lambda make=make: make(*arguments()))


def _linear(stage: Stage, case: Case) -> tuple[Callable, tuple, tuple]:
    """Return a layer's linear operation, its differentiable arguments and its constants."""
    layer, net, size = stage.layer, case.net, case.settings.batch_size
    module: Any = Linear(layer, stage.groups)
    inputs = stage.input if layer.kind == 'conv' else (stage.fan_in * stage.groups,)
    params, x = jax.device_put(case.params[layer.name]), _noise((size, *inputs), net)

    def run(params, x):
        return module.apply({'params': params}, x)

    first = layer is net.layers[0]  # the image needs no gradient
    return (run, (params,), (x,)) if first else (run, (params, x), ())


def _op(layer: Layer, op: str, before: Shape, case: Case) -> tuple[Callable, tuple, tuple]:
    """Return one of a layer's ops, its differentiable arguments and its constants."""
    x = _noise((case.settings.batch_size, *before), case.net)

    def run(x, masks):
        return AlexNet(case.net).apply({}, op, x, layer, masks, method='apply_op')

    return run, (x,), ({layer.name: x > 0},)


def _update(case: Case) -> Benchmark:
    optimizer = make_optimizer(case.settings, baselines.IMAGES)
    params = jax.device_put(case.params)
    grads = jax.tree.map(lambda p: 1e-3 * p, params)

    def update(state, grads):
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), ()

    step = jax.jit(update, donate_argnums=0, compiler_options=cpu.compiler_options())
    start = jax.tree.map(jnp.copy, params), optimizer.init(params)
    return stateful(lambda state: step(state, grads), start)


def _forward(function: Callable, arguments: tuple, constants: tuple = ()) -> Benchmark:
    run = jax.jit(function, compiler_options=cpu.compiler_options())
    return repeated(lambda: run(*arguments, *constants), _nothing)


def _backward(function: Callable, arguments: tuple, constants: tuple) -> Benchmark:
    """Make the transposed program alone: the second result of `jax.vjp` is a pytree."""

    def both(arguments, constants):
        return jax.vjp(lambda *arguments: function(*arguments, *constants), *arguments)

    options = cpu.compiler_options()
    y, back = jax.jit(both, compiler_options=options)(arguments, constants)
    run = jax.jit(lambda back, dy: back(dy), compiler_options=options)
    return repeated(lambda: run(back, y), _nothing)  # any gradient will do


def _nothing(result: Any) -> np.ndarray:
    return np.zeros(())


def _noise(shape: tuple[int, ...], net: Net) -> jax.Array:
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(noise, net.compute_dtype)
