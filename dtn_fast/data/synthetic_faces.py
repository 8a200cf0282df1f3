"""The synthetic demo set: faces rendered from seeds, forged by four methods; videos and masks in FF++'s layout.

A face is drawn from (identity, take, time): the identity fixes skin, hair and proportions, the take fixes background,
light and motion.  Every forgery starts from the unforged render, so reals and fakes are encoded exactly once, at a
quality drawn independently of the label.  Identities are disjoint between splits and paired as in FaceForensics++.
Results on this set say nothing about real deepfakes; the marker file makes every report state this.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.config import SyntheticConfig
from dtn_fast.data.synthetic_marker import HELD_OUT, MARKER, METHODS, STAMP
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import UsageError

FPS = 5
Image = NDArray[np.uint8]
Map = NDArray[np.float32]


# ------------------------------------------------------------------------------------------------- drawing a face


class _Canvas:
    """A float RGB picture to draw soft-edged shapes on."""

    def __init__(self, image: Map) -> None:
        self.image = image

    def ellipse(self, x: float, y: float, a: float, b: float, color, soft: float = 1.5, angle=0.0, alpha=1.0) -> None:
        """Draws a rotated ellipse (centre, half axes in pixels) of ``color`` [3] with an edge ``soft`` pixels wide."""
        reach = max(a, b) + soft + 1
        height, width = self.image.shape[:2]
        x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 2, width)
        y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 2, height)
        if x0 >= x1 or y0 >= y1:
            return
        yy, xx = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        mask = _ellipse_mask(xx, yy, x, y, a, b, soft, angle)[..., None] * alpha
        patch = self.image[y0:y1, x0:x1]
        patch += mask * (np.asarray(color, np.float32) - patch)


def _ellipse_mask(xx: Map, yy: Map, x: float, y: float, a: float, b: float, soft: float, angle: float = 0.0) -> Map:
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = ((xx - x) * cos + (yy - y) * sin) / a, (-(xx - x) * sin + (yy - y) * cos) / b
    return np.clip((1 - np.sqrt(u * u + v * v)) * min(a, b) / soft + 0.5, 0, 1)


def _texture(rng: np.random.Generator, size: int, scales: tuple[int, ...], decay: float) -> Map:
    """Smooth random texture of unit-order amplitude, [size, size]: noise at several scales, finer ones weaker."""
    total = np.zeros((size, size), np.float32)
    for level, cells in enumerate(scales):
        grid = rng.standard_normal((cells, cells)).astype(np.float32)
        total += decay**level * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return total


SKINS = np.array([[225, 180, 150], [205, 150, 110], [170, 115, 80], [125, 80, 55]], np.float32)
HAIRS = np.array([[30, 25, 25], [80, 55, 35], [150, 110, 60], [125, 120, 120]], np.float32)
IRISES = np.array([[40, 60, 90], [90, 60, 40], [60, 90, 60]], np.float32)


class Face:
    """One identity in one take; :meth:`draw` renders its frame at a time in seconds."""

    def __init__(self, identity: int, take: int, size: int) -> None:
        who, how = np.random.default_rng((identity, 1)), np.random.default_rng((identity, take, 2))
        self.size, self.who, self.seed = size, who, (identity, take)
        # identity
        self.skin = SKINS[who.integers(4)] + who.normal(0, 8, 3)
        self.hair = HAIRS[who.integers(4)] + who.normal(0, 6, 3)
        self.iris = IRISES[who.integers(3)]
        self.width, self.height = size * who.uniform(0.21, 0.25), size * who.uniform(0.29, 0.34)
        self.eye_y, self.eye_x = who.uniform(0.10, 0.18), who.uniform(0.40, 0.46)
        self.eye_w, self.eye_h, self.brow = who.uniform(0.17, 0.22), who.uniform(0.42, 0.58), who.uniform(2.0, 2.6)
        self.nose_w, self.mouth_y, self.mouth_w = (
            who.uniform(0.15, 0.20),
            who.uniform(0.45, 0.52),
            who.uniform(0.3, 0.4),
        )
        self.pores = _texture(who, size, (16, 32, 64, 128), 0.8) * 3.0
        # take
        color = how.uniform(40, 200, 3)
        clouds = _texture(how, size, (4, 8, 16, 32, 64), 0.6)[..., None] * how.uniform(10, 40) * how.uniform(0.5, 1, 3)
        self.background = np.clip(color + clouds, 0, 255).astype(np.float32)
        self.shirt = how.uniform(30, 220, 3)
        light = np.array([math.sin(how.uniform(-0.8, 0.8)), how.uniform(-0.6, 0.2), how.uniform(0.6, 1.0)])
        self.light = light / np.linalg.norm(light)
        self.scale, self.center = how.uniform(0.9, 1.05), size / 2 + how.normal(0, size * 0.02, 2)
        self.exposure, self.grain = how.uniform(0.85, 1.1), how.uniform(1, 4)
        self.phases, self.rates = how.uniform(0, 2 * math.pi, 6), how.uniform(0.6, 2.0, 6)

    def _wave(self, channel: int, seconds: float) -> float:
        return math.sin(self.phases[channel] + self.rates[channel] * seconds)

    def draw(self, seconds: float) -> tuple[Image, Map]:
        """The frame [S, S, 3] uint8 RGB before camera noise, and the outline of the face, [40, 2] float32 (x, y)."""
        size = self.size
        cx, cy = self.center + size * 0.012 * np.array([self._wave(0, seconds), self._wave(1, seconds)])
        fw, fh = self.width * self.scale, self.height * self.scale
        turn = 0.16 * self._wave(2, seconds) * fw * 0.5
        canvas = _Canvas(self.background.copy())
        put, skin = canvas.ellipse, self.skin
        put(cx, cy - fh * 0.18, fw * 1.22, fh * 1.12, self.hair, 3)
        put(cx, cy + fh * 1.25, fw * 0.55, fh * 0.6, skin * 0.85, 2)
        put(cx, cy + fh * 1.95, fw * 2.0, fh * 0.75, self.shirt, 2)
        # a shaded ellipsoid with pores
        yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
        nx, ny = (xx - cx) / fw, (yy - cy) / fh
        nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.02, 1))
        shade = np.clip(nx * self.light[0] + ny * self.light[1] + nz * self.light[2], 0, 1) * 0.55 + 0.5
        shift = np.array([[1, 0, cx - size / 2], [0, 1, cy - size / 2]], np.float32)
        pores = cv2.warpAffine(self.pores, shift, (size, size), borderMode=cv2.BORDER_REFLECT)
        head = _ellipse_mask(xx, yy, cx, cy, fw, fh, 1.5)[..., None]
        canvas.image += head * (skin.astype(np.float32) * shade[..., None] + pores[..., None] - canvas.image)
        # eyes and brows
        ey, ew = cy - fh * self.eye_y, fw * self.eye_w
        eh = ew * self.eye_h * (1.0 if self._wave(3, seconds * 2) > -0.93 else 0.35)  # a blink now and then
        gaze = ew * 0.2 * self._wave(4, seconds)
        for side in (-1, 1):
            x = cx + turn + side * self.eye_x * fw
            put(x, ey, ew * 1.5, eh * 2.2, skin * 0.55, 6, alpha=0.35)
            put(x, ey, ew, eh, (232, 228, 225), 1)
            put(x + gaze, ey, eh * 0.8, eh * 0.8, self.iris, 1)
            put(x + gaze, ey, eh * 0.4, eh * 0.4, (10, 10, 10), 1)
            put(x + gaze - eh * 0.2, ey - eh * 0.25, eh * 0.14, eh * 0.14, (250, 250, 250), 0.7)
            put(x, ey - eh * 0.9, ew * 1.05, eh * 0.18, (40, 35, 35), 1, alpha=0.8)
            brow = ey - ew * self.eye_h * self.brow
            put(x, brow, ew * 1.25, ew * self.eye_h * 0.35, self.hair * 0.8 + 10, 1.5, side * 0.12, 0.9)
        # nose and mouth
        nose = cy + fh * 0.18
        put(cx + turn * 1.3, cy + fh * 0.02, fw * 0.09, fh * 0.2, skin * 1.15, 7, alpha=0.35)
        put(cx + turn * 1.3, nose, fw * self.nose_w, fh * 0.06, skin * 0.72, 4, alpha=0.5)
        for side in (-1, 1):
            x = cx + turn * 1.3 + side * fw * 0.1
            put(x, nose + fh * 0.015, fw * 0.045, fh * 0.018, skin * 0.35, 1.5, alpha=0.8)
        my, mw, opening = cy + fh * self.mouth_y, fw * self.mouth_w, max(self._wave(5, seconds * 2), 0) * 0.05 * fh
        put(cx + turn, my, mw, fh * 0.055 + opening, skin * (0.82, 0.58, 0.62), 2, alpha=0.9)
        put(cx + turn, my, mw * 0.85, fh * 0.008 + opening * 0.7, (60, 30, 40), 1, alpha=0.9)
        put(cx + turn, my + fh * 0.14, mw * 0.6, fh * 0.04, skin * 0.7, 5, alpha=0.3)
        roll = cv2.getRotationMatrix2D((size / 2, size / 2), 6 * self._wave(1, seconds * 0.7), 1)
        picture = cv2.warpAffine(canvas.image, roll, (size, size), borderMode=cv2.BORDER_REFLECT) * self.exposure
        around = np.linspace(0, 2 * math.pi, 40)
        outline = np.stack([cx + turn * 0.3 + fw * 0.86 * np.cos(around), cy + fh * (0.08 + 0.8 * np.sin(around))], 1)
        outline = outline @ roll[:, :2].T + roll[:, 2]
        return np.clip(picture, 0, 255).astype(np.uint8), outline.astype(np.float32)

    def camera(self, image: Image, frame: int) -> Image:
        """Adds sensor noise, after any forgery so that the noise carries no trace of it."""
        rng = np.random.default_rng((*self.seed, frame, 3))
        return np.clip(image + self.grain * rng.standard_normal(image.shape, np.float32), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- forging a face


def forge(method: str, rng: np.random.Generator, source: Face) -> Callable[[Image, Map, float], tuple[Image, Image]]:
    """A forgery with parameters drawn once per video, as a function (frame, outline, seconds) -> (forged frame, mask).

    The mask [S, S] is 255 in the convex hull of the outline, into which the forgery is blended with a soft edge.
    SynthBlend blends a recoloured, shifted copy of the face over it; SynthSwap another identity's face, aligned and
    colour-matched; SynthResample the face after downsampling and upsampling, as by a generator; SynthWarp distorts it.
    """
    color, angle, zoom, shift = rng.normal(0, 11, 3), rng.normal(0, 1.5), rng.uniform(0.96, 1.04), rng.normal(0, 3, 2)
    factor, wobble = rng.uniform(1.8, 3.2), rng.standard_normal((source.size, source.size, 2)).astype(np.float32)
    soft, alpha, jitter = rng.uniform(3, 7), rng.choice([0.85, 1.0, 1.0]), rng.normal(0, 2, (40, 2))
    bend = cv2.GaussianBlur(wobble, (0, 0), 12) * rng.uniform(60, 95)

    def apply(image: Image, outline: Map, seconds: float) -> tuple[Image, Image]:
        size = image.shape[0]
        mask = np.zeros((size, size), np.float32)
        hull = cv2.convexHull((outline + jitter).astype(np.float32)).astype(np.int32)
        cv2.fillConvexPoly(mask, hull, 1.0)
        inside = mask > 0
        face = image.astype(np.float32)
        if method == "SynthBlend":
            move = cv2.getRotationMatrix2D((size / 2, size / 2), angle, zoom)
            move[:, 2] += shift
            face = cv2.warpAffine(face + color, move, (size, size), borderMode=cv2.BORDER_REFLECT)
        elif method == "SynthSwap":
            other, other_outline = source.draw(seconds)
            move = cv2.estimateAffinePartial2D(other_outline, outline)[0]
            face = cv2.warpAffine(other.astype(np.float32), move, (size, size), borderMode=cv2.BORDER_REFLECT)
            mean, deviation = face[inside].mean(0), face[inside].std(0) + 1e-3
            face = (face - mean) / deviation * image[inside].std(0) + image[inside].mean(0)
        elif method == "SynthResample":
            small = cv2.resize(face, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
            face = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        elif method == "SynthWarp":
            yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
            face = cv2.remap(
                face, xx + bend[..., 0], yy + bend[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
            )
        else:
            raise UsageError(f"unknown forgery {method!r}; known are {', '.join(METHODS)}")
        blend = (cv2.GaussianBlur(mask, (0, 0), soft) * alpha)[..., None]
        forged = np.clip(image * (1 - blend) + face * blend, 0, 255).astype(np.uint8)
        return forged, np.where(inside, 255, 0).astype(np.uint8)

    return apply


@functools.lru_cache(maxsize=2)
def _pristine(target: int, frames: int, size: int, seed: int, fps: int) -> tuple[Face, list[tuple[Image, Map]]]:
    """A target's face and unforged frames, cached while its forgeries are made."""
    face = Face(target, seed, size)
    return face, [face.draw(index / fps) for index in range(frames)]


