"""The net: a table of layers, its geometry, and the Linen module that runs it.

A net is data. Every layer is one linear operation followed by an ordered list of other operations.
The nets of the 2012 program, the paper's text and the tutorials are all such tables.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from alexnet_jax.errors import UsageError
from alexnet_jax.model import ops

Array = jax.Array
Shape = tuple[int, ...]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': jax.nn.relu,
    'tanh': jnp.tanh,
    'sigmoid': jax.nn.sigmoid,
}
Op = Literal['relu', 'tanh', 'sigmoid', 'lrn', 'spatial_norm', 'pool', 'dropout']
OPS: tuple[str, ...] = get_args(Op)
LARGE_MAPS = 2**15  # values of one image; smaller maps are copied in the cache


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table.

    `reads` is 'all' (the maps of all towers, which communicate here) or 'own' (those of its own
    tower only: a grouped operation). The first layer reads the image, which all towers see. The
    last layer always reads all and has no towers.
    """

    name: str
    kind: Literal['conv', 'fc']
    features: int  # output channels or units, all towers together
    kernel_px: int
    stride_px: int
    padding_px: tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)
    reads: Literal['own', 'all']
    init: Literal['gaussian', 'uniform', 'xavier', 'fan_in_uniform']  # see INITIALIZERS
    init_std: float
    bias: float  # initial value of every bias
    ops: tuple[Op, ...]  # in order


@dataclasses.dataclass(frozen=True)
class Norm:
    """y = x / (k + alpha * sum of squares over the window) ** beta (paper, section 3.3)."""

    size: int
    k: float
    alpha: float  # multiplies the sum, not the mean: 1e-4 in the paper, 1e-4 / 5 in the source
    beta: float


@dataclasses.dataclass(frozen=True)
class Pool:
    """Max or average over a window; overlapping when stride < window (paper, section 3.4).

    `rounding` of the output size: windows that extend past the right or bottom edge are dropped
    ('down'), or take the maximum of their part inside ('up', maxima only), as in cuda-convnet and
    Caffe.
    """

    kind: Literal['max', 'average']
    window_px: int
    stride_px: int
    rounding: Literal['down', 'up'] = 'down'

    def overhang_px(self, side: int) -> int:
        """Return how far the last window extends past the edge of a map of `side` px."""
        return (self.window_px - side) % self.stride_px if self.rounding == 'up' else 0


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout (paper, section 4.2).

    `mask`: zero units in training, multiply all of them by `keep` at test, as in 2012.
    `inverted`: zero units and divide the others by `keep` in training, as libraries do now.
    """

    keep: float
    kind: Literal['mask', 'inverted']


@dataclasses.dataclass(frozen=True)
class Net:
    """A complete net. `input_px` and `channels` are those of the crops that it sees."""

    layers: tuple[Layer, ...]
    towers: int
    input_px: int
    channels: int
    lrn: Norm
    spatial_norm: Norm
    pool: Pool
    dropout: Dropout
    compute_dtype: Literal['float32', 'bfloat16']
    # LRN's window ends at the tower's border, as in 2012, or crosses it ('all'), as in Caffe.
    lrn_reads: Literal['own', 'all'] = 'own'

    @property
    def classes(self) -> int:
        """Return the number of classes, the units of the last layer."""
        return self.layers[-1].features


def activation_names(layer: Layer) -> tuple[str, ...]:
    """Return the names of a layer's activations, in order: 'conv1_linear', 'conv1_lrn', ..."""
    return tuple(f'{layer.name}_{op}' for op in ('linear', *layer.ops))


# ------------------------------------------------------------------------------------- geometry


