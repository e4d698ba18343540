"""docs/fidelity.md: every key has the value it prints, every file, function and test exists."""

import ast
import functools
import importlib
import itertools
import json
import re
from pathlib import Path

import pytest

from alexnet_jax import config as configuration

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'fidelity.md'
REFERENCE = re.compile(r'\[`([\w/]+\.py)(?:::([\w.]+))?`\]\(\.\./([\w/]+\.py)\)')
KEY = re.compile(r'`(?:(\w+)(?::(\w+))? )?([\w.]+)=(.+?)`')


def rows(text: str) -> list[dict[str, str]]:
    """Return the rows of all tables of a Markdown page, each as {heading: cell}."""
    found, head = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            head = []
        elif not head:
            head = cells
        elif set(cells[0]) != {'-'}:
            found.append(dict(zip(head, cells, strict=True)))
    return found


ROWS = {row['no.']: row for row in rows(PAGE.read_text(encoding='utf-8'))}


def cell(row: dict[str, str], heading: str) -> list[str]:
    """Return the entries of one cell; '-' is none."""
    text = next(text for head, text in row.items() if head.startswith(heading))
    return [] if text == '-' else text.split('<br>')


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Return the functions, classes, methods ('Class.method') and constants of a source file."""

    def named(node: ast.AST, prefix: str = ''):
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield prefix + name
                    yield from named(child, f'{prefix}{name}.')
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name))
                ):
                    yield prefix + name

    return frozenset(named(ast.parse((ROOT / path).read_text(encoding='utf-8'))))


@functools.cache
def config_tree(name: str, scale: str) -> dict:
    module = importlib.import_module(f'configs.{name}')
    return json.loads(configuration.as_json(module.get_config(scale)))


def test_the_page_has_a_table_for_each_section():
    sections = [number.partition('-')[0] for number in ROWS]
    assert [key for key, _ in itertools.groupby(sections)] == ['2', '3', '4', '5', '6', '7', 'D']
    assert len(ROWS) == len(rows(PAGE.read_text(encoding='utf-8')))


@pytest.mark.parametrize('number', ROWS)
def test_keys_have_the_values_that_are_printed(number):
    for entry in cell(ROWS[number], 'config key'):
        found = KEY.fullmatch(entry)
        assert found, entry
        name, scale, key, value = found.groups()
        tree = config_tree(name or 'alexnet', scale or 'imagenet2012')
        there = functools.reduce(lambda section, part: section[part], key.split('.'), tree)
        wanted = json.loads(json.dumps(ast.literal_eval(value)))  # tuples are lists in a tree
        assert there == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), entry


@pytest.mark.parametrize('number', ROWS)
@pytest.mark.parametrize('heading', ['code', 'test'])
def test_files_functions_and_tests_exist(number, heading):
    entries = cell(ROWS[number], heading)
    assert entries, f'{number} names no {heading}'
    for entry in entries:
        found = REFERENCE.fullmatch(entry)
        assert found, entry
        path, name, link = found.groups()
        assert path == link
        assert (heading == 'test') == path.startswith('tests/')
        assert name in names_in(path) if name else (ROOT / path).is_file(), entry


def test_what_is_wrong_would_be_seen():
    page = '| no. | config key | code |\n|---|---|---|\n| 1-1 | `seed=1`<br>`a b.c=2` | - |\n\ntext'
    assert rows(page) == [{'no.': '1-1', 'config key': '`seed=1`<br>`a b.c=2`', 'code': '-'}]
    assert KEY.fullmatch('`a:b b.c=("x",)`').groups() == ('a', 'b', 'b.c', '("x",)')
    assert 'AlexNet._lrn' in names_in('alexnet_jax/model/alexnet.py')
    assert 'AlexNet.lrn' not in names_in('alexnet_jax/model/alexnet.py')
