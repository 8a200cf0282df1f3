"""Decoding on a GPU, with a stand-in for torchcodec that has the signatures of its version 0.16 and decodes by PyAV."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from dtn_fast.data import gpu_video as G
from dtn_fast.data.even_spacing import PerSecond, Wanted
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.video import Frame, Reading, read_frames
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import DtnWarning, UsageError


def clip(count: int) -> list[np.ndarray]:
    ramp = np.add.outer(np.arange(64), np.arange(96)) % 256
    return [np.stack([np.roll(ramp, 5 * k, 1), ramp.T[:64, :64].repeat(2, 1)[:, :96], ramp], 2).astype(np.uint8)
            for k in range(count)]  # fmt: skip


class VideoDecoder:
    made = 0
    fails_at = 10**6
    extra = 0

    def __init__(
        self, source: str, *, stream_index: int | None, dimension_order: str, device: str, seek_mode: str
    ) -> None:
        assert (Path(source).is_absolute(), dimension_order, device, seek_mode) == (True, "NHWC", "cuda", "exact")
        with av.open(source) as container:
            assert container.streams[stream_index or 0].type == "video"
            self.frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        VideoDecoder.made += 1

    def __len__(self) -> int:
        return len(self.frames) + self.extra

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        if max(indices) >= self.fails_at:
            raise RuntimeError("Could not decode\nframe")
        return SimpleNamespace(data=torch.from_numpy(np.stack([self.frames[k] for k in indices])))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[VideoDecoder]:
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(VideoDecoder, "made", 0)
    return VideoDecoder


def same(path: Path, count: Wanted) -> list[Frame]:
    """Reads on the stand-in and on the CPU, and compares frames and counts."""
    ours, theirs = Reading(), Reading()
    found, expected = (
        list(frames_of(path, count, 0, reading=ours, on_gpu=True)),
        list(read_frames(path, count, reading=theirs)),
    )
    assert [(f.number, f.seconds, f.end) for f in found] == [(f.number, f.seconds, f.end) for f in expected]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found, expected, strict=True))
    assert ours == theirs
    return found


@pytest.mark.parametrize("count", [None, 7, PerSecond(4), [3, 30]])
def test_a_plain_video_gives_the_same_frames_as_on_the_cpu(
    gpu: type[VideoDecoder], tmp_path: Path, count: Wanted
) -> None:
    write_video(tmp_path / "12:30.mp4", clip(40), fps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(tmp_path / "12:30.mp4", count)
    assert gpu.made == 1


def test_what_only_the_cpu_reads_is_read_there_and_told(
    gpu: type[VideoDecoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "turned.mp4", clip(6), rotation=90)
    write_video(tmp_path / "plain.mp4", clip(20), fps=10)
    with av.open(str(tmp_path / "plain.mp4")) as source, av.open(str(tmp_path / "inexact.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    for name, why in (("turned.mp4", "it is turned or mirrored"), ("inexact.ts", "its timestamps are inexact")):
        with pytest.warns(DtnWarning, match=f"{name}: decoded by the CPU: {why}"):
            assert same(tmp_path / name, 5)
    assert gpu.made == 0
    monkeypatch.setattr(gpu, "fails_at", 12)
    with pytest.warns(DtnWarning, match=r"torchcodec fails after 1 frames \(Could not decode frame\)"):
        assert len(same(tmp_path / "plain.mp4", None)) == 20
    monkeypatch.setattr(gpu, "extra", 1)
    with pytest.warns(DtnWarning, match="torchcodec sees 21 frames and not 20"):
        assert same(tmp_path / "plain.mp4", None)


def test_chunks_are_bounded(gpu: type[VideoDecoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    get = VideoDecoder.get_frames_at
    monkeypatch.setattr(gpu, "get_frames_at", lambda self, part: asked.append(len(part)) or get(self, part))
    write_video(tmp_path / "v.mp4", clip(40), fps=10)
    same(tmp_path / "v.mp4", None)
    assert asked == [1, 16, 16, 7]
    monkeypatch.setattr(G, "CHUNK", 3.5 * 64 * 96 * 3)
    asked.clear()
    same(tmp_path / "v.mp4", 10)
    assert asked == [1, 3, 3, 3]


def test_a_missing_gpu_or_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", clip(3))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--decoder gpu: torch sees no GPU"):
        list(frames_of(tmp_path / "v.mp4", None, on_gpu=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UsageError, match="torchcodec is not installed"):
        list(frames_of(tmp_path / "v.mp4", None, on_gpu=True))
