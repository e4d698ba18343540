"""Run the ImageNet pipeline from tar files to an error rate, on substitute photographs.

Preparation and training each run twice: undisturbed, and killed with SIGKILL and started again by
the same command. Each step is a row of experiments/results/dry_run.jsonl. The error rates are
meaningless: with six pictures per class nothing can be learnt.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from alexnet_jax.training import metrics
from experiments.data_bench import substitute
from experiments.data_bench.process import run
from experiments.output import lines, write_text

RESULTS = Path(__file__).parents[1] / 'results' / 'dry_run.jsonl'
LAYERS = {'conv1': 16, 'conv2': 32, 'conv3': 48, 'conv4': 48, 'conv5': 32, 'fc6': 256, 'fc7': 256}
TRAINING = {
    'batch_size': 128,
    'epochs': 5,
    'model.init_scaling': 'fan_in',  # so narrow a net would not train otherwise
    'data.resident_gib': 0,  # read from its files
    'data.validation': 'validation[:1000]',
    'data.test': 'validation[:1000]',
    'loop.checkpoint_every_epochs': 0.5,
    'loop.evaluate_every_epochs': 5,
    'loop.tensorboard': False,
} | {f'model.{name}.features': count for name, count in LAYERS.items()}


def hash_folder(folder: Path) -> str:
    """Return the sha256 of the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + b'\0')
            with path.open('rb') as file:
                total.update(hashlib.file_digest(file, 'sha256').digest())
    return total.hexdigest()


def prepare(tars: Path, scratch: Path) -> list[dict[str, Any]]:
    """Prepare undisturbed into data/, and killed and resumed into again/."""
    log, data, again = scratch / 'prepare.log', scratch / 'data', scratch / 'again'
    words = ['-m', 'experiments.data_bench.substitute', str(tars)]
    undisturbed = run([*words, str(data)], log)
    moment = random.uniform(0.2, 0.8) * undisturbed['secs']
    killed = run([*words, str(again)], log, kill_when=lambda secs: secs > moment)
    resumed = run([*words, str(again)], log)
    images = json.loads((tars / 'counts.json').read_text())
    size = sum(path.stat().st_size for path in data.rglob('*') if path.is_file())
    same = {'same_bytes': hash_folder(data) == hash_folder(again)}
    return [
        {'act': 'prepare', 'images': images, 'bytes': size, **undisturbed},
        {'act': 'prepare, killed', **killed},
        {'act': 'prepare, the same command again', **resumed, **same},
    ]


def train(scratch: Path) -> list[dict[str, Any]]:
    """Train undisturbed into run/, and killed after two checkpoints and resumed into cut_off/."""
    log, complete, cut_off = scratch / 'train.log', scratch / 'run', scratch / 'cut_off'
    flags = {'data.data_dir': scratch / 'data'} | TRAINING
    words = ['main.py', '--config=configs/alexnet.py:imagenet2012']
    words += [f'--config.{name}={value}' for name, value in flags.items()]
    undisturbed = run([*words, f'--workdir={complete}'], log)
    words.append(f'--workdir={cut_off}')
    killed = run(words, log, kill_when=lambda secs: _checkpoints(cut_off) >= 2)
    resumed = run(words, log)
    logged = [record for record in metrics.read(complete) if record['kind'] == 'train']
    series = {key: [row.get(key) for row in logged] for key in ('images_per_sec', 'stall_secs')}
    return [
        {'act': 'train', **undisturbed, 'steps': logged[-1]['step'], **series},
        {'act': 'train, killed', **killed},
        {'act': 'train, the same command again', **resumed},
    ]


def _checkpoints(workdir: Path) -> int:
    return sum(path.name.isdigit() for path in (workdir / 'checkpoints').glob('*'))


def evaluate(scratch: Path) -> list[dict[str, Any]]:
    """Evaluate both nets on 2,000 pictures and one on all 50,000, by one view and by ten."""
    rows = []
    for workdir, images in (('run', ':2000'), ('cut_off', ':2000'), ('run', ':')):
        log, split = scratch / f'evaluate_{len(rows)}.log', f'validation[{images}]'
        words = ['main.py', '--mode=evaluate', f'--workdir={scratch / workdir}', f'--split={split}']
        taken = run(words, log)
        printed = json.loads(log.read_text().splitlines()[-1])
        scores = {name: printed[name] for name in ('images', 'centre', 'ten_views')}
        rows.append({'act': f'evaluate {workdir} on {split}', **taken, **scores})
    return rows


def measure_all(flags: argparse.Namespace) -> None:
    """Build the archives, prepare, train, evaluate, and write the record."""
    tars = flags.scratch / 'tars'
    tars.mkdir(parents=True)
    substitute.build(substitute.photographs(flags.pictures), tars)
    rows = [*prepare(tars, flags.scratch), *train(flags.scratch), *evaluate(flags.scratch)]
    text = lines(row | metrics.environment() for row in rows)
    print(text, end='')
    write_text(RESULTS, text)
