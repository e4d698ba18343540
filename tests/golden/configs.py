"""Every shipped config, resolved, as text: a drifting hyper-parameter shows in the diff.

python -m tests.golden.configs        # write tests/golden/configs/*.json anew
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

from alexnet_jax.config import as_json
from configs import alexnet

FOLDER = Path(__file__).parent / 'configs'
SOURCES = Path(alexnet.__file__).parent
ONE_SCALE = ('smoke',)  # configs that make sense at the quickstart scale only


def resolved() -> Iterator[tuple[str, str]]:
    """(name of the golden file, text) of each config at each of its scales."""
    for path in sorted(SOURCES.glob('[a-z]*.py')):
        module = importlib.import_module(f'configs.{path.stem}')
        scales = alexnet.SCALES[:1] if path.stem in ONE_SCALE else alexnet.SCALES
        for scale in scales:
            yield f'{path.stem}-{scale}.json', as_json(module.get_config(scale)) + '\n'


def main() -> None:
    """Write them all; files of configs that are no more go."""
    FOLDER.mkdir(exist_ok=True)
    texts = dict(resolved())
    for path in FOLDER.glob('*.json'):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)


if __name__ == '__main__':
    main()
