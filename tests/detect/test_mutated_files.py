"""Damaged files of every kind that is read, through detect and prepare: no traceback, no hang, no verdict on less than
is said.  ``DTN_MUTATED=2000`` tries that many; a few of each kind are tried otherwise."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.media import PICTURES
from dtn_fast.detect.config import DetectConfig

FACE = np.full((120, 120, 3), 120, np.uint8)
FACE[12:108, 12:108] = cv2.resize(data.astronaut()[:256, 96:352], (96, 96))
STILL = ("jpg", "png", "bmp", "tif", "jp2", "ppm", "avif", "hdr", "heic")
MOVING = ("gif", "webp", "apng")
FILMS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "ts": "libx264",
         "mpg": "mpeg2video", "flv": "libx264", "wmv": "wmv2", "3gp": "libx264", "mxf": "mpeg2video",
         "m4v": "libx265"}  # fmt: skip
FORMS = {"wmv": "asf", "ts": "mpegts", "m4v": "mp4", "mkv": "matroska", "mpg": "mpeg"}
FRAMES, EACH = 12, 2
TOTAL = int(os.environ.get("DTN_MUTATED", "0")) or EACH * (len(STILL) + len(MOVING) + len(FILMS))


def seeds(folder: Path) -> list[Path]:
    """A whole file of every kind."""
    frames = [np.roll(FACE, n, 1) for n in range(FRAMES)]
    pictures = [Image.fromarray(frame) for frame in frames[:6]]
    for kind in STILL:
        if kind == "heic" and ".heic" not in PICTURES:
            continue
        if kind == "hdr":
            cv2.imwrite(str(folder / "a.hdr"), (FACE[:, :, ::-1] / 255).astype(np.float32))
        elif kind == "heic":
            import pillow_heif

            pillow_heif.register_heif_opener()
            pictures[0].save(folder / "a.heic")
        else:
            pictures[0].save(folder / f"a.{kind}")
    for kind in MOVING:
        name = "PNG" if kind == "apng" else kind
        pictures[0].save(folder / f"a.{kind}", name, save_all=True, append_images=pictures[1:], duration=80)
    for kind, codec in FILMS.items():
        with av.open(str(folder / f"a.{kind}"), "w", format=FORMS.get(kind, kind)) as out:
            stream = out.add_stream(codec, rate=25, options={"g": "4"})
            stream.height, stream.width = FACE.shape[:2]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
    return sorted(folder.iterdir())


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """``content`` cut, with bits flipped, bytes replaced, doubled, moved or mixed with another file's."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if len(data) < 8:
            break
        start = rng.randrange(len(data))
        length = min(rng.choice((1, 4, 40, 400, 4000)), len(data) - start)
        match rng.randrange(7):
            case 0:
                del data[start:]
            case 1:
                for _ in range(rng.choice((1, 10, 100))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2:
                data[start : start + length] = bytes(length)
            case 3:
                data[start : start + length] = rng.randbytes(length)
            case 4:
                del data[start : start + length]
            case 5:
                data[start:start] = data[start : start + length]
            case 6:
                data[start:] = other[start:]
    return bytes(data)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which damage could kill; a hang is an error."""
    command = [sys.executable, "-m", "dtn_fast", *map(str, words)]
    patience = 60 + 5 * TOTAL
    return subprocess.run(command, capture_output=True, text=True, timeout=patience, errors="replace", check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOTAL mutated files, in the layout of a dataset folder."""
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "whole").mkdir()
    (folder / "set" / "test" / "real").mkdir(parents=True)
    rng, whole = random.Random(0), seeds(folder / "whole")
    for number in range(TOTAL):
        seed, other = whole[number % len(whole)], rng.choice(whole)
        path = folder / "set" / "test" / "real" / f"{number:05d}{seed.suffix}"
        path.write_bytes(mutated(seed.read_bytes(), other.read_bytes(), rng))
    return folder


def test_detect_judges_or_names_every_file(files: Path, tmp_path: Path) -> None:
    DTN(SMALL).save_pretrained(tmp_path / "model")
    ran = run("detect", files / "set", "--model", tmp_path / "model", "--out", tmp_path / "out", "--frames", 6)
    assert ran.returncode in (0, 1, 3), ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len(results) == TOTAL
    named = ran.stderr
    for row in results:
        judged = row["verdict"] in ("real", "fake", "uncertain")
        assert judged or row["verdict"] in ("failed", "no face")
        assert judged == (row["error"] is None)
        assert not judged or row["frames_read"] + row["frames_lost"] == row["frames_asked"] > 0, row["path"]
        lost = max(row["frames_lost"] / max(row["frames_asked"], 1), row["frames_missing"] / FRAMES)
        if not judged or row["frames_lost"] / row["frames_asked"] > DetectConfig.max_lost:
            assert Path(row["path"]).name in named, row["path"]
        assert not lost or row["notes"] or not judged
    assert sum(row["verdict"] in ("real", "fake", "uncertain") for row in results) > TOTAL / 10
    uncertain = 3 * any(row["verdict"] == "uncertain" for row in results)
    assert ran.returncode == (1 if any(Path(row["path"]).name in named for row in results) else uncertain)


def test_prepare_crops_or_names_every_file(files: Path, tmp_path: Path) -> None:
    ran = run("prepare", files / "set", "--out", tmp_path / "crops", "--dataset", "folder", "--frames", 4, "--size", 64)
    assert ran.returncode in (0, 1), ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    index = json.loads((tmp_path / "crops" / "index.json").read_text())
    assert len(index["status"]) == len(index["videos"])
    for state in index["status"]:
        assert state["faces"] or state["error"] or state["reason"]
        assert state["frames"] + state["lost"] <= max(state["asked"], 4)
    assert (ran.returncode == 1) == any(state["error"] for state in index["status"])
