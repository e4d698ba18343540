"""Build the same net and the same batch in several frameworks and variants.

* ours: the trainer's own jitted step (its finiteness check and metrics included), and the net as
  evaluation runs it.
* naive: examples/alexnet_plain.py with `optax.sgd`, for the net of 2012 alone.
* torch, ...: PyTorch in {NCHW, channels_last} x {eager, compiled, on a GPU with CUDA graphs too},
  SGD with momentum and decay in its fused form.

All take float32 images on the device, except ours in training, which takes the images as uint8.
"""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import config, machine
from alexnet_jax.config import Settings
from alexnet_jax.model import alexnet
from alexnet_jax.model.alexnet import Net
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import cpu, mesh
from alexnet_jax.training.step import (
    init_key,
    jit_init_state,
    jit_train_step,
    make_optimizer,
    seed_of,
)
from examples import alexnet_plain
from experiments.throughput.timing import Benchmark, repeated, stateful

IMAGES = 1_281_167  # ILSVRC-2012's; only the schedules depend on it
GREY = 128.0  # taken from each pixel
PASSES = ('train', 'forward')
NAIVE = ('alexnet', 'imagenet2012')  # the config of the net in examples/alexnet_plain.py


@dataclasses.dataclass(frozen=True)
class Case:
    """Net and batch. `pixels`: uint8 [B, H, W, C]; `params`: the canonical tree in NumPy."""

    settings: Settings
    pixels: np.ndarray
    labels: np.ndarray  # int32 [B]
    params: dict[str, dict[str, np.ndarray]]

    @property
    def net(self) -> Net:
        """Return its layer table."""
        return self.settings.net

    @property
    def images(self) -> np.ndarray:
        """Return the input of the first layer: float32 [B, H, W, C]."""
        return (self.pixels.astype(np.float32) - GREY) * np.float32(self.settings.preprocess.scale)


def case_of(source: Any, batch_size: int, dtype: str = 'float32') -> Case:
    """Make a config's net and a batch of noise, without crops, mirrors and colour noise."""
    source.mesh.update(data=as_devices(source), tower=1)
    source.batch_size, source.model.compute_dtype = batch_size, dtype
    px = source.model.input_px
    source.preprocess.update(resize_px=px, image_px=px, crop=False, mirror=False, mean='image')
    source.preprocess.update(colour_noise=0.0, noise_divisor=1.0)
    settings = config.unpack(source)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch_size, px, px, settings.net.channels), np.uint8)
    labels = rng.integers(0, settings.net.classes, batch_size, np.int32)
    params = jax.device_get(alexnet.init(init_key(seed_of(settings)), settings.net))
    return Case(settings, pixels, labels, params)


def as_devices(source: Any) -> int:
    """Return how many CPU devices the trainer would use, if JAX has that many, else 1."""
    wanted = source.mesh.cpu_devices if jax.default_backend() == 'cpu' else 1
    return wanted if 1 <= wanted <= jax.device_count() else 1


# ------------------------------------------------------------------------------------------- ours


def ours(case: Case, what: str) -> Benchmark:
    """Make the trainer's step, or the net at test time."""
    settings = case.settings
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    if what == 'forward':
        forward = jax.jit(
            functools.partial(layout.forward(settings.net), masks=None),
            compiler_options=cpu.compiler_options(),
        )
        params = jax.device_put(case.params, layout.replicated)
        images = jax.device_put(case.images, layout.batch_sharding)
        return repeated(lambda: forward(params, images))
    optimizer = make_optimizer(settings, IMAGES)
    step, shardings = jit_train_step(settings, layout, optimizer, IMAGES)
    start = jit_init_state(settings, optimizer, shardings)
    batch = {'image': case.pixels, 'label': case.labels}
    batch = layout.put_batch(batch, settings.batch_size)
    grey = np.full(case.pixels.shape[1:], GREY, np.float32)
    statistics = Statistics(grey, np.eye(grey.shape[-1], dtype=np.float32))
    statistics = mesh.put_global(statistics, layout.replicated)
    mean_loss = lambda metrics: np.divide(*map(np.float32, metrics['loss']))  # noqa: E731
    return stateful(lambda state: step(state, batch, statistics), start, mean_loss)


