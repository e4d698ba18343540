"""Write what experiments store and show: files, JSON lines, Markdown tables."""

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import files

NOT_RUN = 'not run'


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as scratch:
        scratch.write_text(text)


def short_commit(commit: str) -> str:
    """Return the first nine digits of a commit, with the '+' of changed code if there is one."""
    return commit[:9] + '+' * commit.endswith('+')


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return JSON, one object per line."""
    return ''.join(json.dumps(record) + '\n' for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; none if there is no file."""
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.splitlines()]


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the first row is its head. Without a second row: 'not run'."""
    if len(rows) < 2:
        return NOT_RUN
    head, *body = ('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *body])


def config_module(name: str) -> Any:
    """Import a file of configs/ by the name of the config."""
    return importlib.import_module(f'configs.{name}')


def slug(device: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r'\W+', '_', device).strip('_').lower()
