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
import itertools
import json
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import distributed, mesh
from alexnet_jax.training import manifest as manifests
from alexnet_jax.training.manifest import Damaged, named_leaves, nested

PyTree = Any
Step = int | str  # a number, 'latest' or 'best'

_NO_STEP = -1


class Restored(NamedTuple):
    """The contents of a checkpoint: step, state, and the `extra` it was saved with."""

    step: int
    state: PyTree
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of a workdir: saved in the background, verified on restore.

    By default the latest two are kept, in case one is damaged. Nothing is created or deleted before
    the first save, so other processes may read while one trains.

    Args:
        directory: the folder of the checkpoints, created by the first save.
        keep_latest: number of highest steps to keep, at least 1.
        keep_best: number of lowest validation errors to keep besides.
        report: called with one sentence for each damaged checkpoint that is set aside.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] = absl.logging.warning,
    ):
        self.directory = Path(directory).absolute()
        self._latest, self._best, self._report = LatestN(keep_latest), _BestN(keep_best), report
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __enter__(self) -> 'Checkpoints':
        return self

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
        wait: bool = False,
    ) -> None:
        """Start to save `state`, which may be donated or overwritten as soon as this returns.

        Args:
            step: number of training steps done; higher than that of any checkpoint here.
            state: tree of jax arrays (any sharding) and numpy arrays.
            extra: JSON values that belong to the state (tuples come back as lists).
            error: validation error, minimised by 'best'; None or not finite: not a candidate.
            wait: return only when the checkpoint is on disk.

        Raises:
            RunError: this checkpoint, or the one before it, could not be written; earlier ones are
                unchanged. Failures in the background are raised by the next save, wait or close.
        """
        self.wait()
        leaves, extra = named_leaves(state), json.loads(json.dumps(extra))
        candidate = error is not None and math.isfinite(error)
        with self._report_failure(step):  # gathering fails too when a process is lost
            with futures.ThreadPoolExecutor() as pool:  # a GB/s on each core
                # As NumPy arrays: Orbax would compile a slice for each array and each device.
                arrays = {name: manifests.to_host(leaf) for name, leaf in leaves.items()}
                described = dict(
                    zip(arrays, pool.map(manifests.describe, arrays.values()), strict=True)
                )
            rank = float(error) if candidate else None
            manifest = manifests.make(step, rank, extra, described)
            manager = self._manager or self._open()
            # An unwritable folder, if found by Orbax, leaves unawaited coroutines.
            tempfile.TemporaryFile(dir=self.directory).close()
            self._best.errors[step] = rank
            self._saving = step
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(nested(arrays)),
                manifest=ocp.args.JsonSave(manifest),
            )
            manager.save(step, args=args, force=True)
        if wait:
            self.wait()

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
        self._best.errors = self._errors()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([self._latest, self._best]),
            lightweight_initialize=True,
            todelete_subdir='deleted',  # a deletion cut short must not look like a checkpoint
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
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
            reason = manifests.reason(problem)
            if distributed.several() and not manifests.DISK.search(reason):
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

    # -------------------------------------------------------------- list

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        names = (path.name for path in self.directory.glob('[0-9]*'))
        return sorted(int(name) for name in names if name.isdecimal())

    def best_step(self) -> int | None:
        """Return the step with the lowest validation error (of two equal, the later), or None."""
        return next(iter(_ranked(self._errors())), None)

    def _errors(self) -> dict[int, float | None]:
        errors = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                errors[step] = manifests.read(self.directory / str(step))['error']
        return errors

    # -------------------------------------------------------------- restore

    def extra(self, step: Step = 'latest') -> dict[str, Any]:
        """Return the `extra` of a checkpoint without reading its arrays or initialising devices.

        Raises:
            UsageError, RunError: see `restore`.
        """
        with self._chosen(step) as path:
            return manifests.read(path)['extra']

    def restore(self, target: PyTree | None, step: Step = 'latest') -> Restored:
        """Read and verify one checkpoint.

        Args:
            target: tree of arrays or `jax.ShapeDtypeStruct`s (with shardings) with the structure,
                shapes and dtypes that were saved. A leaf with a sharding is put on it, others are
                NumPy arrays. None: return all leaves, as nested dicts of NumPy arrays.
            step: a step, 'latest' or 'best'.

        Raises:
            UsageError: there is no such step, or no checkpoint has a validation error.
            RunError: there is no checkpoint, it is damaged, or a leaf does not fit the target.
        """
        with self._chosen(step) as path:
            return _placed(_read(path, target), target)

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
        if number not in steps:
            raise UsageError(
                f'no checkpoint of step {step!r} in {self.directory}; choose latest, best or one '
                f'of the steps {listed}.'
            )
        try:
            yield self.directory / str(number)
        except Damaged as damage:
            raise Damaged(f'{damage}; choose another of the steps {listed}') from damage

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
            own = np.int32(_NO_STEP if found is None else found.step)
            step = int(multihost_utils.broadcast_one_to_all(own))
            if found is None and step != _NO_STEP:
                # Verified here too: this host may read other bytes than the first one.
                found = _read(self.directory / str(step), target)
        return None if found is None else _placed(found, target)

    def _newest_intact(self, target: PyTree | None) -> Restored | None:
        damaged: list[tuple[Path, Damaged]] = []
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                found = _read(path, target)
            except Damaged as damage:
                damaged.append((path, damage))
                continue
            for bad, damage in damaged:
                aside = bad.rename(_free(bad.with_name(f'damaged-{bad.name}')))
                self._report(f'{damage}; it was renamed to {aside.name}; resuming from step {step}')
            return found
        if not damaged:
            return None
        reasons = '; '.join(str(damage) for _, damage in damaged)
        raise RunError(
            f'no checkpoint in {self.directory} is intact ({reasons}); '
            'move them elsewhere to start over'
        )


