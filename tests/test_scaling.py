"""Test the rows of the compiled steps: arithmetic by hand, and stored against compiled now."""

import jax
import pytest

from experiments import scaling


def test_xla_counts_the_operations_counted_by_hand():
    """Check XLA's count: 5 to 8 % lower (products with padding), the same on every mesh."""
    rows = scaling.read_lines(scaling.STEPS)
    for one in rows:
        assert 0.92 < one['flops'] / one['flops_by_hand'] < 0.95
        alone = scaling.find(rows, one['net'], 'data', 1)
        assert one['flops'] == pytest.approx(alone['flops'], rel=0.005)


def test_communication_by_hand():
    """Check the bytes a device sends: 8 devices, 1,024 images of the 2012 net."""
    rows = scaling.read_lines(scaling.STEPS)
    data = scaling.find(rows, '2012', 'data', 8)
    assert scaling.sent(data, 'gradient') == 2 * 7 * (4 * 60_965_224) // 8
    towers = scaling.find(rows, '2012', 'towers', 8)
    # conv3, fc6, fc7: half of what 256 images gather, there and back; fc8: twice half the logits.
    units = 13 * 13 * 256 + 9216 + 4096 + 1000
    assert scaling.sent(towers, 'forward', 'backward') == 4 * 256 * units
    trick = scaling.find(rows, '2012', 'one_weird_trick', 8)
    gathered = 4 * 1024 * (9216 + 4096 + 1000)
    assert scaling.sent(trick, 'forward', 'backward') == 2 * gathered * 7 // 8


def test_stored_rows_match_programs_compiled_now():
    if jax.device_count() < 4:
        pytest.skip('four devices are needed; tests/conftest.py makes them')
    case = ('2012', 'one_weird_trick', 4)
    now, kept = scaling.compile_step(*case), scaling.find(scaling.read_lines(scaling.STEPS), *case)
    for phase in ('forward', 'backward', 'gradient'):
        assert scaling.sent(now, phase) == scaling.sent(kept, phase)
    assert now['state_bytes'] == kept['state_bytes']
    assert now['flops'] == pytest.approx(kept['flops'], rel=0.01)  # versions of XLA may differ


def test_the_tables_are_those_of_the_stored_rows():
    assert scaling.TABLES.read_text() == scaling.tables(scaling.read_lines(scaling.STEPS))
