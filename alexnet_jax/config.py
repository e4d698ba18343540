"""From a ConfigDict to plain values, validated once, here; no other room sees a ConfigDict.

Every complaint is one sentence that names the key and says what to do (`UsageError`, exit code 2).
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from alexnet_jax import model, optimizer
from alexnet_jax.augment import Preprocess
from alexnet_jax.errors import UsageError
from alexnet_jax.model import Layer, Net


@dataclasses.dataclass(frozen=True)
class Data:
    """`train`, `validation` and `test` are split expressions of TFDS; `validation` may be 'none'.

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
    late: optimizer.Late
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
    on_dead_start: str


PLACEMENTS = ('towers', 'one_weird_trick')


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; data -1 takes all that are left. Placements: see parallel.py.

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
    """A whole config as plain values.

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
    noise_until_epoch: float
    optimizer: Optimizer
    loop: Loop
    mesh: MeshShape
    processes: Processes = Processes()
    init_from: str = 'none'
    init_statistics: str = 'source'
    init_layers: tuple[str, ...] = ()

    def total_steps(self, images: int) -> int:
        """Steps of the run: enough to see all images `epochs` times."""
        return math.ceil(self.epochs * images / self.batch_size)

    def steps_per_epoch(self, images: int) -> float:
        """Not a whole number in general: batches run on across epochs and drop no image."""
        return images / self.batch_size


# An ml_collections.ConfigDict, which is no Mapping to a type checker, or the dict of its JSON.
Config = Any


def unpack(config: Config) -> Settings:
    """A ConfigDict, or the dict of a config.json, as plain values.

    Raises:
        UsageError: a key is missing, unknown or of the wrong type, a value impossible, or the layer
            table describes no net.
    """
    tree = json.loads(as_json(config))
    net_tree, preprocess = dict(_section(tree, 'model')), dict(_section(tree, 'preprocess'))
    if 'noise_until_epoch' not in preprocess:
        raise UsageError('preprocess.noise_until_epoch is missing from this config; set it.')
    until = _value(preprocess.pop('noise_until_epoch'), float, 'preprocess.noise_until_epoch')
    preprocess |= {key: net_tree.get(key) for key in ('input_px', 'channels')}
    top = {key: value for key, value in tree.items() if key not in ('model', 'preprocess')}
    settings = _build(
        Settings,
        top,
        '',
        net=_net(net_tree),
        preprocess=_build(Preprocess, preprocess, 'preprocess'),
        noise_until_epoch=until,
    )
    _check(settings)
    return settings


def as_json(config: Config) -> str:
    """A resolved config as text: sorted keys, tuples as lists, one field a line."""
    tree = config.to_dict() if hasattr(config, 'to_dict') else config
    return json.dumps(tree, indent=2, sort_keys=True)


def with_classes(config: Config, classes: int) -> Config:
    """The config, its last layer as wide as the data has classes where it says 0."""
    tree = json.loads(as_json(config))
    last = tree['model'][tree['model']['layers'][-1]]
    last['features'] = last['features'] or classes
    return tree


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> list[str]:
    """The dotted keys in which two configs (as dicts of JSON values) differ."""
    keys = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += differences(left, right, f'{prefix}{key}.')
        elif left != right or (key in a) != (key in b):
            keys.append(prefix + key)
    return keys


# --------------------------------------------------------------------- ConfigDict to dataclasses


def _build(cls, tree: Mapping[str, Any], path: str, **given):
    """Fill dataclass `cls` from `tree`, field by field, checking names and types on the way."""
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name not in given]
    wanted = {field.name for field in fields}
    # What came later than the first checkpoints has a default.
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    where = f'{path}.' if path else ''
    for key in sorted(set(tree) - wanted):
        raise UsageError(f'{where}{key} is not a key of this config; the keys are {_list(wanted)}.')
    for key in sorted(needed - set(tree)):
        raise UsageError(f'{where}{key} is missing from this config; set it.')
    values = {}
    for key in wanted & set(tree):
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], _section(tree, key, where), where + key)
        else:
            values[key] = _value(tree[key], hints[key], where + key)
    return cls(**values, **given)


def _section(tree: Mapping[str, Any], key: str, where: str = '') -> Mapping[str, Any]:
    section = tree.get(key)
    if not isinstance(section, Mapping):
        raise UsageError(f'{where}{key} must be a group of keys, and is {section!r}.')
    return section


def _value(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind` (int, float, bool, str, or a tuple of these), or one sentence why not."""
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
    return value


def _list(words) -> str:
    return ', '.join(sorted(words))


# ------------------------------------------------------------------------------ the layer table


