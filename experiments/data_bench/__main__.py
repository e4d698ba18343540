"""Measure data preparation and reading.

    python -m experiments.data_bench preparation --pictures=FOLDER
    python -m experiments.data_bench reading

`--pictures` is a folder of any photographs, such as those in Debian's packages of desktop
backgrounds. Each command prints its measurements and writes them to experiments/results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import command
from experiments.data_bench import preparation, reading

MEASURES = {
    'preparation': preparation.measure_all,  # images/s, CPU time, memory and start-up
    'reading': reading.measure_all,  # start-up at ImageNet's size, and images/s
}


def _parser() -> command.Parser:
    summary = (__doc__ or '').splitlines()[0]
    parser = command.Parser(prog='python -m experiments.data_bench', description=summary)
    add = parser.add_argument
    add('measure', choices=MEASURES)
    add('--pictures', type=command.path, default=Path('pictures'), help='folder of photographs')
    add('--rounds', type=command.positive, default=5)
    return parser


def act(flags: argparse.Namespace) -> None:
    """Run the measurement that the command line names."""
    MEASURES[flags.measure](flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.run('data_bench', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
