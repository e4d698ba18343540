"""examples/alexnet_plain.py is the net of configs/alexnet.py."""

import jax
import numpy as np
import pytest

from alexnet_jax.model import alexnet as model
from configs import alexnet
from examples import alexnet_plain
from tests.golden import cases


@pytest.fixture(scope='module')
def case() -> cases.Case:
    """The full net of 2012 with reproducible weights, and two images."""
    return cases.case(cases.net_of(alexnet.get_config('imagenet2012')), 2)


def test_logits_are_those_of_the_table(case):
    ours = jax.jit(model.AlexNet(case.net).apply)({'params': case.params}, case.images)
    plain = jax.jit(alexnet_plain.AlexNet().apply)({'params': case.params}, case.images)
    # float32, sums of up to 9,216 terms in another order
    np.testing.assert_allclose(plain, ours, rtol=0, atol=2e-6 * np.abs(ours).max())


def test_initialisation_is_that_of_the_table(case):
    key, image = jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32)
    plain = jax.jit(alexnet_plain.AlexNet().init)(key, image)['params']
    ours = model.init(key, case.net)
    assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, ours)
    assert sum(leaf.size for leaf in jax.tree.leaves(plain)) == 60_965_224  # the paper, 3.5
    for layer in case.net.layers:
        np.testing.assert_array_equal(plain[layer.name]['bias'], layer.bias)
        std = np.std(plain[layer.name]['kernel'])
        assert std == pytest.approx(layer.init_std, rel=0.02)  # conv1 has 34,848 weights


def test_dropout_zeroes_half_in_training_and_halves_at_test():
    x = np.ones((4, 4096), np.float32)
    net = alexnet_plain.AlexNet()
    kept = net.apply({}, x, True, method='dropout', rngs={'dropout': jax.random.key(0)})
    assert set(np.unique(kept)) == {0, 1}
    assert np.mean(kept) == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(net.apply({}, x, False, method='dropout'), 0.5)


def test_a_training_step_has_finite_gradients():
    net = alexnet_plain.AlexNet(classes=10)
    images = np.random.default_rng(0).normal(0, 60, (2, 224, 224, 3)).astype(np.float32)
    params = jax.jit(net.init)(jax.random.key(0), images)['params']

    @jax.jit
    def gradients(params):
        def loss(params):
            rngs = {'dropout': jax.random.key(1)}
            logits = net.apply({'params': params}, images, train=True, rngs=rngs)
            return model.mean_loss(logits, np.arange(2))

        return jax.grad(loss)(params)

    for leaf in jax.tree.leaves(gradients(params)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