@dataclasses.dataclass(frozen=True)
class Stage:
    """A layer with its shapes for one image: [H, W, C] of a convolution, [units] of an fc."""

    layer: Layer
    input: Shape
    output: Shape  # of the linear operation; the 2012 papers count its size as neurons
    after: tuple[Shape, ...]  # after each of `layer.ops`
    kernel: Shape  # of the parameter, in the canonical tree
    groups: int  # the number of towers if the layer reads its own only, else 1

    @property
    def fan_in(self) -> int:
        """Return the number of inputs of one unit."""
        return math.prod(self.kernel[:-1])

    @property
    def parameters(self) -> int:
        """Return the number of weights and biases."""
        return math.prod(self.kernel) + self.kernel[-1]

    @property
    def multiply_adds(self) -> int:
        """Return the multiply-adds of a forward pass of one image, biases not counted."""
        return self.fan_in * math.prod(self.output)

    @property
    def result(self) -> Shape:
        """Return the shape that the next layer reads."""
        return self.after[-1] if self.after else self.output


def geometry(net: Net) -> tuple[Stage, ...]:
    """Return every layer with its shapes, in order.

    Raises:
        UsageError: a layer does not fit its input (too large a kernel or window, channels that the
            towers do not divide, a convolution after a fully connected layer, ...).
    """
    stages: list[Stage] = []
    shape: Shape = (net.input_px, net.input_px, net.channels)
    end = len(net.layers) - 1
    for number, layer in enumerate(net.layers):
        groups = net.towers if layer.reads == 'own' and 0 < number < end else 1
        if shape[-1] % groups or (number < end and layer.features % net.towers):
            raise UsageError(
                f'{layer.name}: {net.towers} towers do not divide {shape[-1]} inputs and '
                f'{layer.features} features; choose multiples of {net.towers}.'
            )
        if layer.kind == 'conv':
            output, kernel = _conv_shape(layer, shape, groups)
        else:
            output, kernel = (layer.features,), (math.prod(shape) // groups, layer.features)
        after: list[Shape] = []
        for op in layer.ops:
            after.append(_after(op, after[-1] if after else output, layer, net.pool))
        stages.append(Stage(layer, shape, output, tuple(after), kernel, groups))
        shape = stages[-1].result
    return tuple(stages)


def _conv_shape(layer: Layer, shape: Shape, groups: int) -> tuple[Shape, Shape]:
    if len(shape) != 3:
        raise UsageError(
            f'{layer.name} is a convolution after a fully connected layer: move it before.'
        )
    sides = []
    for side, (before, behind) in zip(shape[:2], layer.padding_px, strict=True):
        if side + before + behind < layer.kernel_px:
            raise UsageError(
                f'{layer.name}: a kernel of {layer.kernel_px} px does not fit its input of {side} '
                f'px with padding {before} + {behind}; enlarge the input or remove layers.'
            )
        sides.append((side + before + behind - layer.kernel_px) // layer.stride_px + 1)
    kernel = (layer.kernel_px, layer.kernel_px, shape[2] // groups, layer.features)
    return (sides[0], sides[1], layer.features), kernel


def _after(op: str, shape: Shape, layer: Layer, pool: Pool) -> Shape:
    if op in ('lrn', 'spatial_norm', 'pool') and len(shape) != 3:
        raise UsageError(
            f"{layer.name}: '{op}' needs feature maps, but this layer has none: remove it."
        )
    if op != 'pool':
        return shape
    if min(shape[:2]) < pool.window_px:
        raise UsageError(
            f'{layer.name}: a pooling window of {pool.window_px} px does not fit maps of '
            f'{shape[0]} x {shape[1]} px; enlarge the input or remove a pooling operation.'
        )
    sides = (side + pool.overhang_px(side) for side in shape[:2])
    height, width = ((side - pool.window_px) // pool.stride_px + 1 for side in sides)
    return (height, width, shape[2])


# --------------------------------------------------------------------------------- initialisers


def _uniform(layer: Layer) -> nn.initializers.Initializer:
    """Return a uniform initialiser of deviation `init_std`: its limits are sqrt(3) times that."""
    limit = layer.init_std * math.sqrt(3)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


INITIALIZERS: dict[str, Callable[[Layer], nn.initializers.Initializer]] = {
    'gaussian': lambda layer: nn.initializers.normal(layer.init_std),  # untruncated, as in 2012
    'uniform': _uniform,
    'xavier': lambda _: nn.initializers.glorot_uniform(),  # Glorot and Bengio, 2010
    # PyTorch's default for convolutions and linear layers: limits +-1 / sqrt(fan-in).
    'fan_in_uniform': lambda _: nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
}


# ---------------------------------------------------------------------------------- the module


class Linear(nn.Module):
    """A layer's linear operation, with its parameters `kernel` and `bias`.

    Where units are sharded over devices, the parameters are this device's shard of the canonical
    ones, along the output axis or, in the last layer, along the input axis.
    """

    layer: Layer
    groups: int  # on this device
    shards: int = 1  # devices over which the output axis is split

    @nn.compact
    def __call__(self, x: Array, total: Callable[[Array], Array] | None = None) -> Array:
        """Map `x` [B, H, W, C] to [B, H', W', features], or [B, inputs] to [B, features].

        `total` sums the partial results of devices that hold shards of the input axis.
        """
        layer = self.layer
        features = layer.features // self.shards
        inputs = x.shape[-1] // self.groups
        window = (layer.kernel_px, layer.kernel_px) if layer.kind == 'conv' else ()
        kernel = self.param(
            'kernel', INITIALIZERS[layer.init](layer), (*window, inputs, features), jnp.float32
        )
        bias = self.param('bias', nn.initializers.constant(layer.bias), (features,), jnp.float32)
        kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
        if layer.kind == 'conv':
            x = ops.conv(
                x, kernel, stride=layer.stride_px, padding=layer.padding_px, groups=self.groups
            )
        elif self.groups == 1:
            x = x @ kernel
        else:  # each tower's units read its own tower's inputs only
            own = x.reshape(len(x), self.groups, inputs)
            split = kernel.reshape(inputs, self.groups, features // self.groups)
            x = jnp.einsum('bti,itf->btf', own, split).reshape(len(x), features)
        if total is not None:
            x = total(x)
        parts = self.groups if _in_towers(x) else 1
        pairs = zip(jnp.split(x, parts, -1), jnp.split(bias, parts), strict=True)
        return jnp.concatenate([a + jnp.expand_dims(b, range(x.ndim - 1)) for a, b in pairs], -1)


@dataclasses.dataclass(frozen=True)
class AxisShard:
    """The mesh axis, inside `jax.shard_map`, over whose devices a layer's units are sharded."""

    axis: str | None = None
    shards: int = 1


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """The sharding of convolutions and of fully connected layers; by default one device holds all.

    gather_batch: fully connected layers see the images of all devices along their axis, not only
        those of this device (Krizhevsky 2014, "One weird trick").
    """

    conv: AxisShard = AxisShard()
    fc: AxisShard = AxisShard()
    gather_batch: bool = False

    def of(self, layer: Layer) -> AxisShard:
        """Return the sharding of a layer's units."""
        return self.conv if layer.kind == 'conv' else self.fc


class AlexNet(nn.Module):
    """The layer table as a network.

    By default one device computes all of it. Inside `jax.shard_map`, with `tensor_parallel`,
    the same code computes this device's units and communicates only where a layer reads units of
    other devices.
    """

    net: Net
    tensor_parallel: TensorParallel = TensorParallel()

    @nn.compact
    def __call__(self, images: Array, masks: Mapping[str, Array] | None = None) -> Array:
        """Map float `images` [B, H, W, C] to float32 logits [B, classes].

        Every layer's output, and the result of each of its `ops`, is sown into the collection
        'intermediates' under its name in `activation_names`.

        Args:
            images: crops minus the mean, in 0-255 units (0 to 1: collapsed initialisation). They
                are computed with in `compute_dtype`.
            masks: in training, which units each dropout keeps on this device: bool [B, units] by
                layer name, see `draw_masks`. None: test time.
        """
        parallel = self.tensor_parallel
        *hidden, head = geometry(self.net)
        x = images.astype(self.net.compute_dtype)
        shard = AxisShard()  # how the channels of x are sharded; images are replicated
        for stage in hidden:
            layer, own = stage.layer, parallel.of(stage.layer)
            with jax.named_scope(layer.name):
                if stage.groups == 1:  # reads the units of all devices
                    x = _gather(x, shard, axis=-1)
                groups = max(1, stage.groups // own.shards)
                if layer.kind == 'fc' and x.ndim == 4:
                    x = _flatten(x, groups)
                    if parallel.gather_batch:
                        x = _gather(x, parallel.fc, axis=0)
                x = Linear(layer, groups, own.shards, name=layer.name)(x)
                towers = max(1, self.net.towers // parallel.conv.shards)
                x = self._apply_ops(layer, x, masks, towers)
            shard = own
        with jax.named_scope(head.layer.name):
            x = self._classify(head.layer, x, shard)
            x = self._apply_ops(head.layer, x, masks)
        return x.astype(jnp.float32)

    def _classify(self, layer: Layer, x: Array, shard: AxisShard) -> Array:
        """Apply the last layer, whose kernel is split along its inputs: the devices add up."""
        linear = Linear(layer, groups=1, name=layer.name)
        if x.ndim == 2 and shard.shards > 1:
            return linear(x, self._sum)
        x = _gather(x, shard, axis=-1)
        if layer.kind == 'fc' and x.ndim == 4:
            x = _flatten(x, towers=1)
        x = linear(x)
        # All devices have the same logits; pmean makes this known to shard_map.
        return jax.lax.pmean(x, shard.axis) if shard.shards > 1 else x

    def _sum(self, x: Array) -> Array:
        """Add the devices' partial logits; returns those of this device's images."""
        axis = self.tensor_parallel.fc.axis
        if self.tensor_parallel.gather_batch:
            return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return jax.lax.psum(x, axis)

    def _apply_ops(
        self, layer: Layer, x: Array, masks: Mapping[str, Array] | None, towers: int = 1
    ) -> Array:
        self.sow('intermediates', f'{layer.name}_linear', x)
        alone = _in_towers(x) and self.net.lrn_reads == 'own' and 'dropout' not in layer.ops
        parts = jnp.split(x, towers if alone else 1, -1)
        for op in layer.ops:
            parts = [self.apply_op(op, part, layer, masks) for part in parts]
            x = jnp.concatenate(parts, -1)
            self.sow('intermediates', f'{layer.name}_{op}', x)
        return x

    def apply_op(self, op: str, x: Array, layer: Layer, masks: Mapping[str, Array] | None) -> Array:
        """Apply one of OPS to a layer's output, [B, H, W, C] or [B, units]."""
        net = self.net
        if op in ACTIVATIONS:
            return ACTIVATIONS[op](x)
        if op == 'lrn':
            return self._lrn(x, layer)
        if op == 'spatial_norm':
            return ops.spatial_norm(x, **dataclasses.asdict(net.spatial_norm))
        if op == 'pool':
            pool = ops.max_pool if net.pool.kind == 'max' else ops.avg_pool
            x = _pad_overhang(x, net.pool)
            return pool(x, window=net.pool.window_px, stride=net.pool.stride_px)
        if op == 'dropout':
            return drop(x, None if masks is None else masks[layer.name], net.dropout)
        raise ValueError(f"{layer.name}: '{op}' is not one of {', '.join(OPS)}.")

    def _lrn(self, x: Array, layer: Layer) -> Array:
        net, shard = self.net, self.tensor_parallel.conv
        norm = dataclasses.asdict(net.lrn)
        if net.lrn_reads == 'own':
            return ops.lrn(x, groups=x.shape[-1] * net.towers // layer.features, **norm)
        normed = ops.lrn(_gather(x, shard, axis=-1), **norm)
        if shard.shards == 1:
            return normed
        first = jax.lax.axis_index(shard.axis) * x.shape[-1]
        return jax.lax.dynamic_slice_in_dim(normed, first, x.shape[-1], axis=-1)


def _in_towers(maps: Array) -> bool:
    """Return whether operations treat each tower's maps alone: on a CPU, if the maps are large.

    XLA concatenates arrays in a single thread. It omits this where the next operation splits them
    again.
    """
    large = maps.ndim == 4 and math.prod(maps.shape[1:]) >= LARGE_MAPS
    return large and ops.platform() == 'cpu'


def drop(x: Array, mask: Array | None, dropout: Dropout) -> Array:
    """Apply dropout to `x` [B, ...] with a bool `mask` [B, ...]; None: test time."""
    if mask is None:
        return x * dropout.keep if dropout.kind == 'mask' else x
    kept = jnp.where(mask, x, 0)
    return kept if dropout.kind == 'mask' else kept / dropout.keep


def draw_masks(key: Array, net: Net, batch_size: int) -> dict[str, Array]:
    """Draw which units each dropout keeps: bool [B, ...] by layer name, in the global view.

    Masks are drawn outside `shard_map`, so that they are the same on every mesh.
    """
    masks = {}
    for number, stage in enumerate(geometry(net)):
        if 'dropout' in stage.layer.ops:
            shape = stage.after[stage.layer.ops.index('dropout')]
            stream = jax.random.fold_in(key, number)
            masks[stage.layer.name] = jax.random.bernoulli(
                stream, net.dropout.keep, (batch_size, *shape)
            )
    return masks


def init(key: Array, net: Net) -> dict[str, dict[str, Array]]:
    """Return the canonical parameter tree, float32: {layer: {'kernel': ..., 'bias': ...}}.

    Kernels of convolutions are [kh, kw, inputs of one group, features], those of fully connected
    layers [inputs, features]. Channels are ordered tower by tower. The tree is the same on every
    mesh.
    """
    images = jnp.zeros((1, net.input_px, net.input_px, net.channels))
    return jax.jit(AlexNet(net).init)(key, images)['params']  # eagerly it takes seconds


def activations(
    net: Net,
    params: Any,
    images: Array,
    masks: Any = None,
    tensor_parallel: TensorParallel | None = None,
) -> dict[str, Array]:
    """Return the results of a forward pass by the names of `activation_names`."""
    module = AlexNet(net, tensor_parallel or TensorParallel())
    _, sown = module.apply({'params': params}, images, masks, mutable=['intermediates'])
    return {name: value for name, (value,) in sown['intermediates'].items()}


def mean_loss(logits: Array, labels: Array) -> Array:
    """Return the mean softmax cross-entropy in nats of `logits` [B, classes], `labels` int [B]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _gather(x: Array, shard: AxisShard, axis: int) -> Array:
    """Concatenate the shards of all devices along an axis of `x`."""
    if shard.shards == 1:
        return x
    return jax.lax.all_gather(x, shard.axis, axis=axis % x.ndim, tiled=True)


def _pad_overhang(x: Array, pool: Pool) -> Array:
    """Pad maps with -inf where pooling windows extend past the edge."""
    bottom, right = (pool.overhang_px(side) for side in x.shape[1:3])
    if not (bottom or right):
        return x
    border = ((0, 0), (0, bottom), (0, right), (0, 0))
    return jnp.pad(x, border, constant_values=-jnp.inf)  # mode 'edge' is 20 times slower


def _flatten(x: Array, towers: int) -> Array:
    """Flatten [B, H, W, C] to [B, H * W * C], each tower's maps together."""
    batch, height, width, channels = x.shape
    if towers > 1:
        x = x.reshape(batch, height * width, towers, channels // towers).swapaxes(1, 2)
    return x.reshape(batch, height * width * channels)
