"""Weights in and out: torchvision's and Caffe's AlexNets become checkpoints, ours become files.

    python -m alexnet_jax.weights import torchvision alexnet-owt-7be5be79.pth --workdir=W
    python -m alexnet_jax.weights import bvlc_alexnet bvlc_alexnet.caffemodel --workdir=W
    python -m alexnet_jax.weights import caffenet bvlc_reference_caffenet.caffemodel --workdir=W
    python -m alexnet_jax.weights import own net.safetensors --workdir=W
    python -m alexnet_jax.weights export net.safetensors --workdir=W    # the tree and its config
    python -m alexnet_jax.weights export net.stablehlo --workdir=W      # runs with jax alone
    python -m alexnet_jax.weights export net.onnx --workdir=W           # runs with onnxruntime

An imported net is a workdir like any other, at step 0: `main.py --mode=evaluate --workdir=W` takes
it. What to download, and what to expect, stands at the head of each net's config. A .caffemodel is
read without Caffe; where Caffe is, it makes an .npz of its blobs by

    np.savez(file, **{f'{name}/{i}': blob.data for name, blobs in net.params.items()
                      for i, blob in enumerate(blobs)})
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import (
    checkpoint,
    command,
    config_file,
    export,
    files,
    model,
    step,
    train,
    weight_files,
)
from alexnet_jax import config as configuration
from alexnet_jax import workdir as workdirs
from alexnet_jax.augment import Preprocess, Statistics
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import Config, Settings
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.model import Stage
from alexnet_jax.records import say
from alexnet_jax.weight_files import Arrays

Params = dict[str, dict[str, np.ndarray]]  # the canonical tree, see model.init


@dataclasses.dataclass(frozen=True)
class Origin:
    """What another framework's file calls its weights, and what its net expects of pixels.

    Its kernels are [out, in of one group, height, width], or [out, in] with `in` running over
    channels, height, width.
    """

    config: str  # its net
    names: Mapping[str, str]  # of each of our layers
    parts: tuple[str, str]  # what follows for the weights and for the biases
    mean: tuple[float, float, float]  # of red, green, blue, in 0-255 units, subtracted ...
    std: tuple[float, float, float]  # ... before the division by this
    bgr: bool  # conv1 reads blue, green, red


_CONV, _FC = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5'), ('fc6', 'fc7', 'fc8')
_CAFFE = Origin(
    config='configs/variant_bvlc_alexnet.py:imagenet2012',
    names={name: name for name in _CONV + _FC},
    parts=('/0', '/1'),
    mean=(122.679, 116.669, 104.007),  # of ilsvrc_2012_mean.npy, which Caffe's examples use
    std=(1.0, 1.0, 1.0),
    bgr=True,
)
ORIGINS = {
    'torchvision': Origin(
        config='configs/variant_torchvision.py:imagenet2012',
        names=dict(zip(_CONV, (f'features.{i}' for i in (0, 3, 6, 8, 10)), strict=True))
        | dict(zip(_FC, (f'classifier.{i}' for i in (1, 4, 6)), strict=True)),
        parts=('.weight', '.bias'),
        mean=(255 * 0.485, 255 * 0.456, 255 * 0.406),
        std=(255 * 0.229, 255 * 0.224, 255 * 0.225),
        bgr=False,
    ),
    'bvlc_alexnet': _CAFFE,
    'caffenet': dataclasses.replace(_CAFFE, config='configs/variant_caffenet.py:imagenet2012'),
}


# ----------------------------------------------------------------- from their layout to canonical


def canonical(arrays: Arrays, origin: Origin, settings: Settings, file: str = 'the file') -> Params:
    """Another framework's weights as our parameter tree, float32.

    The order of the channels and the deviations that differ between them are folded into conv1:
    (pixel - mean) * scale, as `augment.apply` makes it, is what our conv1 reads.

    Args:
        arrays: by the names that the file has for them.
        origin: whose they are.
        settings: of the net that they are for.
        file: how to call it in a complaint.

    Raises:
        UsageError: they are another net's; names the first key at fault.
    """
    stages = model.geometry(settings.net)
    strange = [s.layer.name for s in stages if s.layer.name not in origin.names]
    if strange or len(stages) != len(origin.names):
        raise UsageError(
            f"the config's layers are {', '.join(s.layer.name for s in stages)}, and those of "
            f'{file} {", ".join(origin.names)}; choose the config that was made for it.'
        )
    wanted: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        weights, biases = (origin.names[stage.layer.name] + part for part in origin.parts)
        wanted |= {weights: _their_shape(stage), biases: (stage.layer.features,)}
    arrays = _check(arrays, wanted, file)
    params = {}
    for stage in stages:
        weights, biases = (origin.names[stage.layer.name] + part for part in origin.parts)
        kernel = _kernel(arrays[weights], stage)
        if stage is stages[0]:
            kernel = _fold_pixels(kernel, origin, settings.preprocess)
        params[stage.layer.name] = {'kernel': kernel, 'bias': arrays[biases]}
    return params


def _their_shape(stage: Stage) -> tuple[int, ...]:
    layer, inputs = stage.layer, stage.input
    if layer.kind == 'fc':
        return (layer.features, int(np.prod(inputs)))
    return (layer.features, inputs[-1] // stage.groups, layer.kernel_px, layer.kernel_px)


def _check(arrays: Arrays, wanted: Mapping[str, tuple[int, ...]], file: str) -> Arrays:
    """The arrays as finite float32 of the wanted shapes; names the first key that is not so."""
    found = {}
    for key, shape in wanted.items():
        if key not in arrays:
            raise UsageError(f'{file} has no {key}: it holds another net ({_some(arrays)}).')
        array = arrays[key]
        while array.ndim > len(shape) and array.shape[0] == 1:  # Caffe's old blobs have four axes
            array = array[0]
        if array.shape != shape:
            raise UsageError(
                f'{file}: {key} is {list(array.shape)}, and this net wants {list(shape)}; choose '
                f'the config of the net that it was made for.'
            )
        if array.dtype.kind != 'f' or not np.isfinite(array).all():
            raise UsageError(f'{file}: {key} holds what is no finite number; get it anew.')
        found[key] = np.asarray(array, np.float32)
    for key in arrays:
        if key not in wanted:
            raise UsageError(f'{file} has {key}, which this net has not: it holds another net.')
    return found


def _some(arrays: Arrays) -> str:
    names = sorted(arrays)
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '') if names else 'nothing'


def _kernel(weights: np.ndarray, stage: Stage) -> np.ndarray:
    """Theirs to ours: [kh, kw, in, out] of a convolution, [in, out] with channels last of an fc."""
    if stage.layer.kind == 'fc':
        cube = weights.reshape(-1, *_channels_first(stage.input))
        return cube.transpose(2, 3, 1, 0).reshape(stage.kernel)
    return np.ascontiguousarray(weights.transpose(2, 3, 1, 0))


def _channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = shape if len(shape) == 3 else (1, 1, shape[0])
    return (channels, height, width)


def _fold_pixels(kernel: np.ndarray, origin: Origin, recipe: Preprocess) -> np.ndarray:
    if origin.bgr:
        kernel = kernel[:, :, ::-1]
    std = np.array(origin.std) * recipe.scale
    return np.asarray(kernel / std[:, None], np.float32)


def statistics_of(origin: Origin, recipe: Preprocess, mean: np.ndarray | None = None) -> Statistics:
    """The mean of a pixel, or Caffe's mean image [H, W, C] (BGR), as a checkpoint holds it.

    No colour components come with foreign weights: they are zero, and so is any colour noise.
    """
    side = recipe.resize_px
    if mean is None:
        image = np.broadcast_to(np.array(origin.mean), (side, side, len(origin.mean)))
    else:
        image = mean[:, :, ::-1] if origin.bgr else mean
    channels = image.shape[-1]
    return Statistics(jnp.array(image, jnp.float32), jnp.zeros((channels, channels), jnp.float32))


# --------------------------------------------------------------------------------------- import


def import_foreign(
    file: Path,
    origin: Origin,
    config: Config,
    workdir: Path,
    *,
    mean: Path | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """Make a workdir with a checkpoint at step 0 of another framework's weights.

    Args:
        file: see weight_files.read.
        origin: whose they are.
        config: of the net.
        workdir: new, or without a checkpoint.
        mean: Caffe's mean image; the mean pixel where it is not given.
        class_names: by label; wnids or numbers where there are none.

    Returns:
        One sentence: what lies where.

    Raises:
        UsageError: the file holds another net, or the workdir another run.
        RunError: a file is damaged or unsafe, or the workdir cannot be written.
    """
    _check_empty(workdir)
    settings = configuration.unpack(config)
    params = canonical(weight_files.read(file), origin, settings, str(file))
    image = None if mean is None else weight_files.mean_image(mean)
    statistics = statistics_of(origin, settings.preprocess, image)
    names = tuple(class_names) or default_names(settings.net.classes)
    if len(names) != settings.net.classes:
        raise UsageError(f'{len(names)} class names were given for {settings.net.classes} classes.')
    return _save(config, params, statistics, names, file, workdir)


def import_own(file: Path, workdir: Path) -> str:
    """Make a workdir with a checkpoint at step 0 of a .safetensors file that `export` wrote.

    Raises:
        UsageError: the file is not one of these, or the workdir holds another run.
        RunError: the file is damaged, or the workdir cannot be written.
    """
    _check_empty(workdir)
    if file.suffix != '.safetensors':
        raise UsageError(f'{file}: our own weights come as .safetensors; see `export`.')
    arrays = weight_files.read(file)
    head = weight_files.metadata(file)
    try:
        config, names = json.loads(head['config']), json.loads(head['class_names'])
    except (KeyError, ValueError) as problem:
        raise UsageError(
            f'{file} has no config in its head: `export` did not write it.'
        ) from problem
    wanted = {
        f'params/{stage.layer.name}/{kind}': shape
        for stage in model.geometry(configuration.unpack(config).net)
        for kind, shape in (('kernel', stage.kernel), ('bias', stage.kernel[-1:]))
    }
    # What was measured on the data has the data's shape, which no config tells.
    fields = [f'statistics/{field}' for field in Statistics._fields]
    wanted |= {field: arrays[field].shape if field in arrays else () for field in fields}
    arrays = _check(arrays, wanted, str(file))
    params: Params = {}
    for name in wanted:
        kind, *path = name.split('/')
        if kind == 'params':
            params.setdefault(path[0], {})[path[1]] = arrays[name]
    statistics = Statistics(*(jnp.array(arrays[field]) for field in fields))
    return _save(config, params, statistics, names, file, workdir)


def _check_empty(workdir: Path) -> None:
    if Checkpoints(workdir / 'checkpoints').steps():
        raise UsageError(f'{workdir} has checkpoints already; choose another --workdir.')


def _save(
    config: Config,
    params: Params,
    statistics: Statistics,
    class_names: Sequence[str],
    file: Path,
    workdir: Path,
) -> str:
    """A workdir as a run would have left it before its first step."""
    settings = configuration.unpack(config)
    optimizer = step.make_optimizer(settings, images=settings.batch_size)
    state = step.init_state(settings, optimizer).replace(params=jax.device_put(params))
    with file.open('rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    extra = {
        'config': configuration.plain(config),
        'history': dataclasses.asdict(train.History()),
        'class_names': list(class_names),
        'imported': {'file': file.name, 'sha256': digest},
    }
    with (
        workdirs.open_workdir(config, workdir),
        Checkpoints(workdir / 'checkpoints', report=say) as checkpoints,
    ):
        tree = {'state': state, 'statistics': statistics._asdict()}
        checkpoints.save(0, tree, extra, error=None, wait=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f'{count:,} parameters of {file} lie in {workdir} as {settings.name}, step 0'


def default_names(classes: int) -> tuple[str, ...]:
    """ImageNet's 1000 wnids in the order that Caffe, torchvision and TFDS share, or numbers."""
    found = importlib.util.find_spec('tensorflow_datasets')
    for folder in found.submodule_search_locations or () if found else ():
        labels = Path(folder) / 'datasets' / 'imagenet2012' / 'labels.txt'
        names = tuple(labels.read_text().split()) if labels.is_file() else ()
        if len(names) == classes:
            return names
    return tuple(map(str, range(classes)))


