"""Measure data preparation and reading, and dry-run the ImageNet pipeline.

    python -m experiments.data_bench preparation --pictures=FOLDER [--rounds=5]
    python -m experiments.data_bench reading [--rounds=7] [--scratch=FOLDER]
    python -m experiments.data_bench dry_run --pictures=FOLDER --scratch=FOLDER

`--pictures` is a folder of any photographs, such as those in Debian's packages of desktop
backgrounds. Each command prints its measurements and writes them to experiments/results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import command
from experiments.data_bench import dry_run, preparation, reading


def _parser() -> command.Parser:
    parser = command.Parser(
        prog='python -m experiments.data_bench', description=(__doc__ or '').splitlines()[0]
    )
    measures = parser.add_subparsers(dest='measure', required=True)
    one = measures.add_parser(
        'preparation', help='measure images/s, CPU time, memory and start-up of preparation'
    )
    one.add_argument('--pictures', type=command.path, required=True, help='folder of photographs')
    one.add_argument('--rounds', type=int, default=5)
    one.set_defaults(act=lambda flags: preparation.measure_all(flags.pictures, flags.rounds))
    one = measures.add_parser(
        'reading', help="measure start-up at ImageNet's size, and images/s, of reading"
    )
    one.add_argument('--rounds', type=int, default=7)
    one.add_argument(
        '--scratch', type=command.path, default=Path('/tmp'), help='scratch folder; needs 2 GB'
    )
    one.set_defaults(act=lambda flags: reading.measure_all(flags.scratch, flags.rounds))
    one = measures.add_parser('dry_run', help='run the ImageNet pipeline on substitute photographs')
    one.add_argument('--pictures', type=command.path, required=True, help='folder of photographs')
    one.add_argument(
        '--scratch', type=command.path, required=True, help='new scratch folder; needs 3 GB'
    )
    one.set_defaults(act=lambda flags: dry_run.measure_all(flags.pictures, flags.scratch))
    return parser


def act(flags: argparse.Namespace) -> None:
    """Run the measurement that the command line names."""
    flags.act(flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.run('data_bench', _parser, act, argv)


if __name__ == '__main__':
    sys.exit(main())
