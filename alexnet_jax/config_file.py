"""Config files, overrides of their keys, and config.json; without importing JAX.

A config file is a Python file with a function `get_config`, whose argument follows a colon, or the
config.json of a run. Both contain a tree of named values: a ConfigDict, or the dict of the JSON.
"""

import ast
import difflib
import fnmatch
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax.errors import RunError, UsageError

# An ml_collections.ConfigDict, or the dict of its JSON. To type checkers the former is no Mapping.
Config = Any
# The folder that contains configs/: the repository's root in a checkout. An installed package has a
# copy in a folder of its own, as `configs` is a common name.
_BUNDLED = Path(__file__).with_name('_bundled')
ROOT = _BUNDLED if _BUNDLED.is_dir() else Path(__file__).parents[1]


def load(where: str, overrides: Mapping[str, Any]) -> Config:
    """Return the config of 'FILE.py', 'FILE.py:ARGUMENT' or of a run's config.json.

    Args:
        where: the file, as `--config` takes it.
        overrides: {dotted key: new value}, see `override`.

    Raises:
        UsageError: the file does not exist or holds no config, or an override does not fit it.
    """
    name, python, argument = where.partition('.py:')
    file = Path(os.path.expanduser((name + python.removesuffix(':')).strip()))
    if not file.exists() and (ROOT / file).exists():  # one of configs/, from any folder
        file = ROOT / file
    if not file.is_file():
        run = (file / 'config.json').is_file()
        raise UsageError(
            f'{file} is the folder of a run; use --config={file / "config.json"}.'
            if run
            else f'there is no config file {file}; the shipped ones are in configs/.'
        )
    if str(ROOT) not in sys.path:  # configs import each other
        sys.path.insert(0, str(ROOT))
    try:
        if file.suffix == '.json':
            config = read_json(file)
        else:
            config = runpy.run_path(str(file))['get_config'](*filter(None, [argument]))
        if missing := {'name', 'scale', 'seed', 'model', 'data'} - {*config}:
            raise ValueError(f'{", ".join(sorted(missing))} is missing from this config')
    except Exception as error:  # anything may be wrong in a user's Python file
        raise UsageError(
            f'{file} gives no config: {error} ({type(error).__name__}); correct it, as '
            f'configs/smoke.py shows.'
        ) from error
    for key, value in overrides.items():
        override(config, key, value)
    return config


# ------------------------------------------------------------------------------------- overrides


def split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate a command line into other words and its `--config.KEY=VALUE`, as {key: value}."""
    others, overrides, left = [], {}, iter(words)
    for word in left:
        name, equals, value = word.partition('=')
        if name.startswith('--config.'):
            overrides[name.removeprefix('--config.')] = value if equals else next(left, '')
        else:
            others.append(word)
    return others, overrides


def override(config: Config, key: str, value: Any) -> None:
    """Set one key of a config.

    Args:
        config: changed in place, with the values of a ConfigDict that depend on the key.
        key: dotted: 'optimizer.weights.rate'.
        value: the value, or text as on the command line, which is parsed by the key's type.

    Raises:
        UsageError: the key does not exist, or the value is not of its type.
    """
    section, old, name = config, config, ''
    for name in key.split('.'):
        section = old
        if not _is_section(section) or name not in section:
            raise UsageError(f'--config.{key}: this config has no such key; {_hint(config, key)}')
        old = section[name]
    try:
        section[name] = _parse(value, old) if isinstance(value, str) else value
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        now = 'it is a group of keys' if _is_section(old) else f'now it is {old!r}'
        kind = type(old).__name__
        raise UsageError(f'--config.{key}={value}: it must be of type {kind}; {now}.') from error


def _hint(config: Config, key: str) -> str:
    """Return which keys are similar to an unknown one, or which shipped config has it."""
    keys = _flat(config)
    if near := difflib.get_close_matches(key, keys, n=2, cutoff=0.75):
        return f'did you mean {" or ".join(near)}?'
    for file in sorted((ROOT / 'configs').glob('[a-z]*.py')):
        if key in _flat(load(str(file), {})):
            return f'configs/{file.name} has it.'
    return f'the groups of keys are {", ".join(key for key in config if _is_section(config[key]))}.'


def _is_section(value: Any) -> bool:
    return hasattr(value, 'keys')


def _parse(text: str, old: Any) -> Any:
    """Return `text` as a value of the type of `old`."""
    if isinstance(old, bool):
        return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if isinstance(old, (int, float, str)):
        return type(old)(text)
    if isinstance(old, (tuple, list)) and text.isidentifier():  # a tuple of one name
        return (text,)
    value = ast.literal_eval(text)
    if _is_section(old):
        return type(old)(dict(value))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _flat(tree: Config, prefix: str = '') -> dict[str, Any]:
    """Return {dotted key: value} of all values in the groups of a tree."""
    values = {}
    for key in tree:
        if _is_section(tree[key]):
            values |= _flat(tree[key], f'{prefix}{key}.')
        else:
            values[prefix + key] = tree[key]
    return values


# ------------------------------------------------------------------------------------------ JSON


# Renamed keys: a pattern of old dotted keys, and the last part of the new key. Checkpoints and the
# archived runs in experiments/results were written with the old ones.
RENAMED = {
    'loop.on_dead_start': 'on_collapsed_init',
    'model.*.fan_in_2012': 'reference_fan_in',
    'model.*.then': 'ops',
    'optimizer.late': 'late_freeze',
    'optimizer.*.drop': 'divisor',
    'preprocess.share': 'images_per_crop',
}


def translated(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Return the tree of a config.json with old keys replaced by new ones, see RENAMED."""
    result = {}
    for key, value in tree.items():
        path = prefix + key
        name = next((new for old, new in RENAMED.items() if fnmatch.fnmatch(path, old)), key)
        result[name] = translated(value, f'{path}.') if isinstance(value, Mapping) else value
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Return the config in a config.json, its keys translated.

    Raises:
        RunError: it does not exist, or is damaged.
    """
    try:
        return translated(dict(json.loads(path.read_text())))
    except (OSError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f'no JSON object: {error}'
        raise RunError(
            f'{path} cannot be read ({reason}); choose the folder of a run, or restore this file.'
        ) from error


def plain(config: Config) -> dict[str, Any]:
    """Return a config as the dict of its JSON, a copy."""
    return json.loads(as_json(config))


def as_json(config: Config) -> str:
    """Return a config as text: sorted keys, tuples as lists, one field a line."""
    tree = config.to_dict() if hasattr(config, 'to_dict') else config
    return json.dumps(tree, indent=2, sort_keys=True)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Return {dotted key: [its value in a, in b]} of all keys in which two configs differ.

    Configs are dicts of JSON values. A missing key has the value None.
    """
    found = {}
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f'{prefix}{key}.')
        elif left != right or (key in a) != (key in b):
            found[prefix + key] = [left, right]
    return found
