"""main.py as a person starts it: exit codes, one sentence, no traceback.

`start_main` starts Python. `Program` forks a process that has imported everything, and `run_main`
runs the same in this process, where that makes no difference.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import main
from alexnet_jax import command, config_file, machine
from alexnet_jax import config as configuration
from alexnet_jax.data.prepare import command as prepare
from alexnet_jax.model.alexnet import geometry
from configs import smoke
from tests.conftest import CACHE, REPOSITORY
from tests.processes import Program

CONFIG = '--config=configs/smoke.py'


@pytest.fixture(scope='module')
def run_main(data_dir):
    def call(*words: str, data: bool = True):
        if data:
            where = (f'--config.data.data_dir={data_dir}', '--config.loop.compilation_cache=none')
            words = (*words, *where)
        others, values = config_file.split(words)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.run('main.py', main.parser, lambda f: main.main(f, values), others)
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

    return call


@pytest.fixture(scope='module')
def start_main(repository, data_dir, cache_dir):
    def call(*words: str, data: bool = True, **environ: str):
        where = [
            f'--config.data.data_dir={data_dir}',
            f'--config.loop.compilation_cache={cache_dir}',
        ]
        return subprocess.run(
            [sys.executable, 'main.py', *words, *(where if data else ())],
            cwd=repository,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


def one_sentence(done, code: int, *words: str) -> None:
    """Exit code, nothing on stdout, one line that starts with the program's name."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == code, done.stderr
    assert done.stdout == ''
    assert 'Traceback' not in done.stderr
    assert lines[-1].startswith('main.py: '), done.stderr
    for word in words:
        assert word in lines[-1]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ((), 'no --config; try --config=configs/alexnet.py'),
        (('--config=configs/nothing.py',), 'there is no config file configs/nothing.py'),
        ((f'{CONFIG}:huge',), "'huge' is not one of quickstart"),
        ((CONFIG, '--config.bach_size=3'), 'did you mean batch_size?'),
        ((CONFIG, '--config.optimizer.multipliers.conv1=0'), 'configs/finetune.py has it'),
        ((CONFIG, '--config.batch_size=many'), 'batch_size=many: it must be of type int'),
        ((CONFIG, '--config.seed=18446744073709551616'), 'seed must be at least 0 and below 2^64'),
        ((CONFIG, '--config.epochs=1e15', '--workdir={tmp}/w'), 'more than 2^31 steps'),
        ((CONFIG, "--config.model.conv1.ops=('rel',)"), "'rel' is not one of relu"),
        ((CONFIG, '--config.model.input_px=7', '--mode=describe'), 'a kernel of 11 px does not'),
        ((CONFIG, '--config.optimizer.late_freeze.layer=None'), "'None' is not one of none, conv1"),
        ((CONFIG, '--mode=sing'), "invalid choice: 'sing'"),
        ((CONFIG, '--cnfig=x'), 'unrecognized arguments: --cnfig=x'),
        ((CONFIG, 'please'), 'unrecognized arguments: please'),
        ((CONFIG, '--workdir=gs://bucket/x'), 'gs://bucket/x is not a local path'),
        (('--config=configs/finetune.py:quickstart', '--config.init_from=gs://b/run:best'),
         'init_from: gs://b/run:best is not a local path'),
        (('--mode=evaluate', '--workdir={tmp},gs://b/x'), 'gs://b/x is not a local path'),
        (('--mode=evaluate', '--workdir={tmp}', '--data_dir=s3://b'), 's3://b is not a local path'),
        (('--config=configs/alexnet.py:pictures', '--workdir={tmp}/w'), 'data.name is not set'),
        ((CONFIG, '--config.data.name=imagenet99', '--workdir={tmp}/w'), 'imagenet99'),
        ((CONFIG, '--config.data.test=tset', '--workdir={tmp}/w'), 'tset'),
        ((CONFIG, '--config.data.name=fashion_mnist', '--config.model.fc8.features=7',
          '--workdir={tmp}/w'), 'set model.fc8.features=10'),
        ((CONFIG, '--config.mesh.data=3', '--workdir={tmp}/w'),
         'device(s) here; choose divisors'),
        ((CONFIG, '--step=best', '--workdir={tmp}/w'), '--step needs --mode=evaluate'),
        (('--config=configs/finetune.py:smoke,nonsense', '--workdir={tmp}/w'), 'nonsense'),
    ],
)  # fmt: skip
def test_what_makes_no_sense(run_main, tmp_path, words, message):
    words = [word.replace('{tmp}', str(tmp_path)) for word in words]
    one_sentence(run_main(*words, data=CONFIG in words), 2, message)
    assert not (REPOSITORY / 'gs:').exists()