def _net(tree: dict[str, Any]) -> Net:
    names = _value(tree.pop('layers', None), tuple[str, ...], 'model.layers')
    scaling = tree.pop('init_scaling', None)
    _one_of(scaling, ('none', 'fan_in'), 'model.init_scaling')
    if not names:
        raise UsageError('model.layers is empty; name at least one layer.')
    if len(set(names)) < len(names):
        raise UsageError(f'model.layers names a layer twice: {", ".join(names)}.')
    rows = {key: value for key, value in tree.items() if _is_layer(value)}
    missing = [name for name in names if name not in rows]
    if missing:
        raise UsageError(
            f'model.layers names {missing[0]}, and there is no model.{missing[0]}; '
            f'the rows are {_list(rows)}.'
        )
    rest = {key: value for key, value in tree.items() if key not in rows}
    reference = {name: _value(rows[name].get('fan_in_2012'), int, _fan(name)) for name in names}
    for name, inputs in reference.items():
        _at_least(inputs, 1, _fan(name))
    net = _build(Net, rest, 'model', layers=tuple(_layer(name, rows[name]) for name in names))
    for layer in net.layers[:-1]:  # the last one's 0 is 'as many as the data has classes'
        _at_least(layer.features, 1, f'model.{layer.name}.features')
    _check_net(net)
    stages = model.geometry(net)
    if scaling == 'none':
        return net
    # fan-in * std^2 stays what it was in run 145's net, and with it the signal's strength.
    scaled = [
        dataclasses.replace(
            stage.layer,
            init_std=stage.layer.init_std * math.sqrt(reference[stage.layer.name] / stage.fan_in),
        )
        for stage in stages
    ]
    return dataclasses.replace(net, layers=tuple(scaled))


def _fan(name: str) -> str:
    return f'model.{name}.fan_in_2012'


def _is_layer(value: Any) -> bool:
    return isinstance(value, Mapping) and 'reads' in value


def _layer(name: str, row: Mapping[str, Any]) -> Layer:
    row = {key: value for key, value in row.items() if key != 'fan_in_2012'}
    if row.get('kind') == 'fc':  # a kernel over nothing
        row = {'kernel_px': 1, 'stride_px': 1, 'padding_px': ((0, 0), (0, 0))} | row
    layer = _build(Layer, row, f'model.{name}', name=name)
    path = f'model.{name}'
    _one_of(layer.kind, ('conv', 'fc'), f'{path}.kind')
    _one_of(layer.reads, ('own', 'all'), f'{path}.reads')
    _one_of(layer.init, tuple(model.INITIALIZERS), f'{path}.init')
    for word in layer.then:
        _one_of(word, model.FOLLOWS, f'{path}.then')
    if len(set(layer.then)) < len(layer.then):
        raise UsageError(f'{path}.then names a word twice, and each layer does a thing once.')
    for key, least in (('features', 0), ('kernel_px', 1), ('stride_px', 1)):
        _at_least(getattr(layer, key), least, f'{path}.{key}')
    for pad in (pad for pads in layer.padding_px for pad in pads):
        _at_least(pad, 0, f'{path}.padding_px')
    _at_least(layer.init_std, 0.0, f'{path}.init_std')
    return layer


def _check_net(net: Net) -> None:
    for key in ('towers', 'input_px', 'channels'):
        _at_least(getattr(net, key), 1, f'model.{key}')
    for name in ('lrn', 'spatial_norm'):
        norm = getattr(net, name)
        if norm.size < 1 or norm.size % 2 == 0:
            raise UsageError(f'model.{name}.size must be odd and positive, and is {norm.size}.')
        if norm.k <= 0:
            raise UsageError(f'model.{name}.k must be positive, and is {norm.k}.')
        _at_least(norm.alpha, 0.0, f'model.{name}.alpha')
    _one_of(net.lrn_reads, ('own', 'all'), 'model.lrn_reads')
    _one_of(net.pool.kind, ('max', 'average'), 'model.pool.kind')
    _at_least(net.pool.window_px, 1, 'model.pool.window_px')
    _at_least(net.pool.stride_px, 1, 'model.pool.stride_px')
    _one_of(net.pool.rounding, ('down', 'up'), 'model.pool.rounding')
    if net.pool.rounding == 'up' and (
        net.pool.kind != 'max' or net.pool.stride_px > net.pool.window_px
    ):
        raise UsageError(
            "model.pool.rounding 'up' is for maxima whose windows leave no gap; set it to 'down'."
        )
    _one_of(net.dropout.kind, ('mask', 'inverted'), 'model.dropout.kind')
    if not 0 < net.dropout.keep <= 1:
        raise UsageError(f'model.dropout.keep must lie in (0, 1], and is {net.dropout.keep}.')
    _one_of(net.compute_dtype, ('float32', 'bfloat16'), 'model.compute_dtype')


