"""A small file as PyTorch writes it, for the reader that does without; writes tensors.pth.

python -m tests.golden.make_pth        # needs PyTorch
"""

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name('tensors.pth')


def expected() -> dict[str, np.ndarray]:
    """What the file holds: plain, transposed and sliced views, and four types."""
    plain = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        'plain.weight': plain,
        'transposed.weight': plain.transpose(2, 0, 1),
        'slice.weight': plain[1, :, 1::2],
        'half.weight': np.arange(5, dtype=np.float16) / 4,
        'double.bias': np.linspace(0, 1, 7),
        'steps': np.array(3, np.int64),
        'empty': np.zeros((0, 2), np.float32),
    }


def main() -> None:
    """Write the file; the first three share a storage."""
    torch: Any = importlib.import_module('torch')
    arrays = expected()
    plain = torch.tensor(arrays['plain.weight'])
    tensors = OrderedDict((name, torch.tensor(array)) for name, array in arrays.items())
    tensors['plain.weight'] = plain
    tensors['transposed.weight'] = plain.permute(2, 0, 1)
    tensors['slice.weight'] = plain[1, :, 1::2]
    torch.save(tensors, FILE)


if __name__ == '__main__':
    main()
