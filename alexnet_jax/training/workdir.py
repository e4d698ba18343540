"""Create, lock and check the folder of a run."""

import contextlib
import fcntl
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax

from alexnet_jax import config_file, files
from alexnet_jax.config import Settings
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import distributed
from alexnet_jax.training import checkpoint, metrics

# Keys that a resumed run may change: they change no number beyond rounding.
# fmt: off
MAY_DIFFER = (
    'data.data_dir', 'data.resident_gib', 'data.workers',
    'loop.checkpoint_every_epochs', 'loop.compilation_cache', 'loop.on_collapsed_init',
    'loop.prefetch_batches', 'loop.profile_steps', 'loop.tensorboard',
    'mesh.cpu_devices', 'mesh.data', 'mesh.placement', 'mesh.tower',
    'processes.join_timeout_secs', 'processes.peer_timeout_secs',
)
# fmt: on
# Keys that an extension may change too: the state has the same arrays under all their values.
EXTENDABLE = ('epochs', 'optimizer.', 'preprocess.noise_until_epoch')


@contextlib.contextmanager
def open_workdir(settings: Settings, workdir: Path, extend: bool = False) -> Generator[None]:
    """Create and lock the folder of a run, compare its config, and record the environment.

    With several processes, the first does it, and the others check that they see the same folder.

    Args:
        settings: of the run; their config is written unless the folder has a checkpoint or a
            recorded step, which a start that failed does not leave.
        workdir: the folder.
        extend: allow changes of EXTENDABLE; the caller then writes the config by `write_config`.

    Raises:
        UsageError: the folder holds a run of another config, or no run to extend.
        RunError: another process trains in it, or processes do not share it.
        OSError: it is not writable.
    """
    with contextlib.ExitStack() as lock:
        if distributed.is_first():
            saved = checkpoint.steps(workdir / 'checkpoints')
            if extend and not saved:
                raise UsageError(f'{workdir} contains no checkpoint to extend; remove --extend.')
            workdir.mkdir(parents=True, exist_ok=True)
            file = lock.enter_context((workdir / '.lock').open('w'))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f'another process is training in {workdir}; wait until it ends.'
                ) from error
            path = workdir / 'config.json'
            if path.exists() and (saved or metrics.read(workdir)):
                _check_same(config_file.read_json(path), settings, workdir, extend)
            else:
                write_config(settings, workdir)
            _write(workdir / 'environment.json', json.dumps(metrics.environment(), indent=2) + '\n')
        distributed.wait_for_all('workdir')
        if not (workdir / 'config.json').exists():
            raise RunError(
                f'process 0 has created {workdir}, but this process does not see it; choose a '
                f'--workdir that all processes share.'
            )
        yield


def write_config(settings: Settings, workdir: Path) -> None:
    """Write config.json."""
    _write(workdir / 'config.json', config_file.as_json(settings.tree) + '\n')


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `differences` of two configs in keys that a resumed run may not change."""
    found = config_file.differences(old, new)
    return {key: values for key, values in found.items() if key not in MAY_DIFFER}


def use_compilation_cache(where: str, workdir: Path) -> None:
    """Keep compiled programs on disk, so that the next start of the same config is fast."""
    if where != 'none':
        folder = workdir.absolute().parent / '.jax_cache' if where == 'beside' else Path(where)
        jax.config.update('jax_compilation_cache_dir', str(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
        jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _check_same(old: Mapping[str, Any], settings: Settings, workdir: Path, extend: bool) -> None:
    allowed = EXTENDABLE if extend else ()
    barred = [key for key in changes(old, settings.tree) if not key.startswith(allowed)]
    if barred:
        raise UsageError(
            f'{workdir} contains a run with a different config: {", ".join(barred)}; choose '
            'another --workdir, or the config it was started with (its config.json). --extend '
            'allows other values of epochs, optimizer and preprocess.noise_until_epoch only.'
        )


def _write(path: Path, text: str) -> None:
    with files.atomic_write(path) as scratch:
        scratch.write_text(text)
