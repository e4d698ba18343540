"""The doorbell: train, evaluate or describe what a config says. See README.md.

    python main.py --config=configs/alexnet.py
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax.errors import AlexNetError, RunError, UsageError

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, ":scale" may follow.')
MODE = flags.DEFINE_enum('mode', 'train', ('train', 'evaluate', 'describe'), 'What to do.')
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where the run lies; workdirs/<config>-<scale>-<seed> by default. To evaluate '
    'an ensemble, several with commas between.'
)
STEP = flags.DEFINE_string('step', 'latest', 'Which checkpoint to evaluate: latest, best, a step.')
SPLIT = flags.DEFINE_string('split', 'test', 'What to evaluate on: train, validation, test.')


def main(argv: list[str]) -> None:
    """Call the one function that was asked for, and print its result on stdout."""
    if len(argv) > 1:
        raise UsageError(f"'{argv[1]}' is not a flag; values are given as --flag=value.")
    config, workdir = CONFIG.value, WORKDIR.value
    if config is None and not (MODE.value == 'evaluate' and workdir):
        raise UsageError('no --config; try --config=configs/alexnet.py.')
    workdir = workdir or f'workdirs/{config.name}-{config.scale}-{config.seed}'
    if MODE.value == 'describe':
        from alexnet_jax import describe

        print(describe.run(config))
    elif MODE.value == 'evaluate':
        from alexnet_jax import evaluate

        step = int(STEP.value) if STEP.value.isdigit() else STEP.value
        folders = [Path(folder) for folder in workdir.split(',')]
        print(evaluate.line(evaluate.run(folders, step=step, split=SPLIT.value)))
    else:
        from alexnet_jax import train

        print(train.run(config, Path(workdir)))


def parse(argv: list[str]) -> list[str]:
    """Absl's flags; what a person got wrong there becomes one sentence."""
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value and CONFIG.value.name  # the file is read when a key is asked for
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fault = ' '.join(str(error.args[0] if error.args else error).split())
        if 'No such file' in fault:
            fault = 'there is no such config file; those of this program lie in configs/.'
        fault = fault.rpartition('Error: ')[2]  # ml_collections quotes a whole traceback
        fault = fault.replace('invalid literal for int() with base 10', 'not a whole number')
        fault = fault.replace('could not convert string to float', 'not a number')
    return sys.exit(complain(UsageError(fault)))


def complain(error: AlexNetError) -> int:
    """The sentence on stderr; the exit code: 1 could not be done, 2 makes no sense."""
    print(f'main.py: {error}', file=sys.stderr)
    return error.exit_code


def ring(argv: list[str]) -> int:
    """`main`, with the errors a person can act on said in one sentence and no traceback."""
    if not flags.FLAGS['verbosity'].present:  # libraries' chatter
        logging.set_verbosity(logging.WARNING)
    try:
        main(argv)
    except AlexNetError as error:
        return complain(error)
    except OSError as error:
        return complain(RunError(f'{error.strerror}: {error.filename}; see to it and start again.'))
    return 0


if __name__ == '__main__':
    app.run(ring, flags_parser=parse)
