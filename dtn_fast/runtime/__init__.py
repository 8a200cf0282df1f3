"""One interface for running model files of every kind: ``load_scorer`` opens any of them."""

from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_scorer

__all__ = ["Runtime", "load_scorer"]
