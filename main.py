"""The doorbell: train, evaluate or describe what a config says. See README.md.

python main.py --config=configs/alexnet.py
"""

import contextlib
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax import distributed, errors

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; ":scale" may follow.')
MODE = flags.DEFINE_enum('mode', 'train', ('train', 'evaluate', 'describe'), 'What to do.')
WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Where the run lies, workdirs/<config>-<scale>-<seed> by default; --mode=evaluate takes '
    'several, with commas between, as an ensemble.',
)
STEP = flags.DEFINE_string('step', 'latest', 'The checkpoint to evaluate: latest, best, a number.')
COORDINATOR = flags.DEFINE_string('coordinator_address', None, 'Of several processes: host:port.')
PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many; launchers say it themselves.')
PROCESS = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
DATA_DIR = flags.DEFINE_string('data_dir', '', 'Where the data to evaluate on lies, if moved.')
SPLIT = flags.DEFINE_string('split', 'test', 'To evaluate on: train, validation, test, or TFDS.')
# What absl and ml_collections raise of a command line that is wrong.
WRONG = (flags.Error, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError)


def main(argv: list[str]) -> str:
    """Call the one function that was asked for; what it found is for stdout."""
    config, workdir = CONFIG.value, WORKDIR.value
    if MODE.value != 'evaluate' and (
        given := [f.name for f in (STEP, SPLIT, DATA_DIR) if f.present]
    ):
        raise errors.UsageError(f'--{given[0]} is of --mode=evaluate; leave it out.')
    if len(argv) > 1:
        raise errors.UsageError(f"'{argv[1]}' is not a flag; values are given as --flag=value.")
    if config is None and not (MODE.value == 'evaluate' and workdir):
        raise errors.UsageError('no --config; try --config=configs/alexnet.py.')
    workdir = workdir or f'workdirs/{config.name}-{config.scale}-{config.seed}'
    if MODE.value == 'describe':
        from alexnet_jax import describe

        return describe.run(config)
    if MODE.value == 'evaluate':
        from alexnet_jax import evaluate

        workdirs = [Path(one) for one in workdir.split(',')]
        how = {'step': STEP.value, 'split': SPLIT.value, 'data_dir': DATA_DIR.value}
        overrides = config_flags.get_override_values(flags.FLAGS['config']) if config else {}
        return evaluate.line(evaluate.run(workdirs, **how, overrides=overrides))
    from alexnet_jax import train

    return train.run(config, Path(workdir))


def parse(argv: list[str]) -> list[str]:
    """Absl's flags, or one sentence about what is wrong with them."""
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value and CONFIG.value.name  # the file is read when a key is asked for
        return rest
    except WRONG as error:
        return sys.exit(errors.complain(errors.UsageError(errors.gist(error)), 'main.py'))


def processes() -> contextlib.AbstractContextManager[None]:
    """Return the context that connects this process with the others, if there are others."""
    config = CONFIG.value.to_dict() if CONFIG.value else {}
    where = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    info = None if MODE.value == 'describe' else distributed.detect(os.environ, *where)
    same = (MODE, WORKDIR, STEP, SPLIT, DATA_DIR)
    request = {'config': config, **{flag.name: flag.value for flag in same}}
    return distributed.joined(info, request, **config.get('processes', {}))


def ring(argv: list[str]) -> int:
    """`main`, with the errors that a person can act on said without a traceback."""
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # the libraries chatter
    try:
        with processes():
            answer = main(argv)
        if distributed.is_first():
            print(answer, flush=True)
    except (Exception, KeyboardInterrupt) as error:
        return errors.complain(error, 'main.py')
    return 0


if __name__ == '__main__':
    app.run(ring, flags_parser=parse)
