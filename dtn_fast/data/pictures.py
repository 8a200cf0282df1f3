"""Reading of pictures, also moving ones, as upright RGB arrays, as a viewer shows them."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import DtnError, MediaError, reason

HEIF = ("HEIF",) if find_spec("pillow_heif") else ()
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", *HEIF)
"""Pillow's names of the formats that are read (MPO is a kind of JPEG); not PostScript, which Pillow would run."""
MOVING = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats whose several pictures are one moving picture; in MPO and TIFF they are other views or pages."""
MAX_PIXELS = 64_000_000
"""Pixel limit per picture; a larger one is refused before it is decoded (a decompression bomb or a mistake)."""
STRIP = 4_000_000
"""Number of pixels whose colours are converted at a time, so that a large picture is in memory twice and not five
times: as its file has it, and as RGB."""
PIXEL_BYTES = 8
"""Bytes that a pixel takes while it is decoded: four as its file has it, three as RGB, and strips in between."""
TICK, SHORTEST = 0.1, 0.01
"""Seconds for which browsers show a frame of a moving picture that states none, or none above the second."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads a picture, or the first frame of a moving one, as upright RGB [H, W, 3].

    Raises MediaError if it is missing, truncated or not a picture.
    """
    return _read(path, str(path))


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decodes the bytes of a picture like :func:`read_image`.  Raises MediaError naming ``name`` otherwise."""
    return _read(io.BytesIO(data), name)


def decoded_bytes(path: Path) -> int:
    """Most bytes that a picture takes while it is decoded, by the size that its header states; 0: it cannot be read.

    Raises MediaError when it is damaged, or over MAX_PIXELS.
    """
    try:
        with _opened(path, str(path)) as image:
            return PIXEL_BYTES * int(image.width) * int(image.height)
    except MediaError as error:
        if not _unknown(error):
            raise
        width, height, _ = _stated(path.read_bytes())
        _check_size(width, height, str(path))
        return 2 * PIXEL_BYTES * width * height  # OpenCV decodes to 32-bit floats


def count_pictures(path: Path) -> tuple[int, bool]:
    """Number of frames of a moving picture, or pages of a TIFF or HEIC file, and whether it moves; (1, False) for
    others.

    Raises MediaError when it is not a picture.
    """
    try:
        with _opened(path, str(path)) as image:
            count = int(image.n_frames) - _first(image) if image.format in (*MOVING, "TIFF", "HEIF") else 1
            return count, count > 1 and image.format in MOVING
    except MediaError as error:
        if _unknown(error):
            return 1, False  # read by OpenCV, or by nothing
        raise


def read_times(path: Path, check: Callable[[], object]) -> list[float]:
    """Seconds at which the frames of a moving picture appear, and at which the last ends; it stops at damage.

    ``check`` is called for every frame.  Raises MediaError when the file is not a picture.
    """
    times = [0.0]
    with _opened(path, str(path)) as image:
        for number in range(_first(image), image.n_frames):
            check()
            try:
                image.seek(number)
                image.load()  # the duration of a frame is known once it is decoded
            except Exception:  # Pillow's decoders raise errors of any kind
                break
            shown = image.info.get("duration", 0) / 1000
            times.append(times[-1] + (shown if shown > SHORTEST else TICK))
    return times


