"""The training step: a pure function of its batch and of (config, seed, step)."""

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
    """The state that training carries from step to step.

    seed: of weights, crops, noise and dropout; an array, so that all seeds share one program.
    num_lr_drops: number of times the plateau rule has divided the rate; set between epochs.
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
    """Return the 2012 update, with schedules for a run on `images` training images."""
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
    """Return the state of step 0, a function of the seed; default: the seed of the settings."""
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
    """Return the state of step 0 on the devices; `shardings` come from `jit_train_step`."""
    start = jax.jit(
        lambda seed: init_state(settings, optimizer, seed),
        out_shardings=shardings,
        compiler_options=cpu.init_compiler_options(),
    )
    return start(seed_of(settings))


def seed_of(settings: Settings) -> np.uint32:
    """Return the lower 32 bits of the seed, as JAX takes no more."""
    return np.uint32(settings.seed % 2**32)


def init_key(seed: Array | np.uint32) -> Array:
    """Return the key of the initial weights, stream 0 of the seed; stream 1 is for the steps."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def inputs(
    settings: Settings,
    images: int,
    state: TrainState,
    batch: Mapping[str, Array],
    statistics: Statistics,
) -> tuple[Array, dict[str, Array]]:
    """Return the net's inputs in a step: pixels [B, H, W, C] and dropout masks.

    Both are global arrays, and depend on the state's seed and step only.
    """
    stream = jax.random.fold_in(jax.random.key(state.seed), 1)
    crop_key, mask_key = jax.random.split(jax.random.fold_in(stream, state.step))
    recipe = settings.preprocess
    batch_size, *_, channels = batch['image'].shape
    draws = augment.draw(crop_key, batch_size, channels, settings.net, recipe)
    noise_steps = math.ceil(recipe.noise_until_epoch * settings.steps_per_epoch(images))
    noise_on = state.step < noise_steps
    pixels = augment.apply(batch['image'], draws, statistics, settings.net, recipe, noise_on)
    return pixels, alexnet.draw_masks(mask_key, settings.net, batch_size)


def make_train_step(
    settings: Settings,
    layout: Layout,
    optimizer: optax.GradientTransformationExtraArgs,
    images: int,
) -> Callable[[TrainState, Mapping[str, Array], Statistics], tuple[TrainState, dict]]:
    """Return the pure step: (state, batch, statistics) -> (state, {metric: (sum, count)})."""
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
    """Return the jitted step for a mesh, and the shardings of its state.

    The input state is donated. `compiler_options` are added to those of this platform.
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
