"""Checkpoints that are whole or not there, and that are verified before they are used.

This is the only file that knows Orbax. On disk a workdir's checkpoints look like this:

    checkpoints/
      500/                       one folder a step, which gets this name when it is whole
        state/                   the arrays, as a nested dict, in Orbax's own format
        manifest/manifest.json   step, error, `extra`; dtype, shape and sha256 of each leaf
        manifest/manifest.json.sha256
      500-1/                     step 500 saved again; once it is whole, the first is deleted
      damaged-400/               failed its check when a run resumed; kept, never read again

Orbax restores an array file with a flipped byte without a word, so every leaf carries the sha256 of
its contents and is compared with it on restore. A checkpoint knows nothing of meshes: a leaf is its
global array, whatever devices it lay on, and comes back on whatever sharding the target has.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils

from alexnet_jax import distributed, parallel
from alexnet_jax.errors import RunError, UsageError

PyTree = Any
Step = int | str  # a number, 'latest' or 'best'

_WHOLE = re.compile(r'(\d+)(?:-(\d+))?')
_LEFTOVERS = ('*.orbax-checkpoint-tmp*', '*.deleted')
_FORMAT = 1
_NO_STEP = -1


class Restored(NamedTuple):
    """A checkpoint as read: its step, the state, and the `extra` it was saved with."""

    step: int
    state: PyTree
    extra: dict[str, Any]


class _Damaged(RunError):
    """What lies on disk is not what was saved."""


class Checkpoints:
    """A workdir's checkpoints: saved asynchronously, latest + best kept, verified on restore.

    Two of the latest are kept by default, so that a damaged newest one has one before it. Nothing
    is created or deleted before the first save, so a second process may read while one trains.

    Args:
        directory: the folder of the checkpoints; made by the first save.
        keep_latest: how many of the highest steps are kept.
        keep_best: how many of the lowest validation errors are kept besides.
        report: is handed one sentence for each damaged checkpoint that is set aside.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] = absl.logging.warning,
    ):
        if keep_latest < 1 or keep_best < 0:
            raise UsageError(
                'keep_latest must be at least 1 and keep_best at least 0, '
                f'not {keep_latest} and {keep_best}'
            )
        self.directory = Path(directory).absolute()
        self._keep_latest, self._keep_best, self._report = keep_latest, keep_best, report
        self._writer: ocp.AsyncCheckpointer | None = None
        self._writing: int | None = None

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
        """Starts to save `state`, which may be donated or overwritten as soon as this returns.

        A step that is there already is saved again beside it, and replaces it once it is whole.

        Args:
            step: number of training steps done.
            state: tree of jax arrays (any sharding), numpy arrays and Python numbers.
            extra: what belongs to the state and JSON can hold (tuples come back as lists).
            error: validation error, which 'best' minimises; None or not finite: not a candidate.
            wait: return only when the checkpoint is on disk.

        Raises:
            UsageError: `extra` does not fit into JSON, or a leaf of `state` is not a plain array.
            RunError: this checkpoint, or the one before it, could not be written. Earlier ones
                are untouched. What goes wrong later is raised by the next save, wait or close.
        """
        self.wait()
        leaves = _named_leaves(state)
        manifest = {
            'format': _FORMAT,
            'step': step,
            'error': float(error) if error is not None and math.isfinite(error) else None,
            'extra': _as_json(extra),
        }
        with self._one_sentence(step):
            if self._writer is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                _hush_failed_saves()
                self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            # A folder that cannot be written to is met here; inside Orbax it leaves a mess.
            tempfile.TemporaryFile(dir=self.directory).close()
            self._writing = step
            self._writer.save(
                self.directory / self._free_name(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_nested(leaves)),
                    manifest=_ManifestSave(manifest, {k: _snapshot(x) for k, x in leaves.items()}),
                ),
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk, then deletes what is neither latest nor best.

        Raises:
            RunError: the save failed; said once.
        """
        if self._writer is None or self._writing is None:
            return
        with self._one_sentence(self._writing):
            self._writer.wait_until_finished()
            self._writing = None
            self._prune()

    def close(self) -> None:
        """Waits like `wait`, then lets go of the writer's threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._writer = None

    @contextlib.contextmanager
    def _one_sentence(self, step: int) -> Generator[None]:
        """Says what a failed save raises in one sentence, and clears away what it wrote."""
        try:
            yield
        except Exception as problem:
            self._abandon()
            if jax.process_count() > 1 and isinstance(problem, jax.errors.JaxRuntimeError):
                raise  # a peer is gone: nothing is wrong with the disk
            raise RunError(
                f'the checkpoint of step {step} could not be written to {self.directory} '
                f'({_reason(problem)}); earlier ones are untouched: make room or make the folder '
                'writable, then run the same command again to go on from the latest'
            ) from problem

    def _abandon(self) -> None:
        # A writer that failed may still have threads at work in the folder that is to be removed.
        writer, self._writer, self._writing = self._writer, None, None
        with contextlib.suppress(Exception):
            if writer is not None:
                writer.close()
        with contextlib.suppress(OSError):
            self._sweep()

    def _free_name(self, step: int) -> str:
        versions = [version for s, version, _ in self._whole() if s == step]
        return f'{step}-{versions[-1] + 1}' if versions else str(step)

    def _prune(self) -> None:
        newest = {step: path for step, _, path in self._whole()}
        keep = sorted(newest)[-self._keep_latest :] + self._ranked()[: self._keep_best]
        keep_paths = {newest[step] for step in keep}
        for _, _, path in self._whole():
            if path not in keep_paths and jax.process_index() == 0:
                # Renamed first: a deletion cut short must not leave what looks like a checkpoint.
                path.rename(path.with_name(f'{path.name}.deleted'))
        self._sweep()

    def _sweep(self) -> None:
        """Removes what a killed or failed save and a killed deletion leave behind."""
        if jax.process_index() == 0:
            for pattern in _LEFTOVERS:
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path)

    # -------------------------------------------------------------- what is there

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending; one still being written is not among them."""
        return sorted({step for step, _, _ in self._whole()})

    def latest_step(self) -> int | None:
        """The highest step, or None where there is no checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest validation error (the later of two equals), or None."""
        return next(iter(self._ranked()), None)

    def _whole(self) -> list[tuple[int, int, Path]]:
        """(step, version, folder), ascending, so the last of a step is its newest version."""
        if not self.directory.is_dir():
            return []
        found = ((_WHOLE.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted((int(m[1]), int(m[2] or 0), p) for m, p in found if m and p.is_dir())

    def _ranked(self) -> list[int]:
        """Steps that have a validation error, best first."""
        errors = {}
        for step, _, path in self._whole():
            with contextlib.suppress(_Damaged):
                errors[step] = _read_manifest(path)['error']
        return sorted((s for s in errors if errors[s] is not None), key=lambda s: (errors[s], -s))

    # -------------------------------------------------------------- restore

    def extra(self, step: Step = 'latest') -> dict[str, Any]:
        """What else a checkpoint was saved with, without its arrays and without asking for devices.

        Raises:
            UsageError, RunError: as `restore`.
        """
        with self._chosen(step) as (_, path):
            return _read_manifest(path)['extra']

    def restore(self, target: PyTree | None, step: Step = 'latest') -> Restored:
        """Reads and verifies one checkpoint.

        Args:
            target: tree of arrays or `jax.ShapeDtypeStruct`s (with shardings) of the structure,
                shapes and dtypes that were saved. A jax leaf comes back on its sharding, a numpy
                leaf as numpy, a Python number as one. None: everything as saved, as nested dicts
                of numpy arrays whose keys are strings.
            step: a step, 'latest' or 'best'.

        Raises:
            UsageError: that step is not there, or no checkpoint has a validation error.
            RunError: there is no checkpoint at all; it is damaged (names the leaf); or it does
                not fit the target (names the first leaf that does not).
        """
        with self._chosen(step) as (number, path):
            return _placed(_read(path, number, target), target)

    @contextlib.contextmanager
    def _chosen(self, step: Step) -> Generator[tuple[int, Path]]:
        """Number and folder of a step; damage found in the block comes with advice."""
        self.wait()
        number = self._resolve(step)
        try:
            yield number, {s: p for s, _, p in self._whole()}[number]
        except _Damaged as damage:
            others = ', '.join(str(s) for s in self.steps() if s != number)
            advice = f'use another step: {others}' if others else 'there is no other step here'
            raise _Damaged(f'{damage}; {advice}') from damage

    def restore_newest_sound(self, target: PyTree | None) -> Restored | None:
        """Reads the newest checkpoint that verifies; None where there is no checkpoint.

        Damaged ones newer than it are reported and renamed to `damaged-<step>`, never deleted.

        Raises:
            RunError: all are damaged (and none is touched, so that no later start mistakes this
                workdir for a fresh one), or a sound one does not fit the target.
        """
        self.wait()
        if distributed.is_first():
            found = self._newest_sound(target)
            step = found.step if found else _NO_STEP
            if not distributed.several():
                return found and _placed(found, target)
        else:
            found, step = None, _NO_STEP
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == _NO_STEP:
            return None
        # What is sound for one process may not be for another, on another host.
        found = found or _read({s: p for s, _, p in self._whole()}[step], step, target)
        return _placed(found, target)

    def _newest_sound(self, target: PyTree | None) -> Restored | None:
        damaged: list[tuple[Path, _Damaged]] = []
        for step, _, path in reversed(self._whole()):
            try:
                found = _read(path, step, target)
            except _Damaged as damage:
                damaged.append((path, damage))
                continue
            for bad, damage in damaged:
                aside = self._set_aside(bad)
                self._report(f'{damage}; set aside as {aside.name}, going on from step {step}')
            return found
        if not damaged:
            return None
        reasons = '; '.join(str(damage) for _, damage in damaged)
        raise RunError(
            f'no checkpoint in {self.directory} is sound ({reasons}); '
            'move them elsewhere to start over'
        )

    def _resolve(self, step: Step) -> int:
        steps = self.steps()
        if not steps:
            raise RunError(f'no checkpoint in {self.directory}; train first with --mode=train')
        listed = ', '.join(map(str, steps))
        if step == 'best':
            best = self.best_step()
            if best is None:
                raise UsageError(
                    f'no checkpoint in {self.directory} has a validation error, so none is best; '
                    f"ask for 'latest' or one of the steps {listed}"
                )
            return best
        if step == 'latest':
            return steps[-1]
        if step not in steps:
            raise UsageError(
                f'no checkpoint of step {step!r} in {self.directory}; '
                f"there are 'latest', 'best' and {listed}"
            )
        return step

    def _set_aside(self, path: Path) -> Path:
        names = [f'damaged-{path.name}', *(f'damaged-{path.name}-{n}' for n in range(1, 1000))]
        aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        try:
            return path.rename(aside)
        except OSError as problem:
            raise RunError(
                f'the damaged checkpoint {path} could not be renamed ({problem}); '
                'move it elsewhere by hand'
            ) from problem


def read(directory: Path, step: Step = 'latest') -> Restored:
    """Reads a checkpoint whose structure one does not know: see `Checkpoints.restore` of None."""
    return Checkpoints(directory).restore(None, step)


# ------------------------------------------------------------------ leaves


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, as in 'params/conv1/kernel'."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(p, simple=True, separator='/') or 'value': x for p, x in flat}
    if not flat:
        raise UsageError('the state has no leaf, so there is nothing to save or to restore')
    if len(named) != len(flat):
        raise UsageError(
            'two leaves of the state have the same path; rename a key that holds a "/"'
        )
    for name, leaf in named.items():
        if wrong := _not_saveable(leaf):
            raise UsageError(f'{name} cannot be saved: {wrong}')
    return {k: x if hasattr(x, 'dtype') else np.asarray(x) for k, x in named.items()}


def _not_saveable(leaf: Any) -> str | None:
    if isinstance(leaf, (bool, int, float, complex)):
        return None
    if not hasattr(leaf, 'dtype'):
        return f'it is a {type(leaf).__name__}, not an array; put it into `extra`'
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 'it is a typed PRNG key; save jax.random.key_data of it instead'
    if 0 in leaf.shape:
        return f'its shape {leaf.shape} holds nothing, which Orbax does not write; leave it out'
    return None


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(leaves), sep='/')


def _snapshot(leaf: Any) -> np.ndarray:
    """The global contents on the host, as they are now, whatever happens to `leaf` later.

    On a CPU this is a view without a copy: JAX does not write into a buffer that someone views,
    donated or not. A numpy array can be written to, so it is copied.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _describe(array: np.ndarray) -> dict[str, Any]:
    """Dtype, shape and sha256 (of these two and the bytes in C order) of a leaf."""
    dtype, shape = array.dtype.name, list(array.shape)
    digest = hashlib.sha256(f'{dtype}{shape}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {'dtype': dtype, 'shape': shape, 'sha256': digest.hexdigest()}


# ------------------------------------------------------------------ reading one


def _read(path: Path, step: int, target: PyTree | None) -> Restored:
    """Everything verified, as nested NumPy arrays; `target` is only looked at."""
    manifest = _read_manifest(path)
    if target is not None:
        _check_fits(path, manifest['leaves'], _named_leaves(target))
    return Restored(step, _nested(_read_arrays(path, manifest['leaves'])), manifest['extra'])


def _placed(found: Restored, target: PyTree | None) -> Restored:
    if target is None:
        return found
    arrays = traverse_util.flatten_dict(found.state, sep='/')
    likes, structure = jax.tree.flatten(target)
    leaves = [_place(arrays[n], x) for n, x in zip(_named_leaves(target), likes, strict=True)]
    return found._replace(state=structure.unflatten(leaves))


def _place(array: np.ndarray, like: Any) -> Any:
    if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return array if hasattr(like, 'dtype') else array.item()
    return jax.device_put(array) if like.sharding is None else parallel.place(array, like.sharding)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / 'manifest' / 'manifest.json'
    try:
        body = file.read_bytes()
        expected = file.with_name('manifest.json.sha256').read_bytes()
    except OSError as problem:
        raise _damaged(path, _reason(problem)) from problem
    if expected != _sha256_line(body):
        raise _damaged(path, f'{file.name} does not match its sha256')
    manifest = json.loads(body)
    if manifest['format'] != _FORMAT:
        raise RunError(
            f'checkpoint {path} has format {manifest["format"]}, this code reads {_FORMAT}'
        )
    return manifest


def _read_arrays(path: Path, saved: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All leaves as numpy arrays, each compared with what the manifest says of it."""
    me = jax.process_index()  # a process reads for itself: others need not do so at the same time
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    arrays = {}
    with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as reader:
        for name, expected in saved.items():
            try:
                arrays[name] = _read_leaf(reader, path / 'state', name)
            except Exception as problem:  # damage shows as any of many, down to a bare Exception
                raise _damaged(path, f'leaf {name}: {_reason(problem)}') from problem
            if _describe(arrays[name]) != expected:
                raise _damaged(path, f'leaf {name} does not match its sha256')
    return arrays


def _read_leaf(reader: ocp.Checkpointer, path: Path, name: str) -> np.ndarray:
    # One at a time: of several reads that fail at once, Orbax awaits the first and leaves the rest
    # to asyncio, which prints their tracebacks. It takes 1.2 s instead of 1.05 for 488 MB.
    tree = reader.restore(
        path,
        args=ocp.args.PyTreeRestore(
            item=_nested({name: 0}),
            restore_args=_nested({name: ocp.RestoreArgs(restore_type=np.ndarray)}),
            partial_restore=True,
        ),
    )
    return np.asarray(traverse_util.flatten_dict(tree, sep='/')[name])


def _check_fits(path: Path, saved: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    def fault(name: str, what: str) -> RunError:
        return RunError(
            f'checkpoint {path} does not fit: {name} {what}; was the config or the code changed?'
        )

    for name, like in target.items():
        if name not in saved:
            raise fault(name, 'is wanted and not in it')
        for what in ('shape', 'dtype'):
            has = saved[name][what]
            wants = list(like.shape) if what == 'shape' else np.dtype(like.dtype).name
            if has != wants:
                raise fault(name, f'has {what} {has} in it and {wants} is wanted')
    for name in saved:
        if name not in target:
            raise fault(name, 'is in it and not wanted')


def _damaged(path: Path, reason: str) -> _Damaged:
    return _Damaged(f'checkpoint {path.name} in {path.parent} is damaged: {reason}')


def _reason(problem: BaseException) -> str:
    """The gist of an exception on one line; Orbax's and TensorStore's run to pages."""
    text = ' '.join(str(problem).split()) or type(problem).__name__
    known = re.search(r'No space left on device|Read-only file system|Permission denied', text)
    return known[0] if known else text[:200]


# ------------------------------------------------------------------ Orbax


class _ManifestHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes the manifest as one item of a checkpoint; hashes the leaves in the background."""

    async def async_save(self, directory: Any, args: '_ManifestSave') -> list[ocp.future.Future]:
        async def write() -> None:
            if jax.process_index() == 0:
                leaves = {name: _describe(x) for name, x in args.leaves.items()}
                body = json.dumps({**args.manifest, 'leaves': leaves}, indent=1).encode()
                (directory / 'manifest.json').write_bytes(body)
                (directory / 'manifest.json.sha256').write_bytes(_sha256_line(body))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name='manifest')]

    def save(self, directory: Any, args: '_ManifestSave') -> None:
        raise NotImplementedError('checkpoints are saved asynchronously')

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError('the manifest is read without Orbax')


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    manifest: dict[str, Any]
    leaves: dict[str, np.ndarray]


@functools.cache
def _hush_failed_saves() -> None:
    """Keeps to ourselves the tracebacks that Orbax and TensorStore print beside a failed save.

    Of writes that fail together Orbax awaits one, and asyncio prints the others; those in flight
    find the event loop of that save closed. The failure itself is raised by wait. Once a process is
    enough.
    """
    print_it = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != 'Event loop is closed':
            print_it(unraisable)

    def not_orbax(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ('never retrieved' in text and 'orbax' in text)

    sys.unraisablehook = hook
    logging.getLogger('asyncio').addFilter(not_orbax)


def _sha256_line(body: bytes) -> bytes:
    """As the program sha256sum writes it, so that it can check the file too."""
    return f'{hashlib.sha256(body).hexdigest()}  manifest.json\n'.encode()


def _as_json(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as problem:
        raise UsageError(
            f'`extra` does not fit into JSON ({problem}); put arrays into `state`'
        ) from problem


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return '/orbax/' not in record.pathname.replace('\\', '/')


# Orbax logs some twenty lines a save, and a traceback for each error that this file raises anyway.
logging.getLogger('absl').addFilter(_not_from_orbax)
