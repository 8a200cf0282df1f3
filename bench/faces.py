"""What each face finder finds, how still its boxes are and how long it takes: ``dtn-fast bench faces``.

The pictures are composed of one public-domain photograph; --photos adds recall on a folder of photographs with their
faces in truth.json ({"name.jpg": [[x, y, width], ...]}).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image as PillowImage

from dtn_fast.bench.bench_data import film, one_core
from dtn_fast.bench.results import FACES, environment, write_json
from dtn_fast.data.config import FinderConfig, PrepareConfig
from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.face_finders import open_finder
from dtn_fast.data.face_tracker import FaceTracker
from dtn_fast.data.faces import Box, Cut, FoundFace, crop_face
from dtn_fast.data.finder_base import FaceFinder, Image
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video import read_frames
from dtn_fast.errors import UsageError
from dtn_fast.packages import require

SIDES = (24, 32, 40, 48, 64, 80, 96, 128, 160)
"""Sides of faces in pixels that are looked for at 1920x1080."""
ANGLES = tuple(range(0, 181, 15))
NEARLY = 12
"""Number of nearly equal frames: shifted by a pixel, lit by 2 % more or less, noisy, compressed as JPEG."""


class Shrunk(DlibFinder):
    """The baseline: dlib in the frame shrunk to 640 pixels, enlarged only when nothing is found, with one search near a
    face, scaled by its last size, as this program did before."""

    shake = 0.0

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        plain = min(1.0, 640 / max(frame.shape[:2]))
        return self._at(frame, plain) or self._at(frame, 2 * plain)

    def near(self, frame: Image, face: FoundFace) -> FoundFace | None:
        window, size = Cut(face.box.center, 2 * face.box.side), 220
        back = cv2.invertAffineTransform(window.matrix(size))
        hits = [hit.placed(back) for hit in self._hits(crop_face(frame, window, size))]
        return max(hits, key=lambda hit: hit.box.overlap(face.box), default=None)

    def _search_turned(self, frame: Image, smallest: float) -> list[FoundFace]:
        return []


def finders(model: Path | None) -> dict[str, FaceFinder]:
    """The contenders by their column title; YuNet only if its model is given or can be fetched."""
    found: dict[str, FaceFinder] = {"dlib, before": Shrunk(), "dlib": DlibFinder()}
    try:
        found["yunet"] = open_finder(FinderConfig("yunet", model))
    except UsageError as error:
        print(f"yunet: not run ({error})")
    return found


def measure_faces(model: Path | None = None, photos: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Every measure of every finder: {"columns": titles, "rows": {measure: values}, "environment": origin}."""
    import tempfile

    with one_core(), tempfile.TemporaryDirectory() as folder:
        contenders = finders(model)
        path, true = film(Path(folder), 24 if quick else 96)
        frames = [frame.image for frame in read_frames(path, 8 if quick else 24, threads=1)]
        boxes = [true[round(n)] for n in np.linspace(0, len(true) - 1, len(frames))]
        nearly = [_nearly(portrait(320), seed) for seed in range(NEARLY)]
        blank = np.full((1080, 1920, 3), 120, np.uint8)
        rows: dict[str, Callable[[FaceFinder], str]] = {
            "smallest face at 1920x1080, alone": lambda f: _smallest(f, 0),
            "the same beside a face of 400 pixels": lambda f: _smallest(f, 400),
            "heads turned in the picture": _largest_turn,
            "largest step of the side over equal frames": lambda f: _shaking(f, [portrait(320)] * 6),
            f"over {NEARLY} nearly equal frames": lambda f: _shaking(f, nearly),
            "least overlap with the true box of a moving face": lambda f: _following(f, frames, boxes),
            "ms a frame, whole search, 1920x1080": lambda f: _ms(lambda: f([_frame(110, 400)]), 1),
            "ms a frame, whole search, no face in it": lambda f: _ms(lambda: f([blank]), 1),
            "ms a frame, tracked, 1280x720": lambda f: _ms(lambda: _tracked(f, frames), len(frames)),
        }  # fmt: skip
        if photos is not None:
            rows["photographs: faces found, false ones"] = lambda f: _recall(f, photos)
        table = {}
        for name, measure in rows.items():
            table[name] = [measure(finder) for finder in contenders.values()]
            print(f"{name}: " + ", ".join(f"{c} {v}" for c, v in zip(contenders, table[name], strict=True)), flush=True)
        return {"environment": environment(), "columns": list(contenders), "rows": table}


