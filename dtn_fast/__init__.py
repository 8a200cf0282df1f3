"""dtn_fast: the DTN face-forgery detector, trained and deployed at the speed of the hardware."""

import sys

from dtn_fast.model.config import DTNConfig
from dtn_fast.model.dtn import DTN
from dtn_fast.version import __version__

__all__ = ["DTN", "DTNConfig", "__version__"]

if sys.modules.get("timm"):  # timm takes seconds to import: register where it is already there, never pull it in
    from dtn_fast.model import timm_registry  # noqa: F401
