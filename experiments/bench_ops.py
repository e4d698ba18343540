"""Train steps a second with our operations and with the plain XLA forms, in one alternating run.

    python -m experiments.bench_ops [--net=full|quickstart] [--rounds=5]

A step is forward, backward and a plain SGD update of the two-tower net in float32, on images that
lie on the device already. Prints a table and writes one JSON line a net to
experiments/results/throughput/ops_<device>.json.
"""

import argparse
import contextlib
import json
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax import config, model, ops, parallel, records
from configs import alexnet

RESULTS = Path(__file__).parent / 'results' / 'throughput'


# --- the plain forms: what one writes first --------------------------------------------------


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
    total = lax.reduce_window(towers**2, 0.0, lax.add, window, (1,) * 5, padding)
    return (towers / (k + alpha * total) ** beta).reshape(x.shape)


def plain_spatial_norm(x, *, size=5, k=1.0, alpha=0.001 / 25, beta=0.75):
    """Spatial normalisation by `reduce_window` and a power."""
    before = size // 2
    pad = (before, size - 1 - before)
    padding = ((0, 0), pad, pad, (0, 0))
    total = lax.reduce_window(x**2, 0.0, lax.add, (1, size, size, 1), (1,) * 4, padding)
    return x / (k + alpha * total) ** beta


def plain_max_pool(x, *, window=3, stride=2):
    """Max-pooling by `reduce_window`, as `flax.linen.max_pool` does it."""
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, 'VALID')


PLAIN = {
    'conv': plain_conv,
    'lrn': plain_lrn,
    'spatial_norm': plain_spatial_norm,
    'max_pool': plain_max_pool,
}


@contextlib.contextmanager
def operations(replacements):
    """The model, traced inside this context, is made of these operations instead of ours."""
    ours = {name: getattr(ops, name) for name in replacements}
    try:
        for name, function in replacements.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in ours.items():
            setattr(ops, name, function)


# --- the nets --------------------------------------------------------------------------------

NETS = {
    # name: (scale of configs/alexnet.py, batch size)
    'full': ('imagenet2012', 64),
    'quickstart': ('quickstart', 128),
}


# --- the measurement -------------------------------------------------------------------------


def compiled_step(net, replacements, params, images, labels, masks):
    """The train step of `net`, compiled with these operations: (params, ...) -> (params, loss).

    Ours is compiled as the trainer compiles it, the plain form as JAX does unasked.
    """

    def loss(params, images, labels, masks):
        logits = jnp.asarray(model.AlexNet(net).apply({'params': params}, images, masks))
        return model.mean_loss(logits, labels)

    def step(params, images, labels, masks):
        value, gradient = jax.value_and_grad(loss)(params, images, labels, masks)
        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, gradient), value

    with operations(replacements):
        lowered = jax.jit(step, donate_argnums=0).lower(params, images, labels, masks)
    return lowered.compile(None if replacements else parallel.compiler_options())


def measure(name, batch_size, rounds, contenders):
    """Wall and processor seconds a step of each contender, `{name: [secs, ...]}`, taken in turn.

    Processor seconds are the figure to compare on a machine that others use at the same time.
    """
    scale, default_batch_size = NETS[name]
    net = config.unpack(alexnet.get_config(scale)).net
    batch_size = batch_size or default_batch_size
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (batch_size, net.input_px, net.input_px, net.channels)
    images = 64 * jax.random.normal(keys[0], shape)
    labels = jax.random.randint(keys[1], (batch_size,), 0, net.classes)
    batch = (images, labels, model.draw_masks(keys[2], net, batch_size))
    init = jax.jit(lambda key: model.init(key, net))
    steps, states, losses, secs, cpu_secs = {}, {}, {}, {}, {}
    for contender, replacements in contenders.items():
        states[contender] = init(keys[0])
        steps[contender] = compiled_step(net, replacements, states[contender], *batch)
        first = steps[contender](states[contender], *batch)
        states[contender], losses[contender] = jax.block_until_ready(first)
        secs[contender], cpu_secs[contender] = [], []
    for _ in range(rounds):
        for contender, step in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            states[contender], _ = jax.block_until_ready(step(states[contender], *batch))
            secs[contender].append(time.perf_counter() - start)
            cpu_secs[contender].append(time.process_time() - start_cpu)
    return (
        batch_size,
        secs,
        cpu_secs,
        {contender: float(loss) for contender, loss in losses.items()},
    )


def report(name, batch_size, secs, cpu_secs, losses):
    """Prints the table of one net and returns its record."""
    record = {
        'net': name,
        'batch_size': batch_size,
        'rounds': len(secs['ours']),
        'first_loss': losses,
        **records.environment(),
    }
    print(f'{name} net, batch {batch_size}, on {record["device"]}, jax {jax.__version__}')
    for contender, values in secs.items():
        median = statistics.median(values)
        record[contender] = {
            'step_secs': {'median': median, 'min': min(values), 'max': max(values)},
            'images_per_sec': batch_size / median,
            'cpu_secs': statistics.median(cpu_secs[contender]),
        }
        spread = f'{1e3 * min(values):.0f} to {1e3 * max(values):.0f}'
        print(f'  {contender:6} {batch_size / median:8.1f} images/s', end='')
        print(f'  {1e3 * median:8.0f} ms a step ({spread})', end='')
        print(f'  {1e3 * record[contender]["cpu_secs"]:8.0f} ms of processor time')
    if 'plain' in secs:
        pairs = zip(secs['plain'], secs['ours'], strict=True)
        record['ratio'] = statistics.median(plain / ours for plain, ours in pairs)
        record['cpu_ratio'] = record['plain']['cpu_secs'] / record['ours']['cpu_secs']
        print(f'  ours is {record["ratio"]:.2f} times as fast', end='')
        print(f' (processor time: {record["cpu_ratio"]:.2f})')
    return record


def main():
    """Measures the nets asked for, prints the tables and keeps the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--net', choices=NETS, help='this one only')
    parser.add_argument('--batch_size', type=int, help='default: 64 full, 128 quickstart')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--ours_only', action='store_true', help='without the plain forms')
    flags = parser.parse_args()
    contenders = {'ours': {}} if flags.ours_only else {'ours': {}, 'plain': PLAIN}
    rows = [
        report(name, *measure(name, flags.batch_size, flags.rounds, contenders))
        for name in ([flags.net] if flags.net else NETS)
    ]
    slug = re.sub(r'\W+', '_', rows[0]['device']).strip('_').lower()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f'ops_{slug}.json'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
    main()
