"""The rows of each device: experiments/results/throughput/<device>.json."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import files
from alexnet_jax.training import metrics
from experiments.throughput import baselines
from experiments.throughput.timing import Row

RESULTS = Path(__file__).parents[1] / 'results' / 'throughput'
PARTS = ('steps', 'layers', 'feeding', 'start')
KEYS = {
    # The keys that identify a row of each part.
    'steps': ('net', 'batch_size', 'dtype', 'pass'),
    'layers': ('net', 'batch_size', 'dtype'),
    'feeding': ('input',),
    'start': ('config',),
}


def environment() -> Row:
    """Return device, versions and commit, with PyTorch's version where it is installed."""
    found = metrics.environment()
    if baselines.torch_is_here():
        import torch

        found |= {'torch_version': torch.__version__, 'torch_threads': torch.get_num_threads()}
    return found


def slug(device: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r'\W+', '_', device).strip('_').lower()


def read(path: Path) -> dict[str, list[Row]]:
    """Return the stored rows of a device, by part."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {part: kept.get(part, []) for part in PARTS}


def keep(folder: Path, part: str, rows: Sequence[Row]) -> Path:
    """Store rows among those of their device; a row of the same name is replaced."""
    path = path_of(folder)
    kept = read(path)
    named = {name_of(part, row): row for row in kept[part]}
    for row in rows:
        named[name_of(part, row)] = _joined(named.get(name_of(part, row), {}), row)
    kept[part] = list(named.values())
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as scratch:
        scratch.write_text(json.dumps(kept, indent=1) + '\n')
    return path


def path_of(folder: Path) -> Path:
    """Return the file of this machine's device."""
    return folder / f'{slug(metrics.device_name())}.json'


def name_of(part: str, row: Row) -> tuple[Any, ...]:
    """Return what identifies a row within its part."""
    return tuple(row[key] for key in KEYS[part])


def _joined(old: Row, new: Row) -> Row:
    """Join a row of 'steps', run in several processes, with the stored row of the same commit.

    Each ratio stays that of its own process; the figures of ours, and the roofline, are those of
    the process in which it ran beside PyTorch.
    """
    same = old.get('commit') == new['commit'] and not new['commit'].endswith('+')  # '+': edited
    if not same or 'forms' not in new:
        return new
    first, other = (old, new) if _beside_torch(old) and not _beside_torch(new) else (new, old)
    merged = {key: other.get(key, {}) | first.get(key, {}) for key in ('forms', 'ratios')}
    return other | first | {key: found for key, found in merged.items() if found}


def _beside_torch(row: Row) -> bool:
    return bool(row['torch'] and 'ours' in row['forms'])
