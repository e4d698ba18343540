"""A config as frozen dataclasses, validated once, here; no other module sees a ConfigDict.

The fields are the config's keys, each beside what it may be (LIMITS). Every error is one sentence
that names the key and says what to do (`UsageError`, exit code 2).
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from alexnet_jax import command
from alexnet_jax.config_file import Config, as_json, differences, plain
from alexnet_jax.errors import UsageError
from alexnet_jax.model import alexnet, optimizer
from alexnet_jax.model.alexnet import Dropout, Layer, Net, Norm, Pool
from alexnet_jax.model.augment import Preprocess
from alexnet_jax.model.optimizer import Schedule

__all__ = ['Config', 'Settings', 'as_json', 'differences', 'plain', 'unpack']


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and its splits, expressions of TFDS.

    A split that is 'auto' is taken from the data; `validation` may be 'none'.

    workers: threads that read a data set too large for memory; -1: one a core; 0: none.
    resident_gib: up to which size a decoded split is held in memory; see data.load.
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
    """The constants of optimizer.py's head, and the schedules of the two kinds of parameters.

    multipliers: of both rates of a layer, by its name: 0 freezes it, and who is not named has 1.
    """

    momentum: float
    weight_decay: float
    weights: optimizer.Schedule
    biases: optimizer.Schedule
    late_freeze: optimizer.LateFreeze
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """How a run goes about its work.

    None of it changes a number of the training, but that a plateau rule sees an error as often as
    evaluate_every_epochs says.
    """

    log_every_steps: int
    evaluate_every_epochs: float
    checkpoint_every_epochs: float
    eval_batch_size: int
    prefetch_batches: int
    tensorboard: bool
    compilation_cache: str  # a folder; 'beside': .jax_cache beside the workdir; 'none': no cache
    min_logit_std: float
    on_collapsed_init: str
    profile_steps: int = 0  # steps that are traced, see profiling.py; 0: none


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; data -1 takes all that are left. Placements: see parallel/mesh.py.

    cpu_devices: as how many devices a CPU is to appear, if it has the cores and JAX has not looked
        yet; 0: as one, or as the environment has it. Operations too small to share keep one core
        each busy.
    """

    data: int
    tower: int
    placement: str = 'towers'
    cpu_devices: int = 0


