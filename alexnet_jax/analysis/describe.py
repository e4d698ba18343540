"""Describe a config on one page: shapes, parameters, operations, memory, communication."""

import contextlib
import math
from collections.abc import Sequence

import jax

from alexnet_jax import command
from alexnet_jax import config as configuration
from alexnet_jax.analysis import communication
from alexnet_jax.analysis.communication import Collective
from alexnet_jax.config import Config, MeshShape, Settings
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import Net, Stage, geometry
from alexnet_jax.parallel import mesh
from alexnet_jax.training import splits

COLUMNS = (
    'layer', 'reads', 'input', 'kernel/stride/pad', 'output', 'init std', 'bias', 'parameters',
    'multiply-adds', 'ops',
)  # fmt: skip


def run(config: Config) -> str:
    """Return the page of a config.

    The devices of the mesh need not exist: `mesh.data=4 mesh.tower=2` is compiled for virtual CPU
    devices, and `mesh.data=-1` for the real ones. Compilation takes some seconds.

    Raises:
        UsageError: the config is impossible.
    """
    settings = configuration.unpack(config)
    if not settings.net.classes and settings.data.name != 'none':
        settings = splits.complete(settings)
    if not settings.net.classes:
        raise UsageError(
            'the last layer has as many units as the data has classes: name the data set by '
            '--config.data.name=NAME, or set the units, as in --config.model.fc8.features=10.'
        )
    _provide_devices(settings.mesh)
    return '\n\n'.join([page(settings), *compiled(settings)])


def page(settings: Settings) -> str:
    """Return the part of the page that follows from the config alone, without compilation."""
    net, stages = settings.net, geometry(settings.net)
    parts = [
        f'{settings.name}, scale {settings.scale}: {net.towers} tower(s), crops of '
        f'{net.input_px} x {net.input_px} x {net.channels} from {settings.preprocess.image_px} px',
        command.table([COLUMNS, *(_row(stage, net) for stage in stages)]),
        _totals(stages),
    ]
    return '\n\n'.join(parts)


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
        _ops(stage),
    )


def _ops(stage: Stage) -> str:
    ops, shape = [], stage.output
    for op, after in zip(stage.layer.ops, stage.after, strict=True):
        ops.append(op if after == shape else f'{op} -> {_shape(after)}')
        shape = after
    return ', '.join(ops)


def _shape(shape: Sequence[int]) -> str:
    return ' x '.join(map(str, shape))


def _totals(stages: Sequence[Stage]) -> str:
    parameters = sum(stage.parameters for stage in stages)
    neurons = sum(math.prod(stage.output) for stage in stages)  # before pooling, as in the paper
    adds = sum(stage.multiply_adds for stage in stages)
    return (
        f'{parameters:,} parameters, {neurons:,} neurons, {adds / 1e6:.1f} M multiply-adds per '
        f'view ({adds:,})'
    )


def _mib(size: int) -> str:
    return f'{size / 2**20:,.1f} MiB'


# ------------------------------------------------------------------------------ the compiled step


def compiled(settings: Settings) -> list[str]:
    """Describe the memory of a device and the communication of the compiled training step."""
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    found = communication.read_step(settings, layout)
    where, held = f'{layout}, placement {settings.mesh.placement}', {'here': found.memory}
    if any(split.shards > 1 for split in (layout.tensor_parallel.conv, layout.tensor_parallel.fc)):
        other = mesh.make_layout(MeshShape(layout.replicas, tower=1), settings.batch_size)
        held[f'on {other}, placement towers'] = communication.read_step(settings, other).memory
    memory = [('', *held)]
    for kind in found.memory:
        memory.append((kind, *(_mib(own[kind]) for own in held.values())))
    parts = [
        f'memory of a device on {where}, compiled for {jax.default_backend()}, batch '
        f'{settings.batch_size}\n\n{command.table(memory)}\n\n'
        'state: parameters and velocity; the rest by the compiler, of which arguments contain the '
        'state, and outputs reuse its memory'
    ]
    if layout.mesh.size == 1:
        return ['one device: no communication', *parts]
    sent = _communication(found.collectives)
    return [f'communication of a step on {where}\n\n{sent}', *parts]


def _provide_devices(shape: MeshShape) -> None:
    """Create virtual CPU devices for a mesh of stated size, unless JAX has its devices already."""
    if shape.data * shape.tower > 1:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update('jax_num_cpu_devices', shape.data * shape.tower)
            jax.config.update('jax_platforms', 'cpu')


def _communication(collectives: Sequence[Collective]) -> str:
    """Tabulate messages by layer and pass; those of weights and biases are added up."""
    head = ('layer', 'pass', 'kind', 'axis', 'devices', 'array, bytes', 'sent by a device, bytes')
    rows = [
        (one.layer, one.phase, one.kind, one.axis, str(one.devices), f'{one.array_bytes:,}',
         f'{one.sent_bytes:,}')
        for one in collectives
    ]  # fmt: skip
    sent = sum(one.sent_bytes for one in collectives)
    return (
        f'{command.table([head, *rows])}\n\n{_mib(sent)} sent per device and step, assuming ring '
        f'collectives, and some scalars: loss, error count, the check for finite values'
    )