# --------------------------------------------------------------------------------------- export


def export_checkpoint(file: Path, workdir: Path, at: checkpoint.Step = 'latest') -> str:
    """Write a checkpoint's net to a .safetensors, .stablehlo or .onnx file, whole or not at all.

    Returns:
        One sentence: what lies where.

    Raises:
        UsageError: the suffix or the step is unknown, or the format cannot hold this net.
        RunError: there is no checkpoint, it is damaged, or the file cannot be written.
    """
    writer = WRITERS.get(file.suffix)
    if writer is None:
        raise UsageError(f'{file}: the name must end in {", ".join(WRITERS)}.')
    restored = checkpoint.read(workdir / 'checkpoints', at)
    body = writer(restored)
    try:
        with files.whole(file) as scratch:
            scratch.write_bytes(body)
    except OSError as problem:
        raise RunError(f'{file} cannot be written ({problem.strerror}).') from problem
    return f'step {restored.step} of {workdir} lies in {file}, {len(body):,} bytes'


def _to_safetensors(restored: checkpoint.Restored) -> bytes:
    arrays = {
        f'params/{layer}/{kind}': np.ascontiguousarray(value)
        for layer, row in restored.state['state']['params'].items()
        for kind, value in row.items()
    } | {f'statistics/{key}': value for key, value in restored.state['statistics'].items()}
    head = {key: json.dumps(restored.extra[key]) for key in ('config', 'class_names')}
    return command.library('safetensors.numpy', 'weights').save(arrays, head)


