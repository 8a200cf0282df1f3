"""Face finders behind one interface: frames in; boxes, landmarks and scores out.

dlib's HOG finder jumps between the sizes of its image pyramid (1.2 times apart) and between cells of 8 pixels.  Each
face that it finds is therefore searched again around its place at four sizes that divide one step of the pyramid, and
the boxes and scores are averaged.

The other finders' boxes are mapped to its square.  YuNet's: the centre from the landmarks, the side from the box's
area, neither of which changes when the head is turned.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.faces import IBUG, Box, Cut, FoundFace, crop_face, mapped, roll
from dtn_fast.errors import UsageError
from dtn_fast.model.config import CropPolicy, FinderName
from dtn_fast.packages import require

Image = NDArray[np.uint8]
MAX_FACES = 100
"""Maximum number of faces found in a frame; of a larger crowd the largest ones."""
MAX_SEARCH = 12e6
"""Maximum number of pixels of a frame as it is searched, so that time and memory are bounded at any --min-face: in an
8K frame dlib finds faces from 150 pixels."""
QUICK_SEARCH = 2e6
"""The same for each of the seven searches of a turned frame."""
LANDMARK_SIDE = 400
"""Side in pixels of the picture, twice a face's box, that landmarks are predicted in."""
LEAST_SIDE = 40
"""Side in pixels of the smallest face that a --min-face below 1 means: smaller ones hold nothing to judge."""


class FaceFinder(ABC):
    """Finds faces in RGB frames.  Any number of threads may call one."""

    name: ClassVar[FinderName]
    shake: ClassVar[float]
    """Difference between boxes of a face in nearly equal frames, as a share of the side."""

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        self.config = config
        self._own = threading.local()
        if config.landmark_model is not None:
            self._predictor()  # a wrong file is told now and not at the first face

    def __call__(self, frames: Sequence[Image], turned: bool = True) -> list[list[FoundFace]]:
        """The faces in each frame [H, W, 3] RGB, [H, W, 4] or [H, W]: at most MAX_FACES, largest first.

        turned: whether a frame without a face is searched again, turned.  Raises UsageError for another shape or dtype.
        """
        return [self._find(_rgb(frame), turned) for frame in frames]

    def near(self, frame: Image, face: FoundFace) -> FoundFace | None:
        """The face near the place of ``face``, found in an earlier frame, much faster than by a search of the whole
        frame; None when it is not there, and from finders that are fast enough to search every frame."""
        return None

    @property
    def gives_points(self) -> bool:
        """Whether found faces have landmarks."""
        return self.name == "yunet" or self.config.landmark_model is not None

    @abstractmethod
    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        """All faces of at least ``smallest`` pixels in an RGB frame; ``quick``: once, and in QUICK_SEARCH pixels."""

    @property
    def crowded(self) -> bool:
        """Whether the last frame that this thread searched has more faces than were given."""
        return getattr(self._own, "crowded", False)

    def _find(self, frame: Image, turned: bool) -> list[FoundFace]:
        self._own.crowded = False
        smallest = _smallest(frame, self.config.min_face)
        found = self._search(frame, smallest)
        if self.config.turned or (not found and turned):
            found = _apart([*found, *self._search_turned(frame, smallest)])
        found.sort(key=lambda face: -face.box.area)
        self._own.crowded |= len(found) > MAX_FACES
        return [self._with_points(frame, face) for face in found[:MAX_FACES]]

    def _search_turned(self, frame: Image, smallest: float) -> list[FoundFace]:
        """Faces in the frame turned by 45, 90, ... 315 degrees; of twice the size, because seven searches take long."""
        height, width = frame.shape[:2]
        scale = min(1.0, math.sqrt(2 * QUICK_SEARCH) / (width + height))  # by 45 degrees it takes (w + h)^2 / 2 pixels
        small = _scaled(frame, scale)
        found = []
        for degrees in range(45, 360, 45):
            turn = _turn(small.shape[1], small.shape[0], degrees)
            wide, high = _extent(turn, small.shape[1], small.shape[0])
            image = cv2.warpAffine(small, turn, (wide, high), borderMode=cv2.BORDER_REPLICATE)
            back = cv2.invertAffineTransform(turn)
            for face in self._search(image, 2 * smallest * scale, quick=True):
                face = face.placed(back / scale)._replace(turn=degrees)
                if 0 <= face.box.center[0] < width and 0 <= face.box.center[1] < height:
                    found.append(face)
        return found

    def _with_points(self, frame: Image, face: FoundFace) -> FoundFace:
        """The face with the landmarks of the landmark model, if there is one, predicted in an upright copy of it."""
        if self.config.landmark_model is None:
            return face
        angle = roll(face.points)
        cut = _window(face, face.turn if angle is None else angle)
        near, far = LANDMARK_SIDE // 4, LANDMARK_SIDE * 3 // 4 - 1
        rectangle = require("dlib", "dlib-bin").rectangle(near, near, far, far)
        image = np.ascontiguousarray(crop_face(frame, cut, LANDMARK_SIDE))
        found = np.array([(part.x, part.y) for part in self._predictor()(image, rectangle).parts()], np.float32)
        points = mapped(cv2.invertAffineTransform(cut.matrix(LANDMARK_SIDE)), found).astype(np.float32)
        if len(points) < IBUG:  # dlib's own five: two corners of the left eye, two of the right eye, below the nose
            unknown = np.full((2, 2), np.nan, np.float32)
            points = np.concatenate([[points[2:4].mean(0), points[:2].mean(0), points[4]], unknown]).astype(np.float32)
        return face._replace(points=points)

    def _predictor(self) -> Any:
        """The landmark predictor of the calling thread."""
        if not hasattr(self._own, "predictor"):
            path = _existing(self.config.landmark_model, "--landmark-model")
            try:
                predictor = require("dlib", "dlib-bin").shape_predictor(str(path))
                count = predictor(np.zeros((64, 64, 3), np.uint8), require("dlib", "dlib-bin").rectangle(8, 8, 56, 56))
            except RuntimeError as error:
                raise UsageError(f"--landmark-model {path}: not a shape predictor of dlib ({error})") from error
            if count.num_parts != 5 and count.num_parts < IBUG:
                raise UsageError(
                    f"--landmark-model {path}: gives {count.num_parts} points; 5, or 68 and more, are read"
                )
            self._own.predictor = predictor
        return self._own.predictor


