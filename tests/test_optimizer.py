"""The 2012 update against six lines of float64 NumPy; its schedules against run 170's values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.config import MeshShape
from alexnet_jax.model.optimizer import (
    LateFreeze,
    Schedule,
    parameter_rates,
    plateau_drops,
    rate_of,
    sgd_2012,
)
from alexnet_jax.parallel import mesh
from configs import alexnet, smoke
from tests.golden import cases

STEPS, STEPS_PER_EPOCH = 30, 10
MOMENTUM, WEIGHT_DECAY = 0.9, 0.0005
NOBODY = LateFreeze(layer='none', slow_epoch=0.0, slow_multiplier=1.0, freeze_epoch=0.0)
TREE = {
    'conv1': {'kernel': (3, 3, 2, 4), 'bias': (4,)},
    'fc8': {'kernel': (5, 3), 'bias': (3,)},
}
PARAMETERS = [(layer, kind) for layer, kinds in TREE.items() for kind in kinds]


def schedule(kind, rate, **changes):
    return Schedule(**alexnet.schedule(kind, rate, **changes))


def shipped(scale):
    config: Any = alexnet.get_config(scale)
    return configuration.unpack(config).optimizer


def layout_of(shape, batch_size):
    if jax.device_count() < math.prod(shape):
        pytest.skip(f'{math.prod(shape)} devices are wanted; tests/conftest.py makes eight')
    return mesh.make_layout(MeshShape(*shape), batch_size)


def tree_of(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {name: {kind: draw(s) for kind, s in row.items()} for name, row in TREE.items()}


def numpy_update(w, gradients, rates, decay):
    """The reference: `w` after each step, float64."""
    w, v = np.float64(w), 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        if rate > 0:  # a frozen parameter keeps its velocity, and does not coast on it
            v = MOMENTUM * v - decay * rate * w - rate * np.float64(gradient)
            w = w + v
        yield w


def train(transform, params, gradients, drops=None):
    """The parameters after each step, jit-compiled; `drops` of the plateau rule, one a step."""

    @jax.jit
    def step(params, state, gradient, drops):
        updates, state = transform.update(gradient, state, params, num_lr_drops=drops)
        return optax.apply_updates(params, updates), state

    state, history = transform.init(params), []
    for number, gradient in enumerate(gradients):
        passed = jnp.int32(0 if drops is None else drops[number])
        params, state = step(params, state, gradient, passed)
        history.append(params)
    return history


def transform_of(weights, biases, late=NOBODY):
    rates = parameter_rates(
        weights, biases, late, total_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH
    )
    return sgd_2012(rates, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def assert_close(actual, expected):
    # 30 float32 additions to numbers of size 1, each rounded to 6e-8.
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize(('layer', 'kind'), PARAMETERS)
def test_update_is_the_papers_across_changes_of_rate(layer, kind):
    """Weights' rate falls after epochs 1 and 2, biases' after 1.5; conv1 is slowed, then frozen.

    Its biases are not slowed (source: run 145, epoch 68).
    """
    weights = schedule('steps', 0.01, at_epochs=(1.0, 2.0))
    biases = schedule('steps', 0.02, at_epochs=(1.5,))
    late = LateFreeze(layer='conv1', slow_epoch=1.2, slow_multiplier=0.1, freeze_epoch=2.5)
    gradients = [tree_of(seed) for seed in range(1, STEPS + 1)]
    history = train(transform_of(weights, biases, late), tree_of(0), gradients)

    if kind == 'kernel':
        rates = np.repeat([0.01, 0.001, 0.0001], 10)
    else:
        rates = np.repeat([0.02, 0.002], 15)
    if layer == 'conv1':
        slowed = 0.1 if kind == 'kernel' else 1.0
        rates = rates * np.repeat([1.0, slowed, 0.0], [12, 13, 5])
    expected = numpy_update(
        tree_of(0)[layer][kind],
        [gradient[layer][kind] for gradient in gradients],
        rates,
        WEIGHT_DECAY if kind == 'kernel' else 0.0,
    )
    for ours, reference in zip(history, expected, strict=True):
        assert_close(ours[layer][kind], reference)


def test_a_frozen_layer_stops_dead_and_keeps_its_velocity():
    """Source: `Weights::update` passes a layer by whose base rate is 0, velocity included."""
    rate = schedule('constant', 0.01)
    late = LateFreeze(layer='conv1', slow_epoch=1.0, slow_multiplier=1.0, freeze_epoch=1.0)
    transform = transform_of(rate, rate, late)
    params, state = tree_of(0), transform.init(tree_of(0))
    for number in range(STEPS_PER_EPOCH + 5):
        before, held = params, state
        updates, state = transform.update(tree_of(1 + number), state, params)
        params = optax.apply_updates(params, updates)
    for kind in TREE['conv1']:
        np.testing.assert_array_equal(params['conv1'][kind], before['conv1'][kind])
        velocity = state[-1].velocity['conv1'][kind]
        np.testing.assert_array_equal(velocity, held[-1].velocity['conv1'][kind])
        assert np.abs(velocity).max() > 0.01
        assert np.abs(params['fc8'][kind] - before['fc8'][kind]).max() > 0.001


def test_weight_decay_pulls_on_weights_and_leaves_biases():
    zeros = jax.tree.map(np.zeros_like, tree_of(0))
    rate = schedule('constant', 0.1)
    after = train(transform_of(rate, rate), tree_of(0), [zeros])[-1]
    for layer, kind in PARAMETERS:
        shrunk = 1 - 0.1 * WEIGHT_DECAY if kind == 'kernel' else 1
        np.testing.assert_allclose(after[layer][kind], shrunk * tree_of(0)[layer][kind], rtol=1e-6)


@pytest.mark.parametrize('changes', [0, 1])
def test_differs_from_optax_sgd_only_after_a_change_of_rate(changes):
    """optax.sgd multiplies by the rate outside the velocity, so old velocity is scaled as well."""
    rate = schedule('steps', 0.01, at_epochs=(1.0,) if changes else ())

    def their_rate(step):
        return jnp.where((step >= STEPS_PER_EPOCH) & bool(changes), 0.001, 0.01)

    theirs = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=kinds_of),
        optax.sgd(their_rate, MOMENTUM),
    )
    gradients = [tree_of(seed) for seed in range(1, STEPS + 1)]
    ours = train(transform_of(rate, rate), tree_of(0), gradients)
    others = train(optax.with_extra_args_support(theirs), tree_of(0), gradients)
    for step in range(STEPS):
        apart = max(
            float(jnp.max(jnp.abs(ours[step][layer][kind] - others[step][layer][kind])))
            for layer, kind in PARAMETERS
        )
        if changes and step >= STEPS_PER_EPOCH:
            assert apart > 1e-2  # velocities here are about 0.01 * sqrt(1 / (1 - 0.9^2))
        else:
            assert apart < 2e-6


def kinds_of(tree):
    return {layer: {kind: kind == 'kernel' for kind in row} for layer, row in tree.items()}


def test_drops_of_the_plateau_rule_reach_the_update():
    """Rates are divided by the number of drops, and by nothing else."""
    weights, biases = schedule('plateau', 0.01), schedule('plateau', 0.02)
    drops = np.repeat([0, 1, 2], 10)
    gradients = [tree_of(seed) for seed in range(1, STEPS + 1)]
    last = train(transform_of(weights, biases), tree_of(0), gradients, drops)[-1]
    for layer, kind in PARAMETERS:
        rate, decay = (0.01, WEIGHT_DECAY) if kind == 'kernel' else (0.02, 0.0)
        own = [gradient[layer][kind] for gradient in gradients]
        *_, expected = numpy_update(tree_of(0)[layer][kind], own, rate / 10.0**drops, decay)
        assert_close(last[layer][kind], expected)


def test_sharded_update_equals_the_unsharded_one():
    """On a (2, 2) mesh each device updates its share: same bits, and the state stays split."""
    net = cases.net_of(smoke.get_config())
    params = cases.case(net, 2).params
    gradients = jax.tree.map(np.sin, params)
    transform = transform_of(schedule('constant', 0.01), schedule('constant', 0.02))
    layout = layout_of((2, 2), batch_size=2)
    split = layout.parameter_shardings(net)
    state_split = layout.state_shardings(jax.eval_shape(transform.init, params), net)

    def two_steps(params, gradients):
        state = transform.init(params)
        for _ in range(2):
            updates, state = transform.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    unsharded = jax.jit(two_steps)(params, gradients)
    placed = jax.device_put((params, gradients), (split, split))
    sharded = jax.jit(two_steps, out_shardings=(split, state_split))(*placed)
    jax.tree.map(np.testing.assert_array_equal, unsharded, sharded)
    velocity = sharded[1][-1].velocity['conv2']['kernel']
    assert velocity.addressable_shards[0].data.shape[-1] == velocity.shape[-1] // 2


# ------------------------------------------------------------------------------------- schedules


def at(rate, step, drops=0):
    return float(jax.jit(rate)(jnp.int32(step), jnp.int32(drops)))


def test_constant_never_changes():
    rate = rate_of(schedule('constant', 0.01), total_steps=100, steps_per_epoch=10)
    assert {at(rate, step, drops) for step in (0, 50, 99) for drops in (0, 3)} == {
        float(np.float32(0.01))
    }


@pytest.mark.parametrize(
    ('percent', 'value'), [(0, 0.01), (25, 0.0015874), (50, 0.00025198), (75, 0.00004)]
)
def test_weights_of_run_170(percent, value):
    """Values of alexnet_2012.md, section 4, from the first step of each quarter to its last."""
    weights = shipped('imagenet2012').weights
    rate = rate_of(weights, total_steps=95_000, steps_per_epoch=1000)
    for step in (percent * 950, percent * 950 + 23_749):
        assert at(rate, step) == pytest.approx(value, rel=2e-5)  # five digits are given


def test_biases_of_run_170():
    biases = shipped('imagenet2012').biases
    rate = rate_of(biases, total_steps=95_000, steps_per_epoch=1000)
    assert [at(rate, step) for step in (0, 47_499, 47_500, 94_999)] == pytest.approx(
        [0.02, 0.02, 0.002, 0.002]
    )


def test_dexp_over_a_length_that_four_does_not_divide():
    rate = rate_of(
        schedule('dexp', 0.01, factor=250.0, switches=3), total_steps=10, steps_per_epoch=5
    )
    counts = [round(3 * math.log(0.01 / at(rate, step)) / math.log(250)) for step in range(10)]
    assert counts == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_steps_of_run_145():
    """alexnet_2012.md, section 4: by hand at epochs 23, 51 and 78 of ILSVRC-2010."""
    weights = shipped('imagenet2010').weights
    rate = rate_of(weights, total_steps=93_000, steps_per_epoch=1000)
    moments = (0, 22_999, 23_000, 50_999, 51_000, 77_999, 78_000, 92_999)
    values = (0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001, 0.00001, 0.00001)
    assert [at(rate, step) for step in moments] == pytest.approx(values)


def test_epochs_need_not_be_full_numbers_of_steps():
    """A change at epoch 2 of 4.5 steps each comes with step 9, one at epoch 1 with step 5.

    They may be listed in any order.
    """
    rate = rate_of(
        schedule('steps', 1.0, at_epochs=(2.0, 1.0)), total_steps=14, steps_per_epoch=4.5
    )
    assert [at(rate, step) for step in (4, 5, 8, 9)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_plateau_divides_once_a_drop_down_to_the_floor():
    rate = rate_of(schedule('plateau', 0.01, floor=2e-5), total_steps=100, steps_per_epoch=10)
    found = [at(rate, step, drops) for step in (0, 99) for drops in range(5)]
    assert found == pytest.approx(2 * [0.01, 0.001, 0.0001, 2e-5, 2e-5])


def test_a_floor_above_the_rate_does_not_raise_it():
    rate = rate_of(schedule('plateau', 0.01, floor=1.0), total_steps=100, steps_per_epoch=10)
    assert at(rate, 0) == pytest.approx(0.01)


# --------------------------------------------------------------------------------- the plateau rule

FALLING, FLAT = [0.9, 0.8, 0.7], [0.7] * 20


@pytest.mark.parametrize(
    ('errors', 'changes', 'drops'),
    [
        ([], {}, 0),
        (FALLING, {}, 0),
        (FALLING + FLAT[:2], {}, 0),
        (FALLING + FLAT[:3], {}, 1),  # three epochs without a fall
        (FALLING + FLAT[:5], {}, 1),
        (FALLING + FLAT[:6], {}, 2),  # patience starts afresh after a drop
        (FALLING + FLAT, {}, 3),  # ten, three times, and no more
        (FALLING + FLAT, {'max_drops': 5}, 5),
        (FALLING + FLAT, {'max_drops': 0}, 0),
        (FALLING + FLAT[:3], {'patience_epochs': 4.0}, 0),
        (FALLING + FLAT[:1], {'patience_epochs': 1.0}, 1),
        ([0.9, 0.95, 0.93, 0.89, 0.95, 0.93], {}, 0),  # a new best in time
        ([0.9, 0.95, 0.93, 0.91], {}, 1),  # better than the one before is not better than the best
        ([0.9, math.nan, math.nan, math.nan], {}, 1),
    ],
)
def test_plateau_drops(errors, changes, drops):
    assert plateau_drops(errors, schedule('plateau', 0.01, **changes), 1.0) == drops


def test_patience_is_in_epochs_not_in_evaluations():
    """Evaluated twice an epoch, three epochs of patience are six errors; every two epochs, two."""
    rule = schedule('plateau', 0.01)
    assert [plateau_drops(FALLING + FLAT[:n], rule, 0.5) for n in (5, 6)] == [0, 1]
    assert [plateau_drops(FALLING + FLAT[:n], rule, 2.0) for n in (1, 2)] == [0, 1]


def test_plateau_drops_never_fall_as_the_history_grows():
    """A resumed run counts the same errors again: every prefix agrees with the run that made it."""
    errors = list(np.random.default_rng(0).uniform(0.4, 0.5, size=60))
    rule = schedule('plateau', 0.01, max_drops=100)
    counts = [plateau_drops(errors[:n], rule, 1.0) for n in range(61)]
    assert set(np.diff(counts)) == {0, 1}


@pytest.mark.parametrize('kind', ['constant', 'steps', 'dexp'])
def test_other_schedules_never_drop(kind):
    assert plateau_drops(FALLING + FLAT, schedule(kind, 0.01), 1.0) == 0
