"""The contestants of experiments.throughput: the same net and the same batch in several forms.

* ours: the trainer's own jitted step (its finiteness check and metrics included), and the net as
  evaluation runs it.
* naive: Flax as one writes it first: `lax` convolutions with groups, `reduce_window`, `optax.sgd`.
* prototype: naive, with LRN and max-pooling rewritten and a plain convolution a tower: the form
  that issue 4 counts from.
* torch, ...: PyTorch in {NCHW, channels_last} x {eager, compiled, on a GPU with CUDA graphs too} x
  {the library's LRN, a faster one}, SGD with momentum and decay in its fused form.

All take float32 images that lie on the device, but ours in training, which is given the same images
as uint8.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax import config, machine, model, parallel
from alexnet_jax.augment import Statistics
from alexnet_jax.config import Settings
from alexnet_jax.model import Net
from alexnet_jax.step import init_key, jit_init_state, jit_train_step, make_optimizer, seed_of

IMAGES = 1_281_167  # ILSVRC-2012's; only the schedules depend on it
GREY = 128.0  # taken from each pixel
PASSES = ('train', 'forward')

Run = Callable[[int], Any]  # does n steps one behind the other, waits, gives the last one's result


@dataclasses.dataclass(frozen=True)
class Case:
    """A net and a batch. `pixels`: uint8 [B, H, W, C]; `params`: the canonical tree in NumPy."""

    settings: Settings
    pixels: np.ndarray
    labels: np.ndarray  # int32 [B]
    params: dict[str, dict[str, np.ndarray]]

    @property
    def net(self) -> Net:
        """Its layer table."""
        return self.settings.net

    @property
    def images(self) -> np.ndarray:
        """What the first layer sees: float32 [B, H, W, C]."""
        return (self.pixels.astype(np.float32) - GREY) * np.float32(self.settings.preprocess.scale)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A form of the net, ready to run: after `run(n)`, its loss or logits as NumPy's by `value`."""

    run: Run
    value: Callable[[Any], np.ndarray] = lambda result: np.asarray(result, np.float32)


def case_of(source: Any, batch_size: int, dtype: str = 'float32') -> Case:
    """A config's net and a batch of noise; crops, mirrors and colour noise are switched off."""
    source.mesh.update(data=as_devices(source), tower=1)
    source.batch_size, source.model.compute_dtype = batch_size, dtype
    px = source.model.input_px
    source.preprocess.update(resize_px=px, image_px=px, crop=False, mirror=False, mean='image')
    source.preprocess.update(colour_noise=0.0, noise_divisor=1.0)
    settings = config.unpack(source)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch_size, px, px, settings.net.channels), np.uint8)
    labels = rng.integers(0, settings.net.classes, batch_size, np.int32)
    params = jax.device_get(model.init(init_key(seed_of(settings)), settings.net))
    return Case(settings, pixels, labels, params)


def as_devices(source: Any) -> int:
    """As how many devices the trainer would use this CPU, where JAX shows so many; else one."""
    wanted = source.mesh.cpu_devices if jax.default_backend() == 'cpu' else 1
    return wanted if 1 <= wanted <= jax.device_count() else 1


# ------------------------------------------------------------------------------------------- ours


def ours(case: Case, what: str) -> Contestant:
    """The trainer's step, or the net at test time."""
    settings = case.settings
    layout = parallel.lay_out(settings.mesh, settings.batch_size)
    if what == 'forward':
        forward = jax.jit(
            functools.partial(parallel.forward(settings.net, layout), masks=None),
            compiler_options=parallel.compiler_options(),
        )
        params = jax.device_put(case.params, parallel.whole(layout))
        images = jax.device_put(case.images, parallel.batch_sharding(layout))
        return repeated(lambda: forward(params, images))
    optimizer = make_optimizer(settings, IMAGES)
    step, shardings = jit_train_step(settings, layout, optimizer, IMAGES)
    start = jit_init_state(settings, optimizer, shardings)
    batch = {'image': case.pixels, 'label': case.labels}
    batch = parallel.place_batch(layout, batch, settings.batch_size)
    grey = np.full(case.pixels.shape[1:], GREY, np.float32)
    statistics = Statistics(grey, np.eye(grey.shape[-1], dtype=np.float32))
    statistics = parallel.place(statistics, parallel.whole(layout))
    return _steps(lambda state: step(state, batch, statistics), start, _mean_loss)


