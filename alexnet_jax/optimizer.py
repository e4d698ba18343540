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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.errors import UsageError

Array = jax.Array
Rate = Callable[[Array, Array | int], Array]  # (step, drops of the plateau rule so far) -> rate


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a rate changes over a run; the fields that `kind` does not name are not used.

    constant: `rate`.
    steps: `rate` divided by `drop` at each epoch of `at_epochs`.
    dexp: rate / factor ** (i / switches), i counting the `switches` evenly spaced moments passed:
        with 250 and 3, the weights of run 170, switching at 25, 50 and 75 % of the run.
    plateau: `rate` divided by `drop` whenever the validation error has not fallen for
        `patience_epochs`, at most `max_drops` times and never below `floor` (paper, section 5:
        by ten, three times; there it was done by hand). Of two plateaus the weights' patience and
        number count for both.
    """

    kind: str
    rate: float
    drop: float
    at_epochs: tuple[float, ...]
    factor: float
    switches: int
    patience_epochs: float
    max_drops: int
    floor: float


SCHEDULES = ('constant', 'steps', 'dexp', 'plateau')


def rate_of(schedule: Schedule, *, total_steps: int, steps_per_epoch: float) -> Rate:
    """The schedule as a function of (step, drops), both int32 scalars.

    Raises:
        UsageError: `schedule.kind` is unknown.
    """
    if schedule.kind == 'constant':
        return lambda step, drops: jnp.float32(schedule.rate)
    if schedule.kind == 'plateau':
        return lambda step, drops: jnp.maximum(
            jnp.float32(schedule.rate) * jnp.float32(1 / schedule.drop) ** drops,
            min(schedule.floor, schedule.rate),
        )
    if schedule.kind == 'steps':
        moments = [math.ceil(epoch * steps_per_epoch) for epoch in schedule.at_epochs]
        values = [schedule.rate / schedule.drop**i for i in range(len(moments) + 1)]
    elif schedule.kind == 'dexp':
        pieces = schedule.switches + 1
        moments = [math.ceil(total_steps * i / pieces) for i in range(1, pieces)]
        values = [
            schedule.rate / schedule.factor ** (i / max(schedule.switches, 1))
            for i in range(pieces)
        ]
    else:
        raise UsageError(f"a schedule of kind '{schedule.kind}' is not one of {SCHEDULES}.")
    table = jnp.asarray(values, jnp.float32)
    boundaries = jnp.asarray(moments, jnp.int32)
    return lambda step, drops: table[jnp.sum(step >= boundaries)]


def plateau_drops(errors: Sequence[float], schedule: Schedule, epochs_per_error: float) -> int:
    """How often the rate has been divided after these validation errors, oldest first.

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
    """Steps taken so far, and the velocity: a tree like the parameters."""

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
            (step, drops). `drops` comes as an extra argument of `update`, 0 if absent.
        momentum: share of the velocity that is left after a step.
    """

    def update(updates, state, params=None, *, drops=0, **unused):
        del params, unused

        def rate_at(path):
            return rates((path[-2].key, path[-1].key))(state.step, drops)

        def advance(path, g, v):
            rate = rate_at(path)
            return jnp.where(rate == 0, v, momentum * v - rate * g)

        velocity = jax.tree_util.tree_map_with_path(advance, updates, state.velocity)
        moved = jax.tree_util.tree_map_with_path(
            lambda path, v: jnp.where(rate_at(path) == 0, 0, v), velocity
        )
        return moved, VelocityState(state.step + 1, velocity)

    return optax.GradientTransformationExtraArgs(
        lambda params: VelocityState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        ),
        update,
    )


def decays(params: optax.Params) -> optax.Params:
    """True where weight decay applies: on weights, fc8's included; on no bias (source)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def sgd_2012(
    rates: Callable[[tuple[str, str]], Rate], *, momentum: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """The update of this file's head, as a chain: weight decay, then rate and velocity."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decays),
        velocity_2012(rates, momentum),
    )


@dataclasses.dataclass(frozen=True)
class Late:
    """One layer slowed, then frozen, late in the run (source: conv1 in runs 145 and 170)."""

    layer: str  # 'none': no layer
    slow_epoch: float  # from here the rate of its weights, not its biases, is multiplied by ...
    slow_multiplier: float
    freeze_epoch: float  # from here it is not updated, and its velocity is kept


def parameter_rates(
    weights: Schedule,
    biases: Schedule,
    late: Late,
    multipliers: Sequence[tuple[str, float]] = (),
    *,
    total_steps: int,
    steps_per_epoch: float,
) -> Callable[[tuple[str, str]], Rate]:
    """The rate of each parameter, named (layer, 'kernel' or 'bias'), `late` included.

    `multipliers` (layer, factor) are for fine-tuning: both rates of the layer are multiplied, and
    with 0 it is frozen, weight decay included.
    """
    durations = {'total_steps': total_steps, 'steps_per_epoch': steps_per_epoch}
    by_kind = {'kernel': rate_of(weights, **durations), 'bias': rate_of(biases, **durations)}
    slow = math.ceil(late.slow_epoch * steps_per_epoch)
    freeze = math.ceil(late.freeze_epoch * steps_per_epoch)

    factors = dict(multipliers)

    def multiplied(layer: str, kind: str) -> Rate:
        factor = factors.get(layer, 1.0)
        if factor == 1:
            return by_kind[kind]
        return lambda step, drops: by_kind[kind](step, drops) * factor

    def rates(path: tuple[str, str]) -> Rate:
        layer, kind = path
        rate = multiplied(layer, kind)
        if layer != late.layer:
            return rate
        slowed = late.slow_multiplier if kind == 'kernel' else 1.0  # source: `epsW` alone
        return lambda step, drops: (
            rate(step, drops)
            * jnp.where(step >= slow, slowed, 1.0)
            * jnp.where(step >= freeze, 0.0, 1.0)
        )

    return rates
