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
from experiments.throughput.results import Row, environment, keep, median
from experiments.throughput.roofline import Work
from experiments.throughput.tables import layer_table
from experiments.throughput.timing import Benchmark, alternate, run_alone

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


def measure_all(flags: argparse.Namespace) -> None:
    """Measure, store and print the nets asked for, at one batch size each."""
    for net in flags.nets:
        usual = steps.QUICKSTART_BATCH if net == 'quickstart' else BATCH[steps.platform()]
        batch_size = (flags.batches or (usual,))[0]
        module, scale = steps.NETS[net]
        devices = module.get_config(scale).mesh.cpu_devices
        row = run_alone(devices, measure, net, batch_size, flags)
        keep(flags.out, 'layers', row)
        print(layer_table(row), flush=True)


def measure(net: str, batch_size: int, flags: argparse.Namespace) -> Row:
    """Measure one net: every piece and the complete step, in turn."""
    module, scale = steps.NETS[net]
    case = baselines.case_of(module.get_config(scale), batch_size, flags.dtype)
    found = list(pieces(case))
    makers = {piece.name: piece.make for piece in found}
    makers |= {what: lambda what=what: baselines.ours(case, what) for what in baselines.PASSES}
    makers |= {'product': lambda: roofline.product(flags.dtype), 'copy': roofline.copying}
    rows, _ = alternate(makers, flags.rounds, min(flags.sample_secs, 0.1))
    secs = {name: median(row['secs']) for name, row in rows.items()}
    rates = roofline.rates(secs['product'], secs['copy'])
    return {
        'net': net,
        'batch_size': batch_size,
        'dtype': flags.dtype,
        'rounds': flags.rounds,
        'flops_per_sec': rates.flops,
        'bytes_per_sec': rates.bytes,
        'step_secs': {what: secs[what] for what in baselines.PASSES},
        'step_limit_secs': {
            what: roofline.step_secs(case.net, batch_size, what, rates) for what in baselines.PASSES
        },
        'pieces': [
            {
                'layer': piece.layer,
                'word': piece.op,
                'direction': piece.direction,
                'secs': rows[piece.name]['secs'],
                'cpu_secs': rows[piece.name]['cpu_secs'],
                'limit_secs': piece.work.secs(rates),
                'bound': piece.work.bound(rates),
                'flops': piece.work.flops,
                'bytes': piece.work.bytes,
            }
            for piece in found
        ],
        **environment(),
    }


# -------------------------------------------------------------------------------------- the pieces


def pieces(case: Case) -> Iterator[Piece]:
    """Yield every operation of the step in the order of the net, then masks and update."""
    net, size = case.net, case.settings.batch_size
    for stage in geometry(net):
        yield from _linear(stage, case)
        shape = stage.output
        for op, after in zip(stage.layer.ops, stage.after, strict=True):
            yield from _op(stage.layer, op, shape, after, case)
            shape = after
    yield _masks(net, size)
    yield _update(case)


def _linear(stage: Stage, case: Case) -> Iterator[Piece]:
    layer, net, size = stage.layer, case.net, case.settings.batch_size
    module: Any = Linear(layer, stage.groups)
    inputs = stage.input if layer.kind == 'conv' else (stage.fan_in * stage.groups,)

    def make(direction: str) -> Benchmark:
        params, x = jax.device_put(case.params[layer.name]), _noise((size, *inputs), net)
        if direction == 'backward' and layer is net.layers[0]:  # the image needs no gradient
            return _backward(lambda params: module.apply({'params': params}, x), params)
        run = {'forward': _forward, 'backward': _backward}[direction]
        return run(lambda params, x: module.apply({'params': params}, x), params, x)

    for direction in ('forward', 'backward'):
        work = roofline.linear(stage, net, size, direction)
        yield Piece(layer.name, 'linear', direction, work, functools.partial(make, direction))


def _op(layer: Layer, op: str, before: Shape, after: Shape, case: Case) -> Iterator[Piece]:
    net, size = case.net, case.settings.batch_size

    def make(measure: Callable[..., Benchmark]) -> Benchmark:
        x = _noise((size, *before), net)
        masks = {layer.name: x > 0}
        return measure(lambda x: AlexNet(net).apply({}, op, x, layer, masks, method='apply_op'), x)

    for direction, measure in (('forward', _forward), ('backward', _backward)):
        work = roofline.follower(before, after, net, size, direction)
        yield Piece(layer.name, op, direction, work, functools.partial(make, measure))


def _masks(net: Net, size: int) -> Piece:
    draw = jax.jit(lambda key: alexnet.draw_masks(key, net, size))
    units = sum(mask.size for mask in jax.eval_shape(draw, jax.random.key(0)).values())
    make = lambda: _repeat(lambda: draw(jax.random.key(0)))  # noqa: E731
    return Piece('all', 'masks', 'forward', Work(bytes=units), make)


def _update(case: Case) -> Piece:
    optimizer = make_optimizer(case.settings, baselines.IMAGES)

    def update(state, grads):
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), jnp.zeros(())

    def make() -> Benchmark:
        params = jax.device_put(case.params)
        grads = jax.tree.map(lambda p: 1e-3 * p, params)
        start = jax.tree.map(jnp.copy, params), optimizer.init(params)
        step = jax.jit(update, donate_argnums=0, compiler_options=cpu.compiler_options())
        return baselines.stateful(lambda state: step(state, grads), start, np.asarray)

    return Piece('all', 'update', 'backward', roofline.update(case.net), make)


def _forward(function: Callable, *arguments: Any) -> Benchmark:
    run = jax.jit(function, compiler_options=cpu.compiler_options())
    return _repeat(lambda: run(*arguments))


def _backward(function: Callable, *arguments: Any) -> Benchmark:
    """Make the transposed program alone: the second result of `jax.vjp` is a pytree."""
    options = cpu.compiler_options()
    y, back = jax.jit(lambda *a: jax.vjp(function, *a), compiler_options=options)(*arguments)
    run = jax.jit(lambda back, dy: back(dy), compiler_options=options)
    return _repeat(lambda: run(back, y))  # any gradient will do


def _repeat(step: Callable[[], Any]) -> Benchmark:
    """Make a benchmark whose result is not used."""
    return dataclasses.replace(baselines.repeated(step), value=lambda result: np.zeros(()))


def _noise(shape: tuple[int, ...], net: Net) -> jax.Array:
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(noise, net.compute_dtype)
