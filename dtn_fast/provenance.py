"""Provenance of results: the command, commit and versions that made a folder, recorded in it."""

from __future__ import annotations

import datetime
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dtn_fast.files import write_whole
from dtn_fast.version import __version__

COMMANDS = "commands.jsonl"
KEYS = ("command", "commit", "dtn_fast", "torch", "date")
REPOSITORY = Path(__file__).resolve().parent.parent


def commit(code: tuple[str, ...] = (".",)) -> str:
    """The git commit that this package runs from, followed by a plus when tracked files of ``code`` (git's path
    patterns) have uncommitted changes; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # a package installed inside the checkout of another project does not belong to that project's commit
    if not shutil.which("git") or not git("ls-files", "--", "dtn_fast/provenance.py"):
        return "unknown"
    if not (head := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", *code) else "")


def made_by() -> str:
    """This process's command and commit, as a line to put under its output."""
    return f"made by `{shlex.join(['dtn-fast', *sys.argv[1:]])}`, commit {commit()}"


def record(folder: Path, arguments: list[str] | None = None) -> None:
    """Adds this process's command to ``folder``/commands.jsonl, unless it is already the last entry."""
    words = sys.argv[1:] if arguments is None else arguments
    line = {"command": shlex.join(["dtn-fast", *words]), "commit": commit(), "dtn_fast": __version__,
            "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
    known = commands(folder)
    if known[-1:] != [line]:
        text = "".join(json.dumps(row) + "\n" for row in [*known, line])
        write_whole(folder / COMMANDS, text)


def commands(folder: Path) -> list[dict[str, Any]]:
    """The commands that made ``folder``, oldest first; damaged lines are left out."""
    try:
        lines = (folder / COMMANDS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in KEYS):
            found.append(row)
    return found