@dataclasses.dataclass(frozen=True)
class Processes:
    """How long processes wait for each other, see distributed.py."""

    join_timeout_secs: float = 300.0
    peer_timeout_secs: float = 60.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """A complete config as plain values: each key in the section of its name, `model` in `net`.

    init_from: 'none', or the checkpoint whose weights the run begins with, 'WORKDIR[:step]'.
    init_statistics: whether the mean image and the colours are the 'source's or the 'data's.
    init_layers: the only layers to take from there; () for all that match by name and shape.
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
    processes: Processes = Processes()
    init_from: str = 'none'
    init_statistics: str = 'source'
    init_layers: tuple[str, ...] = ()

    def total_steps(self, images: int) -> int:
        """Return the steps of the run: enough to see all images `epochs` times."""
        steps = self.epochs * images / self.batch_size
        if steps >= 2**31:
            raise UsageError(f'epochs={self.epochs:g} are more than 2^31 steps; lower it.')
        return math.ceil(steps)

    def steps_per_epoch(self, images: int) -> float:
        """Not a whole number in general: batches run on across epochs and drop no image."""
        return images / self.batch_size


POSITIVE = 'positive'
FOLDER = command.expand
# Values that a field may have besides its type's: the words there are; the least number; any number
# above 0; or a function that makes the value of it. Of a tuple, each item.
# fmt: off
LIMITS: dict[type, dict[str, Any]] = {
    Settings: dict(
        seed=0, batch_size=1, epochs=0, init_statistics=('source', 'data'),
        init_from=lambda value: value and FOLDER(value),
    ),
    Data: dict(data_dir=FOLDER, workers=-1, resident_gib=0),
    Net: dict(
        towers=1, input_px=1, channels=0, lrn_reads=('own', 'all'),
        compute_dtype=('float32', 'bfloat16'),
    ),
    Layer: dict(
        kind=('conv', 'fc'), features=0, kernel_px=1, stride_px=1, padding_px=0,
        reads=('own', 'all'), init=tuple(alexnet.INITIALIZERS), init_std=0, ops=alexnet.OPS,
    ),
    Norm: dict(size=1, k=POSITIVE, alpha=0),
    Pool: dict(kind=('max', 'average'), window_px=1, stride_px=1, rounding=('down', 'up')),
    Dropout: dict(kind=('mask', 'inverted'), keep=POSITIVE),
    Preprocess: dict(
        images_per_crop=1, mean=('image', 'channel', 'none'), colour_noise=0,
        noise_divisor=POSITIVE,
    ),
    Optimizer: dict(momentum=0, weight_decay=0),
    Schedule: dict(kind=optimizer.SCHEDULES, rate=0, divisor=POSITIVE, factor=POSITIVE, switches=0),
    Loop: dict(
        log_every_steps=1, evaluate_every_epochs=POSITIVE, checkpoint_every_epochs=POSITIVE,
        eval_batch_size=1, prefetch_batches=1, compilation_cache=FOLDER,
        on_collapsed_init=('warn', 'error'), profile_steps=0,
    ),
    MeshShape: dict(data=-1, tower=1, placement=('towers', 'one_weird_trick'), cpu_devices=0),
    Processes: dict(join_timeout_secs=1, peer_timeout_secs=1),
}
# fmt: on


def unpack(config: Config) -> Settings:
    """Return a ConfigDict, or the dict of a config.json, as plain values.

    Raises:
        UsageError: a key is missing, unknown or of the wrong type, a value impossible, or the layer
            table describes no net.
    """
    tree = plain(config)
    net = _net(_section(tree.pop('model', None), 'model'))
    recipe = dict(_section(tree.pop('preprocess', None), 'preprocess'))
    crop = dict(input_px=net.input_px, channels=net.channels)  # the recipe's output
    preprocess = _build(Preprocess, recipe, 'preprocess', **crop)
    settings = _build(Settings, tree, '', net=net, preprocess=preprocess)
    _check(settings)
    _check_mesh(settings)
    return settings


# ------------------------------------------------------------------------- a tree to dataclasses


def _build(cls: Any, tree: Any, path: str, **given: Any) -> Any:
    """Fill dataclass `cls` from `tree`: names, types and LIMITS are checked field by field."""
    tree = _section(tree, path)
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name not in given]
    names = {field.name for field in fields}
    # What came later than the first checkpoints has a default.
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    where = f'{path}.' if path else ''
    for key in sorted(set(tree) - names):
        raise UsageError(f'{where}{key} is not a key of this config; the keys are {_list(names)}.')
    for key in sorted(needed - set(tree)):
        raise UsageError(f'{where}{key} is missing from this config; set it.')
    for key in sorted(names & set(tree)):
        if dataclasses.is_dataclass(hints[key]):
            given[key] = _build(hints[key], tree[key], where + key)
        else:
            limit = LIMITS.get(cls, {}).get(key)
            given[key] = _limited(_value(tree[key], hints[key], where + key), limit, where + key)
    return cls(**given)


def _section(section: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise UsageError(f'{path} must be a group of keys, and is {section!r}.')
    return section


def _value(value: Any, kind: Any, path: str) -> Any:
    """Return `value` as `kind`: int, float, bool, str, or a tuple of these."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, Mapping):  # a group of keys that are not known beforehand
            value = sorted(value.items())
        if not isinstance(value, (list, tuple)):
            raise UsageError(f'{path} must be a tuple, and is {value!r}.')
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise UsageError(f'{path} must hold {len(kinds)} values, and is {value!r}.')
        return tuple(_value(v, k, path) for v, k in zip(value, kinds, strict=True))
    if value == 'None':
        raise UsageError(f"{path} is 'None'; to say that there is none, write 'none'.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UsageError(f'{path} must be of type {kind.__name__}, and is {value!r}.')
    if kind is float and not math.isfinite(value):
        raise UsageError(f'{path} must be finite, and is {value!r}.')
    most = 2**64 if path == 'seed' else 2**31
    if kind is int and value >= most:
        raise UsageError(f'{path} must be below {most}, and is {value}.')
    return value


def _limited(value: Any, limit: Any, path: str) -> Any:
    """Return `value`, a path expanded, if it is within the limit."""
    if isinstance(value, tuple):
        return tuple(_limited(item, limit, path) for item in value)
    if callable(limit):
        try:
            return limit(value)
        except UsageError as error:
            raise UsageError(f'{path}: {error}') from error
    if isinstance(limit, tuple) and value not in limit:
        raise UsageError(f"{path}: '{value}' is not one of {', '.join(limit)}.")
    if limit == POSITIVE and value <= 0:
        raise UsageError(f'{path} must be positive, and is {value}.')
    if isinstance(limit, int) and value < limit:
        raise UsageError(f'{path} must be at least {limit}, and is {value}.')
    return value


def _list(words) -> str:
    return ', '.join(sorted(words))


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)


# ------------------------------------------------------------------------------ the layer table


