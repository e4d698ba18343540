"""The ('data', 'tower') mesh of devices, the sharding of arrays over it, and the net on it.

Two placements:

* 'towers': the paper's (section 3.2 and figure 2). The tower axis stands for its two GPUs: with
  size 1 each device holds both towers, with size 2 one tower. Images are split over 'data'.
* 'one_weird_trick': Krizhevsky's of 2014 (arXiv 1404.5997). Convolutions run on each device's own
  images. The units of fully connected layers are split over the same devices, and each device runs
  its units on the images of all devices.

One device is the mesh (1, 1). Parameters are the same global arrays on every mesh.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.config import MeshShape
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import AlexNet, AxisShard, Net, TensorParallel
from alexnet_jax.parallel import cpu

Array = jax.Array
Forward = Callable[[dict, Array, Mapping[str, Array] | None], Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the sharding of a run's arrays over it: parameters, state, batches, masks.

    tensor_parallel: the mesh axis over which the units of each kind of layer are split.
    """

    mesh: Mesh
    tensor_parallel: TensorParallel

    def __str__(self) -> str:
        return ' x '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())

    # -------------------------------------------------------------- shardings

    @property
    def replicas(self) -> int:
        """The number of devices that a batch is split over."""
        return self.mesh.shape['data']

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds in full."""
        return NamedSharding(self.mesh, P())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch [B, ...]: split over 'data' along its first axis."""
        return NamedSharding(self.mesh, P('data'))

    def parameter_specs(self, net: Net) -> dict[str, dict[str, P]]:
        """Return the PartitionSpec of each parameter.

        Output axes are split as the layer's units are. The last layer is split along its input
        axis, as it sums over the units of the layer before.

        Raises:
            UsageError: the devices do not divide a layer's units.
        """
        specs = {}
        for layer in net.layers[:-1]:
            shard = self.tensor_parallel.of(layer)
            if layer.features % shard.shards:
                raise UsageError(
                    f'{layer.name}: its {layer.features} units cannot be divided over '
                    f'{shard.shards} devices; choose another mesh or placement.'
                )
            rank = 4 if layer.kind == 'conv' else 2
            kernel = P(*(None,) * (rank - 1), shard.axis)
            specs[layer.name] = {'kernel': kernel, 'bias': P(shard.axis)}
        *before, last = net.layers
        # No device holds a contiguous share of flattened maps.
        reads_units = not before or before[-1].kind == 'fc'
        kernel = P(self.tensor_parallel.of(last).axis, None) if reads_units else P()
        return specs | {last.name: {'kernel': kernel, 'bias': P()}}

    def parameter_shardings(self, net: Net) -> dict[str, dict[str, NamedSharding]]:
        """Return the sharding of each parameter, see `parameter_specs`."""
        return {
            name: {kind: NamedSharding(self.mesh, spec) for kind, spec in specs.items()}
            for name, specs in self.parameter_specs(net).items()
        }

    def state_shardings(self, state: Any, net: Net) -> Any:
        """Return the shardings of a tree that holds parameter trees, as the optimizer's state does.

        Parameters are sharded as `parameter_specs`, all else is replicated. `state` gives structure
        and shapes only (`jax.eval_shape`).
        """
        parameters = self.parameter_shardings(net)

        def sharding(path, leaf) -> NamedSharding:
            del leaf
            names = [str(getattr(key, 'key', '')) for key in path[-2:]]
            known = len(names) == 2 and names[0] in parameters
            return parameters[names[0]][names[1]] if known else self.replicated

        return jax.tree_util.tree_map_with_path(sharding, state)

    def mask_specs(self, masks: Mapping[str, Array] | None) -> dict[str, P] | None:
        """Return the PartitionSpecs of dropout masks [B, ..., units], split as the units are."""
        if masks is None:
            return None
        shards = self.tensor_parallel

        def spec(mask: Array) -> P:
            if mask.ndim == 4:
                return P('data', None, None, shards.conv.axis)
            return P(None if shards.gather_batch else 'data', shards.fc.axis)

        return {name: spec(mask) for name, mask in masks.items()}

    # ------------------------------------------------------- between host and devices

    def local_batch_slice(self, batch_size: int) -> slice:
        """Return the rows of a global batch that this process's devices hold."""
        indices = self.batch_sharding.addressable_devices_indices_map((batch_size,))
        rows = [index[0].indices(batch_size) for index in indices.values() if index is not None]
        return slice(min(start for start, *_ in rows), max(stop for _, stop, _ in rows))

    def put_batch(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Array]:
        """Put this process's rows of a batch on the devices, as global arrays [size, ...]."""
        return {
            name: jax.make_array_from_process_local_data(
                self.batch_sharding, rows, (size, *rows.shape[1:])
            )
            for name, rows in batch.items()
        }

    def to_host(self, tree: Any) -> Any:
        """Return global arrays, however they are sharded, as NumPy arrays in every process."""
        if jax.process_count() > 1:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.device_get(tree)

    # ---------------------------------------------------------------- the net

    def forward(self, net: Net) -> Forward:
        """Return (params, images [B, H, W, C], masks or None) -> logits [B, classes].

        Arguments and result are global arrays. Differentiating it sums gradients over 'data'.
        """
        module: Any = AlexNet(net, self.tensor_parallel)
        if self.mesh.size == 1:  # XLA would copy all gradients for a sum over one device
            return lambda params, images, masks: module.apply({'params': params}, images, masks)
        specs = self.parameter_specs(net)

        def local(params, images, masks):
            params = {name: _local_gradient(name, params[name], specs[name]) for name in specs}
            if self.mesh.shape['tower'] > 1:  # every tower sees the full image
                images = jax.lax.pcast(images, 'tower', to='varying')
            return module.apply({'params': params}, images, masks)

        def run(params, images, masks):
            in_specs = (specs, P('data'), self.mask_specs(masks))
            mapped = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=P('data'))
            return mapped(params, images, masks)

        return run


