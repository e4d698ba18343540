"""Who sends what to whom in a training step, and what a device holds: read off the compiled step.

Nothing is run and no data is needed: the step is compiled for shapes alone, and XLA's own text of
it is read. What the compiler added, merged or took away is therefore seen, and what was meant but
not done is not.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from alexnet_jax.config import Settings
from alexnet_jax.errors import RunError
from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import AlexNet
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel.mesh import Layout
from alexnet_jax.training.step import init_state, jit_train_step, make_optimizer

IMAGES = 1_281_167  # ILSVRC-2012's; only the schedules' constants depend on it
BOOKKEEPING = 'bookkeeping'  # scalars: loss, error count, the check that all is finite
UNKNOWN = 'unknown'  # an array that belongs to no layer: nobody meant to send it
GRADIENT_SCOPE = 'data_parallel'  # the name that parallel/mesh.py gives to the sums of gradients
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# LLVM's optimisations off: half the time, and XLA's program, all that is read, stays as it is.
QUICK_COMPILE = {'xla_backend_optimization_level': '0'}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange in a step; XLA may move several in one instruction.

    array_bytes: the whole array: what a gather makes, and what a reduction is given on each device.
    sent_bytes: what each device sends in a ring of `devices`: the part (n - 1) / n of the array for
        a gather and for a reduce-scatter, twice that for an all-reduce, which is one of each.
    """

    layer: str  # of the layer table, or BOOKKEEPING, or UNKNOWN
    phase: str  # 'forward', 'backward', 'gradient' (of a parameter), or '' for BOOKKEEPING
    kind: str  # of KINDS
    axis: str  # 'data', 'tower', 'data+tower'; 'other' where the groups follow no axis
    devices: int  # in each group
    array_bytes: int
    sent_bytes: int
    instruction: str  # XLA's name: arrays of one name travel together
    source: str  # where the program asks for it, as JAX names it


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device in a training step.

    parameters, velocity, activations: by layer. Activations are every operation's result, as the
        net inside `jax.shard_map` has it; what the compiler fuses away is counted.
    arguments, outputs, temporaries: the compiler's own figures. Arguments are the state, the batch
        and the statistics; outputs, the next state, take their place.
    """

    parameters: dict[str, int]
    velocity: dict[str, int]
    activations: dict[str, int]
    arguments: int
    outputs: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """All that is read off a compiled step; memory, operations and bytes are one device's.

    flops, bytes_accessed: XLA's count of its own program. A CPU's program is not an accelerator's.
    """

    collectives: tuple[Collective, ...]
    memory: Memory
    flops: float
    bytes_accessed: float


def read_step(settings: Settings, layout: Layout) -> Reading:
    """Compile the training step for this layout and read it; some seconds."""
    compiled = compile_step(settings, layout)
    layers = [layer.name for layer in settings.net.layers]
    cost: Any = compiled.cost_analysis()  # a dict, whatever the stubs say
    return Reading(
        collectives=collectives(compiled.as_text() or '', layout.mesh, layers),
        memory=_memory(settings, layout, compiled),
        flops=cost['flops'],
        bytes_accessed=cost['bytes accessed'],
    )


# ------------------------------------------------------------------------------ the compiled step


def compile_step(settings: Settings, layout: Layout, images: int = IMAGES) -> jax.stages.Compiled:
    """The training step as the trainer compiles it, for shapes alone; to be read, not run.

    Args:
        settings: of the run.
        layout: from `mesh.make_layout`.
        images: in the training set.
    """
    optimizer = make_optimizer(settings, images)
    step, shardings = jit_train_step(settings, layout, optimizer, images, **QUICK_COMPILE)
    shapes = jax.eval_shape(lambda: init_state(settings, optimizer))
    state = jax.tree.map(_abstract, shapes, shardings)
    batch, statistics = _abstract_inputs(settings, layout)
    with _names_kept():
        return step.lower(state, batch, statistics).compile()


@contextlib.contextmanager
def _names_kept() -> Generator[None]:
    """A program from the compilation cache may carry the names of a like one: look at them too."""
    key = 'jax_compilation_cache_include_metadata_in_key'
    before = jax.config.values[key]
    jax.config.update(key, True)
    try:
        yield
    finally:
        jax.config.update(key, before)


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract_inputs(settings: Settings, layout: Layout) -> tuple[dict[str, Any], Statistics]:
    """A batch of stored images and the statistics of such images, without their values."""
    px, channels, size = settings.preprocess.resize_px, settings.net.channels, settings.batch_size
    split, whole = layout.batch_sharding, layout.replicated
    batch = {
        'image': jax.ShapeDtypeStruct((size, px, px, channels), jnp.uint8, sharding=split),
        'label': jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }
    mean_image: Any = jax.ShapeDtypeStruct((px, px, channels), jnp.float32, sharding=whole)
    basis: Any = jax.ShapeDtypeStruct((channels, channels), jnp.float32, sharding=whole)
    return batch, Statistics(mean_image, basis)


# ------------------------------------------------------------------------------- XLA's own words

INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$'
)
ARRAY = re.compile(r'\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ''


def collectives(text: str, mesh: Mesh, layers: Sequence[str]) -> tuple[Collective, ...]:
    """Every array that devices exchange, in the order of the program.

    An exchange inside a loop counts once; a training step has none.

    Args:
        text: `compiled.as_text()`.
        mesh: that it was compiled for.
        layers: names of the layers.

    Raises:
        RunError: XLA writes who talks to whom in a way that is not known here.
    """
    program = {one.name: one for one in _instructions(text)}
    rows = []
    for instruction in program.values():
        kind = instruction.op.removesuffix('-start')
        if kind in KINDS:
            groups = _groups(instruction.attributes, kind, mesh.size)
            axis, devices = _axis(groups, kind, mesh), max(map(len, groups))
            if devices > 1:  # a group of one talks to nobody
                rows += _arrays(instruction, kind, axis, devices, program, layers)
    return tuple(rows)


def _instructions(text: str) -> Iterator[_Instruction]:
    for line in text.splitlines():
        found = INSTRUCTION.match(re.sub(r'/\*.*?\*/', '', line))
        if found:
            operands, _, attributes = found['rest'].partition('), ')
            names = tuple(re.findall(r'%([\w.-]+)', operands))
            yield _Instruction(found['name'], found['type'], found['op'], names, attributes)


def _arrays(
    instruction: _Instruction,
    kind: str,
    axis: str,
    devices: int,
    program: Mapping[str, _Instruction],
    layers: Sequence[str],
) -> Iterator[Collective]:
    """A row for each operand: XLA merges reductions that it can make together."""
    if not instruction.operands:
        raise _unreadable(instruction.attributes)
    for operand, source in zip(instruction.operands, _sources(instruction), strict=True):
        type_ = program[operand].type
        whole = _bytes(type_) * (devices if kind == 'all-gather' else 1)
        scalar = not any(shape for _, shape in ARRAY.findall(type_))
        layer = _layer(source, layers) or (
            BOOKKEEPING if scalar else _layer_behind(operand, program, layers)
        )
        source = source or instruction.source
        yield Collective(
            layer=layer,
            phase='' if layer == BOOKKEEPING else _phase(source),
            kind=kind,
            axis=axis,
            devices=devices,
            array_bytes=whole,
            sent_bytes=_sent(kind, whole, devices),
            instruction=instruction.name,
            source=source,
        )


def _sent(kind: str, whole: int, devices: int) -> int:
    if kind == 'collective-permute':
        return whole
    passes = 2 if kind == 'all-reduce' else 1
    return passes * (devices - 1) * whole // devices


def _bytes(type_: str) -> int:
    """Of an array or a tuple of arrays, as XLA writes its type: 'f32[64,10]{1,0}'."""
    return sum(
        _itemsize(name) * math.prod(int(side) for side in shape.split(',') if side)
        for name, shape in ARRAY.findall(type_)
    )


def _itemsize(name: str) -> int:
    return 1 if name == 'pred' else _numbers(name)[0] // 8


def _sources(instruction: _Instruction) -> Sequence[str]:
    """Where each operand comes from: merged instructions have merged names, 'jit(f)/(a:b:c)'."""
    source, count = instruction.source, len(instruction.operands)
    merged = re.fullmatch(r'.*?/\((.*)\)', source)
    names = merged[1].split(':') if merged else [source]
    if len(names) == count:
        return names
    return [source if count == 1 else ''] * count  # one name for all does not say whose each is


def _layer(source: str, layers: Sequence[str]) -> str | None:
    """The one layer that is named in it; none where several are, or none."""
    found = {word for word in re.split(r'[/():]', source) if word in layers}
    return found.pop() if len(found) == 1 else None


def _layer_behind(name: str, program: Mapping[str, _Instruction], layers: Sequence[str]) -> str:
    """The layer that an array was made in, where the exchange itself does not say."""
    seen, queue = {name}, [name]
    while queue:
        instruction = program[queue.pop(0)]
        layer = _layer(instruction.source, layers)
        if layer:
            return layer
        if not instruction.source:  # copies and the like: look behind them
            new = [one for one in instruction.operands if one in program and one not in seen]
            seen, queue = seen | set(new), queue + new
    return UNKNOWN


def _phase(source: str) -> str:
    if GRADIENT_SCOPE in source:
        return 'gradient'
    return 'backward' if 'transpose(' in source else 'forward'


# ------------------------------------------------------------------------------ groups of devices

Groups = Sequence[Sequence[int]]


def _groups(attributes: str, kind: str, size: int) -> Groups:
    """Which devices talk to which, as lists of places in the mesh."""
    if kind == 'collective-permute':
        return _pairs(attributes)
    if found := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
        groups = [[int(i) for i in one.split(',')] for one in re.findall(r'\{([\d,]+)\}', found[1])]
        return groups or [range(size)]  # none named: all together
    if found := re.search(r'replica_groups=\[([\d,]+)\]<=(\S+?)(?:, |$)', attributes):
        return _iota(found[2]).reshape(_numbers(found[1])).tolist()
    if found := re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\))\))? \{([^}]*)\}', attributes
    ):
        return _mesh_groups(*found.groups())
    raise _unreadable(attributes)


def _unreadable(attributes: str) -> RunError:
    return RunError(
        f'XLA writes who talks to whom in a way that is not known here ({attributes[:60]}...); '
        f'try the versions in constraints.txt.'
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _iota(text: str) -> np.ndarray:
    """'[8]' counts to eight; '[4,2]T(1,0)' counts in four rows of two and transposes them."""
    shape, _, order = text.partition('T')
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _mesh_groups(axes: str, devices: str | None, along: str) -> Groups:
    """Axes "'a'=4,'b'=2" of devices '[2,4]T(1,0)', or of all in order, grouped along "'a'"."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    names = re.findall(r"'(\w+)'", along)
    ids = _iota(devices) if devices else np.arange(math.prod(sizes.values()))
    grid = ids.reshape(list(sizes.values()))
    last = [list(sizes).index(name) for name in names]
    grid = np.moveaxis(grid, last, range(-len(last), 0))
    return grid.reshape(-1, math.prod(sizes[name] for name in names)).tolist()


