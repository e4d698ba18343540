"""Read the communication and memory of a training step from its compiled program.

The step is compiled from shapes alone. The compiled program's text shows what the compiler added,
merged or removed, and thus tests the claims about the two towers.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.config import Settings
from alexnet_jax.errors import RunError
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training.step import TrainState, init_state, jit_train_step, make_optimizer

IMAGES = 1_281_167  # ILSVRC-2012; only constants of the schedules depend on it
BOOKKEEPING = 'bookkeeping'  # scalars: loss, error count, the check for finite values
UNKNOWN = 'unknown'  # an array that belongs to no layer: communication by mistake
GRADIENT_SCOPE = 'data_parallel'  # the name scope of gradient sums in parallel/mesh.py
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# Without LLVM's optimisations the compilation takes half the time. XLA's program is the same.
QUICK_COMPILE = {'xla_backend_optimization_level': '0'}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange in a step. XLA may send several in one instruction."""

    layer: str  # a name of the layer table, BOOKKEEPING or UNKNOWN
    phase: str  # 'forward', 'backward', 'gradient' (of a parameter), or '' for BOOKKEEPING
    kind: str  # one of KINDS
    axis: str  # 'data', 'tower', 'data+tower', or 'other' if the groups follow no mesh axis
    devices: int  # in each group
    array_bytes: int  # the full array: a gather's result, a reduction's operand on each device
    # By each device in a ring: (n - 1) / n of the array for a gather and for a reduce-scatter,
    # twice that for an all-reduce.
    sent_bytes: int
    instruction: str  # XLA's name; arrays with the same name are one message


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
    """Compile the training step for this layout and read it; takes some seconds."""
    compiled, state = _compile_step(settings, layout)
    cost: Any = compiled.cost_analysis()  # a dict; the stubs are wrong
    held: Any = compiled.memory_analysis()  # not None for a compiled program
    leaves = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    memory = {
        'state': sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in leaves
        ),
        'arguments': held.argument_size_in_bytes,
        'outputs': held.output_size_in_bytes,
        'temporaries': held.temp_size_in_bytes,
    }
    layers = [layer.name for layer in settings.net.layers]
    sent = collectives(compiled.as_text() or '', layout.mesh, layers)
    return Reading(sent, memory, cost['flops'], cost['bytes accessed'])


def _compile_step(settings: Settings, layout: Layout) -> tuple[jax.stages.Compiled, TrainState]:
    """Compile the step as the trainer does; return it, and its state's shapes and shardings."""

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
    key = 'jax_compilation_cache_include_metadata_in_key'
    before = jax.config.values[key]
    jax.config.update(key, True)  # else the cache may return an equal program of other layers
    try:
        return step.lower(state, batch, statistics).compile(), state
    finally:
        jax.config.update(key, before)


# ------------------------------------------------------------------------------------- XLA's text

INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$'
)
ARRAY = re.compile(r'\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]')


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: list[str]
    attributes: str
    source: str  # the path of name scopes in the program, as JAX writes it


def collectives(text: str, mesh: Mesh, layers: Sequence[str]) -> tuple[Collective, ...]:
    """Return every array that devices exchange, in the order of the program.

    Args:
        text: `compiled.as_text()`.
        mesh: of the compiled program.
        layers: their names.

    Raises:
        RunError: XLA writes groups of devices in an unknown form.
    """
    program = {one.name: one for one in _instructions(text)}
    rows = []
    for instruction in program.values():
        kind = instruction.op.removesuffix('-start')
        axis, devices = _axis(instruction.attributes, kind, mesh) if kind in KINDS else ('', 1)
        merged = len(instruction.operands) > 1  # then the source is of any of them
        named = None if merged else _layer(instruction.source, layers)
        for operand in instruction.operands if devices > 1 else ():
            shapes = ARRAY.findall(program[operand].type)
            size = sum(_bytes(*one) for one in shapes) * (devices if kind == 'all-gather' else 1)
            share = 1 if kind == 'collective-permute' else (devices - 1) / devices
            scalar = not any(sides for _, sides in shapes)
            layer = named or (BOOKKEEPING if scalar else _layer_that_made(operand, program, layers))
            phase = '' if layer == BOOKKEEPING else _phase(instruction.source)
            sent = round(size * share * (2 if kind == 'all-reduce' else 1))
            rows.append(Collective(layer, phase, kind, axis, devices, size, sent, instruction.name))
    return tuple(rows)


