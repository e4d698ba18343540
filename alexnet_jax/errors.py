"""The two ways in which a command ends badly: each carries one sentence that says what to do."""


class AlexNetError(Exception):
    """Base of the errors a person can act on; `main.py` prints the sentence and exits."""

    exit_code = 1


class UsageError(AlexNetError):
    """What was asked for makes no sense as it stands (a flag, a config value): exit code 2."""

    exit_code = 2


class RunError(AlexNetError):
    """What was asked for is sound, but could not be done (data, disk, numbers): exit code 1."""

    exit_code = 1
