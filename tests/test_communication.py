"""Test the communication of compiled steps of a narrow net against calculations by hand."""

import dataclasses
import functools

import jax
import pytest

from alexnet_jax import config as configuration
from alexnet_jax.analysis import communication
from alexnet_jax.analysis.communication import BOOKKEEPING, UNKNOWN, Collective, Reading
from alexnet_jax.config import MeshShape, Settings
from alexnet_jax.errors import RunError
from alexnet_jax.parallel import mesh as meshes
from alexnet_jax.training import step as steps
from configs import smoke

FLOAT32 = 4
BATCH = 64
SETTINGS = configuration.unpack(smoke.get_config())
# Weights and biases of configs/smoke.py by layer, calculated by hand.
PARAMETERS = {
    'conv1': (11 * 11 * 1 * 12, 12),
    'conv2': (5 * 5 * 6 * 32, 32),
    'conv3': (3 * 3 * 32 * 48, 48),
    'conv4': (3 * 3 * 24 * 48, 48),
    'conv5': (3 * 3 * 24 * 32, 32),
    'fc6': (1 * 1 * 32 * 512, 512),
    'fc7': (512 * 512, 512),
    'fc8': (512 * 10, 10),
}
CONV3_READS, FC6_READS, FC7_READS, CLASSES = 3 * 3 * 32, 1 * 1 * 32, 512, 10  # values an image


@functools.cache
def reading(
    data: int, tower: int = 1, placement: str = 'towers', settings: Settings | None = None
) -> Reading:
    shape = MeshShape(data, tower, placement)
    settings = dataclasses.replace(settings or SETTINGS, mesh=shape)
    return communication.read_step(settings, layout_of(shape))


def two_layers() -> Settings:
    """Return a net that compiles in a quarter of the time of one with eight layers."""
    config = smoke.get_config()
    config.model.layers = ('conv1', 'fc8')
    return configuration.unpack(config)


def layout_of(shape: MeshShape) -> meshes.Layout:
    if jax.device_count() < 8:
        pytest.skip('eight devices are wanted; tests/conftest.py makes them')
    return meshes.make_layout(shape, BATCH)


def table(rows: tuple[Collective, ...]) -> dict[tuple[str, str, str, str], tuple[int, int]]:
    """Return {(layer, pass, kind, axis): (bytes of the array, bytes that a device sends)}."""
    return {
        (row.layer, row.phase, row.kind, row.axis): (row.array_bytes, row.sent_bytes)
        for row in communication.by_layer(rows)
        if row.layer != BOOKKEEPING
    }


# The array's bytes n, and the bytes that a device sends in a run_command.


def gathered(n: int, devices: int) -> tuple[int, int]:
    return n, n * (devices - 1) // devices


def reduced(n: int, devices: int) -> tuple[int, int]:
    return n, 2 * n * (devices - 1) // devices


def towers_by_hand(data: int, tower: int) -> dict:
    """Return the messages of section 3.2: gathers of conv3, fc6, fc7; sums of fc8 and gradients."""
    rows, images = {}, BATCH // data
    if tower == 2:
        for layer, reads in (('conv3', CONV3_READS), ('fc6', FC6_READS), ('fc7', FC7_READS)):
            size = gathered(FLOAT32 * images * reads, 2)
            rows[layer, 'forward', 'all-gather', 'tower'] = size
            rows[layer, 'backward', 'reduce-scatter', 'tower'] = size
        logits = FLOAT32 * images * CLASSES
        rows['fc8', 'forward', 'all-reduce', 'tower'] = reduced(logits, 2)
    if data > 1:
        for layer, (weights, biases) in PARAMETERS.items():
            own = weights // tower + (biases if layer == 'fc8' else biases // tower)
            size = reduced(FLOAT32 * own, data)
            rows[layer, 'gradient', 'all-reduce', 'data'] = size
    return rows


def one_weird_trick_by_hand(devices: int) -> dict:
    """Return the messages: fc layers gather; only convolutions and fc8's bias sum gradients."""
    rows = {}
    for layer, reads in (('fc6', FC6_READS), ('fc7', FC7_READS)):
        size = gathered(FLOAT32 * BATCH * reads, devices)
        rows[layer, 'forward', 'all-gather', 'data'] = size
        rows[layer, 'backward', 'reduce-scatter', 'data'] = size
    logits = gathered(FLOAT32 * BATCH * CLASSES, devices)
    rows['fc8', 'forward', 'reduce-scatter', 'data'] = logits
    rows['fc8', 'backward', 'all-gather', 'data'] = logits
    for layer, (weights, biases) in PARAMETERS.items():
        own = weights + biases if layer.startswith('conv') else biases if layer == 'fc8' else 0
        if own:
            size = reduced(FLOAT32 * own, devices)
            rows[layer, 'gradient', 'all-reduce', 'data'] = size
    return rows


# ------------------------------------------------------------------------------------ placements


