"""The command line: one verb per task, options from dataclasses, progress bars, one-line errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from dtn_fast.cli.demo import demo
from dtn_fast.cli.detect import detect, serve
from dtn_fast.cli.doctor import doctor
from dtn_fast.cli.evaluate import calibrate, evaluate, explain, report, robustness
from dtn_fast.cli.export import export, inspect, repository, verify
from dtn_fast.cli.prepare import corrupt, prepare, synthesize
from dtn_fast.cli.train import ablate, distill, finetune, temporal, train
from dtn_fast.errors import DtnError, DtnWarning, UsageError
from dtn_fast.ranges import checked
from dtn_fast.runtime.load import RECIPE
from dtn_fast.train.config import PRESETS


def bench() -> None:
    """Run benchmarks, print rooflines, compare results; dtn-fast bench --help shows the options.

    Example: dtn-fast bench model train --budget 300
    """


# ------------------------------------------------------------------------------------------------- entry


_TRAINER = (demo, synthesize, prepare, train, distill, finetune, temporal)
_EXPERIMENTER = (evaluate, calibrate, robustness, ablate, explain, report, corrupt, bench)
_DEPLOYER = (export, verify, inspect, detect, serve, repository, doctor)
VERBS = {verb.__name__: verb for verb in (*_TRAINER, *_EXPERIMENTER, *_DEPLOYER)}
DESCRIPTION = """DTN face-forgery detection: train, distil, evaluate, export, detect, serve.

Example: dtn-fast detect clip.mp4 --model runs/first

Exit codes: 0 success, 1 some inputs failed, 2 wrong usage."""


def with_preset(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the recipe, and train with the adaptation, of the last --preset in ``arguments`` as defaults, which
    other options then change.

    tyro's own presets are subcommands, a bare word in a fixed place; this keeps --preset an option in any order.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names = [value for option, value in itertools.pairwise(words) if option == "--preset"]
    if not names or names[-1] not in PRESETS:
        return verb
    preset = PRESETS[names[-1]]
    own = {"adaptation": preset.adaptation} if verb is train else {}
    return functools.partial(verb, recipe=preset.recipe, **own)


def with_run(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the recipe of the last --run in ``arguments`` as its default, which other options then change."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    runs = [value for option, value in itertools.pairwise(words) if option == "--run"]
    if not runs or not (Path(runs[-1]) / RECIPE).is_file():
        return verb
    from dtn_fast.train.run_folder import load_run

    return functools.partial(verb, recipe=load_run(Path(runs[-1]))[0])


def with_source(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the fine-tuning recipe of the first run or generation in ``arguments`` but --out's as its default,
    which other options then change."""
    from dtn_fast.train.finetune import recipe_from

    words = [(before, Path(word)) for before, word in itertools.pairwise(arguments) if before != "--out"]
    sources = [word for _, word in words if any((at / RECIPE).is_file() for at in (word, word.parent))]
    return functools.partial(verb, recipe=recipe_from(sources[0])) if sources else verb


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
    for stream in (sys.stdout, sys.stderr):  # the bytes of a file's name may be no text of the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended as by Ctrl-C: what is finished is kept
    try:
        if sys.argv[1:2] == ["bench"]:  # bench also runs without tyro, so it parses its own arguments
            from dtn_fast.bench.run import main as run

            raise SystemExit(run(sys.argv[2:]))
        code = _parsed(renamed(sys.argv[1:]))()
        sys.stdout.flush()
    except DtnError as error:
        raise SystemExit(_fail(str(error), error.exit_code)) from None
    except BrokenPipeError:  # the reader, such as head, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:  # such as a full disk, or a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise SystemExit(_fail(f"{where}{error.strerror or error}{remedy}", 1)) from None
    except KeyboardInterrupt as stopped:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: os._exit(128 + received))  # threads may be long in ending
        rest = str(stopped) or "run the same command to resume training or rendering"
        raise SystemExit(_fail(f"interrupted; {rest}", 130)) from None
    raise SystemExit(code or 0)


def _parsed(arguments: list[str]) -> Callable[[], int | None]:
    """The verb with its options, ready to run.  Raises UsageError, in one line, when an option is unknown or wrong."""
    verbs = {**VERBS, **{verb.__name__: with_preset(verb, arguments) for verb in (train, ablate)}}
    if arguments[:1] == [distill.__name__]:
        verbs[distill.__name__] = with_run(distill, arguments)
    if arguments[:1] == [finetune.__name__]:
        verbs[finetune.__name__] = with_source(finetune, arguments)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            later = {name: _later(verb) for name, verb in verbs.items()}
            return tyro.extras.subcommand_cli_from_dict(later, prog="dtn-fast", description=DESCRIPTION, args=arguments)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UsageError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if stop.code == 2:
            verb = f"{arguments[0]} " if arguments[:1] and arguments[0] in verbs else ""
            raise UsageError(f"{_unboxed(box.getvalue())}; see dtn-fast {verb}--help") from None
        raise


def _later(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the parameters of ``verb`` that checks their ranges and gives the call, to be made later."""
    fixed = verb.keywords if isinstance(verb, functools.partial) else {}
    base = checked(verb.func if isinstance(verb, functools.partial) else verb)

    @functools.wraps(base)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(base, *args, **kwargs)

    return functools.partial(bound, **fixed) if fixed else bound


def _unboxed(text: str) -> str:
    """The message of an error box of tyro's, in one line."""
    rows = [re.sub(r"^[│|]\s?|\s*[│|]$", "", row).strip() for row in text.splitlines()]
    inside = (row for row in rows if row and row[0] not in "╭╰")
    body = itertools.takewhile(lambda row: not set(row) <= set("─-"), inside)  # help follows a rule
    return " ".join(body) or " ".join(text.split())


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
