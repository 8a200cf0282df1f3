"""Detection of forged faces: ``detect`` for one image or video, ``detect_many`` for several."""

from dtn_fast.detect.batch import detect_many
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import detect

__all__ = ["DetectConfig", "detect", "detect_many"]