def read(directory: Path, step: Step = 'latest') -> Restored:
    """Read a checkpoint of unknown structure; see `Checkpoints.restore` with target None."""
    return Checkpoints(directory).restore(None, step)


@dataclasses.dataclass
class _BestN:
    """Orbax's BestN by the errors in the manifests.

    BestN's own metrics file has no checksum, and a damaged one stops every later start.
    """

    n: int
    errors: dict[int, float | None] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = _ranked(self.errors)[: self.n]
        return [info.step in best for info in checkpoints]


def _ranked(errors: Mapping[int, float | None]) -> list[int]:
    """Return the steps that have an error, best first; of two equal, the later first."""
    ranks = {step: (error, -step) for step, error in errors.items() if error is not None}
    return sorted(ranks, key=ranks.__getitem__)


def _free(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    names = itertools.chain([path.name], (f'{path.name}-{n}' for n in itertools.count(1)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


# ------------------------------------------------------------------ reading one


def _read(path: Path, target: PyTree | None) -> Restored:
    """Read and verify all leaves as nested NumPy arrays; `target` is only compared with."""
    manifest = manifests.read(path)
    saved = manifest['leaves']
    if target is not None:
        now = {manifests.RENAMED.get(name, name): leaf for name, leaf in saved.items()}
        manifests.check_fits(path, now, named_leaves(target))
    arrays = _read_arrays(path, list(saved))
    for name, array in arrays.items():
        if manifests.describe(array) != saved[name]:
            raise manifests.damaged(path, f'leaf {name} does not match its sha256')
    arrays = {manifests.RENAMED.get(name, name): array for name, array in arrays.items()}
    return Restored(manifest['step'], nested(arrays), manifest['extra'])


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    _quiet_orbax()
    me = jax.process_index()  # without waiting for the other processes
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    args = ocp.args.PyTreeRestore(
        item=nested(dict.fromkeys(names, 0)),
        restore_args=nested(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))),
        partial_restore=True,
    )
    with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as reader:
        try:
            tree = reader.restore(path / 'state', args=args)
        except Exception as problem:  # damage may raise anything
            raise manifests.damaged(path, manifests.reason(problem)) from problem
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep='/').items()}


def _placed(found: Restored, target: PyTree | None) -> Restored:
    if target is None:
        return found
    arrays = traverse_util.flatten_dict(found.state, sep='/')
    leaves = [
        mesh.put_global(arrays[name], like.sharding) if hasattr(like, 'sharding') else arrays[name]
        for name, like in named_leaves(target).items()
    ]
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
