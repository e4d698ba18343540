"""Measure throughput beside PyTorch, beside a naive Flax form, and beside the machine's roofline.

    python -m experiments.throughput                             # all parts: an hour on two cores
    python -m experiments.throughput --parts=steps --nets=2012 --batches=64 --rounds=3 \\
        --kinds=ours,torch --without=compiled --out=quick        # some minutes less
    python -m experiments.throughput --parts=layers              # time by layer
    python -m experiments.throughput --page                      # tables and chart of stored rows

| part | what is measured |
|---|---|
| steps | training step and forward pass on a batch on the device, by form of the net (baselines.py), and the roofline (roofline.py) |
| layers | each layer's operations alone, forward and backward, against their rooflines (layers.py) |
| feeding | training on real input against the step on a batch on the device (input_pipeline.py) |
| start | seconds to the first step, with and without a filled compilation cache (input_pipeline.py) |

Benchmarks take turns: each round takes one sample of each, of as many steps as fill --sample_secs.
Figures are medians over the rounds, ratios medians of each round's own ratio. Forms of PyTorch that
took half as long again as its best in the first round are dropped. On a CPU PyTorch's forms run in
a process of their own; ours takes turns with the best of them in another, and with naive Flax in a
third. Results go to experiments/results/throughput/<device>.json, row by row: a row that is
measured again replaces the old one. tables.md and <device>.svg are made from it.
"""  # noqa: E501 (a table)

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Half of a GPU's memory for JAX: PyTorch wants some too. Before JAX is imported.
os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')

from alexnet_jax import command
from alexnet_jax.errors import RunError, UsageError
from alexnet_jax.parallel import cpu
from configs import alexnet
from experiments.throughput import baselines, input_pipeline, layers, results, steps, tables
from experiments.throughput.input_pipeline import INPUTS
from experiments.throughput.results import PARTS, RESULTS
from experiments.throughput.steps import KINDS, NETS, batches, platform

DEVICES = 'JAX_NUM_CPU_DEVICES'
MEASURES = {
    'steps': steps.measure_all,
    'layers': layers.measure_all,
    'feeding': input_pipeline.feeding,
    'start': input_pipeline.start,
}


def apart(flags: argparse.Namespace, part: str) -> None:
    """Run a part in processes of their own, each with the CPU devices that the trainer would use.

    In 'steps', PyTorch's forms run among themselves, ours beside the best of them, then ours beside
    naive Flax: several large programs in one process slow XLA down, and a trainer has its process
    to itself.
    """
    if part == 'feeding':
        for name in flags.inputs:
            devices = alexnet.get_config(INPUTS[name]).mesh.cpu_devices
            _alone(flags, part, devices, f'--inputs={name}')
        return
    for net in flags.nets:
        module, scale = NETS[net]
        devices = module.get_config(scale).mesh.cpu_devices
        if part != 'steps':
            _alone(flags, part, devices, f'--nets={net}')
            continue
        for size, what in itertools.product(batches(net, flags), flags.passes):
            same = (f'--nets={net}', f'--batches={size}', f'--passes={what}')
            for words in _turns(flags, (net, size, flags.dtype, what)):
                _alone(flags, part, devices, *same, *words)


def _turns(flags: argparse.Namespace, name: tuple[Any, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the forms of a row that run beside each other, as flags."""
    ours, torch = '--kinds=ours', 'torch' in flags.kinds and baselines.torch_is_here()
    if torch:
        yield ('--kinds=torch',)
        if 'ours' in flags.kinds:
            kept = results.read(results.path_of(flags.out))['steps']
            best = next(row['torch'] for row in kept if results.name_of('steps', row) == name)
            yield f'{ours},torch', f'--form={best}'
    others = [kind for kind in ('naive',) if kind in flags.kinds]
    yield from ((f'{ours},{kind}',) for kind in others)
    if not torch and not others:
        yield (ours,)


def _alone(flags: argparse.Namespace, part: str, cpu_devices: int, *words: str) -> None:
    """Run this command again, for one part of it."""
    same = [f'--without={",".join(flags.without)}'] if flags.without else []
    if flags.batches and part != 'steps':
        same += [f'--batches={",".join(map(str, flags.batches))}']
    same += [f'--{key}={getattr(flags, key)}' for key in ('dtype', 'rounds', 'sample_secs', 'out')]
    own = [sys.executable, '-m', 'experiments.throughput', f'--parts={part}', *words, *same]
    devices = {DEVICES: str(max(1, cpu_devices))}
    if subprocess.run(own, env=os.environ | devices, check=False).returncode:
        raise RunError(f'{part} {" ".join(words)}: not measured; see above.')


def _words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(','))
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"'{word}' is not one of {', '.join(known)}")
        return found

    return words


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.throughput', description=(__doc__ or '').splitlines()[0]
    )
    add = parser.add_argument
    add('--parts', type=_words(PARTS), default=PARTS, help=', '.join(PARTS))
    add('--nets', type=_words(tuple(NETS)), default=tuple(NETS), help=', '.join(NETS))
    add('--inputs', type=_words(tuple(INPUTS)), default=tuple(INPUTS), help='of feeding')
    add('--batches', type=_numbers, default=(), help='64,128 on a CPU, 128,1024 on a GPU')
    add('--passes', type=_words(baselines.PASSES), default=baselines.PASSES, help='train,forward')
    add('--kinds', type=_words(KINDS), default=KINDS, help=', '.join(KINDS))
    add('--without', type=_some, default=(), help='forms of PyTorch to leave out: compiled,NCHW')
    add('--form', default='', help='the one form of PyTorch to run, as it is called in the tables')
    add('--dtype', choices=('float32', 'bfloat16'), help='float32 on a CPU, bfloat16 on a GPU')
    add('--rounds', type=int, default=5)
    add('--sample_secs', type=float, default=0.5, help='of each benchmark in each round, about')
    add('--out', type=command.path, default=RESULTS, help='where results are kept')
    add('--page', action='store_true', help='measure nothing: write tables and charts')
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(','))


def _some(text: str) -> tuple[str, ...]:
    return tuple(text.split(','))


def act(flags: argparse.Namespace) -> int:
    """Measure the parts asked for, store them, and write the page."""
    if flags.rounds < 1:
        raise UsageError('--rounds must be at least 1.')
    if not flags.page:
        cpu.set_up_cpu(0)  # as the trainer does, and before JAX looks at its devices
        on_cpu = platform() == 'cpu'
        flags.dtype = flags.dtype or ('float32' if on_cpu else 'bfloat16')
        for part in flags.parts:
            # 'start' starts processes anyway, which see the CPU as they like.
            if on_cpu and part != 'start' and DEVICES not in os.environ:
                apart(flags, part)
            else:
                MEASURES[part](flags)
    tables.write(flags.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.run('throughput', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
