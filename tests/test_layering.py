"""Who may import whom: the drawing of the README, checked on the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'alexnet_jax'

# From the top of the house to its foundations; a room imports rooms of lower floors only.
FLOORS = (
    ('weights', 'report'),
    ('train', 'figures'),
    ('transfer',),
    ('features',),
    ('predict',),
    ('evaluate', 'describe'),
    ('communication',),
    ('workdir', 'step', 'diagnose', 'checkpoint', 'splits'),
    ('records', 'parallel', 'export'),
    ('distributed',),
    ('config', 'data'),
    ('prepare', 'readers'),
    ('fashion_mnist', 'folders', 'imagenet', 'stored'),
    ('shard_writer',),
    ('archives', 'prepared', 'pictures', 'statistics'),
    ('model', 'optimizer', 'augment'),
    ('ops', 'weight_files', 'config_file', 'progress'),
    ('command', 'files', 'machine'),
    ('errors',),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    """The rooms of this package among them."""
    return {name.split('.')[1] for name in names if name.startswith('alexnet_jax.')} & set(FLOOR)


def test_every_room_has_a_floor():
    assert {path.stem for path in PACKAGE.glob('*.py')} - {'__init__'} == set(FLOOR)


@pytest.mark.parametrize('room', sorted(FLOOR))
def test_imports_run_downwards(room):
    for other in rooms(imports(PACKAGE / f'{room}.py')) - {room}:
        assert FLOOR[other] > FLOOR[room], f'{room} imports {other}, which is not below it'


@pytest.mark.parametrize('room', sorted(FLOOR))
def test_no_room_knows_configs_or_flags(room):
    for name in imports(PACKAGE / f'{room}.py'):
        assert name.split('.')[0] not in ('configs', 'ml_collections', 'tensorflow', 'experiments')
        assert not name.startswith('absl.flags')
        assert name != 'absl.app'


def test_only_checkpoint_knows_orbax():
    for path in PACKAGE.glob('*.py'):
        knows = any(name.split('.')[0] == 'orbax' for name in imports(path))
        assert knows == (path.stem == 'checkpoint'), path.name


def test_main_is_short():
    """Flags and one call; a guard where it is one of several processes."""
    assert len((ROOT / 'main.py').read_text().splitlines()) <= 80


def test_the_readme_draws_every_room():
    readme = (ROOT / 'README.md').read_text()
    for room in FLOOR:
        assert re.search(rf'^\s+{room}\.py\s', readme, re.MULTILINE), f'{room}.py is not drawn'


def test_the_readme_says_the_order():
    readme = (ROOT / 'README.md').read_text()
    said = re.search(r'Imports run downwards: (.*?)\. ', readme, re.DOTALL)[1]
    assert tuple(tuple(re.split(r',\s+', floor)) for floor in re.split(r';\s+', said)) == FLOORS
