"""Configs as frozen dataclasses, validated once, here; no other module sees a ConfigDict.

The fields are the config's keys. A Literal lists the allowed strings; AT_LEAST and POSITIVE bound
the numbers. Every error is one sentence that names the key and the remedy (`UsageError`, exit code
2).
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

from alexnet_jax import command
from alexnet_jax.config_file import Config, as_json, differences, plain
from alexnet_jax.errors import UsageError
from alexnet_jax.model import alexnet, optimizer
from alexnet_jax.model.alexnet import Layer, Net
from alexnet_jax.model.augment import Preprocess

__all__ = ['Config', 'Settings', 'as_json', 'differences', 'plain', 'unpack']


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and its splits, which are expressions of TFDS.

    A split that is 'auto' is taken from the data; `validation` may be 'none'.

    workers: threads that read a data set too large for memory; -1: one per core; 0: none.
    resident_gib: the size up to which a decoded split is held in memory.
    """

    name: str
    data_dir: str
    train: str
    validation: str
    test: str
    workers: int = -1
    resident_gib: float = 4.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The constants of the 2012 update, see model/optimizer.py, and the schedules of its rates.

    multipliers: (layer, factor) of both rates of a layer; 0 freezes it, layers not listed have 1.
    """

    momentum: float
    weight_decay: float
    weights: optimizer.Schedule
    biases: optimizer.Schedule
    late_freeze: optimizer.LateFreeze
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """Logging, evaluation, checkpoints and checks of a run.

    They change no number of the training, except that a plateau schedule follows the errors that
    are measured every `evaluate_every_epochs`.

    compilation_cache: a folder; 'beside': .jax_cache next to the workdir; 'none': no cache.
    """

    log_every_steps: int
    evaluate_every_epochs: float
    checkpoint_every_epochs: float
    eval_batch_size: int
    prefetch_batches: int
    tensorboard: bool
    compilation_cache: str
    min_logit_std: float
    on_collapsed_init: Literal['warn', 'error']
    profile_steps: int = 0  # steps that are traced, see callbacks.StepProfiler; 0: none


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; data -1 takes all that are left. Placements: see parallel/mesh.py.

    cpu_devices: the number of devices that a CPU appears as, if it has the cores and JAX is not
        initialised yet; 0: the environment's number, or one. Several devices use the cores better
        where operations are too small to run on several cores.
    """

    data: int
    tower: int
    placement: Literal['towers', 'one_weird_trick'] = 'towers'
    cpu_devices: int = 0


@dataclasses.dataclass(frozen=True)
class Processes:
    """Time limits of processes that wait for each other, see parallel/distributed.py."""

    join_timeout_secs: float = 300.0
    peer_timeout_secs: float = 60.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """A complete config: each key in the section of its name, `model` in `net`.

    tree: the config as the dict of its JSON, which is what runs and checkpoints store.
    init_from: 'none', or the checkpoint whose weights the run starts with, 'WORKDIR[:step]'.
    init_statistics: take the mean image and the colours from the 'source' or from the 'data'.
    init_layers: the only layers to take from the source; () for all that match by name and shape.
    """

    name: str
    scale: str
    seed: int
    batch_size: int
    epochs: float
    net: Net
    data: Data
    preprocess: Preprocess
    optimizer: Optimizer
    loop: Loop
    mesh: MeshShape
    tree: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    processes: Processes = Processes()
    init_from: str = 'none'
    init_statistics: Literal['source', 'data'] = 'source'
    init_layers: tuple[str, ...] = ()

    def total_steps(self, images: int) -> int:
        """Return the steps of the run: enough to see all images `epochs` times."""
        steps = self.epochs * images / self.batch_size
        _require(steps < 2**31, f'epochs={self.epochs:g} is more than 2^31 steps; lower it.')
        return math.ceil(steps)

    def steps_per_epoch(self, images: int) -> float:
        """Return images / batch_size: a batch may span two epochs, and no image is dropped."""
        return images / self.batch_size


FOLDERS = ('data.data_dir', 'init_from', 'loop.compilation_cache')
# Bounds of numbers, by the last part of the key; all others are at least 0.
# fmt: off
POSITIVE = (
    'checkpoint_every_epochs', 'divisor', 'evaluate_every_epochs', 'factor', 'k', 'keep',
    'noise_divisor',
)
AT_LEAST = {'bias': -math.inf, 'data': -1, 'workers': -1} | dict.fromkeys((
    'batch_size', 'eval_batch_size', 'images_per_crop', 'input_px', 'join_timeout_secs',
    'kernel_px', 'log_every_steps', 'peer_timeout_secs', 'prefetch_batches',
    'reference_fan_in', 'size', 'stride_px', 'tower', 'towers', 'window_px',
), 1)
# fmt: on


