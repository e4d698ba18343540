"""What a config describes, on one page: shapes, parameters, multiply-adds, memory."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from alexnet_jax import config as configuration
from alexnet_jax.config import Config, Settings
from alexnet_jax.model import Net, Stage, geometry

COLUMNS = (
    'layer', 'reads', 'input', 'kernel/stride/pad', 'output', 'init std', 'bias', 'parameters',
    'multiply-adds', 'then',
)  # fmt: skip
FLOAT32_BYTES = 4


def run(config: Config) -> str:
    """The page for a config.

    Raises:
        UsageError: the config is impossible.
    """
    settings = configuration.unpack(config)
    net, stages = settings.net, geometry(settings.net)
    parts = [
        f'{settings.name}, scale {settings.scale}: {net.towers} tower(s), crops of '
        f'{net.input_px} x {net.input_px} x {net.channels} from {settings.preprocess.image_px} px',
        table([COLUMNS, *(_row(stage, net) for stage in stages)]),
        _totals(stages),
        _recipe(settings),
        _memory(settings, stages),
    ]
    return '\n\n'.join(parts)


def totals(stages: Sequence[Stage]) -> dict[str, int]:
    """Parameters; neurons (units before pooling, as the paper counts); multiply-adds a view."""
    return {
        'parameters': sum(stage.parameters for stage in stages),
        'neurons': sum(math.prod(stage.output) for stage in stages),
        'multiply_adds': sum(stage.multiply_adds for stage in stages),
    }


def memory_bytes(settings: Settings, stages: Sequence[Stage]) -> dict[str, int]:
    """What a training step holds, all devices together; an estimate from the shapes alone.

    Activations are every operation's result, kept for the backward pass; what the compiler fuses
    away is counted, what it adds for scratch is not.
    """
    parameters = FLOAT32_BYTES * totals(stages)['parameters']
    units = sum(math.prod(shape) for stage in stages for shape in (stage.output, *stage.after))
    width = jnp.dtype(settings.net.compute_dtype).itemsize
    return {
        'parameters': parameters,
        'velocity': parameters,
        'gradients': parameters,
        'activations': width * units * settings.batch_size,
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def _row(stage: Stage, net: Net) -> tuple[str, ...]:
    layer = stage.layer
    first, last = layer is net.layers[0], layer is net.layers[-1]
    if first:
        reads = 'the image'
    elif layer.reads == 'own' and not last:
        reads = 'own tower'
    else:
        reads = 'all towers'
    (top, bottom), (left, right) = layer.padding_px
    pad = f'{top}' if top == bottom == left == right else f'{top},{bottom},{left},{right}'
    return (
        layer.name,
        reads,
        _shape(stage.input),
        f'{layer.kernel_px}/{layer.stride_px}/{pad}' if layer.kind == 'conv' else 'fc',
        _shape(stage.output),
        f'{layer.init_std:.4g}' if layer.init in ('gaussian', 'uniform') else layer.init,
        f'{layer.bias:g}',
        f'{stage.parameters:,}',
        f'{stage.multiply_adds:,}',
        _then(stage),
    )


def _then(stage: Stage) -> str:
    words, shape = [], stage.output
    for word, after in zip(stage.layer.then, stage.after, strict=True):
        words.append(word if after == shape else f'{word} -> {_shape(after)}')
        shape = after
    return ', '.join(words)


def _shape(shape: Sequence[int]) -> str:
    return ' x '.join(map(str, shape))


def _totals(stages: Sequence[Stage]) -> str:
    total = totals(stages)
    return (
        f'{total["parameters"]:,} parameters, {total["neurons"]:,} neurons, '
        f'{total["multiply_adds"] / 1e6:.1f} M multiply-adds a view '
        f'({total["multiply_adds"]:,})'
    )


def _recipe(settings: Settings) -> str:
    recipe, net = settings.optimizer, settings.net
    norms = ', '.join(
        f'{name}: size {norm.size}, k {norm.k:g}, alpha {norm.alpha:g}, beta {norm.beta:g}'
        for name, norm in (('lrn', net.lrn), ('spatial_norm', net.spatial_norm))
    )
    return '\n'.join(
        [
            norms,
            f'pool: {net.pool.kind} {net.pool.window_px}/{net.pool.stride_px}; dropout: '
            f'{net.dropout.kind}, keep {net.dropout.keep:g}; compute in {net.compute_dtype}',
            f'batch {settings.batch_size}, {settings.epochs:g} epochs, momentum '
            f'{recipe.momentum:g}, weight decay {recipe.weight_decay:g}; rates: weights '
            f'{recipe.weights.rate:g} ({recipe.weights.kind}), biases {recipe.biases.rate:g} '
            f'({recipe.biases.kind})',
        ]
    )


def _memory(settings: Settings, stages: Sequence[Stage]) -> str:
    held = memory_bytes(settings, stages)
    parts = ', '.join(f'{name} {_mib(size)}' for name, size in held.items())
    total = _mib(sum(held.values()))
    return f'memory of a training step at batch {settings.batch_size}: {parts}; {total} in all'


def _mib(size: int) -> str:
    return f'{size / 2**20:,.1f} MiB'