# ------------------------------------------------------------------------------------------------ dlib

WINDOW = 80
"""Side in pixels of the smallest face that dlib's finders see."""
ZOOM = 1.1
"""Factor by which the smallest face is larger than WINDOW in the search, because faces at the limit are missed."""
LEAST_SCORE = 0.15
"""Least mean score, over the four sizes, of a face that was not there before.  In 160 noisy copies of photographs it
left 272 of 277 faces and none of 5 false ones."""
NEAR_OVERLAP = 0.05
"""Least overlap of a face with its earlier box."""
PYRAMID = 1.2
"""Factor between the sizes of dlib's image pyramid."""
NEAR_SIDES = tuple(95 * PYRAMID ** (k / 4) for k in range(4))
"""Sides in pixels that a face is scaled to when it is searched near its place: a step of the pyramid in quarters."""
PLAIN = 640
"""Longest side of the frame, and half of the longest, in the last searches for a face where none was found."""


class DlibFinder(FaceFinder):
    """dlib's HOG face finder, the paper's.  Raises UsageError when dlib is not installed."""

    name, shake = "dlib", 0.08

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._detector()

    def near(self, frame: Image, face: FoundFace) -> FoundFace | None:
        """The face that overlaps ``face`` most: the mean of up to four boxes; None when fewer than two are found."""
        window = _window(face, face.turn)
        found = []
        for side in NEAR_SIDES:
            size = round(2 * side)
            back = cv2.invertAffineTransform(window.matrix(size))
            hits = [hit.placed(back) for hit in self._hits(crop_face(frame, window, size))]
            best = max(hits, key=lambda hit: face.box.overlap(hit.box), default=None)
            if best is not None and face.box.overlap(best.box) > NEAR_OVERLAP:
                found.append((*best.box.center, best.box.side, best.score))
        if len(found) < 2:
            return None
        x, y, side, _ = np.mean(found, 0)
        score = sum(score for *_, score in found) / len(NEAR_SIDES)
        return self._with_points(frame, FoundFace(Box.around((x, y), side), score, turn=face.turn))

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        """A frame without a face is searched again, small, and then a face is taken at its first sight."""
        scale = _bounded(frame, ZOOM * WINDOW / smallest, QUICK_SEARCH if quick else MAX_SEARCH)
        hits = sorted(self._at(frame, scale), key=lambda hit: -hit.box.area)
        self._own.crowded |= len(hits) > MAX_FACES
        near = [face for hit in hits[:MAX_FACES] if (face := self.near(frame, hit)) is not None]
        if (faces := _apart([face for face in near if face.score >= LEAST_SCORE])) or quick:
            return faces
        for scale in (plain := min(1.0, PLAIN / max(frame.shape[:2])), 2 * plain):
            if hits := self._at(frame, scale):
                return [self.near(frame, hit) or hit for hit in hits]
        return []

    def _at(self, frame: Image, scale: float) -> list[FoundFace]:
        """The faces as dlib gives them in the frame scaled by ``scale``."""
        return [hit.placed(_zoom(1 / scale)) for hit in self._hits(_scaled(frame, scale))]

    def _hits(self, image: Image) -> list[FoundFace]:
        """The faces as dlib gives them; in colour, because in grey fewer are found.  From a view of a larger picture
        dlib reads other memory."""
        found = zip(*self._detector().run(np.ascontiguousarray(image), 0, 0.0)[:2], strict=True)
        return [FoundFace(_square(rectangle), float(score)) for rectangle, score in found]

    def _detector(self) -> Any:
        """The detector of the calling thread."""
        if not hasattr(self._own, "detector"):
            self._own.detector = require("dlib", "dlib-bin").get_frontal_face_detector()
        return self._own.detector


