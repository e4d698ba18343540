"""The training step: pure, and a function of (config, seed, step) but for the batch it is given."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from alexnet_jax.config import Settings
from alexnet_jax.model import alexnet, augment
from alexnet_jax.model import optimizer as optimizers
from alexnet_jax.model.augment import Statistics
from alexnet_jax.parallel import cpu
from alexnet_jax.parallel.mesh import Layout

Array = jax.Array


class TrainState(struct.PyTreeNode):
    """All that training carries from step to step.

    seed: of weights, crops, noise and dropout; as a number, so that all seeds share one program.
    num_lr_drops: how often the plateau rule has divided the rate; set between epochs.
    all_finite: false from the first step whose loss or gradient is not finite. That step and those
        after it leave the state unchanged, so that the step can be repeated and analysed.
    """

    seed: Array
    step: Array
    params: Any
    opt_state: Any
    num_lr_drops: Array
    all_finite: Array


def make_optimizer(settings: Settings, images: int) -> optax.GradientTransformationExtraArgs:
    """The 2012 update, its schedules stretched over a run on `images` training images."""
    recipe = settings.optimizer
    rates = optimizers.parameter_rates(
        recipe.weights,
        recipe.biases,
        recipe.late_freeze,
        recipe.multipliers,
        total_steps=settings.total_steps(images),
        steps_per_epoch=settings.steps_per_epoch(images),
    )
    return optimizers.sgd_2012(rates, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def init_state(
    settings: Settings,
    optimizer: optax.GradientTransformation,
    seed: Array | np.uint32 | None = None,
) -> TrainState:
    """Step 0, a function of the seed: the settings' own if none is given."""
    number = jnp.asarray(seed_of(settings) if seed is None else seed)
    params = alexnet.init(init_key(number), settings.net)
    return TrainState(
        seed=number,
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        num_lr_drops=jnp.zeros((), jnp.int32),
        all_finite=jnp.ones((), bool),
    )


def jit_init_state(
    settings: Settings, optimizer: optax.GradientTransformation, shardings: Any
) -> TrainState:
    """Step 0 as it lies on a mesh; `shardings` come from `jit_train_step`."""
    start = jax.jit(lambda seed: init_state(settings, optimizer, seed), out_shardings=shardings)
    return start(seed_of(settings))


def seed_of(settings: Settings) -> np.uint32:
    """The seed as JAX takes it: its lower 32 bits."""
    return np.uint32(settings.seed % 2**32)


def init_key(seed: Array | np.uint32) -> Array:
    """The stream of the initial weights; stream 1 is the steps'."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def inputs(
    settings: Settings,
    images: int,
    state: TrainState,
    batch: Mapping[str, Array],
    statistics: Statistics,
) -> tuple[Array, dict[str, Array]]:
    """What the step from `state` shows the net: pixels [B, H, W, C] and dropout masks.

    Both in the global view, and a function of the state's seed and step alone.
    """
    stream = jax.random.fold_in(jax.random.key(state.seed), 1)
    crop_key, mask_key = jax.random.split(jax.random.fold_in(stream, state.step))
    recipe = settings.preprocess
    batch_size, *_, channels = batch['image'].shape
    draws = augment.draw(crop_key, batch_size, channels, recipe)
    noise_steps = math.ceil(recipe.noise_until_epoch * settings.steps_per_epoch(images))
    pixels = augment.apply(batch['image'], draws, statistics, recipe, state.step < noise_steps)
    return pixels, alexnet.draw_masks(mask_key, settings.net, batch_size)


def make_train_step(
    settings: Settings,
    layout: Layout,
    optimizer: optax.GradientTransformationExtraArgs,
    images: int,
) -> Callable[[TrainState, Mapping[str, Array], Statistics], tuple[TrainState, dict]]:
    """The step: (state, batch, statistics) -> (next state, {metric: (sum, count)}); pure."""
    forward = layout.forward(settings.net)

    def train_step(state, batch, statistics):
        pixels, masks = inputs(settings, images, state, batch, statistics)

        def loss_of(params):
            logits = forward(params, pixels, masks)
            return alexnet.mean_loss(logits, batch['label']), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        # A sum is not finite where one of its terms is not; a norm would first write all squares.
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(grads))
        all_finite = state.all_finite & jnp.isfinite(loss) & jnp.isfinite(total)

        def advance(state):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, num_lr_drops=state.num_lr_drops
            )
            params = optax.apply_updates(state.params, updates)
            return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

        new = cpu.update_if_finite(all_finite, advance, state)
        count = batch['label'].size
        wrong = jnp.sum(jnp.argmax(logits, axis=-1) != batch['label'])
        shown = jnp.where(all_finite, loss, jnp.nan)  # the host need not look at the state
        metrics = {'loss': (shown * count, count), 'top1_error': (wrong, count)}
        return new.replace(all_finite=all_finite), metrics

    return train_step


def jit_train_step(
    settings: Settings,
    layout: Layout,
    optimizer: optax.GradientTransformationExtraArgs,
    images: int,
    **compiler_options: str,
) -> tuple[Any, Any]:
    """The step for a mesh, jitted: (step, how its state lies: a tree of shardings).

    The state that goes in is donated. `compiler_options` come on top of this platform's own.
    """
    shapes = jax.eval_shape(lambda: init_state(settings, optimizer))
    shardings = layout.state_shardings(shapes, settings.net)
    step = jax.jit(
        make_train_step(settings, layout, optimizer, images),
        donate_argnums=0,
        out_shardings=(shardings, layout.replicated),
        compiler_options={**(cpu.compiler_options() or {}), **compiler_options} or None,
    )
    return step, shardings
