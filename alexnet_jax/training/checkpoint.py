"""Checkpoints by Orbax, verified before a value is used.

This is the only file that imports Orbax. Its CheckpointManager manages the step folders, saves in
the background under a temporary name, and deletes what the retention policies do not preserve:

    checkpoints/
      500/                       one folder per step, renamed to this once complete
        state/                   the arrays, as a nested dict, in Orbax's own format
        manifest/metadata        JSON: step, error, `extra`; dtype, shape and sha256 of each leaf
      damaged-400/               failed verification when a run resumed; kept, not read again

Orbax does not detect a flipped byte in an array file. The manifest therefore contains the sha256 of
each leaf and of itself, and both are verified on restore. Leaves are stored as global arrays, so a
checkpoint can be restored to any sharding.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from alexnet_jax import config_file
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import distributed
from alexnet_jax.training.metrics import log

PyTree = Any
Step = int | str  # a number, 'latest' or 'best'

# Renamed leaves: the names in checkpoints of earlier versions, and the new names.
RENAMED = {'state/drops': 'state/num_lr_drops', 'state/sound': 'state/all_finite'}
DISK = re.compile(
    r'No space left on device|Read-only file system|Permission denied|Not a directory'
)


class Damaged(RunError):
    """A checkpoint whose files differ from what was saved."""

    def __init__(self, path: Path, reason: object):
        super().__init__(f'checkpoint {path.name} in {path.parent} is damaged: {reason}')


class Restored(NamedTuple):
    """The contents of a checkpoint: step, state, and the `extra` it was saved with."""

    step: int
    state: PyTree
    extra: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a workdir: saved in the background, verified on restore.

    The latest two, in case one is damaged, and the one with the lowest validation error are kept.
    Nothing is created or deleted before the first save, so other processes may read while one
    trains.

    Args:
        directory: the folder of the checkpoints, created by the first save.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        self._errors: dict[int, float | None] = {}  # by step, of the checkpoints on disk
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- save

    def save(
        self,
        step: int,
        state: PyTree,
        extra: Mapping[str, Any],
        *,
        error: float | None,
    ) -> None:
        """Start to save `state`, which may be donated or overwritten as soon as this returns.

        Args:
            step: number of training steps done; higher than that of any checkpoint here.
            state: tree of jax arrays (any sharding) and numpy arrays.
            extra: JSON values that belong to the state (tuples come back as lists).
            error: validation error, minimised by 'best'; None or not finite: not a candidate.

        Raises:
            RunError: this checkpoint, or the one before it, could not be written; earlier ones are
                unchanged. Failures in the background are raised by the next save, wait or close.
        """
        self.wait()
        leaves, extra = _named_leaves(state), json.loads(json.dumps(extra))
        rank = float(error) if error is not None and math.isfinite(error) else None
        with self._report_failure(step):  # gathering fails too when a process is lost
            with futures.ThreadPoolExecutor() as pool:  # a GB/s on each core
                # As NumPy arrays: Orbax would compile a slice for each array and each device.
                arrays = {name: _to_host(leaf) for name, leaf in leaves.items()}
                sums = pool.map(describe, arrays.values())
            described = dict(zip(arrays, sums, strict=True))
            manifest = {'step': step, 'error': rank, 'extra': extra, 'leaves': described}
            manager = self._manager or self._open()
            # An unwritable folder, if found by Orbax, leaves unawaited coroutines.
            tempfile.TemporaryFile(dir=self.directory).close()
            self._errors[step] = rank
            self._saving = step
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(_nested(arrays)),
                manifest=ocp.args.JsonSave(manifest | {'sha256': _sha256_of_json(manifest)}),
            )
            manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Wait until the last save is on disk and superseded checkpoints are deleted.

        Raises:
            RunError: the save failed; raised once.
        """
        if self._manager is not None and self._saving is not None:
            with self._report_failure(self._saving):
                self._manager.wait_until_finished()
            self._saving = None
            self._sweep()

    def close(self) -> None:
        """Wait like `wait`, then end the threads of the manager."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def _open(self) -> ocp.CheckpointManager:
        _quiet_orbax()
        self._sweep()
        self._errors = self._read_errors()
        policies = [LatestN(2), _Best(self._errors)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            lightweight_initialize=True,
            todelete_subdir='deleted',  # a deletion cut short must not look like a checkpoint
        )
        self._manager = _Manager(self.directory, options=options)
        return self._manager

    @contextlib.contextmanager
    def _report_failure(self, step: int) -> Generator[None]:
        """Turn a failure to write into one sentence, and remove what was written."""
        try:
            yield
        except Exception as problem:
            manager, self._manager, self._saving = self._manager, None, None
            with contextlib.suppress(Exception):  # its threads must have ended before the removal
                if manager is not None:
                    manager.close()
            self._sweep()
            reason = _reason(problem)
            if distributed.several() and not DISK.search(reason):
                raise  # usually a lost process, which distributed.py reports
            raise RunError(
                f'the checkpoint of step {step} could not be written to {self.directory} '
                f'({reason}); earlier checkpoints are unchanged: free space or make the folder '
                'writable, then run the same command again to resume from the latest one'
            ) from problem

    def _sweep(self) -> None:
        """Remove the remains of saves and deletions that were killed or failed."""
        if distributed.is_first():
            for path in self.directory.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(self.directory / 'deleted', ignore_errors=True)

    # ---------------------------------------------------------------- list

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        names = (path.name for path in self.directory.glob('[0-9]*'))
        return sorted(int(name) for name in names if name.isdecimal())

    def best_step(self) -> int | None:
        """Return the step with the lowest validation error (of two equal, the later), or None."""
        return _best(self._read_errors())

    def _read_errors(self) -> dict[int, float | None]:
        errors = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                errors[step] = _read_manifest(self.directory / str(step))['error']
        return errors

    # ---------------------------------------------------------------- restore

    def extra(self, step: Step = 'latest') -> dict[str, Any]:
        """Return the `extra` of a checkpoint without reading its arrays or initialising devices.

        Raises:
            UsageError, RunError: see `restore`.
        """
        with self._chosen(step) as path:
            return _read_manifest(path)['extra']

    def restore(self, target: PyTree | None, step: Step = 'latest') -> Restored:
        """Read and verify one checkpoint.

        Args:
            target: tree of arrays or `jax.ShapeDtypeStruct`s (with shardings) with the structure,
                shapes and dtypes that were saved. A leaf with a sharding is put on it, others are
                NumPy arrays. A leaf `...` stands for any array. None: return all leaves, as nested
                dicts of NumPy arrays.
            step: a step, 'latest' or 'best'.

        Raises:
            UsageError: there is no such step, or no checkpoint has a validation error.
            RunError: there is no checkpoint, it is damaged, or a leaf does not fit the target.
        """
        with self._chosen(step) as path:
            return _device_put(_read(path, target), target)

    @contextlib.contextmanager
    def _chosen(self, step: Step) -> Generator[Path]:
        """Yield the folder of a step; list the other steps if the block finds damage."""
        self.wait()
        steps = self.steps()
        if not steps:
            raise RunError(f'no checkpoint in {self.directory}; train first with --mode=train.')
        listed = ', '.join(map(str, steps))
        number = self.best_step() if step == 'best' else steps[-1] if step == 'latest' else step
        if number is None:
            raise UsageError(
                f"no checkpoint in {self.directory} has a validation error, so none is the 'best'; "
                f'choose latest or one of the steps {listed}.'
            )
        if str(number) not in map(str, steps):  # a command line gives text
            raise UsageError(
                f'no checkpoint of step {step} in {self.directory}; choose latest, best or one '
                f'of the steps {listed}.'
            )
        try:
            yield self.directory / str(number)
        except Damaged as damage:
            others = ', '.join(str(other) for other in steps if str(other) != str(number))
            raise RunError(f'{damage}; other steps: {others or "none"}') from damage

    def restore_newest_intact(self, target: PyTree | None) -> Restored | None:
        """Read the newest checkpoint that verifies; None where there is no checkpoint.

        Damaged ones newer than it are reported and renamed to `damaged-<step>`, never deleted.
        Of several processes, the first decides which step that is.

        Raises:
            RunError: all are damaged (none is renamed then, as a later start would begin at step
                0), or an intact one does not fit the target.
        """
        self.close()  # as Orbax's manager does not expect its checkpoints to be renamed
        found = self._newest_intact(target) if distributed.is_first() else None
        if distributed.several():
            own = np.int32(-1 if found is None else found.step)
            step = int(multihost_utils.broadcast_one_to_all(own))
            if found is None and step >= 0:
                # Verified here too: this host may read other bytes than the first one.
                found = _read(self.directory / str(step), target)
        return None if found is None else _device_put(found, target)

    def _newest_intact(self, target: PyTree | None) -> Restored | None:
        damaged: dict[Path, Damaged] = {}
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                found = _read(path, target)
            except Damaged as damage:
                damaged[path] = damage
                continue
            for bad, damage in damaged.items():
                aside = bad.rename(_unused(bad.with_name(f'damaged-{bad.name}')))
                log(f'{damage}; it was renamed to {aside.name}; resuming from step {step}')
            return found
        if damaged:
            reasons = '; '.join(map(str, damaged.values()))
            raise RunError(
                f'no checkpoint in {self.directory} is intact ({reasons}); '
                'move them elsewhere to start over'
            )
        return None


def read(directory: Path, step: Step = 'latest') -> Restored:
    """Read a checkpoint of unknown structure; see `Checkpoints.restore` with target None."""
    return Checkpoints(directory).restore(None, step)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which would record what a save after a preemption was worth.

    That fails in a resumed run: `lightweight_initialize` gives its checkpoints times without zone.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


@dataclasses.dataclass
class _Best:
    """Orbax's BestN(1), by the errors in the manifests.

    BestN's own metrics file has no checksum, and a damaged one stops every later start.
    """

    errors: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [info.step == _best(self.errors) for info in checkpoints]


def _best(errors: Mapping[int, float | None]) -> int | None:
    """Return the step with the lowest error (of two equal, the later), or None."""
    ranks = [(error, -step) for step, error in errors.items() if error is not None]
    return -min(ranks)[1] if ranks else None


def _unused(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    numbered = (path.with_name(f'{path.name}-{n}') for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


# -------------------------------------------------------------------- leaves and the manifest


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, such as 'params/conv1/kernel'."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(leaves), sep='/')


def _to_host(leaf: Any) -> np.ndarray:
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


def _read_manifest(path: Path) -> dict[str, Any]:
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
        same = digest == expected and str(manifest['step']) == path.name
        problem = '' if same else 'it does not match its sha256, or is that of another step'
    except Exception as error:  # damage may raise anything
        problem = _reason(error)
    if problem:
        raise Damaged(path, f'manifest: {problem}')
    if 'config' in manifest['extra']:
        manifest['extra']['config'] = config_file.translated(manifest['extra']['config'])
    return manifest


def _reason(problem: BaseException) -> str:
    """Return an exception's message on one line; Orbax's and TensorStore's run to pages."""
    text = ' '.join(str(problem).split()) or type(problem).__name__
    known = DISK.search(text)
    return known[0] if known else text[:200]


