"""Robustness perturbations: DeeperForensics' seven, the paper's two and a quick one, at levels 1 to 5 (0: untouched).

"video" is H.264 over a whole video, as the paper's "video compression using the H.264 codec"; "h264_still" codes one
picture by itself, which needs no video and has neither motion nor a rate that is shared among frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import UsageError
from dtn_fast.packages import require

Image = NDArray[np.uint8]
LEVELS: dict[str, tuple[float, ...]] = {
    "saturation": (0.4, 0.3, 0.2, 0.1, 0.0),  # factor of the chroma
    "contrast": (0.85, 0.725, 0.6, 0.475, 0.35),  # factor of the pixels
    "blocks": (16, 32, 48, 64, 80),  # number of grey 8x8 squares, times min(H, W) // 256
    "gaussian_noise": (0.001, 0.002, 0.005, 0.01, 0.05),  # variance in studio-range YCbCr in [0, 1]
    "blur": (7, 9, 13, 17, 21),  # side of the Gaussian kernel, sigma a sixth of it
    "pixelation": (2, 3, 4, 5, 6),  # factor of down- and up-scaling
    "video": (30, 32, 35, 38, 40),  # H.264 constant rate factor
    "uniform_noise": (0.001, 0.002, 0.005, 0.01, 0.05),  # same variance as gaussian_noise
    "jpeg": (20, 25, 30, 35, 40),  # compression rate, 100 - quality; the paper prints 45 for level 4
    "h264_still": (30, 32, 35, 38, 40),  # the same rate factors for one picture, coded as a video of one frame
}
"""Parameter of each level.  The paper replaces Gaussian by uniform noise, as its MoE gate trains on Gaussian noise."""
PERTURBATIONS = ("saturation", "contrast", "blocks", "gaussian_noise", "blur", "pixelation", "video")
"""The seven perturbations of DeeperForensics."""
LOSSLESS_ENOUGH = 12
"""Constant rate factor for writing a corrupted video whose corruptions do not include compression."""

# full-range RGB in [0, 1] to studio-range YCbCr in [0, 1], ITU-R BT.601
_TO_YCC = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_TO_RGB = np.linalg.inv(_TO_YCC)
_GREY = np.array([16, 128, 128]) / 255


def corrupt(image: Image, name: str, level: int, seed: int | Sequence[int]) -> Image:
    """A corrupted copy of an RGB image [H, W, 3] uint8.  The same ``seed`` draws the same noise and blocks.

    An image smaller than 256 pixels gets as many blocks as one of 256.  Raises UsageError for an unknown name or level,
    and for ``video``.
    """
    check(name, level)
    if name == "video":
        raise UsageError("video: compresses whole videos, this is one picture; use h264_still")
    if not level:
        return image.copy()
    return _APPLY[name](image, LEVELS[name][level - 1], np.random.default_rng(seed))


def check(name: str, level: int) -> None:
    """Raises UsageError unless ``name`` is a corruption and ``level`` 0 to 5."""
    if name not in LEVELS:
        raise UsageError(f"unknown corruption {name!r}; known are {', '.join(LEVELS)}")
    if not 0 <= level <= len(LEVELS[name]):
        raise UsageError(f"level {level} of {name}: must be 0 (untouched) to {len(LEVELS[name])}")


def corrupt_video(
    source: Path, out: Path, corruptions: Sequence[tuple[str, int]], seed: int, threads: int = 0
) -> Iterator[int]:
    """Writes a corrupted copy of a video (H.264 in mp4, ffmpeg's default preset), yielding the number of frames done.

    Corruptions are applied in order; ``video`` must be the last.  Raises MediaError for an unreadable video,
    UsageError for an unknown corruption.
    """
    from dtn_fast.data.video import read_frames
    from dtn_fast.data.video_index import index_of
    from dtn_fast.data.video_writer import write_timed

    for name, level in corruptions:
        check(name, level)
    if any(name == "video" for name, _ in corruptions[:-1]):
        raise UsageError("video compression comes last, as it compresses the output of the others; move it to the end")
    pixels, crf = list(corruptions), LOSSLESS_ENOUGH
    if corruptions and corruptions[-1][0] == "video":
        level = pixels.pop()[1]
        crf = int(LEVELS["video"][level - 1]) if level else LOSSLESS_ENOUGH

    def frames() -> Iterator[tuple[float, Image]]:
        for frame in read_frames(source, threads=threads):
            yield frame.seconds, corrupt_all(frame.image, pixels, (seed, frame.number))

    yield from write_timed(out, frames(), index_of(source).rate, crf, preset="medium")


def corrupt_all(image: Image, corruptions: Sequence[tuple[str, int]], seed: Sequence[int]) -> Image:
    """Applies all ``corruptions`` in order to one RGB image."""
    for place, (name, level) in enumerate(corruptions):
        image = corrupt(image, name, level, (*seed, place))
    return image


def _ycc(image: Image) -> NDArray[np.float64]:
    return image / 255 @ _TO_YCC.T + _GREY


def _rgb(ycc: NDArray[np.float64]) -> Image:
    return _uint8((ycc - _GREY) @ _TO_RGB.T * 255)


def _uint8(values: NDArray) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _saturation(image: Image, factor: float, rng: np.random.Generator) -> Image:
    ycc = _ycc(image)
    ycc[..., 1:] = _GREY[1] + (ycc[..., 1:] - _GREY[1]) * factor
    return _rgb(ycc)


def _contrast(image: Image, factor: float, rng: np.random.Generator) -> Image:
    return _uint8(image * factor)


def _blocks(image: Image, count: float, rng: np.random.Generator) -> Image:
    out, side = image.copy(), 8
    height, width = image.shape[:2]
    for _ in range(int(count) * max(min(height, width) // 256, 1)):
        left, top = rng.integers(0, max(width - side, 1)), rng.integers(0, max(height - side, 1))
        out[top : top + side, left : left + side] = 128
    return out


def _gaussian_noise(image: Image, variance: float, rng: np.random.Generator) -> Image:
    return _rgb(_ycc(image) + rng.normal(0, variance**0.5, image.shape))


def _uniform_noise(image: Image, variance: float, rng: np.random.Generator) -> Image:
    reach = (3 * variance) ** 0.5
    return _rgb(_ycc(image) + rng.uniform(-reach, reach, image.shape))


def _blur(image: Image, side: float, rng: np.random.Generator) -> Image:
    return cv2.GaussianBlur(image, (int(side), int(side)), side / 6)


def _pixelation(image: Image, factor: float, rng: np.random.Generator) -> Image:
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(width // int(factor), 1), max(height // int(factor), 1)))
    return cv2.resize(small, (width, height))


def _jpeg(image: Image, rate: float, rng: np.random.Generator) -> Image:
    from PIL import Image as pillow

    file = io.BytesIO()
    pillow.fromarray(image).save(file, "JPEG", quality=int(100 - rate))
    return np.array(pillow.open(file))


def _h264_still(image: Image, crf: float, rng: np.random.Generator) -> Image:
    """Encodes one frame with H.264 and decodes it."""
    av = require("av")

    from dtn_fast.data.video_writer import h264

    height, width = image.shape[:2]
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = even.shape[:2]
    encoder.pix_fmt, encoder.framerate = "yuv420p", Fraction(25)
    encoder.options, encoder.thread_count = h264(crf), 1
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    packets = [*encoder.encode(picture), *encoder.encode()]
    decoder = av.CodecContext.create("h264", "r")
    (frame,) = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)[:height, :width]


_APPLY: dict[str, Callable[[Image, float, np.random.Generator], Image]] = {
    "saturation": _saturation,
    "contrast": _contrast,
    "blocks": _blocks,
    "gaussian_noise": _gaussian_noise,
    "blur": _blur,
    "pixelation": _pixelation,
    "uniform_noise": _uniform_noise,
    "jpeg": _jpeg,
    "h264_still": _h264_still,
}
