"""Store the rows of each device in experiments/results/throughput/<device>.json."""

import json
import re
from pathlib import Path

from alexnet_jax import files
from alexnet_jax.training import metrics
from experiments.throughput import baselines
from experiments.throughput.timing import Row

RESULTS = Path(__file__).parents[1] / 'results' / 'throughput'
KEYS = {  # the keys that identify a row of each part
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
    return {part: kept.get(part, []) for part in KEYS}


def keep(folder: Path, part: str, row: Row) -> Path:
    """Store a row among those of its device; a row of the same name is replaced."""
    path = folder / f'{slug(metrics.device_name())}.json'
    kept = read(path)
    named = {tuple(old[key] for key in KEYS[part]): old for old in kept[part]}
    kept[part] = list((named | {tuple(row[key] for key in KEYS[part]): row}).values())
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as scratch:
        scratch.write_text(json.dumps(kept, indent=1) + '\n')
    return path
