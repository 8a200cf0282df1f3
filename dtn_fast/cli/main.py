"""The command line: one verb per task, options from dataclasses, progress bars, one-line errors."""

from __future__ import annotations

import errno
import functools
import inspect as introspection
import sys
from collections.abc import Callable

import tyro

from dtn_fast.cli.demo import demo
from dtn_fast.cli.detect import detect, serve
from dtn_fast.cli.doctor import doctor
from dtn_fast.cli.evaluate import evaluate, explain, report, robustness
from dtn_fast.cli.export import export, inspect, repository, verify
from dtn_fast.cli.prepare import corrupt, prepare, synthesize
from dtn_fast.cli.train import ablate, distill, train
from dtn_fast.errors import DtnError
from dtn_fast.train.config import PRESETS


def bench() -> None:
    """Measure this machine, print rooflines, compare results; dtn-fast bench --help shows its own options.

    Example: dtn-fast bench model train --budget 300
    """


# ------------------------------------------------------------------------------------------------- entry


_TRAINER = (demo, synthesize, prepare, train, distill)
_EXPERIMENTER = (evaluate, robustness, ablate, explain, report, corrupt, bench)
_DEPLOYER = (export, verify, inspect, detect, serve, repository, doctor)
VERBS = {verb.__name__: verb for verb in (*_TRAINER, *_EXPERIMENTER, *_DEPLOYER)}
DESCRIPTION = """DTN face-forgery detection: train, distil, evaluate, export, detect, serve.

Example: dtn-fast detect clip.mp4 --model runs/first

Exit codes: 0 done, 1 some inputs failed, 2 usage."""


def with_preset(verb: Callable[..., None], arguments: list[str]) -> Callable[..., None]:
    """``verb`` with the recipe of the --preset among ``arguments`` as its default, so that options change that one."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else ""
    if name not in PRESETS:
        return verb
    signature = introspection.signature(verb, eval_str=True)
    recipe = signature.parameters["recipe"].replace(default=PRESETS[name].recipe)
    changed = functools.wraps(verb)(lambda *args, **kwargs: verb(*args, **kwargs))
    changed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[recipe if p.name == "recipe" else p for p in signature.parameters.values()]
    )
    return changed


def main() -> None:
    """Entry point of ``dtn-fast``."""
    try:
        if sys.argv[1:2] == ["bench"]:  # it runs where tyro is not installed, so it parses by itself
            from dtn_fast.bench.run import main as run

            raise SystemExit(run(sys.argv[2:]))
        verbs = {**VERBS, **{verb.__name__: with_preset(verb, sys.argv[1:]) for verb in (train, ablate)}}
        code = tyro.extras.subcommand_cli_from_dict(verbs, prog="dtn-fast", description=DESCRIPTION)
    except DtnError as error:
        raise SystemExit(_fail(str(error), error.exit_code)) from None
    except OSError as error:  # a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise SystemExit(_fail(f"{where}{error.strerror or error}{remedy}", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(
            _fail("interrupted; the same command goes on where training or rendering stopped", 130)
        ) from None
    raise SystemExit(code or 0)


def _fail(message: str, code: int) -> int:
    print(f"dtn-fast: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
