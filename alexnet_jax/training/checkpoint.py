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
import functools
import hashlib
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
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

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
        others = ', '.join(str(step) for step in steps(path.parent) if str(step) != path.name)
        super().__init__(
            f'checkpoint {path.name} in {path.parent} is damaged: {reason}; other steps: '
            f'{others or "none"}'
        )


class Restored(NamedTuple):
    """The contents of a checkpoint: step, state, and the `extra` it was saved with.

    The state is of NumPy arrays in nested dicts; `fit_to` gives it the structure that was saved.
    """

    step: int
    state: dict[str, Any]
    extra: dict[str, Any]


# ------------------------------------------------------------------------------------ writing


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a workdir, saved in the background.

    The latest two, in case one is damaged, and the one with the lowest validation error are kept.
    Nothing is created or deleted before the first save, so other processes may read while one
    trains.

    Args:
        directory: the folder of the checkpoints, created by the first save.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        self._saving: tuple[int, ocp.CheckpointManager] | None = None

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(
        self, step: int, state: PyTree, extra: Mapping[str, Any], *, error: float | None
    ) -> None:
        """Start to save `state`, which may be donated or overwritten as soon as this returns.

        Args:
            step: number of training steps done; higher than that of any checkpoint here.
            state: tree of NumPy arrays, or of jax arrays that this process holds in full.
            extra: JSON values that belong to the state (tuples come back as lists).
            error: validation error, minimised by 'best'; None or not finite: not a candidate.

        Raises:
            RunError: this checkpoint, or the one before it, could not be written; earlier ones are
                unchanged. Failures in the background are raised by the next save or wait.
        """
        self.wait()
        # As NumPy arrays: Orbax would compile a slice for each array and each device.
        arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(state).items()}
        with futures.ThreadPoolExecutor() as pool:  # a GB/s on each core
            described = dict(zip(arrays, pool.map(describe, arrays.values()), strict=True))
        rank = float(error) if error is not None and math.isfinite(error) else None
        manifest = {'step': step, 'error': rank, 'extra': extra, 'leaves': described}
        manifest = json.loads(json.dumps(manifest))
        _quiet_orbax()
        with self._report_failure(step):
            self._sweep()
            # BestN's own metrics file has no checksum, and a damaged one stops every later start.
            best = best_step(self.directory, (rank, step))
            kept = [LatestN(2), CustomSteps([step if best is None else best])]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(kept),
                lightweight_initialize=True,
                todelete_subdir='deleted',  # a deletion cut short must not look like a checkpoint
            )
            self._saving = step, _Manager(self.directory, options=options)
            # An unwritable folder, if found by Orbax, leaves unawaited coroutines.
            tempfile.TemporaryFile(dir=self.directory).close()
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(_nested(arrays)),
                manifest=ocp.args.JsonSave(manifest | {'sha256': _sha256_of_json(manifest)}),
            )
            self._saving[1].save(step, args=args, force=True)

    def wait(self) -> None:
        """Wait until the last save is on disk and superseded checkpoints are deleted.

        Raises:
            RunError: the save failed; raised once.
        """
        if self._saving is not None:
            step, manager = self._saving
            with self._report_failure(step):
                manager.close()
            self._saving = None
            self._sweep()

    @contextlib.contextmanager
    def _report_failure(self, step: int) -> Generator[None]:
        """Turn a failure to write into one sentence, and remove what was written."""
        try:
            yield
        except Exception as problem:
            saving, self._saving = self._saving, None
            with contextlib.suppress(Exception):  # its threads must have ended before the removal
                if saving is not None:
                    saving[1].close()
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


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which would record what a save after a preemption was worth.

    That fails in a resumed run: `lightweight_initialize` gives its checkpoints times without zone.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


# ------------------------------------------------------------------------------------ reading


def steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    names = (path.name for path in directory.glob('[0-9]*'))
    return sorted(int(name) for name in names if name.isdecimal())


def best_step(directory: Path, *more: tuple[float | None, int]) -> int | None:
    """Return the step with the lowest validation error (of two equal, the later), or None.

    `more` are (error, step) of checkpoints that are not on disk yet.
    """
    found = [*more]
    for step in steps(directory):
        with contextlib.suppress(Damaged):
            found.append((_read_manifest(directory / str(step))['error'], step))
    ranks = [(error, -step) for error, step in found if error is not None]
    return -min(ranks)[1] if ranks else None


def read(directory: Path, step: Step = 'latest') -> Restored:
    """Read and verify one checkpoint.

    Args:
        directory: the folder of the checkpoints.
        step: a step, 'latest' or 'best'.

    Raises:
        UsageError: there is no such step, or no checkpoint has a validation error.
        RunError: there is no checkpoint, or it is damaged.
    """
    return _read(_chosen(directory, step))


