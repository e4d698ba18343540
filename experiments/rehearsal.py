"""The way of ImageNet from its tar files to an error, with other photographs, cut off on the way.

    python -m experiments.rehearsal --pictures=FOLDER --scratch=FOLDER

FOLDER of photographs: any, such as Debian's packages of desktop backgrounds carry. Archives in the
official layout are made of them (official_tars.py: 1000 classes, 50,000 validation pictures, the
odd files of the real ones), prepared, and trained on with the recipe of imagenet2012 and a narrow
net, images read from their files by threads. Preparation and training are each done twice:
undisturbed, and killed with SIGKILL at some moment and given the same command again. Then both
nets are evaluated, one on all 50,000. What each step took goes to results/rehearsal.jsonl. The
error says nothing: with six pictures a class, cut from a few dozen photographs, nothing is learnt.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexnet_jax import command
from alexnet_jax.errors import RunError
from alexnet_jax.training import metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / 'results' / 'rehearsal.jsonl'
LAYERS = {'conv1': 16, 'conv2': 32, 'conv3': 48, 'conv4': 48, 'conv5': 32, 'fc6': 256, 'fc7': 256}
TRAINING = {
    'batch_size': 128,
    'epochs': 5,
    'model.init_scaling': 'fan_in',  # so narrow a net would be dead otherwise
    'data.resident_gib': 0,  # from its files
    'data.validation': 'validation[:1000]',
    'data.test': 'validation[:1000]',
    'loop.checkpoint_every_epochs': 0.5,
    'loop.evaluate_every_epochs': 5,
    'loop.tensorboard': False,
} | {f'model.{name}.features': count for name, count in LAYERS.items()}

SCORES = ('images', 'centre', 'ten_views')


def run(words: list[str], log: Path, kill_when: Callable[[float], bool] | None = None) -> dict:
    """A command of this project: seconds, peak memory of its largest process; or killed.

    Raises:
        RunError: it failed, or was done before it could be killed.
    """
    begin = time.perf_counter()
    with log.open('a') as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
        ended = 0
        while kill_when and not ended and not kill_when(time.perf_counter() - begin):
            time.sleep(0.05)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not ended:
            if kill_when:
                os.kill(child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
    secs, code = time.perf_counter() - begin, os.waitstatus_to_exitcode(status)
    child.returncode = code  # Popen would wait for it again
    if code != (-signal.SIGKILL if kill_when else 0):
        raise RunError(f'{" ".join(words[:3])} ended with exit code {code}: see {log}.')
    return {'secs': round(secs, 1), 'main_process_mib': usage.ru_maxrss // 1024}


def digest(folder: Path) -> str:
    """Of all files of a data set and their names."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            whole.update(str(path.relative_to(folder)).encode() + b'\0')
            with path.open('rb') as file:
                whole.update(hashlib.file_digest(file, 'sha256').digest())
    return whole.hexdigest()


def prepare(tars: Path, scratch: Path) -> list[dict[str, Any]]:
    """Undisturbed into data/, cut off and resumed into again/: the same bytes."""
    log = scratch / 'prepare.log'
    words = ['-m', 'experiments.official_tars', 'prepare', f'--source={tars}']
    whole = run([*words, f'--data_dir={scratch}/data'], log)
    moment = random.uniform(0.2, 0.8) * whole['secs']
    again = [*words, f'--data_dir={scratch}/again']
    killed = run(again, log, kill_when=lambda secs: secs > moment)
    resumed = run(again, log)
    same = digest(scratch / 'data') == digest(scratch / 'again')
    images = json.loads((tars / 'counts.json').read_text())['images']
    size = sum(path.stat().st_size for path in (scratch / 'data').rglob('*') if path.is_file())
    return [
        {'act': 'prepare', 'images': images, 'bytes': size, **whole},
        {'act': 'prepare, killed', **killed},
        {'act': 'prepare, the same command again', **resumed, 'same_bytes': same},
    ]


def training(workdir: Path, data: Path) -> list[str]:
    """The command."""
    flags = {'data.data_dir': data} | TRAINING
    return [
        'main.py',
        '--config=configs/alexnet.py:imagenet2012',
        f'--workdir={workdir}',
        *(f'--config.{name}={value}' for name, value in flags.items()),
    ]


def train(scratch: Path) -> list[dict[str, Any]]:
    """Undisturbed into run/, killed after its second checkpoint and resumed into cut_off/."""
    log, data = scratch / 'train.log', scratch / 'data'
    whole = run(training(scratch / 'run', data), log)
    cut_off = scratch / 'cut_off'
    killed = run(training(cut_off, data), log, kill_when=lambda secs: _checkpoints(cut_off) >= 2)
    resumed = run(training(cut_off, data), log)
    said = [record for record in metrics.read(scratch / 'run') if record['kind'] == 'train']
    whole['steps'] = said[-1]['step']
    for key in ('images_per_sec', 'stall_secs'):
        whole[key] = [record.get(key) for record in said]
    return [
        {'act': 'train', **whole},
        {'act': 'train, killed', **killed},
        {'act': 'train, the same command again', **resumed},
    ]


def _checkpoints(workdir: Path) -> int:
    return sum(path.name.isdigit() for path in (workdir / 'checkpoints').glob('*'))


def evaluate(scratch: Path) -> list[dict[str, Any]]:
    """Both nets on 2,000 pictures, one on all 50,000; one view and ten."""
    rows = []
    # 'validation' alone would be the thousand of the config.
    for split, workdirs in (('validation[:2000]', ('run', 'cut_off')), ('validation[:]', ('run',))):
        for workdir in workdirs:
            log = scratch / f'evaluate_{len(rows)}.log'
            words = ['main.py', '--mode=evaluate', f'--workdir={scratch / workdir}']
            taken = run([*words, f'--split={split}'], log)
            said = json.loads(log.read_text().splitlines()[-1])
            scores = {name: said[name] for name in SCORES}
            rows.append({'act': f'evaluate {workdir} on {split}', **taken, **scores})
    return rows


def main(argv: list[str] | None = None) -> int:
    """All of it; see the head of this file."""
    return command.run('rehearsal', _parser, _act, argv)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog='python -m experiments.rehearsal', description=__doc__)
    parser.add_argument('--pictures', type=command.path, required=True)
    parser.add_argument('--scratch', type=command.path, required=True, help='new; 3 GB')
    return parser


def _act(flags: argparse.Namespace) -> int:
    flags.scratch.mkdir(parents=True)
    tars = flags.scratch / 'tars'
    words = ['-m', 'experiments.official_tars', 'build', f'--pictures={flags.pictures}']
    rows = [{'act': 'build', **run([*words, f'--output={tars}'], flags.scratch / 'build.log')}]
    rows += prepare(tars, flags.scratch)
    rows += train(flags.scratch)
    rows += evaluate(flags.scratch)
    RESULTS.write_text(''.join(json.dumps(row | metrics.environment()) + '\n' for row in rows))
    for row in rows:
        print(row)
    return 0


if __name__ == '__main__':
    sys.exit(main())
