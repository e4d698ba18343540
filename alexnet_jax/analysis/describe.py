"""What a config describes, on one page: shapes, parameters, operations, memory, communication."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_jax import config as configuration
from alexnet_jax import config_file
from alexnet_jax.analysis import communication
from alexnet_jax.analysis.communication import Collective, Memory
from alexnet_jax.config import Config, MeshShape, Settings
from alexnet_jax.data import datasets
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import Net, Stage, geometry
from alexnet_jax.parallel import mesh
from alexnet_jax.parallel.mesh import Layout

COLUMNS = (
    'layer', 'reads', 'input', 'kernel/stride/pad', 'output', 'init std', 'bias', 'parameters',
    'multiply-adds', 'ops',
)  # fmt: skip
FLOAT32_BYTES = 4
MOST_VIRTUAL_DEVICES = 512
DEVICE_GB = (16, 24, 80)  # of memory, as they are sold; 10^9 bytes, the cautious reading
COMPILED_BATCHES = (512, 2048)  # images a device; with few, the update needs more than the net


def run(config: Config) -> str:
    """The page for a config.

    A mesh of several devices need not be there: `mesh.data=4 mesh.tower=2` is described on virtual
    CPU devices, where nothing has asked for the real ones yet; `mesh.data=-1` means the real ones.
    What only the compiler knows (memory, messages) takes some seconds.

    Raises:
        UsageError: the config is impossible.
    """
    settings = configuration.unpack(config)
    names = settings.data
    if not settings.net.classes and names.name != 'none':
        config = config_file.with_data(config, *datasets.facts(names.name, names.data_dir))
        settings = configuration.unpack(config)
    if not settings.net.classes:
        raise UsageError(
            'the last layer is as wide as the data has classes; set its features to describe the '
            'net, as in --config.model.fc8.features=10.'
        )
    _provide_devices(settings.mesh)
    return '\n\n'.join([page(settings), _compiled_memory(settings), *_on_mesh(settings)])


def page(settings: Settings) -> str:
    """What follows from the config alone: nothing is compiled."""
    net, stages = settings.net, geometry(settings.net)
    parts = [
        f'{settings.name}, scale {settings.scale}: {net.towers} tower(s), crops of '
        f'{net.input_px} x {net.input_px} x {net.channels} from {settings.preprocess.image_px} px',
        table([COLUMNS, *(_row(stage, net) for stage in stages)]),
        _totals(stages),
        _recipe(settings),
        _memory(settings, stages),
    ]
    return '\n\n'.join(parts)


def totals(stages: Sequence[Stage]) -> dict[str, int]:
    """Parameters; neurons (units before pooling, as the paper counts); multiply-adds a view."""
    return {
        'parameters': sum(stage.parameters for stage in stages),
        'neurons': sum(math.prod(stage.output) for stage in stages),
        'multiply_adds': sum(stage.multiply_adds for stage in stages),
    }


def memory_bytes(settings: Settings, stages: Sequence[Stage]) -> dict[str, int]:
    """What a training step holds, all devices together; an estimate from the shapes alone.

    Activations are every operation's result, kept for the backward pass; what the compiler fuses
    away is counted, what it adds for scratch is not.
    """
    parameters = FLOAT32_BYTES * totals(stages)['parameters']
    units = sum(math.prod(shape) for stage in stages for shape in (stage.output, *stage.after))
    width = jnp.dtype(settings.net.compute_dtype).itemsize
    return {
        'parameters': parameters,
        'velocity': parameters,
        'gradients': parameters,
        'activations': width * units * settings.batch_size,
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def _row(stage: Stage, net: Net) -> tuple[str, ...]:
    layer = stage.layer
    first, last = layer is net.layers[0], layer is net.layers[-1]
    if first:
        reads = 'the image'
    elif layer.reads == 'own' and not last:
        reads = 'own tower'
    else:
        reads = 'all towers'
    (top, bottom), (left, right) = layer.padding_px
    pad = f'{top}' if top == bottom == left == right else f'{top},{bottom},{left},{right}'
    return (
        layer.name,
        reads,
        _shape(stage.input),
        f'{layer.kernel_px}/{layer.stride_px}/{pad}' if layer.kind == 'conv' else 'fc',
        _shape(stage.output),
        f'{layer.init_std:.4g}' if layer.init in ('gaussian', 'uniform') else layer.init,
        f'{layer.bias:g}',
        f'{stage.parameters:,}',
        f'{stage.multiply_adds:,}',
        _then(stage),
    )


def _then(stage: Stage) -> str:
    words, shape = [], stage.output
    for word, after in zip(stage.layer.ops, stage.after, strict=True):
        words.append(word if after == shape else f'{word} -> {_shape(after)}')
        shape = after
    return ', '.join(words)


def _shape(shape: Sequence[int]) -> str:
    return ' x '.join(map(str, shape))


def _totals(stages: Sequence[Stage]) -> str:
    total = totals(stages)
    return (
        f'{total["parameters"]:,} parameters, {total["neurons"]:,} neurons, '
        f'{total["multiply_adds"] / 1e6:.1f} M multiply-adds a view '
        f'({total["multiply_adds"]:,})'
    )


def _recipe(settings: Settings) -> str:
    recipe, net = settings.optimizer, settings.net
    norms = ', '.join(
        f'{name}: size {norm.size}, k {norm.k:g}, alpha {norm.alpha:g}, beta {norm.beta:g}'
        for name, norm in (('lrn', net.lrn), ('spatial_norm', net.spatial_norm))
    )
    edge = ', windows over the edge too' if net.pool.rounding == 'up' else ''
    return '\n'.join(
        [
            f'{norms}; lrn reads {net.lrn_reads}',
            f'pool: {net.pool.kind} {net.pool.window_px}/{net.pool.stride_px}{edge}; dropout: '
            f'{net.dropout.kind}, keep {net.dropout.keep:g}; compute in {net.compute_dtype}',
            f'batch {settings.batch_size}, {settings.epochs:g} epochs, momentum '
            f'{recipe.momentum:g}, weight decay {recipe.weight_decay:g}; rates: weights '
            f'{recipe.weights.rate:g} ({recipe.weights.kind}), biases {recipe.biases.rate:g} '
            f'({recipe.biases.kind})',
        ]
    )


def _memory(settings: Settings, stages: Sequence[Stage]) -> str:
    held = memory_bytes(settings, stages)
    parts = ', '.join(f'{name} {_mib(size)}' for name, size in held.items())
    total = _mib(sum(held.values()))
    return f'memory of a training step at batch {settings.batch_size}: {parts}; {total} in all'


def _mib(size: int) -> str:
    return f'{size / 2**20:,.1f} MiB'


# ------------------------------------------------------------------------- as the compiler has it


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one device holds at most in a training step on so many images, and what one more adds.

    Not quite a line: with the shapes changes what fits between what in the scratch space, some 2 %.
    """

    images: int
    bytes: int
    per_image: int

    def at(self, images: int) -> int:
        """Bytes."""
        return self.bytes + (images - self.images) * self.per_image

    def largest_batch(self, capacity: int) -> int:
        """Images of one device that fit into so many bytes with nothing else; 0: not even one."""
        return max(0, self.images + (capacity - self.bytes) // self.per_image)


def compiled_peak(settings: Settings, layout: Layout) -> Peak:
    """From the training step, compiled at two batch sizes."""
    few, many = COMPILED_BATCHES
    small, large = (compiled_bytes(settings, layout, images) for images in (few, many))
    return Peak(images=few, bytes=small, per_image=(large - small) // (many - few))


def compiled_bytes(settings: Settings, layout: Layout, images: int) -> int:
    """What one device holds at most with so many images: state, batch and scratch space."""
    settings = dataclasses.replace(settings, batch_size=images * layout.replicas)
    found: Any = communication.compile_step(settings, layout).memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def _compiled_memory(settings: Settings) -> str:
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    peak, replicas = compiled_peak(settings, layout), layout.replicas
    fits = ', '.join(f'{gb} GB: {peak.largest_batch(gb * 10**9) * replicas:,}' for gb in DEVICE_GB)
    device = jax.default_backend()
    where = 'the device' if layout.mesh.size == 1 else f'each of {layout.mesh.size} devices'
    return (
        f'by the compiler for this {device}, {where}: {_mib(peak.bytes)} with {peak.images} '
        f'images, {_mib(peak.per_image)} with each more; '
        f'largest batch, nothing else in memory: {fits}'
    )


# -------------------------------------------------------------------------------------- on a mesh


def _on_mesh(settings: Settings) -> list[str]:
    """Who sends what to whom, and what a device holds, read from the compiled step."""
    one = ['one device: nothing is communicated']
    if settings.mesh.data == settings.mesh.tower == 1:
        return one
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    if layout.mesh.size == 1:
        return one
    found = communication.read_step(settings, layout)
    where = f'{layout}, placement {settings.mesh.placement}'
    memory, beside = f'memory of a device on {where}, MiB', None
    if any(split.shards > 1 for split in (layout.tensor_parallel.conv, layout.tensor_parallel.fc)):
        unsplit = mesh.make_layout(MeshShape(layout.replicas, tower=1), settings.batch_size)
        beside = communication.read_step(settings, unsplit).memory
        memory += f'; unsplit: on {unsplit}, placement towers'
    sent = _communication(found.collectives)
    if settings.net.compute_dtype == 'bfloat16' and jax.default_backend() == 'cpu':
        sent += '\na CPU widens bfloat16 to send it: elsewhere forward and backward are half'
    return [
        f'communication of a step on {where}\n\n{sent}',
        f'{memory}\n\n{_held(found.memory, beside)}',
    ]


def _provide_devices(shape: MeshShape) -> None:
    """Virtual CPU devices for a mesh of stated size, unless this process has its devices already.

    Raises:
        UsageError: so many that this machine would choke.
    """
    wanted = shape.data * shape.tower
    if wanted > MOST_VIRTUAL_DEVICES:
        raise UsageError(
            f'a mesh of data {shape.data} x tower {shape.tower} is too big to be described: '
            f'choose at most {MOST_VIRTUAL_DEVICES} devices.'
        )
    if wanted > 1:
        with contextlib.suppress(RuntimeError):  # says that they are there already
            jax.config.update('jax_num_cpu_devices', wanted)
            jax.config.update('jax_platforms', 'cpu')


def _communication(collectives: Sequence[Collective]) -> str:
    """A row a layer, and in which direction; the sums of gradients, weights and biases together."""
    head = ('layer', 'pass', 'kind', 'axis', 'devices', 'array, bytes', 'sent by a device, bytes')
    rows = [
        (
            row.layer,
            row.phase,
            row.kind,
            row.axis,
            str(row.devices),
            f'{row.array_bytes:,}',
            f'{row.sent_bytes:,}',
        )
        for row in communication.by_layer(collectives)
    ]
    sent = communication.sent_bytes(collectives)
    messages = len({row.instruction for row in collectives})
    return (
        f'{table([head, *rows])}\n\n{_mib(sent)} sent by each device in a step, if in rings; the '
        f'compiler has merged {len(collectives)} arrays into {messages} messages'
    )


def _held(memory: Memory, beside: Memory | None) -> str:
    """A row a layer, and the compiler's own figures; `beside`: with no layer split."""
    memories = [memory] if beside is None else [memory, beside]
    kinds = ('parameters', 'velocity', 'activations')
    columns = [getattr(one, kind) for kind in kinds for one in memories]
    heads = [head for kind in kinds for head in (kind, 'unsplit')[: len(memories)]]
    rows = [(layer, *(f'{c[layer] / 2**20:,.2f}' for c in columns)) for layer in memory.parameters]
    total = ('all', *(f'{sum(c.values()) / 2**20:,.2f}' for c in columns))
    figures = ', '.join(
        f'{kind} {" / ".join(_mib(getattr(one, kind)) for one in memories)}'
        for kind in ('arguments', 'outputs', 'temporaries')
    )
    whose = 'by the compiler' if beside is None else 'by the compiler, here / unsplit'
    return f'{table([("layer", *heads), *rows, total])}\n\n{whose}: {figures}'
