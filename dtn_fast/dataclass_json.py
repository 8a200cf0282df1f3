"""JSON objects read into frozen dataclasses (configurations, recipes, manifests), and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from dtn_fast.errors import UsageError

Record = TypeVar("Record")


def from_fields(kind: type[Record], fields: Any, where: str, remedy: str = "") -> Record:
    """Makes a dataclass ``kind`` from a decoded JSON object; lists become tuples.

    Raises UsageError, naming the file ``where`` and ending with ``remedy``, when ``fields`` is not an object or a field
    is missing, unknown or rejected by ``kind``.
    """
    try:
        if not isinstance(fields, Mapping):
            raise TypeError(f"expected an object, got {type(fields).__name__}")
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{where}: not a valid {kind.__name__} ({error}){remedy}") from error


def from_json(kind: type[Record], text: str, where: str, remedy: str = "") -> Record:
    """Parses JSON text and calls :func:`from_fields`."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not a valid {kind.__name__} ({error}){remedy}") from error
    return from_fields(kind, fields, where, remedy)


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The fields whose values differ, with both: ``lr 0.001 (now 0.0001), crop.margin 1.3 (now 1.7)``; "" if none."""
    before, after = dict(_flat(known)), dict(_flat(now))
    pairs = [(name, before.get(name), after.get(name)) for name in {**after, **before}]
    return ", ".join(f"{name} {_said(a)} (now {_said(b)})" for name, a, b in pairs if a != b)


def _flat(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _said(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "none" if text in ("", "None") else text
