"""Every numeric option of the command line has a range, and nothing outside it is taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_type_hints

import pytest

from dtn_fast import DTNConfig
from dtn_fast.cli.main import VERBS, _parsed
from dtn_fast.errors import UsageError
from dtn_fast.ranges import Count, Range, Share, check_ranges, checked, positive
from dtn_fast.serve.config import ServeConfig


def numeric(hint: Any) -> bool:
    return hint in (int, float) or any(numeric(part) for part in get_args(hint) if not isinstance(part, Range))


def options(owner: Any) -> Iterator[tuple[str, Any]]:
    """(name, type) of every option of a verb or a dataclass of options, nested ones too."""
    for name, hint in get_type_hints(owner, include_extras=True).items():
        inner = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if inner is not None:
            yield from options(inner)
        elif name != "return":
            yield f"{getattr(owner, '__name__', owner)}.{name}", hint


def ranges_in(hint: Any) -> list[Range]:
    return [r for part in (hint, *get_args(hint)) for r in getattr(part, "__metadata__", ()) if isinstance(r, Range)]


def test_every_numeric_option_has_a_range() -> None:
    found = {name: hint for verb in VERBS.values() for name, hint in options(verb) if numeric(hint)}
    assert len(found) > 50
    assert not [name for name, hint in found.items() if not ranges_in(hint)]


def test_a_dataclass_with_ranges_checks_them() -> None:
    kinds = {part for verb in VERBS.values() for hint in get_type_hints(verb, include_extras=True).values()
             for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)}  # fmt: skip
    for kind in kinds:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for known in ranges_in(hint):
                shape = getattr(kind(), name) if kind.__dataclass_fields__[name].default is not None else 0
                wrong = known.low - 1 if math.isfinite(known.low) else known.above
                value = (wrong,) * max(len(shape), 1) if isinstance(shape, tuple) else wrong
                with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
                    kind(**{name: value})


@pytest.mark.parametrize("words", [
    "detect x --model y --threshold nan", "detect x --model y --threshold 50", "detect x --model y --rate inf",
    "detect x --model y --rate -1", "detect x --model y --min-face 0", "serve x --threshold 1.5", "serve x --port -1",
    "verify a b --images -4", "train x --out y --lr nan", "train x --out y --weights 1 nan 1",
    "prepare x --out y --size 3", "corrupt x --out y.png --kind jpeg --seed -1", "export x --out y --batches 0 1 2",
    "robustness x y --levels 9", "evaluate x --model y --confidence 1", "demo --workers 0",
    "distill x --run y --restart -2",
    "train x --out y --epochs two", "train x --out y --nothing 3", "fly", "detect x",
])  # fmt: skip
def test_a_wrong_option_is_one_line(words: str) -> None:
    with pytest.raises(UsageError) as error:
        _parsed(words.split())()
    text = str(error.value)
    assert "\n" not in text
    assert not set("│╭─") & set(text)
    assert any(word in text for word in (*words.split()[-2:], "--model"))


def test_ranges_in_words_and_what_they_hold() -> None:
    assert [str(r) for r in (Range(0, 1), Range(1), Range(above=0), Range(0, below=1), Range(high=3))] == [
        "from 0 to 1", "at least 1", "above 0", "at least 0 and below 1", "at most 3"]  # fmt: skip
    for value in (math.nan, math.inf, -math.inf, True, "1", None):
        assert value not in Range(-5)
    assert (0 in Range(0, 1), 1 in Range(0, below=1), 0 in Range(above=0), 0.5 in Range(0, 1)) == (
        True,
        False,
        False,
        True,
    )


def test_functions_and_dataclasses() -> None:
    @dataclasses.dataclass
    class Settings:
        share: Share = 0.5
        several: Annotated[tuple[int, ...], Range(1)] = (1, 2)
        maybe: Count | None = None

        def __post_init__(self) -> None:
            check_ranges(self)

    Settings(share=1, several=(), maybe=3)
    for wrong in ({"share": math.nan}, {"several": (1, 0)}, {"maybe": 0}):
        with pytest.raises(UsageError, match="must be"):
            Settings(**wrong)

    def verb(count: Count, level: Share | None = None) -> int:
        return count

    assert checked(verb)(2) == 2
    for arguments in ((0,), (1, 2.0)):
        with pytest.raises(UsageError, match=r"--count 0|--level 2.0"):
            checked(verb)(*arguments)


def test_settings_that_are_no_numbers_of_an_option() -> None:
    with pytest.raises(UsageError, match="--host: empty, which means all networks"):
        ServeConfig(host="")
    for name, value in {
        "mean": (0.4,),
        "std": (0.2, 0.0, 0.2),
        "image_size": 10**9,
        "convs": (1, 2, 2, 2, 200_000),
    }.items():
        with pytest.raises(UsageError, match=f"DTNConfig.{name}"):
            DTNConfig(**{name: value})  # a configuration may come from anywhere
    with pytest.raises(ValueError, match="nan"):
        positive("nan")