def film(
    target: int, source: int | None, method: str | None, frames: int, size: int, seed: int, fps: int = FPS
) -> list[Image]:
    """Renders a video of ``target``, forged by ``method`` from ``source`` if given: frames [S, S, 3] uint8 RGB."""
    return film_and_masks(target, source, method, frames, size, seed, fps)[0]


def film_and_masks(
    target: int, source: int | None, method: str | None, frames: int, size: int, seed: int, fps: int = FPS
) -> tuple[list[Image], list[Image]]:
    """The frames of :func:`film`, and of a forgery the mask [S, S] of each, 255 where forged."""
    face, drawn = _pristine(target, frames, size, seed, fps)
    images, masks = [image for image, _ in drawn], list[Image]()
    if method is not None and source is not None:
        rng = np.random.default_rng((seed, METHODS.index(method), target, source))
        change = forge(method, rng, Face(source, seed, size))
        pairs = [change(image, outline, index / fps) for index, (image, outline) in enumerate(drawn)]
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
    return [face.camera(image, index) for index, image in enumerate(images)], masks


# ------------------------------------------------------------------------------------------------- the FF++ tree


class RenderJob(NamedTuple):
    path: Path
    """Path of the video under the root."""
    target: int
    source: int | None = None
    method: str | None = None

    @property
    def mask(self) -> Path | None:
        """Path of the video of a forgery's masks under the root; None: a real."""
        return (
            None if self.method is None else Path(f"manipulated_sequences/{self.method}/masks/videos/{self.path.name}")
        )

    def missing(self, root: Path) -> list[Path]:
        """The job's paths that are not there yet."""
        return [path for path in (self.path, self.mask) if path is not None and not (root / path).is_file()]