def write_faces(folder: Path, model: Path | None, photos: Path | None, quick: bool) -> Path:
    """Measures, and writes faces.json in ``folder``."""
    write_json(folder / FACES, measure_faces(model, photos, quick))
    return folder / FACES


def portrait(side: int) -> Image:
    """Head and shoulders; the face's box is 91/320 of the side, its middle at (0.51, 0.39)."""
    photo = require("skimage.data").astronaut()[:320, 60:380]
    shrinks = side < 320
    return cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _frame(side: int, beside: int) -> Image:
    """A frame 1920x1080 with a face of ``side`` pixels at the lower left and one of ``beside`` at the lower right."""
    frame = np.full((1080, 1920, 3), (150, 160, 170), np.uint8)
    for pixels, right in ((side, False), (beside, True)):
        if pixels:
            face = portrait(round(320 * pixels / 91))
            left = 900 if right else 200
            face = face[:1080, : 1920 - left]
            frame[1080 - len(face) :, left : left + face.shape[1]] = face
    return frame


def _smallest(finder: FaceFinder, beside: int) -> str:
    """Side of the smallest face from which on all are found, and nothing else is."""
    least = math.inf
    for side in reversed(SIDES):
        place = Box.around((200 + 0.51 * 320 * side / 91, 1080 - 0.61 * 320 * side / 91), side)
        found = finder([_frame(side, beside)])[0]
        if not any(face.box.overlap(place) > 0.4 for face in found) or len(found) != 1 + (beside > 0):
            break
        least = side
    return f"{least} px" if least < math.inf else f"over {SIDES[-1]} px"


def _largest_turn(finder: FaceFinder) -> str:
    """Range of angles that are all found."""
    last = -1
    for angle in ANGLES:
        turn = cv2.getRotationMatrix2D((160, 160), angle, 1.0)
        image = cv2.warpAffine(portrait(320), turn, (320, 320), borderValue=(120, 120, 120))
        place = FoundFace(Box.around((164, 126), 91), 1.0).placed(turn).box
        if not any(face.box.overlap(place) > 0.4 for face in finder([image])[0]):
            break
        last = angle
    return f"0 to {last} degrees"


def _nearly(image: Image, seed: int) -> Image:
    rng = np.random.default_rng(seed)
    lit = np.clip(image * rng.uniform(0.98, 1.02) + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(np.roll(lit, tuple(rng.integers(-1, 2, 2)), (0, 1))).save(buffer, "JPEG", quality=85)
    return np.asarray(PillowImage.open(buffer))


def _shaking(finder: FaceFinder, frames: list[Image]) -> str:
    sides = [max((face.box.side for face in faces), default=0) for faces in _tracked(finder, frames)]
    steps = [abs(b / a - 1) for a, b in itertools.pairwise(sides)] if all(sides) else [math.inf]
    return f"{max(steps):.1%}"


def _tracked(finder: FaceFinder, frames: list[Image]) -> list[Any]:
    tracker = FaceTracker(finder, PrepareConfig.every)
    return [tracker(frame) for frame in frames]


def _following(finder: FaceFinder, frames: list[Image], true: list[Box]) -> str:
    found = _tracked(finder, frames)
    overlaps = [
        max((face.box.overlap(box) for face in faces), default=0.0) for faces, box in zip(found, true, strict=True)
    ]
    return f"{min(overlaps):.2f}"


def _ms(call: Callable[[], object], count: int) -> str:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(times) / count:.0f}"


def _recall(finder: FaceFinder, photos: Path) -> str:
    """Faces of truth.json that are found, and faces found that are in neither truth.json nor ignore.json."""
    try:
        truth = json.loads((photos / "truth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--photos {photos}: no readable truth.json there ({error})") from error
    other = json.loads((photos / "ignore.json").read_text()) if (photos / "ignore.json").is_file() else {}
    hits = false = total = 0
    for name, faces in truth.items():
        left = [face.box for face in finder([read_image(photos / name)])[0]]
        for x, y, width in faces:
            total += 1
            match = next((box for box in left if _near(box, x, y, width)), None)
            if match is not None:
                hits += 1
                left.remove(match)
        false += sum(not any(_near(box, *face) for face in other.get(name, [])) for box in left)
    return f"{hits} of {total}, {false} false"


def _near(box: Box, x: float, y: float, width: float) -> bool:
    """Whether a box lies on a face of this middle and width."""
    return math.dist(box.center, (x, y)) < 0.8 * width and 0.4 < box.side / width < 2.5
