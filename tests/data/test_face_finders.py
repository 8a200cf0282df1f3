"""Face finders on real photographs: small, several, turned, hidden in odd arrays; their model files and errors."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from skimage import data

from dtn_fast.data import dlib_finders as D
from dtn_fast.data import face_finders as F
from dtn_fast.data import finder_base as B
from dtn_fast.data import yunet_finder as Y
from dtn_fast.data.config import FinderConfig
from dtn_fast.data.faces import Box, FoundFace, roll
from dtn_fast.errors import UsageError
from dtn_fast.model.config import CropPolicy

PHOTO = np.ascontiguousarray(data.astronaut())
PORTRAIT = PHOTO[:320, 60:380]
"""Head and shoulders; dlib's box has 91 pixels about (164, 126)."""


def yunet_file() -> Path | None:
    """YuNet's model: $DTN_YUNET, or shared/models in a folder above this one."""
    given = os.environ.get("DTN_YUNET")
    places = [Path(given)] if given else [p / "shared" / "models" / Y.YUNET[1] for p in Path(__file__).parents]
    return next((path for path in places if path.is_file()), None)


YUNET = yunet_file()
NAMES = ["dlib", pytest.param("yunet", marks=pytest.mark.skipif(YUNET is None, reason="no model: set DTN_YUNET"))]


def finder(name: str, **config: object) -> B.FaceFinder:
    return F.open_finder(FinderConfig(name, YUNET if name == "yunet" else None, **config))