def _write(root: Path, config: SyntheticConfig, job: RenderJob) -> None:
    cv2.setNumThreads(1)  # the pool already uses every core
    # the quality is drawn with the file's path as seed, from the same distribution for both labels
    crf = int(np.random.default_rng((config.seed, *job.path.as_posix().encode())).integers(18, 27))
    frames, masks = film_and_masks(job.target, job.source, job.method, config.frames, config.size, config.seed)
    missing = job.missing(root)
    if job.path in missing:
        write_video(root / job.path, frames, fps=FPS, crf=crf)
    if job.mask in missing:
        write_video(root / job.mask, [cv2.merge([mask] * 3) for mask in masks], fps=FPS, crf=18)


def make_synthetic(root: Path, config: SyntheticConfig, workers: int) -> Iterator[tuple[int, int]]:
    """Writes the set under ``root`` in FF++'s layout, yielding (number of videos done, total).

    Existing videos are kept, so an interrupted run resumes.  Raises UsageError when ``root`` holds another dataset or
    a synthetic set of another configuration.
    """
    marker = root / MARKER
    stamp = json.dumps({"stamp": STAMP, "held_out": HELD_OUT, **asdict(config)}, indent=2)
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != stamp:
            raise UsageError(f"{root}: holds a synthetic set of another configuration; choose an empty folder")
    elif root.exists() and any(root.iterdir()):
        raise UsageError(f"{root}: is not empty; choose an empty folder for the synthetic set")
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(stamp, encoding="utf-8")

    jobs: list[RenderJob] = []
    start = 0
    for split in ("train", "val", "test"):
        people = list(range(start, start + getattr(config, split)))
        start += len(people)
        pairs = list(zip(people[::2], people[1::2], strict=True))
        (root / "splits").mkdir(exist_ok=True)
        text = json.dumps([[f"{a:03d}", f"{b:03d}"] for a, b in pairs])
        (root / "splits" / f"{split}.json").write_text(text, encoding="utf-8")
        for target, source in [*pairs, *((b, a) for a, b in pairs)]:
            jobs.append(RenderJob(Path(f"original_sequences/youtube/c23/videos/{target:03d}.mp4"), target))
            for method in METHODS:
                path = Path(f"manipulated_sequences/{method}/c23/videos/{target:03d}_{source:03d}.mp4")
                jobs.append(RenderJob(path, target, source, method))
    missing = [job for job in jobs if job.missing(root)]
    done = len(jobs) - len(missing)
    yield done, len(jobs)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(functools.partial(_write, root, config), missing, chunksize=1 + len(METHODS)):
            done += 1
            yield done, len(jobs)