def _check(settings: Settings) -> None:
    for key, least in (('batch_size', 1), ('seed', 0), ('epochs', 0.0)):
        _at_least(getattr(settings, key), least, key)
    recipe = settings.preprocess
    if recipe.image_px < recipe.input_px:
        raise UsageError(
            f'preprocess.image_px is {recipe.image_px}, smaller than the crop of model.input_px '
            f'({recipe.input_px}); enlarge it (2012: 256 and 224).'
        )
    if recipe.image_px < recipe.resize_px:
        raise UsageError(
            f'preprocess.image_px is {recipe.image_px}, smaller than preprocess.resize_px '
            f'({recipe.resize_px}); enlarge it.'
        )
    _one_of(recipe.mean, ('image', 'channel', 'none'), 'preprocess.mean')
    _at_least(recipe.share, 1, 'preprocess.share')
    _at_least(recipe.colour_noise, 0.0, 'preprocess.colour_noise')
    if recipe.noise_divisor <= 0:
        raise UsageError('preprocess.noise_divisor must be positive.')
    for name, schedule in vars(settings.optimizer).items():
        if isinstance(schedule, optimizer.Schedule):
            _check_schedule(schedule, f'optimizer.{name}')
    update = settings.optimizer
    if update.biases.kind == 'plateau' and update.weights.kind != 'plateau':
        raise UsageError(
            "optimizer.biases.kind 'plateau' follows the weights' rule: set "
            'optimizer.weights.kind=plateau too.'
        )
    if update.weights.kind == 'plateau' and settings.data.validation == 'none':
        raise UsageError(
            "optimizer.weights.kind 'plateau' follows the validation error, and data.validation is "
            'none: give a split, or another schedule.'
        )
    if not 0 <= update.momentum < 1:
        raise UsageError('optimizer.momentum must lie in [0, 1).')
    _at_least(update.weight_decay, 0.0, 'optimizer.weight_decay')
    names = tuple(layer.name for layer in settings.net.layers)
    _one_of(settings.optimizer.late.layer, ('none', *names), 'optimizer.late.layer')
    for name, multiplier in settings.optimizer.multipliers:
        _one_of(name, names, 'optimizer.multipliers')
        _at_least(multiplier, 0.0, f'optimizer.multipliers.{name}')
    _one_of(settings.init_statistics, ('source', 'data'), 'init_statistics')
    for name in settings.init_layers:
        _one_of(name, names, 'init_layers')
    _at_least(settings.data.workers, -1, 'data.workers')
    _at_least(settings.data.resident_gib, 0.0, 'data.resident_gib')
    loop = settings.loop
    for key in ('log_every_steps', 'eval_batch_size', 'prefetch_batches'):
        _at_least(getattr(loop, key), 1, f'loop.{key}')
    for key in ('evaluate_every_epochs', 'checkpoint_every_epochs'):
        if getattr(loop, key) <= 0:
            raise UsageError(f'loop.{key} must be positive, and is {getattr(loop, key)}.')
    _one_of(loop.on_dead_start, ('warn', 'error'), 'loop.on_dead_start')
    for key in ('join_timeout_secs', 'peer_timeout_secs'):
        _at_least(getattr(settings.processes, key), 1.0, f'processes.{key}')
    _check_mesh(settings)


def _check_schedule(schedule: optimizer.Schedule, path: str) -> None:
    _one_of(schedule.kind, optimizer.SCHEDULES, f'{path}.kind')
    _at_least(schedule.rate, 0.0, f'{path}.rate')
    if schedule.drop <= 0 or schedule.factor <= 0:
        raise UsageError(f'{path}: drop and factor must be positive.')
    _at_least(schedule.switches, 0, f'{path}.switches')
    if list(schedule.at_epochs) != sorted(schedule.at_epochs):
        raise UsageError(f'{path}.at_epochs must ascend, and is {schedule.at_epochs}.')


def _check_mesh(settings: Settings) -> None:
    _at_least(settings.mesh.cpu_devices, 0, 'mesh.cpu_devices')
    mesh, towers = settings.mesh, settings.net.towers
    if mesh.data < 1 and mesh.data != -1:
        raise UsageError(f'mesh.data must be positive, or -1 for all that are left: {mesh.data}.')
    if mesh.tower < 1 or towers % mesh.tower:
        raise UsageError(
            f'mesh.tower is {mesh.tower}, and the net has {towers} tower(s); '
            f'choose a divisor of {towers}.'
        )
    _one_of(mesh.placement, PLACEMENTS, 'mesh.placement')
    if mesh.placement == 'one_weird_trick':
        if mesh.tower != 1:
            raise UsageError('mesh.placement one_weird_trick has no tower axis; set mesh.tower=1.')
        own = [x.name for x in settings.net.layers[:-1] if x.kind == 'fc' and x.reads == 'own']
        if own and towers > 1:
            raise UsageError(
                f'mesh.placement one_weird_trick splits layers across towers, and {own[0]} reads '
                f'its own only; set model.{own[0]}.reads=all, or mesh.placement=towers.'
            )


def _one_of(word: Any, words: tuple[str, ...], path: str) -> None:
    if word not in words:
        raise UsageError(f"{path}: '{word}' is not one of {', '.join(words)}.")


def _at_least(value: float, least: float, path: str) -> None:
    if value < least:
        raise UsageError(f'{path} must be at least {least}, and is {value}.')
