"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import tyro

from dtn_fast.runtime.config import Runtime

Runtimed = Annotated[Runtime, tyro.conf.OmitArgPrefixes]
