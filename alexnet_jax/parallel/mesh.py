"""Where things lie: the ('data', 'tower') mesh, what is split over it, and the model on it.

Two placements:

* 'towers': the paper's (section 3.2 and figure 2). The tower axis is its two GPUs: of size 1 it
  holds both towers on each device, of size 2 one tower a device. Images are split over 'data'.
* 'one_weird_trick': Krizhevsky's of 2014 (arXiv 1404.5997). Convolutions run on each device's own
  images; the units of fully connected layers are split over the same devices, and each device runs
  its units on the images of all.

One device is the mesh (1, 1). Parameters are the same global arrays everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.config import MeshShape
from alexnet_jax.errors import UsageError
from alexnet_jax.model.alexnet import AlexNet, Net, Split, Spread
from alexnet_jax.parallel import cpu

Array = jax.Array
Forward = Callable[[dict, Array, Mapping[str, Array] | None], Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh, and which of its axes the units of each kind of layer are split over."""

    mesh: Mesh
    spread: Spread

    def __str__(self) -> str:
        return ' x '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())

    @property
    def replicas(self) -> int:
        """Over how many devices a batch is split."""
        return self.mesh.shape['data']


def lay_out(shape: MeshShape, batch_size: int) -> Layout:
    """All of this job's devices as ('data', 'tower').

    Raises:
        UsageError: the sizes do not fit the devices, or the batch does not divide.
    """
    cpu.set_up_cpu(shape.cpu_devices)
    devices = jax.device_count()
    data = shape.data if shape.data > 0 else devices // shape.tower
    if data < 1 or devices % (data * shape.tower):
        raise UsageError(
            f'a mesh of data {shape.data} x tower {shape.tower} does not divide the {devices} '
            f'device(s) here; choose divisors, or mesh.data=-1 for all that are left.'
        )
    if jax.process_count() > 1 and data * shape.tower != devices:
        raise UsageError(
            f'a mesh of data {data} x tower {shape.tower} leaves some of the {devices} devices of '
            f'{jax.process_count()} processes idle; set mesh.data=-1.'
        )
    if batch_size % data:
        raise UsageError(
            f'batch_size {batch_size} does not divide over {data} devices along the data axis; '
            f'choose a multiple of {data}.'
        )
    mesh = jax.make_mesh(
        (data, shape.tower),
        ('data', 'tower'),  # towers innermost: the two of a pair are neighbours
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: data * shape.tower],
    )
    _introduce(mesh)
    if shape.placement == 'one_weird_trick':
        return Layout(mesh, Spread(fc=_split(mesh, 'data'), whole_batch=data > 1))
    towers = _split(mesh, 'tower')
    return Layout(mesh, Spread(conv=towers, fc=towers))


def _introduce(mesh: Mesh) -> None:
    """Have the devices of several processes meet now, in each of the groups that will talk.

    Gloo gives a group 30 s for its first collective and any time for later ones; and one process
    may find its compiled step in the cache while another compiles it for a minute.
    """
    if jax.process_count() == 1:
        return
    for axes in ('data', 'tower', ('data', 'tower')):
        meet = jax.shard_map(
            lambda x, axes=axes: jax.lax.psum(x, axes),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            check_vma=False,  # each device brings the same number
        )
        jax.block_until_ready(jax.jit(meet)(np.float32(1)))


def _split(mesh: Mesh, axis: str) -> Split:
    return Split(axis, mesh.shape[axis]) if mesh.shape[axis] > 1 else Split()


def parameter_specs(net: Net, layout: Layout) -> dict[str, dict[str, P]]:
    """Output axes are split as units are; the last layer's input axis, as it sums over them.

    Raises:
        UsageError: the devices do not divide a layer's units.
    """
    specs = {}
    maps = False  # whether a layer reads maps, whose flattened axis no device holds a share of
    for layer in net.layers:
        split = layout.spread.of(layer)
        if layer is net.layers[-1]:
            specs[layer.name] = {'kernel': P() if maps else P(split.axis, None), 'bias': P()}
            break
        if layer.features % split.shards:
            raise UsageError(
                f'{layer.name}: {split.shards} devices do not divide its {layer.features} units; '
                f'choose another mesh or placement.'
            )
        rank = 4 if layer.kind == 'conv' else 2
        specs[layer.name] = {'kernel': P(*(None,) * (rank - 1), split.axis), 'bias': P(split.axis)}
        maps = layer.kind == 'conv'
    return specs


