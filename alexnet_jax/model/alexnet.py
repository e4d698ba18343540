"""The net: a table of layers, the geometry that follows from it, and the Linen module that runs it.

A net is data. Every layer is one linear operation and the ordered list of what follows it, so the
2012 program, the paper's text and every AlexNet of the tutorials are tables, not classes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

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
OPS = (*ACTIVATIONS, 'lrn', 'spatial_norm', 'pool', 'dropout')


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table.

    `reads` is 'all' (both towers' maps: the towers talk here) or 'own' (its own tower's maps only:
    a grouped operation). The first layer reads the image, which both towers see; the last layer
    always reads all and has no towers.
    """

    name: str
    kind: str  # 'conv' or 'fc'
    features: int  # output channels or units, all towers together
    kernel_px: int
    stride_px: int
    padding_px: tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)
    reads: str
    init: str  # a key of INITIALIZERS
    init_std: float
    bias: float  # initial value of every bias
    ops: tuple[str, ...]  # of OPS, in order


@dataclasses.dataclass(frozen=True)
class Norm:
    """y = x / (k + alpha * sum of squares over the window) ** beta (paper, section 3.3)."""

    size: int
    k: float
    alpha: float  # multiplies the sum as it stands: 1e-4 in the paper, 1e-4 / 5 in the source
    beta: float


@dataclasses.dataclass(frozen=True)
class Pool:
    """Max or average over a window; overlapping when stride < window (paper, section 3.4).

    `rounding`: windows that hang over the right or bottom edge are left out ('down'), or are there
    and see what lies inside ('up', maxima only), as in cuda-convnet and Caffe.
    """

    kind: str  # 'max' or 'average'
    window_px: int
    stride_px: int
    rounding: str = 'down'

    def overhang_px(self, side: int) -> int:
        """By how much the last window hangs over the edge of a map of `side` px."""
        return (self.window_px - side) % self.stride_px if self.rounding == 'up' else 0


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Paper, section 4.2.

    `mask`: zero units in training, multiply all of them by `keep` at test, as in 2012.
    `inverted`: zero units and multiply the rest by 1 / `keep` in training, as libraries do now.
    """

    keep: float
    kind: str  # 'mask' or 'inverted'


@dataclasses.dataclass(frozen=True)
class Net:
    """A whole net. `input_px` and `channels` are those of the crop that the first layer sees."""

    layers: tuple[Layer, ...]
    towers: int
    input_px: int
    channels: int
    lrn: Norm
    spatial_norm: Norm
    pool: Pool
    dropout: Dropout
    compute_dtype: str
    lrn_reads: str = 'own'  # its window stops at the tower's border, as in 2012; 'all': Caffe's

    @property
    def classes(self) -> int:
        """Units of the last layer."""
        return self.layers[-1].features


def activation_names(layer: Layer) -> tuple[str, ...]:
    """The names of what a layer does, in order: 'conv1_linear', 'conv1_lrn', 'conv1_pool', ..."""
    return tuple(f'{layer.name}_{word}' for word in ('linear', *layer.ops))


# ------------------------------------------------------------------------------------- geometry


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a layer does to one image: shapes are [H, W, C] of a convolution, [units] of an fc."""

    layer: Layer
    input: Shape
    output: Shape  # of the linear operation; the 2012 papers count its size as neurons
    after: tuple[Shape, ...]  # after each word of `layer.ops`
    kernel: Shape  # of the parameter, in the canonical tree
    groups: int

    @property
    def fan_in(self) -> int:
        """Inputs of one unit."""
        return math.prod(self.kernel[:-1])

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return math.prod(self.kernel) + self.kernel[-1]

    @property
    def multiply_adds(self) -> int:
        """For one image, forward, biases not counted."""
        return self.fan_in * math.prod(self.output)

    @property
    def result(self) -> Shape:
        """What the next layer reads."""
        return self.after[-1] if self.after else self.output


