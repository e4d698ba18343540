"""Traces of training steps: the files, the steps in them, and a run that stays what it was."""

import gzip
import json

import pytest

from alexnet_jax.training import metrics, train
from alexnet_jax.training.callbacks import StepProfiler
from tests.conftest import smoke_config


def traced_steps(workdir):
    """Return the numbers of the steps in the one trace of a workdir."""
    (trace,) = (workdir / 'profile').rglob('*.trace.json.gz')
    assert list(trace.parent.glob('*.xplane.pb'))
    events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
    return sorted(int(e['args']['step_num']) for e in events if 'step_num' in e.get('args', {}))


def losses(workdir):
    return [(r['step'], r['loss']) for r in metrics.read(workdir) if r['kind'] == 'train']


def test_a_run_is_traced_and_its_numbers_stay(smoke_run, data_dir, tmp_path, capsys):
    """The last three of eight steps; a config without the key, as an old one, resumes it."""
    config = smoke_config(data_dir)
    config.loop.profile_steps = 3
    train.run(config, tmp_path)
    assert traced_steps(tmp_path) == [6, 7, 8]
    assert losses(tmp_path) == losses(smoke_run)
    assert f'the trace is in {tmp_path / "profile"}' in capsys.readouterr().err
    assert not (smoke_run / 'profile').exists()
    del config.loop.profile_steps  # a finished run may resume with another value, or without one
    train.run(config, tmp_path)


@pytest.mark.parametrize(
    ('steps', 'start', 'total', 'traced'),
    [
        (5, 0, 100, range(11, 16)),
        (5, 40, 100, range(51, 56)),
        (5, 0, 8, range(4, 9)),  # the run ends early: its last steps
        (50, 0, 8, range(2, 9)),  # but not the one that is compiled
        (5, 99, 100, range(0)),  # the one step that is left
        (0, 0, 100, range(0)),
    ],
)
def test_which_steps_are_traced(tmp_path, steps, start, total, traced):
    assert StepProfiler(tmp_path, steps, start, total).steps == traced
