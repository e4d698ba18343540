"""Measure throughput against PyTorch, naive Flax, and the machine's roofline.

    python -m experiments.throughput                             # all parts: an hour on two cores
    python -m experiments.throughput --parts=steps --nets=2012 --batches=64 --rounds=3 \\
        --kinds=ours,torch --without=compiled --out=quick        # some minutes
    python -m experiments.throughput --page                      # only rewrite the tables

Parts: steps (baselines.py, roofline.py), layers (layers.py), feeding and start (input_pipeline.py).
Benchmarks alternate: each round takes one sample of each, with as many steps as fill --sample_secs.
Figures are medians over the rounds, and ratios are medians of the ratios in each round. A row that
is measured again replaces the old one in experiments/results/throughput/<device>.json.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

# Less than half of a GPU's memory for JAX: PyTorch, or the process of a cold start, needs some too.
# Before JAX is imported.
os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.45')

from alexnet_jax import command
from alexnet_jax.parallel import cpu
from experiments.output import write_text
from experiments.throughput import input_pipeline, layers, steps, tables
from experiments.throughput.results import RESULTS, keep
from experiments.throughput.steps import KINDS, NETS, platform

PARTS = {  # (measures the rows, formats some of them)
    'steps': (steps.measure_all, tables.steps_tables),
    'layers': (layers.measure_all, tables.layer_tables),
    'feeding': (input_pipeline.feeding, tables.feeding_table),
    'start': (input_pipeline.start, tables.start_table),
}


def _words(*known: str) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(','))
        if known and (odd := {*found} - {*known}):
            raise argparse.ArgumentTypeError(f"'{odd.pop()}' is not one of {', '.join(known)}")
        return found

    return words


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.throughput', description=(__doc__ or '').splitlines()[0]
    )
    add = parser.add_argument
    for name, known in (('parts', tuple(PARTS)), ('nets', tuple(NETS)), ('kinds', KINDS)):
        add(f'--{name}', type=_words(*known), default=known, help=', '.join(known))
    what = 'batch sizes (default: 64,128 on a CPU, 128,1024 on a GPU)'
    add('--batches', type=lambda text: tuple(map(int, text.split(','))), default=(), help=what)
    what = 'PyTorch variants to skip, for example compiled,NCHW'
    add('--without', type=_words(), default=(), help=what)
    what = 'default: float32 on a CPU, bfloat16 on a GPU'
    add('--dtype', choices=('float32', 'bfloat16'), help=what)
    add('--rounds', type=command.positive, default=5, help='number of rounds')
    what = 'approximate seconds per benchmark and round'
    add('--sample_secs', type=float, default=0.5, help=what)
    add('--out', type=command.path, default=RESULTS, help='folder for the results')
    add('--page', action='store_true', help='only write the tables, without measuring')
    return parser


def act(flags: argparse.Namespace) -> None:
    """Measure the parts asked for, store them, and write the tables."""
    if not flags.page:
        cpu.set_up_cpu(0)  # as the trainer does, and before JAX looks at its devices
        flags.dtype = flags.dtype or ('float32' if platform() == 'cpu' else 'bfloat16')
        for part in flags.parts:
            measure, tabulate = PARTS[part]
            for row in measure(flags):
                keep(flags.out, part, row)
                print(tabulate([row]), flush=True)
    write_text(flags.out / 'tables.md', tables.page(flags.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.run('throughput', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