def test_a_process_ends_with_the_exit_code_and_the_sentence(start_main):
    one_sentence(start_main(CONFIG, '--config.bach_size=3'), 2, 'did you mean batch_size')


def test_no_data_and_no_way_to_get_it(run_main, tmp_path):
    """ImageNet is nothing that this program can fetch: the message names the way."""
    done = run_main(
        '--config=configs/alexnet.py:imagenet2012',
        f'--workdir={tmp_path / "w"}',
        f'--config.data.data_dir={tmp_path}',
        data=False,
    )
    way = 'alexnet_jax prepare imagenet2012 --source=FOLDER'
    one_sentence(done, 1, f"there is no data set 'imagenet2012' in {tmp_path}", way)


def test_a_workdir_that_cannot_be_written(run_main, tmp_path):
    (tmp_path / 'file').write_text('no folder')
    done = run_main(CONFIG, f'--workdir={tmp_path / "file" / "w"}')
    one_sentence(done, 1, f'{tmp_path}/file/w: Not a directory')


def test_home_is_expanded(run_main, trained, data_dir, tmp_path, monkeypatch):
    """In a flag that a shell leaves as it is, and in a value of a config; spaces are cut.

    The config is that of a run, and the same numbers come of it.
    """
    workdir, first = trained
    (tmp_path / 'data').symlink_to(data_dir)
    (tmp_path / 'cache').symlink_to(CACHE)
    where = ('--config.data.data_dir=~/data', '--config.loop.compilation_cache= ~/cache')
    words = (f'--config={workdir}/config.json', '--workdir=~/runs/w', *where)
    program = Program(words, tmp_path / 'log', cwd=tmp_path, HOME=str(tmp_path))
    assert program.wait() == 0, program.err
    assert {path.name for path in tmp_path.iterdir()} == {'data', 'cache', 'log', 'runs'}
    assert program.out.partition(' on ')[0] == first.stdout.partition(' on ')[0]
    old, new = (json.loads((w / 'config.json').read_text()) for w in (workdir, tmp_path / 'runs/w'))
    assert [*config_file.differences(old, new)] == ['data.data_dir', 'loop.compilation_cache']
    monkeypatch.setenv('HOME', str(tmp_path))
    done = run_main('--mode=evaluate', f'--workdir= ~/runs/w , {workdir}', data=False)
    assert len(json.loads(done.stdout)['members']) == 2


def test_a_platform_that_is_not_there(start_main, trained):
    words = ('--mode=evaluate', f'--workdir={trained[0]}')
    done = start_main(*words, data=False, JAX_PLATFORMS='cuda')
    one_sentence(done, 2, 'the environment variable JAX_PLATFORMS=cuda')