@pytest.mark.parametrize('shape', [(1, 2), (2, 1), (2, 2)])
def test_towers_communicate_only_where_the_papers_gpus_did(shape):
    rows = reading(*shape).collectives
    assert table(rows) == towers_by_hand(*shape)
    assert all(row.array_bytes <= 8 for row in rows if row.layer == BOOKKEEPING)  # scalars
    gradients = [row for row in rows if row.phase == 'gradient']
    assert len(gradients) == (2 * len(PARAMETERS) if shape[0] > 1 else 0)  # one a parameter


def test_one_weird_trick_gathers_images_and_units():
    rows = reading(4, placement='one_weird_trick').collectives
    assert table(rows) == one_weird_trick_by_hand(4)
    assert all(row.array_bytes <= 8 for row in rows if row.layer == BOOKKEEPING)


def test_one_device_communicates_nothing():
    assert reading(1, 1, settings=two_layers()).collectives == ()


def test_cross_tower_communication_follows_the_layer_table():
    """conv3 reads its own tower and conv4 reads both: conv4 gathers instead of conv3."""
    config = smoke.get_config()
    config.model.conv3.reads, config.model.conv4.reads = 'own', 'all'
    found = table(reading(1, 2, settings=configuration.unpack(config)).collectives)
    expected = {key: size for key, size in towers_by_hand(1, 2).items() if key[0] != 'conv3'}
    size = gathered(FLOAT32 * BATCH * 3 * 3 * 48, 2)
    expected['conv4', 'forward', 'all-gather', 'tower'] = size
    expected['conv4', 'backward', 'reduce-scatter', 'tower'] = size
    assert found == expected