def read_extra(directory: Path, step: Step = 'latest') -> dict[str, Any]:
    """Return the `extra` of a checkpoint without reading its arrays or initialising devices.

    Raises:
        UsageError, RunError: see `read`.
    """
    return _read_manifest(_chosen(directory, step))['extra']


def _chosen(directory: Path, step: Step) -> Path:
    there = [*map(str, steps(directory))]
    if not there:
        raise RunError(f'no checkpoint in {directory}; train first with --mode=train.')
    number = str(step)
    if step == 'latest':
        number = there[-1]
    elif step == 'best':
        number = str(best_step(directory))
    if number not in there:
        what = 'with a validation error' if step == 'best' else f'of step {step}'
        raise UsageError(
            f'no checkpoint {what} in {directory}; choose another of latest, best, '
            f'{", ".join(there)}.'
        )
    return directory / number


def read_newest_intact(directory: Path) -> Restored | None:
    """Read the newest checkpoint that verifies; None where there is no checkpoint.

    Damaged ones newer than it are reported and renamed to `damaged-<step>`, never deleted.
    Of several processes, the first decides which step that is.

    Raises:
        RunError: all are damaged. None is renamed then, as a later start would begin at step 0.
    """
    found = _newest_intact(directory) if distributed.is_first() else None
    if distributed.several():
        own = np.int32(-1 if found is None else found.step)
        step = int(multihost_utils.broadcast_one_to_all(own))
        if found is None and step >= 0:
            # Verified here too: this host may read other bytes than the first one.
            found = _read(directory / str(step))
    return found


def _newest_intact(directory: Path) -> Restored | None:
    damaged: dict[Path, Damaged] = {}
    for step in reversed(steps(directory)):
        path = directory / str(step)
        try:
            found = _read(path)
        except Damaged as damage:
            damaged[path] = damage
            continue
        for bad, damage in damaged.items():
            aside = bad.with_name(f'damaged-{bad.name}')
            while aside.exists():
                aside = aside.with_name(f'{aside.name}-1')
            bad.rename(aside)
            log(f'{damage}; it was renamed to {aside.name}; resuming from step {step}')
        return found
    if damaged:
        reasons = '; '.join(map(str, damaged.values()))
        raise RunError(
            f'no checkpoint in {directory} is intact ({reasons}); move them elsewhere to start over'
        )
    return None


def fit_to(like: PyTree, state: Mapping[str, Any], directory: Path) -> PyTree:
    """Return a restored state in the structure of `like`, whose leaves have shape and dtype.

    Raises:
        RunError: other leaves, shapes or dtypes were saved to `directory`.
    """
    arrays, wanted = traverse_util.flatten_dict(dict(state), sep='/'), _named_leaves(like)
    here, there = ({k: f'{x.dtype}{list(x.shape)}' for k, x in y.items()} for y in (wanted, arrays))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise RunError(
                f'the checkpoint in {directory} does not match this run: {name} is '
                f'{there.get(name, "absent")} in the checkpoint and {here.get(name, "absent")} in '
                f'this run; use the config that it was saved with'
            )
    return jax.tree.structure(like).unflatten(arrays[name] for name in wanted)


# -------------------------------------------------------------------- leaves and the manifest


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, such as 'params/conv1/kernel'."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(leaves), sep='/')


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
            same = digest == first_format.with_name('manifest.json.sha256').read_text()
        else:
            manifest = json.loads((path / 'manifest' / 'metadata').read_bytes())
            same = manifest.pop('sha256') == _sha256_of_json(manifest)
        same = same and str(manifest['step']) == path.name
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


def _read(path: Path) -> Restored:
    """Read and verify the checkpoint in a folder."""
    manifest = _read_manifest(path)
    saved = manifest['leaves']
    arrays = _read_arrays(path, list(saved))
    for name, array in arrays.items():
        if describe(array) != saved[name]:
            raise Damaged(path, f'leaf {name} does not match its sha256')
    arrays = {RENAMED.get(name, name): array for name, array in arrays.items()}
    return Restored(manifest['step'], _nested(arrays), manifest['extra'])


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
            tree = reader.restore(path.absolute() / 'state', args=args)
        except Exception as problem:  # damage may raise anything
            raise Damaged(path, _reason(problem)) from problem
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep='/').items()}


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
        if record.name == 'absl':
            return '/orbax/' not in record.pathname
        return not re.search('/orbax/|OCDBT', record.getMessage())  # OCDBT: TensorStore's format

    sys.unraisablehook = hook
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(keep)