def _local_gradient(name: str, params: dict[str, Array], specs: dict[str, P]) -> dict[str, Array]:
    """Mark parameters that every device along 'data' holds as varying over it.

    The gradient of a device covers its own images only. The transpose of the mark is the sum over
    'data': the one reduction of data parallelism.
    """
    with jax.named_scope(name), jax.named_scope('data_parallel'):
        return {
            kind: value if 'data' in specs[kind] else jax.lax.pcast(value, 'data', to='varying')
            for kind, value in params.items()
        }


def put_global(tree: Any, shardings: Any) -> Any:
    """Put NumPy arrays that all processes hold on the devices, as global arrays.

    Args:
        tree: of arrays.
        shardings: one sharding for all leaves, or a tree of them.
    """

    def put(array, sharding: Sharding) -> Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


# ------------------------------------------------------------------------------- building one


def make_layout(shape: MeshShape, batch_size: int) -> Layout:
    """Return the layout of this run's devices.

    Raises:
        UsageError: the sizes do not fit the devices, or the batch does not divide.
    """
    cpu.set_up_cpu(shape.cpu_devices)
    devices, processes = jax.device_count(), jax.process_count()
    data = shape.data if shape.data > 0 else devices // shape.tower
    size = data * shape.tower
    if data < 1 or devices % size or (processes > 1 and size != devices):
        raise UsageError(
            f'a mesh of data {shape.data} x tower {shape.tower} does not match the {devices} '
            f'device(s) here; choose divisors (several processes must use all devices), or '
            f'mesh.data=-1 for all remaining ones.'
        )
    if batch_size % data:
        raise UsageError(
            f'batch_size {batch_size} cannot be divided over {data} devices along the data axis; '
            f'choose a multiple of {data}.'
        )
    mesh = jax.make_mesh(
        (data, shape.tower),
        ('data', 'tower'),  # towers innermost: the two of a pair are neighbours
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:size],
    )
    _warm_up_collectives(mesh)
    if shape.placement == 'one_weird_trick':
        return Layout(mesh, TensorParallel(fc=_shard_over(mesh, 'data'), gather_batch=data > 1))
    towers = _shard_over(mesh, 'tower')
    return Layout(mesh, TensorParallel(conv=towers, fc=towers))


def _warm_up_collectives(mesh: Mesh) -> None:
    """Connect the devices of several processes now, in each group that will communicate.

    Gloo gives a group 30 s for its first collective and any time for later ones. One process may
    find its compiled step in the cache while another compiles it for a minute.
    """
    if jax.process_count() == 1:
        return
    for axes in ('data', 'tower', ('data', 'tower')):
        total = jax.shard_map(
            lambda x, axes=axes: jax.lax.psum(x, axes),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            check_vma=False,  # each device brings the same number
        )
        jax.block_until_ready(jax.jit(total)(np.float32(1)))


def _shard_over(mesh: Mesh, axis: str) -> AxisShard:
    return AxisShard(axis, mesh.shape[axis]) if mesh.shape[axis] > 1 else AxisShard()
