"""Images and videos judged: ``detect`` one of them, or ``detect_many``."""

from dtn_fast.detect.batch import detect_many
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import detect

__all__ = ["DetectConfig", "detect", "detect_many"]