def _pairs(attributes: str) -> Groups:
    """A permutation's (source, target) pairs, those that stay where they are left out."""
    found = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes)
    pairs = [_numbers(pair) for pair in re.findall(r'\{[\d,]+\}', found[1])] if found else []
    return [pair for pair in pairs if pair[0] != pair[1]] or [[0]]


def _axis(groups: Groups, kind: str, mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ."""
    shape = tuple(mesh.shape.values())
    differ = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), shape))
        differ |= {name for name, row in zip(mesh.shape, places, strict=True) if len({*row}) > 1}
    full = math.prod(mesh.shape[name] for name in differ)
    if kind != 'collective-permute' and any(len(group) != full for group in groups):
        return 'other'
    return '+'.join(name for name in mesh.shape if name in differ)


# ----------------------------------------------------------------------------------- sums of rows


def by_layer(rows: Iterable[Collective]) -> list[Collective]:
    """Rows of one layer, phase, kind and axis as one: a layer's weights and biases, say."""
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


def sent_bytes(rows: Iterable[Collective]) -> int:
    """What each device sends in a step."""
    return sum(row.sent_bytes for row in rows)


# ----------------------------------------------------------------------------- what a device holds


def _memory(settings: Settings, layout: Layout, compiled: jax.stages.Compiled) -> Memory:
    optimizer = make_optimizer(settings, IMAGES)
    shapes = jax.eval_shape(lambda: init_state(settings, optimizer))
    held = layout.state_shardings(shapes, settings.net)
    stats: Any = compiled.memory_analysis()  # not None where there is a compiled program
    return Memory(
        parameters=_by_layer(shapes.params, held.params),
        velocity=_by_layer(shapes.opt_state, held.opt_state),
        activations=activations(settings, layout),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def _by_layer(shapes: Any, shardings: Any) -> dict[str, int]:
    """Bytes on one device of the leaves that lie under a layer's name."""
    totals: dict[str, int] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        layer = getattr(path[-2], 'key', None) if len(path) > 1 else None
        if layer is not None:
            size = leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
            totals[layer] = totals.get(layer, 0) + size
    return totals


def activations(settings: Settings, layout: Layout) -> dict[str, int]:
    """Bytes by layer of what one device computes in a forward pass, traced and not run."""
    net, size = settings.net, settings.batch_size
    seen: dict[str, int] = {}
    layer_of = {
        name: layer.name for layer in net.layers for name in alexnet.activation_names(layer)
    }

    def local(params, images, masks):
        logits, sown = AlexNet(net, layout.tensor_parallel).apply(
            {'params': params}, images, masks, mutable=['intermediates']
        )
        for name, (value,) in sown['intermediates'].items():
            layer = layer_of[name]
            seen[layer] = seen.get(layer, 0) + value.dtype.itemsize * value.size
        return logits

    def run(key, images):
        params, masks = alexnet.init(key, net), alexnet.draw_masks(key, net, size)
        specs = (
            layout.parameter_specs(net),
            P('data'),
            layout.mask_specs(masks),
        )
        return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=P('data'))(
            params, images, masks
        )

    shape = (size, net.input_px, net.input_px, net.channels)
    jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return seen
