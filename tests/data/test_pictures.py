"""One face picture in every way that people store one, read as a viewer shows it."""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from dtn_fast.data import pictures
from dtn_fast.data.pictures import (
    PIXEL_BYTES,
    count_pictures,
    decode_image,
    decoded_bytes,
    read_image,
    read_moving,
    read_times,
)
from dtn_fast.errors import MediaError

RGB = np.ascontiguousarray(data.astronaut()[:120, 150:300])
GREY = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
FLIPS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # fmt: skip
"""EXIF orientation -> how a camera that tells it stores an upright picture."""


def linear(values: np.ndarray) -> np.ndarray:
    unit = values / 255
    return np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4).astype(np.float32)


def pillow(image: np.ndarray | Image.Image, name: str, **how: object) -> Callable[[Path], None]:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda folder: image.save(folder / name, **how)


def opencv(image: np.ndarray, name: str) -> Callable[[Path], object]:
    return lambda folder: cv2.imwrite(str(folder / name), image if image.ndim == 2 else image[:, :, ::-1])


def lit(share: float) -> np.ndarray:
    """The picture in linear light with a lamp brighter than white in a corner."""
    light = linear(RGB)
    light[:4, :4] = share
    return light


FORMS: dict[str, tuple[Callable[[Path], object], np.ndarray, float]] = {
    "8.png": (pillow(GREY, "8.png"), GREY, 0),
    "16.png": (opencv(GREY.astype(np.uint16) * 257, "16.png"), GREY, 0),
    "16.tif": (pillow(GREY.astype(np.uint16) * 257, "16.tif"), GREY, 0),
    "int32.tif": (pillow(GREY.astype(np.int32) * 257, "int32.tif"), GREY, 0),
    "float01.tif": (pillow(GREY.astype(np.float32) / 255, "float01.tif"), GREY, 0),
    "float255.tif": (pillow(GREY.astype(np.float32), "float255.tif"), GREY, 0),
    "alpha.png": (pillow(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (150, 120), 255)]), "alpha.png"),
                  GREY, 0),
    "rgb16.png": (opencv(RGB.astype(np.uint16) * 257, "rgb16.png"), RGB, 0),
    "rgb16.tif": (opencv(RGB.astype(np.uint16) * 257, "rgb16.tif"), RGB, 0),
    "rgbfloat.tif": (opencv(RGB.astype(np.float32) / 255, "rgbfloat.tif"), RGB, 0),
    "lamp.tif": (opencv(lit(3), "lamp.tif"), RGB, 0.5),
    "lamp.hdr": (opencv(lit(3), "lamp.hdr"), RGB, 1),
    "rgba.png": (pillow(Image.fromarray(RGB).convert("RGBA"), "rgba.png"), RGB, 0),
    "palette.png": (pillow(Image.fromarray(RGB).quantize(256), "palette.png"), RGB, 5),
    "cmyk.jpg": (pillow(Image.fromarray(RGB).convert("CMYK"), "cmyk.jpg", quality=97), RGB, 4),
    "cmyk.tif": (pillow(Image.fromarray(RGB).convert("CMYK"), "cmyk.tif"), RGB, 1),
    "ycbcr.tif": (pillow(Image.fromarray(RGB).convert("YCbCr"), "ycbcr.tif"), RGB, 2),
    "picture.avif": (pillow(RGB, "picture.avif", quality=95), RGB, 4),
    "picture.jp2": (pillow(RGB, "picture.jp2"), RGB, 1),
    "picture.webp": (pillow(RGB, "picture.webp", lossless=True), RGB, 0),
    "picture.ppm": (pillow(RGB, "picture.ppm"), RGB, 0),
    "really a jpeg.png": (pillow(RGB, "really a jpeg.png", format="JPEG", quality=97), RGB, 4),
    "phone.jpg": (pillow(RGB, "phone.jpg", format="MPO", save_all=True, quality=97,
                         append_images=[Image.new("RGB", (40, 30))]), RGB, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_the_same_picture(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, expected, most = FORMS[name]
    write(tmp_path)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    expected = np.repeat(expected[:, :, None], 3, 2) if expected.ndim == 2 else expected
    assert image.shape == expected.shape
    apart = np.abs(image[8:].astype(int) - expected[8:])
    assert apart.mean() <= most
    assert decoded_bytes(tmp_path / name) >= image.size
    monkeypatch.setattr(pictures, "STRIP", 1000)  # in 20 strips
    assert np.array_equal(decode_image((tmp_path / name).read_bytes(), name), image)


def test_a_large_picture_is_converted_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy's share of the memory; 8-bit pictures are in Pillow's besides."""
    monkeypatch.setattr(pictures, "STRIP", 20_000)
    for dtype, mode in ((np.uint16, None), (np.uint8, "RGB"), (np.uint8, "LA")):
        image = Image.fromarray(np.full((1500, 1500), 7, dtype))
        (image.convert(mode) if mode else image).save(tmp_path / "a.png")
        tracemalloc.start()
        read_image(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.25 * PIXEL_BYTES * 1500 * 1500, (dtype, mode)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "heic"])
@pytest.mark.parametrize("orientation", FLIPS)
def test_every_orientation_is_applied_mirrored_ones_too(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif, flip = Image.Exif(), FLIPS[orientation]
    exif[0x0112] = orientation
    stored = Image.fromarray(RGB) if flip is None else Image.fromarray(RGB).transpose(flip)
    how = {"tiffinfo": {0x0112: orientation}} if suffix == "tif" else {"exif": exif.tobytes(), "quality": 97}
    stored.save(tmp_path / f"a.{suffix}", **({"exif": exif} if suffix == "png" else how))
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == RGB.shape
    assert np.abs(image.astype(int) - RGB).mean() < 4


def retagged(path: Path, tag: int, new: int, value: int) -> None:
    """Replaces a tag of a TIFF file, whose value is a single short."""
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    places = range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12)
    place = next(place for place in places if struct.unpack_from("<H", content, place)[0] == tag)
    struct.pack_into("<HHII", content, place, new, 3, 1, value)
    path.write_bytes(content)


def test_a_tiff_of_floats_is_turned_too(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "a.tif"), np.rot90(lit(3)[:, :, ::-1], 1))
    retagged(tmp_path / "a.tif", 284, 274, 6)  # the planar configuration, whose default it holds, gives its place
    assert read_image(tmp_path / "a.tif").shape == RGB.shape


def test_tiffs_say_what_is_white_and_forms_that_would_be_read_wrongly_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    opencv(GREY.astype(np.uint16) * 257, "a.tif")(tmp_path)
    retagged(path, 262, 262, 0)
    assert np.abs(read_image(path)[..., 0].astype(int) - (255 - GREY)).max() <= 1
    opencv(GREY.astype(np.uint16) * 257, "a.tif")(tmp_path)
    retagged(path, 339, 339, 2)
    with pytest.raises(MediaError, match=r"a.tif: .*signed numbers is not read; convert it to PNG"):
        read_image(path)
    grey = GREY.astype(np.uint32) * 16843009
    Image.frombytes("I", (150, 120), grey.tobytes()).save(path)
    retagged(path, 339, 339, 1)
    assert np.abs(read_image(path)[..., 0].astype(int) - GREY).max() <= 1


def test_odd_metadata_do_not_cost_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(_: Image.Image) -> Image.Exif:
        raise TypeError("bad operand type for abs(): 'str'")

    monkeypatch.setattr(Image.Image, "getexif", damaged)
    assert np.array_equal(decode_image(_png(Image.fromarray(RGB)), "a.png"), RGB)


def test_a_profile_is_applied_beside_transparency_and_palettes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = sys.modules["dtn_fast.data.pictures"]
    monkeypatch.setattr(module, "_in_srgb", lambda image: seen.append(image.mode) or image)
    for mode in ("RGBA", "LA", "P", "RGB"):
        decode_image(_png(Image.fromarray(RGB).convert(mode)), "a.png")
    assert seen == ["RGB", "L", "RGB", "RGB"]


def test_an_apng_may_begin_with_a_picture_that_is_not_shown(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(RGB, 10 * n, 1)) for n in range(3)]
    Image.new("RGB", (150, 120)).save(
        tmp_path / "a.png", save_all=True, append_images=frames, duration=5, default_image=True
    )
    assert count_pictures(tmp_path / "a.png") == (3, True)
    assert read_times(tmp_path / "a.png", lambda: None) == pytest.approx([0, 0.1, 0.2, 0.3])  # as browsers take 5 ms
    assert np.array_equal(next(read_moving(tmp_path / "a.png", [0], lambda: None))[1], RGB)


def test_a_transparent_picture_stands_on_white() -> None:
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(150) < 75, 0, 255).astype(np.uint8)[None].repeat(120, 0)))
    palette = Image.fromarray(np.zeros((9, 9), np.uint8)).convert("P")
    for picture, hidden in ((image, np.s_[:, :75]), (palette, np.s_[:])):
        file = io.BytesIO()
        picture.save(file, "PNG", **({"transparency": 0} if picture is palette else {}))
        shown = decode_image(file.getvalue(), "a.png")
        assert (shown[hidden] == 255).all()
    assert np.array_equal(decode_image(_png(image), "a.png")[:, 75:], RGB[:, 75:])


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_colours_of_an_icc_profile_are_shown_and_a_damaged_profile_is_ignored() -> None:
    lab = ImageCms.profileToProfile(Image.fromarray(RGB), ImageCms.createProfile("sRGB"),
                                    ImageCms.createProfile("LAB"), outputMode="LAB")  # fmt: skip
    file = io.BytesIO()
    lab.save(file, "TIFF")
    assert np.abs(decode_image(file.getvalue(), "lab.tif").astype(int) - RGB).mean() < 3
    for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()):
        file = io.BytesIO()
        Image.fromarray(RGB).save(file, "PNG", icc_profile=profile)
        assert decode_image(file.getvalue(), "a.png").shape == RGB.shape


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_moving_pictures_are_frames_with_times(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    pictures = [Image.fromarray(np.roll(RGB, 10 * n, 1)) for n in range(5)]
    how = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400, 500], **how)
    assert count_pictures(path) == (5, True)
    assert read_times(path, lambda: None) == pytest.approx([0, 0.1, 0.3, 0.6, 1.0, 1.5])
    for number, image in read_moving(path, [1, 4], lambda: None):
        assert np.abs(image.astype(int) - np.asarray(pictures[number])).mean() < 12
    path.write_bytes(path.read_bytes()[:-4000])
    if suffix in ("webp", "avif"):  # Pillow opens them whole or not at all
        with pytest.raises(MediaError, match="cannot read this image"):
            read_image(path)
        return
    good = len(read_times(path, lambda: None)) - 1
    assert good < 5
    assert [number for number, _ in read_moving(path, [*range(5)], lambda: None)] == [*range(good)]


def test_pages_are_counted_and_only_tiff_has_them(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.roll(RGB, n, 0)) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pages[1:])
    assert count_pictures(tmp_path / "a.tif") == (3, False)
    assert count_pictures(tmp_path / "a.jpg") == (1, False)
    assert np.array_equal(read_image(tmp_path / "a.tif"), RGB)


def test_large_pictures_of_opencv_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    opencv(lit(3), "a.hdr")(tmp_path)
    content = (tmp_path / "a.hdr").read_bytes()
    for name, wrong in (("a.hdr", content.replace(b"-Y 120 +X 150", b"-Y 90000 +X 90000")), ("b.hdr", content[:60])):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(MediaError, match=r"over the limit|cannot read this image"):
            read_image(tmp_path / name)