def unpack(config: Config) -> Settings:
    """Return a ConfigDict, or the dict of a config.json, as validated dataclasses.

    Raises:
        UsageError: a key is missing, unknown or of the wrong type, a value impossible, or the layer
            table describes no net.
    """
    tree = plain(config)
    values = dict(tree)
    settings = _build(Settings, values, '', net=_net(values.pop('model', {})), tree=tree)
    _check_sizes(settings)
    _check_rates(settings)
    _check_mesh(settings.mesh, settings.net)
    return settings


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UsageError(otherwise)


def _require_one_of(choices: Collection[Any], value: Any, path: str) -> None:
    listed = ', '.join(map(str, choices))
    _require(value in choices, f"{path}: '{value}' is not one of {listed}.")


# ------------------------------------------------------------------------- a tree to dataclasses


def _build(cls: Any, section: Any, path: str, **given: Any) -> Any:
    """Fill dataclass `cls` from `section`, checking names, types and bounds field by field."""
    _require(isinstance(section, Mapping), f'{path} must be a group of keys, not {section!r}.')
    hints, where = typing.get_type_hints(cls), f'{path}.' if path else ''
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in given}
    known = ', '.join(sorted(fields))
    for key in sorted(section):
        _require(key in fields, f'{where}{key} is not a key of this config; choose one of {known}.')
    for key, field in sorted(fields.items()):
        if key in section:
            make = _build if dataclasses.is_dataclass(hints[key]) else _value
            given[key] = make(hints[key], section[key], where + key)
        else:  # keys younger than checkpoints have a default
            absent = field.default is dataclasses.MISSING
            _require(not absent, f'{where}{key} is missing from this config; set it.')
    return cls(**given)


