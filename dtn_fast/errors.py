"""The errors a person sees: one line each, naming the offender and the remedy.

Exit codes: 0 done, 1 some inputs failed, 2 usage (wrong arguments, missing or unfitting files).
"""


class DtnError(Exception):
    """Something about an input or the machine; the command line prints the message and exits with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names from files may hold line breaks


class UsageError(DtnError, ValueError):
    """The request itself cannot be met: wrong arguments, a missing file, a checkpoint of another shape."""

    exit_code = 2


class MediaError(DtnError):
    """An image or video that cannot be read; batch jobs count it and go on."""