def shardings(specs: Any, layout: Layout) -> Any:
    """A tree of PartitionSpecs on this mesh."""
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs, is_leaf=is_spec)


def state_shardings(state: Any, net: Net, layout: Layout) -> Any:
    """For a tree that holds parameter trees, as the optimiser's: parameters split, all else whole.

    `state` gives structure and shapes only (`jax.eval_shape`).
    """
    specs = parameter_specs(net, layout)

    def of(path, leaf) -> NamedSharding:
        del leaf
        names = [str(getattr(key, 'key', '')) for key in path[-2:]]
        known = len(names) == 2 and names[0] in specs
        return NamedSharding(layout.mesh, specs[names[0]][names[1]] if known else P())

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(layout: Layout) -> NamedSharding:
    """Batches are split over 'data' along their first axis."""
    return NamedSharding(layout.mesh, P('data'))


def whole(layout: Layout) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(layout.mesh, P())


def own_rows(layout: Layout, batch_size: int) -> slice:
    """Which rows of a batch the devices of this process hold."""
    indices = batch_sharding(layout).addressable_devices_indices_map((batch_size,))
    rows = [index[0].indices(batch_size) for index in indices.values() if index is not None]
    return slice(min(start for start, *_ in rows), max(stop for _, stop, _ in rows))


def place_batch(layout: Layout, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Array]:
    """Arrays that hold this process's own rows -> global arrays [size, ...] on the devices."""
    sharding = batch_sharding(layout)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def place(tree: Any, shardings: Any) -> Any:
    """NumPy arrays that all processes hold -> global arrays; a sharding, or a tree of them."""

    def leaf(array, sharding: Sharding) -> Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda array: leaf(array, shardings), tree)
    return jax.tree.map(leaf, tree, shardings)


def fetch(tree: Any, layout: Layout) -> Any:
    """Global arrays, however they are split, as NumPy's on the host of every process."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=whole(layout))(tree)
    return jax.device_get(tree)


def forward(net: Net, layout: Layout) -> Forward:
    """The net on a mesh: (params, images [B, H, W, C], masks or None) -> logits [B, classes].

    Arguments and result are global arrays; differentiating it sums gradients over 'data'.
    """
    module: Any = AlexNet(net, layout.spread)
    if layout.mesh.size == 1:  # XLA would copy all gradients for a sum over one device
        return lambda params, images, masks: module.apply({'params': params}, images, masks)
    specs = parameter_specs(net, layout)

    def local(params, images, masks):
        params = {name: _own_gradient(name, params[name], specs[name]) for name in specs}
        if layout.mesh.shape['tower'] > 1:  # every tower sees the whole image
            images = jax.lax.pcast(images, 'tower', to='varying')
        return module.apply({'params': params}, images, masks)

    def run(params, images, masks):
        in_specs = (specs, P('data'), mask_specs(masks, layout))
        mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=P('data'))
        return mapped(params, images, masks)

    return run


def _own_gradient(name: str, params: dict[str, Array], specs: dict[str, P]) -> dict[str, Array]:
    """Parameters that every device along 'data' holds, marked as varying over it.

    A device's gradient is of its own images only. The transpose of the mark is the sum over 'data':
    the one reduction of data parallelism.
    """
    with jax.named_scope(name), jax.named_scope('data_parallel'):
        return {
            kind: value if 'data' in specs[kind] else jax.lax.pcast(value, 'data', to='varying')
            for kind, value in params.items()
        }


def mask_specs(masks: Mapping[str, Array] | None, layout: Layout) -> dict[str, P] | None:
    """Dropout masks [B, ..., units]: split as the units they belong to."""
    if masks is None:
        return None
    spread = layout.spread

    def of(mask: Array) -> P:
        if mask.ndim == 4:
            return P('data', None, None, spread.conv.axis)
        return P(None if spread.whole_batch else 'data', spread.fc.axis)

    return {name: of(mask) for name, mask in masks.items()}
