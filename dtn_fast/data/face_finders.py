"""The choice of a face finder by its name."""

from __future__ import annotations

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.dlib_finders import DlibCnnFinder, DlibFinder
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.yunet_finder import YunetFinder
from dtn_fast.errors import UsageError
from dtn_fast.model.config import CropPolicy, FinderName

FINDERS: dict[FinderName, type[FaceFinder]] = {
    finder.name: finder for finder in (DlibFinder, YunetFinder, DlibCnnFinder)
}


def open_finder(config: FinderConfig, policy: CropPolicy = CropPolicy()) -> FaceFinder:
    """The face finder that ``config`` names, or else that of a model's ``policy``.

    Raises UsageError when a package or model file is missing, or a model file is given to a finder without one.
    """
    name = config.faces or policy.finder
    if name == "dlib" and config.face_model is not None:
        raise UsageError(f"--face-model {config.face_model}: dlib's HOG finder has no model file; add --faces yunet")
    return FINDERS[name](config)
