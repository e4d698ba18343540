"""The two ways in which a command ends badly: each carries one sentence that says what to do."""

import signal
import sys


class AlexNetError(Exception):
    """Base of the errors a person can act on; `main.py` prints the sentence and exits."""

    exit_code = 1


class UsageError(AlexNetError):
    """What was asked for makes no sense as it stands (a flag, a config value): exit code 2."""

    exit_code = 2


class RunError(AlexNetError):
    """What was asked for is sound, but could not be done (data, disk, numbers): exit code 1."""

    exit_code = 1


def complain(error: BaseException, program: str) -> int:
    """One sentence on stderr; the exit code: 1 'could not be done', 2 'makes no sense'.

    Ctrl-C needs no sentence. What no person can act on is a fault in here, and raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    told = _actionable(error)
    if told is None:
        raise error
    print(f'{program}: {told}', file=sys.stderr, flush=True)
    return told.exit_code


def _actionable(error: BaseException) -> AlexNetError | None:
    if isinstance(error, AlexNetError):
        return error
    if isinstance(error, OSError):
        where = f' ({error.filename})' if error.filename else ''
        return RunError(f'{error.strerror or error}{where}; see to it, and run it again.')
    if 'RESOURCE_EXHAUSTED' in str(error):  # of JAX, whose class has had several names
        return RunError(
            'the device has not enough memory for this: set batch_size or loop.eval_batch_size '
            'smaller; --mode=describe says what fits.'
        )
    return None


def gist(error: BaseException) -> str:
    """What a person got wrong on the command line, in one line, of a library's exception."""
    text = ' '.join(str(error.args[0] if error.args else error).split())
    if 'No such file' in text:
        return 'there is no such config file; those of this program lie in configs/.'
    text = text.rpartition('Error: ')[2]  # ml_collections quotes a whole traceback,
    text = text.replace('\\n', ': ').replace("\\'", '')  # or a quotation
    text = text.replace('invalid literal for int() with base 10', 'not a whole number')
    return text.replace('could not convert string to float', 'not a number')