def test_a_reader_that_has_seen_enough(repository, trained):
    """No sentence, no traceback, and the exit code of a broken pipe."""
    command = f'{sys.executable} main.py --mode=evaluate --workdir={trained[0]}; echo $? >&2'
    done = subprocess.run(
        ['bash', '-c', f'({command}) | true'],
        cwd=repository, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    log, code = done.stderr.splitlines()
    assert log.startswith(f'{trained[0]}: step 32, ')
    assert code == '141'


def test_own_pictures_in_one_command(run_main, tmp_path):
    """Classes, channels and splits come from the data; a resumed run finds them the same."""
    rng = np.random.default_rng(0)
    for name, colour in {'blue': 2, 'green': 1, 'red': 0}.items():
        for number in range(60):
            pixels = rng.integers(0, 60, (40, 50, 3), np.uint8)
            pixels[..., colour] += 150
            file = tmp_path / 'mine' / name / f'{number}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    words = ['folder', f'--source={tmp_path}/mine', f'--data_dir={tmp_path}', '--px=32']
    assert prepare.main([*words, '--validation=0.1', '--test=0.1']) == 0
    flags = ('--config=configs/alexnet.py:pictures', '--config.data.name=mine',
             '--config.mesh.data=1')  # fmt: skip
    small = ("--config.model.layers=('conv1', 'conv2', 'fc6', 'fc8')",
             '--config.batch_size=16', '--config.epochs=1', '--config.preprocess.resize_px=64',
             '--config.preprocess.image_px=64', '--config.model.input_px=64')  # fmt: skip
    where = (f'--config.data.data_dir={tmp_path}', f'--workdir={tmp_path}/w')
    for _ in range(2):
        done = run_main(*flags, *small, *where, data=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('alexnet: test accuracy')
    config = json.loads((tmp_path / 'w' / 'config.json').read_text())
    assert (config['model']['fc8']['features'], config['model']['channels']) == (3, 3)
    assert [config['data'][s] for s in ('train', 'validation', 'test')] == [
        'train', 'validation', 'test',
    ]  # fmt: skip
    done = run_main(*flags, *small, *where[:1], '--mode=describe', data=False)
    assert '64 x 64 x 3' in done.stdout


def test_describe_prints_a_page(run_main):
    done = run_main(CONFIG, '--mode=describe', data=False)
    assert done.returncode == 0, done.stderr
    net = configuration.unpack(smoke.get_config()).net
    count = sum(stage.parameters for stage in geometry(net))
    assert f'{count:,} parameters' in done.stdout


@pytest.fixture(scope='module')
def trained(start_main, tmp_path_factory):
    """A smoke run, from the command line to its last line."""
    workdir = tmp_path_factory.mktemp('runs') / 'smoke'
    done = start_main(CONFIG, f'--workdir={workdir}', '--config.mesh.data=1')
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.mark.skipif(machine.cores() < 2, reason='two cores are needed')
def test_a_cpu_appears_as_several_devices(data_dir, tmp_path):
    """Also to a run, which asks JAX about processes before it makes its mesh."""
    few = ('--config.data.train=train[:128]', '--config.data.test=test[:40]', '--config.epochs=1')
    flags = (
        '--config.mesh.cpu_devices=2',
        '--config.loop.tensorboard=False',
        '--config.loop.compilation_cache=none',
        f'--config.data.data_dir={data_dir}',
    )
    where = f'--workdir={tmp_path}/w'
    program = Program((CONFIG, where, *few, *flags), tmp_path / 'log')
    assert program.wait() == 0, program.err
    assert 'on 2 device(s) of kind cpu: data 2 x tower 1' in program.err
    for devices in (1, 2):
        more = f'--config.mesh.cpu_devices={devices}'
        program = Program(('--mode=evaluate', where, more), tmp_path / 'log')
        assert program.wait() == 0, program.err
        assert f'40 images of test[:40], on data {devices} x tower 1' in program.err


def test_training_prints_the_accuracy_and_the_workdir(trained):
    workdir, done = trained
    (line,) = done.stdout.splitlines()
    assert line.startswith('smoke: test accuracy 0.')
    assert line.endswith(str(workdir))
    for name in ('config.json', 'environment.json', 'metrics.jsonl', 'predictions_test.npz'):
        assert (workdir / name).is_file()
    environment = json.loads((workdir / 'environment.json').read_text())
    assert {'jax', 'commit', 'devices', 'platform'} <= environment.keys()


def test_evaluation_repeats_the_runs_figures(run_main, trained):
    workdir, _ = trained
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    (final,) = [record for record in records if record['kind'] == 'test']
    done = run_main('--mode=evaluate', f'--workdir={workdir}', data=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['images'] == 500
    assert result['steps'] == [32]
    for key in ('centre', 'ten_views', 'class_accuracy'):
        assert result[key] == final[key]


def test_an_evaluation_may_take_smaller_batches_but_no_other_net(run_main, trained):
    workdir, _ = trained
    words = (CONFIG, '--mode=evaluate', f'--workdir={workdir}')
    done = run_main(*words, '--config.loop.eval_batch_size=64', '--config.seed=0', data=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    found = json.loads(done.stdout)['centre']
    assert found['nll'] == pytest.approx(records[-1]['centre']['nll'], rel=1e-5)
    done = run_main(*words, '--config.model.init_scaling=none', data=False)
    one_sentence(done, 2, '--config.model.init_scaling has no effect on an evaluation')


def test_evaluation_of_the_best_and_of_a_step(run_main, trained):
    workdir, _ = trained
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    errors = {r['step']: r['top1_error'] for r in records if r['kind'] == 'validation'}
    for step in ('best', '16'):
        done = run_main(
            '--mode=evaluate', f'--workdir={workdir}', f'--step={step}', '--split=validation',
            data=False,
        )  # fmt: skip
        result = json.loads(done.stdout)
        best = min(errors, key=lambda at: errors[at]) if step == 'best' else 16
        assert result['steps'] == [best]
        assert result['centre']['top1_error'] == errors[best]


def test_an_ensemble_of_one_run_twice_is_that_run(run_main, trained):
    workdir, _ = trained
    done = run_main('--mode=evaluate', f'--workdir={workdir},{workdir}', data=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result['members']) == 2
    assert result['centre']['top1_error'] == result['members'][0]['centre']['top1_error']


def test_a_finished_run_prints_its_result_again(run_main, trained):
    workdir, first = trained
    metrics = (workdir / 'metrics.jsonl').read_text()
    done = run_main(CONFIG, f'--workdir={workdir}', '--config.mesh.data=1')
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.stdout
    assert (workdir / 'metrics.jsonl').read_text() == metrics


def test_a_workdir_of_another_config(run_main, trained):
    workdir, _ = trained
    done = run_main(CONFIG, f'--workdir={workdir}', '--config.batch_size=32', '--config.seed=7')
    one_sentence(done, 2, 'batch_size, seed', 'choose another --workdir')


def test_a_step_that_is_not_there(run_main, trained):
    workdir, _ = trained
    done = run_main('--mode=evaluate', f'--workdir={workdir}', '--step=17', data=False)
    one_sentence(done, 2, '17', '16, 32')
    done = run_main('--mode=evaluate', f'--workdir={workdir}', '--step=soon', data=False)
    one_sentence(done, 2, 'soon', '16, 32')


def test_evaluating_an_empty_workdir(run_main, tmp_path):
    one_sentence(
        run_main('--mode=evaluate', f'--workdir={tmp_path}', data=False), 1, 'no checkpoint'
    )


def test_a_damaged_checkpoint_is_set_aside(run_main, trained, tmp_path):
    workdir = tmp_path / 'copy'
    shutil.copytree(trained[0], workdir)
    newest = workdir / 'checkpoints' / '32'
    array = max(newest.joinpath('state').rglob('*'), key=lambda p: p.stat().st_size)
    body = bytearray(array.read_bytes())
    body[len(body) // 2] ^= 1
    array.write_bytes(body)
    done = run_main('--mode=evaluate', f'--workdir={workdir}', data=False)
    one_sentence(done, 1, '32')
    done = run_main(CONFIG, f'--workdir={workdir}', '--config.mesh.data=1')
    assert done.returncode == 0, done.stderr
    assert 'damaged-32' in done.stderr
    assert 'resuming at step 16' in done.stderr
    assert (workdir / 'checkpoints' / 'damaged-32').is_dir()
    strip = trained[1].stdout.partition(' after ')[0]
    assert done.stdout.startswith(strip)
