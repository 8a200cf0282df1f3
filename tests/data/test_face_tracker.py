"""People in motion: boxes that hold still, numbers that survive cuts and absences."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.face_tracker import MEMORY, FaceTracker, Tracked
from dtn_fast.data.faces import Box, FoundFace
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.pictures import read_image

ASTRONAUT = np.ascontiguousarray(data.astronaut()[:320, 60:380])


def hopper() -> np.ndarray:
    from matplotlib import cbook

    photo = read_image(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    return cv2.resize(photo[20:420, 60:460], (320, 320), interpolation=cv2.INTER_AREA)


HOPPER = hopper()


class Given:
    """A finder told the faces of each call; ``near`` gives the one that overlaps most."""

    shake = 0.08

    def __init__(self, frames: list[list[FoundFace]]) -> None:
        self.frames, self.now, self.turned = frames, -1, list[bool]()

    def __call__(self, frames: list[np.ndarray], turned: bool) -> list[list[FoundFace]]:
        self.turned.append(turned)
        return [self.frames[self.now]]

    def near(self, frame: np.ndarray, face: FoundFace) -> FoundFace | None:
        here = [other for other in self.frames[self.now] if other.box.overlap(face.box) > 0.1]
        return max(here, key=lambda other: other.box.overlap(face.box), default=None)


def track(finder: Given, images: list[np.ndarray], every: int = 8) -> list[list[Tracked]]:
    tracker, found = FaceTracker(finder, every), []
    for finder.now, image in enumerate(images):
        found.append(tracker(image))
    return found


def square(x: float, y: float, side: float, points: np.ndarray | None = None) -> FoundFace:
    return FoundFace(Box.around((x, y), side), 1.0, points)


BLANK = np.zeros((400, 400, 3), np.uint8)


def test_a_box_stands_still_while_its_face_shakes_and_follows_real_motion() -> None:
    rng = np.random.default_rng(0)
    shaking = [[square(200 + rng.uniform(-5, 5), 200, 100 * rng.uniform(0.95, 1.05))] for _ in range(40)]
    boxes = [faces[0].box for faces in track(Given(shaking), [BLANK] * 40)]
    sides = np.array([box.side for box in boxes])
    assert np.ptp(sides) <= 2
    assert np.ptp([box.center[0] for box in boxes]) <= 2
    moving = [[square(50 + 20 * n, 200, 100 * 1.03**n)] for n in range(15)]
    for faces, (true,) in zip(track(Given(moving), [BLANK] * 15), moving, strict=True):
        (x, _), (u, _) = faces[0].box.center, true.box.center
        assert abs(x - u) <= 0.08 * true.box.side + 1
        assert faces[0].box.side == pytest.approx(true.box.side, rel=0.09)
        left, right = (x + way * 0.65 * faces[0].box.side for way in (-1, 1))  # the usual margin
        assert left < true.box.left
        assert true.box.right < right


def test_after_a_jump_a_box_is_on_the_face() -> None:
    found = track(Given([[square(150, 200, 100)], [square(204, 200, 100)]]), [BLANK] * 2)
    assert found[1] == [Tracked(0, Box.around((204, 200), 100))]


def test_the_eyes_angle_is_held_too() -> None:
    def eyes(degrees: float) -> np.ndarray:
        x, y = np.cos(np.radians(degrees)) * 20, np.sin(np.radians(degrees)) * 20
        return np.array([[200 - x, 190 - y], [200 + x, 190 + y], [200, 200], [190, 215], [210, 215]], np.float32)

    faces = [[square(200, 200, 100, eyes(angle))] for angle in (0, 2, -2, 1, 20, 179, -179, -177)]
    held = [found[0].degrees or 0.0 for found in track(Given(faces), [BLANK] * 8)]
    assert held == pytest.approx([0, 0, 0, 0, 17, 176, 178, 180])


def test_after_a_gap_a_box_starts_on_the_face() -> None:
    faces = [[square(200, 200, 100)], [], [square(206, 200, 105)]]
    found = track(Given(faces), [BLANK] * 3)
    assert found[2] == [Tracked(0, Box.around((206, 200), 105))]


def test_frames_without_a_face_are_searched_turned_once_in_a_while() -> None:
    finder = Given([[]] * 20)
    track(finder, [BLANK] * 20)
    assert [number for number, turned in enumerate(finder.turned) if turned] == [0, 8, 16]


def test_a_frame_of_another_size_is_searched_anew() -> None:
    """Places in the frame before mean nothing there."""
    finder = Given([[square(60, 60, 40)]] * 4)
    track(finder, [BLANK, BLANK, BLANK[:200], BLANK[:200]])
    assert len(finder.turned) == 2


def scene(*people: np.ndarray | None, side: int = 320, back: int = 120) -> np.ndarray:
    """A frame 320 pixels high with a place for each person; None leaves it empty."""
    empty = np.full((320, side, 3), back, np.uint8)
    resized = [empty if p is None else cv2.resize(p, (side, 320)) for p in people]
    return np.hstack(resized)


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    lit = np.clip(image * rng.uniform(0.96, 1.04) + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.roll(lit, tuple(rng.integers(-1, 2, 2)), (0, 1))).save(buffer, "JPEG", quality=80)
    return np.asarray(Image.open(buffer))


@pytest.fixture(scope="module")
def dlib() -> FaceFinder:
    return DlibFinder()


def numbers(finder: FaceFinder, frames: list[np.ndarray], every: int = 8) -> list[list[int]]:
    """The person numbers of each frame, from left to right."""
    tracker = FaceTracker(finder, every)
    rows = [sorted(tracker(noisy(frame, seed)), key=lambda face: face.box.left) for seed, frame in enumerate(frames)]
    return [[face.person for face in row] for row in rows]


def test_equal_and_nearly_equal_frames_give_equal_boxes(dlib: FaceFinder) -> None:
    for frames, most in (([ASTRONAUT] * 6, 0.0), ([noisy(ASTRONAUT, n) for n in range(6)], 0.02)):
        tracker = FaceTracker(dlib, 8)
        sides = [max(tracker(frame), key=lambda face: face.box.side).box.side for frame in frames]
        steps = [abs(b / a - 1) for a, b in itertools.pairwise(sides)]
        assert max(steps) <= most


def test_a_cut_does_not_swap_two_people(dlib: FaceFinder) -> None:
    found = numbers(dlib, [scene(ASTRONAUT, HOPPER)] * 3 + [scene(HOPPER, ASTRONAUT)] * 3)
    assert set(found[0]) == {0, 1}
    assert found == [found[0]] * 3 + [found[0][::-1]] * 3


def test_shot_and_counter_shot_are_two_people_and_both_keep_their_numbers(dlib: FaceFinder) -> None:
    a, b = scene(ASTRONAUT), scene(HOPPER, back=60)
    assert numbers(dlib, [a, a, b, b, a, b, a]) == [[0], [0], [1], [1], [0], [1], [0]]


def test_after_a_cut_the_whole_frame_is_searched(dlib: FaceFinder) -> None:
    """Another person in the same place is a sign that there may be more elsewhere."""
    found = numbers(dlib, [scene(ASTRONAUT, None)] * 2 + [scene(HOPPER, HOPPER, back=60)] * 2)
    assert [len(row) for row in found] == [1, 1, 2, 2]
    assert not set(found[0]) & set(found[2])


def test_a_person_who_was_away_for_long_keeps_the_number(dlib: FaceFinder) -> None:
    away = [scene(None, HOPPER)] * (MEMORY + 3)
    found = numbers(dlib, [scene(ASTRONAUT, HOPPER)] * 2 + away + [scene(HOPPER, None, ASTRONAUT)] * 2)
    (left, right) = found[0]
    assert found[1] == [left, right]
    assert found[2:-2] == [[right]] * len(away)
    assert found[-2:] == [[right, left]] * 2  # elsewhere in the frame


def test_two_who_look_alike_are_told_apart_by_place(dlib: FaceFinder) -> None:
    twins = scene(ASTRONAUT, ASTRONAUT)
    found = numbers(dlib, [twins] * 6, every=2)
    assert found == [found[0]] * 6
    assert set(found[0]) == {0, 1}
