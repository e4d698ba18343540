"""Train, evaluate or describe a net, for example: python main.py --config=configs/alexnet.py."""

import argparse
import json
import os
import sys

from alexnet_jax import command, config_file
from alexnet_jax.errors import UsageError
from alexnet_jax.parallel import distributed

MODES = {'step': 'evaluate', 'split': 'evaluate', 'data_dir': 'evaluate', 'extend': 'train'}


def parser() -> command.Parser:
    """Return the parser of all flags but `--config.KEY=VALUE`, see `config_file.split`."""
    flags = command.Parser(prog='main.py', description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add('--config', metavar='FILE[:ARGUMENT]', help="a file in configs/, or a run's config.json")
    add('--config.KEY', metavar='VALUE', help='override the value of a key; may be repeated')
    add('--mode', choices=('train', 'evaluate', 'describe'), default='train')
    add('--workdir', help='workdirs/<config>-<scale>-<seed> by default; A,B,... for an ensemble')
    add('--extend', action='store_true', help='continue a run with other epochs or rates')
    add('--step', help='the checkpoint to evaluate: latest (the default), best, or a number')
    add('--split', help="to evaluate: train, validation, test (the default), or as 'test[:100]'")
    add('--data_dir', type=command.expand, help='to evaluate: the folder of all data, if it moved')
    distributed.add_flags(flags)
    return flags


def main(flags: argparse.Namespace, values: dict[str, str]) -> None:
    """Run the mode that the flags name, and print its result."""
    for name, mode in MODES.items():
        if getattr(flags, name) and flags.mode != mode:
            raise UsageError(f'--{name} needs --mode={mode}; set that mode, or remove --{name}.')
    if not flags.config and (flags.mode != 'evaluate' or not flags.workdir):
        raise UsageError(
            'no --config; try --config=configs/alexnet.py, or to evaluate a run --workdir=DIR.'
        )
    config = config_file.plain(config_file.load(flags.config, values)) if flags.config else {}
    workdir = flags.workdir
    if workdir is None:
        workdir = 'workdirs/{name}-{scale}-{seed}'.format(**config)
    where = flags.coordinator_address, flags.num_processes, flags.process_id
    info = None if flags.mode == 'describe' else distributed.detect(os.environ, *where)
    request = vars(flags) | {'config': config or values, 'process_id': None}
    with distributed.joined(info, request, **config.get('processes', {})):
        from alexnet_jax.analysis import describe  # here, as these imports take seconds
        from alexnet_jax.inference import evaluate
        from alexnet_jax.training import train

        if flags.mode == 'train':
            result = train.run(config, command.path(workdir), flags.extend)
        elif flags.mode == 'describe':
            result = describe.run(config)
        else:
            args = {name: value for name in MODES if (value := getattr(flags, name))}
            result = json.dumps(evaluate.run(command.paths(workdir), **args, overrides=values))
    if distributed.is_first():
        print(result, flush=True)


if __name__ == '__main__':
    words, values = config_file.split(sys.argv[1:])
    sys.exit(command.run('main.py', parser, lambda flags: main(flags, values), words))