def _value(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`: int, float, bool, str, a Literal, or a tuple of these."""
    if typing.get_origin(kind) is tuple:
        return _tuple(typing.get_args(kind), value, path)
    if choices := typing.get_args(kind):
        _require_one_of(choices, value, path)
        return value
    if kind is float and type(value) is int:
        value = float(value)
    _require(type(value) is kind, f'{path} must be of type {kind.__name__}, but is {value!r}.')
    if kind in (int, float):
        name = path.rpartition('.')[2]
        least = AT_LEAST.get(name, 0)
        _require(name not in POSITIVE or value > 0, f'{path} must be positive, but is {value}.')
        _require(
            least <= value < 2**64,
            f'{path} must be at least {least} and below 2^64, but is {value}.',
        )
    if path in FOLDERS and (value or path != 'init_from'):  # '' there: to be given
        try:
            value = command.expand(str(value))
        except UsageError as error:
            raise UsageError(f'{path}: {error}') from error
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, Mapping):  # multipliers: a group with any keys
        _, kind = typing.get_args(kinds[0])
        return tuple((key, _value(kind, value[key], f'{path}.{key}')) for key in sorted(value))
    _require(isinstance(value, (list, tuple)), f'{path} must be a tuple, but is {value!r}.')
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    _require(len(kinds) == len(value), f'{path} must have {len(kinds)} values, but is {value!r}.')
    return tuple(_value(k, v, path) for k, v in zip(kinds, value, strict=True))


# ------------------------------------------------------------------------------ the layer table


def _net(tree: Mapping[str, Any]) -> Net:
    tree = dict(tree)
    names = _value(tuple[str, ...], tree.pop('layers', None), 'model.layers')
    scaling = _value(
        Literal['none', 'fan_in'], tree.pop('init_scaling', None), 'model.init_scaling'
    )
    _require(bool(names), 'model.layers is empty; list at least one layer.')
    _require(len(set(names)) == len(names), f'model.layers lists a layer twice: {names}.')
    groups = [key for key in tree if isinstance(tree[key], Mapping)]
    rows = {key: tree.pop(key) for key in groups if 'reads' in tree[key]}
    for name in names:
        _require_one_of(sorted(rows), name, 'model.layers')
    layers, fan_ins = zip(*(_layer(name, rows[name]) for name in names), strict=True)
    net = _build(Net, tree, 'model', layers=layers)
    net = dataclasses.replace(net, channels=net.channels or 3)  # until the data is known
    _check_net(net)
    stages = alexnet.geometry(net)
    if scaling == 'none':
        return net
    # fan-in * std^2 stays as in run 145's net, and with it the strength of the signal.
    scaled = (
        dataclasses.replace(s.layer, init_std=s.layer.init_std * math.sqrt(fan_in / s.fan_in))
        for s, fan_in in zip(stages, fan_ins, strict=True)
    )
    return dataclasses.replace(net, layers=tuple(scaled))


def _layer(name: str, row: Mapping[str, Any]) -> tuple[Layer, int]:
    """Return a layer, and the fan-in that its `init_std` is for."""
    if row.get('kind') == 'fc':  # has no window
        row = {'kernel_px': 1, 'stride_px': 1, 'padding_px': ((0, 0), (0, 0)), **row}
    path, row = f'model.{name}', dict(row)
    fan_in = _value(int, row.pop('reference_fan_in', None), f'{path}.reference_fan_in')
    return _build(Layer, row, path, name=name), fan_in


def _check_net(net: Net) -> None:
    for layer in net.layers:
        key = f'model.{layer.name}'
        _require(len(set(layer.ops)) == len(layer.ops), f'{key}.ops lists an operation twice.')
        _require(
            layer.features > 0 or layer is net.layers[-1],  # 0: the classes of the data
            f'{key}.features must be at least 1, but is {layer.features}.',
        )
    for name, size in (('lrn', net.lrn.size), ('spatial_norm', net.spatial_norm.size)):
        _require(size % 2 == 1, f'model.{name}.size must be odd, but is {size}.')
    gaps = net.pool.kind != 'max' or net.pool.stride_px > net.pool.window_px
    _require(
        net.pool.rounding == 'down' or not gaps,
        "model.pool.rounding 'up' needs max-pooling whose windows leave no gaps; set it to 'down'.",
    )
    keep = net.dropout.keep
    _require(keep <= 1, f'model.dropout.keep must be in (0, 1], but is {keep}.')


def _check_sizes(settings: Settings) -> None:
    image_px, seen_px = settings.preprocess.image_px, settings.net.input_px
    least_px = max(seen_px, settings.preprocess.resize_px)
    _require(
        image_px >= least_px,
        f'preprocess.image_px is {image_px}, smaller than model.input_px or preprocess.resize_px; '
        f'set it to {least_px} or more (2012: 256 for crops of 224).',
    )
    for name in settings.init_layers:
        _require_one_of([layer.name for layer in settings.net.layers], name, 'init_layers')


def _check_rates(settings: Settings) -> None:
    update, names = settings.optimizer, [layer.name for layer in settings.net.layers]
    _require(update.momentum < 1, 'optimizer.momentum must be in [0, 1).')
    plateau = update.weights.kind == 'plateau'
    _require(
        plateau or update.biases.kind != 'plateau',
        "optimizer.biases.kind 'plateau' requires the same rule for the weights: also set "
        'optimizer.weights.kind=plateau.',
    )
    _require(
        not plateau or settings.data.validation != 'none',
        "optimizer.weights.kind 'plateau' follows the validation error, but data.validation is "
        'none: set it to a split, or choose another schedule.',
    )
    _require_one_of(['none', *names], update.late_freeze.layer, 'optimizer.late_freeze.layer')
    for name, _ in update.multipliers:
        _require_one_of(names, name, 'optimizer.multipliers')


def _check_mesh(mesh: MeshShape, net: Net) -> None:
    _require(mesh.data != 0, 'mesh.data must be positive, or -1 for all remaining devices.')
    _require(
        net.towers % mesh.tower == 0,
        f'mesh.tower is {mesh.tower}, but the net has {net.towers} tower(s); choose a divisor of '
        f'{net.towers}.',
    )
    if mesh.placement == 'one_weird_trick':
        _require(
            mesh.tower == 1,
            'mesh.placement one_weird_trick has no tower axis; set mesh.tower=1.',
        )
        own = [x.name for x in net.layers[:-1] if x.kind == 'fc' and x.reads == 'own']
        _require(
            not own or net.towers == 1,
            f'mesh.placement one_weird_trick splits fully connected layers, but {", ".join(own)} '
            f'reads only its own tower; set its reads=all, or mesh.placement=towers.',
        )