def _portable(
    write: Callable[[Settings, Any, Statistics], bytes],
) -> Callable[[checkpoint.Restored], bytes]:
    """A writer of export.py, given what lies in a checkpoint."""

    def writer(restored: checkpoint.Restored) -> bytes:
        settings = configuration.unpack(restored.extra['config'])
        statistics = Statistics(
            **{k: jnp.asarray(v) for k, v in restored.state['statistics'].items()}
        )
        return write(settings, restored.state['state']['params'], statistics)

    return writer


WRITERS: dict[str, Callable[[checkpoint.Restored], bytes]] = {
    '.safetensors': _to_safetensors,
    '.stablehlo': _portable(export.stablehlo),
    '.onnx': _portable(export.onnx),
}


# ---------------------------------------------------------------------------------- the command


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m alexnet_jax.weights', description=(__doc__ or '').split('\n')[0]
    )
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='import|export')
    into = verbs.add_parser('import', help='a weight file becomes a workdir with a checkpoint')
    into.add_argument('origin', choices=[*ORIGINS, 'own'], help='whose net it is')
    into.add_argument('file', type=command.path, help=', '.join(weight_files.READERS))
    into.add_argument(
        '--workdir', type=command.path, required=True, help='where the checkpoint will lie'
    )
    into.add_argument('--config', help="its net, if not the origin's own; FILE or FILE:SCALE")
    into.add_argument('--mean', type=command.path, help="Caffe's mean image, .binaryproto or .npy")
    into.add_argument(
        '--class_names', type=command.path, help='a text file, one name a line, by label'
    )
    out = verbs.add_parser('export', help='a checkpoint becomes a file')
    out.add_argument('file', type=command.path, help=', '.join(WRITERS))
    out.add_argument(
        '--workdir', type=command.path, required=True, help='where the checkpoint lies'
    )
    out.add_argument('--step', default='latest', help='latest, best, or a number')
    return parser


def act(args: argparse.Namespace) -> str:
    """Do what the command line says."""
    if args.verb == 'export':
        at = int(args.step) if args.step.isdigit() else args.step
        return export_checkpoint(args.file, args.workdir, at)
    if args.origin == 'own':
        if args.config or args.mean or args.class_names:
            raise UsageError('our own files carry their config, mean and names: leave these away.')
        return import_own(args.file, args.workdir)
    origin = ORIGINS[args.origin]
    config = config_file.load(args.config or origin.config, {})
    names = args.class_names.read_text().splitlines() if args.class_names else ()
    return import_foreign(
        args.file, origin, config, args.workdir, mean=args.mean, class_names=names
    )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says, print one sentence; returns the exit code."""
    return command.run('weights', _parser, lambda args: print(act(args)), argv)


if __name__ == '__main__':
    sys.exit(main())
