"""The rank of this process among several, from flags or from a launcher's environment variables.

Imports no JAX. An unknown launcher or an incomplete description is an error: otherwise each process
would train a separate net.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alexnet_jax.errors import UsageError

FLAGS = {
    'coordinator': '--coordinator_address',
    'processes': '--num_processes',
    'process': '--process_id',
}
ADDRESS = 'JAX_COORDINATOR_ADDRESS'
# Environment variables: number of processes, index, and the source of process 0's address in JAX.
LAUNCHERS = (
    ('JAX_NUM_PROCESSES', ('JAX_PROCESS_ID', 'JOB_COMPLETION_INDEX'), ADDRESS),
    ('TPU_WORKER_HOSTNAMES', ('TPU_WORKER_ID',), 'TPU_WORKER_HOSTNAMES'),
    ('OMPI_COMM_WORLD_SIZE', ('OMPI_COMM_WORLD_RANK',), 'OMPI_MCA_orte_hnp_uri'),
    ('SLURM_STEP_NUM_TASKS', ('SLURM_PROCID',), 'SLURM_STEP_NODELIST'),
    ('PMI_SIZE', ('PMI_RANK',), ADDRESS),  # MPICH, Intel MPI
    ('WORLD_SIZE', ('RANK',), ADDRESS),  # torchrun
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe this process where no launcher does."""
    add = parser.add_argument
    add('--coordinator_address', metavar='HOST:PORT', help='address of process 0')
    add('--num_processes', type=int, help='number of processes, if no launcher sets it')
    add('--process_id', type=int, help='rank of this process, from 0')


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Index and number of the processes, and of those on this host.

    coordinator: 'host:port' of process 0; None if JAX finds it by the launcher's variables.
    """

    process: int
    processes: int
    coordinator: str | None
    local_process: int = 0
    local_processes: int = 1


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> ProcessInfo | None:
    """Return the index of this process, by flags or a launcher's variables; None if it is alone.

    Raises:
        UsageError: the description is impossible or incomplete.
    """
    flags: dict[str, Any] = {'coordinator': coordinator, 'processes': processes, 'process': process}
    values = _from_launcher(environ) | {k: v for k, v in flags.items() if v is not None}
    if not values or values.get('processes') == 1:
        return None
    if missing := [flag for name, flag in FLAGS.items() if name not in values]:
        known = ' '.join(f'{FLAGS[k]}={v}' for k, v in values.items() if k in FLAGS)
        raise UsageError(
            f'this is one of several processes ({known}), but the description is incomplete; '
            f'also give {" and ".join(missing)}, or --num_processes=1 for a single process.'
        )
    info = ProcessInfo(**values)
    if not 0 <= info.process < info.processes:
        raise UsageError(
            f'--process_id is {info.process}; with {info.processes} processes it must be between 0 '
            f'and {info.processes - 1}.'
        )
    if info.coordinator is not None and not re.fullmatch(r'.+:\d{1,5}', info.coordinator):
        raise UsageError(
            f'--coordinator_address is {info.coordinator}; it must have the form host:port.'
        )
    return info


def _from_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the first launcher with several processes.

    JAX_NUM_PROCESSES=1 counts too: it separates a process from its launcher.
    """
    address = {'coordinator': environ[ADDRESS]} if ADDRESS in environ else {}
    for size, indices, source in LAUNCHERS:
        hosts = size == 'TPU_WORKER_HOSTNAMES'
        processes = environ.get(size, '').count(',') + 1 if hosts else number(environ, size)
        if processes > 1 or (size == 'JAX_NUM_PROCESSES' and size in environ):
            index = next((name for name in indices if name in environ), None)
            values = {} if index is None else {'process': number(environ, index)}
            found = {'coordinator': None} if source in environ else {}
            return {'processes': processes} | values | found | address | _on_this_host(environ)
    return address


def _on_this_host(environ: Mapping[str, str]) -> dict[str, int]:
    if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environ:
        rank, size = (number(environ, f'OMPI_COMM_WORLD_LOCAL_{x}') for x in ('RANK', 'SIZE'))
        return {'local_process': rank, 'local_processes': size}
    if 'SLURM_STEP_TASKS_PER_NODE' in environ:  # '2(x3),1' means 2, 2, 2, 1
        groups = re.findall(r'(\d+)(?:\(x(\d+)\))?', environ['SLURM_STEP_TASKS_PER_NODE'])
        tasks = [int(count) for count, times in groups for _ in range(int(times or 1))]
        rank, node = (number(environ, f'SLURM_{x}ID') for x in ('LOCAL', 'NODE'))
        return {'local_process': rank, 'local_processes': tasks[node]}
    return {}


def number(environ: Mapping[str, str], name: str) -> int:
    """Return an environment variable as a number, 0 if it is not set.

    Raises:
        UsageError: it is no number.
    """
    try:
        return int(environ.get(name, '0'))
    except ValueError:
        raise UsageError(f'{name} is {environ[name]!r}; it must be a whole number.') from None


def coordinator_port(environ: Mapping[str, str]) -> int:
    """Return a port for this job, and for this step of it; JAX's own is shared by all its steps."""
    if 'OMPI_MCA_orte_hnp_uri' in environ:  # '<job * 4096>.0;tcp://...'
        job = int(environ['OMPI_MCA_orte_hnp_uri'].partition('.')[0]) >> 12
    else:
        job = 8 * number(environ, 'SLURM_JOB_ID') + number(environ, 'SLURM_STEP_ID')
    return 61440 + job % 4096


def local_gpus(info: ProcessInfo, environ: Mapping[str, str]) -> list[int] | None:
    """Return this process's share of the visible GPUs; [] for all. JAX's default is one a task.

    None leaves it to JAX_LOCAL_DEVICE_IDS.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in environ:
        return None
    visible = environ.get('CUDA_VISIBLE_DEVICES')
    if visible is None:
        gpus = len(list(Path('/dev').glob('nvidia[0-9]*')))
    else:
        gpus = len([gpu for gpu in visible.split(',') if gpu])
    share = gpus // info.local_processes
    if info.local_processes == 1 or not share:  # fewer GPUs than processes: each has its own
        return []
    return list(range(info.local_process * share, (info.local_process + 1) * share))