def test_unintended_communication_is_detected(monkeypatch):
    """Subtracting the mean over the batch sums over all devices, outside any layer."""
    apply = steps.augment.apply

    def centred(*args):
        pixels = apply(*args)
        return pixels - pixels.mean(axis=0, keepdims=True)

    monkeypatch.setattr(steps.augment, 'apply', centred)
    shape = MeshShape(2, 1)
    settings = dataclasses.replace(two_layers(), mesh=shape)
    rows = communication.read_step(settings, layout_of(shape)).collectives
    (stray,) = [row for row in rows if row.layer == UNKNOWN]
    assert (stray.kind, stray.axis) == ('all-reduce', 'data')
    assert stray.array_bytes == FLOAT32 * 64 * 64


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize('shape', [(2, 1), (2, 2)])
def test_the_compilers_memory_is_of_one_device(shape):
    """The arguments are the shards of one device."""
    data, tower = shape
    own = sum(w // tower + (b if n == 'fc8' else b // tower) for n, (w, b) in PARAMETERS.items())
    images = BATCH // data * (64 * 64 * 1 + FLOAT32)  # uint8 pixels, int32 labels
    statistics = FLOAT32 * (64 * 64 * 1 + 1 * 1)
    scalars = FLOAT32 * 4 + 1  # seed, step, the optimiser's step, num_lr_drops; all_finite
    held = reading(*shape).memory
    assert held['arguments'] == 2 * FLOAT32 * own + images + statistics + scalars


def test_two_towers_halve_the_memory_of_a_device():
    full, half = reading(2, 1).memory, reading(2, 2).memory
    weights, biases = (sum(sizes) for sizes in zip(*PARAMETERS.values(), strict=True))
    fc8 = PARAMETERS['fc8'][1]  # its biases are replicated
    assert full['state'] == 2 * FLOAT32 * (weights + biases)
    assert half['state'] == 2 * FLOAT32 * ((weights + biases - fc8) // 2 + fc8)
    # Pixels and gathered maps are not halved. Measured: 0.61.
    assert half['temporaries'] < 0.75 * full['temporaries']


def test_one_weird_trick_splits_fully_connected_layers_over_all_devices():
    held = reading(4, placement='one_weird_trick').memory
    conv = sum(sum(sizes) for name, sizes in PARAMETERS.items() if name.startswith('conv'))
    fc = sum(sum(PARAMETERS[name]) for name in ('fc6', 'fc7')) + PARAMETERS['fc8'][0]
    assert held['state'] == 2 * FLOAT32 * (conv + fc // 4 + PARAMETERS['fc8'][1])


# --------------------------------------------------------------------------------------- XLA's text


def read(line: str) -> tuple[Collective, ...]:
    """Read a program of one collective on two arrays, %a of 8 x 4 and %b of 4 values."""
    mesh = layout_of(MeshShape(4, 2)).mesh
    text = f'  %a = f32[8,4]{{1,0}} parameter(0)\n  %b = bf16[4]{{0}} parameter(1)\n  {line}\n'
    return communication.collectives(text, mesh, ['fc6', 'fc7'])


@pytest.mark.parametrize(
    ('groups', 'axis', 'devices'),
    [
        ('{{0,1},{2,3},{4,5},{6,7}}', 'tower', 2),
        ('{{0,2,4,6},{1,3,5,7}}', 'data', 4),
        ('{{0,1,2,3,4,5,6,7}}', 'data+tower', 8),
        ('{}', 'data+tower', 8),
        ('{{0,3},{1,2},{4,7},{5,6}}', 'other', 2),
        ('[4,2]<=[8]', 'tower', 2),
        ('[2,4]<=[4,2]T(1,0)', 'data', 4),
        ('[1,8]<=[8]', 'data+tower', 8),
        ("mesh['a'=4,'b'=2] {'b'}", 'tower', 2),
        ("mesh['a'=4,'b'=2] {'a'}", 'data', 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 'data+tower', 8),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", 'tower', 2),
    ],
)
def test_groups_of_devices_in_every_form(groups, axis, devices):
    (row,) = read(f'%x = f32[8,4]{{1,0}} all-reduce(%a), replica_groups={groups}, to_apply=%sum')
    assert (row.axis, row.devices, row.array_bytes) == (axis, devices, 128)
    assert row.sent_bytes == 2 * 128 * (devices - 1) // devices


def test_groups_in_an_unknown_form():
    with pytest.raises(RunError, match='in an unknown form'):
        read('%x = f32[8,4]{1,0} all-reduce(%a), replica_groups=<every other one>, to_apply=%sum')


def test_groups_of_one_device_communicate_nothing():
    groups = ','.join(f'{{{i}}}' for i in range(8))
    assert read(f'%x = f32[8,4] all-reduce(%a), replica_groups={{{groups}}}, to_apply=%s') == ()


TOWER = 'replica_groups={{0,1},{2,3},{4,5},{6,7}}'


@pytest.mark.parametrize(
    ('call', 'kind', 'array', 'sent'),
    [
        ('f32[16,4]{1,0} all-gather(%a)', 'all-gather', 256, 128),
        ('f32[4,4]{1,0} reduce-scatter(%a)', 'reduce-scatter', 128, 64),
        ('f32[8,4]{1,0} all-reduce(%a)', 'all-reduce', 128, 128),
        ('f32[8,4]{1,0} all-to-all(%a)', 'all-to-all', 128, 64),
        ('f32[8,4]{1,0} collective-permute(%a)', 'collective-permute', 128, 128),
        ('(f32[8,4], f32[16,4]{1,0:T(8,128)}) all-gather-start(%a)', 'all-gather', 256, 128),
        ('f32[8,4]{1,0} all-reduce-start(%a)', 'all-reduce', 128, 128),
        ('((f32[8,4]), f32[4,4]) reduce-scatter-start(%a)', 'reduce-scatter', 128, 64),
    ],
)
def test_every_kind_and_its_asynchronous_form(call, kind, array, sent):
    who = 'source_target_pairs={{0,1},{1,0}}' if 'permute' in kind else TOWER
    axis = 'other' if 'permute' in kind else 'tower'
    (row,) = read(f'%x = {call}, {who}, metadata={{op_name="jit(f)/jvp()/fc6/x"}}')
    assert (row.kind, row.array_bytes, row.sent_bytes) == (kind, array, sent)
    assert (row.layer, row.phase, row.axis) == ('fc6', 'forward', axis)


def test_the_end_of_an_asynchronous_collective_is_not_counted():
    assert read('%x = f32[16,4]{1,0} all-gather-done(%a)') == ()


@pytest.mark.parametrize(
    'name',
    [
        '(transpose(jvp())/fc6/data_parallel/psum:transpose(jvp())/fc7/data_parallel/psum)',
        'transpose(jvp())/fc6/data_parallel/psum',  # one name for both
    ],
)
def test_merged_arrays_are_a_row_each(name):
    lines = (
        '%m = f32[8,4]{1,0} multiply(%a, %a), metadata={op_name="jit(f)/transpose(jvp())/fc6/mul"}',
        '%n = bf16[4]{0} multiply(%b, %b), metadata={op_name="jit(f)/transpose(jvp())/fc7/mul"}',
        f'%x = (f32[8,4]{{1,0}}, /*index=1*/bf16[4]{{0}}) all-reduce(%m, /*index=1*/%n), {TOWER}, '
        f'to_apply=%s, metadata={{op_name="jit(f)/{name}"}}',
    )
    rows = read('\n  '.join(lines))
    assert [(row.layer, row.phase) for row in rows] == [('fc6', 'gradient'), ('fc7', 'gradient')]
    assert [row.array_bytes for row in rows] == [128, 8]
    assert len({row.instruction for row in rows}) == 1


def test_an_array_without_a_name_is_traced_to_the_layer_that_made_it():
    lines = (
        '%m = f32[8,4]{1,0} multiply(%a, %a), metadata={op_name="jit(f)/transpose(jvp())/fc7/mul"}',
        '%c = f32[8,4]{0,1} copy(%m)',
        f'%x = f32[8,4]{{1,0}} all-reduce(%c), {TOWER}, to_apply=%s, '
        f'metadata={{op_name="jit(f)/transpose(jvp())/data_parallel/psum"}}',
    )
    (row,) = read('\n  '.join(lines))
    assert (row.layer, row.phase) == ('fc7', 'gradient')
