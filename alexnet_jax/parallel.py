"""Where things lie: the ('data', 'tower') mesh, what is split over it, and the model on it.

The tower axis is the paper's two GPUs (section 3.2 and figure 2): of size 1 it holds both towers on
each device, of size 2 one tower a device. One device is the mesh (1, 1).
"""

import ctypes
import platform
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.config import MeshShape
from alexnet_jax.errors import UsageError
from alexnet_jax.model import AlexNet, Net

Array = jax.Array
Forward = Callable[[dict, Array, Mapping[str, Array] | None], Array]


def make_mesh(shape: MeshShape, batch_size: int) -> Mesh:
    """All of this job's devices as ('data', 'tower').

    Raises:
        UsageError: the sizes do not fit the devices, or the batch does not divide.
    """
    devices = jax.device_count()
    data = shape.data if shape.data > 0 else devices // shape.tower
    if data < 1 or data * shape.tower > devices:
        raise UsageError(
            f'mesh (data {shape.data}, tower {shape.tower}) does not fit the {devices} device(s) '
            f'here; make data x tower at most {devices}.'
        )
    if shape.data < 0 and devices % shape.tower:
        raise UsageError(f'mesh.tower {shape.tower} does not divide the {devices} devices here.')
    if batch_size % data:
        raise UsageError(
            f'batch_size {batch_size} does not divide over {data} devices along the data axis; '
            f'choose a multiple of {data}.'
        )
    return jax.make_mesh(
        (data, shape.tower),
        ('data', 'tower'),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: data * shape.tower],
    )


def compiler_options() -> dict[str, str] | None:
    """XLA's options for a training step on this platform.

    On a CPU the scheduler that saves memory: half the scratch space, and with it the time that
    page faults on it take. `python -m experiments.bench_ops` measures the step with it.
    """
    if jax.default_backend() != 'cpu':
        return None
    return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def keep_freed_memory() -> None:
    """On a CPU, have malloc keep what XLA frees: the next step asks for the same again.

    Otherwise glibc hands the scratch space back to the system after every step, and page faults
    fetch it anew: an eighth of a quickstart step. Call it before the first computation.
    """
    if jax.default_backend() == 'cpu' and platform.libc_ver()[0] == 'glibc':
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # names of malloc.h
        malloc = ctypes.CDLL(None)
        malloc.mallopt(arena_max, 1)
        malloc.mallopt(mmap_max, 0)
        malloc.mallopt(trim_threshold, 2**31 - 1)


def parameter_specs(net: Net, mesh: Mesh) -> dict[str, dict[str, P]]:
    """Output axes are split over the towers; the last layer's input axis, as it sums over them."""
    tower = tower_axis(mesh)
    specs = {}
    for layer in net.layers[:-1]:
        rank = 4 if layer.kind == 'conv' else 2
        specs[layer.name] = {'kernel': P(*(None,) * (rank - 1), tower), 'bias': P(tower)}
    specs[net.layers[-1].name] = {'kernel': P(tower, None), 'bias': P()}
    return specs


def tower_axis(mesh: Mesh) -> str | None:
    """'tower' where the towers are spread over devices, None where each device holds both."""
    return 'tower' if mesh.shape['tower'] > 1 else None


def shardings(specs, mesh: Mesh):
    """A tree of PartitionSpecs on this mesh."""
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def state_shardings(state, net: Net, mesh: Mesh):
    """For a tree that holds parameter trees, as the optimiser's: parameters split, all else whole.

    `state` gives structure and shapes only (`jax.eval_shape`).
    """
    specs = parameter_specs(net, mesh)

    def of(path, leaf) -> NamedSharding:
        del leaf
        names = [str(getattr(key, 'key', '')) for key in path[-2:]]
        known = len(names) == 2 and names[0] in specs
        return NamedSharding(mesh, specs[names[0]][names[1]] if known else P())

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over 'data' along their first axis."""
    return NamedSharding(mesh, P('data'))


def forward(net: Net, mesh: Mesh) -> Forward:
    """The net on a mesh: (params, images [B, H, W, C], masks or None) -> logits [B, classes].

    Arguments and result are global arrays; differentiating it sums gradients over 'data'.
    """
    axis = tower_axis(mesh)
    module = AlexNet(net, tower_axis=axis, shards=mesh.shape['tower'])

    def local(params, images, masks):
        # A device's gradient of a parameter is of its own images only: marked as varying over
        # 'data', whose transpose is the sum over 'data', the one reduction of data parallelism.
        params = jax.lax.pcast(params, 'data', to='varying')
        if axis is not None:  # every tower sees the whole image
            images = jax.lax.pcast(images, axis, to='varying')
        return module.apply({'params': params}, images, masks)

    def run(params, images, masks):
        specs = (parameter_specs(net, mesh), P('data'), mask_specs(masks, mesh))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P('data'))
        return mapped(params, images, masks)

    return run


def mask_specs(masks: Mapping[str, Array] | None, mesh: Mesh) -> dict[str, P] | None:
    """Dropout masks [B, ..., units]: split over both axes."""
    if masks is None:
        return None
    axis = tower_axis(mesh)
    return {name: P('data', *(None,) * (mask.ndim - 2), axis) for name, mask in masks.items()}


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())
