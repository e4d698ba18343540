"""Values and gradients of the operations, against float64 loops and autodiff of the plain forms."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from alexnet_jax.model import ops


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(actual, expected, tolerance=2e-6):
    """Largest error relative to the largest value: float32 sums of a few hundred terms."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def gradient(function, dy, *args):
    """Vector-Jacobian products of `function` at float32 `args`, jit-compiled."""
    args = [jnp.asarray(a, jnp.float32) for a in args]
    return jax.jit(lambda *a: jax.vjp(function, *a)[1](jnp.asarray(dy, jnp.float32)))(*args)


def run(function, *args):
    return jax.jit(function)(*[jnp.asarray(a, jnp.float32) for a in args])


# --- float64 references, with their gradients, written as loops ----------------------------


def slow_conv(x, kernel, dy=None, *, stride=1, padding=((0, 0), (0, 0)), groups=1):
    """y, or with dy given (dx, dkernel)."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    (kh, kw, fan_in, features), (_, height, width, _) = kernel.shape, x.shape
    y = np.zeros((len(x), (height - kh) // stride + 1, (width - kw) // stride + 1, features))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for i, j, g in itertools.product(range(y.shape[1]), range(y.shape[2]), range(groups)):
        reads = np.s_[:, i * stride :, j * stride :, g * fan_in : (g + 1) * fan_in]
        writes = np.s_[:, i, j, g * features // groups : (g + 1) * features // groups]
        kernel_g = kernel[..., writes[-1]]
        y[writes] = np.einsum('bhwi,hwio->bo', x[reads][:, :kh, :kw], kernel_g)
        if dy is not None:
            dx[reads][:, :kh, :kw] += np.einsum('bo,hwio->bhwi', dy[writes], kernel_g)
            dkernel[..., writes[-1]] += np.einsum(
                'bhwi,bo->hwio', x[reads][:, :kh, :kw], dy[writes]
            )
    (top, bottom), (left, right) = padding
    return y if dy is None else (dx[:, top : height - bottom, left : width - right], dkernel)


def slow_normalise(x, window, dy=None, *, k, alpha, beta):
    """`window(i)` lists the flat indices whose squares are summed for element i of one image."""
    flat = x.reshape(len(x), -1)
    weights = np.zeros((flat.shape[1],) * 2)
    for i in range(flat.shape[1]):
        weights[i, window(i)] = 1
    scale = k + alpha * flat**2 @ weights.T
    if dy is None:
        return (flat / scale**beta).reshape(x.shape)
    dy = dy.reshape(flat.shape)
    spread = (dy * flat * scale ** (-beta - 1)) @ weights
    return (dy * scale**-beta - 2 * alpha * beta * flat * spread).reshape(x.shape)


def channel_window(shape, groups, size):
    """Flat indices of the `size` nearest channels of the same group and pixel."""
    channels, per_group = shape[3], shape[3] // groups

    def window(i):
        c = i % channels
        low, high = c // per_group * per_group, (c // per_group + 1) * per_group
        first = c - size // 2
        return [i - c + n for n in range(first, first + size) if low <= n < high]

    return window


def map_window(shape, size):
    """Flat indices of the `size` x `size` pixels around an element in its own map."""
    _, height, width, _ = shape

    def window(i):
        row, column, channel = np.unravel_index(i, shape[1:])
        rows = [r for r in range(row - size // 2, row - size // 2 + size) if 0 <= r < height]
        columns = [
            c for c in range(column - size // 2, column - size // 2 + size) if 0 <= c < width
        ]
        return [np.ravel_multi_index((r, c, channel), shape[1:]) for r in rows for c in columns]

    return window


def slow_pool(x, dy=None, *, window, stride, kind='max'):
    """y, or with dy given dx; a tie goes to the first maximum in row-major order."""
    height, width = ((n - window) // stride + 1 for n in x.shape[1:3])
    y, dx = np.zeros((len(x), height, width, x.shape[3])), np.zeros_like(x)
    for b, i, j, c in np.ndindex(y.shape):
        block = np.s_[b, i * stride : i * stride + window, j * stride : j * stride + window, c]
        y[b, i, j, c] = x[block].max() if kind == 'max' else x[block].mean()
        if dy is not None and kind == 'max':
            row, column = np.unravel_index(x[block].argmax(), (window, window))
            dx[b, i * stride + row, j * stride + column, c] += dy[b, i, j, c]
        elif dy is not None:
            dx[block] += dy[b, i, j, c] / window**2
    return y if dy is None else dx


# --- convolution ---------------------------------------------------------------------------

CONVOLUTIONS = {
    # name: (x shape, kernel shape, stride, padding, groups)
    'conv1 of AlexNet': ((2, 24, 24, 3), (11, 11, 3, 8), 4, ((0, 3), (0, 3)), 1),
    'conv1, one channel': ((3, 16, 20, 1), (11, 11, 1, 6), 4, ((0, 3), (0, 3)), 1),
    'one channel, pixels left over': ((2, 22, 21, 1), (5, 3, 1, 4), 2, ((2, 1), (0, 2)), 1),
    'one channel, stride larger than kernel': ((2, 10, 9, 1), (3, 3, 1, 4), 4, ((1, 0), (0, 1)), 1),
    'conv1, nothing over': ((2, 19, 23, 3), (11, 11, 3, 4), 4, ((0, 0), (0, 0)), 1),
    'conv1, pixels left over': ((2, 22, 21, 2), (11, 11, 2, 4), 4, ((0, 0), (0, 0)), 1),
    'conv2 of AlexNet': ((2, 7, 9, 8), (5, 5, 4, 12), 1, ((2, 2), (2, 2)), 2),
    'conv3 of AlexNet': ((3, 6, 6, 10), (3, 3, 10, 8), 1, ((1, 1), (1, 1)), 1),
    'conv4 of AlexNet': ((3, 6, 6, 8), (3, 3, 4, 6), 1, ((1, 1), (1, 1)), 2),
    'wide': ((2, 6, 5, 70), (3, 3, 70, 66), 1, ((1, 1), (1, 1)), 1),
    'pixelwise': ((2, 5, 4, 6), (1, 1, 6, 7), 1, ((0, 0), (0, 0)), 1),
    'pixelwise, stride 2': ((2, 6, 5, 6), (1, 1, 3, 4), 2, ((0, 0), (0, 0)), 2),
    'stride 2': ((2, 8, 7, 5), (3, 3, 5, 4), 2, ((1, 1), (1, 1)), 1),
    'stride 2, even kernel': ((2, 9, 8, 4), (2, 4, 2, 6), 2, ((0, 1), (2, 1)), 2),
    'asymmetric': ((2, 6, 7, 4), (5, 3, 2, 6), 1, ((0, 3), (2, 0)), 2),
    'stride larger than kernel': ((2, 10, 9, 3), (3, 3, 3, 4), 4, ((1, 0), (0, 1)), 1),
    'one output': ((2, 5, 5, 3), (5, 5, 3, 4), 1, ((0, 0), (0, 0)), 1),
}


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_conv_is_the_sum_of_its_definition(case):
    x_shape, kernel_shape, stride, padding, groups = CONVOLUTIONS[case]
    x, kernel = normal(*x_shape), normal(*kernel_shape, seed=1)
    keys: dict[str, Any] = {'stride': stride, 'padding': padding, 'groups': groups}
    y = slow_conv(x, kernel, **keys)
    dy = normal(*y.shape, seed=2)

    def conv(x, kernel):
        return ops.conv(x, kernel, **keys)

    assert_close(run(conv, x, kernel), y)
    for actual, expected in zip(
        gradient(conv, dy, x, kernel), slow_conv(x, kernel, dy, **keys), strict=True
    ):
        assert_close(actual, expected)


def test_conv_without_its_input_gradient_computes_none():
    x, kernel = jnp.ones((2, 27, 27, 3)), jnp.ones((11, 11, 3, 8))

    def loss(kernel, x):
        return jnp.sum(ops.conv(x, kernel, stride=4) ** 2)

    def multiply_adds(argnums):
        compiled = jax.jit(jax.grad(loss, argnums)).lower(kernel, x).compile()
        cost = compiled.cost_analysis()
        assert cost is not None
        return cost['flops']

    forward = 2 * 2 * 5 * 5 * 11 * 11 * 3 * 8
    assert multiply_adds((0, 1)) - multiply_adds(0) > 0.9 * forward


@pytest.mark.parametrize(('kernel', 'groups'), [((3, 3, 4, 4), 1), ((3, 3, 3, 5), 2)])
def test_conv_refuses_channels_that_do_not_fit(kernel, groups):
    with pytest.raises(ValueError, match='groups'):
        ops.conv(jnp.ones((1, 5, 5, 6)), jnp.ones(kernel), groups=groups)


def test_windows_larger_than_the_image_are_refused():
    x = jnp.ones((1, 4, 9, 2))
    with pytest.raises(ValueError, match='5 x 5 does not fit into 4 x 9'):
        ops.conv(x, jnp.ones((5, 5, 2, 2)))
    for pool in (ops.max_pool, ops.avg_pool):
        with pytest.raises(ValueError, match='5 x 5 does not fit into 4 x 9'):
            pool(x, window=5, stride=2)


# --- normalisation -------------------------------------------------------------------------


@pytest.mark.parametrize('beta', [0.75, 0.5])
@pytest.mark.parametrize('size', [5, 3, 4, 1])
@pytest.mark.parametrize(('channels', 'groups'), [(12, 1), (12, 2), (3, 1), (6, 2), (1, 1)])
def test_lrn_is_the_formula(channels, groups, size, beta):
    x, dy = 3 * normal(2, 2, 3, channels), normal(2, 2, 3, channels, seed=1)
    constants = {'k': 2.0, 'alpha': 0.3, 'beta': beta}  # an alpha that matters at this size of x
    window = channel_window(x.shape, groups, size)

    def lrn(x):
        return ops.lrn(x, groups=groups, size=size, **constants)

    assert_close(run(lrn, x), slow_normalise(x, window, **constants))
    assert_close(gradient(lrn, dy, x)[0], slow_normalise(x, window, dy, **constants))


@pytest.mark.parametrize('beta', [0.75, 0.5])
@pytest.mark.parametrize(
    ('shape', 'size'), [((2, 7, 6, 3), 5), ((1, 3, 2, 2), 5), ((2, 5, 4, 1), 2)]
)
def test_spatial_norm_is_the_formula(shape, size, beta):
    x, dy = 3 * normal(*shape), normal(*shape, seed=1)
    constants = {'k': 1.0, 'alpha': 0.1, 'beta': beta}
    window = map_window(shape, size)

    def norm(x):
        return ops.spatial_norm(x, size=size, **constants)

    assert_close(run(norm, x), slow_normalise(x, window, **constants))
    assert_close(gradient(norm, dy, x)[0], slow_normalise(x, window, dy, **constants))


def test_default_constants_are_the_2012_programs():
    x = 100 * normal(2, 4, 5, 12)
    lrn = slow_normalise(x, channel_window(x.shape, 1, 5), k=2, alpha=0.00002, beta=0.75)
    spatial = slow_normalise(x, map_window(x.shape, 5), k=1, alpha=0.00004, beta=0.75)
    assert_close(run(ops.lrn, x), lrn)
    assert_close(run(ops.spatial_norm, x), spatial)


def test_lrn_windows_do_not_cross_towers():
    a, b, c = normal(1, 2, 2, 8), normal(1, 2, 2, 8, seed=1), 9 * normal(1, 2, 2, 8, seed=2)

    def first_tower(x):
        return ops.lrn(x, groups=2, alpha=1.0)[..., :8]

    with_b, with_c = (run(first_tower, np.concatenate([a, other], -1)) for other in (b, c))
    np.testing.assert_array_equal(with_b, with_c)
    alone = run(lambda x: ops.lrn(x, alpha=1.0), a)
    np.testing.assert_array_equal(with_b, alone)
    dx = gradient(first_tower, np.ones(a.shape), np.concatenate([a, b], -1))[0]
    assert not dx[..., 8:].any()
    assert dx[..., :8].all()


def test_lrn_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match='3 channels cannot be divided into 2 groups'):
        ops.lrn(jnp.ones((1, 2, 2, 3)), groups=2)


# --- pooling -------------------------------------------------------------------------------

POOLS = [(3, 2), (2, 2), (3, 1), (2, 3), (3, 5), (4, 3), (1, 1), (1, 2), (5, 2)]


@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('shape', [(2, 7, 9, 3), (2, 8, 6, 2), (1, 5, 5, 1)])
def test_max_pool_with_ties(shape, window, stride):
    x = np.round(normal(*shape))  # a handful of values, so that most windows have ties
    y = slow_pool(x, window=window, stride=stride)
    dy = normal(*y.shape, seed=1)

    def pool(x):
        return ops.max_pool(x, window=window, stride=stride)

    np.testing.assert_array_equal(run(pool, x), y)
    assert_close(gradient(pool, dy, x)[0], slow_pool(x, dy, window=window, stride=stride))


@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('shape', [(2, 7, 9, 3), (2, 8, 6, 2)])
def test_avg_pool(shape, window, stride):
    x = normal(*shape)
    y = slow_pool(x, window=window, stride=stride, kind='mean')
    dy = normal(*y.shape, seed=1)

    def pool(x):
        return ops.avg_pool(x, window=window, stride=stride)

    assert_close(run(pool, x), y)
    expected = slow_pool(x, dy, window=window, stride=stride, kind='mean')
    assert_close(gradient(pool, dy, x)[0], expected)


def test_max_pool_of_a_constant_gives_each_gradient_to_the_first_pixel():
    dx = gradient(ops.max_pool, np.ones((1, 2, 2, 1)), np.zeros((1, 5, 5, 1)))[0]
    expected = np.zeros((5, 5))
    expected[:3:2, :3:2] = 1
    np.testing.assert_array_equal(dx[0, :, :, 0], expected)


# --- what holds for all of them ------------------------------------------------------------

KERNEL = jnp.asarray(normal(3, 3, 3, 8, seed=3), jnp.float32)
OPERATIONS = {
    'conv': lambda x, kernel=KERNEL: ops.conv(x, kernel, padding=((1, 1), (1, 1)), groups=2),
    'strided conv': lambda x, kernel=KERNEL: ops.conv(x, kernel, stride=2, groups=2),
    'lrn': lambda x: ops.lrn(x, groups=2, alpha=0.1),
    'spatial_norm': lambda x: ops.spatial_norm(x, alpha=0.1),
    'max_pool': ops.max_pool,
    'avg_pool': ops.avg_pool,
}


def loss_gradient(function):
    """The gradient of a sum in which every output has its own weight."""

    def loss(x):
        y = function(x).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    return jax.grad(loss)


@pytest.mark.parametrize('name', OPERATIONS)
def test_bfloat16(name):
    # bf16 keeps 8 bits, so one rounding is 2^-9 = 0.2 % of a value; some hundred of them in a
    # gradient's sums stay under 2 % of the largest value.
    x = jnp.asarray(normal(2, 7, 9, 6), jnp.bfloat16)
    function = OPERATIONS[name]
    arguments = {'kernel': KERNEL.astype(jnp.bfloat16)} if 'conv' in name else {}
    y = jax.jit(lambda x: function(x, **arguments))(x)
    assert y.dtype == jnp.bfloat16
    arguments32 = {key: value.astype(jnp.float32) for key, value in arguments.items()}
    x32 = x.astype(jnp.float32)
    assert_close(y, jax.jit(lambda x: function(x, **arguments32))(x32), 0.02)
    dx = jax.jit(loss_gradient(lambda x: function(x, **arguments)))(x)
    dx32 = jax.jit(loss_gradient(lambda x: function(x, **arguments32)))(x32)
    assert dx.dtype == jnp.bfloat16
    assert_close(dx, dx32, 0.02)


@pytest.mark.parametrize('name', ['lrn', 'spatial_norm'])
def test_norms_of_bfloat16_sum_in_float32(name):
    # 256 + 1 is 256 in bf16: a window of one large and four small values separates the two.
    x = np.ones((1, 5, 5, 10))
    x[:, 2, 2, ::5] = 16
    function = {'lrn': ops.lrn, 'spatial_norm': ops.spatial_norm}[name]
    y = function(jnp.asarray(x, jnp.bfloat16), k=0.0, alpha=1.0)
    expected = function(jnp.asarray(x, jnp.float32), k=0.0, alpha=1.0)
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize('name', OPERATIONS)
def test_vmap(name):
    x = jnp.asarray(normal(3, 2, 7, 9, 6), jnp.float32)
    function = OPERATIONS[name]
    for one in (function, loss_gradient(function)):
        together = jax.jit(jax.vmap(one))(x)
        apart = jnp.stack([jax.jit(one)(part) for part in x])
        assert_close(together, apart)


@pytest.mark.parametrize('name', OPERATIONS)
def test_forms_of_other_platforms_agree(name):
    """The forms of an accelerator give the values and gradients of the CPU's."""
    x, function = jnp.asarray(np.round(normal(3, 7, 9, 6), 1), jnp.float32), OPERATIONS[name]
    kernel = [KERNEL] if 'conv' in name else []
    y = jax.jit(function)(x, *kernel)
    dy = normal(*y.shape, seed=1)
    expected = gradient(function, dy, x, *kernel)
    with ops.traced_for('gpu'):
        assert_close(jax.jit(lambda *a: function(*a))(x, *kernel), y)
        actual = gradient(function, dy, x, *kernel)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize('name', OPERATIONS)