def beside(smaller: int, larger: int = 0, height: int = 1080, width: int = 1920) -> np.ndarray:
    """A frame with a face of ``smaller`` pixels at the lower left and, if given, one of ``larger`` at the right."""
    frame = np.full((height, width, 3), (150, 160, 170), np.uint8)
    for side, left in ((smaller, 300), (larger, -1)):
        if side:
            size = round(320 * side / 91)
            face = cv2.resize(PORTRAIT, (size, size), interpolation=cv2.INTER_AREA)[:height]
            left = left if left >= 0 else width - size
            frame[height - len(face) :, left : left + size] = face
    return frame


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1, 3])
def test_finds_the_astronaut_at_any_resolution(name: str, scale: int) -> None:
    (found,) = finder(name)([np.repeat(np.repeat(PHOTO, scale, 0), scale, 1)])[0]
    x, y = found.box.center
    assert (x / scale, y / scale) == pytest.approx((224, 126), abs=8)
    assert found.box.side / scale == pytest.approx(91, abs=8)  # the two finders' boxes are alike
    assert found.box.right - found.box.left == found.box.bottom - found.box.top


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("larger", [0, 400])
def test_a_face_of_40_pixels_is_found_at_1080p_alone_and_beside_a_large_one(name: str, larger: int) -> None:
    found = finder(name)([beside(40, larger)])[0]
    assert [face.box.side > 200 for face in found] == [True, False][larger == 0 :]  # largest first
    x, y = found[-1].box.center
    assert (x, y) == pytest.approx((300 + 164 * 40 / 91, 1080 - 194 * 40 / 91), abs=8)
    assert found[-1].box.side == pytest.approx(40, rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_face_is_a_choice(name: str) -> None:
    frame = beside(40)
    assert finder(name, min_face=200)([frame], turned=False) == [[]]
    assert len(finder(name, min_face=40 / 1080)([frame])[0]) == len(finder(name, min_face=40)([frame])[0]) == 1
    with pytest.raises(UsageError, match="--min-face 0: must be above 0"):
        FinderConfig(min_face=0)
    with pytest.raises(UsageError, match="--min-face nan"):
        FinderConfig(min_face=float("nan"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degrees", [20, 45, 60, 90, 135, 180, 270])
def test_turned_heads_are_found(name: str, degrees: int) -> None:
    turn = cv2.getRotationMatrix2D((160, 160), degrees, 1.0)  # anticlockwise
    image = cv2.warpAffine(PORTRAIT, turn, (320, 320), borderValue=(120, 120, 120))
    expected = FoundFace(Box.around((164, 126), 91), 1.0).placed(turn).box
    for turned in (False, True):
        (found,) = finder(name, turned=turned)([image])[0]
        assert found.box.overlap(expected) > 0.6
    if found.points is not None:
        assert ((roll(found.points) or 0) + degrees + 180) % 360 - 180 == pytest.approx(0, abs=20)


def test_a_lying_head_beside_an_upright_one_is_found_on_request() -> None:
    lying = np.ascontiguousarray(np.rot90(cv2.resize(PORTRAIT, (640, 640))))
    frame = np.hstack([cv2.resize(PORTRAIT, (640, 640)), lying])
    assert len(finder("dlib")([frame])[0]) == 1
    assert len(finder("dlib", turned=True)([frame])[0]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_blank_tiny_grey_and_transparent_frames(name: str) -> None:
    search = finder(name)
    for shape in ((1, 1, 3), (3, 200, 3), (100, 100, 3), (64, 64)):
        assert search([np.zeros(shape, np.uint8)]) == [[]]
    grey = cv2.cvtColor(PORTRAIT, cv2.COLOR_RGB2GRAY)
    alpha = np.dstack([PORTRAIT, np.zeros((320, 320), np.uint8)])
    boxes = [found[0].box for found in search([PORTRAIT, grey, grey[..., None], alpha])]
    assert boxes[3] == boxes[0]
    assert all(box.overlap(boxes[0]) > 0.7 for box in boxes)
    wrongs: tuple[Any, ...] = np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros(8, np.uint8)
    for wrong in wrongs:
        with pytest.raises(UsageError, match="a frame is"):
            search([wrong])


@pytest.mark.parametrize("name", NAMES)
def test_many_threads_find_what_one_finds(name: str) -> None:
    search = finder(name)
    frames = [beside(side, 0, 360, 640) for side in (60, 70, 80, 90)] * 3
    alone = search(frames)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frame: search([frame])[0], frames))
    key = lambda found: [[(face.box, face.score) for face in faces] for faces in found]
    assert key(alone) == key(together)


@pytest.mark.parametrize("name", NAMES)
def test_a_crowd_is_cut_to_its_largest_faces_and_a_huge_frame_is_searched_in_bounds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    scaled = B.scaled
    for module in (B, D, Y):
        monkeypatch.setattr(module, "scaled", lambda *a: searched.append((image := scaled(*a)).size // 3) or image)
    frame = np.zeros((4320, 7680, 3), np.uint8)  # 8K
    for number in range(200):
        side = 380 if number < 20 else 350
        y, x = divmod(number, 20)
        face = cv2.resize(PORTRAIT[30:240, 60:270], (side, side), interpolation=cv2.INTER_AREA)
        frame[y * 420 : y * 420 + side, x * 384 : x * 384 + side] = face
    found = finder(name, min_face=20)([frame])[0]
    assert len(found) == B.MAX_FACES
    assert max(searched) <= 1.01 * B.MAX_SEARCH
    sides = [face.box.side for face in found]
    assert sides == sorted(sides, reverse=True)
    assert min(sides[:15]) > 1.03 * sides[-1]


def test_model_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"not a model")
    for config, message in (
        (FinderConfig("dlib", face_model=wrong), "dlib's HOG finder has no model file; add --faces yunet"),
        (FinderConfig("yunet", face_model=tmp_path / "none"), "none: no such file"),
        (FinderConfig("yunet", face_model=wrong), r"wrong\.onnx \(use face_detection.* cannot run it here"),
        (FinderConfig("dlib-cnn"), "--faces dlib-cnn: needs --face-model mmod_human_face_detector.dat"),
        (FinderConfig("dlib-cnn", face_model=wrong), "not a face detector of dlib"),
        (FinderConfig("dlib", landmark_model=wrong), "not a shape predictor of dlib"),
        (FinderConfig("dlib", landmark_model=tmp_path / "none"), "none: no such file"),
    ):
        with pytest.raises(UsageError, match=message):
            F.open_finder(config)


def test_yunet_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, ...]] = []

    def fetch(*names: str) -> str:
        asked.append(names)
        if len(asked) == 1:
            raise ConnectionError("no route to host\nand more")
        (tmp_path / "model.onnx").write_bytes(b"another file")
        return str(tmp_path / "model.onnx")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(UsageError, match=r"cannot be fetched \(no route to host\); download .* --face-model"):
        F.open_finder(FinderConfig("yunet"))
    with pytest.raises(UsageError, match="not the file whose checksum is pinned"):
        F.open_finder(FinderConfig("yunet"))
    assert asked == [Y.YUNET] * 2
    if YUNET is not None:
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(YUNET))
        assert len(F.open_finder(FinderConfig("yunet"))([PORTRAIT])[0]) == 1  # without asking the hub


