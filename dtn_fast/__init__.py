"""dtn_fast: the DTN face-forgery detector, its training, evaluation, export and deployment, with fused GPU kernels."""

import os
import sys

# before torch: its idle threads sleep instead of spinning, which beside a busy process made training four times faster
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dtn_fast.model.config import DTNConfig
from dtn_fast.model.dtn import DTN
from dtn_fast.version import __version__

__all__ = ["DTN", "DTNConfig", "__version__"]

if sys.modules.get("timm"):  # timm takes seconds to import: register only if it is imported already
    from dtn_fast.model import timm_registry  # noqa: F401
