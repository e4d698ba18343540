"""Train, evaluate or describe the net of a config. See README.md.

python main.py --config=configs/alexnet.py
"""

import argparse
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from alexnet_jax import command, config_file
from alexnet_jax.errors import UsageError
from alexnet_jax.parallel import distributed


def parser() -> command.Parser:
    """Return the parser of all flags but `--config.KEY=VALUE`, see `config_file.split`."""
    flags = command.Parser(prog='main.py', description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add('--config', metavar='FILE[:ARGUMENT]', help="a file of configs/, or a run's config.json")
    add('--config.KEY', metavar='VALUE', help='replace the value of a key, of any number of keys')
    add('--mode', choices=('train', 'evaluate', 'describe'), default='train')
    add('--workdir', help='workdirs/<config>-<scale>-<seed> by default; to evaluate an ensemble, '
        'several with commas between')  # fmt: skip
    add('--extend', action='store_true', help='continue a run under other epochs or rates')
    add('--step', help='the checkpoint to evaluate: latest (the default), best, or a number')
    add('--split', help='to evaluate on: train, validation, test (the default), or one of TFDS')
    add('--data_dir', type=command.expand, help='the data to evaluate on, if it has moved')
    add('--coordinator_address', metavar='HOST:PORT', help='where process 0 of several is found')
    add('--num_processes', type=int, help='how many they are; launchers say it themselves')
    add('--process_id', type=int, help='which of them this is, from 0')
    return flags


def main(overrides: Mapping[str, str], flags: argparse.Namespace) -> None:
    """Do what the flags ask for, and print the result."""
    of_evaluation = ('step', 'split', 'data_dir')
    given = {name: value for name in of_evaluation if (value := getattr(flags, name)) is not None}
    if given and flags.mode != 'evaluate':
        raise UsageError(f'--{next(iter(given))} is of --mode=evaluate; leave it out.')
    if flags.extend and flags.mode != 'train':
        raise UsageError('--extend is of --mode=train; leave it out.')
    config: dict[str, Any] = {}
    if flags.config:
        config = config_file.plain(config_file.load(flags.config, overrides))
    elif flags.mode != 'evaluate' or not flags.workdir:
        raise UsageError('no --config; try --config=configs/alexnet.py.')
    where = flags.coordinator_address, flags.num_processes, flags.process_id
    info = None if flags.mode == 'describe' else distributed.detect(os.environ, *where)
    same = {name: getattr(flags, name) for name in ('mode', 'workdir', 'extend')}
    request = {'config': config or overrides, **same, **given}
    with distributed.joined(info, request, **config.get('processes', {})):
        answer = act(flags, config, overrides, given)
    if distributed.is_first():
        print(answer, flush=True)


def act(flags: argparse.Namespace, config: dict, overrides: Mapping, given: Mapping) -> str:
    """Call the one function for the mode; return what is for stdout."""
    workdir = flags.workdir or 'workdirs/{name}-{scale}-{seed}'.format(**config)
    if flags.mode == 'describe':
        from alexnet_jax.analysis import describe

        return describe.run(config)
    if flags.mode == 'evaluate':
        from alexnet_jax.inference import evaluate

        found = evaluate.run(command.paths(workdir), **given, overrides=overrides)
        return evaluate.line(found)
    from alexnet_jax.training import train

    return train.run(config, command.path(workdir), flags.extend)


if __name__ == '__main__':
    words, values = config_file.split(sys.argv[1:])
    sys.exit(command.run('main.py', parser, functools.partial(main, values), words))