def geometry(net: Net) -> tuple[Stage, ...]:
    """The shapes of every layer, in order.

    Raises:
        UsageError: a layer does not fit its input (too big a kernel or window, channels that the
            towers do not divide, a convolution after a fully connected layer, ...).
    """
    stages: list[Stage] = []
    shape: Shape = (net.input_px, net.input_px, net.channels)
    for layer in net.layers:
        first, last = layer is net.layers[0], layer is net.layers[-1]
        groups = net.towers if layer.reads == 'own' and not (first or last) else 1
        if shape[-1] % groups or (not last and layer.features % net.towers):
            raise UsageError(
                f'{layer.name}: {net.towers} towers do not divide {shape[-1]} inputs and '
                f'{layer.features} features; choose multiples of {net.towers}.'
            )
        if layer.kind == 'conv':
            output, kernel = _conv_shape(layer, shape, groups)
        else:
            output, kernel = (layer.features,), (math.prod(shape) // groups, layer.features)
        after: list[Shape] = []
        for word in layer.ops:
            after.append(_after(word, after[-1] if after else output, layer, net.pool))
        stages.append(Stage(layer, shape, output, tuple(after), kernel, groups))
        shape = stages[-1].result
    return tuple(stages)


def _conv_shape(layer: Layer, shape: Shape, groups: int) -> tuple[Shape, Shape]:
    if len(shape) != 3:
        raise UsageError(f'{layer.name} is a convolution behind a fully connected layer: move it.')
    sides = []
    for side, (before, behind) in zip(shape[:2], layer.padding_px, strict=True):
        if side + before + behind < layer.kernel_px:
            raise UsageError(
                f'{layer.name}: a kernel of {layer.kernel_px} px does not fit its input of {side} '
                f'px with padding {before} + {behind}; enlarge the input or take layers away.'
            )
        sides.append((side + before + behind - layer.kernel_px) // layer.stride_px + 1)
    kernel = (layer.kernel_px, layer.kernel_px, shape[2] // groups, layer.features)
    return (sides[0], sides[1], layer.features), kernel


def _after(word: str, shape: Shape, layer: Layer, pool: Pool) -> Shape:
    if word in ('lrn', 'spatial_norm', 'pool') and len(shape) != 3:
        raise UsageError(f"{layer.name}: '{word}' needs maps, and this layer has none: remove it.")
    if word != 'pool':
        return shape
    if min(shape[:2]) < pool.window_px:
        raise UsageError(
            f'{layer.name}: a pooling window of {pool.window_px} px does not fit maps of '
            f'{shape[0]} x {shape[1]} px; enlarge the input or pool less often.'
        )
    sides = (side + pool.overhang_px(side) for side in shape[:2])
    height, width = ((side - pool.window_px) // pool.stride_px + 1 for side in sides)
    return (height, width, shape[2])


# --------------------------------------------------------------------------------- initialisers


def _gaussian(layer: Layer) -> nn.initializers.Initializer:
    return nn.initializers.normal(layer.init_std)  # untruncated, as in 2012


def _uniform(layer: Layer) -> nn.initializers.Initializer:
    """Uniform with standard deviation `init_std`: the limits are sqrt(3) times that."""
    limit = layer.init_std * math.sqrt(3)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


def _xavier(layer: Layer) -> nn.initializers.Initializer:
    return nn.initializers.glorot_uniform()  # Glorot and Bengio, 2010


def _fan_in_uniform(layer: Layer) -> nn.initializers.Initializer:
    """PyTorch's default for convolutions and linear layers: limits +-1 / sqrt(fan-in)."""
    return nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


INITIALIZERS: dict[str, Callable[[Layer], nn.initializers.Initializer]] = {
    'gaussian': _gaussian,
    'uniform': _uniform,
    'xavier': _xavier,
    'fan_in_uniform': _fan_in_uniform,
}


# ---------------------------------------------------------------------------------- the module


class Linear(nn.Module):
    """A layer's linear operation, with its parameters `kernel` and `bias`.

    Where units are split over devices the parameters are this device's share of the canonical
    ones: the output axis is split, or, in the last layer, the input axis.
    """

    layer: Layer
    groups: int  # on this device
    shards: int = 1  # devices over which the output axis is split

    @nn.compact
    def __call__(self, x: Array, total: Callable[[Array], Array] | None = None) -> Array:
        """`x` [B, H, W, C] -> [B, H', W', features], or [B, inputs] -> [B, features].

        `total` adds up what devices make of their shares of the input axis.
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
        return x + jnp.expand_dims(bias, range(x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class AxisShard:
    """Inside `jax.shard_map`: the mesh axis over whose devices a layer's units are split."""

    axis: str | None = None
    shards: int = 1


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """How convolutions and fully connected layers are spread; by default one device holds all.

    gather_batch: fully connected layers see the images of all devices along their axis (Krizhevsky
        2014, "One weird trick"), and not just those of this device.
    """

    conv: AxisShard = AxisShard()
    fc: AxisShard = AxisShard()
    gather_batch: bool = False

    def of(self, layer: Layer) -> AxisShard:
        """A layer's own."""
        return self.conv if layer.kind == 'conv' else self.fc


class AlexNet(nn.Module):
    """The interpreter of a layer table.

    Called as it stands it computes the whole net on one device. Inside `jax.shard_map`, with a
    `spread`, the same code computes this device's units and communicates only where a layer reads
    units that lie elsewhere.
    """

    net: Net
    tensor_parallel: TensorParallel = TensorParallel()

    @nn.compact
    def __call__(self, images: Array, masks: Mapping[str, Array] | None = None) -> Array:
        """Float `images` [B, H, W, C] -> logits [B, classes], float32 of compute_dtype's precision.

        Args:
            images: crops, mean subtracted, in 0-255 units (0 to 1: collapsed initialisation).
            masks: in training, for every layer with 'dropout' behind it, which units are kept:
                bool [B, units] (this device's), see `draw_masks`. None means test time, when all
                units count and are multiplied by the share that training keeps.

        Every layer's output, and what each of its `ops` makes of it, is sown into the collection
        'intermediates', under the names of `steps`.
        """
        net = self.net
        x = images.astype(net.compute_dtype)
        lies = AxisShard()  # how the channels of x are split; the image is seen whole everywhere
        for layer in net.layers:
            first, last = layer is net.layers[0], layer is net.layers[-1]
            own = layer.reads == 'own' and net.towers > 1 and not (first or last)
            split = self.tensor_parallel.of(layer)
            sums = last and x.ndim == 2 and lies.shards > 1
            with jax.named_scope(layer.name):
                if not (own or sums):
                    x = _gather(x, lies, axis=-1)
                towers = net.towers // split.shards if own else 1
                if layer.kind == 'fc' and x.ndim == 4:
                    x = _flatten(x, towers)
                    if self.tensor_parallel.gather_batch and not last:
                        x = _gather(x, self.tensor_parallel.fc, axis=0)
                linear = Linear(layer, towers, shards=1 if last else split.shards, name=layer.name)
                x = linear(x, self._sum if sums else None)
                if last and lies.shards > 1 and not sums:  # the same on each device: make it known
                    x = jax.lax.pmean(x, lies.axis)
                self.sow('intermediates', f'{layer.name}_linear', x)
                for word in layer.ops:
                    x = self._follow(word, x, layer, masks)
                    self.sow('intermediates', f'{layer.name}_{word}', x)
            lies = split
        return x.astype(jnp.float32)

    def _sum(self, x: Array) -> Array:
        """Partial logits of each device's units -> the logits of this device's images."""
        axis = self.tensor_parallel.fc.axis
        if self.tensor_parallel.gather_batch:
            return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return jax.lax.psum(x, axis)

    def _follow(
        self, word: str, x: Array, layer: Layer, masks: Mapping[str, Array] | None
    ) -> Array:
        net = self.net
        if word in ACTIVATIONS:
            return ACTIVATIONS[word](x)
        if word == 'lrn':
            return self._lrn(x)
        if word == 'spatial_norm':
            return ops.spatial_norm(x, **dataclasses.asdict(net.spatial_norm))
        if word == 'pool':
            pool = ops.max_pool if net.pool.kind == 'max' else ops.avg_pool
            x = _hang_over(x, net.pool)
            return pool(x, window=net.pool.window_px, stride=net.pool.stride_px)
        if word == 'dropout':
            return drop(x, None if masks is None else masks[layer.name], net.dropout)
        raise UsageError(f"{layer.name}: '{word}' is not one of {', '.join(OPS)}.")

    def _lrn(self, x: Array) -> Array:
        net, split = self.net, self.tensor_parallel.conv
        how = dataclasses.asdict(net.lrn)
        if net.lrn_reads == 'own':
            return ops.lrn(x, groups=net.towers // split.shards, **how)
        normed = ops.lrn(_gather(x, split, axis=-1), **how)
        if split.shards == 1:
            return normed
        first = jax.lax.axis_index(split.axis) * x.shape[-1]
        return jax.lax.dynamic_slice_in_dim(normed, first, x.shape[-1], axis=-1)


def drop(x: Array, mask: Array | None, dropout: Dropout) -> Array:
    """Dropout with a mask drawn elsewhere: `x` and bool `mask` [B, ...]; mask None is test time."""
    if mask is None:
        return x * dropout.keep if dropout.kind == 'mask' else x
    kept = jnp.where(mask, x, 0)
    return kept if dropout.kind == 'mask' else kept / dropout.keep


def draw_masks(key: Array, net: Net, batch_size: int) -> dict[str, Array]:
    """Which units each dropout keeps: bool [B, ...] by layer name, in the global view.

    Drawn outside `shard_map`, so that the bits are the same on every mesh.
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
    """The canonical parameter tree, float32: {layer: {'kernel': ..., 'bias': ...}}.

    Convolution kernels are [kh, kw, inputs of one group, features], fully connected ones
    [inputs, features]; channels run tower by tower, so the tree knows nothing of meshes.
    """
    images = jnp.zeros((1, net.input_px, net.input_px, net.channels))
    return jax.jit(AlexNet(net).init)(key, images)['params']  # eagerly it takes seconds


def mean_loss(logits: Array, labels: Array) -> Array:
    """Mean softmax cross-entropy in nats; `logits` [B, classes], `labels` int [B]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _gather(x: Array, split: AxisShard, axis: int) -> Array:
    """The shares of all devices of `split`, one behind the other along an axis of `x`."""
    if split.shards == 1:
        return x
    return jax.lax.all_gather(x, split.axis, axis=axis % x.ndim, tiled=True)


def _hang_over(x: Array, pool: Pool) -> Array:
    """Maps with a border that is no maximum, where windows hang over the edge."""
    bottom, right = (pool.overhang_px(side) for side in x.shape[1:3])
    if not (bottom or right):
        return x
    border = ((0, 0), (0, bottom), (0, right), (0, 0))
    return jnp.pad(x, border, constant_values=-jnp.inf)  # mode 'edge' is 20 times slower


def _flatten(x: Array, towers: int) -> Array:
    """[B, H, W, C] -> [B, H * W * C]; with several `towers`, each tower's maps lie together."""
    batch, height, width, channels = x.shape
    if towers > 1:
        x = x.reshape(batch, height * width, towers, channels // towers).swapaxes(1, 2)
    return x.reshape(batch, height * width * channels)
