"""Errors shown to the user: one line each that names the cause and the remedy.

Exit codes: 0 done, 1 some inputs failed, 2 usage (wrong arguments, missing or unsuitable files).
"""

import warnings


class DtnWarning(UserWarning):
    """A fact that a person should know about a result that is given nevertheless; the command line prints it in one
    line."""


def tell(message: str) -> None:
    """Warns with ``message``, once in a process."""
    warnings.warn(" ".join(message.split()), DtnWarning, stacklevel=3)


class DtnError(Exception):
    """A failure caused by an input or the machine; the command line prints it and exits with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, even if a file name holds line breaks


class UsageError(DtnError, ValueError):
    """A request that cannot be met: wrong arguments, a missing file, a checkpoint of another shape."""

    exit_code = 2


class MediaError(DtnError):
    """An image or video that cannot be read; batch jobs count it and go on."""