def test_not_a_number_comes_out_as_it_went_in(name):
    """A run that has gone wrong must be seen: no operation may hide a NaN among its inputs."""
    x = jnp.asarray(normal(2, 7, 9, 6), jnp.float32).at[0, 2, 2, 1].set(jnp.nan)
    y = jax.jit(OPERATIONS[name])(x)
    assert jnp.isnan(y[0]).any()
    assert not jnp.isnan(y[1]).any()


needs_two = pytest.mark.skipif(len(jax.devices()) < 2, reason='needs two (virtual) devices')


def mesh():
    return jax.make_mesh((2, 1), ('data', 'tower'), axis_types=(AxisType.Auto,) * 2)


@needs_two
@pytest.mark.parametrize('name', OPERATIONS)
def test_inside_shard_map(name):
    """A batch split over two devices: the same values, and kernel gradients summed over both."""
    x = jnp.asarray(normal(4, 7, 9, 6), jnp.float32)
    function = OPERATIONS[name]
    kernel = [KERNEL] if 'conv' in name else []
    data, replicated = PartitionSpec('data'), PartitionSpec()

    sharded = jax.shard_map(
        function,
        mesh=mesh(),
        in_specs=(data, *[replicated] * len(kernel)),
        out_specs=data,
        check_vma=True,
    )
    y = jax.jit(function)(x, *kernel)
    dy = jnp.asarray(normal(*y.shape, seed=1), jnp.float32)
    assert_close(jax.jit(sharded)(x, *kernel), y)
    gradients = (gradient(f, dy, x, *kernel) for f in (sharded, function))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)


@needs_two
@pytest.mark.parametrize('name', OPERATIONS)
def test_gradient_taken_inside_shard_map(name):
    """Value and gradient inside, as in a train step; the batch's gradient stays sharded."""
    x = jnp.asarray(normal(4, 7, 9, 6), jnp.float32)
    function = loss_gradient(OPERATIONS[name])
    data = PartitionSpec('data')
    sharded = jax.shard_map(function, mesh=mesh(), in_specs=data, out_specs=data, check_vma=True)
    expected = jnp.concatenate([jax.jit(function)(half) for half in (x[:2], x[2:])])
    assert_close(jax.jit(sharded)(x), expected)
