"""The manifest of a checkpoint: step, error, `extra`, and dtype, shape and sha256 of each leaf."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from alexnet_jax import config_file
from alexnet_jax.errors import RunError

PyTree = Any
# Renamed leaves: the names in checkpoints of earlier versions, and the new names.
RENAMED = {'state/drops': 'state/num_lr_drops', 'state/sound': 'state/all_finite'}
DISK = re.compile(
    r'No space left on device|Read-only file system|Permission denied|Not a directory'
)


class Damaged(RunError):
    """A checkpoint whose files differ from what was saved."""


def damaged(path: Path, reason: str) -> Damaged:
    """Return the error for a damaged checkpoint."""
    return Damaged(f'checkpoint {path.name} in {path.parent} is damaged: {reason}')


def reason(problem: BaseException) -> str:
    """Return an exception's message on one line; Orbax's and TensorStore's run to pages."""
    text = ' '.join(str(problem).split()) or type(problem).__name__
    known = DISK.search(text)
    return known[0] if known else text[:200]


# ---------------------------------------------------------------------------------- leaves


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, such as 'params/conv1/kernel'."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves by path as nested dicts."""
    return traverse_util.unflatten_dict(dict(leaves), sep='/')


def to_host(leaf: Any) -> np.ndarray:
    """Return a leaf, however it is sharded, as a NumPy array in every process."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def describe(array: np.ndarray) -> dict[str, Any]:
    """Return dtype, shape and sha256 (of these two and the bytes in C order) of a leaf."""
    dtype, shape = array.dtype.name, list(array.shape)
    digest = hashlib.sha256(f'{dtype}{shape}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {'dtype': dtype, 'shape': shape, 'sha256': digest.hexdigest()}


def _sha256_of_json(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------- manifests


def make(
    step: int, error: float | None, extra: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a manifest with its own sha256; `leaves` are from `describe`, by name."""
    manifest = {'step': step, 'error': error, 'extra': extra, 'leaves': leaves}
    return manifest | {'sha256': _sha256_of_json(manifest)}


def read(path: Path) -> dict[str, Any]:
    """Read and verify the manifest of a checkpoint, given its folder.

    Raises:
        Damaged: it does not match its sha256 or its folder.
    """
    first_format = path / 'manifest' / 'manifest.json'  # until 2026-11; its sha256 beside it
    try:
        if first_format.exists():
            body = first_format.read_bytes()
            manifest = json.loads(body)
            digest = f'{hashlib.sha256(body).hexdigest()}  manifest.json\n'
            expected = first_format.with_name('manifest.json.sha256').read_text()
        else:
            manifest = json.loads((path / 'manifest' / 'metadata').read_bytes())
            expected = manifest.pop('sha256')
            digest = _sha256_of_json(manifest)
    except Exception as problem:  # damage may raise anything
        raise damaged(path, f'manifest: {reason(problem)}') from problem
    if digest != expected:
        raise damaged(path, 'its manifest does not match its sha256')
    if str(manifest['step']) != path.name:
        raise damaged(path, f'it is for step {manifest["step"]}')
    if 'config' in manifest['extra']:
        manifest['extra']['config'] = config_file.translated(manifest['extra']['config'])
    return manifest


def check_fits(path: Path, saved: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Raise RunError with the first leaf whose dtype or shape differs from the target's."""
    has = {name: (leaf['dtype'], leaf['shape']) for name, leaf in saved.items()}
    wants = {name: (np.dtype(x.dtype).name, list(x.shape)) for name, x in target.items()}
    for name in [*wants, *has]:
        if has.get(name) != wants.get(name):
            raise RunError(
                f'checkpoint {path} does not match this run: {name} is {has.get(name, "absent")} '
                f'in the checkpoint and {wants.get(name, "absent")} in this run; use the config '
                f'that it was saved with'
            )
