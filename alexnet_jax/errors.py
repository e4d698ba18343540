"""The two ways in which a command ends badly: each carries one sentence that says what to do."""


class AlexNetError(Exception):
    """Base of the errors that a person can act on; `command.run` prints the sentence and exits."""

    exit_code = 1


class UsageError(AlexNetError):
    """A request that makes no sense as it stands (a flag, a config value): exit code 2."""

    exit_code = 2


class RunError(AlexNetError):
    """A sensible request that could not be carried out (data, disk, numbers): exit code 1."""