def read_moving(
    path: Path, numbers: Sequence[int], check: Callable[[], object]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (number, upright RGB [H, W, 3]) of these frames of a moving picture, in order, up to a damaged one."""
    with _opened(path, str(path)) as image:
        for number in numbers:
            check()
            try:
                image.seek(number + _first(image))
                _check_size(image.width, image.height, str(path))
                frame = _upright_rgb(image)
            except Exception:
                return
            yield number, frame


def _first(image: Any) -> int:
    """Number of the first frame that is shown; an APNG may begin with a picture for programs that show no movement."""
    return int(getattr(image, "default_image", False))


def _read(file: Path | io.BytesIO, name: str) -> NDArray[np.uint8]:
    try:
        with _opened(file, name) as image:
            return _upright_rgb(image)
    except MediaError as error:
        if not _unknown(error):
            raise
        data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        image = _by_opencv(data, name)
        if image is None:
            raise
        return image


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, name: str) -> Iterator[Any]:
    """A picture, opened and not yet decoded; an error while it is decoded becomes a MediaError too."""
    from PIL import Image, ImageFile

    if HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library may have switched this on for the whole process
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on sizes, for which there is a limit here, and on odd metadata
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.width, image.height, name)
                yield image
    except DtnError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        cause = re.sub(r" ?<_io\.\S+ object at \w+>|b'\S*'", "", reason(error))
        raise MediaError(f"{name}: cannot read this image ({cause})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width}x{height} pixels is over the limit of {MAX_PIXELS}")


def _unknown(error: MediaError) -> bool:
    """Whether Pillow does not know the form of the picture, as opposed to finding it damaged."""
    from PIL import UnidentifiedImageError

    return isinstance(error.__cause__, UnidentifiedImageError)


# ------------------------------------------------------------------------------------------------ colours


def _upright_rgb(image: Any) -> NDArray[np.uint8]:
    """The current frame of a Pillow image as a viewer shows it: turned, in sRGB, on white where it is transparent."""
    image.load()
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata
        orientation = 1
    tags = image.tag_v2 if image.format == "TIFF" else {}
    _refuse_misread(tags)
    if image.mode == "F" or image.mode.startswith("I"):
        return turned(_shown(*_values(image, tags)), orientation)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _strips(*rgb.shape[:2]):
        rgb[rows] = np.asarray(_rgb_on_white(image.crop((0, rows.start, image.width, rows.stop))))
    return turned(rgb, orientation)


def _strips(height: int, width: int) -> list[slice]:
    """The rows of a picture in strips of about STRIP pixels."""
    step = max(STRIP // max(width, 1), 1)
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def _rgb_on_white(image: Any) -> Any:
    """A Pillow image of 8 bits in sRGB, on white where it is transparent."""
    from PIL import Image

    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("P", "PA", "RGBA", "LA"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = _in_srgb(image).convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _refuse_misread(tags: Mapping[int, Any]) -> None:
    """Raises ValueError for the forms of TIFF, told by its tags, that Pillow reads wrongly."""
    bits, signed = max(tags.get(258, (0,))), 2 in tags.get(339, ())
    if signed and bits in (8, 16):
        raise ValueError("a TIFF of signed numbers is not read; convert it to PNG")
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and bits > 8:
        raise ValueError("a TIFF of planes of more than 8 bits is not read; convert it to PNG")


def _values(image: Any, tags: Mapping[int, Any]) -> tuple[NDArray[Any], float]:
    """Values of an image of more than 8 bits, and the one that is white; 0: to be told from the values."""
    values, bits, unsigned = np.asarray(image), max(tags.get(258, (0,))), 2 not in tags.get(339, ())
    if image.mode == "I" and bits == 32 and unsigned:
        values = values.view(np.uint32)
    wide = values.dtype == np.uint32 and values.max(initial=0) > 65535
    white = float(2**bits - 1) if 8 < bits < 16 or wide else 0.0
    if tags.get(262) == 0 and image.mode != "F":  # the value 0 is white
        white = white or 65535.0
        values = white - values.astype(np.float64)
    return values, white


def _in_srgb(image: Any) -> Any:
    """The image with the colours of its ICC profile, or of CIELAB, as sRGB; unchanged without a usable profile."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    try:
        if image.mode == "LAB":
            source: Any = ImageCms.createProfile("LAB")
        elif profile and image.mode in ("RGB", "CMYK", "L"):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if ImageCms.getProfileDescription(source).startswith("sRGB"):
                return image
        else:
            return image
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image  # a profile that is damaged, or of another colour space: viewers ignore it too


@functools.cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


def _shown(values: NDArray[Any], white: float = 0.0, linear: bool = False) -> NDArray[np.uint8]:
    """Grey or RGB values of more than 8 bits as 8-bit RGB [H, W, 3].

    white: the value that is white, if it is known.  Else integers have 16 bits unless none needs more than 8, or one
    needs more than 16; floats are from 0 to 1 or, if most of those above 0 are larger, from 0 to 255 or 65535.  Floats
    from 0 to 1 with brighter highlights are linear light.
    """
    parts = [values[rows] for rows in _strips(*values.shape[:2])]
    largest = max((float(_finite(part).max(initial=0)) for part in parts), default=0.0)
    some = _finite(values[:: max(values.shape[0] // 512, 1), :: max(values.shape[1] // 512, 1)])
    middle = float(np.median(some[some > 0])) if (some > 0).any() else 0.0
    floats = values.dtype.kind == "f"
    if white:
        unit = lambda part: part.clip(0, white) / white
    elif linear or (floats and middle <= 1):
        linear = linear or largest > 1
        plain = lambda part: (part / (max(2 * middle, 1) if linear else 1)).clip(0, 1)
        unit = (lambda part: _encoded(plain(part))) if linear else plain
    else:
        full = next((full for full in (255, 65535) if largest <= full), largest)
        unit = lambda part: part.clip(0) / full
    image = np.empty(values.shape, np.uint8)
    for rows, part in zip(_strips(*values.shape[:2]), parts, strict=True):
        image[rows] = unit(_finite(part)) * 255 + 0.5
    return np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    """Values as floats, without NaN and infinity."""
    return np.nan_to_num(values.astype(np.float32 if values.dtype.kind == "f" else np.float64), nan=0, neginf=0)


def _encoded(linear: NDArray[Any]) -> NDArray[Any]:
    """Linear light from 0 to 1 as sRGB values (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def _by_opencv(data: bytes, name: str) -> NDArray[np.uint8] | None:
    """A picture of a form that Pillow does not know: Radiance HDR, TIFF of floats; None: OpenCV does not know it."""
    width, height, linear = _stated(data)
    if not width * height:
        return None
    _check_size(width, height, name)
    try:  # it turns a TIFF file as its orientation says
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    if values is None or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        return None
    values = values if values.ndim == 2 else values[:, :, 2::-1]
    return _shown(values, 255.0 if values.dtype == np.uint8 else 0.0, linear)


def _stated(data: bytes) -> tuple[int, int, bool]:
    """Width and height that a picture which only OpenCV reads states, or 0, and whether its values are linear light."""
    if data.startswith((b"#?RADIANCE", b"#?RGBE")):
        size = re.search(rb"\n[-+][XY] (\d{1,9}) [-+][XY] (\d{1,9})\n", data[:4096])
        return (int(size[2]), int(size[1]), True) if size else (0, 0, True)
    return (*(_tiff_size(data) if data[:4] in (b"II*\0", b"MM\0*") else (0, 0)), False)


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Width and height of a TIFF file; 0 when it states none."""
    from PIL import TiffImagePlugin

    with contextlib.suppress(Exception):
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return int(tags[256]), int(tags[257])
    return 0, 0


def turned(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """An image [H, W, 3] stored with an EXIF orientation (1 to 8; 2, 4, 5 and 7 are mirrored), upright."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
