"""Files that appear whole, names that file systems take, and JSON that every parser takes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from dtn_fast.errors import DtnError, UsageError, one_line
from dtn_fast.files import check_writable, fitting_name, json_text, longest_name, replacing, write_whole


def test_json_has_no_nan() -> None:
    rows = {"a": [1.5, math.nan], "b": (math.inf, {"c": -math.inf}), "d": 2, "e": "NaN", "f": None}
    text = json_text(rows, indent=1)
    assert json.loads(text) == {"a": [1.5, None], "b": [None, {"c": None}], "d": 2, "e": "NaN", "f": None}
    assert json_text({"a": 1.0}) == '{"a": 1.0}'


def test_names_are_shortened_where_the_file_system_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_name(tmp_path, "clip", ".mp4") == tmp_path / "clip.mp4"
    for stem in ("\u9854" * 90, "x" * 300, os.fsdecode(b"\xff" * 300)):
        path = fitting_name(tmp_path, stem, ".mp4")
        assert longest_name(tmp_path) - 4 < len(os.fsencode(path.name)) <= longest_name(tmp_path)
        assert stem.startswith(path.stem)
        write_whole(path, b"content")  # its partial file's name is shortened too
        assert path.read_bytes() == b"content"
    monkeypatch.setattr("os.pathconf", lambda folder, name: 143)  # as on an encrypted file system
    assert len(fitting_name(tmp_path, "x" * 300, ".mp4").name) == 143
    with replacing(tmp_path / ("y" * 140)) as partial:
        assert len(partial.name) <= 143
        partial.touch()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_text_in_one_line() -> None:
    name = "a\n\x1b[31m\u202e" + os.fsdecode(b"\xff") + "\u00e9\u9854\U0001f468\u200d\U0001f469"
    assert one_line(name) == r"a\n\x1b[31m\u202e\xff" + "\u00e9\u9854\U0001f468\u200d\U0001f469"
    assert str(DtnError("two\n  lines \x07")) == r"two lines \x07"


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert [*(tmp_path / "new" / "deep").iterdir()] == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(UsageError, match=r"cannot be written to \((Not a directory|No such file).*; choose"):
            check_writable(folder)
