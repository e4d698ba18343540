"""Store the rows of each device in experiments/results/throughput/<device>.json."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from alexnet_jax.training import metrics
from experiments.output import slug, write_text

RESULTS = Path(__file__).parents[1] / 'results' / 'throughput'
KEYS = {  # the keys that identify a row of each part
    'steps': ('net', 'batch_size', 'dtype', 'pass'),
    'layers': ('net', 'batch_size', 'dtype'),
    'feeding': ('input',),
    'start': ('config',),
}
Row = dict[str, Any]
median = statistics.median


def environment() -> Row:
    """Return device, versions and commit, with PyTorch's version where it was compared."""
    found = metrics.environment()
    if torch := sys.modules.get('torch'):
        found |= {'torch_version': torch.__version__, 'torch_threads': torch.get_num_threads()}
    return found


def read(path: Path) -> dict[str, list[Row]]:
    """Return the stored rows of a device, by part."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {part: kept.get(part, []) for part in KEYS}


def keep(folder: Path, part: str, row: Row) -> Path:
    """Store a row among those of its device; a row of the same name is replaced."""
    path = folder / f'{slug(metrics.device_name())}.json'
    kept = read(path)
    named = {tuple(old[key] for key in KEYS[part]): old for old in [*kept[part], row]}
    write_text(path, json.dumps(kept | {part: list(named.values())}, indent=1) + '\n')
    return path
