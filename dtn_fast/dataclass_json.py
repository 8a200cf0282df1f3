"""JSON objects read into frozen dataclasses: configurations, recipes, manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from dtn_fast.errors import UsageError

Record = TypeVar("Record")


def from_fields(kind: type[Record], fields: Any, where: str, remedy: str = "") -> Record:
    """A ``kind`` made of a decoded JSON object, whose lists become tuples.

    Raises UsageError naming ``where`` (a file) and ending with ``remedy``, when ``fields`` is no object, or a field is
    missing, unknown or refused by ``kind`` itself.
    """
    try:
        if not isinstance(fields, Mapping):
            raise TypeError(f"expected an object, got {type(fields).__name__}")
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: not a {kind.__name__} ({error}){remedy}") from error


def from_json(kind: type[Record], text: str, where: str, remedy: str = "") -> Record:
    """:func:`from_fields` of JSON text."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: not a {kind.__name__} ({error}){remedy}") from error
    return from_fields(kind, fields, where, remedy)