CNN_SEARCH = 1e6
"""Maximum number of pixels that dlib's network searches on a CPU, where a million takes six seconds: --min-face is then
met in frames of up to a million pixels divided by the square of 80 / --min-face."""


CNN_TO_DLIB = (1.05, 0.06)
"""Side of the HOG finder's square divided by the network's, and its shift right and down in sides: medians over 16
faces in photographs."""


class DlibCnnFinder(FaceFinder):
    """dlib's MMOD network.  Raises UsageError without dlib or a model file."""

    name, shake = "dlib-cnn", 0.08

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._on_gpu = bool(getattr(require("dlib", "dlib-bin"), "DLIB_USE_CUDA", False))
        self._detector()

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        pixels = CNN_SEARCH if not self._on_gpu else QUICK_SEARCH if quick else MAX_SEARCH
        scale = _bounded(frame, WINDOW / smallest, pixels)
        hits = self._detector()(_scaled(frame, scale), 0)
        found = [FoundFace(_square(hit.rect), float(hit.confidence)).placed(_zoom(1 / scale)) for hit in hits]
        return [face._replace(box=self._like_hog(face.box)) for face in found]

    @staticmethod
    def _like_hog(box: Box) -> Box:
        x, y = (c + CNN_TO_DLIB[1] * box.side for c in box.center)
        return Box.around((x, y), CNN_TO_DLIB[0] * box.side)

    def _detector(self) -> Any:
        if not hasattr(self._own, "detector"):
            if self.config.face_model is None:
                raise UsageError("--faces dlib-cnn: needs --face-model mmod_human_face_detector.dat "
                                 "(from https://github.com/davisking/dlib-models)")  # fmt: skip
            path = _existing(self.config.face_model, "--face-model")
            try:
                self._own.detector = require("dlib", "dlib-bin").cnn_face_detection_model_v1(str(path))
            except RuntimeError as error:
                raise UsageError(f"--face-model {path}: not a face detector of dlib ({error})") from error
        return self._own.detector


