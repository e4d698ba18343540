"""Run everything that needs a GPU, most important first, within a time limit, without a network.

    python -m experiments.gpu [--steps=smoke,ours] [--secs=540] [--archive=FILE.tar.gz]

A step that fails does not stop the rest. A run that reaches its limit saves a checkpoint, and the
same command resumes it. `experiments/gpu_bundle.py` packs what a machine without a network lacks.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

# No jax here: the parent would hold the memory that its children want.
THROUGHPUT = '-m experiments.throughput --rounds=5 --sample_secs=0.3 --out={out}/throughput'
SWEEP = '-m experiments.sweep {name} --scale=quickstart --workdirs={{workdirs}} --parallel=12'
KEEP = (
    '-m experiments.contribution_table --results={{out}}/contribution_table --runs={{workdirs}}/{}'
)
STEPS = {
    # name: (seconds at most, command). On an H100, 26 November 2026: smoke 50 s (all of it
    # compilation), quickstart 30, gluon 44, d2l 47, fashion_mnist 74, table 277 for 95 runs. On an
    # H200, 27 November 2026: throughput 148 for 4 rows, time_to_accuracy 45 to the first step and 4
    # an epoch, bfloat16 and variants 100 for 31 runs, layers 68; feeding was stopped after 120 s,
    # with one of its inputs measured.
    'smoke': (90, 'main.py --config=configs/smoke.py --workdir={workdirs}/smoke'),
    # PyTorch as it is fastest on a GPU: channels_last, compiled, autocast.
    'throughput': (
        240,
        f'{THROUGHPUT} --parts=steps --nets=2012 --kinds=ours,torch --without=NCHW,eager',
    ),
    'time_to_accuracy': (
        120,
        'main.py --config=configs/alexnet.py:fashion_mnist --config.data.validation=test '
        '--config.model.compute_dtype=bfloat16 --workdir={workdirs}/time_to_accuracy',
    ),
    'layers': (90, f'{THROUGHPUT} --parts=layers --nets=2012'),
    'quickstart': (60, 'main.py --config=configs/alexnet.py --workdir={workdirs}/quickstart'),
    'd2l': (90, 'main.py --config=configs/variant_d2l.py:fashion_mnist --workdir={workdirs}/d2l'),
    'gluon': (
        90,
        'main.py --config=configs/variant_gluon.py:fashion_mnist --config.epochs=5 '
        '--workdir={workdirs}/gluon',
    ),
    'fashion_mnist': (
        120,
        'main.py --config=configs/alexnet.py:fashion_mnist --workdir={workdirs}/fashion_mnist',
    ),
    'table': (500, SWEEP.format(name='contribution_table') + ' --seeds=20'),
    'keep_table': (60, KEEP.format('contribution_table-quickstart')),
    'rates': (200, SWEEP.format(name='contribution_rates') + ' --seeds=20'),
    'keep_rates': (60, KEEP.format('contribution_rates-quickstart')),
    'bfloat16': (100, SWEEP.format(name='contribution_bfloat16') + ' --seeds=20'),
    'keep_bfloat16': (60, KEEP.format('contribution_bfloat16-quickstart')),
    'variants': (200, SWEEP.format(name='variants') + ' --seeds=3'),
    'keep_variants': (
        60,
        '-m experiments.variants --results={out}/variants --runs={workdirs}/variants-quickstart',
    ),
    'feeding': (120, f'{THROUGHPUT} --parts=feeding'),
}
SAVE_SECS = 25  # for a run that is stopped
KEPT = ('config.json', 'environment.json', 'metrics.jsonl')


def run(command: str, log: Path, limit_secs: float) -> str:
    """Run one step; return in a few words what became of it."""
    start = time.monotonic()
    with log.open('a') as out:
        child = subprocess.Popen([sys.executable, *command.split()], stdout=out, stderr=out)
        try:
            code = child.wait(limit_secs)
            outcome = 'done' if code == 0 else f'exit code {code}'
        except subprocess.TimeoutExpired:
            outcome = f'stopped at its time limit of {limit_secs:.0f} s'
            child.terminate()
            try:
                child.wait(SAVE_SECS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return f'{outcome}, {time.monotonic() - start:.0f} s'


def keep(run_folder: Path, folder: Path) -> None:
    """Copy a run's small logs to where they can be committed."""
    if (run_folder / 'metrics.jsonl').exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copy(run_folder / file, folder / file)


def pack(out: Path, archive: Path) -> None:
    """Write all results into one compressed archive, complete or not at all."""
    scratch = archive.with_name(archive.name + '.part')
    with tarfile.open(scratch, 'w:gz') as tar:
        tar.add(out, arcname='gpu')
    scratch.replace(archive)


def main() -> None:
    """Run the steps asked for until the time is over, and print what became of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    add = parser.add_argument
    add('--out', type=Path, default=Path('experiments/results/gpu'))
    add('--workdirs', type=Path, default=Path('workdirs'))
    add('--steps', default=','.join(STEPS), help='comma-separated names of steps')
    add('--secs', type=float, default=540, help='time limit for all steps together')
    add('--archive', type=Path, help='.tar.gz of --out, updated after each step')
    args = parser.parse_args()
    end = time.monotonic() + args.secs
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.steps.split(','):
        limit_secs, command = STEPS[name]
        left = end - time.monotonic() - SAVE_SECS
        if left < 10:
            print(f'{name}: not run, no time left', flush=True)
            continue
        command = command.format(workdirs=args.workdirs, out=args.out)
        outcome = run(command, args.out / f'{name}.log', min(limit_secs, left))
        print(f'{name}: {outcome}', flush=True)
        keep(args.workdirs / name, args.out / name)
        if args.archive:
            pack(args.out, args.archive)


if __name__ == '__main__':
    main()
