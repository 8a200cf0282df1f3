"""The clock of a video, the track that is shown, and frames that are even in time; frames as a player shows them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from skimage import data

from dtn_fast.data.even_spacing import PerSecond, at_rate, evenly_spaced, evenly_timed
from dtn_fast.data.hdr import BT2020, HLG, LUMA, PEAK, PQ, TO_BT709, WHITE
from dtn_fast.data.video import Reading, read_frames
from dtn_fast.data.video_index import index_of
from dtn_fast.data.video_writer import write_timed
from dtn_fast.errors import MediaError

FACE = np.ascontiguousarray(data.astronaut()[:128, 150:310])  # [128, 160, 3]
MS = Fraction(1, 1000)
GREY = np.full((96, 96, 3), 90, np.uint8)


def shades(count: int) -> list[np.ndarray]:
    """Frames whose brightness tells their number."""
    return [np.full((128, 160, 3), 4 * n, np.uint8) for n in range(count)]


def film(path: Path, images: list[np.ndarray], times: list[int] | None = None, form: str | None = None,
         codec: str = "libx264", aspect: Fraction | None = None, matrix: list[float] | None = None,
         cover: str = "", **options: str) -> Path:  # fmt: skip
    """Writes a video; times: of each frame in ms; matrix: its display matrix; cover: "first" or "last" track."""
    with av.open(str(path), "w", format=form) as out:
        tracks: dict[str, Any] = {}
        for name in ("first", "video", "last"):
            if name == "video":
                stream = out.add_stream(codec, rate=25, options=options)
                stream.height, stream.width = images[0].shape[:2]
                stream.pix_fmt = "yuv420p"
                if aspect:
                    stream.sample_aspect_ratio = aspect
                if times:
                    stream.codec_context.time_base = MS
                if matrix:
                    stream.set_display_matrix(matrix)
            elif name == cover:
                tracks[name] = picture = out.add_stream("mjpeg", rate=1)
                picture.height = picture.width = 96
                picture.pix_fmt, picture.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        for picture in tracks.values():
            out.mux(picture.encode(av.VideoFrame.from_ndarray(GREY, format="rgb24")))
            out.mux(picture.encode())
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], MS
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(("name", "form"), [("a.mkv", None), ("a.mp4", None), ("a.ts", None), ("a.mpg", "mpegts"),
                                            ("a.flv", None)])  # fmt: skip
def test_seconds_count_from_the_first_frame(tmp_path: Path, name: str, form: str | None) -> None:
    times = [1_000_000 + 40 * n for n in range(30)]
    path = film(tmp_path / name, shades(30), times, form, bf="2")
    reading = Reading()
    frames = list(read_frames(path, reading=reading))
    assert [frame.seconds for frame in frames] == pytest.approx([0.04 * n for n in range(30)], abs=1e-3)
    assert [frame.end for frame in frames] == pytest.approx([0.04 * (n + 1) for n in range(30)], abs=2e-3)
    assert reading.seconds == pytest.approx(1.2, abs=2e-3)


def test_a_clock_that_runs_backwards_is_not_believed(tmp_path: Path) -> None:
    one, two = (film(tmp_path / f"{n}.ts", shades(20), [start + 40 * k for k in range(20)]) for n, start in
                ((1, 900_000), (2, 1_000)))  # fmt: skip
    (tmp_path / "joined.ts").write_bytes(one.read_bytes() + two.read_bytes())
    frames = list(read_frames(tmp_path / "joined.ts"))
    assert len(frames) == 40
    assert np.diff([frame.seconds for frame in frames]) == pytest.approx([0.04] * 39)


def test_frames_are_even_in_time_at_a_varying_rate(tmp_path: Path) -> None:
    times = [*range(0, 2000, 20), *range(2000, 10_000, 500)]  # 100 frames in 2 s, then 16 in 8 s
    for name in ("a.mkv", "a.mp4"):
        path = film(tmp_path / name, [np.full((64, 64, 3), 2 * n, np.uint8) for n in range(116)], times)
        seconds = [frame.seconds for frame in read_frames(path, 11)]
        assert seconds == pytest.approx(np.linspace(0, 9.5, 11), abs=0.25)
        reading = Reading()
        seconds = [frame.seconds for frame in read_frames(path, PerSecond(2), reading=reading)]
        assert seconds == pytest.approx([n / 2 for n in range(20)], abs=1e-6)
        assert reading.asked == 20


def test_choices_of_frames() -> None:
    regular = np.arange(101) / 25
    for count in (1, 2, 7, 50, 100, 200):
        assert evenly_timed(regular, count) == evenly_spaced(100, count)
    jittered = np.round(np.arange(101) * 1001 / 30, 0) / 1000  # milliseconds of 29.97 frames a second
    assert evenly_timed(jittered, 7) == evenly_spaced(100, 7)
    assert at_rate(regular, 5) == [*range(0, 100, 5)]
    assert at_rate(regular, 1e30) == [*range(100)]
    assert at_rate(np.array([0.0, 0.04]), 3) == [0]
    uneven = np.array([0, 1, 2, 3, 4, 5, 6, 100, 101.0])
    assert evenly_timed(uneven, 4) == [0, 6, 7]  # each frame once
    assert evenly_timed(uneven, 1) == [0]


@pytest.mark.parametrize("cover", ["first", "last"])
def test_a_cover_picture_is_no_video(tmp_path: Path, cover: str) -> None:
    path = film(tmp_path / "a.mp4", [FACE] * 6, cover=cover)
    frames = list(read_frames(path))
    assert [frame.image.shape for frame in frames] == [FACE.shape] * 6
    with av.open(str(path)) as source, av.open(str(tmp_path / "sound.mp4"), "w") as out:
        picture = next(s for s in source.streams.video if s.disposition & av.stream.Disposition.attached_pic)
        copy = out.add_stream_from_template(picture)
        copy.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux(picture):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    with pytest.raises(MediaError, match="only a cover picture"):
        list(read_frames(tmp_path / "sound.mp4"))


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_track_is_shown_and_else_the_largest(tmp_path: Path, default: int) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        for number, image in enumerate((GREY, FACE)):
            stream = out.add_stream("libx264", rate=25)
            stream.height, stream.width = image.shape[:2]
            stream.pix_fmt = "yuv420p"
            kinds = av.stream.Disposition
            stream.disposition = kinds.default if number == default else kinds.comment
        for stream, image in zip(out.streams.video, (GREY, FACE), strict=True):
            for _ in range(4):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
    assert {frame.image.shape for frame in read_frames(path)} == {(GREY, FACE)[default].shape}


MATRICES = {
    "mirrored": ([-1, 0, 0, 0, 1, 0, 0, 0, 1], lambda a: a[:, ::-1]),
    "upside down": ([1, 0, 0, 0, -1, 0, 0, 0, 1], lambda a: a[::-1]),
    "half a turn": ([-1, 0, 0, 0, -1, 0, 0, 0, 1], lambda a: a[::-1, ::-1]),
    "transposed": ([0, 1, 0, 1, 0, 0, 0, 0, 1], lambda a: a.transpose(1, 0, 2)),
    "right": ([0, 1, 0, -1, 0, 0, 0, 0, 1], lambda a: np.rot90(a, -1)),
    "left": ([0, -1, 0, 1, 0, 0, 0, 0, 1], lambda a: np.rot90(a, 1)),
    "transverse": ([0, -1, 0, -1, 0, 0, 0, 0, 1], lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_frames_are_turned_and_mirrored_as_their_display_matrix_says(tmp_path: Path, name: str) -> None:
    matrix, shown = MATRICES[name]
    path = film(tmp_path / "a.mp4", [FACE] * 2, matrix=matrix, crf="5")
    image = next(read_frames(path)).image
    assert image.shape == shown(FACE).shape
    assert np.abs(image.astype(int) - shown(FACE)).mean() < 6


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    for aspect, shape in ((Fraction(2), (128, 320, 3)), (Fraction(1, 2), (256, 160, 3)), (Fraction(900), FACE.shape)):
        path = film(tmp_path / "a.mkv", [FACE] * 2, aspect=aspect)
        assert next(read_frames(path)).image.shape == shape


def test_a_copy_keeps_the_time_of_every_frame(tmp_path: Path) -> None:
    times = [0, 10, 500, 520, 2500]
    source = film(tmp_path / "a.mkv", shades(5), times)
    frames = [(frame.seconds, frame.image) for frame in read_frames(source)]
    for _ in write_timed(tmp_path / "b.mp4", iter(frames), index_of(source).rate, end=4.5):
        pass
    assert index_of(tmp_path / "b.mp4").seconds == pytest.approx(4.5)  # the last frame is held
    assert [frame.seconds for frame in read_frames(tmp_path / "b.mp4")] == pytest.approx([t / 1000 for t in times])


def hdr_code(light: np.ndarray, transfer: int) -> np.ndarray:
    """Code values from 0 to 1 of light as a share of WHITE, in BT.2020, by the inverse of each standard's curve."""
    if transfer == PQ:
        power = np.clip(light * WHITE / 10_000, 0, 1) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    shown = np.clip(light, 0, None) * WHITE / PEAK
    scene = shown * np.maximum(shown @ LUMA[0], 1e-9)[..., None] ** (-0.2 / 1.2)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_shown_as_on_a_standard_display(tmp_path: Path, transfer: int) -> None:
    code = hdr_code((FACE / 255) ** 2.4 @ np.linalg.inv(TO_BT709).T, transfer)
    luma = code @ LUMA[0]
    blue, red = ((code[..., c] - luma) / (2 * (1 - LUMA[0, c])) for c in (2, 0))
    frame = av.VideoFrame(160, 128, "yuv444p10le")
    for plane, values in zip(frame.planes, (luma * 876 + 64, blue * 896 + 512, red * 896 + 512), strict=True):
        rows = np.zeros((128, plane.line_size // 2), "<u2")
        rows[:, :160] = np.round(values)
        plane.update(rows.tobytes())
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 128, 160, "yuv444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, BT2020, 9, 1
        frame.colorspace, frame.color_range, frame.pts, frame.time_base = 9, 1, 0, Fraction(1, 5)
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    shown = next(read_frames(tmp_path / "a.mkv")).image.astype(int)
    usual = FACE.max(2) < 220  # brighter ones are compressed
    assert np.abs(shown - FACE)[usual].max() <= 12
    assert np.abs(shown - FACE).mean() < 3


def test_a_recording_that_pauses_and_an_avi_with_dropped_frames_are_whole(tmp_path: Path) -> None:
    times = [33 * n + 3000 * (n >= 40) + 3000 * (n >= 70) for n in range(100)]
    for name in ("a.mp4", "a.mkv", "a.webm"):
        codec = "libvpx" if name == "a.webm" else "libx264"
        reading = Reading()
        path = film(
            tmp_path / name, [np.full((64, 64, 3), 2 * n, np.uint8) for n in range(100)], times, codec=codec, g="90"
        )
        assert len(list(read_frames(path, reading=reading))) == 100
        assert (reading.lost, reading.missing) == (0, 0), name
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for n in (n for n in range(80) if n % 5):  # the others become empty chunks
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 3 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    reading = Reading()
    frames = list(read_frames(tmp_path / "a.avi", reading=reading))
    assert (len(frames), reading.lost, reading.missing) == (64, 0, 0)
    assert frames[-1].seconds == pytest.approx(79 / 25, abs=0.05)


def test_a_broadcast_that_begins_between_key_frames(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.ts", shades(60), g="25", bf="0")
    content, packets = whole.read_bytes(), []
    with av.open(str(whole)) as source:
        packets = [packet.pos for packet in source.demux(video=0) if packet.size]
    (tmp_path / "b.ts").write_bytes(content[: 188 * 3] + content[packets[10] :])  # with its tables
    reading = Reading()
    frames = list(read_frames(tmp_path / "b.ts", 5, reading=reading))
    assert reading.lost == 0
    assert reading.seconds == pytest.approx(35 / 25, abs=0.05)
    assert [round(float(frame.image.mean()) / 4) for frame in frames] == pytest.approx([25, 34, 42, 50, 59], abs=1)
