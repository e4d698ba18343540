"""A run's folder: made or recognised, locked, and told what it holds."""

import contextlib
import fcntl
import json
from collections.abc import Generator
from pathlib import Path

import jax

from alexnet_jax import config as configuration
from alexnet_jax import distributed, files, records
from alexnet_jax.config import Config
from alexnet_jax.errors import RunError, UsageError

# What a resumed run may change: where and how it works, but no number of it beyond rounding.
MAY_DIFFER = (
    'data.data_dir',
    'data.resident_gib',
    'data.workers',
    'loop.checkpoint_every_epochs',
    'loop.compilation_cache',
    'loop.on_dead_start',
    'loop.prefetch_batches',
    'loop.tensorboard',
    'mesh.cpu_devices',
    'mesh.data',
    'mesh.placement',
    'mesh.tower',
    'processes.join_timeout_secs',
    'processes.peer_timeout_secs',
)


@contextlib.contextmanager
def open_workdir(config: Config, workdir: Path) -> Generator[None]:
    """Make the folder, or see that it is this config's and nobody else's; note the environment.

    Of several processes the first does it, and the others see that they find the same folder.

    Raises:
        UsageError: the folder holds a run of another config.
        RunError: it cannot be written, another run is at work in it, or processes do not share it.
    """
    with _open(config, workdir) if distributed.is_first() else contextlib.nullcontext():
        distributed.wait_for_all('workdir')
        if not (workdir / 'config.json').exists():
            raise RunError(
                f'process 0 has made {workdir}, and it is not to be seen here; choose a --workdir '
                f'that all processes share.'
            )
        yield


@contextlib.contextmanager
def _open(config: Config, workdir: Path) -> Generator[None]:
    text = configuration.as_json(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / '.lock').open('w')
    except OSError as error:
        raise RunError(
            f'cannot write to {workdir} ({error.strerror}); choose another --workdir.'
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f'another process is training in {workdir}; wait for it.') from error
        path = workdir / 'config.json'
        if path.exists():
            _same_config(json.loads(path.read_text()), json.loads(text), workdir)
        else:
            _write(path, text + '\n')
        _write(workdir / 'environment.json', json.dumps(records.environment(), indent=2) + '\n')
        yield


def use_compilation_cache(where: str, workdir: Path) -> None:
    """Keep compiled programs on disk, so that the next start of the same config is quick."""
    if where != 'none':
        folder = workdir.absolute().parent / '.jax_cache' if where == 'beside' else Path(where)
        jax.config.update('jax_compilation_cache_dir', str(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
        jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _same_config(old: dict, new: dict, workdir: Path) -> None:
    keys = configuration.differences(old, new)
    barred = [key for key in keys if key not in MAY_DIFFER]
    if barred:
        raise UsageError(
            f'{workdir} holds a run of another config, different in {", ".join(barred)}; choose '
            f'another --workdir, or the config it was started with (its config.json).'
        )


def _write(path: Path, text: str) -> None:
    with files.whole(path) as scratch:
        scratch.write_text(text)
