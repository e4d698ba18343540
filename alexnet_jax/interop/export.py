"""Export a trained net to a file that runs without this code: uint8 images in, probabilities out.

Both formats contain preprocessing, net and weights, and compute the centre view as `evaluate` does.
They take batches of any size of images as stored: uint8 [B, H, W, C], with the shape of the mean
image. The ONNX graph is built here: jax2onnx 0.17.1 needs an older Orbax and cannot convert these
nets (symbolic batch size, resizing).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from alexnet_jax import command
from alexnet_jax.config import Settings
from alexnet_jax.model import alexnet, augment
from alexnet_jax.model.alexnet import AlexNet, Stage
from alexnet_jax.model.augment import Statistics

Array = jax.Array
# The oldest versions with every operation used here, for old runtimes.
OPSET, IR_VERSION = 17, 8


def classify(settings: Settings, params: Any, statistics: Statistics) -> Callable[[Array], Array]:
    """Return a function from uint8 images [B, H, W, C] to float32 probabilities [B, classes]."""
    module = AlexNet(settings.net)

    def run(images: Array) -> Array:
        pixels = augment.view(images, statistics, settings.net, settings.preprocess)
        return jax.nn.softmax(module.apply({'params': params}, pixels))  # ty: ignore[invalid-argument-type] (not a tuple without `mutable`)

    return run


def stablehlo(settings: Settings, params: Any, statistics: Statistics) -> bytes:
    """Return bytes for `jax.export.deserialize(...).call(images)` on a CPU, GPU or TPU."""
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, *statistics.mean_image.shape), jnp.uint8)
    run = jax.jit(classify(settings, params, statistics))
    return bytes(jax.export.export(run, platforms=('cpu', 'cuda', 'tpu'))(images).serialize())


def onnx(settings: Settings, params: Any, statistics: Statistics) -> bytes:
    """Return a float32 ONNX model, with a few nodes for each operation of the layer table.

    Raises:
        RunError: the library onnx is not installed.
    """
    graph = _Graph()
    maps = _preprocess(graph, settings, statistics)
    for stage in alexnet.geometry(settings.net):
        weights = jax.tree.map(np.asarray, params[stage.layer.name])
        maps = _linear(graph, maps, stage, **weights)
        for op in stage.layer.ops:
            maps = _op(graph, maps, op, settings.net)
    graph.node('Softmax', maps, axis=1, output='probabilities')
    return graph.serialize(settings, statistics)


class _Graph:
    """An ONNX graph under construction, whose values are referred to by name."""

    def __init__(self):
        self.onnx: Any = command.library('onnx', 'weights')
        self.nodes, self.constants = [], []

    def node(self, kind: str, *inputs: str, output: str = '', **attributes: Any) -> str:
        """Add an operation with one result; return the name of the result."""
        output = output or f'{kind.lower()}_{len(self.nodes)}'
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Add a float32 array; return its name."""
        name = f'constant_{len(self.constants)}'
        array = np.ascontiguousarray(value, np.float32)
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def serialize(self, settings: Settings, statistics: Statistics) -> bytes:
        """Return the model, checked by ONNX's checker."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        shapes = ['batch', *statistics.mean_image.shape], ['batch', settings.net.classes]
        images = helper.make_tensor_value_info('images', types.UINT8, shapes[0])
        output = helper.make_tensor_value_info('probabilities', types.FLOAT, shapes[1])
        graph = helper.make_graph(self.nodes, settings.name, [images], [output], self.constants)
        opset = helper.make_opsetid('', OPSET)
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        self.onnx.checker.check_model(proto)
        return proto.SerializeToString()


def _preprocess(graph: _Graph, settings: Settings, statistics: Statistics) -> str:
    """Add resizing, frame and crop as a matrix product on each axis, and the rest as an offset."""
    net, recipe = settings.net, settings.preprocess
    height, width, channels = statistics.mean_image.shape
    x = graph.node('Cast', 'images', to=graph.onnx.TensorProto.FLOAT)
    x = graph.node('Transpose', x, perm=[0, 3, 1, 2])
    x = graph.node('MatMul', graph.constant(_rows(recipe, height, net.input_px)), x)
    x = graph.node('MatMul', x, graph.constant(_rows(recipe, width, net.input_px).T))
    x = graph.node('Mul', x, graph.constant(recipe.scale))
    if channels < net.channels:
        x = graph.node('Concat', *(x,) * net.channels, axis=1)
    black = jnp.zeros((1, height, width, channels), jnp.uint8)
    offset = augment.view(black, statistics, net, recipe)
    return graph.node('Add', x, graph.constant(np.asarray(offset).transpose(0, 3, 1, 2)))


def _rows(recipe: augment.Preprocess, side: int, crop_px: int) -> np.ndarray:
    """Return the matrix [crop_px, side] from stored rows to rows of the centre crop."""
    resized = jax.image.resize(jnp.eye(side), (recipe.resize_px, side), 'bilinear')
    before = (recipe.image_px - recipe.resize_px) // 2
    after = recipe.image_px - recipe.resize_px - before
    edge = (recipe.image_px - crop_px) // 2
    return np.pad(resized, ((before, after), (0, 0)))[edge : edge + crop_px]


def _linear(graph: _Graph, x: str, stage: Stage, kernel: np.ndarray, bias: np.ndarray) -> str:
    layer = stage.layer
    if layer.kind == 'conv':
        (top, bottom), (left, right) = layer.padding_px
        how: dict[str, Any] = {'strides': [layer.stride_px] * 2, 'pads': [top, left, bottom, right]}
        weights = graph.constant(kernel.transpose(3, 2, 0, 1)), graph.constant(bias)
        return graph.node('Conv', x, *weights, group=stage.groups, **how)
    towers = np.split(kernel, stage.groups, axis=1)
    if len(stage.input) == 3:  # flattened with channels first
        shape = *stage.input[:2], stage.input[2] // stage.groups, -1
        towers = [k.reshape(shape).transpose(2, 0, 1, 3).reshape(k.shape) for k in towers]
        x = graph.node('Flatten', x, axis=1)
    kernel = linalg.block_diag(*towers)  # zeros where a tower does not read the other
    return graph.node('Gemm', x, graph.constant(kernel), graph.constant(bias))


def _op(graph: _Graph, x: str, op: str, net: alexnet.Net) -> str:
    """Add an operation of the layer table."""
    if op == 'pool':
        kind = 'MaxPool' if net.pool.kind == 'max' else 'AveragePool'
        window, strides = [net.pool.window_px] * 2, [net.pool.stride_px] * 2
        ceil_mode = int(net.pool.rounding == 'up')
        return graph.node(kind, x, kernel_shape=window, strides=strides, ceil_mode=ceil_mode)
    if op == 'lrn':
        return _lrn(graph, x, net)
    if op == 'spatial_norm':
        return _spatial_norm(graph, x, net.spatial_norm)
    if op == 'dropout':
        mask = net.dropout.kind == 'mask'
        return graph.node('Mul', x, graph.constant(net.dropout.keep)) if mask else x
    return graph.node(op.title(), x)  # Relu, Tanh, Sigmoid


def _lrn(graph: _Graph, x: str, net: alexnet.Net) -> str:
    """Add LRN, tower by tower if it reads its own. ONNX divides alpha by the window's size."""
    how: dict[str, Any] = dict(
        size=net.lrn.size, alpha=net.lrn.alpha * net.lrn.size, beta=net.lrn.beta, bias=net.lrn.k
    )
    if net.towers == 1 or net.lrn_reads == 'all':
        return graph.node('LRN', x, **how)
    names = [f'tower_{len(graph.nodes)}_{number}' for number in range(net.towers)]
    graph.nodes.append(graph.onnx.helper.make_node('Split', [x], names, axis=1))
    return graph.node('Concat', *(graph.node('LRN', name, **how) for name in names), axis=1)


def _spatial_norm(graph: _Graph, x: str, norm: alexnet.Norm) -> str:
    """Add spatial normalisation. A window's sum is its zero-padded mean times its size."""
    how: dict[str, Any] = {
        'kernel_shape': [norm.size] * 2,
        'pads': [norm.size // 2] * 4,
        'count_include_pad': 1,
    }
    mean = graph.node('AveragePool', graph.node('Mul', x, x), **how)
    weighted = graph.node('Mul', mean, graph.constant(norm.alpha * norm.size**2))
    scale = graph.node('Add', weighted, graph.constant(norm.k))
    return graph.node('Div', x, graph.node('Pow', scale, graph.constant(norm.beta)))
