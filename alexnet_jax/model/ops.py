"""The array operations of AlexNet on `[B, H, W, C]`: pure functions, also fast on a CPU.

On a CPU, XLA's own gradients of normalisation and max-pooling are several times slower than their
forward passes. Custom vector-Jacobian products are therefore defined here, so only reverse-mode
differentiation is available.
"""

import contextlib
import functools
from collections.abc import Generator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')
_NO_PAD = (0, 0, 0)  # before, behind, between, as `lax.pad` has them


_platform: ContextVar[str] = ContextVar('platform')


def platform() -> str:
    """Return the platform that programs are traced for: this process's, as 'cpu' or 'gpu'.

    Operations have one form for a CPU and one for everything else.
    """
    return _platform.get(None) or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Generator[None]:
    """Trace programs in this context for another platform, to lower or to inspect them.

    Build and jit functions inside it: JAX reuses what it has traced before.

    Args:
      name: 'cpu', 'gpu' or 'tpu'.
    """
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)


def _on_cpu() -> bool:
    return platform() == 'cpu'


def _kept(x):
    """`x`, and its gradient, written to memory once before anything reads them.

    On a CPU XLA recomputes an array in every loop that reads it: a max-pool wherever the next
    layer's gradient reads it, the border of a window at every element. It heeds this under
    `cpu.compiler_options`.
    """
    return lax.optimization_barrier(x) if _on_cpu() else x


# --- convolution ---------------------------------------------------------------------------


def conv(x, kernel, *, stride: int = 1, padding=((0, 0), (0, 0)), groups: int = 1):
    """Convolve images with kernels (cross-correlation, as in every deep-learning library).

    Args:
      x: images, `[B, H, W, Cin]`.
      kernel: `[kh, kw, Cin // groups, Cout]`; group g reads the g-th block of input channels and
        writes the g-th block of output channels, as the towers of alexnet's conv2, 4 and 5 do.
      stride: step of the window in pixels, the same in both directions.
      padding: zeros added `((top, bottom), (left, right))`.
      groups: number of groups.

    Returns:
      `[B, (H + top + bottom - kh) // stride + 1, (W + left + right - kw) // stride + 1, Cout]`.

    Raises:
      ValueError: channels do not divide into the groups, or the kernel is larger than the image.
    """
    (kh, kw, fan_in, features), channels = kernel.shape, x.shape[-1]
    if fan_in * groups != channels or features % groups:
        raise ValueError(
            f'a convolution of {channels} channels to {features} in {groups} groups cannot use '
            f'kernels {kernel.shape}: channels and features must be multiples of the groups'
        )
    _check_window('kernel', (kh, kw), x, padding)
    padding = tuple(map(tuple, padding))
    if not _on_cpu():
        return _xla_conv(x, kernel, stride, padding, groups)
    convolve = _grey_conv if channels == 1 < stride else _xla_conv
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    maps = [_kept(convolve(_kept(a), b, stride, padding)) for a, b in pairs]
    return jnp.concatenate(maps, -1)


