"""Settings that only a CPU needs: XLA's devices, threads and options, and malloc's.

XLA asks malloc for its scratch space anew at every step. By default glibc hands such large blocks
back to the system, and page faults fetch them one by one, tens of thousands a step.
"""

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import machine
from alexnet_jax.model import ops

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of malloc.h


def set_up_cpu(cpu_devices: int) -> None:
    """Have a CPU appear as so many devices, unless JAX or the environment has decided already.

    As no more than the cores that this process may use. Call it before anything asks JAX for its
    devices. One device computes in the thread that calls it: malloc keeps more for that than for
    others (`keep_freed`).
    """
    wanted = min(cpu_devices, machine.cores())
    forced = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    # JAX makes the attribute at run time.
    chosen = jax.config.jax_num_cpu_devices > 0  # ty: ignore[missing-attribute]
    if wanted and not forced and not chosen:
        with contextlib.suppress(RuntimeError):  # JAX has looked
            jax.config.update('jax_num_cpu_devices', wanted)
    if not forced and jax.config.jax_num_cpu_devices < 2:  # ty: ignore[missing-attribute]
        jax.config.update('jax_cpu_enable_async_dispatch', False)


def block_on_cpu(result: Any) -> None:
    """Wait for a step on a CPU, where two at once cost each other a third; elsewhere do not."""
    if jax.default_backend() == 'cpu':
        jax.block_until_ready(result)


def update_if_finite(all_finite: Any, advance: Callable[[Any], Any], state: Any) -> Any:
    """`advance(state)` where the scalar `all_finite` holds, else `state`; chosen by platform.

    A CPU runs one branch, in place. On a GPU the host would have to wait for `all_finite`, so that
    nothing could be queued behind it: there each array is selected.
    """
    if ops.platform() == 'cpu':
        return jax.lax.cond(all_finite, advance, lambda same: same, state)
    return jax.tree.map(lambda new, old: jnp.where(all_finite, new, old), advance(state), state)


def compiler_options() -> dict[str, str] | None:
    """XLA's options on this platform, by what `python -m experiments.throughput` gave with each.

    On a CPU: the scheduler that saves memory, half the scratch space, more of which stays in
    caches; matrix products and sums by YNNPACK, the rest, convolutions above all, by Eigen; and
    optimisation barriers that last until loops have been fused, which `ops` counts on.
    """
    if ops.platform() != 'cpu':
        return None
    kinds = ('INDIVIDUAL_DOT', 'REDUCE')
    options = {
        'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
        'xla_cpu_experimental_ynn_fusion_type': ','.join(f'LIBRARY_FUSION_TYPE_{k}' for k in kinds),
        'xla_disable_hlo_passes': 'cse_barrier_expander',
    }
    return {name: value for name, value in options.items() if _understood(name, value)}


@functools.cache
def _understood(name: str, value: str) -> bool:
    """Whether this version of XLA knows an option, as they come and go."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_freed() -> None:
    """Have malloc keep what is freed, as the next step asks for the same again.

    Call it when the step has been compiled: what the compiler frees would be kept too, in pieces,
    among which a step then takes half as long again. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] == 'glibc':
        malloc = ctypes.CDLL(None)
        malloc.mallopt(MMAP_MAX, 0)
        malloc.mallopt(TRIM_THRESHOLD, -1)  # never
