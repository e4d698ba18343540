"""Import torchvision's and Caffe's AlexNets as checkpoints; export our checkpoints to files.

    python -m alexnet_jax weights import torchvision alexnet-owt-7be5be79.pth --workdir=W
    python -m alexnet_jax weights import bvlc_alexnet bvlc_alexnet.npz --workdir=W
    python -m alexnet_jax weights import caffenet bvlc_reference_caffenet.npz --workdir=W
    python -m alexnet_jax weights import own net.safetensors --workdir=W
    python -m alexnet_jax weights export net.safetensors --workdir=W    # parameters and config
    python -m alexnet_jax weights export net.stablehlo --workdir=W      # needs only jax to run
    python -m alexnet_jax weights export net.onnx --workdir=W           # needs an ONNX runtime

An import creates a workdir at step 0, like that of a run, for `main.py --mode=evaluate
--workdir=W`. The docstring of each net's config names the file to download and the accuracy to
expect. PyTorch files, including checkpoints of training programs, need PyTorch (pip install
'alexnet_jax[torch]'). This code converts a .caffemodel to .npz with OpenCV (pip install
'opencv-python-headless<5'). With Caffe itself, replace getParam(n, i) by caffe.Net(...,
caffe.TEST).params[n][i].data:

    net = cv2.dnn.readNetFromCaffe('deploy.prototxt', 'bvlc_alexnet.caffemodel')
    layers = 'conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8'.split()
    np.savez('bvlc_alexnet.npz', **{f'{n}/{i}': net.getParam(n, i) for n in layers for i in (0, 1)})
"""

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from alexnet_jax import command, config_file, files
from alexnet_jax import config as configuration
from alexnet_jax.config import Settings
from alexnet_jax.data.prepare import imagenet
from alexnet_jax.errors import UsageError
from alexnet_jax.interop import export, weight_files
from alexnet_jax.interop.weight_files import Arrays
from alexnet_jax.model import alexnet
from alexnet_jax.model.augment import Preprocess, Statistics
from alexnet_jax.training import checkpoint, step
from alexnet_jax.training import workdir as workdirs
from alexnet_jax.training.checkpoint import Checkpoints

Params = dict[str, dict[str, np.ndarray]]  # {layer: {'kernel', 'bias'}}, see alexnet.init


@dataclasses.dataclass(frozen=True)
class Origin:
    """A framework's names of the weights, and the pixels that its net expects."""

    config: str  # the config of its net, FILE:SCALE
    names: tuple[str, ...]  # of the layers, first to last
    parts: tuple[str, str]  # suffixes of the names of kernels and biases
    mean: tuple[float, float, float]  # red, green, blue, in 0-255 units
    std: tuple[float, float, float]  # pixels are (pixel - mean) / std
    bgr: bool  # conv1 reads blue, green, red


_CAFFE = Origin(
    config='configs/variant_bvlc_alexnet.py:imagenet2012',
    names=('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8'),
    parts=('/0', '/1'),
    mean=(122.679, 116.669, 104.007),  # of ilsvrc_2012_mean.npy, which Caffe's examples use
    std=(1.0, 1.0, 1.0),
    bgr=True,
)
ORIGINS = {
    'torchvision': Origin(
        config='configs/variant_torchvision.py:imagenet2012',
        names=(
            *(f'features.{i}' for i in (0, 3, 6, 8, 10)),
            *(f'classifier.{i}' for i in (1, 4, 6)),
        ),
        parts=('.weight', '.bias'),
        mean=(255 * 0.485, 255 * 0.456, 255 * 0.406),
        std=(255 * 0.229, 255 * 0.224, 255 * 0.225),
        bgr=False,
    ),
    'bvlc_alexnet': _CAFFE,
    'caffenet': dataclasses.replace(_CAFFE, config='configs/variant_caffenet.py:imagenet2012'),
}


# ------------------------------------------------------------------- from their layout to ours


def canonical(arrays: Arrays, origin: Origin, settings: Settings, file: str = 'the file') -> Params:
    """Convert another framework's weights, by their names in `file`, to our parameters, float32.

    Their kernels are [out, in, height, width], or [out, in] with `in` running over channels,
    height, width. Ours are [height, width, in, out] and [in, out] with channels last. The order of
    the channels and their different deviations are folded into conv1, which reads
    (pixel - mean) * scale, see `augment.apply`.

    Raises:
        UsageError: they are another net's; names the first key at fault.
    """
    stages, wanted = alexnet.geometry(settings.net), dict[str, tuple[int, ...]]()
    own = [stage.layer.name for stage in stages]
    names = (*origin.names, *own[len(origin.names) :])  # those of layers too many are missed
    for name, stage in zip(names, stages, strict=False):
        kernel, bias = (name + part for part in origin.parts)
        wanted |= {kernel: stage.kernel[::-1], bias: stage.kernel[-1:]}  # kernels are square
    checked = _check(_unwrap(arrays, next(iter(wanted)), file), wanted, file)
    params = {}
    for name, stage in zip(names, stages, strict=False):
        kernel, bias = (checked[name + part] for part in origin.parts)
        if stage.layer.kind == 'fc':
            height, width, channels = stage.input if len(stage.input) == 3 else (1, 1, *stage.input)
            kernel = kernel.reshape(-1, channels, height, width)
        kernel = kernel.transpose(2, 3, 1, 0).reshape(stage.kernel)
        params[stage.layer.name] = {'kernel': kernel, 'bias': bias}
    conv1 = params[own[0]]
    kernel = conv1['kernel'][:, :, :: -1 if origin.bgr else 1]
    std = np.array(origin.std) * settings.preprocess.scale
    conv1['kernel'] = (kernel / std[:, None]).astype(np.float32)
    return params