def _net(section: Mapping[str, Any]) -> Net:
    tree = dict(section)
    names = _value(tree.pop('layers', None), tuple[str, ...], 'model.layers')
    scaling = _limited(tree.pop('init_scaling', None), ('none', 'fan_in'), 'model.init_scaling')
    rows = {key: tree.pop(key) for key in section if _is_layer(section[key])}
    _require(bool(names), 'model.layers is empty; name at least one layer.')
    twice = f'model.layers names a layer twice: {", ".join(names)}.'
    _require(len(set(names)) == len(names), twice)
    for name in names:
        there = f'there is no model.{name}; the rows are {_list(rows)}.'
        _require(name in rows, f'model.layers names {name}, and {there}')
    rows = {name: dict(rows[name]) for name in names}
    reference = [_reference_fan_in(rows[name], f'model.{name}.reference_fan_in') for name in names]
    net = _build(Net, tree, 'model', layers=tuple(_layer(name, rows[name]) for name in names))
    net = dataclasses.replace(net, channels=net.channels or 3)  # until the data is known
    for layer in net.layers[:-1]:  # the last one's 0 is 'as many as the data has classes'
        _limited(layer.features, 1, f'model.{layer.name}.features')
    _check_net(net)
    stages = alexnet.geometry(net)
    if scaling == 'none':
        return net
    # fan-in * std^2 stays what it was in run 145's net, and with it the signal's strength.
    scaled = [
        dataclasses.replace(
            stage.layer, init_std=stage.layer.init_std * math.sqrt(reference_fan_in / stage.fan_in)
        )
        for stage, reference_fan_in in zip(stages, reference, strict=True)
    ]
    return dataclasses.replace(net, layers=tuple(scaled))


def _is_layer(value: Any) -> bool:
    return isinstance(value, Mapping) and 'reads' in value


def _reference_fan_in(row: dict[str, Any], path: str) -> int:
    return _limited(_value(row.pop('reference_fan_in', None), int, path), 1, path)


def _layer(name: str, row: Mapping[str, Any]) -> Layer:
    if row.get('kind') == 'fc':  # a kernel over nothing
        row = {'kernel_px': 1, 'stride_px': 1, 'padding_px': ((0, 0), (0, 0)), **row}
    layer = _build(Layer, row, f'model.{name}', name=name)
    once = f'model.{name}.ops names a word twice, and each layer does a thing once.'
    _require(len(set(layer.ops)) == len(layer.ops), once)
    return layer


def _check_net(net: Net) -> None:
    for name, size in (('lrn', net.lrn.size), ('spatial_norm', net.spatial_norm.size)):
        _require(size % 2 == 1, f'model.{name}.size must be odd, and is {size}.')
    gaps = net.pool.kind != 'max' or net.pool.stride_px > net.pool.window_px
    _require(
        net.pool.rounding == 'down' or not gaps,
        "model.pool.rounding 'up' is for maxima whose windows leave no gap; set it to 'down'.",
    )
    keep = net.dropout.keep
    _require(keep <= 1, f'model.dropout.keep must be in (0, 1], and is {keep}.')


def _check(settings: Settings) -> None:
    recipe, update = settings.preprocess, settings.optimizer
    for px, what in (
        (recipe.input_px, f'the crop of model.input_px ({recipe.input_px})'),
        (recipe.resize_px, f'preprocess.resize_px ({recipe.resize_px})'),
    ):
        small = f'preprocess.image_px is {recipe.image_px}, smaller than {what}; enlarge it'
        _require(recipe.image_px >= px, f'{small} (2012: 256 for crops of 224).')
    _require(update.momentum < 1, 'optimizer.momentum must be in [0, 1).')
    for name, schedule in (('weights', update.weights), ('biases', update.biases)):
        ascend = list(schedule.at_epochs) == sorted(schedule.at_epochs)
        _require(ascend, f'optimizer.{name}.at_epochs must ascend, and is {schedule.at_epochs}.')
    _require(
        update.biases.kind != 'plateau' or update.weights.kind == 'plateau',
        "optimizer.biases.kind 'plateau' follows the weights' rule: set "
        'optimizer.weights.kind=plateau too.',
    )
    _require(
        update.weights.kind != 'plateau' or settings.data.validation != 'none',
        "optimizer.weights.kind 'plateau' follows the validation error, and data.validation is "
        'none: give a split, or another schedule.',
    )
    names = tuple(layer.name for layer in settings.net.layers)
    _limited(update.late_freeze.layer, ('none', *names), 'optimizer.late_freeze.layer')
    _limited(settings.init_layers, names, 'init_layers')
    for name, multiplier in update.multipliers:
        _limited(name, names, 'optimizer.multipliers')
        _limited(multiplier, 0, f'optimizer.multipliers.{name}')


def _check_mesh(settings: Settings) -> None:
    mesh, towers = settings.mesh, settings.net.towers
    _require(mesh.data != 0, 'mesh.data must be positive, or -1 for all that are left, and is 0.')
    _require(
        towers % mesh.tower == 0,
        f'mesh.tower is {mesh.tower}, and the net has {towers} tower(s); choose a divisor of '
        f'{towers}.',
    )
    if mesh.placement == 'one_weird_trick':
        alone = 'mesh.placement one_weird_trick has no tower axis; set mesh.tower=1.'
        _require(mesh.tower == 1, alone)
        own = [x.name for x in settings.net.layers[:-1] if x.kind == 'fc' and x.reads == 'own']
        _require(
            not own or towers == 1,
            f'mesh.placement one_weird_trick splits layers, and {", ".join(own)} reads '
            f'its own only; set its reads=all, or mesh.placement=towers.',
        )
