"""Every shipped config, resolved, as text: a drifting hyper-parameter shows in the diff.

python -m tests.golden.configs        # write tests/golden/configs/ anew

The base is there in full, a file a scale; every other config by what it changes in the base, so
that an ablation shows as the one change that it is.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from alexnet_jax.config import as_json, differences
from configs import alexnet

FOLDER = Path(__file__).parent / 'configs'
SOURCES = Path(alexnet.__file__).parent


def modules() -> Iterator[tuple[str, ModuleType]]:
    """(name of the file, module) of each config."""
    for path in sorted(SOURCES.glob('[a-z]*.py')):
        yield path.stem, importlib.import_module(f'configs.{path.stem}')


def scales(module: ModuleType) -> tuple[str, ...]:
    """Those at which a config makes sense."""
    pictures = alexnet.PICTURES if module is alexnet else ()
    return (*getattr(module, 'SCALES', alexnet.SCALES), *pictures)


def resolved() -> Iterator[tuple[str, str]]:
    """(name of the golden file, text) of each config."""
    for name, module in modules():
        if module is alexnet:
            for scale in scales(module):
                yield f'{name}-{scale}.json', as_json(module.get_config(scale)) + '\n'
        else:
            yield f'{name}.txt', '\n'.join(changes(module, scale) for scale in scales(module))


def changes(module: ModuleType, scale: str) -> str:
    """What a config changes in the base at a scale: a line a key."""
    base, here = (json.loads(as_json(m.get_config(scale))) for m in (alexnet, module))
    lines = (f'{key}: {leaf(base, key)} -> {leaf(here, key)}' for key in differences(base, here))
    return '\n'.join([f'[{scale}]', *lines, ''])


def leaf(tree: Mapping, dotted: str) -> str:
    """The value of a dotted key, in one line; '-' where there is none."""
    for key in dotted.split('.'):
        if key not in tree:
            return '-'
        tree = tree[key]
    return json.dumps(tree, sort_keys=True)


def main() -> None:
    """Write them all; files of configs that are no more go."""
    FOLDER.mkdir(exist_ok=True)
    texts = dict(resolved())
    for path in FOLDER.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)


if __name__ == '__main__':
    main()
