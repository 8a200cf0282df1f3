"""The command line: one verb per task, options from dataclasses, progress bars, one-line errors."""

from __future__ import annotations

import errno
import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from dtn_fast.cli.demo import demo
from dtn_fast.cli.detect import detect, serve
from dtn_fast.cli.doctor import doctor
from dtn_fast.cli.evaluate import evaluate, explain, report, robustness
from dtn_fast.cli.export import export, inspect, repository, verify
from dtn_fast.cli.prepare import corrupt, prepare, synthesize
from dtn_fast.cli.train import ablate, distill, train
from dtn_fast.errors import DtnError, DtnWarning
from dtn_fast.train.config import PRESETS


def bench() -> None:
    """Run benchmarks, print rooflines, compare results; dtn-fast bench --help shows the options.

    Example: dtn-fast bench model train --budget 300
    """


# ------------------------------------------------------------------------------------------------- entry


_TRAINER = (demo, synthesize, prepare, train, distill)
_EXPERIMENTER = (evaluate, robustness, ablate, explain, report, corrupt, bench)
_DEPLOYER = (export, verify, inspect, detect, serve, repository, doctor)
VERBS = {verb.__name__: verb for verb in (*_TRAINER, *_EXPERIMENTER, *_DEPLOYER)}
DESCRIPTION = """DTN face-forgery detection: train, distil, evaluate, export, detect, serve.

Example: dtn-fast detect clip.mp4 --model runs/first

Exit codes: 0 success, 1 some inputs failed, 2 wrong usage."""


def with_preset(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the recipe of the last --preset in ``arguments`` as its default, which other options then change.

    tyro's own presets are subcommands, a bare word in a fixed place; this keeps --preset an option in any order.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names = [value for option, value in itertools.pairwise(words) if option == "--preset"]
    if not names or names[-1] not in PRESETS:
        return verb
    return functools.partial(verb, recipe=PRESETS[names[-1]].recipe)


def renamed(arguments: list[str]) -> list[str]:
    """The arguments with ``--faces all`` and ``largest``, the earlier spelling, as ``--people all`` and ``one``."""
    words = [word for a in arguments for word in (a.split("=", 1) if a.startswith("--faces=") else [a])]
    people = {"all": "all", "largest": "one"}
    for place, (option, value) in enumerate(itertools.pairwise(words)):
        if option == "--faces" and value in people:
            words[place : place + 2] = ["--people", people[value]]
    return words


def main() -> None:
    """Entry point of ``dtn-fast``."""
    warnings.showwarning = _show
    try:
        if sys.argv[1:2] == ["bench"]:  # bench also runs without tyro, so it parses its own arguments
            from dtn_fast.bench.run import main as run

            raise SystemExit(run(sys.argv[2:]))
        sys.argv[1:] = renamed(sys.argv[1:])
        verbs = {**VERBS, **{verb.__name__: with_preset(verb, sys.argv[1:]) for verb in (train, ablate)}}
        code = tyro.extras.subcommand_cli_from_dict(verbs, prog="dtn-fast", description=DESCRIPTION)
    except DtnError as error:
        raise SystemExit(_fail(str(error), error.exit_code)) from None
    except OSError as error:  # such as a full disk, or a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise SystemExit(_fail(f"{where}{error.strerror or error}{remedy}", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(_fail("interrupted; run the same command to resume training or rendering", 130)) from None
    raise SystemExit(code or 0)


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Prints a warning of this package in one line, and another's as Python does."""
    own = issubclass(category, DtnWarning)
    text = f"dtn-fast: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno)
    print(text, end="", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(f"dtn-fast: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
