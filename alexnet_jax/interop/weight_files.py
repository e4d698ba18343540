"""Read weight files of other frameworks into NumPy arrays by name, without running their code.

| content | suffixes seen | read by |
|---|---|---|
| state dicts and checkpoints of PyTorch | .pth, .pt, .pth.tar, .bin, .ckpt | torch, weights only |
| Hugging Face's format, and ours | .safetensors | safetensors |
| NumPy's archive, without Python objects | .npz | NumPy |

The format is detected from the content, not the suffix. Floating-point arrays of any width
become float32.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax import files
from alexnet_jax.command import library
from alexnet_jax.errors import AlexNetError, RunError, UsageError

Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    """Return all arrays of a weight file by name, floating-point ones as float32.

    The names of nested dictionaries are joined by dots: 'state_dict.features.0.weight'.

    Raises:
        UsageError: the content has none of the formats above.
        OSError: the file cannot be opened.
        RunError: it is damaged or contains Python objects, or the library that reads it is not
            installed.
    """
    path.open('rb').close()  # an OSError here is the system's, not damage
    try:
        arrays = _reader(path)(path)
    except AlexNetError:
        raise
    except Exception as problem:  # each library has its own exceptions for damage
        reason = ' '.join(str(problem).split())[:120]
        raise RunError(
            f'{path} cannot be read ({reason}); if it is damaged, download it again.'
        ) from problem
    with np.errstate(over='ignore'):  # `weights` refuses the infinity that results
        for name, array in arrays.items():
            if jnp.issubdtype(array.dtype, jnp.floating):  # NumPy does not know bfloat16
                arrays[name] = np.asarray(array, np.float32)
    return arrays


def _reader(path: Path) -> Callable[[Path], Arrays]:
    with path.open('rb') as file:
        start = file.read(9)
    if start.startswith(b'PK'):
        with zipfile.ZipFile(path) as archive:
            is_npz = all(name.endswith('.npy') for name in archive.namelist())
        return files.read_npz if is_npz else _read_torch
    if start.startswith(b'\x80'):  # a pickle, as torch.save wrote before PyTorch 1.6
        return _read_torch
    if start.endswith(b'{'):  # after 8 bytes with the length of the JSON header
        return _read_safetensors
    raise UsageError(
        f'{path} is not a weight file of PyTorch, safetensors or NumPy (.npz); for a .caffemodel '
        f'see python -m alexnet_jax weights --help.'
    )


def _read_safetensors(path: Path) -> Arrays:
    with library('safetensors', 'weights').safe_open(path, framework='np') as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file; {} for other formats."""
    if _reader(path) is not _read_safetensors:
        return {}
    with library('safetensors', 'weights').safe_open(path, framework='np') as file:
        return file.metadata() or {}


class _Ignored:
    """A stand-in for Python objects other than tensors, whose own classes are not run."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: Path) -> Arrays:
    torch = library('torch', 'torch')
    return {
        name: (x.detach().float() if x.is_floating_point() else x.detach()).numpy()
        for name, x in _leaves(_load(torch, path))
        if isinstance(x, torch.Tensor)
    }


def _load(torch: Any, path: Path) -> Any:
    """Return a file's contents by PyTorch's own restricted loader.

    Training programs save more than weights: torchvision's saves an argparse.Namespace, others save
    NumPy scalars. The loader refuses such names one by one; each gets a stand-in.
    """
    names: list[str] = []
    while True:
        try:
            with torch.serialization.safe_globals([(_Ignored, name) for name in names]):
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as problem:
            reason = ' '.join(str(problem).split())
            refused = re.search(r'GLOBAL (\S+) was not an allowed global', reason)
            if refused is None or refused[1] in names:
                break
            names.append(refused[1])
    found = re.search(r'GLOBAL (\S+)', reason)
    raise RunError(
        f'{path} is damaged, or contains Python objects ({found[1] if found else "unreadable"}), '
        f'which are not loaded, for safety; save only model.state_dict().'
    )


def _leaves(tree: Any, *path: str) -> list[tuple[str, Any]]:
    """Return all values of nested dictionaries, their keys joined by dots."""
    if not isinstance(tree, Mapping):
        return [('.'.join(path), tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, *path, str(key))]
