import importlib
import shlex

import pytest

import main
from alexnet_jax import config_file
from experiments import gpu, gpu_bundle, run_archive


@pytest.mark.parametrize('step', gpu.STEPS)
def test_every_step_is_a_command_line_that_its_program_accepts(step, tmp_path):
    _, command = gpu.STEPS[step]
    first, *rest = shlex.split(command.format(workdirs=tmp_path / 'w', out=tmp_path / 'o'))
    if first == 'main.py':
        words, overrides = config_file.split(rest)
        flags = main.parser().parse_args(words)
        assert config_file.load(flags.config, overrides)
    else:
        (_, name), *words = rest[0].split('.'), *rest[1:]
        if name in ('contribution_table', 'variants'):
            assert run_archive.parser(name, tmp_path).parse_args(words)
        else:
            name = name.replace('throughput', 'throughput.__main__')
            assert importlib.import_module(f'experiments.{name}')._parser().parse_args(words)


def test_a_step_that_meets_its_limit_is_stopped_and_its_output_kept(tmp_path):
    script = tmp_path / 'slow.py'
    script.write_text('import time; print("begun", flush=True); time.sleep(60)')
    outcome = gpu.run(str(script), tmp_path / 'log', limit_secs=2)
    assert outcome.startswith('stopped at its time limit of 2 s')
    assert (tmp_path / 'log').read_text() == 'begun\n'


def test_the_bundle_pins_every_wheel():
    pinned = gpu_bundle.pinned((*gpu_bundle.WHEELS, *gpu_bundle.SOURCES))
    assert len(pinned) == len(gpu_bundle.WHEELS) + len(gpu_bundle.SOURCES)
