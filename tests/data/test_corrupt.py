"""Every corruption against a computation of its own, at every level, on images and on videos."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage
from skimage import color, data

from dtn_fast.data.corrupt import LEVELS, PERTURBATIONS, corrupt, corrupt_video
from dtn_fast.data.video import read_frames
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import UsageError

FACE = np.ascontiguousarray(data.astronaut()[:256, 96:352])
EVERY = range(1, 6)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_parameters_are_those_of_the_protocol() -> None:
    assert len(PERTURBATIONS) == 7
    assert LEVELS["saturation"] == (0.4, 0.3, 0.2, 0.1, 0.0)
    assert LEVELS["contrast"] == (0.85, 0.725, 0.6, 0.475, 0.35)
    assert LEVELS["blocks"] == (16, 32, 48, 64, 80)
    assert LEVELS["gaussian_noise"] == LEVELS["uniform_noise"] == (0.001, 0.002, 0.005, 0.01, 0.05)
    assert LEVELS["blur"] == (7, 9, 13, 17, 21)
    assert LEVELS["pixelation"] == (2, 3, 4, 5, 6)
    assert LEVELS["video"] == LEVELS["h264_still"] == (30, 32, 35, 38, 40)
    assert LEVELS["jpeg"] == (20, 25, 30, 35, 40)


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "video"])
def test_levels_get_worse_from_nothing_and_repeat_with_the_seed(name: str) -> None:
    worse = [distance(corrupt(FACE, name, level, 1), FACE) for level in range(6)]
    assert worse[0] == 0
    assert all(a < b for a, b in itertools.pairwise(worse)), worse
    before = FACE.copy()
    one = corrupt(FACE, name, 5, 1)
    assert np.array_equal(one, corrupt(FACE, name, 5, 1))
    assert np.array_equal(FACE, before), "the input is left alone"
    assert one.dtype == np.uint8
    odd = corrupt(FACE[:61, :63], name, 3, 0)
    assert odd.shape == (61, 63, 3)


@pytest.mark.parametrize("level", EVERY)
def test_saturation_scales_the_chroma(level: int) -> None:
    grey = np.asarray(ImageEnhance.Color(Image.fromarray(FACE)).enhance(LEVELS["saturation"][level - 1]))
    assert distance(corrupt(FACE, "saturation", level, 0), grey) < 0.6  # Pillow rounds the grey first


@pytest.mark.parametrize("level", EVERY)
def test_contrast_scales_the_pixels(level: int) -> None:
    table = [round(value * LEVELS["contrast"][level - 1]) for value in range(256)]
    assert np.array_equal(corrupt(FACE, "contrast", level, 0), np.array(table, np.uint8)[FACE])


@pytest.mark.parametrize("level", EVERY)
def test_blocks_are_grey_squares_of_the_count(level: int) -> None:
    count = int(LEVELS["blocks"][level - 1])
    for scale in (1, 2):
        black = np.zeros((256 * scale, 300 * scale, 3), np.uint8)
        grey = corrupt(black, "blocks", level, 3)
        assert set(np.unique(grey)) == {0, 128}
        covered = (grey[..., 0] > 0).sum() / 64
        assert 0.7 * count * scale < covered <= count * scale  # some overlap


@pytest.mark.parametrize("name", ["gaussian_noise", "uniform_noise"])
@pytest.mark.parametrize("level", range(1, 5))  # the fifth is clipped at black and white
def test_noise_has_its_variance_in_ycbcr(name: str, level: int) -> None:
    flat = np.full((256, 256, 3), 128, np.uint8)
    variance = LEVELS[name][level - 1]
    noise = (color.rgb2ycbcr(corrupt(flat, name, level, 5) / 255) - color.rgb2ycbcr(flat / 255)) / 255
    assert noise.mean((0, 1)) == pytest.approx([0, 0, 0], abs=3 * (variance / 256**2) ** 0.5 + 5e-4)
    assert noise.var((0, 1)) == pytest.approx([variance] * 3, rel=0.08)
    kurtosis = float(((noise - noise.mean()) ** 4).mean() / noise.var() ** 2)
    assert kurtosis == pytest.approx(3.0 if name == "gaussian_noise" else 1.8, abs=0.35)


@pytest.mark.parametrize("level", EVERY)
def test_blur_is_a_gaussian_of_a_sixth_of_its_kernel(level: int) -> None:
    side = int(LEVELS["blur"][level - 1])
    taps = np.exp(-((np.arange(side) - side // 2) ** 2) / (2 * (side / 6) ** 2))
    taps /= taps.sum()
    expected = ndimage.correlate1d(
        ndimage.correlate1d(FACE.astype(float), taps, 0, mode="mirror"), taps, 1, mode="mirror"
    )
    assert np.abs(corrupt(FACE, "blur", level, 0) - expected).max() < 2


@pytest.mark.parametrize("level", EVERY)
def test_pixelation_is_bilinear_down_and_up(level: int) -> None:
    factor = int(LEVELS["pixelation"][level - 1])

    def linear(image: np.ndarray, side: int) -> np.ndarray:
        at = (np.arange(side) + 0.5) * image.shape[0] / side - 0.5
        rows = ndimage.map_coordinates(
            image, np.meshgrid(at, np.arange(image.shape[1]), indexing="ij"), order=1, mode="nearest"
        )
        return rows

    expected = FACE.astype(float)
    for side in (256 // factor, 256):
        planes = [linear(linear(expected[..., c], side).T, side).T for c in range(3)]
        expected = np.rint(np.stack(planes, 2))
    assert np.abs(corrupt(FACE, "pixelation", level, 0) - expected).max() <= 2


@pytest.mark.parametrize("level", EVERY)
def test_jpeg_of_its_quality(level: int) -> None:
    file = io.BytesIO()
    Image.fromarray(FACE).save(file, "JPEG", quality=100 - int(LEVELS["jpeg"][level - 1]))
    out = corrupt(FACE, "jpeg", level, 0)
    assert np.array_equal(out, np.asarray(Image.open(file)))


def clip(path: Path, count: int = 20) -> Path:
    face = data.astronaut()[:240, 96:336]
    write_video(path, [np.roll(face, 3 * i, 1) for i in range(count)], fps=12, crf=5)
    return path


@pytest.mark.parametrize("level", EVERY)
def test_video_compression_is_h264_of_the_crf(tmp_path: Path, level: int) -> None:
    source, out = clip(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    assert list(corrupt_video(source, out, [("video", level)], 0))[-1] == 20
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 12
    # x264 writes its settings into the stream
    assert f"crf={LEVELS['video'][level - 1]}".encode() in out.read_bytes()
    assert len(list(read_frames(out))) == 20


def test_videos_get_the_image_corruptions_and_compression_last(tmp_path: Path) -> None:
    source, out = clip(tmp_path / "a.mp4", 4), tmp_path / "b.mp4"
    for _ in corrupt_video(source, out, [("contrast", 5), ("blocks", 2)], seed=1):
        pass
    for before, after in zip(read_frames(source), read_frames(out), strict=True):
        dark = corrupt(before.image, "contrast", 5, 0)
        assert 0.02 < (np.abs(after.image.astype(int) - dark).max(2) > 40).mean() < 0.037  # 32 blocks of 64 in 240x240
    with pytest.raises(UsageError, match="comes last"):
        list(corrupt_video(source, out, [("video", 1), ("blur", 1)], 0))


def test_errors_name_the_corruption_and_the_level() -> None:
    with pytest.raises(UsageError, match="unknown corruption 'fog'; known are saturation"):
        corrupt(FACE, "fog", 1, 0)
    with pytest.raises(UsageError, match="level 6 of blur"):
        corrupt(FACE, "blur", 6, 0)
    with pytest.raises(UsageError, match="this is one picture; use h264_still"):
        corrupt(FACE, "video", 1, 0)
