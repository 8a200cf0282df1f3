"""Errors shown to the user: one line each that names the cause and the remedy.

Exit codes: 0 done, 1 some inputs failed, 2 usage (wrong arguments, missing or unsuitable files).
"""

import re
import warnings


def one_line(text: str) -> str:
    """The text, such as a file's name, in one line that a terminal shows: control characters, line breaks, marks that
    reverse the direction of writing, and bytes that are no UTF-8 become escapes."""
    hidden = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(hidden, lambda found: found[0].encode("unicode_escape").decode().replace("\\udc", "\\x"), text)


def reason(error: BaseException) -> str:
    """The cause that an error of another library states, or else its kind, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


class DtnWarning(UserWarning):
    """A fact that a person should know about a result that is given nevertheless; the command line prints it in one
    line."""


def tell(message: str) -> None:
    """Warns with ``message``, once in a process."""
    warnings.warn(one_line(" ".join(message.split())), DtnWarning, stacklevel=3)


class DtnError(Exception):
    """A failure caused by an input or the machine; the command line prints it and exits with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(" ".join(message.split())))  # even if a file name holds line breaks


class UsageError(DtnError, ValueError):
    """A request that cannot be met: wrong arguments, a missing file, a checkpoint of another shape."""

    exit_code = 2


class MediaError(DtnError):
    """An image or video that cannot be read; batch jobs count it and go on."""
