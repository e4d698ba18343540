"""Test imported nets' logits, exports that run alone, and the refusal of damaged weight files.

The nets of torchvision and Caffe are implemented here again from their definitions, in NumPy with
channels first. The full-sized ones, and PyTorch's own files, need PyTorch (`make test-torch`).
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import config as configuration
from alexnet_jax import config_file as loader
from alexnet_jax.data import datasets
from alexnet_jax.errors import RunError
from alexnet_jax.inference import evaluate
from alexnet_jax.interop import export, weight_files, weights
from alexnet_jax.model import alexnet as model
from alexnet_jax.model import augment
from alexnet_jax.model.alexnet import AlexNet
from alexnet_jax.model.augment import Statistics
from alexnet_jax.training import checkpoint, train
from configs import (
    ablation_overlap,
    alexnet,
    alexnet_paper,
    variant_bvlc_alexnet,
    variant_caffenet,
    variant_torchvision,
)
from tests.conftest import smoke_config

safetensors = pytest.importorskip('safetensors.numpy', reason="pip install -e '.[weights]'")

CONFIGS = {
    'torchvision': variant_torchvision,
    'bvlc_alexnet': variant_bvlc_alexnet,
    'caffenet': variant_caffenet,
}
# Relative to the largest logit. Measured: 1.2e-6, and 5e-6 for exported probabilities.
TOLERANCE = 1e-4


# ----------------------------------------------------------------------------------- reference nets


def conv(x, weight, bias, stride, pad, groups=1):
    """`x` [B, C, H, W], `weight` [out, in / groups, kh, kw]."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    parts = []
    for own, kernel in zip(np.split(x, groups, 1), np.split(weight, groups), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(own, kernel.shape[2:], (2, 3))
        windows = windows[:, :, ::stride, ::stride]
        parts.append(np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2))
    return np.concatenate(parts, 1) + bias[:, None, None]