def _xla_conv(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _grey_conv(x, kernel, stride, padding):
    """Convolve one channel as the `stride` ** 2 channels of its blocks: twice as fast on a CPU.

    Eigen copies runs of a window row's channels, too short otherwise. In training the blocks are
    not used: their gradient takes half as long again.
    """
    window = [-(-side // stride) for side in kernel.shape[:2]]  # in blocks
    sides = [
        (n + sum(pad) - k) // stride + w
        for n, pad, k, w in zip(x.shape[1:3], padding, kernel.shape[:2], window, strict=True)
    ]
    x = _blocks(x[..., 0], [before for before, _ in padding], sides, stride)
    kernel = _blocks(jnp.moveaxis(kernel[:, :, 0], -1, 0), (0, 0), window, stride)
    return _xla_conv(_kept(x), jnp.moveaxis(kernel, 0, -1), 1, ((0, 0), (0, 0)))


def _blocks(x, before, sides, step):
    """Return `[N, *sides, step ** 2]`, blocks of images `[N, H, W]` with zeros at the edges."""
    edges = [
        (start, side * step - start - n, 0)
        for start, side, n in zip(before, sides, x.shape[1:], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), (_NO_PAD, *edges))
    return x.reshape(-1, sides[0], step, sides[1], step).swapaxes(2, 3).reshape(-1, *sides, step**2)


def _grey_conv_forward(x, kernel, stride, padding):
    return jax.vjp(lambda x, kernel: _xla_conv(x, kernel, stride, padding), x, kernel)


_grey_conv.defvjp(_grey_conv_forward, lambda stride, padding, transposed, dy: transposed(dy))


# --- normalisation -------------------------------------------------------------------------


def lrn(x, *, groups: int = 1, size=5, k=2.0, alpha=1e-4 / 5, beta=0.75):
    """Apply local response normalisation over channels (paper, section 3.3).

    y = x / (k + alpha * sum of the squares of the `size` nearest channels) ** beta, the window
    clipped at the ends and never crossing from one group (tower) into the next.
    alpha is 1e-4 in the paper and 1e-4 / 5 in the 2012 program.

    Args:
      x: `[B, H, W, C]`; sums are taken in float32 whatever its type.
      groups: number of towers side by side in C.
      size: channels in a window; an even window has one more below than above.
      k: added constant.
      alpha: factor of the sum.
      beta: exponent.

    Returns:
      `[B, H, W, C]`, of x's type.

    Raises:
      ValueError: the groups do not divide the channels.
    """
    if x.shape[-1] % groups:
        raise ValueError(f'{x.shape[-1]} channels cannot be divided into {groups} groups for LRN')
    towers = jnp.split(_kept(x), groups, -1)
    towers = [_normalise(tower, _channel_sum, size, k, alpha, beta) for tower in towers]
    return jnp.concatenate(towers, -1)


def spatial_norm(x, *, size=5, k=1.0, alpha=0.001 / 25, beta=0.75):
    """Normalise over a `size` x `size` window within each map, clipped at the borders.

    The formula is that of `lrn`. Only the 2012 program has it, after conv2's LRN.

    Args:
      x: `[B, H, W, C]`; sums are taken in float32 whatever its type.
      size: pixels in a window's side; an even window has one more above and left than below.
      k: added constant.
      alpha: factor of the sum.
      beta: exponent.

    Returns:
      `[B, H, W, C]`, of x's type.
    """
    return _normalise(_kept(x), _pixel_sum, size, k, alpha, beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _normalise(x, window_sum, size, k, alpha, beta):
    wide = x.astype(jnp.float32)
    scale = k + alpha * window_sum(wide * wide, size // 2, size)
    return (wide * _power(scale, beta)).astype(x.dtype)


def _normalise_forward(x, window_sum, size, k, alpha, beta):
    return _normalise(x, window_sum, size, k, alpha, beta), x


def _normalise_backward(window_sum, size, k, alpha, beta, x, dy):
    # y_i = x_i s_i^-b with s = k + a W x^2, hence
    # dx = dy s^-b - 2 a b x W'(dy x s^-b / s), W' the transposed window.
    # Keeping only x and computing s again costs less than keeping s.
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    scale = k + alpha * window_sum(wide * wide, size // 2, size)
    direct = dy * _power(scale, beta)
    spread = window_sum(direct * wide / scale, size - 1 - size // 2, size)
    return ((direct - (2 * alpha * beta) * wide * spread).astype(x.dtype),)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _channel_sum(x, before, size):
    """Return sums over the `size` channels that start `before` channels earlier."""
    return _axis_sum(x, 3, before, size)


def _pixel_sum(x, before, size):
    """Return sums over `size` x `size` pixels that start `before` rows and columns earlier."""
    return _axis_sum(_axis_sum(x, 1, before, size), 2, before, size)


def _axis_sum(x, axis, before, size):
    """Return sums over the `size` elements along `axis` that start `before` elements earlier."""
    pads = [(before, size - 1 - before) if a == axis else (0, 0) for a in range(x.ndim)]
    padded, length = _kept(jnp.pad(x, pads)), x.shape[axis]
    parts = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)]
    return functools.reduce(jnp.add, parts)


def _power(scale, beta):
    """Return `scale ** -beta`; for 3/4 by two roots, which vectorise where pow does not.

    Each root is used once: XLA writes a value that is used twice to memory, in a separate pass.
    """
    if beta == 0.75:
        return lax.rsqrt(scale * jnp.sqrt(scale))
    return scale**-beta


# --- pooling -------------------------------------------------------------------------------


def max_pool(x, *, window=3, stride=2):
    """Take the maximum of `window` x `window` pixels every `stride` pixels, inside the image.

    The gradient goes to the first maximum of each window in row-major order.

    Args:
      x: `[B, H, W, C]`.
      window: side of the window in pixels.
      stride: step in pixels; window > stride is the paper's overlapping pooling (section 3.4).

    Returns:
      `[B, (H - window) // stride + 1, (W - window) // stride + 1, C]`.

    Raises:
      ValueError: the window is larger than the image.
    """
    _check_window('pooling window', (window, window), x)
    if _on_cpu():
        return _kept(_max_pool(_kept(x), window, stride, x.shape[1:3]))
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    lowest = np.array(-np.inf, x.dtype)  # a constant: JAX then knows the gradient
    return lax.reduce_window(x, lowest, lax.max, sizes, strides, 'VALID')


def avg_pool(x, *, window=3, stride=2):
    """Take the mean of `window` x `window` pixels every `stride` pixels, inside the image.

    Args, returns and errors as for `max_pool`.
    """
    _check_window('pooling window', (window, window), x)
    wide = _kept(x).astype(jnp.float32)
    total = functools.reduce(jnp.add, _taps(wide, window, stride))
    return (total / window**2).astype(x.dtype)


def _taps(x, window, stride):
    """Return the window's pixels as strided views of x, `[B, H', W', C]`, in row-major order."""
    tall, broad = ((n - window) // stride * stride + 1 for n in x.shape[1:3])
    return [
        x[:, i : i + tall : stride, j : j + broad : stride]
        for i in range(window)
        for j in range(window)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, sides):
    return functools.reduce(jnp.maximum, _taps(x, window, stride))


def _max_pool_forward(x, window, stride, sides):
    best, *taps = _taps(x, window, stride)
    chosen = jnp.zeros_like(best, jnp.int8 if window < 12 else jnp.int32)  # number of the tap
    for number, tap in enumerate(taps, 1):
        chosen = jnp.where(tap > best, jnp.asarray(number, chosen.dtype), chosen)
        best = jnp.maximum(best, tap)
    return best, _kept(chosen)


def _max_pool_backward(window, stride, sides, chosen, dy):
    zero = jnp.zeros((), dy.dtype)

    def spread(number):
        """Place the gradients of the windows that chose this tap at its pixels of the image."""
        edges = [
            (start, side - start - stride * (steps - 1) - 1, stride - 1)
            for start, side, steps in zip(divmod(number, window), sides, dy.shape[1:3], strict=True)
        ]
        return lax.pad(jnp.where(chosen == number, dy, zero), zero, (_NO_PAD, *edges, _NO_PAD))

    return (functools.reduce(jnp.add, map(spread, range(window * window))),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _check_window(what, sides, x, padding=((0, 0), (0, 0))):
    padded = [n + sum(pad) for n, pad in zip(x.shape[1:3], padding, strict=True)]
    if sides[0] > padded[0] or sides[1] > padded[1]:
        raise ValueError(
            f'a {what} of {sides[0]} x {sides[1]} does not fit into {padded[0]} x {padded[1]} px: '
            'use a larger image, more padding or a smaller window'
        )
