"""Errors that the user can act on. The message is one sentence that states the remedy."""


class AlexNetError(Exception):
    """Base class; `command.run` prints the message and exits."""

    exit_code = 1


class UsageError(AlexNetError):
    """A request that is not valid (a flag, a config value): exit code 2."""

    exit_code = 2


class RunError(AlexNetError):
    """A valid request that failed (data, disk, numbers): exit code 1."""