def _unwrap(arrays: Arrays, first: str, file: str) -> Arrays:
    """Return the arrays of the one net in a file by the net's own names, of which `first` is one.

    In a training program's checkpoint, the net has a prefix ('state_dict.', 'model.', ...), and
    other arrays, such as the optimizer's, are beside it. torch.nn.DataParallel,
    DistributedDataParallel and torch.compile insert components. An array without axes is a counter,
    such as AveragedModel's.
    """
    own = {key: re.sub(r'\b(module|_orig_mod)\.', '', key) for key in arrays if arrays[key].ndim}
    prefixes = [n.removesuffix(first) for n in own.values() if f'.{n}'.endswith(f'.{first}')]
    if len(prefixes) > 1:
        raise UsageError(
            f'{file} contains {len(prefixes)} nets ({", ".join(sorted(prefixes))}); save the one '
            f'to import in a separate file.'
        )
    prefix = ''.join(prefixes)
    inside = {key: name for key, name in own.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): arrays[key] for key, name in inside.items()}


def _check(arrays: Arrays, wanted: Mapping[str, tuple[int, ...]], file: str) -> Arrays:
    """Return finite float32 arrays of the wanted shapes, or name the first key at fault."""

    def require(holds: bool | np.bool, otherwise: str) -> None:
        if not holds:
            raise UsageError(f'{file}: {otherwise}.')

    names, other_config = sorted(arrays), 'choose the config that matches the file'
    some = ', '.join(names[:3] + ['...'] * (len(names) > 3))
    some = some or 'no arrays (save model.state_dict(), not the model)'
    for key, shape in wanted.items():
        require(key in arrays, f'{key} of this net is missing; the file contains {some}')
        # Caffe and OpenCV add axes of length 1.
        found, sides = arrays[key], [n for n in shape if n != 1]
        same = found.dtype == np.float32 and [n for n in found.shape if n != 1] == sides
        is_now = f'{key} is {found.dtype} {list(found.shape)}'
        require(same, f'{is_now}, but float32 {list(shape)} in this net; {other_config}')
        require(np.isfinite(found).all(), f'{key} contains NaN or infinity (in float32)')
    extra = ', '.join(sorted(arrays.keys() - wanted.keys())[:3])
    require(not extra, f'this net has no {extra}; {other_config}')
    return {key: arrays[key].reshape(shape) for key, shape in wanted.items()}


def statistics_of(origin: Origin, recipe: Preprocess) -> Statistics:
    """Return the statistics of a checkpoint: the origin's mean pixel, and no colour components."""
    image = jnp.broadcast_to(jnp.float32(origin.mean), (recipe.resize_px, recipe.resize_px, 3))
    return Statistics(image, jnp.zeros((3, 3), jnp.float32))


# --------------------------------------------------------------------------------------- import


