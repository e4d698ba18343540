"""The training step lowers for CUDA on every mesh, without a GPU: its forms cannot rot unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from alexnet_jax import config as configuration
from alexnet_jax.model import augment, ops
from alexnet_jax.parallel import mesh
from alexnet_jax.training import step
from configs import smoke

MESHES = [
    (1, 1, 'towers'),
    (1, 2, 'towers'),
    (2, 1, 'towers'),
    (4, 2, 'towers'),
    (8, 1, 'towers'),
    (4, 1, 'one_weird_trick'),
]
IMAGES = 1024


def lower(data: int, tower: int, placement: str, dtype: str = 'float32') -> export.Exported:
    """Lower a smoke run's step for CUDA, on as many devices as the mesh has."""
    config = smoke.get_config()
    config.mesh.update(data=data, tower=tower, placement=placement)
    config.model.compute_dtype = dtype
    settings = configuration.unpack(config)
    layout = mesh.make_layout(settings.mesh, settings.batch_size)
    optimizer = step.make_optimizer(settings, IMAGES)
    side, size = 28, settings.batch_size
    abstract = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    batch = {
        'image': abstract((size, side, side, 1), np.uint8, layout.batch_sharding),
        'label': abstract((size,), np.int32, layout.batch_sharding),
    }
    full = layout.replicated
    statistics = augment.Statistics(
        abstract((side, side, 1), jnp.float32, full), abstract((1, 1), jnp.float32, full)
    )
    with ops.traced_for('gpu'):
        train_step, shardings = step.jit_train_step(settings, layout, optimizer, IMAGES)
        shapes = jax.eval_shape(lambda: step.init_state(settings, optimizer))
        state = jax.tree.map(lambda x, s: abstract(x.shape, x.dtype, s), shapes, shardings)
        return export.export(train_step, platforms=['cuda'])(state, batch, statistics)


@pytest.mark.parametrize(('data', 'tower', 'placement'), MESHES)
def test_the_step_lowers_for_cuda(data, tower, placement):
    lowered = lower(data, tower, placement)
    assert lowered.platforms == ('cuda',)
    assert lowered.nr_devices == data * tower
    program = lowered.mlir_module()
    # An accelerator's forms: XLA's own pooling and its gradient, one convolution for all groups,
    # a state selected without a branch, and no barrier, which only a CPU needs.
    assert 'optimization_barrier' not in program
    assert 'stablehlo.case' not in program
    assert program.count('stablehlo.select_and_scatter') == 3
    if tower == 1:
        assert 'feature_group_count = 2' in program


def test_bfloat16_lowers_for_cuda():
    program = lower(1, 1, 'towers', 'bfloat16').mlir_module()
    convolutions = [line for line in program.splitlines() if 'stablehlo.convolution' in line]
    assert convolutions
    assert all('xbf16>' in line for line in convolutions)
