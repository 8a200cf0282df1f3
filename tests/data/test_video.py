"""Reading pictures and videos as they come: rotated, cut short, empty, mislabelled."""

from __future__ import annotations

import resource
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from skimage import data

from dtn_fast.data.pictures import read_image
from dtn_fast.data.video import Reading, read_frames
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import MediaError


def clip(count: int = 12, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Frames whose brightness tells their number, with a red left edge that tells which way is up."""
    frames = []
    for i in range(count):
        frame = np.full((height, width, 3), 40 + 12 * i, np.uint8)
        frame[:, :16] = (220, 20, 20)
        frames.append(frame)
    return frames


def numbers(frames: list[np.ndarray]) -> list[int]:
    return [round((float(frame[30:, 40:].mean()) - 40) / 12) for frame in frames]


def test_a_full_disk_names_the_video_and_leaves_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"previous")
    noise = [np.random.default_rng(n).integers(0, 255, (256, 256, 3), np.uint8) for n in range(20)]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            write_video(path, noise, crf=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert error.value.filename == str(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"previous"]


def test_all_frames_and_even_spread(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, clip(), fps=10, crf=10)
    everything = list(read_frames(path))
    assert numbers([f.image for f in everything]) == list(range(12))
    assert [f.seconds for f in everything] == pytest.approx([i / 10 for i in range(12)])
    some = list(read_frames(path, 4))
    assert [f.number for f in some] == [0, 4, 7, 11]  # spread over the whole video, ends included
    assert numbers([f.image for f in some]) == [0, 4, 7, 11]
    assert len(list(read_frames(path, 100))) == 12


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int) -> None:
    path = tmp_path / "portrait.mp4"
    write_video(path, clip(3), rotation=rotation)
    image = next(read_frames(path)).image
    expected = np.rot90(clip(1)[0], rotation // 90)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 6


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(clip(1)[0], -1))


def test_odd_size_grey_and_alpha(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (33, 17)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").shape == (17, 33, 3)


def test_truncated_video_gives_what_decodes(tmp_path: Path) -> None:
    whole, part = tmp_path / "a.mkv", tmp_path / "part.avi"
    import av

    rng = np.random.default_rng(0)
    with av.open(str(part), "w") as container:  # an index at the end, as in many formats: cutting it must not matter
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 96, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = part.read_bytes()
    whole.write_bytes(data)
    part.write_bytes(data[: len(data) // 2])
    count = len(list(read_frames(part)))
    assert 3 < count < 20
    assert 0 < len(list(read_frames(part, 4))) <= 4


@pytest.mark.parametrize(
    ("name", "data"),
    [("text.mp4", b"just text\n"), ("empty.mp4", b""), ("cut.mp4", None), ("zeros.avi", bytes(4096))],
)
def test_bad_videos_name_themselves_in_one_line(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / name
    if data is None:  # an mp4 without its index holds nothing that can be decoded
        write_video(path, clip())
        data = path.read_bytes()[:700]
    path.write_bytes(data)
    for count in (None, 4):
        with pytest.raises(MediaError, match=name) as error:
            list(read_frames(path, count))
        assert "\n" not in str(error.value)


def test_video_of_zero_frames_and_sound_only(tmp_path: Path) -> None:
    import av

    silent = tmp_path / "zero.mkv"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"zero\.mkv"):
        list(read_frames(silent, 3))
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(audio.encode(frame))
    with pytest.raises(MediaError, match="no video stream"):
        list(read_frames(sound, 3))


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_bad_images_name_themselves_in_one_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(MediaError, match=r"a\.jpg: cannot read this image") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_huge_images_are_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (10_000, 7_000)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match="over the limit"):
        read_image(tmp_path / "bomb.png")


def test_write_is_atomic(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r".+"):
        write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8), np.zeros((3, 3), np.uint8)])
    assert not (tmp_path / "a.mp4").exists()


FACE = np.ascontiguousarray(data.astronaut()[0:320:2, 60:380:2][:160, :160])


def shots(count: int = 60) -> list[np.ndarray]:
    """A face, its number written as a bar at the left, noise above, so that no frame is small."""
    rng, frames = np.random.default_rng(0), []
    for number in range(count):
        frame = FACE.copy()
        frame[:20] = rng.integers(0, 255, (20, 160, 3))
        frame[30:, :4] = 4 * number
        frames.append(frame)
    return frames


KINDS = {
    "a.mp4": ("libx264", {"crf": "30", "g": "10", "bf": "0"}),
    "b.mp4": ("libx264", {"crf": "30", "g": "10", "bf": "3"}),
    "a.mkv": ("libx264", {"crf": "30", "g": "10", "bf": "0"}),
    "a.webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "a.avi": ("mpeg4", {"g": "10", "qscale": "8"}),
    "a.mpg": ("mpeg2video", {"g": "10"}),
}


def write(path: Path, codec: str, options: dict[str, str], count: int = 60) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height = stream.width = 160
        stream.pix_fmt = "yuv420p"
        for frame in shots(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def damage(path: Path, start: float, share: float) -> None:
    """Overwrites a stretch of the file with zeros, as a bad sector or a torn download does."""
    content = bytearray(path.read_bytes())
    first, length = int(len(content) * start), int(len(content) * share)
    content[first : first + length] = bytes(length)
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 0])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_stretch_is_passed_over_and_counted(tmp_path: Path, name: str, threads: int) -> None:
    path = tmp_path / name
    write(path, *KINDS[name])
    whole = {frame.number: frame.image for frame in read_frames(path)}
    for count in (None, 20):
        reading = Reading()
        assert len(list(read_frames(path, count, threads, reading=reading))) == reading.asked == (count or 60)
        assert (reading.lost, reading.missing, reading.note()) == (0, 0, "")
    damage(path, 0.4, 0.1)
    for count in (None, 20):
        reading = Reading()
        frames = list(read_frames(path, count, threads, reading=reading))
        assert len(frames) >= (40 if count is None else 13)
        assert frames[-1].seconds > 2.0  # to the end; AVI has no clock
        assert reading.asked == len(frames) + reading.lost
        assert reading.note()
        assert 0.02 < reading.share < 0.4
        if name in ("a.avi", "a.mpg") and count is None:
            assert reading.lost  # a frame that is decoded from half of its data is none
        if name.endswith(("mp4",)):  # whose frames' numbers do not depend on the damage
            for frame in (frames[0], frames[-1]):
                assert np.abs(frame.image.astype(int) - whole[frame.number]).mean() < 4


def test_a_pause_of_the_camera_and_a_varying_rate_are_no_damage(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    varying = np.cumsum(rng.choice([2, 17, 40, 41, 500], 60)).tolist()
    dropped = [40 * n for n in range(60) if n % 15]
    for stamps in (varying, dropped):
        with av.open(str(tmp_path / "v.mkv"), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.height = stream.width = 160
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
            for stamp, image in zip(stamps, shots(60), strict=False):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = stamp, Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        reading = Reading()
        assert len(list(read_frames(tmp_path / "v.mkv", 10, reading=reading))) == reading.asked
        assert (reading.lost, reading.missing, reading.total) == (0, 0, len(stamps))
        assert reading.seconds == pytest.approx((stamps[-1] - stamps[0]) / 1000 + 0.04, abs=0.03)


def test_a_video_without_one_good_frame_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", *KINDS["a.mp4"], count=12)
    content = (tmp_path / "a.mp4").read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    (tmp_path / "a.mp4").write_bytes(content[:start] + bytes(end - start) + content[end:])
    for count in (None, 5):
        with pytest.raises(MediaError, match="cannot read this video"):
            list(read_frames(tmp_path / "a.mp4", count))
