"""CPU settings: XLA's devices, threads and compiler options, and malloc.

XLA allocates its scratch space at every step. By default glibc returns such large blocks to the
system, and every step takes tens of thousands of page faults to get them again.
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

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h


def set_up_cpu(cpu_devices: int) -> None:
    """Let a CPU appear as several devices, unless JAX or the environment has set their number.

    There are at most as many as cores available to this process. Call it before JAX is asked for
    its devices. A single device computes in the calling thread, for which malloc keeps more memory
    than for others (`keep_freed`).
    """
    wanted = min(cpu_devices, machine.cores())
    forced = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    # JAX defines the attribute at run time.
    chosen = jax.config.jax_num_cpu_devices > 0  # ty: ignore[missing-attribute]
    if wanted and not forced and not chosen:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update('jax_num_cpu_devices', wanted)
    if not forced and jax.config.jax_num_cpu_devices < 2:  # ty: ignore[missing-attribute]
        jax.config.update('jax_cpu_enable_async_dispatch', False)


def block_on_cpu(result: Any) -> None:
    """Wait for a result on a CPU, where two steps at once slow each other down by a third."""
    if jax.default_backend() == 'cpu':
        jax.block_until_ready(result)


def update_if_finite(all_finite: Any, advance: Callable[[Any], Any], state: Any) -> Any:
    """Return `advance(state)` if the scalar `all_finite` is true, else `state`.

    A CPU runs one branch, in place. On a GPU a branch would make the host wait for `all_finite`
    before it can queue more work, so each array is selected instead.
    """
    if ops.platform() == 'cpu':
        return jax.lax.cond(all_finite, advance, lambda same: same, state)
    return jax.tree.map(lambda new, old: jnp.where(all_finite, new, old), advance(state), state)


def compiler_options() -> dict[str, Any] | None:
    """Return XLA's options for this platform, each measured by `python -m experiments.throughput`.

    On a CPU: the scheduler that saves memory (half the scratch space, so more stays in caches);
    YNNPACK for matrix products and sums, Eigen for the rest, convolutions above all;
    optimisation barriers that are kept until loops have been fused, as `ops` requires; and loops
    emitted as LLVM code directly, which compiles in two thirds of the time, with the same bits.
    """
    if ops.platform() != 'cpu':
        return None
    kinds = ('INDIVIDUAL_DOT', 'REDUCE')
    options: dict[str, Any] = {
        'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
        'xla_cpu_experimental_ynn_fusion_type': ','.join(f'LIBRARY_FUSION_TYPE_{k}' for k in kinds),
        'xla_disable_hlo_passes': 'cse_barrier_expander',
        'xla_cpu_use_fusion_emitters': False,
    }
    return {name: value for name, value in options.items() if _is_known(name, value)}


def init_compiler_options() -> dict[str, int] | None:
    """Return XLA's options for the initial weights: random numbers, drawn once.

    LLVM's full optimisation of them takes longer than that of the training step. The weights are
    the same to the bit.
    """
    return {'xla_backend_optimization_level': 1} if ops.platform() == 'cpu' else None


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Return whether this version of XLA has an option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_freed() -> None:
    """Let malloc keep freed memory, as the next step allocates the same again. glibc only.

    Call it after the step has been compiled: memory freed by the compiler would be kept too, in
    fragments that make a step take half as long again.
    """
    if platform.libc_ver()[0] == 'glibc':
        malloc = ctypes.CDLL(None)
        malloc.mallopt(MMAP_MAX, 0)
        malloc.mallopt(TRIM_THRESHOLD, -1)  # never
