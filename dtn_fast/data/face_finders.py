"""The choice of a face finder by its name."""

from __future__ import annotations

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.dlib_finders import DlibCnnFinder, DlibFinder
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.yunet_finder import YunetFinder
from dtn_fast.errors import UsageError
from dtn_fast.model.config import CropPolicy, FinderName
from dtn_fast.onnx_session import CPU, Provider

FINDERS: dict[FinderName, type[FaceFinder]] = {
    finder.name: finder for finder in (DlibFinder, YunetFinder, DlibCnnFinder)
}


def open_finder(config: FinderConfig, policy: CropPolicy = CropPolicy(), provider: Provider = CPU) -> FaceFinder:
    """The face finder that ``config`` names, or else that of a model's ``policy``; YuNet runs on ``provider``.

    Raises UsageError when a package or model file is missing, a model file is given to a finder without one, or another
    provider than the CPU to a finder other than YuNet.
    """
    name = config.faces or policy.finder
    if name == "dlib" and config.face_model is not None:
        raise UsageError(f"--face-model {config.face_model}: dlib's HOG finder has no model file; add --faces yunet")
    if name == "yunet" and provider != CPU:
        return YunetFinder(config, provider)
    if provider != CPU:
        raise UsageError(f"--face-device {provider}: for --faces yunet alone, and the finder is {name}; leave it out")
    return FINDERS[name](config)
