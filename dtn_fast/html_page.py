"""Self-contained HTML pages: a template filled with escaped values, pictures inside as data: URIs."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtn_fast.packages import require


def render(template: Path, filters: dict[str, Callable[..., object]] | None = None, **values: object) -> str:
    """Fills a Jinja template file.  Every value is escaped; a name without a value is an error."""
    jinja2: Any = require("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= filters or {}
    return str(environment.from_string(template.read_text(encoding="utf-8")).render(**values))


def data_uri(media_type: str, data: bytes) -> str:
    """``data`` as a URI: ``data_uri("image/png", ...)`` can be the source of a picture."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