def import_weights(
    file: Path,
    workdir: Path,
    origin: str,
    config: str | None = None,
    class_names: Path | None = None,
) -> str:
    """Make a workdir as a run leaves it before its first step; return a sentence.

    Args:
        file: the weights of a net.
        workdir: a new folder.
        origin: a key of ORIGINS, or 'own' for a file that `export_checkpoint` wrote.
        config: FILE:SCALE of a foreign net; the origin's by default.
        class_names: of a foreign net: UTF-8 text, one per line; by default WordNet ids or numbers.

    Raises:
        UsageError: the file contains another net, or the workdir another run.
        RunError: the file is damaged, or the workdir cannot be written.
    """
    if checkpoint.steps(workdir / 'checkpoints'):
        raise UsageError(f'{workdir} already has checkpoints; choose another --workdir.')
    if origin == 'own' and (config or class_names):
        raise UsageError('own files contain config and class names: remove these flags.')
    if origin == 'own':
        settings, params, statistics, names = _own(file)
    else:
        settings = configuration.unpack(config_file.load(config or ORIGINS[origin].config, {}))
        names = read_names(class_names, settings.net.classes)
        params = canonical(weight_files.read(file), ORIGINS[origin], settings, str(file))
        statistics = statistics_of(ORIGINS[origin], settings.preprocess)
    optimizer = step.make_optimizer(settings, images=settings.batch_size)
    state = step.init_state(settings, optimizer).replace(params=jax.device_put(params))
    with file.open('rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    imported = {'file': file.name, 'sha256': digest}
    extra = {'config': settings.tree, 'class_names': list(names), 'imported': imported}
    tree = {'state': state, 'statistics': statistics._asdict()}
    with workdirs.open_workdir(settings, workdir), Checkpoints(workdir / 'checkpoints') as found:
        found.save(0, tree, extra, error=None)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f'{workdir}: {count:,} parameters of {file} as {settings.name}, step 0'


def _own(file: Path) -> tuple[Settings, Params, Statistics, list[str]]:
    """Return settings, parameters, statistics and class names of a file that we wrote."""
    arrays, head = weight_files.read(file), weight_files.metadata(file)
    try:
        config, names = (json.loads(head[key]) for key in ('config', 'class_names'))
    except (KeyError, ValueError):
        raise UsageError(
            f'{file} has no config in its header: `weights export` did not write it.'
        ) from None
    settings = configuration.unpack(config_file.translated(config))
    # Statistics have the shape of the stored images, which no config contains.
    fields = [f'statistics/{field}' for field in Statistics._fields]
    wanted = {field: arrays[field].shape if field in arrays else () for field in fields}
    for stage in alexnet.geometry(settings.net):
        name = f'params/{stage.layer.name}'
        wanted |= {f'{name}/kernel': stage.kernel, f'{name}/bias': stage.kernel[-1:]}
    tree = traverse_util.unflatten_dict(_check(arrays, wanted, str(file)), sep='/')
    statistics = Statistics(**tree['statistics'])
    return settings, tree['params'], statistics, names


def read_names(file: Path | None, classes: int) -> Sequence[str]:
    """Return the class names in a text file; without one, ImageNet's WordNet ids or numbers."""
    names = tuple(map(str, range(classes)))
    if classes == 1000:
        names = imagenet.tfds_lists().wnids  # in the order that all its nets share
    try:
        names = file.read_text('utf-8-sig').splitlines() if file else names
    except UnicodeDecodeError as problem:
        raise UsageError(f'{file} is not UTF-8 text; save it as UTF-8.') from problem
    if len(names) != classes:
        raise UsageError(f'{len(names)} class names were given for {classes} classes.')
    return names


# --------------------------------------------------------------------------------------- export

GRAPHS = {'.stablehlo': export.stablehlo, '.onnx': export.onnx}


def export_checkpoint(file: Path, workdir: Path, at: checkpoint.Step = 'latest') -> str:
    """Write a checkpoint's net atomically in the format of the file's ending; return a sentence.

    Raises:
        UsageError: the step does not exist.
        RunError: there is no checkpoint, or it is damaged.
        OSError: the file cannot be written.
    """
    restored = checkpoint.read(workdir / 'checkpoints', at)
    settings = configuration.unpack(restored.extra['config'])
    params = restored.state['state']['params']
    statistics = Statistics(**jax.tree.map(jnp.asarray, restored.state['statistics']))
    if file.suffix == '.safetensors':
        tree = {'params': params, 'statistics': statistics._asdict()}
        arrays = traverse_util.flatten_dict(jax.tree.map(np.ascontiguousarray, tree), sep='/')
        head = {key: json.dumps(restored.extra[key]) for key in ('config', 'class_names')}
        body = command.library('safetensors.numpy', 'weights').save(arrays, head)
    else:
        body = GRAPHS[file.suffix](settings, params, statistics)
    with files.atomic_write(file) as scratch:
        scratch.write_bytes(body)
    return f'{file}: step {restored.step} of {workdir}, {len(body):,} bytes'


# ---------------------------------------------------------------------------------- the command


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax weights',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='import|export')
    into = verbs.add_parser('import', help='create a workdir with a checkpoint from a weight file')
    add = into.add_argument
    what = 'where the weights come from; own: a file written by export'
    add('origin', choices=[*ORIGINS, 'own'], help=what)
    what = 'weight file: PyTorch, .safetensors or .npz'
    add('file', type=command.path, metavar='FILE', help=what)
    into.add_shared('workdir', help='a new folder for the checkpoint')
    what = 'config of the net (default: the one for this origin)'
    add('--config', metavar='FILE[:SCALE]', help=what)
    what = 'text file of class names (UTF-8), one per line, in label order'
    add('--class_names', type=command.path, metavar='FILE', help=what)
    into.set_defaults(
        act=lambda a: import_weights(a.file, a.workdir, a.origin, a.config, a.class_names)
    )
    out = verbs.add_parser('export', help='write a checkpoint to a file')
    kinds = ('.safetensors', *GRAPHS)
    out.add_argument('file', type=command.ending(*kinds), metavar='FILE', help=', '.join(kinds))
    out.add_shared('workdir', 'step')
    out.set_defaults(act=lambda args: export_checkpoint(args.file, args.workdir, args.step))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, print one sentence and return the exit code."""
    return command.run('weights', _parser, lambda args: print(args.act(args)), argv)
