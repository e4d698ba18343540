"""What a session with an accelerator is spent on, in the order of its worth.

    python -m experiments.gpu [--out=experiments/results/gpu] [--workdirs=workdirs] [--steps=1,2,3]

Each step is a command of its own with a time limit; its output goes to <out>/<step>.log, and one
that fails does not stop the rest. The logs of finished runs are copied to <out>/<run>/.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

# No jax here: the parent would hold the memory that its children want.
STEPS = (
    # (name, seconds at most, command); results are kept row by row, so a limit loses the rest only
    ('smoke', 120, 'main.py --config=configs/smoke.py --workdir={workdirs}/smoke'),
    ('steps_2012', 590, '-m experiments.throughput --parts=steps --nets=2012'),
    ('layers', 240, '-m experiments.throughput --parts=layers --nets=2012'),
    (
        'time_to_accuracy',
        590,
        '-m experiments.time_to_accuracy --workdir={workdirs}/time_to_accuracy',
    ),
    ('feeding', 400, '-m experiments.throughput --parts=feeding'),
    (
        'fashion_mnist',
        500,
        'main.py --config=configs/alexnet.py:fashion_mnist --workdir={workdirs}/fashion_mnist',
    ),
    *(
        (
            f'fashion_mnist_{name}',
            500,
            f'main.py --config=configs/variant_{name}.py:fashion_mnist '
            f'--workdir={{workdirs}}/fashion_mnist_{name}',
        )
        for name in ('d2l', 'gluon')
    ),
    ('start', 400, '-m experiments.throughput --parts=start --rounds=3'),
    (
        'steps_others',
        590,
        '-m experiments.throughput --parts=steps --nets=2012_without_LRN,torchvision,quickstart',
    ),
    (
        'fashion_mnist_lrn',
        500,
        'main.py --config=configs/ablation_lrn.py:fashion_mnist '
        '--workdir={workdirs}/fashion_mnist_lrn',
    ),
)
KEPT = ('config.json', 'environment.json', 'metrics.jsonl')


def run(name: str, limit_secs: float, command: str, out: Path, workdirs: Path) -> str:
    """Run one step; what became of it, in a few words."""
    words = [sys.executable, *command.format(workdirs=workdirs).split()]
    start = time.monotonic()
    with (out / f'{name}.log').open('w') as log:
        try:
            done = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, timeout=limit_secs, check=False
            )
            verdict = 'done' if done.returncode == 0 else f'exit code {done.returncode}'
        except subprocess.TimeoutExpired:
            verdict = f'stopped at its limit of {limit_secs} s'
    keep(workdirs / name, out / name)
    return f'{verdict}, {time.monotonic() - start:.0f} s'


def keep(run_folder: Path, folder: Path) -> None:
    """Copy a run's small logs to where they can be committed."""
    if (run_folder / 'metrics.jsonl').exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copy(run_folder / file, folder / file)


def main() -> None:
    """Run the steps asked for, and say what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('experiments/results/gpu'))
    parser.add_argument('--workdirs', type=Path, default=Path('workdirs'))
    parser.add_argument('--steps', default='', help='numbers from 1, with commas; all by default')
    args = parser.parse_args()
    wanted = [int(number) for number in args.steps.split(',') if number]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (name, limit_secs, command) in enumerate(STEPS, start=1):
        if not wanted or number in wanted:
            print(f'{number}. {name}: {run(name, limit_secs, command, args.out, args.workdirs)}')


if __name__ == '__main__':
    main()
