"""Which files of a folder are pictures and videos, by name and content, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from dtn_fast.data.config import Source
from dtn_fast.data.datasets import read
from dtn_fast.data.frames import video_frames
from dtn_fast.data.media import HEIC, PICTURES, UNREAD, VIDEOS, find_media, kind_of
from dtn_fast.data.video import Reading, read_frames
from dtn_fast.data.video_index import CONTAINERS
from dtn_fast.data.video_writer import write_video

CONTENT = {
    "psd": b"8BPS\0\x01" + bytes(90), "jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "exr": b"v/1\x01" + bytes(90),
    "mp4": b"\0\0\0\x20ftypisom" + bytes(90), "mkv": b"\x1aE\xdf\xa3" + bytes(90), "flv": b"FLV\x01" + bytes(90),
    "mpg": b"\0\0\x01\xba" + bytes(90), "wmv": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(90),
    "ts": (b"G" + bytes(187)) * 3, "m2ts": (bytes(4) + b"G" + bytes(187)) * 3,
}  # fmt: skip


def test_a_file_without_a_known_ending_is_told_by_its_content(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        (tmp_path / f"{name}.part").write_bytes(content)
        (tmp_path / name).write_bytes(content)
    for name in ("png", "jpeg", "gif", "bmp", "webp", "tiff", "avif"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.x", format=name)
    for name, content in {"a.txt": b"BMW, GIF and RIFF", "b.json": b"{}", "c.m4a": CONTENT["mp4"], "d": b""}.items():
        (tmp_path / name).write_bytes(content)
    found = find_media(tmp_path)
    assert {path.name for path in found.unread} == {"psd", "psd.part", "jxl", "jxl.part", "exr", "exr.part"}
    videos = {name for name in CONTENT if f".{name}" in VIDEOS}
    pictures = {f"{name}.x" for name in ("png", "jpeg", "gif", "bmp", "webp", "tiff", "avif")}
    assert {path.name for path in found.files} == videos | {f"{name}.part" for name in videos} | pictures
    assert all(kind_of(path) == "video" for path in found.files if path.name in videos)
    assert kind_of(tmp_path / "a.txt") == "other"


def test_names_that_are_not_read_are_known_and_raw_pictures_are_no_tiff(tmp_path: Path) -> None:
    assert not UNREAD & (PICTURES | VIDEOS)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.nef", format="TIFF")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.heic", format="JPEG")  # as messengers name them
    found = find_media(tmp_path)
    assert ([p.name for p in found.files], [p.name for p in found.unread]) == (["b.heic"], ["a.nef"])


def test_programs_sound_and_motion_jpeg(tmp_path: Path) -> None:
    for name in ("main.ts", "module.mts", "envi.hdr"):
        (tmp_path / name).write_text("export const x = 1\n")
    (tmp_path / "damaged.ts").write_bytes(bytes(range(256)))
    picture = np.zeros((64, 64, 3), np.uint8)
    write_video(tmp_path / "a.mp4", [picture] * 3)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "film.ogg"), "w", format="ogg") as out:
        stream = out.add_stream("libvpx", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for frame in source.decode(video=0):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        out.mux(stream.encode())
    (tmp_path / "sound.ogg").write_bytes(b"OggS" + bytes(200))
    image = cv2.imencode(".jpg", picture)[1].tobytes()
    (tmp_path / "camera.mjpeg").write_bytes(image * 5)
    assert sorted(path.name for path in find_media(tmp_path).files) == [
        "a.mp4", "camera.mjpeg", "damaged.ts", "film.ogg"]  # fmt: skip
    assert len(list(read_frames(tmp_path / "camera.mjpeg"))) == 5


def test_clutter_and_hidden_files_are_ignored_and_links_followed_once(tmp_path: Path) -> None:
    home, far = tmp_path / "home", tmp_path / "far"
    for path in ("a.jpg", "._a.jpg", ".hidden/b.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/a.jpg",
                 "@eaDir/a.jpg", "sub/c.mp4"):  # fmt: skip
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).touch()
    far.mkdir()
    (far / "d.png").touch()
    (home / "sub" / "loop").symlink_to("..")
    (home / "one").symlink_to(far)
    (home / "two").symlink_to(far)
    (far / "back").symlink_to(home)
    (home / "gone.jpg").symlink_to("nowhere.jpg")
    names = [str(path.relative_to(home)) for path in find_media(home).files]
    assert names == ["a.jpg", "gone.jpg", "sub/c.mp4", "one/d.png"]  # the broken link is named when it is read
    assert len(find_media(home / "one").files) == 4  # a link given by name is a folder like another
    os.mkfifo(home / "pipe")  # opening it would wait for ever
    os.mkfifo(tmp_path / "pipe.ts")
    assert [path.name for path in find_media(tmp_path).files if path.suffix == ".ts"] == ["pipe.ts"]
    (home / "to a pipe").symlink_to("pipe")
    assert len(find_media(home).files) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_locked_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "locked").touch(mode=0)
    assert [Path(problem.filename).name for problem in find_media(tmp_path).problems] == ["locked"]


@pytest.mark.parametrize("suffix", ["3gp", "mts", "ts", "flv", "wmv", "mxf", "mov", "m2ts", "m4v", "vob", "asf"])
def test_videos_of_every_container_are_read(tmp_path: Path, suffix: str) -> None:
    codecs = {"wmv": "wmv2", "asf": "wmv2", "mxf": "mpeg2video", "vob": "mpeg2video"}
    forms = {"wmv": "asf", "m4v": "mp4", "mts": "mpegts", "ts": "mpegts", "m2ts": "mpegts"}
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format=forms.get(suffix, suffix)) as out:
        stream = out.add_stream(codecs.get(suffix, "libx264"), rate=25)
        stream.height = stream.width = 160
        stream.pix_fmt = "yuv420p"
        for n in range(8):
            image = np.full((160, 160, 3), 30 * n, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    assert kind_of(path) == "video"
    frames = list(read_frames(path))
    assert [round(float(frame.image.mean()) / 30) for frame in frames] == [*range(8)]
    assert [frame.seconds for frame in frames] == pytest.approx([n / 25 for n in range(8)], abs=0.002)


def test_containers_that_name_other_files_are_not_opened(tmp_path: Path) -> None:
    assert not {"concat", "hls", "dash", "image2", "lavfi", "sdp", "tty"} & set(CONTAINERS.split(","))
    write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8)])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    assert kind_of(tmp_path / "list.mp4") == "video"  # by its name; reading it fails
    with pytest.raises(Exception, match="cannot read this video"):
        list(read_frames(tmp_path / "list.mp4"))


def test_heic_is_read_where_its_reader_is_installed() -> None:
    pytest.importorskip("pillow_heif")
    assert HEIC <= PICTURES


def test_moving_pictures_of_a_dataset_are_videos(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((64, 64, 3), 20 * n, np.uint8)) for n in range(10)]
    folder = tmp_path / "test" / "real"
    folder.mkdir(parents=True)
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=40)
    frames[0].save(folder / "still.gif")
    table = read(tmp_path, Source("folder"))
    assert [(Path(v.path).name, len(v.frames)) for v in table.videos] == [("moving.gif", 0), ("still.gif", 1)]
    reading = Reading()
    shown = list(video_frames(tmp_path, table.videos[0], 4, reading=reading))
    assert [frame.number for frame in shown] == [0, 3, 6, 9]
    assert (reading.asked, reading.seconds) == (4, pytest.approx(0.4))