def _mean_loss(metrics: Mapping[str, tuple[Any, Any]]) -> np.ndarray:
    total, count = metrics['loss']
    return np.float32(total) / np.float32(count)


def repeated(step: Callable[[], Any]) -> Contestant:
    """One that computes the same again and again; all results together would fill a GPU."""

    def run(steps: int) -> Any:
        for _ in range(steps):
            result = step()
            parallel.pace(result)
        return jax.block_until_ready(result)

    return Contestant(run)


def _steps(step: Callable, start: Any, value: Callable) -> Contestant:
    """Of a step whose state is donated: (state) -> (state, metrics)."""
    states = [start]

    def run(steps: int) -> Any:
        state, metrics = states.pop(), None
        for _ in range(steps):
            state, metrics = step(state)
            parallel.pace(metrics)
        states.append(jax.block_until_ready(state))
        return metrics

    return Contestant(run, value)


# --------------------------------------------------------------------------- Flax, and a prototype


@dataclasses.dataclass(frozen=True)
class Forms:
    """What `Naive` is made of: (x [B, H, W, C], kernel, ...) -> [B, H', W', C'], and so on."""

    conv: Callable
    lrn: Callable
    spatial_norm: Callable
    max_pool: Callable


def plain_conv(x, kernel, *, stride=1, padding=((0, 0), (0, 0)), groups=1):
    """Convolution with `feature_group_count`, differentiated by XLA."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def plain_lrn(x, *, groups=1, size=5, k=2.0, alpha=1e-4 / 5, beta=0.75):
    """LRN by `reduce_window` and a power, tower by tower."""
    towers = x.reshape(*x.shape[:-1], groups, -1)
    window, before = (1, 1, 1, 1, size), size // 2
    padding = ((0, 0),) * 4 + ((before, size - 1 - before),)
    total = lax.reduce_window(towers**2, np.array(0, x.dtype), lax.add, window, (1,) * 5, padding)
    return (towers / (k + alpha * total) ** beta).reshape(x.shape)


def plain_spatial_norm(x, *, size=5, k=1.0, alpha=0.001 / 25, beta=0.75):
    """Spatial normalisation by `reduce_window` and a power."""
    before = size // 2
    pad = (before, size - 1 - before)
    zero, padding = np.array(0, x.dtype), ((0, 0), pad, pad, (0, 0))
    total = lax.reduce_window(x**2, zero, lax.add, (1, size, size, 1), (1,) * 4, padding)
    return x / (k + alpha * total) ** beta


def plain_max_pool(x, *, window=3, stride=2):
    """Max-pooling by `reduce_window`, as `flax.linen.max_pool` does it."""
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, sizes, strides, 'VALID')


def conv_by_tower(x, kernel, *, stride=1, padding=((0, 0), (0, 0)), groups=1):
    """The prototype's: a plain convolution a tower, differentiated by XLA."""
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    parts = [plain_conv(a, b, stride=stride, padding=padding) for a, b in pairs]
    return jnp.concatenate(parts, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _band_lrn(x, groups, size, k, alpha, beta):
    return x * _power(k + alpha * ((x * x) @ _band(x.shape[-1], groups, size)), beta)


def _band(channels, groups, size):
    reads, writes = np.ogrid[:channels, :channels]
    width = channels // groups
    near = (abs(reads - writes) <= size // 2) & (reads // width == writes // width)
    return jnp.asarray(near, jnp.float32)


def _power(scale, beta):
    root = lax.rsqrt(scale)
    return root * jnp.sqrt(root) if beta == 0.75 else scale**-beta


def _band_lrn_backward(groups, size, k, alpha, beta, x, dy):
    band = _band(x.shape[-1], groups, size)  # symmetric: `size` is odd
    scale = k + alpha * ((x * x) @ band)
    direct = dy * _power(scale, beta)
    return (direct - 2 * alpha * beta * x * ((direct * x / scale) @ band),)


_band_lrn.defvjp(lambda x, *how: (_band_lrn(x, *how), x), _band_lrn_backward)


def band_lrn(x, *, groups=1, size=5, k=2.0, alpha=1e-4 / 5, beta=0.75):
    """The prototype's: a product with a band matrix, two roots, a gradient by hand."""
    return _band_lrn(x, groups, size, k, alpha, beta)


def _nine(x, window, stride):
    tall, broad = ((n - window) // stride * stride + 1 for n in x.shape[1:3])
    return [
        x[:, i : i + tall : stride, j : j + broad : stride]
        for i in range(window)
        for j in range(window)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sliced_pool(x, window, stride, sides):
    return functools.reduce(jnp.maximum, _nine(x, window, stride))


def _sliced_pool_forward(x, window, stride, sides):
    best, *rest = _nine(x, window, stride)
    chosen = jnp.zeros(best.shape, jnp.int8)
    for number, part in enumerate(rest, 1):
        chosen = jnp.where(part > best, jnp.int8(number), chosen)
        best = jnp.maximum(best, part)
    return best, chosen


def _sliced_pool_backward(window, stride, sides, chosen, dy):
    total = 0.0
    for number in range(window * window):
        edges = [
            (start, side - start - stride * (steps - 1) - 1, stride - 1)
            for start, side, steps in zip(divmod(number, window), sides, dy.shape[1:3], strict=True)
        ]
        here, zero = jnp.where(chosen == number, dy, 0), np.array(0, dy.dtype)
        total += lax.pad(here, zero, ((0, 0, 0), *edges, (0, 0, 0)))
    return (total,)


_sliced_pool.defvjp(_sliced_pool_forward, _sliced_pool_backward)


def sliced_pool(x, *, window=3, stride=2):
    """The prototype's: nine strided slices, and their transposes."""
    return _sliced_pool(x, window, stride, x.shape[1:3])


NAIVE = Forms(plain_conv, plain_lrn, plain_spatial_norm, plain_max_pool)
PROTOTYPE = Forms(conv_by_tower, band_lrn, plain_spatial_norm, sliced_pool)


class Naive(nn.Module):
    """The layer table in the plainest Flax there is; parameters as ours."""

    net: Net
    forms: Forms = NAIVE

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Images [B, H, W, C] -> logits [B, classes], float32."""
        x = x.astype(self.net.compute_dtype)
        for stage in model.geometry(self.net):
            x = self._linear(stage, x)
            for word in stage.layer.then:
                x = self._follow(word, x, train)
        return x.astype(jnp.float32)

    def _linear(self, stage, x):
        layer = stage.layer
        if layer.kind == 'fc':
            if stage.groups > 1:
                raise NotImplementedError('a fully connected layer that reads its own tower')
            return nn.Dense(layer.features, dtype=x.dtype, name=layer.name)(x.reshape(len(x), -1))
        how = dict(stride=layer.stride_px, padding=layer.padding_px, groups=stage.groups)
        return nn.Conv(
            layer.features,
            (layer.kernel_px, layer.kernel_px),
            dtype=x.dtype,
            feature_group_count=stage.groups,
            conv_general_dilated=lambda x, kernel, *_, **__: self.forms.conv(x, kernel, **how),
            name=layer.name,
        )(x)

    def _follow(self, word, x, train):
        net = self.net
        if word in model.ACTIVATIONS:
            return model.ACTIVATIONS[word](x)
        if word == 'lrn':
            groups = net.towers if net.lrn_reads == 'own' else 1
            return self.forms.lrn(x, groups=groups, **dataclasses.asdict(net.lrn))
        if word == 'spatial_norm':
            return self.forms.spatial_norm(x, **dataclasses.asdict(net.spatial_norm))
        if word == 'pool' and net.pool.kind == 'max':
            return self.forms.max_pool(x, window=net.pool.window_px, stride=net.pool.stride_px)
        if word == 'dropout':
            kept = nn.Dropout(1 - net.dropout.keep, deterministic=not train)(x)
            return kept * net.dropout.keep if net.dropout.kind == 'mask' else kept
        raise NotImplementedError(word)


def flax(forms: Forms, case: Case, what: str) -> Contestant:
    """A form of `Naive`: jitted, its state donated, no option of the compiler's touched."""
    module: Any = Naive(case.net, forms)
    if what == 'forward':
        forward = jax.jit(lambda p, images: module.apply({'params': p}, images, train=False))
        params, images = jax.device_put(case.params), jax.device_put(case.images)
        return repeated(lambda: forward(params, images))
    optimizer = _sgd(case.settings)
    images, labels = jax.device_put(case.images), jax.device_put(case.labels)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, opt_state, key = state
        key, drop = jax.random.split(key)

        def loss_of(params):
            logits = module.apply({'params': params}, images, train=True, rngs={'dropout': drop})
            return model.mean_loss(logits, labels)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    params = jax.tree.map(jnp.array, case.params)
    start = (params, optimizer.init(params), jax.random.key(0))
    return _steps(lambda state: step(state, images, labels), start, np.asarray)


def _sgd(settings: Settings) -> optax.GradientTransformation:
    """The recipe's constants in optax's own form: decay on weights, biases with their own rate."""
    recipe = settings.optimizer

    def kind(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)

    weights = optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(recipe.weights.rate, recipe.momentum),
    )
    biases = optax.sgd(recipe.biases.rate, recipe.momentum)
    return optax.multi_transform({'kernel': weights, 'bias': biases}, kind)


# ---------------------------------------------------------------------------------------- PyTorch


def torch_is_here() -> bool:
    """Whether PyTorch is installed, and where JAX has an accelerator, sees it too."""
    if importlib.util.find_spec('torch') is None:
        return False
    import torch

    return jax.default_backend() == 'cpu' or torch.cuda.is_available()


def torch_forms() -> Iterator[tuple[str, str, str]]:
    """(layout, 'eager' or how it is compiled, form of LRN) of every form that is tried."""
    from experiments.torch_net import LRN_FORMS

    modes = ['eager', 'compiled'] + (['CUDA graphs'] if jax.default_backend() == 'gpu' else [])
    for layout in ('NCHW', 'channels_last'):
        for mode in modes:
            for lrn in LRN_FORMS:
                yield layout, mode, lrn


def torch_form(form: tuple[str, str, str], case: Case, what: str) -> Contestant:
    """PyTorch's form; see the head of the file."""
    import torch

    from experiments.torch_net import TorchAlexNet

    layout, mode, lrn = form
    _torch_settings(torch)
    device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
    bf16 = case.net.compute_dtype == 'bfloat16'
    memory: Any = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    net: Any = TorchAlexNet(case.net, case.params, lrn).to(device, memory_format=memory)
    images = torch.tensor(case.images.transpose(0, 3, 1, 2))
    images = images.to(device).contiguous(memory_format=memory)
    labels = torch.tensor(case.labels, dtype=torch.int64, device=device)
    graph = net
    if mode != 'eager':
        options = {'mode': 'reduce-overhead'} if mode == 'CUDA graphs' else {}
        graph = torch.compile(net, **options)
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    autocast = functools.partial(torch.autocast, device, dtype=torch.bfloat16, enabled=bf16)

    def forward(steps: int):
        net.eval()
        with torch.inference_mode(), autocast():
            for _ in range(steps):
                logits = graph(images)
        wait()
        return logits

    optimizer = _torch_sgd(torch, net, case.settings)

    def train(steps: int):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = torch.nn.functional.cross_entropy(graph(images), labels)
            loss.backward()
            optimizer.step()
        wait()
        return loss.detach()

    value: Any = lambda result: result.float().cpu().numpy()  # noqa: E731
    return Contestant(forward if what == 'forward' else train, value)


def _torch_settings(torch: Any) -> None:
    """All cores; on a GPU TF32 where float32 is asked for, as JAX does, and cuDNN's own search."""
    torch.set_num_threads(machine.cores())
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def _forget_compiled() -> None:
    """PyTorch compiles a module's code a few times only, and then runs it eagerly: not here."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _torch_sgd(torch: Any, net: Any, settings: Settings) -> Any:
    recipe, named = settings.optimizer, dict(net.named_parameters())
    groups = [
        {
            'params': [value for name, value in named.items() if name.endswith('weight')],
            'lr': recipe.weights.rate,
            'weight_decay': recipe.weight_decay,
        },
        {
            'params': [value for name, value in named.items() if name.endswith('bias')],
            'lr': recipe.biases.rate,
            'weight_decay': 0.0,
        },
    ]
    return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)


# ------------------------------------------------------------------------------------------- all


def contestants(
    case: Case, what: str, kinds: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    """(name, how to make it) of the kinds asked for: of 'ours', 'naive', 'prototype', 'torch'."""
    if 'ours' in kinds:
        yield 'ours', lambda: ours(case, what)
    for name, forms in (('naive', NAIVE), ('prototype', PROTOTYPE)):
        if name in kinds:
            yield name, lambda forms=forms: flax(forms, case, what)
    if 'torch' in kinds and torch_is_here():
        _forget_compiled()
        normed = any(word in ('lrn', 'spatial_norm') for x in case.net.layers for word in x.then)
        for form in torch_forms():
            if normed or form[2] == 'module':  # without LRN the forms are the same
                shown = form if normed else form[:2]
                yield ', '.join(('torch', *shown)), lambda form=form: torch_form(form, case, what)