# ------------------------------------------------------------------------------ reading one


def _read(path: Path, target: PyTree | None) -> Restored:
    """Read and verify all leaves as nested NumPy arrays; `target` is only compared with."""
    manifest = _read_manifest(path)
    saved = manifest['leaves']
    if target is not None:
        _check_fits(path, saved, _named_leaves(target))
    arrays = _read_arrays(path, list(saved))
    for name, array in arrays.items():
        if describe(array) != saved[name]:
            raise Damaged(path, f'leaf {name} does not match its sha256')
    arrays = {RENAMED.get(name, name): array for name, array in arrays.items()}
    return Restored(manifest['step'], _nested(arrays), manifest['extra'])


def _check_fits(path: Path, saved: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    has = {RENAMED.get(name, name): (x['dtype'], x['shape']) for name, x in saved.items()}
    wants = {
        name: has.get(name) if x is ... else (np.dtype(x.dtype).name, list(x.shape))
        for name, x in target.items()
    }
    for name in [*wants, *has]:
        if has.get(name) != wants.get(name):
            raise RunError(
                f'checkpoint {path} does not match this run: {name} is {has.get(name, "absent")} '
                f'in the checkpoint and {wants.get(name, "absent")} in this run; use the config '
                f'that it was saved with'
            )


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    _quiet_orbax()
    me = jax.process_index()  # without waiting for the other processes
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    args = ocp.args.PyTreeRestore(
        item=_nested(dict.fromkeys(names, 0)),
        restore_args=_nested(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))),
        partial_restore=True,
    )
    with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as reader:
        try:
            tree = reader.restore(path / 'state', args=args)
        except Exception as problem:  # damage may raise anything
            raise Damaged(path, _reason(problem)) from problem
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep='/').items()}


def _device_put(found: Restored, target: PyTree | None) -> Restored:
    """Return the state in the structure of `target`, its leaves on their shardings."""
    if target is None:
        return found
    arrays = traverse_util.flatten_dict(found.state, sep='/')

    def put(array: np.ndarray, like: Any) -> Any:
        if not hasattr(like, 'sharding'):
            return array
        return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])

    leaves = [put(arrays[name], like) for name, like in _named_leaves(target).items()]
    return found._replace(state=jax.tree.structure(target).unflatten(leaves))


@functools.cache
def _quiet_orbax() -> None:
    """Suppress Orbax's log lines and those of asyncio about its failed operations.

    Orbax logs about twenty lines a save, and a traceback besides raising each error. Of operations
    that fail together it awaits one: asyncio prints the others, and some find their loop closed.
    """
    print_it = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            print_it(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        return '/orbax/' not in (record.pathname if record.name == 'absl' else record.getMessage())

    sys.unraisablehook = hook
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(keep)
