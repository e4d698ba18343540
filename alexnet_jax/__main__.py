"""Run `python -m alexnet_jax COMMAND ...`; main.py trains, evaluates and describes."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import alexnet_jax
from alexnet_jax import command

COMMANDS = {  # name: (module, what it does)
    'prepare': (
        'data.prepare.command',
        'prepare a data set: Fashion-MNIST, ImageNet, your own images',
    ),
    'predict': ('inference.predict', 'classify image files'),
    'features': ('inference.features', "save a layer's activations, or find the nearest images"),
    'figures': ('analysis.figures', "draw the paper's figures, or learning curves"),
    'report': ('analysis.report', "write a run's results as one HTML page"),
    'weights': ('interop.weights', 'import or export weights; export StableHLO or ONNX'),
}


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog='python -m alexnet_jax',
        description='Prepare data, and use trained nets. For training, see main.py --help.',
        epilog='For the options of a command: python -m alexnet_jax COMMAND --help',
    )
    parser.add_argument('--version', action='version', version=alexnet_jax.__version__)
    names = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, (_, about) in COMMANDS.items():
        names.add_parser(name, help=about)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Import and run the command that the first word names; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        return importlib.import_module(f'alexnet_jax.{module}').main(words[1:])
    return command.run('alexnet_jax', _parser, lambda _: None, words)


if __name__ == '__main__':
    sys.exit(main())
