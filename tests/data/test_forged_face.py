"""The forged one of two people is cropped, by the dataset's masks; the masks and landmarks go with the crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from dtn_fast.data import prepare as P
from dtn_fast.data.config import FinderConfig, PrepareConfig, Source, WorkConfig
from dtn_fast.data.crop_dataset import CropDataset, open_crop_dataset
from dtn_fast.data.datasets import read
from dtn_fast.data.face_tracker import Tracked
from dtn_fast.data.faces import Box, FoundFace
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.forged_face import forged_faces, masks_of
from dtn_fast.data.prepare import prepare
from dtn_fast.data.video import Frame, read_frames
from dtn_fast.data.video_table import Video, VideoTable
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import MediaError, UsageError
from dtn_fast.model.config import CropPolicy

SIZE, FRAMES = 64, 4
NEAR = cv2.resize(data.astronaut()[:320, 60:380], (360, 360))
FAR = np.ascontiguousarray(cv2.resize(data.astronaut()[:320, 60:380], (200, 200))[:, ::-1])
REAL = "original_sequences/actors/c23/videos/01__walking.mp4"
FAKE = "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__walking__ABCDEFGH.mp4"
MASK = "manipulated_sequences/DeepFakeDetection/masks/videos/01_02__walking__ABCDEFGH.mp4"


def scene(shift: int, forged: bool) -> np.ndarray:
    image = np.full((360, 640, 3), 120, np.uint8)
    image[:, :360] = NEAR
    far = FAR.copy()
    if forged:
        far[..., 1] = np.clip(far[..., 1].astype(int) + 60, 0, 255)
    image[150:350, 400 + shift : 600 + shift] = far
    return image


def mask(shift: int, marked: bool = True) -> np.ndarray:
    image = np.zeros((360, 640, 3), np.uint8)
    if marked:
        image[209:249, 477 + shift : 517 + shift] = 255
    return image


def write(root: Path, masks: list[np.ndarray], frames: int = FRAMES) -> VideoTable:
    for name, images in (
        (REAL, [scene(k, False) for k in range(frames)]),
        (FAKE, [scene(k, True) for k in range(frames)]),
        (MASK, masks),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, images, fps=5, crf=10)
    return read(root, Source("dfd", allow=("counts",)))


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(P, "ProcessPoolExecutor", lambda workers, mp_context, **begin: ThreadPoolExecutor(1, **begin))


def made(table: VideoTable, out: Path, **config: Any) -> CropDataset:
    for _ in prepare(table, out, SIZE, PrepareConfig(frames=FRAMES, **config), WorkConfig()):
        pass
    return open_crop_dataset(out, verify=True)


def green(crops: np.ndarray) -> np.ndarray:
    return crops[..., 1].mean((1, 2)) - crops[..., 0].mean((1, 2))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> VideoTable:
    return write(tmp_path_factory.mktemp("dfd"), [mask(k) for k in range(FRAMES)])


@pytest.mark.parametrize("reuse", [False, True])
def test_the_forged_face_is_cropped_and_disagreements_are_counted(
    table: VideoTable, tmp_path: Path, reuse: bool
) -> None:
    crops = made(table, tmp_path, reuse_boxes=reuse, masks=True)
    rows = crops.select("test")
    fake = crops.labels[rows] == 1
    assert (fake.sum(), (~fake).sum()) == (FRAMES, FRAMES)
    tint = green(crops.get(rows))
    assert tint[fake].min() > tint[~fake].max() + 20  # the tinted, smaller face
    state = crops.status[[v.label for v in crops.videos].index(1)]
    assert (state["masked"], state["not_largest"], state["untouched"]) == (FRAMES, FRAMES, 0)
    assert [note for note in crops.notes if f"in {FRAMES} of {FRAMES} frames with a mask" in note]
    masks = crops.get_masks(rows)
    assert masks.shape == (2 * FRAMES, SIZE, SIZE)
    assert crops.mask_known is not None
    assert crops.mask_known.all()
    assert masks[~fake].max() == 0
    assert (masks[fake][:, 26:38, 26:38] > 200).all()  # the middle of the face
    assert masks[fake][:, :6].max() < 64


def test_with_all_people_the_untouched_face_is_not_labelled_fake(table: VideoTable, tmp_path: Path) -> None:
    crops = made(table, tmp_path, people="all")
    assert (crops.labels == 0).sum() == 2 * FRAMES
    assert (crops.labels == 1).sum() == FRAMES
    assert green(crops.get(np.flatnonzero(crops.labels))).min() > 20


def test_without_a_mask_the_largest_face_is_cropped(table: VideoTable, tmp_path: Path) -> None:
    bare = VideoTable(table.root, [video._replace(mask="") for video in table.videos], "dfd")
    crops = made(bare, tmp_path, masks=True)
    assert green(crops.get(np.flatnonzero(crops.labels))).max() < 20
    assert not list(tmp_path.rglob("*.masks.npy"))
    assert crops.masked.tolist() == (crops.labels == 0).tolist()
    with pytest.raises(UsageError, match="have no masks; prepare a dataset that has them, with --masks"):
        crops.get_masks(np.arange(2))
    assert not crops.notes


def test_frames_whose_mask_touches_no_face_are_left_out_and_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "dfd", [mask(k, marked=k > 1) for k in range(FRAMES)])
    crops = made(table, tmp_path / "out")
    assert crops.frame[crops.labels == 1].tolist() == [2, 3]
    assert "in 2 the mask touches no face that was found" in crops.notes[-1]
    table = write(tmp_path / "blank", [mask(k, marked=False) for k in range(FRAMES)])
    crops = made(table, tmp_path / "none")
    assert crops.status[[v.label for v in crops.videos].index(1)]["reason"] == f"no forged face in {FRAMES} frames"


def test_masks_are_matched_by_frame_number_and_size(tmp_path: Path) -> None:
    """A mask video that ends early, or is of another resolution, still marks the frames that it has."""
    half = [cv2.resize(mask(2 * k), (320, 180)) for k in range(12)]
    table = write(tmp_path / "dfd", half, frames=20)
    fake = next(video for video in table.videos if video.label)
    mask_of = masks_of(table, fake, 5)
    assert mask_of is not None
    found = [mask_of(frame) for frame in read_frames(table.root / fake.path, 5)]
    assert [m is not None for m in found] == [True, True, True, False, False]  # frames 0, 5, 10, 14 and 19 of 12
    assert all(m.shape == (360, 640) for m in found if m is not None)
    left = [int(np.flatnonzero((m > 127).any(0))[0]) for m in found if m is not None]
    assert left == pytest.approx([477, 487, 497], abs=3)
    write_video(table.root / fake.mask, [np.zeros((360, 360, 3), np.uint8)] * 20)
    mask_of = masks_of(table, fake, 1)
    assert mask_of is not None
    with pytest.raises(MediaError, match="the mask of frame 0 is 360x360, the frame 640x360"):
        mask_of(Frame(0, 0.0, scene(0, True)))


@pytest.mark.parametrize("people", ["one", "all"])
def test_without_its_mask_a_frame_shows_the_person_forged_before(tmp_path: Path, people: Any) -> None:
    table = write(tmp_path / "dfd", [mask(k) for k in range(2)])
    crops = made(table, tmp_path / "out", people=people)
    fakes = np.flatnonzero(crops.labels)
    assert crops.frame[fakes].tolist() == [0, 1, 2, 3]
    assert green(crops.get(fakes)).min() > 20
    assert "in 2 frames the mask is missing or cannot be read" in crops.notes[-1]


def test_a_broken_mask_costs_no_frame(tmp_path: Path) -> None:
    table = write(tmp_path / "dfd", [mask(k) for k in range(FRAMES)])
    (tmp_path / "dfd" / MASK).write_bytes(b"no video")
    crops = made(table, tmp_path / "out", people="all", masks=True)
    assert crops.frame[crops.labels == 1].tolist() == [0, 1, 2, 3]  # the largest face, not both
    assert f"in {FRAMES} frames the mask is missing or cannot be read" in crops.notes[-1]
    assert crops.mask_known is not None
    assert not crops.mask_known[crops.labels == 1].any()


def test_the_same_finder_named_or_not_is_the_same_job(table: VideoTable, tmp_path: Path) -> None:
    made(table, tmp_path)
    made(table, tmp_path, finder=FinderConfig("dlib"))
    with pytest.raises(UsageError, match=r"holds crops with finder\.min_face 0\.037 \(now 50\); repeat these"):
        made(table, tmp_path, finder=FinderConfig("dlib", min_face=50))


def test_masks_of_pictures_have_the_pictures_names(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask(0)).save(tmp_path / "masks" / "007.png")
    video = Video("frames", 1, "x", "test", mask="masks", frames=("frames/003.png", "frames/007.png"))
    mask_of = masks_of(VideoTable(tmp_path, [video]), video, 2)
    assert mask_of is not None
    assert mask_of(Frame(3, 0.0, scene(0, True))) is None
    marked = mask_of(Frame(7, 0.0, scene(0, True)))
    assert marked is not None
    assert marked.max() == 255
    assert masks_of(VideoTable(tmp_path, [video]), video._replace(mask=""), 2) is None


def test_the_most_touched_face_is_first_and_grazed_ones_are_none() -> None:
    marked = np.zeros((100, 100), np.uint8)
    marked[20:60, 20:40] = 255
    marked[0, 99] = 255
    faces = [Tracked(0, Box(0, 0, 30, 30)), Tracked(1, Box(15, 15, 60, 60)), Tracked(2, Box(70, -20, 110, 20))]
    assert [face.person for face in forged_faces(faces, marked)] == [1, 0]
    assert forged_faces([Tracked(0, Box(200, 200, 240, 240))], marked) == []


class WithPoints(FaceFinder):
    """A finder that gives landmarks: the same face in every frame."""

    name, shake = "yunet", 0.05
    points = np.array([[300, 100], [340, 110], [318, 125], [300, 145], [332, 150]], np.float32)

    def _search(self, frame: np.ndarray, smallest: float, quick: bool = False) -> list[FoundFace]:
        return [FoundFace(Box(270, 70, 370, 170), 1.0, self.points)]


@pytest.mark.parametrize("align", ["none", "landmarks"])
def test_landmarks_and_policy_go_with_the_crops(
    table: VideoTable, tmp_path: Path, align: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(P, "open_finder", WithPoints)
    monkeypatch.setattr(P, "_finder", WithPoints)
    crops = made(table, tmp_path, finder=FinderConfig("yunet"), align=align, margin=1.5)
    assert crops.crop == CropPolicy("yunet", 1.5, align)
    assert crops.landmarks is not None
    assert crops.landmarks.shape == (len(crops.video), 5, 2)
    eyes = crops.landmarks[:, 1] - crops.landmarks[:, 0]
    assert np.abs(eyes[:, 1]).max() == pytest.approx(0 if align == "landmarks" else 10 * SIZE / 150, abs=0.02)
    assert np.hypot(*eyes[0]) == pytest.approx(np.hypot(40, 10) * SIZE / 150, rel=0.01)


def test_alignment_without_landmarks_is_refused() -> None:
    with pytest.raises(UsageError, match="--align landmarks: needs landmarks; add --faces yunet or --landmark-model"):
        PrepareConfig(align="landmarks")
