"""The nets of steps.NETS in fast, idiomatic PyTorch, built from the same layer table.

LRN is a sum of shifted slices, and its power two roots: on a CPU twice as fast as
`nn.LocalResponseNorm`. The reference that values are checked against is tests/golden/make_net.py.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_jax.model.alexnet import Layer, Net, Norm, geometry


class TorchAlexNet(nn.Module):
    """Net of a layer table: `forward` maps images [B, C, H, W] to logits [B, classes].

    Its parameters are NumPy's `params`, the canonical tree, converted to PyTorch's layout.
    """

    def __init__(self, net: Net, params: Mapping[str, Mapping[str, np.ndarray]]):
        super().__init__()
        self.net = net
        for stage in geometry(net):
            name, values = stage.layer.name, params[stage.layer.name]
            if stage.layer.kind == 'conv':
                module = _conv(stage.layer, stage.input[-1], stage.groups)
                weight = values['kernel'].transpose(3, 2, 0, 1)
            else:
                module = nn.Linear(stage.fan_in, stage.layer.features)
                weight = _channels_first(values['kernel'], stage.input)
            with torch.no_grad():
                module.weight.copy_(torch.tensor(np.ascontiguousarray(weight)))
                module.bias.copy_(torch.tensor(np.asarray(values['bias'])))
            self.add_module(name, module)

    def forward(self, x):
        """Map images [B, C, H, W] to logits [B, classes]."""
        for layer in self.net.layers:
            if layer.kind == 'fc':
                x = x.flatten(1)
            elif not _same_padding(layer):
                (top, bottom), (left, right) = layer.padding_px
                x = F.pad(x, (left, right, top, bottom))
            x = getattr(self, layer.name)(x)
            for op in layer.ops:
                x = self._apply_op(op, x)
        return x

    def _apply_op(self, op: str, x):
        net = self.net
        if op == 'relu':
            return F.relu(x)
        if op == 'lrn':
            return _lrn(x, net.towers if net.lrn_reads == 'own' else 1, net.lrn)
        if op == 'spatial_norm':
            norm = net.spatial_norm  # the sum over a window is its average times its size
            mean = F.avg_pool2d(x * x, norm.size, stride=1, padding=norm.size // 2)
            return x * _power(norm.k + norm.alpha * norm.size**2 * mean, norm.beta)
        if op == 'pool':
            return F.max_pool2d(x, net.pool.window_px, net.pool.stride_px)
        if op == 'dropout':
            kept = F.dropout(x, 1 - net.dropout.keep, self.training)
            return kept * net.dropout.keep if net.dropout.kind == 'mask' else kept
        raise NotImplementedError(op)


def _same_padding(layer: Layer) -> bool:
    """Return whether the convolution can pad by itself."""
    return all(before == behind for before, behind in layer.padding_px)


def _conv(layer: Layer, inputs: int, groups: int) -> nn.Conv2d:
    padding: Any = [pair[0] for pair in layer.padding_px] if _same_padding(layer) else 0
    return nn.Conv2d(
        inputs, layer.features, layer.kernel_px, layer.stride_px, padding, groups=groups
    )


def _channels_first(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Transpose [inputs, units] to [units, inputs], inputs [H, W, C] reordered to [C, H, W]."""
    if len(shape) == 1:
        return kernel.T
    return kernel.reshape(*shape, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)


def _lrn(x, towers: int, norm: Norm):
    """Apply LRN with the towers as an axis: one pass for both."""
    split = x.unflatten(1, (towers, -1))
    before, width = norm.size // 2, split.shape[2]
    squares = F.pad(split * split, (0, 0, 0, 0, before, norm.size - 1 - before))
    total = functools.reduce(torch.add, [squares[:, :, i : i + width] for i in range(norm.size)])
    return (split * _power(norm.k + norm.alpha * total, norm.beta)).flatten(1, 2)


def _power(scale, beta: float):
    """Return `scale ** -beta`."""
    return (scale * scale.sqrt()).rsqrt() if beta == 0.75 else scale**-beta
