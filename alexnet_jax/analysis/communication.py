"""Read the communication of a training step from its jaxpr, and its memory from the compiler.

The collectives in the jaxpr are those that the layer table causes: of the model inside `shard_map`,
of their transposes in the backward pass, and the sums of gradients. XLA adds sums of some scalars
(loss, error count, the check for finite values); a test compares the bytes with the compiled
program's, which would also contain communication by mistake.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from alexnet_jax.config import Settings
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training.step import TrainState, init_state, jit_train_step, make_optimizer

IMAGES = 1_281_167  # ILSVRC-2012; only constants of the schedules depend on it
GRADIENT_SCOPE = 'data_parallel'  # the name scope of gradient sums in parallel/mesh.py
KINDS = {  # by the names of JAX's primitives
    'all_gather': 'all-gather',
    'reduce_scatter': 'reduce-scatter',
    'psum': 'all-reduce',
    'psum_invariant': 'all-reduce',
}
# Without LLVM's optimisations the compilation takes half the time. XLA's program is the same.
QUICK_COMPILE = {'xla_backend_optimization_level': '0'}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The arrays of one layer and pass that devices exchange in a step, added up."""

    layer: str  # a name of the layer table
    phase: str  # 'forward', 'backward' or 'gradient' (of parameters)
    kind: str  # one of KINDS' values
    axis: str  # 'data', 'tower' or 'data+tower'
    devices: int  # in each group
    array_bytes: int  # the full array: a gather's result, a reduction's operand on each device

    @property
    def sent_bytes(self) -> int:
        """Return the bytes that each device sends in a ring.

        They are (n - 1) / n of the array for a gather and for a reduce-scatter, and twice that for
        an all-reduce.
        """
        share = (self.devices - 1) / self.devices
        return round(self.array_bytes * share * (2 if self.kind == 'all-reduce' else 1))


@dataclasses.dataclass(frozen=True)
class Reading:
    """A compiled step; all but `collectives` is about one device.

    memory, bytes: 'state' is parameters and velocity, by their shapes; 'arguments' (state, batch
    and statistics), 'outputs' (the next state, which reuses their memory) and 'temporaries' are
    the compiler's figures. flops, bytes_accessed: by XLA's count.
    """

    collectives: tuple[Collective, ...]
    memory: dict[str, int]
    flops: float
    bytes_accessed: float


def read_step(settings: Settings, layout: Layout) -> Reading:
    """Trace and compile the training step for this layout, and read it; takes some seconds."""
    traced, state = trace_step(settings, layout)
    compiled = traced.lower().compile()
    cost: Any = compiled.cost_analysis()  # a dict; the stubs are wrong
    held: Any = compiled.memory_analysis()  # not None for a compiled program
    leaves = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in leaves]
    memory = {
        'state': sum(itemsize * math.prod(shape) for shape, itemsize in shards),
        'arguments': held.argument_size_in_bytes,
        'outputs': held.output_size_in_bytes,
        'temporaries': held.temp_size_in_bytes,
    }
    layers = [layer.name for layer in settings.net.layers]
    sent = collectives(traced.jaxpr.jaxpr, layout.mesh, layers)
    return Reading(sent, memory, cost['flops'], cost['bytes accessed'])


def trace_step(settings: Settings, layout: Layout) -> tuple[jax.stages.Traced, TrainState]:
    """Trace the step that the trainer runs; return it, and its state's shapes and shardings."""

    def shaped(shape: Sequence[int], dtype: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    optimizer = make_optimizer(settings, IMAGES)
    step, shardings = jit_train_step(settings, layout, optimizer, IMAGES, **QUICK_COMPILE)
    state = jax.eval_shape(lambda: init_state(settings, optimizer))
    state = jax.tree.map(lambda leaf, own: shaped(leaf.shape, leaf.dtype, own), state, shardings)
    px, channels, size = settings.preprocess.resize_px, settings.net.channels, settings.batch_size
    batch = {
        'image': shaped((size, px, px, channels), jnp.uint8, layout.batch_sharding),
        'label': shaped((size,), jnp.int32, layout.batch_sharding),
    }
    statistics = Statistics(
        shaped((px, px, channels), jnp.float32, layout.replicated),
        shaped((channels, channels), jnp.float32, layout.replicated),
    )
    return step.trace(state, batch, statistics), state


def collectives(jaxpr: Any, mesh: Mesh, layers: Sequence[str]) -> tuple[Collective, ...]:
    """Return what devices exchange in a jaxpr, in its order, by layer, pass, kind and axis.

    Args:
        jaxpr: the step's.
        mesh: that it was traced for.
        layers: their names, which are name scopes.
    """
    sizes: dict[tuple[str, str, str, str, int], int] = {}
    for equation, scope in _equations(jaxpr):
        kind = KINDS.get(equation.primitive.name)
        names = equation.params.get('axes') or equation.params.get('axis_name', ())
        axes = [axis for axis in names if mesh.shape[axis] > 1] if kind else []
        if not kind or not axes:  # along an axis of one device nothing is sent
            continue
        layer = next(word for word in re.split(r'[/()]', scope) if word in layers)
        devices = math.prod(mesh.shape[axis] for axis in axes)
        key = layer, _phase(scope), kind, '+'.join(axes), devices
        arrays = [one.aval for one in (*equation.invars, *equation.outvars)]
        size = max(array.size * array.dtype.itemsize for array in arrays)
        sizes[key] = sizes.get(key, 0) + size
    return tuple(Collective(*key, size) for key, size in sizes.items())


def _equations(jaxpr: Any, scope: str = '') -> Iterator[tuple[Any, str]]:
    """Yield the equations of a jaxpr and of those inside it, with their paths of name scopes."""
    for equation in jaxpr.eqns:
        path = f'{scope}/{equation.source_info.name_stack}'
        yield equation, path
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner, path)


def _phase(scope: str) -> str:
    if GRADIENT_SCOPE in scope:
        return 'gradient'
    return 'backward' if 'transpose(' in scope else 'forward'
