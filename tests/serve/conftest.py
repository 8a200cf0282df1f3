"""Uploads, a small model and a server that the tests of the service share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from serving import serving
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.video_writer import write_video
from dtn_fast.runtime.torch_scorer import TorchScorer


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good and bad uploads by name."""
    folder = tmp_path_factory.mktemp("uploads")
    face = data.astronaut()[:256, 96:352]
    write_video(folder / "clip.mp4", [face, np.hstack([face, face])[:, :256], face], fps=2)
    blank = [np.full((240, 320, 3), 5 * n, np.uint8) for n in range(40)]  # each is searched in every way for a face
    write_video(folder / "long.mp4", blank, fps=10)
    Image.fromarray(face).save(folder / "face.jpg")
    Image.fromarray(np.zeros((90, 70, 3), np.uint8)).save(folder / "blank.png")
    made = {p.name: p.read_bytes() for p in folder.iterdir()}
    made |= {"cut.mp4": made["clip.mp4"][:200], "text.png": b"hello", "empty.jpg": b""}
    made["list.mp4"] = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    return made


@pytest.fixture(scope="session")
def model() -> DTN:
    torch.manual_seed(3)
    model = DTN(SMALL).eval()
    torch.nn.init.normal_(model.head.weight)  # so that its heat maps show a region
    return model


@pytest.fixture(scope="session")
def port(model: DTN) -> Iterator[int]:
    with serving(TorchScorer(model), max_mb=1.0) as number:
        yield number
