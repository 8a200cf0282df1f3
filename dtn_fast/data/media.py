"""Kinds of media files, told by name and content, and the media files of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dtn_fast.data.video_index import open_video, video_stream
from dtn_fast.errors import MediaError
from dtn_fast.packages import require

Kind = Literal["picture", "video", "unread", "other"]
"""``unread``: a picture or video in a form that this program does not read; ``other``: no picture and no video."""


def _endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


HEIC = _endings("heic heif hif")
PICTURES = (
    _endings("jpg jpeg jpe jfif jif pjpeg pjp mpo png apng bmp dib webp tif tiff gif avif avifs jp2 j2k jpf jpx hdr")
    | _endings("ppm pgm pbm pnm")
    | (HEIC if find_spec("pillow_heif") else frozenset())
)
"""Endings of pictures, also moving ones (GIF, APNG, WebP, AVIF); HEIC where the package pillow-heif is installed."""
VIDEOS = _endings(
    "mp4 m4v mov qt avi divx mkv webm mpg mpeg mpe m1v m2v vob ts mts m2ts m2t wmv asf flv f4v 3gp 3g2 ogv ogm mxf rm "
    "rmvb dv ivf h264 264 hevc h265 265 mjpeg mjpg"
)
MAY_MOVE = _endings("gif webp apng avif avifs")
"""Endings of pictures that may be moving ones."""
MOTION_JPEG = _endings("mjpeg mjpg")
"""Endings of videos whose first bytes are those of a JPEG picture."""
AMBIGUOUS = _endings("ts mts hdr dv rm")
"""Endings that other files have too, such as programs: their content tells."""
RAW = _endings("dng cr2 cr3 nef arw raf orf rw2 pef srw")
"""Endings of cameras' raw pictures; some are TIFF files whose first page is a thumbnail."""
UNREAD = (
    RAW
    | _endings("jxl psd psb tga svg exr pfm dpx cin qoi jxr wdp hdp pcx dds bpg xcf eps dcm fits x3f icns")
    | _endings("wtv nut swf y4m amv obu av1 bik bk2 smk fli flc r3d braw mve roq cdxa")
    | (HEIC - PICTURES)
)
"""Endings of pictures and videos that are not read."""
SOUND = _endings("mp3 m4a m4b aac ogg oga opus wav flac wma mka aif aiff")
"""Endings of sound files, some of whose containers hold videos too."""
CLUTTER = frozenset(["__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"])
"""Folders that systems keep beside a person's files, in lower case; hidden files and folders are ignored as well."""

HEAD = 1024
_SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|\#\?RADIANCE|\#\?RGBE", "picture"),
    (rb"(II\*\0|MM\0\*)|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftypavi[fs]", "picture"),
    (rb"....ftyp(hei|hev|mif1|msf1|crx )|8BPS\0\x01|\0\0\0\x0cJXL |v/1\x01|<svg|nut/mul|RIFF....CDXA", "unread"),
    (rb"BIK[a-z]|SMK[24]|qoif|BPG\xfb|gimp xcf|DDS |SDPX|XPDS", "unread"),
    (rb"....ftyp(M4A |M4B )", "other"),
    (rb"....(ftyp|moov|mdat|wide|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|OggS|\0\0\x01[\xba\xb3]", "video"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x06\x0e\x2b\x34\x02\x05\x01\x01|\.RMF|DKIF|\x1f\x07\0", "video"),
    (rb"G.{187}G.{187}G|.{4}G.{191}G.{191}G", "video"),  # MPEG transport streams, in packets of 188 or 192 bytes
)


def kind_by_name(path: Path) -> Kind | None:
    """The kind that a file's ending tells; None: the ending is unknown."""
    suffix = path.suffix.lower()
    kinds: tuple[tuple[frozenset[str], Kind], ...] = (
        (PICTURES, "picture"), (VIDEOS, "video"), (UNREAD, "unread"), (SOUND, "other"),
    )  # fmt: skip
    return next((kind for endings, kind in kinds if suffix in endings), None)


def kind_by_content(path: Path) -> Kind | None:
    """The kind that a file's first bytes tell; None: they are of no known form.  Raises OSError when it is unreadable.

    HEIC counts as a picture where its reader is installed; text with an ending of AMBIGUOUS is no media file.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    for pattern, kind in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            heic = kind == "unread" and head[4:8] == b"ftyp" and PICTURES >= HEIC
            return "picture" if heic else kind
    text = path.suffix.lower() in AMBIGUOUS and head.isascii() and b"\0" not in head
    return "other" if text else None


def kind_of(path: Path) -> Kind:
    """The kind of a file, by its content or else its ending.  Raises OSError when it cannot be opened."""
    suffix = path.suffix.lower()
    if suffix in RAW:
        return "unread"
    if suffix in MOTION_JPEG:
        return "video"
    found = kind_by_content(path) or kind_by_name(path) or "other"
    return "other" if suffix in SOUND and found == "video" and not _has_video(path) else found


def _has_video(path: Path) -> bool:
    """Whether a container has a video track that is no cover picture."""
    av = require("av")

    try:
        with open_video(path) as container:
            video_stream(container, path)
            return True
    except (MediaError, av.FFmpegError, OSError, ValueError):
        return False


@dataclass
class MediaFiles:
    """The media files below a folder."""

    files: list[Path] = field(default_factory=list)
    """Pictures and videos."""
    unread: list[Path] = field(default_factory=list)
    """Pictures and videos in forms that this program does not read."""
    problems: list[OSError] = field(default_factory=list)
    """Folders that could not be searched, and files that could not be opened."""


def find_media(folder: Path) -> MediaFiles:
    """Searches ``folder`` recursively; a file with an unknown ending, or none, counts by its content.

    Hidden files and folders, and those of CLUTTER, are ignored.  Every folder is searched once, however many links lead
    to it, so links cannot make a loop; files come in order, those behind links last.
    """
    found = MediaFiles()
    seen: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        behind: list[Path] = []
        for link in links:
            for path in _walk(link, seen, behind, found.problems):
                kind = kind_by_name(path)
                sure = kind in ("picture", "video") and path.suffix.lower() not in AMBIGUOUS
                try:
                    kind = kind if sure or not path.is_file() else kind_of(path)  # a pipe is not to be opened
                except OSError as error:
                    found.problems.append(error)
                    continue
                if kind in ("picture", "video"):
                    found.files.append(path)
                elif kind == "unread":
                    found.unread.append(path)
        links = behind
    return found


def _walk(folder: Path, seen: set[tuple[int, int]], links: list[Path], problems: list[OSError]) -> Iterator[Path]:
    """Yields the regular files below ``folder``; adds links to folders to ``links``."""
    for parent, folders, names in os.walk(folder, onerror=problems.append):
        try:
            status = os.stat(parent)
        except OSError as error:
            problems.append(error)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        shown = sorted(name for name in folders if not name.startswith(".") and name.lower() not in CLUTTER)
        links += [Path(parent, name) for name in shown if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in shown if not os.path.islink(os.path.join(parent, name))]
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and (path.is_file() or kind_by_name(path) in ("picture", "video")):
                yield path
