"""Log files with one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dtn_fast.files import json_text, write_whole


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends ``row`` as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows written so far, up to a line that was cut off by a crash."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_lines(path: Path, epoch: int, step: int = 0) -> None:
    """Removes the lines from ``step`` of ``epoch`` on, so that repeated steps are logged once."""
    rows = read_lines(path)
    kept = [row for row in rows if (row["epoch"], row.get("step", math.inf)) < (epoch, step)]
    if path.is_file():
        write_whole(path, "".join(json_text(row) + "\n" for row in kept))