def max_pool(x, ceil):
    """Window 3, stride 2; Caffe rounds the number of windows up, PyTorch down."""
    side = x.shape[-1]
    outputs = (side - 3 + (1 if ceil else 0)) // 2 + 1
    spare = max(0, 2 * (outputs - 1) + 3 - side)
    x = np.pad(x, ((0, 0), (0, 0), (0, spare), (0, spare)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2]
    return windows[:, :, :outputs, :outputs].max((4, 5))


def caffe_lrn(x):
    """local_size 5, alpha 1e-4 over the size, beta 0.75, k 1, across all channels."""
    squares = np.pad(x * x, ((0, 0), (2, 2), (0, 0), (0, 0)))
    total = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    return x / (1 + 1e-4 / 5 * total) ** 0.75


def relu(x):
    return np.maximum(x, 0)


def torchvision_logits(w, images):
    """RGB uint8 crops [B, H, W, 3] -> logits, as torchvision's transforms and net do it."""
    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = x.transpose(0, 3, 1, 2)
    for name, stride, pad in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        x = relu(conv(x, w[f'features.{name}.weight'], w[f'features.{name}.bias'], stride, pad))
        if name in (0, 3, 10):
            x = max_pool(x, ceil=False)
    x = x.reshape(len(x), -1)
    for name in (1, 4, 6):
        x = x @ w[f'classifier.{name}.weight'].T + w[f'classifier.{name}.bias']
        x = relu(x) if name < 6 else x
    return x


def caffe_logits(w, images, pool_first):
    """RGB uint8 crops [B, H, W, 3] -> logits, as Caffe's deploy.prototxt has it."""
    x = (images[..., ::-1] - np.array([104.007, 116.669, 122.679])).transpose(0, 3, 1, 2)
    for name, stride, pad, groups in (
        ('conv1', 4, 0, 1),
        ('conv2', 1, 2, 2),
        ('conv3', 1, 1, 1),
        ('conv4', 1, 1, 2),
        ('conv5', 1, 1, 2),
    ):
        x = relu(conv(x, w[f'{name}/0'], w[f'{name}/1'], stride, pad, groups))
        if name in ('conv1', 'conv2') and pool_first:
            x = caffe_lrn(max_pool(x, ceil=True))
        elif name in ('conv1', 'conv2'):
            x = max_pool(caffe_lrn(x), ceil=True)
    x = max_pool(x, ceil=True).reshape(len(x), -1)
    for name in ('fc6', 'fc7', 'fc8'):
        x = x @ w[f'{name}/0'].T + w[f'{name}/1']
        x = relu(x) if name != 'fc8' else x
    return x


THEIRS = {
    'torchvision': torchvision_logits,
    'bvlc_alexnet': lambda w, images: caffe_logits(w, images, False),
    'caffenet': lambda w, images: caffe_logits(w, images, True),
}


# --------------------------------------------------------------------------------------- small nets


def small(origin):
    """Return the origin's net at a quarter of the widths, with three channels and a margin of 4."""
    config = CONFIGS[origin].get_config('quickstart')
    config.model.channels = 3
    config.preprocess.resize_px = config.preprocess.image_px
    return config


def foreign(origin, config, seed=0):
    """Return random weights by the origin's names, in its layout, that preserve signal variance.

    Caffe's conv1 reads pixels in 0-255 units, so its LRN meets values that it changes.
    """
    rng, arrays = np.random.default_rng(seed), {}
    for place, stage in enumerate(model.geometry(configuration.unpack(config).net)):
        shape = (stage.layer.features, int(np.prod(stage.input)))
        if stage.layer.kind == 'conv':
            shape = (stage.layer.features, stage.kernel[2], *stage.kernel[:2])
        kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        biases = rng.normal(0, 0.1, shape[0]).astype(np.float32)
        parts = ('.weight', '.bias') if origin == 'torchvision' else ('/0', '/1')
        their = weights.ORIGINS[origin].names[place]
        arrays |= {their + parts[0]: kernel, their + parts[1]: biases}
    return arrays


def pictures(side, count=4, channels=3):
    """uint8 [count, side, side, channels]."""
    return np.random.default_rng(7).integers(0, 256, (count, side, side, channels), np.uint8)


def our_logits(settings, params, statistics, images):
    @jax.jit
    def run(params, images):
        pixels = augment.view(images, statistics, settings.net, settings.preprocess)
        return AlexNet(settings.net).apply({'params': params}, pixels)

    return np.asarray(run(params, images))


@pytest.mark.parametrize('origin', CONFIGS)
def test_logits_are_the_origins(origin):
    settings = configuration.unpack(small(origin))
    arrays = foreign(origin, small(origin))
    edge = (settings.preprocess.image_px - settings.net.input_px) // 2
    images = pictures(settings.preprocess.image_px)
    expected = THEIRS[origin](arrays, images[:, edge:-edge, edge:-edge])
    params = weights.canonical(arrays, weights.ORIGINS[origin], settings)
    statistics = weights.statistics_of(weights.ORIGINS[origin], settings.preprocess)
    found = our_logits(settings, params, statistics, images)
    assert np.std(expected, axis=0).min() > 0.01  # they depend on the image
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_caffes_normalisation_crosses_the_groups(monkeypatch):
    """Windows that end at a group's border, as ours do at a tower's, give other logits."""
    arrays, images = foreign('bvlc_alexnet', small('bvlc_alexnet')), pictures(99)
    right, full = caffe_logits(arrays, images, False), caffe_lrn
    halves = lambda x: np.concatenate([full(half) for half in np.split(x, 2, 1)], 1)  # noqa: E731
    monkeypatch.setattr(sys.modules[__name__], 'caffe_lrn', halves)
    wrong = caffe_logits(arrays, images, False)
    assert np.abs(right - wrong).max() > 10 * TOLERANCE * np.abs(right).max()


# ---------------------------------------------------------------------------------- full-sized nets


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch', reason='PyTorch is for `make test-torch` alone')


def torchvision_net(torch, arrays):
    """Return torchvision's alexnet of any widths, with the same module names."""
    nn = torch.nn

    def conv(name, stride=1, padding=1):
        features, inputs, px, _ = arrays[f'features.{name}.weight'].shape
        return nn.Conv2d(inputs, features, px, stride, padding)

    def linear(name):
        return nn.Linear(*arrays[f'classifier.{name}.weight'].shape[::-1])

    features = nn.Sequential(
        *(conv(0, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(conv(3, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(conv(6), nn.ReLU(), conv(8), nn.ReLU(), conv(10), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    classifier = nn.Sequential(
        *(nn.Dropout(), linear(1), nn.ReLU(), nn.Dropout(), linear(4), nn.ReLU(), linear(6))
    )
    parts = {'features': features, 'avgpool': nn.AdaptiveAvgPool2d(6), 'flatten': nn.Flatten()}
    net = nn.Sequential()
    for name, part in (*parts.items(), ('classifier', classifier)):
        net.add_module(name, part)
    net.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return net.eval()


def full(origin, arrays, images):
    """Return our logits of the full-sized net, and its parameters."""
    settings = configuration.unpack(CONFIGS[origin].get_config('imagenet2012'))
    params = weights.canonical(arrays, weights.ORIGINS[origin], settings)
    statistics = weights.statistics_of(weights.ORIGINS[origin], settings.preprocess)
    return our_logits(settings, params, statistics, images), params


def test_torchvision_in_full(torch, tmp_path):
    """The weights come from a state dict's file; torchvision's transforms are applied in float."""
    net = torchvision_net(
        torch, foreign('torchvision', variant_torchvision.get_config('imagenet2012'))
    )
    torch.save(net.state_dict(), tmp_path / 'alexnet.pth')
    images = pictures(256, count=2)
    pixels = torch.tensor(images[:, 16:240, 16:240]).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.inference_mode():
        expected = net((pixels - mean) / std).numpy()
    found, params = full('torchvision', weight_files.read(tmp_path / 'alexnet.pth'), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 61_100_840
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize('origin', ['bvlc_alexnet', 'caffenet'])
def test_caffe_in_full(torch, origin):
    config = CONFIGS[origin].get_config('imagenet2012')
    arrays = foreign(origin, config)
    assert sum(array.size for array in arrays.values()) == 60_965_224
    images = pictures(256, count=2)
    functional = torch.nn.functional
    w = {name: torch.tensor(array) for name, array in arrays.items()}
    x = torch.tensor(images[:, 14:241, 14:241, ::-1].copy()).permute(0, 3, 1, 2).float()
    x = x - torch.tensor([104.007, 116.669, 122.679])[:, None, None]
    norm = lambda x: functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0)  # noqa: E731
    pool = lambda x: functional.max_pool2d(x, 3, 2, ceil_mode=True)  # noqa: E731
    with torch.inference_mode():
        for name, stride, pad, groups in (
            *(('conv1', 4, 0, 1), ('conv2', 1, 2, 2), ('conv3', 1, 1, 1)),
            *(('conv4', 1, 1, 2), ('conv5', 1, 1, 2)),
        ):
            x = functional.conv2d(x, w[f'{name}/0'], w[f'{name}/1'], stride, pad, 1, groups).relu()
            if name in ('conv1', 'conv2'):
                x = norm(pool(x)) if origin == 'caffenet' else pool(norm(x))
        x = pool(x).flatten(1)
        for name in ('fc6', 'fc7', 'fc8'):
            x = functional.linear(x, w[f'{name}/0'], w[f'{name}/1'])
            x = x.relu() if name != 'fc8' else x
    found, _ = full(origin, arrays, images)
    expected = x.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


# ------------------------------------------------------------------------------------- weight files


def write(path, arrays):
    """Write a weight file in the format of its suffix."""
    if path.suffix == '.npz':
        np.savez(path, **arrays)
    elif path.suffix == '.safetensors':
        safetensors.save_file(arrays, path)
    return path


def net_file(folder, origin):
    """Write a config file of the origin's small net."""
    path = folder / 'net.py'
    path.write_text(
        'from tests import test_weights\n'
        f'get_config = lambda scale="quickstart": test_weights.small({origin!r})\n'
    )
    return path


@pytest.mark.parametrize('name', ['a.npz', 'a.safetensors', 'no_suffix_that_is_known.npz'])
def test_reading_returns_what_was_written(tmp_path, name):
    arrays = foreign('caffenet', small('caffenet'))
    file = write(tmp_path / name, arrays).rename(tmp_path / name.removesuffix('.npz'))
    same(weight_files.read(file), arrays)


@pytest.mark.parametrize(
    ('of_kernels', 'of_biases'),
    [((1, 1), (1, 1, 1)), ((), ()), ((), (1,))],
    ids=['old Caffe', 'Caffe', 'OpenCV'],
)
def test_axes_of_length_one(of_kernels, of_biases):
    arrays = foreign('caffenet', small('caffenet'))
    settings = configuration.unpack(small('caffenet'))

    def longer(array):
        return array.reshape({1: of_biases, 2: of_kernels, 4: ()}[array.ndim] + array.shape)

    found = {key: longer(array) for key, array in arrays.items()}
    if of_biases == (1,):  # convolutions have the axis last
        found['conv1/1'] = found['conv1/1'].T
    origin = weights.ORIGINS['caffenet']
    found, expected = (weights.canonical(a, origin, settings) for a in (found, arrays))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, key)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize('suffix', ['.safetensors', '.npz'])
def test_other_floating_point_types(tmp_path, dtype, suffix):
    if suffix == '.npz' and dtype == jnp.bfloat16:
        pytest.skip('NumPy has no such type')
    arrays = {key: array.astype(dtype) for key, array in WRAPPED.items()}
    found = weight_files.read(write(tmp_path / f'a{suffix}', arrays))
    same(found, {key: array.astype(np.float32) for key, array in arrays.items()})


WRAPPED = foreign('torchvision', small('torchvision'))


def renamed(change):
    return {change(key): array for key, array in WRAPPED.items()}


@pytest.mark.parametrize(
    'arrays',
    [
        renamed(lambda key: f'module.{key}'),
        renamed(lambda key: f'_orig_mod.module.{key}'),
        renamed(lambda key: key.replace('features.', 'features.module.')),
        renamed(lambda key: f'state_dict.model.{key}') | {'state_dict.loss.weight': np.ones(3)},
        renamed(lambda key: f'module.{key}') | {'n_averaged': np.array(3)},
        renamed(lambda key: f'state_dict.module.{key}') | {'optimizer.state.0.exp_avg': np.ones(3)},
        renamed(lambda key: f'my_features.net.{key}'),
    ],
)
def test_wrappers_are_removed(tmp_path, arrays):
    file = write(tmp_path / 'a.npz', arrays)
    same_net(weight_files.read(file), WRAPPED)


def same_net(arrays, expected):
    """Assert that both give the same parameters of torchvision's small net."""
    settings = configuration.unpack(small('torchvision'))
    found, wanted = (
        weights.canonical(a, weights.ORIGINS['torchvision'], settings) for a in (arrays, expected)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))


def test_two_nets_in_a_file(tmp_path, capsys):
    arrays = renamed('model.{}'.format) | renamed('model_ema.module.{}'.format)
    write(tmp_path / 'a.npz', arrays)
    sentence = 'a.npz contains 2 nets (model., model_ema.); save the one'
    refused(['import', 'torchvision', 'a.npz'], 2, sentence, tmp_path, capsys)


def test_two_nets_that_differ_by_a_wrapper_only(tmp_path, capsys):
    write(tmp_path / 'a.npz', WRAPPED | renamed('module.{}'.format))
    refused(['import', 'torchvision', 'a.npz'], 2, 'a.npz contains 2 nets', tmp_path, capsys)


# ------------------------------------------------------------------------------- PyTorch's files


def imagenet_example(torch, net):
    """Return the model_best.pth.tar of pytorch/examples/imagenet/main.py."""
    net.features = torch.nn.DataParallel(net.features)
    optimizer, scheduler = trained(torch, net)
    return {
        'epoch': 90,
        'arch': 'alexnet',
        'state_dict': net.state_dict(),
        'best_acc1': torch.tensor(56.5),
        'optimizer': optimizer.state_dict(),
        'scheduler': scheduler.state_dict(),
    }


def torchvision_reference(torch, net):
    """Return the checkpoint.pth of torchvision's references/classification/train.py."""
    optimizer, scheduler = trained(torch, net)
    return {
        'model': torch.nn.DataParallel(net).module.state_dict(),
        'optimizer': optimizer.state_dict(),
        'lr_scheduler': scheduler.state_dict(),
        'epoch': 89,
        'args': argparse.Namespace(lr=0.01, output_dir=pathlib.Path('.')),
        'scaler': {'scale': 65536.0},
    }


def lightning(torch, net):
    """Return PyTorch Lightning's checkpoint of a module with self.model and NumPy scalars."""
    return {
        'pytorch-lightning_version': '2.5.0',
        'state_dict': {f'model.{key}': value for key, value in net.state_dict().items()},
        'callbacks': {"ModelCheckpoint{'monitor': 'loss'}": {'best_model_score': np.float64(1.5)}},
        'hyper_parameters': {'lr': 0.1, 'mean': np.ones(3)},
        'optimizer_states': [trained(torch, net)[0].state_dict()],
    }


def trained(torch, net):
    """Return an optimizer with momentum after a step, and its schedule."""
    optimizer = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9)
    for value in net.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 30)


def views(torch, net):
    """Return non-contiguous tensors of one storage."""
    storage = torch.cat([value.flatten() for value in net.state_dict().values()])
    parts = storage.split([value.numel() for value in net.state_dict().values()])
    found = {
        key: part.view(value.shape)
        for (key, value), part in zip(net.state_dict().items(), parts, strict=True)
    }
    turned = {key: value.transpose(0, -1).contiguous() for key, value in found.items()}
    return {key: value.transpose(0, -1) for key, value in turned.items()} | {
        key: value for key, value in found.items() if key.endswith('bias')
    }


SAVED = {
    'state dict': lambda torch, net: net.state_dict(),
    'DataParallel': lambda torch, net: torch.nn.DataParallel(net).state_dict(),
    'torch.compile': lambda torch, net: torch.compile(net, backend='eager').state_dict(),
    'both': lambda torch, net: torch.compile(
        torch.nn.DataParallel(net), backend='eager'
    ).state_dict(),
    'AveragedModel': lambda torch, net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    'model_state_dict': lambda torch, net: {'model_state_dict': net.state_dict(), 'loss': 0.5},
    'parameters': lambda torch, net: dict(net.named_parameters()),
    'double': lambda torch, net: net.double().state_dict(),
    'views': views,
    'imagenet example': imagenet_example,
    'torchvision reference': torchvision_reference,
    'lightning': lightning,
}


@pytest.mark.parametrize('kind', SAVED)
@pytest.mark.parametrize('zipped', [True, False])
def test_what_training_programs_save(torch, tmp_path, kind, zipped):
    """Files are zip archives, or of the format before PyTorch 1.6."""
    tree = SAVED[kind](torch, torchvision_net(torch, WRAPPED))
    file = tmp_path / 'model_best.pth.tar'
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    same_net(weight_files.read(file), WRAPPED)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision(torch, tmp_path, dtype):
    net = torchvision_net(torch, WRAPPED).to(getattr(torch, dtype))
    torch.save(net.state_dict(), tmp_path / 'a.pth')
    rounded = {key: array.astype(jnp.dtype(dtype)) for key, array in WRAPPED.items()}
    same_net(
        weight_files.read(tmp_path / 'a.pth'),
        {key: array.astype(np.float32) for key, array in rounded.items()},
    )


def test_pytorch_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('a/data.pkl', b'')
    sentence = "torch is not installed: pip install 'alexnet_jax[torch]'"
    refused(['import', 'torchvision', 'a.pth'], 1, sentence, tmp_path, capsys)


class Trap:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_with_code_in_it_is_not_run(torch, tmp_path, capsys, zipped):
    file, sprung = tmp_path / 'bad.pth', tmp_path / 'sprung'
    tree = torchvision_net(torch, WRAPPED).state_dict()
    tree['trap'] = Trap(os.mknod, str(sprung))
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    refused(['import', 'torchvision', 'bad.pth'], 1, 'objects (posix.mknod)', tmp_path, capsys)
    tree['trap'] = Trap(eval, f'open({str(sprung)!r}, "w")')
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    refused(['import', 'torchvision', 'bad.pth'], 1, 'objects (eval)', tmp_path, capsys)
    tree['trap'] = Trap(subprocess.check_call, ['touch', str(sprung)])
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    same_net(weight_files.read(file), WRAPPED)  # the weights are read without the call
    assert not sprung.exists()


def saved_net(torch):
    return torch.nn.Sequential(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ('make', 'zipped', 'code', 'sentence'),
    [
        (
            saved_net,
            True,
            2,
            'features.0.weight of this net is missing; the file contains no arrays',
        ),
        (saved_net, False, 1, 'save only model.state_dict()'),
        (lambda torch: {'a': collections.UserDict()}, True, 2, 'the file contains no arrays'),
        (lambda torch: {'a': Trap(os.mknod, '/dev/null')}, True, 1, 'objects (posix.mknod)'),
        (lambda torch: torch.ones(3), True, 2, 'is missing; the file contains'),
        (lambda torch: [torch.ones(3)], True, 2, 'the file contains no arrays'),
        (lambda torch: {'features.0.weight': torch.ones(2).to_sparse()}, True, 1, 'Sparse'),
    ],
)
def test_pth_files_without_a_net(torch, tmp_path, capsys, make, zipped, code, sentence):
    torch.save(make(torch), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    refused(['import', 'torchvision', 'a.pth'], code, sentence, tmp_path, capsys)


@pytest.mark.parametrize('part', [0.1, 0.5, 0.999])
@pytest.mark.parametrize('zipped', [True, False])
def test_a_truncated_pth(torch, tmp_path, capsys, part, zipped):
    file = tmp_path / 'a.pth'
    net = torchvision_net(torch, WRAPPED)
    torch.save(net.state_dict(), file, _use_new_zipfile_serialization=zipped)
    os.truncate(file, int(part * file.stat().st_size))
    refused(['import', 'torchvision', 'a.pth'], 1, 'damaged', tmp_path, capsys)


# --------------------------------------------------------------------------------------- end to end

SMALL = """
from configs import variant_torchvision

def get_config(scale='quickstart'):
    config = variant_torchvision.get_config(scale)
    config.model.channels = 3
    return config
"""


@pytest.fixture(scope='module')
def config_file(tmp_path_factory, data_dir):
    """Return a config of torchvision's net for the test data."""
    path = tmp_path_factory.mktemp('config') / 'small.py'
    data_dir = f'    config.data.data_dir = {str(data_dir)!r}\n'
    path.write_text(SMALL.replace('    return', f'{data_dir}    return'))
    return path


@pytest.fixture(scope='module')
def imported(tmp_path_factory, config_file):
    """Import weights by the command; return the workdir and the weights."""
    folder = tmp_path_factory.mktemp('imported')
    config = loader.load(str(config_file), {})
    arrays = foreign('torchvision', config)
    file = write(folder / 'theirs.safetensors', arrays)
    words = ['import', 'torchvision', file, '--workdir', folder / 'w', '--config', config_file]
    assert weights.main([str(word) for word in words]) == 0
    return folder / 'w', arrays


@pytest.fixture(scope='module')
def evaluated(imported):
    """Return the probabilities of the first test images by an evaluation."""
    workdir, _ = imported
    assert evaluate.run([workdir], split='test[:48]')['images'] == 48
    with np.load(workdir / 'predictions_test__48.npz') as file:
        return file['centre']


@pytest.fixture(scope='module')
def test_images(data_dir):
    return np.asarray(datasets.load('fashion_mnist', data_dir, 'test[:48]').images)


def test_an_imported_net_is_evaluated(imported, evaluated, test_images):
    """Its probabilities are those of torchvision's net on the same pixels, resized to 112."""
    _, arrays = imported
    large = jax.image.resize(np.float32(test_images), (48, 112, 112, 1), 'bilinear')
    logits = torchvision_logits(arrays, np.repeat(np.asarray(large), 3, axis=-1))
    expected = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(evaluated, expected, rtol=0, atol=TOLERANCE)
    assert np.ptp(expected, axis=0).max() > 0.01


def test_what_an_import_leaves(imported):
    workdir, _ = imported
    restored = checkpoint.read(workdir / 'checkpoints')
    assert restored.step == 0
    assert json.loads((workdir / 'config.json').read_text()) == restored.extra['config']
    assert restored.extra['class_names'] == [str(i) for i in range(10)]
    assert restored.extra['imported']['file'] == 'theirs.safetensors'
    names = weights.read_names(None, 1000)
    assert names[0] == 'n01440764'
    assert list(names) == sorted(names)


def test_an_imported_net_can_be_trained(smoke_run, data_dir, tmp_path):
    """An imported checkpoint has no history, unlike a run's."""
    workdir, file = tmp_path / 'w', tmp_path / 'net.safetensors'
    weights.export_checkpoint(file, smoke_run)
    weights.import_weights(file, workdir, 'own')
    train.run(smoke_config(data_dir), workdir)
    restored = checkpoint.read(workdir / 'checkpoints')
    assert restored.step == checkpoint.read(smoke_run / 'checkpoints').step
    assert restored.extra['history']['errors']


def test_a_workdir_with_a_checkpoint_is_left_alone(imported, config_file, capsys):
    workdir, _ = imported
    before = contents(workdir)
    file = workdir.parent / 'theirs.safetensors'
    words = ['import', 'torchvision', file, '--workdir', workdir, '--config', config_file]
    assert weights.main([str(word) for word in words]) == 2
    assert 'already has checkpoints' in capsys.readouterr().err
    assert contents(workdir) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


RUN_STABLEHLO = """
import sys
sys.modules['alexnet_jax'] = sys.modules['flax'] = None
import jax, numpy
net = jax.export.deserialize(bytearray(open('net.stablehlo', 'rb').read()))
images = numpy.load('images.npy')
parts = [net.call(images[:5]), net.call(images[5:])]  # batches of any size
numpy.save('found.npy', numpy.concatenate(parts))
"""

RUN_ONNX = """
import sys
sys.modules['alexnet_jax'] = sys.modules['jax'] = sys.modules['flax'] = None
import numpy, onnxruntime
net = onnxruntime.InferenceSession('net.onnx', providers=['CPUExecutionProvider'])
images = numpy.load('images.npy')
parts = [net.run(None, {'images': part})[0] for part in (images[:5], images[5:])]
numpy.save('found.npy', numpy.concatenate(parts))
"""


@pytest.mark.parametrize(
    ('name', 'needs', 'script'),
    [('net.stablehlo', 'jax', RUN_STABLEHLO), ('net.onnx', 'onnxruntime', RUN_ONNX)],
)
def test_an_exported_net_runs_without_this_package(
    imported, evaluated, test_images, tmp_path, name, needs, script
):
    """The process cannot import this package; it uses the format's own runtime."""
    pytest.importorskip(needs)
    workdir, _ = imported
    assert weights.main(['export', str(tmp_path / name), f'--workdir={workdir}']) == 0
    shape = (48, 112, 112, 1)
    large = np.asarray(jax.image.resize(np.float32(test_images), shape, 'bilinear'))
    stored = np.repeat(
        np.round(large).astype(np.uint8), 3, axis=-1
    )  # in the form of a stored ImageNet
    np.save(tmp_path / 'images.npy', stored)
    subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
    found = np.load(tmp_path / 'found.npy')
    logits = torchvision_logits(imported[1], stored)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=0, atol=TOLERANCE)
    # Rounded pixels differ slightly from the evaluation's.
    np.testing.assert_allclose(found, evaluated, rtol=0, atol=0.02)


def test_our_own_file_round_trips_bitwise(imported, tmp_path):
    workdir, _ = imported
    file = tmp_path / 'ours.safetensors'
    assert weights.main(['export', str(file), f'--workdir={workdir}', '--step=0']) == 0
    assert weights.main(['import', 'own', str(file), f'--workdir={tmp_path / "again"}']) == 0
    ours, again = (checkpoint.read(w / 'checkpoints') for w in (workdir, tmp_path / 'again'))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.state, again.state))
    for key in ('config', 'class_names'):
        assert ours.extra[key] == again.extra[key]


def average_tanh_sigmoid(scale):
    config = variant_torchvision.get_config(scale)
    config.model.pool.kind = 'average'
    config.model.conv3.ops, config.model.fc6.ops = ('tanh',), ('sigmoid', 'dropout')
    return config


def own_towers(scale):
    config = alexnet.get_config(scale)
    config.model.fc6.reads = config.model.fc7.reads = 'own'
    return config


@pytest.mark.parametrize(
    ('get_config', 'gain'),
    [
        (alexnet.get_config, 2),
        (own_towers, 1.5),
        (alexnet_paper.get_config, 3),
        (average_tanh_sigmoid, 4),
        (ablation_overlap.get_config, 3),
    ],
)
def test_onnx_of_every_kind_of_net(get_config, gain):
    """The nets have towers, spatial norm, halved units; images are grey and of 28 px."""
    onnxruntime = pytest.importorskip('onnxruntime')
    parts, images, expected = small_net(get_config, gain)
    assert np.ptp(expected, axis=0).max() > 0.01
    session = onnxruntime.InferenceSession(export.onnx(*parts), providers=['CPUExecutionProvider'])
    [found] = session.run(None, {'images': images})
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_stablehlo_is_the_net():
    """JAX itself exports it, so one net stands for all."""
    parts, images, expected = small_net(alexnet.get_config, gain=2)
    found = jax.export.deserialize(bytearray(export.stablehlo(*parts))).call(images)
    # Two programs, each rounded where its compiler fuses operations: 2e-6 under conftest's options.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def small_net(get_config, gain):
    """Return (settings, params, statistics), images and their probabilities."""
    settings = configuration.unpack(get_config('quickstart'))
    params = jax.tree.map(lambda x: gain * x, model.init(jax.random.key(0), settings.net))
    mean = 100 * jax.random.uniform(jax.random.key(1), (28, 28, 1))
    parts = settings, params, Statistics(mean, jnp.zeros((1, 1)))
    images = pictures(28, channels=1)
    return parts, images, np.asarray(jax.jit(export.classify(*parts))(images))


def test_a_full_disk_leaves_no_partial_file(imported, small_disk):
    """The disk has 3 MB, the file 6."""
    workdir, _ = imported
    assert weights.main(['export', str(small_disk / 'x.safetensors'), f'--workdir={workdir}']) == 1
    assert list(small_disk.iterdir()) == []


# ------------------------------------------------------------------------ the installed package

INSTALLED = """
import importlib, pathlib, pkgutil, sys
import alexnet_jax
from alexnet_jax import config_file
from alexnet_jax.interop import weights
assert alexnet_jax.__path__ == [str(pathlib.Path('site/alexnet_jax').absolute())]
for module in pkgutil.walk_packages(alexnet_jax.__path__, 'alexnet_jax.'):
    if module.name != 'alexnet_jax.__main__':
        importlib.import_module(module.name)
for origin in weights.ORIGINS.values():
    assert config_file.load(origin.config, {}).scale == 'imagenet2012'
words = ['import', 'torchvision', 'a.npz', '--workdir=w', '--config=small.py']
sys.exit(weights.main(words) or weights.main(['export', 'b.safetensors', '--workdir=w']))
"""


def test_an_installed_package_imports_and_exports_anywhere(tmp_path, repository):
    """The package is installed, and the folder has another package named `configs`."""
    for name in ('alexnet_jax', 'configs'):
        shutil.copytree(repository / name, tmp_path / 'source' / name)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(repository / name, tmp_path / 'source')
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-compile']
    subprocess.run([*install, '--target=site', './source'], cwd=tmp_path, check=True)
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').touch()
    (tmp_path / 'small.py').write_text(SMALL)
    write(tmp_path / 'a.npz', WRAPPED)
    done = subprocess.run(
        [sys.executable, '-c', INSTALLED],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'b.safetensors').stat().st_size > 1_000_000
    assert all(path.name.startswith('alexnet_jax') for path in (tmp_path / 'site').iterdir())
    package = tmp_path / 'source' / 'alexnet_jax'
    for path in package.rglob('*.*'):  # subpackages and templates too: see pyproject.toml
        if '__pycache__' not in path.parts:
            assert (tmp_path / 'site' / 'alexnet_jax' / path.relative_to(package)).exists(), path


# -------------------------------------------------------------------------------- bad input


def test_an_object_in_an_npz_is_not_run(tmp_path, capsys):
    arrays = foreign('caffenet', small('caffenet'))
    trap = np.array([Trap(os.mknod, str(tmp_path / 'sprung'))], object)
    np.savez(tmp_path / 'bad.npz', **(arrays | {'conv3/0': trap}))
    refused(
        ['import', 'caffenet', 'bad.npz'], 1, 'Object arrays cannot be loaded', tmp_path, capsys
    )
    assert not (tmp_path / 'sprung').exists()


def refused(words, code, sentence, folder, capsys):
    """Assert that the command ends with `code` and one line with `sentence`, and writes nothing."""
    config = net_file(folder, words[1])
    before = contents(folder)
    words = [*words[:2], str(folder / words[2]), *words[3:]]
    words += ['--workdir', str(folder / 'w'), '--config', str(config)]
    assert weights.main(words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert sentence in lines[0]
    assert contents(folder) == before
    assert not (folder / 'w').exists()


@pytest.mark.parametrize('name', ['a.npz', 'a.safetensors'])
@pytest.mark.parametrize('part', [0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path, capsys, name, part):
    file = write(tmp_path / name, foreign('caffenet', small('caffenet')))
    os.truncate(file, int(part * file.stat().st_size))
    refused(['import', 'caffenet', name], 1, f'{file} cannot be read', tmp_path, capsys)


@pytest.mark.parametrize('body', [b'', b'<html>', b'\x89HDF\r\n\x1a\n', b'{"weight_map": {}}'])
def test_other_files(tmp_path, capsys, body):
    (tmp_path / 'a.caffemodel').write_bytes(body)
    sentence = 'a.caffemodel is not a weight file of PyTorch, safetensors or NumPy (.npz)'
    refused(['import', 'caffenet', 'a.caffemodel'], 2, sentence, tmp_path, capsys)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (
            lambda x: {'conv3/0': x[:, :, :2]},
            'conv3/0 is float32 [96, 64, 2, 3], but float32 [96, 64, 3, 3] in',
        ),
        (lambda x: {'conv3/0': x.astype(np.int32)}, 'conv3/0 is int32 [96, 64, 3, 3], but float32'),
        (lambda x: {'conv3/0': x + np.float32('nan')}, 'conv3/0 contains NaN or infinity'),
        (lambda x: {'conv3/0': np.float64(x) * 1e300}, 'contains NaN or infinity (in float32)'),
        (lambda x: {'conv9/0': x}, 'this net has no conv9/0; choose the config'),
    ],
)
def test_another_nets_tree(tmp_path, capsys, change, sentence):
    arrays = foreign('caffenet', small('caffenet'))
    write(tmp_path / 'a.npz', arrays | change(arrays['conv3/0']))
    refused(['import', 'caffenet', 'a.npz'], 2, sentence, tmp_path, capsys)


def test_a_missing_array(tmp_path, capsys):
    arrays = foreign('caffenet', small('caffenet'))
    del arrays['conv3/0']
    write(tmp_path / 'a.npz', arrays)
    sentence = 'conv3/0 of this net is missing; the file contains conv1/0, conv1/1, conv2/0, ...'
    refused(['import', 'caffenet', 'a.npz'], 2, sentence, tmp_path, capsys)


def test_another_frameworks_tree(tmp_path, capsys):
    write(tmp_path / 'a.npz', foreign('caffenet', small('caffenet')))
    sentence = (
        'features.0.weight of this net is missing; the file contains conv1/0, conv1/1, conv2/0, ...'
    )
    refused(['import', 'torchvision', 'a.npz'], 2, sentence, tmp_path, capsys)


@pytest.mark.parametrize(
    ('words', 'code', 'sentence'),
    [
        (['import', 'caffenet', 'a.npz', '--workdir=w'], 1, 'a.npz: No such file or directory'),
        (['import', 'overfeat', 'a.npz', '--workdir=w'], 2, "invalid choice: 'overfeat'"),
        (
            ['import', 'own', 'a.safetensors', '--workdir=w', '--config=c.py'],
            2,
            'contain config and class names',
        ),
        (
            ['import', 'caffenet', 'a.npz', '--workdir=w', '--config=no.py'],
            2,
            'there is no config file no.py',
        ),
        (
            ['export', 'a.tflite', '--workdir=w'],
            2,
            'a.tflite must end in .safetensors or .stablehlo or .onnx',
        ),
        (['export', 'a.onnx', '--workdir=w'], 1, 'no checkpoint'),
        (['export', 'a.onnx'], 2, '--workdir'),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capsys, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    assert weights.main(words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert sentence in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['a.safetensors', 'b.safetensors', 'a.npz'])
def test_a_foreign_file_as_own(tmp_path, capsys, name):
    arrays = {'x': np.zeros(3, np.float32)}
    file = write(tmp_path / name, arrays)
    if name == 'b.safetensors':
        safetensors.save_file(arrays, file, {'config': '{', 'class_names': '[]'})
    assert weights.main(['import', 'own', str(file), '--workdir', str(tmp_path / 'w')]) == 2
    assert '`weights export` did not write it' in capsys.readouterr().err
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    ('body', 'sentence'),
    [
        (b'caf\xe9', 'is not UTF-8 text'),
        (b'one\ntwo', '2 class names were given for 10 classes'),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, capsys, body, sentence):
    write(tmp_path / 'a.npz', foreign('caffenet', small('caffenet')))
    (tmp_path / 'names.txt').write_bytes(body)
    words = ['import', 'caffenet', 'a.npz', '--class_names', str(tmp_path / 'names.txt')]
    refused(words, 2, sentence, tmp_path, capsys)


def test_a_missing_library(monkeypatch, tmp_path):
    write(tmp_path / 'a.safetensors', {'x': np.zeros(3, np.float32)})
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(RunError, match=r'pip install .alexnet_jax\[weights\]'):
        weight_files.read(tmp_path / 'a.safetensors')