# ------------------------------------------------------------------------------------------------ YuNet

YUNET = ("opencv/face_detection_yunet", "face_detection_yunet_2026may.onnx")
"""Repository of the Hugging Face hub, and file in it."""
YUNET_SHA256 = "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0"
YUNET_SCORE = 0.7
"""Least score of a face."""
YUNET_SIDE = 18
"""Side in pixels that the smallest face is scaled to; YuNet finds most from 10 pixels."""
AGAIN = 0.7
"""Second scale, as a share of the first, at which faces are searched that hide between scales: it added two of 79."""
YUNET_FRAME = 192
"""Shorter side in pixels that smaller frames are enlarged to, by two at most; in tiny ones YuNet misses faces."""
YUNET_LARGEST = 20
"""Side of the largest face to be relied on, as a multiple of YUNET_SIDE; larger ones are searched in a smaller copy."""
TO_DLIB = 0.94
"""Side of dlib's square divided by the root of the area of YuNet's box: 0.96 over 72 faces in photographs, 0.92 over
170 rendered ones (medians).  Its centre is the middle between eyes and mouth, to 1 % of the side."""


class YunetFinder(FaceFinder):
    """OpenCV's FaceDetectorYN, with five landmarks.  Raises UsageError when its model cannot be had or read."""

    name, shake = "yunet", 0.05

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._path = fetch_yunet() if config.face_model is None else _existing(config.face_model, "--face-model")
        self._detector()

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        scale = min(max(YUNET_SIDE / smallest, YUNET_FRAME / min(frame.shape[:2])), 2.0)
        scale = _bounded(frame, scale, QUICK_SEARCH if quick else MAX_SEARCH)
        if quick:
            return self._at(frame, scale)
        found = _apart([*self._at(frame, scale), *self._at(frame, AGAIN * scale)])
        while min(frame.shape[:2]) * scale > 1.5 * YUNET_SIDE * YUNET_LARGEST:
            scale = max(scale / 4, YUNET_SIDE * YUNET_LARGEST / min(frame.shape[:2]))
            found = _apart([*found, *self._at(frame, scale)])
        return found

    def _at(self, frame: Image, scale: float) -> list[FoundFace]:
        image = cv2.cvtColor(_scaled(frame, scale), cv2.COLOR_RGB2BGR)
        detector, size = self._detector(), (image.shape[1], image.shape[0])
        if tuple(detector.getInputSize()) != size:
            detector.setInputSize(size)
        rows = detector.detect(image)[1]
        return [self._face(row / scale, float(row[14])) for row in (rows if rows is not None else ())]

    @staticmethod
    def _face(row: NDArray[np.float32], score: float) -> FoundFace:
        points = row[4:14].reshape(5, 2)
        x, y = (points[:2].mean(0) + points[3:].mean(0)) / 2
        side = TO_DLIB * math.sqrt(max(float(row[2] * row[3]), 0.0))
        return FoundFace(Box.around((float(x), float(y)), side), score, points.astype(np.float32))

    def _detector(self) -> Any:
        if not hasattr(self._own, "detector"):
            try:
                with quiet_opencv():
                    detector = cv2.FaceDetectorYN.create(str(self._path), "", (64, 64), YUNET_SCORE, 0.3, 5000)
                    detector.detect(np.zeros((64, 64, 3), np.uint8))
            except cv2.error as error:
                raise UsageError(f"--face-model {self._path}: OpenCV {cv2.__version__} cannot run it as YuNet "
                                 f"({error.err or error}); use {YUNET[1]}") from error  # fmt: skip
            self._own.detector = detector
        return self._own.detector


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV from logging, one thread at a time; it warns of its own defaults."""
    with _LOGGING:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            cv2.utils.logging.setLogLevel(level)


_LOGGING = threading.Lock()


def fetch_yunet() -> Path:
    """YuNet's model file: fetched from the Hugging Face hub once and kept in its cache.

    Raises UsageError when it cannot be fetched or is not the pinned file.
    """
    hub = require("huggingface_hub", "huggingface_hub")
    by_hand = f"download {YUNET[1]} from https://huggingface.co/{YUNET[0]} and name it with --face-model"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)  # a line for each attempt
    try:
        there = hub.try_to_load_from_cache(*YUNET)  # without asking the hub whether the file has changed
        path = Path(there if isinstance(there, str) else hub.hf_hub_download(*YUNET))
    except Exception as error:  # the hub's, requests', httpx's and the file system's errors have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"--faces yunet: its model cannot be fetched ({reason}); {by_hand}") from error
    finally:
        log.setLevel(level)
    if hashlib.sha256(path.read_bytes()).hexdigest() != YUNET_SHA256:
        raise UsageError(f"{path}: not the file whose checksum is pinned; delete it, or {by_hand}")
    return path


# ------------------------------------------------------------------------------------------------ all


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


def _existing(path: Path | None, option: str) -> Path:
    if path is None or not path.is_file():
        raise UsageError(f"{option} {path}: no such file")
    return path


def _rgb(frame: Image) -> Image:
    """The frame as RGB without alpha."""
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in (1, 3, 4)):
        kind = f"{frame.dtype} {list(frame.shape)}"
        raise UsageError(f"a frame is {kind}; it must be uint8 [H, W], [H, W, 3] or [H, W, 4]")
    if frame.ndim == 2 or frame.shape[2] == 1:
        return np.repeat(frame.reshape(*frame.shape[:2], 1), 3, 2)
    return np.ascontiguousarray(frame[..., :3])


def _smallest(frame: Image, least: float) -> float:
    """Side in pixels of the smallest face to find."""
    return least if least >= 1 else max(least * min(frame.shape[:2]), LEAST_SIDE)


def _bounded(frame: Image, scale: float, pixels: float = MAX_SEARCH) -> float:
    return min(scale, math.sqrt(pixels / (frame.shape[0] * frame.shape[1])))


def _scaled(image: Image, scale: float) -> Image:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if size == (image.shape[1], image.shape[0]):
        return np.ascontiguousarray(image)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _window(face: FoundFace, degrees: float) -> Cut:
    """The square of twice a face's side around it, between whole pixels."""
    x, y = face.box.center
    return Cut((round(x), round(y)), 2 * face.box.side, degrees)


def _zoom(scale: float) -> NDArray[np.float64]:
    """The affine map from a picture to one ``scale`` times as large."""
    return np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])


def _square(rectangle: Any) -> Box:
    """A dlib.rectangle as a square of the same centre and area."""
    center = (rectangle.left() + rectangle.right() + 1) / 2, (rectangle.top() + rectangle.bottom() + 1) / 2
    return Box.around(center, math.sqrt(max(rectangle.width() * rectangle.height(), 1)))


def _apart(faces: list[FoundFace]) -> list[FoundFace]:
    """The faces without those that overlap a surer one."""
    kept: list[FoundFace] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(face.box.overlap(other.box) < 0.3 for other in kept):
            kept.append(face)
    return kept


def _turn(width: int, height: int, degrees: float) -> NDArray[np.float64]:
    """The affine map that turns a picture anticlockwise into a frame that holds all of it."""
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    wide, high = _extent(turn, width, height)
    turn[:, 2] += (wide / 2 - width / 2, high / 2 - height / 2)
    return turn


def _extent(turn: NDArray[np.float64], width: int, height: int) -> tuple[int, int]:
    wide, high = (abs(row[0]) * width + abs(row[1]) * height for row in turn.tolist())
    return math.ceil(wide), math.ceil(high)