# ------------------------------------------------------------------------------------- naive Flax


def naive(case: Case, what: str) -> Benchmark:
    """Make examples/alexnet_plain.py: jitted, its state donated, the compiler's default options."""
    net = alexnet_plain.AlexNet(case.net.classes)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(case.net.compute_dtype))
    optimizer = _sgd(case.settings)
    images, labels = jax.device_put(case.images), jax.device_put(case.labels)
    if what == 'forward':
        forward = jax.jit(lambda params, x: net.apply({'params': cast(params)}, cast(x)))
        params = jax.device_put(case.params)
        return repeated(lambda: forward(params, images))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, opt_state, key = state
        key, drop = jax.random.split(key)

        def loss_of(params):
            rngs = {'dropout': drop}
            logits = net.apply({'params': cast(params)}, cast(images), train=True, rngs=rngs)
            return alexnet.mean_loss(logits.astype(jnp.float32), labels)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    params = jax.tree.map(jnp.array, case.params)
    start = (params, optimizer.init(params), jax.random.key(0))
    return stateful(lambda state: step(state, images, labels), start)


def _sgd(settings: Settings) -> optax.GradientTransformation:
    """Return the recipe's constants in optax.sgd: decay on weights, biases at their own rate."""
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
    """Return whether PyTorch is installed and, where JAX has an accelerator, sees it too."""
    if importlib.util.find_spec('torch') is None:
        return False
    import torch

    return jax.default_backend() == 'cpu' or torch.cuda.is_available()


def torch_form(layout: str, mode: str, case: Case, what: str) -> Benchmark:
    """Make a form of PyTorch's; see the head of the file."""
    import torch

    from experiments.throughput.torch_net import TorchAlexNet

    device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
    memory: Any = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    net: Any = TorchAlexNet(case.net, case.params).to(device, memory_format=memory)
    images = torch.tensor(case.images.transpose(0, 3, 1, 2))
    images = images.to(device).contiguous(memory_format=memory)
    labels = torch.tensor(case.labels, dtype=torch.int64, device=device)
    options = {'mode': 'reduce-overhead'} if mode == 'CUDA graphs' else {}
    graph = net if mode == 'eager' else torch.compile(net, **options)
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    bfloat16 = case.net.compute_dtype == 'bfloat16'
    autocast = functools.partial(torch.autocast, device, dtype=torch.bfloat16, enabled=bfloat16)

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

    return Benchmark(
        forward if what == 'forward' else train, lambda result: result.float().cpu().numpy()
    )


def _set_up_torch() -> None:
    """Use all cores; on a GPU TF32 for float32, as JAX does, and cuDNN's own search.

    PyTorch runs a module eagerly once it was compiled often; that limit is lifted.
    """
    import torch

    torch.set_num_threads(machine.cores())
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _torch_sgd(torch: Any, net: Any, settings: Settings) -> Any:
    """Return the recipe's constants in torch.optim.SGD: as `_sgd`, fused."""
    recipe, named = settings.optimizer, dict(net.named_parameters())
    groups = [
        {
            'params': [value for name, value in named.items() if name.endswith(kind)],
            'lr': rate,
            'weight_decay': decay,
        }
        for kind, rate, decay in (
            ('weight', recipe.weights.rate, recipe.weight_decay),
            ('bias', recipe.biases.rate, 0.0),
        )
    ]
    return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)


# ------------------------------------------------------------------------------------------- all


def benchmarks(case: Case, what: str) -> Iterator[tuple[str, Callable[[], Benchmark]]]:
    """Yield (name, function that makes it): 'ours', 'naive', and forms of PyTorch if installed."""
    yield 'ours', lambda: ours(case, what)
    if (case.settings.name, case.settings.scale) == NAIVE:
        yield 'naive', lambda: naive(case, what)
    if torch_is_here():
        _set_up_torch()
        modes = ['eager', 'compiled'] + (['CUDA graphs'] if jax.default_backend() == 'gpu' else [])
        for layout, mode in itertools.product(('NCHW', 'channels_last'), modes):
            make = functools.partial(torch_form, layout, mode, case, what)
            yield f'torch, {layout}, {mode}', make
