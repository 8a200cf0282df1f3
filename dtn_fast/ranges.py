"""Ranges of numeric settings: written beside their types, checked in one place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, get_type_hints

from dtn_fast.errors import UsageError


class Range(NamedTuple):
    """The numbers that a setting may have; NaN and infinity are outside every range.  Of a tuple, those of each
    element."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    """Lower end that is itself outside."""
    below: float = math.inf
    """Upper end that is itself outside."""

    def __contains__(self, value: object) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return known and self.low <= value <= self.high and self.above < value < self.below  # type: ignore[operator]

    def __str__(self) -> str:
        if self.low > -math.inf and self.high < math.inf:
            return f"from {self.low} to {self.high}"
        lower = f"above {self.above:g}" if self.above > -math.inf else f"at least {self.low:g}" * (self.low > -math.inf)
        upper = f"below {self.below:g}" if self.below < math.inf else f"at most {self.high:g}" * (self.high < math.inf)
        return " and ".join(part for part in (lower, upper) if part)


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(above=0, below=1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Workers = Annotated[int, Range(1, 1024)]
"""Number of processes or threads."""
Side = Annotated[int, Range(16, 4096)]
"""Side of a crop in pixels."""


def check_ranges(settings: object) -> None:
    """Raises UsageError when a field of a dataclass is outside the range of its type; called by ``__post_init__``."""
    _check(_ranges(type(settings)), vars(settings))


def checked(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb`` with the ranges of its parameters checked before it runs."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        _check(_ranges(verb), inspect.signature(verb).bind(*args, **kwargs).arguments)
        return verb(*args, **kwargs)

    return run


def positive(text: str) -> float:
    """A number above 0, as a type of argparse's options."""
    if (number := float(text)) not in Range(above=0):
        raise ValueError(text)
    return number


def _ranges(owner: Any) -> dict[str, Range]:
    hints = get_type_hints(owner, include_extras=True)
    found = {name: next((m for m in _metadata(hint) if isinstance(m, Range)), None) for name, hint in hints.items()}
    return {name: known for name, known in found.items() if known is not None}


def _metadata(hint: Any) -> list[Any]:
    """Annotations of a type, or of the alternatives of a union."""
    inner = [annotation for part in getattr(hint, "__args__", ()) for annotation in getattr(part, "__metadata__", ())]
    return [*getattr(hint, "__metadata__", ()), *inner]


def _check(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    for name, known in ranges.items():
        value = values.get(name)
        for number in value if isinstance(value, tuple | list) else () if value is None else (value,):
            if number not in known:
                finite = "" if isinstance(number, int) or math.isfinite(number) else "a finite number "
                raise UsageError(f"--{name.replace('_', '-')} {number}: must be {finite}{known}")