@pytest.mark.skipif(YUNET is None, reason="no model: set DTN_YUNET")
@pytest.mark.parametrize(("shape", "faces"), [((1080, 1920), 3), ((227, 403), 2), ((40, 64), 0)])
def test_yunet_finds_what_opencv_finds_with_it(shape: tuple[int, int], faces: int) -> None:
    frame = cv2.resize(np.hstack([PHOTO, PHOTO[:, ::-1], PORTRAIT[64:].repeat(2, 0)]), shape[::-1])
    theirs = cv2.FaceDetectorYN.create(str(YUNET), "", shape[::-1], Y.YUNET_SCORE, Y.YUNET_OVERLAP, Y.YUNET_MOST)
    expected = theirs.detect(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1]
    found = finder("yunet")._rows(frame)
    assert len(found) == faces
    np.testing.assert_allclose(found, np.zeros((0, 15)) if expected is None else expected, atol=1e-3)


def test_only_yunet_runs_on_a_gpu_and_a_missing_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--face-device cuda: for --faces yunet alone, and the finder is dlib"):
        F.open_finder(FinderConfig("dlib"), provider="cuda")
    monkeypatch.setattr(Y, "fetch_yunet", lambda: Path("yunet.onnx"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"--face-device cuda: .* onnxruntime-gpu, or use --face-device cpu"):
        F.open_finder(FinderConfig("yunet"), provider="cuda")


@pytest.mark.skipif(YUNET is None, reason="no model: set DTN_YUNET")
def test_a_network_that_is_no_face_finder_is_refused() -> None:
    """Another ONNX model, valid in itself."""
    old = Path(__file__).parents[1] / "old_files" / "model.onnx"
    with pytest.raises(UsageError, match=r"model.onnx \(use .*: onnxruntime cannot run it as YuNet"):
        F.open_finder(FinderConfig("yunet", old))


def test_dlib_is_given_whole_arrays() -> None:
    """It reads a view of a larger picture wrongly, such as the window of a face that needs no scaling."""
    search = D.DlibFinder()
    detector, given = search._detector(), list[bool]()

    class Spy:
        def run(self, image: np.ndarray, *more: object) -> Any:
            given.append(image.flags.c_contiguous)
            return detector.run(image, *more)

    search._own.detector = Spy()
    for side in D.NEAR_SIDES:
        assert search.near(PHOTO, FoundFace(Box.around((224, 126), side), 1.0)) is not None
    assert len(given) == 16
    assert all(given)


def test_a_model_s_policy_names_the_finder_and_the_config_overrides_it() -> None:
    assert isinstance(F.open_finder(FinderConfig()), D.DlibFinder)
    if YUNET is not None:
        assert isinstance(F.open_finder(FinderConfig(face_model=YUNET), CropPolicy("yunet")), Y.YunetFinder)
        assert isinstance(F.open_finder(FinderConfig("dlib"), CropPolicy("yunet")), D.DlibFinder)


@pytest.mark.skipif("DTN_DLIB_MODELS" not in os.environ, reason="set DTN_DLIB_MODELS to a folder of dlib's models")
def test_dlib_s_network_and_landmarks() -> None:
    folder = Path(os.environ["DTN_DLIB_MODELS"])
    small = FinderConfig("dlib-cnn", folder / "mmod_human_face_detector.dat", min_face=80)
    (found,) = F.open_finder(small)([PORTRAIT])[0]
    assert found.box.overlap(Box.around((164, 126), 91)) > 0.5
    for name, count, known in (
        ("shape_predictor_68_face_landmarks.dat", 68, 68),
        ("shape_predictor_5_face_landmarks.dat", 5, 3),
    ):
        search = F.open_finder(FinderConfig("dlib", landmark_model=folder / name))
        points = search([PORTRAIT])[0][0].points
        assert points is not None
        assert (len(points), int(np.isfinite(points).all(1).sum())) == (count, known)
        assert roll(points) == pytest.approx(0, abs=8)
        assert Box.around((164, 126), 110).left < np.nanmin(points[:, 0])


class Eyes:
    """A landmark model that puts two eyes level in its picture, 40 pixels beside the middle, and a nose below."""

    def __call__(self, image: np.ndarray, rectangle: Any) -> Any:
        middle = B.LANDMARK_SIDE / 2
        assert image.shape == (B.LANDMARK_SIDE, B.LANDMARK_SIDE, 3)
        assert image.flags.c_contiguous
        x, y = [middle + 40, middle + 40, middle - 40, middle - 40, middle], [middle] * 4 + [middle + 30]
        points = [SimpleNamespace(x=a, y=b) for a, b in zip(x, y, strict=True)]
        return SimpleNamespace(parts=lambda: points)


@pytest.mark.parametrize("degrees", [0, 90, 180])
def test_a_landmark_model_sees_every_face_upright_followed_ones_too(
    degrees: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(B.FaceFinder, "_predictor", lambda _: Eyes())
    search = D.DlibFinder(FinderConfig("dlib", landmark_model=tmp_path))
    image = np.ascontiguousarray(np.rot90(PORTRAIT, degrees // 90))  # anticlockwise
    (found,) = search([image])[0]
    followed = search.near(image, found)
    assert followed is not None
    for face in (found, followed):
        assert face.points is not None
        assert face.points.shape == (5, 2)
        assert np.isnan(face.points[3:]).all()
        turned = (roll(face.points) or 0) + degrees
        assert abs((turned + 180) % 360 - 180) < 1
        assert face.points[:2].mean(0) == pytest.approx(face.box.center, abs=1)
        assert np.hypot(*(face.points[1] - face.points[0])) == pytest.approx(80 * 2 * face.box.side / B.LANDMARK_SIDE)


@pytest.mark.parametrize("shape", [(30, 60000), (60000, 30), (1200, 1200), (2160, 3840)])
def test_turned_frames_are_bounded_whatever_their_shape(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[int] = []
    monkeypatch.setattr(D.DlibFinder, "_search", lambda _, image, *a, **b: turned.append(image[..., 0].size) or [])
    D.DlibFinder()([np.zeros((*shape, 3), np.uint8)])
    assert len(turned) == 8
    assert max(turned[1:]) <= 1.05 * B.QUICK_SEARCH


def test_exactly_as_many_faces_as_are_given_are_no_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = [FoundFace(Box(n, 0, n + 9, 9), 1.0) for n in range(B.MAX_FACES + 1)]
    search, given = D.DlibFinder(), faces[:-1]
    monkeypatch.setattr(D.DlibFinder, "_search", lambda *_, **__: list(given))
    assert (len(search([PORTRAIT])[0]), search.crowded) == (B.MAX_FACES, False)
    given = faces
    assert (len(search([PORTRAIT])[0]), search.crowded) == (B.MAX_FACES, True)