def _instructions(text: str) -> Iterator[_Instruction]:
    for line in text.splitlines():
        if found := INSTRUCTION.match(re.sub(r'/\*.*?\*/', '', line)):
            operands, _, attributes = found['rest'].partition('), ')
            source = re.search(r'op_name="([^"]*)"', attributes)
            names = re.findall(r'%([\w.-]+)', operands)
            yield _Instruction(
                *found.group('name', 'type', 'op'), names, attributes, source[1] if source else ''
            )


def _bytes(dtype: str, sides: str) -> int:
    """Return the bytes of an array that XLA writes as 'f32[64,10]'."""
    itemsize = 1 if dtype == 'pred' else _numbers(dtype)[0] // 8
    return itemsize * math.prod(_numbers(sides))


def _layer(source: str, layers: Sequence[str]) -> str | None:
    """Return the one layer that a source names; None if it names none or several."""
    found = {word for word in re.split(r'[/():]', source) if word in layers}
    return found.pop() if len(found) == 1 else None


def _layer_that_made(name: str, program: Mapping[str, _Instruction], layers: Sequence[str]) -> str:
    """Return the layer that computed an array, looking through copies, which have no source."""
    seen, queue = {name}, [name]
    for name in queue:
        instruction = program[name]
        if layer := _layer(instruction.source, layers):
            return layer
        if not instruction.source:
            new = [one for one in instruction.operands if one in program and one not in seen]
            seen.update(new)
            queue += new
    return UNKNOWN


def _phase(source: str) -> str:
    if GRADIENT_SCOPE in source:
        return 'gradient'
    return 'backward' if 'transpose(' in source else 'forward'


# ------------------------------------------------------------------------------ groups of devices


def _axis(attributes: str, kind: str, mesh: Mesh) -> tuple[str, int]:
    """Return the mesh axes along which the devices of a group differ, and the size of a group."""
    if kind == 'collective-permute':  # pairs; a training step has none
        return 'other', mesh.size
    groups = _groups(attributes, mesh.size)
    positions = np.array(np.unravel_index(groups, tuple(mesh.shape.values())))
    differ = [
        axis for axis, own in zip(mesh.shape, positions, strict=True) if np.any(own != own[:, :1])
    ]
    along_axes = groups.shape[1] == math.prod(mesh.shape[axis] for axis in differ)
    return '+'.join(differ) if along_axes else 'other', groups.shape[1]


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Return the groups of devices as positions in the mesh, int [groups, devices of each].

    XLA has three forms: {{0,1},{2,3}}, where {} is all devices; [2,2]<=[4], an iota, reshaped; and
    mesh['a'=2,'b'=2] {'b'}, the named axes of an iota.
    """
    form = attributes.partition('replica_groups=')[2]
    if found := re.match(r'\{((?:\{[\d,]+\},?)*)\}', form):
        groups = [_numbers(group) for group in found[1].split('}') if group]
        return np.array(groups or [range(devices)])
    if found := re.match(r'\[([\d,]+)\]<=(\S+?)(?:, |$)', form):
        return _iota(found[2]).reshape(_numbers(found[1]))
    if found := re.match(r'mesh\[([^\]]*)\](?:, device_ids=\((.*?\))\))? \{([^}]*)\}', form):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[3])]
        grid = _iota(found[2] or f'[{math.prod(sizes.values())}]').reshape(*sizes.values())
        grid = np.moveaxis(grid, axes, range(-len(axes), 0))
        return grid.reshape(-1, math.prod(grid.shape[grid.ndim - len(axes) :]))
    raise RunError(
        f'XLA prints device groups in an unknown format ({form[:60]}...); install the versions '
        f'in constraints.txt.'
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _iota(text: str) -> np.ndarray:
    """Return the devices that XLA writes as '[8]', or as '[4,2]T(1,0)', transposed."""
    shape, _, order = text.partition('T')
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def by_layer(rows: Iterable[Collective]) -> list[Collective]:
    """Add up the rows of one layer, phase, kind and axis: a layer's weights and biases."""
    groups: dict[tuple, list[Collective]] = {}
    for row in rows:
        key = (row.layer, row.phase, row.kind, row.axis, row.devices)
        groups.setdefault(key, []).append(row)
    return [
        dataclasses.replace(
            group[0],
            array_bytes=sum(row.array_bytes for row in group),
            sent_bytes=sum(row.sent_bytes for row in group),
        )
        for group in groups.values()
    ]
