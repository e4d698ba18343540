"""AlexNet in PyTorch, from the same layer table; as a command it writes net.npz.

    python -m tests.golden.make_net        # needs PyTorch

An independent reading of the table in another library: its convolutions, pooling and LRN, its
automatic differentiation, channels first. Only the parameters' layout is taken over from here.
"""

import importlib
from typing import Any

import numpy as np

from alexnet_jax.model.alexnet import Net, Norm
from tests.golden import cases
from tests.golden.cases import Case

# Not an import statement: the type checker also runs where PyTorch is not installed.
torch: Any = importlib.import_module('torch')
F: Any = torch.nn.functional

Tree = dict[str, dict[str, np.ndarray]]


def logits_loss_gradients(case: Case) -> tuple[np.ndarray, float, Tree]:
    """One training pass: logits [B, classes], mean cross-entropy in nats, canonical gradients."""
    params = {
        layer: {kind: torch.tensor(value, requires_grad=True) for kind, value in pair.items()}
        for layer, pair in case.params.items()
    }
    masks = {name: torch.tensor(mask) for name, mask in case.masks.items()}
    logits = forward(case.net, params, torch.tensor(case.images), masks)
    loss = F.cross_entropy(logits, torch.tensor(case.labels, dtype=torch.int64))
    loss.backward()
    gradients = {
        layer: {kind: value.grad.numpy() for kind, value in pair.items()}
        for layer, pair in params.items()
    }
    return logits.detach().numpy(), loss.item(), gradients


def forward(net: Net, params, images, masks):
    """`images` [B, H, W, C] -> logits [B, classes]; `masks` by layer name, None at test time."""
    x = images.permute(0, 3, 1, 2)
    for layer in net.layers:
        kernel, bias = params[layer.name]['kernel'], params[layer.name]['bias']
        if layer.kind == 'conv':
            grouped = layer.reads == 'own' and layer is not net.layers[0]
            (top, bottom), (left, right) = layer.padding_px
            x = F.conv2d(
                F.pad(x, (left, right, top, bottom)),
                kernel.permute(3, 2, 0, 1),
                bias,
                stride=layer.stride_px,
                groups=net.towers if grouped else 1,
            )
        else:
            if layer.reads == 'own':
                raise NotImplementedError('no shipped recipe has a fully connected layer in towers')
            x = F.linear(x.flatten(1), _channels_first(kernel, x.shape), bias)
        for word in layer.ops:
            x = _follow(word, x, net, None if masks is None else masks.get(layer.name))
    return x


def _channels_first(kernel, shape):
    """[H * W * C, units] -> [units, C * H * W], for maps of `shape` [B, C, H, W]."""
    if len(shape) == 2:
        return kernel.T
    _, channels, height, width = shape
    cube = kernel.reshape(height, width, channels, -1)
    return cube.permute(3, 2, 0, 1).flatten(1)


def _follow(word: str, x, net: Net, mask):
    if word == 'relu':
        return F.relu(x)
    if word == 'pool':
        return F.max_pool2d(x, net.pool.window_px, net.pool.stride_px)
    if word == 'lrn':
        towers = x.chunk(net.towers, dim=1)
        return torch.cat([_lrn(tower, net.lrn) for tower in towers], dim=1)
    if word == 'spatial_norm':
        return _spatial_norm(x, net.spatial_norm)
    if word == 'dropout':  # the 2012 form: 0 or 1 in training, times keep at test
        return x * net.dropout.keep if mask is None else x * mask
    raise NotImplementedError(word)


def _lrn(x, norm: Norm):
    """PyTorch divides alpha by the window's size; the table's alpha is the sum's own factor."""
    return F.local_response_norm(x, norm.size, norm.alpha * norm.size, norm.beta, norm.k)


def _spatial_norm(x, norm: Norm):
    """The sum over the window is the average over it, borders counted as zeros, times its size."""
    mean = F.avg_pool2d(x * x, norm.size, stride=1, padding=norm.size // 2)
    return x / (norm.k + norm.alpha * norm.size**2 * mean) ** norm.beta


def main() -> None:
    """Write what PyTorch finds for each recipe, one npz key a number or array."""
    stored: dict[str, Any] = {'torch_version': np.array(torch.__version__)}
    for recipe in cases.RECIPES:
        logits, loss, gradients = logits_loss_gradients(cases.small(recipe))
        stored |= {f'{recipe}/logits': logits, f'{recipe}/loss': np.float32(loss)}
        for layer, pair in gradients.items():
            for kind, gradient in pair.items():
                key = f'{recipe}/{layer}/{kind}'
                norm = np.linalg.norm(gradient.astype(np.float64))
                stored |= {f'{key}/norm': norm, f'{key}/samples': cases.samples(gradient)}
    np.savez_compressed(cases.FILE, **stored)
    print(f'{cases.FILE.name}: {cases.FILE.stat().st_size / 1024:.0f} KiB')


if __name__ == '__main__':
    main()
