"""The 2012 update and its schedules, as optax transformations.

The update (paper, section 5; the source agrees), for a weight w with gradient g of the mean loss:

    v <- momentum * v - weight_decay * rate * w - rate * g
    w <- w + v

The rate is *inside* the velocity; in `optax.sgd` it is outside. After a change of rate the two
differ for some dozens of steps. Biases have no weight decay, and a separate learning rate.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Rate = Callable[[Array, Array | int], Any]  # (step, number of plateau drops so far) -> rate


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A rate as a function of the step; each kind uses only the fields named here.

    constant: `rate`. steps: `rate` divided by `divisor` at each epoch of `at_epochs`. dexp: `rate`
    / `factor` ** (i / `switches`) after i of `switches` evenly spaced steps. With 250
        and 3, these are the weights of run 170, which switch at 25, 50 and 75 % of the run.
    plateau: `rate` divided by `divisor` whenever the validation error has not fallen for
        `patience_epochs`, at most `max_drops` times and never below `floor` (paper, section 5: by
        ten, three times, by hand). If both schedules are plateaus, the biases' drops follow the
        weights'.
    """

    kind: Literal['constant', 'steps', 'dexp', 'plateau']
    rate: float
    divisor: float
    at_epochs: tuple[float, ...]
    factor: float
    switches: int
    patience_epochs: float
    max_drops: int
    floor: float


@dataclasses.dataclass(frozen=True)
class LateFreeze:
    """A layer that is slowed, then frozen, late in the run (source: conv1, runs 145 and 170)."""

    layer: str  # 'none': no layer
    slow_epoch: float  # from here on `slow_multiplier` applies to its weights, not to its biases
    slow_multiplier: float
    freeze_epoch: float  # from here on it is not updated, and its velocity is kept


def rate_of(schedule: Schedule, *, total_steps: int, steps_per_epoch: float) -> Rate:
    """Return the schedule as a function of (step, drops), both int32 scalars."""
    rate = schedule.rate
    if schedule.kind == 'plateau':
        return lambda step, drops: jnp.maximum(
            jnp.float32(rate) * jnp.float32(1 / schedule.divisor) ** drops,
            min(schedule.floor, rate),
        )
    values, starts = [rate], []
    if schedule.kind == 'steps':
        starts = [math.ceil(epoch * steps_per_epoch) for epoch in sorted(schedule.at_epochs)]
        values += [rate / schedule.divisor**i for i in range(1, len(starts) + 1)]
    elif schedule.kind == 'dexp':
        numbers = range(1, schedule.switches + 1)
        starts = [math.ceil(total_steps * i / (schedule.switches + 1)) for i in numbers]
        values += [rate / schedule.factor ** (i / schedule.switches) for i in numbers]
    table = _piecewise(values, starts)
    return lambda step, drops: table(step)


def _piecewise(values: Sequence[float], starts: Sequence[int]) -> optax.Schedule:
    """Return a schedule of constant `values`; all but the first begin at the steps `starts`.

    `optax.piecewise_constant_schedule` multiplies factors in float32: from the first change on, its
    rates of run 170 differ from these in the last bit.
    """
    return optax.join_schedules([optax.constant_schedule(value) for value in values], starts)


def plateau_drops(errors: Sequence[float], schedule: Schedule, epochs_per_error: float) -> int:
    """Return the number of divisions of the rate after these validation errors, oldest first.

    It depends on the history only, so that a resumed run has the rates of an undisturbed one.
    """
    if schedule.kind != 'plateau':
        return 0
    patience = max(1, round(schedule.patience_epochs / epochs_per_error))
    best, waited, drops = math.inf, 0, 0
    for error in errors:
        best, waited = (error, 0) if error < best else (best, waited + 1)
        if waited >= patience and drops < schedule.max_drops:
            drops, waited = drops + 1, 0
    return drops


class VelocityState(NamedTuple):
    """The number of steps taken, and the velocity, a tree like the parameters."""

    step: Array
    velocity: optax.Updates


def velocity_2012(
    rates: Callable[[tuple[str, str]], Rate], momentum: float
) -> optax.GradientTransformationExtraArgs:
    """Subtract rate * update from a velocity that decays by `momentum`, and apply the velocity.

    A parameter with rate 0 is not updated, and its velocity is kept: freezing stops a layer at once
    (source: `Weights::update` in weights.cu).

    Args:
        rates: maps a parameter's name (layer, 'kernel' or 'bias') to its rate, a function of
            (step, drops). `num_lr_drops` is an extra argument of `update`, 0 by default.
        momentum: the factor of the velocity in a step.
    """

    def update(updates, state, params=None, *, num_lr_drops=0, **unused):
        del params, unused

        rate = jax.tree_util.tree_map_with_path(
            lambda path, _: rates((path[-2].key, path[-1].key))(state.step, num_lr_drops), updates
        )
        velocity = jax.tree.map(
            lambda rate, g, v: jnp.where(rate == 0, v, momentum * v - rate * g),
            rate,
            updates,
            state.velocity,
        )
        moved = jax.tree.map(lambda rate, v: jnp.where(rate == 0, 0, v), rate, velocity)
        return moved, VelocityState(state.step + 1, velocity)

    return optax.GradientTransformationExtraArgs(
        lambda params: VelocityState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        ),
        update,
    )


def decays(params: optax.Params) -> optax.Params:
    """Return the mask of weight decay: all weights, fc8's too, and no bias (source)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def sgd_2012(
    rates: Callable[[tuple[str, str]], Rate], *, momentum: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Return the update in this module's docstring: weight decay, then rate and velocity."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decays),
        velocity_2012(rates, momentum),
    )


def parameter_rates(
    weights: Schedule,
    biases: Schedule,
    late_freeze: LateFreeze,
    multipliers: Sequence[tuple[str, float]] = (),
    *,
    total_steps: int,
    steps_per_epoch: float,
) -> Callable[[tuple[str, str]], Rate]:
    """Return a map from a parameter's name (layer, 'kernel' or 'bias') to its rate.

    The rate is that of its kind times a piecewise constant factor of its layer: the layer's
    multiplier (0 freezes it, for fine-tuning), slowed and then 0 from the epochs of `late_freeze`.
    """
    durations = {'total_steps': total_steps, 'steps_per_epoch': steps_per_epoch}
    by_kind = {'kernel': rate_of(weights, **durations), 'bias': rate_of(biases, **durations)}
    starts = [
        math.ceil(epoch * steps_per_epoch)
        for epoch in (late_freeze.slow_epoch, late_freeze.freeze_epoch)
    ]
    multiplier = dict(multipliers)

    def rates(path: tuple[str, str]) -> Rate:
        layer, kind = path
        own = multiplier.get(layer, 1.0)
        values = [own]
        if layer == late_freeze.layer:  # slows the weights only (source: `epsW`)
            values += [own * late_freeze.slow_multiplier if kind == 'kernel' else own, 0.0]
        factor = _piecewise(values, starts[: len(values) - 1])
        return lambda step, drops: by_kind[kind](step, drops) * factor(step)

    return rates
