"""The 2012 update and its schedules, as optax transformations.

The update (paper, section 5; the source agrees), for a weight w with gradient g of the mean loss:

    v <- momentum * v - weight_decay * rate * w - rate * g
    w <- w + v

The rate stands *inside* the velocity, where `optax.sgd` has it outside: after a change of rate the
two differ for some dozens of steps. Biases do not decay and have a rate of their own.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Rate = Callable[[Array, Array | int], Any]  # (step, drops of the plateau rule so far) -> rate


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A rate over a run; the fields that `kind` does not name are not used.

    constant: `rate`.
    steps: `rate` divided by `divisor` at each epoch of `at_epochs`.
    dexp: rate / factor ** (i / switches), i counting the `switches` evenly spaced moments passed:
        with 250 and 3, the weights of run 170, switching at 25, 50 and 75 % of the run.
    plateau: `rate` divided by `divisor` whenever the validation error has not fallen for
        `patience_epochs`, at most `max_drops` times and never below `floor` (paper, section 5:
        by ten, three times; there it was done by hand). Of two plateaus the weights' patience and
        number count for both.
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
    """One layer slowed, then frozen, late in the run (source: conv1 in runs 145 and 170)."""

    layer: str  # 'none': no layer
    slow_epoch: float  # from here the rate of its weights, not its biases, is multiplied by ...
    slow_multiplier: float
    freeze_epoch: float  # from here it is not updated, and its velocity is kept


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
        starts = [math.ceil(epoch * steps_per_epoch) for epoch in schedule.at_epochs]
        values += [rate / schedule.divisor**i for i in range(1, len(starts) + 1)]
    elif schedule.kind == 'dexp':
        numbers = range(1, schedule.switches + 1)
        starts = [math.ceil(total_steps * i / (schedule.switches + 1)) for i in numbers]
        values += [rate / schedule.factor ** (i / schedule.switches) for i in numbers]
    table = _piecewise(values, starts)
    return lambda step, drops: table(step)


def _piecewise(values: Sequence[float], starts: Sequence[int]) -> optax.Schedule:
    """Return `values` one after the other; `starts` are the steps of all but the first.

    `optax.piecewise_constant_schedule` multiplies factors, which rounds once more at each.
    """
    return optax.join_schedules([optax.constant_schedule(value) for value in values], starts)


def plateau_drops(errors: Sequence[float], schedule: Schedule, epochs_per_error: float) -> int:
    """Return how often the rate has been divided after these validation errors, oldest first.

    A function of the history alone, so that a resumed run cannot disagree with an undisturbed one.
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
    """The steps taken so far, and the velocity: a tree like the parameters."""

    step: Array
    velocity: optax.Updates


def velocity_2012(
    rates: Callable[[tuple[str, str]], Rate], momentum: float
) -> optax.GradientTransformationExtraArgs:
    """Add each update, times minus its parameter's rate, to a velocity that decays by `momentum`.

    A parameter whose rate is 0 is not updated at all, and its velocity stays as it is: freezing a
    layer stops it at once (source: `Weights::update` in weights.cu).

    Args:
        rates: gives for a parameter (layer, 'kernel' or 'bias') its rate as a function of
            (step, drops). `num_lr_drops` comes as an extra argument of `update`, 0 if absent.
        momentum: share of the velocity that is left after a step.
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
    """Return true where weight decay applies: on weights, fc8's included; on no bias (source)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def sgd_2012(
    rates: Callable[[tuple[str, str]], Rate], *, momentum: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Return the update of this file's head, as a chain: weight decay, then rate and velocity."""
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
    """Return what gives each parameter, named (layer, 'kernel' or 'bias'), its rate.

    A layer's rate is that of its kind times its factor: its multiplier, which with 0 freezes the
    layer (fine-tuning), and from the epochs of `late_freeze` on what that says.
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
        slowed = own * (
            late_freeze.slow_multiplier if kind == 'kernel' else 1.0
        )  # source: `epsW` alone
        is_late = layer == late_freeze.layer
        factor = _piecewise([own, slowed, 0.0], starts) if is_late else _piecewise([own], [])
        return lambda step, drops: by_kind[kind](step, drops) * factor(step)

    return rates
