"""The geometry of boxes, landmarks and crops."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from dtn_fast.data.faces import Box, Cut, FoundFace, crop_face, cut_of, roll
from dtn_fast.model.config import CropPolicy

RAMP = np.dstack([*np.meshgrid(np.arange(300) % 256, np.arange(200)), np.zeros((200, 300))]).astype(np.uint8)
"""An image [200, 300, 3] whose first two channels are x and y."""


def crop(image: np.ndarray, box: Box, size: int, margin: float) -> np.ndarray:
    return crop_face(image, cut_of(box, None, CropPolicy(margin=margin)), size)


def test_crop_is_the_square_around_the_box_times_the_margin() -> None:
    made = crop(RAMP, Box(100, 60, 140, 100), 80, margin=2.0)  # side 80 about (120, 80)
    assert np.array_equal(made, RAMP[40:120, 80:160])
    assert crop(RAMP, Box(100, 60, 120, 100), 80, margin=2.0).shape == (80, 80, 3)  # the longest side counts
    assert crop(RAMP[..., 0], Box(100, 60, 140, 100), 80, margin=2.0).shape == (80, 80)  # a mask


@pytest.mark.parametrize("box", [Box(-30, -30, 20, 20), Box(280, 180, 340, 240), Box(-50, -50, 350, 250)])
@pytest.mark.parametrize("degrees", [None, 30.0])
def test_crop_over_the_edge_replicates_it(box: Box, degrees: float | None) -> None:
    image = np.full((200, 300, 3), 7, np.uint8)
    cut = cut_of(box, degrees, CropPolicy(align="landmarks"))
    assert (crop_face(image, cut, 64) == 7).all()


@pytest.mark.parametrize("degrees", [-170, -90, -20, 35, 90, 180])
def test_an_aligned_crop_is_the_upright_one_of_the_turned_picture(degrees: int) -> None:
    """A photograph turned clockwise, cut at the angle of its eyes, gives the crop of the photograph."""
    image = np.ascontiguousarray(data.astronaut()[:320, 60:380])
    box, points = Box.around((164, 126), 92), np.array([[140, 110], [190, 110], [165, 135], [145, 150], [185, 150]])
    turn = cv2.getRotationMatrix2D((160, 160), -degrees, 1.0)
    turned = cv2.warpAffine(image, turn, (320, 320), borderMode=cv2.BORDER_REPLICATE)
    face = FoundFace(box, 1.0, points.astype(np.float32)).placed(turn)
    angle = roll(face.points)
    assert angle == pytest.approx(degrees, abs=0.01) or abs(abs(angle or 0) - 180) < 0.01
    policy = CropPolicy(align="landmarks")
    made = crop_face(turned, cut := cut_of(face.box, angle, policy), 96)
    plain = crop_face(image, upright := cut_of(box, 0.0, policy), 96)
    assert np.abs(made.astype(int) - plain).mean() < 12  # boxes are in whole pixels
    assert face.points is not None
    here, there = cut.placed(face.points, 96), upright.placed(points.astype(np.float32), 96)
    assert np.abs(here - there).max() < 1.0  # landmarks move with the pixels
    assert np.abs(crop_face(turned, cut_of(face.box, angle, CropPolicy()), 96).astype(int) - plain).mean() > 20


def test_landmarks_are_placed_where_the_crop_shows_them() -> None:
    cut = Cut((120.0, 80.0), 80, 25.0)
    spot = np.zeros((200, 300), np.uint8)
    cv2.circle(spot, (135, 70), 2, 255, -1)
    made = crop_face(spot, cut, 160)
    y, x = np.unravel_index(made.argmax(), made.shape)
    assert cut.placed(np.array([[135.5, 70.5]], np.float32), 160)[0] == pytest.approx((x, y), abs=5)


def test_the_eyes_of_both_numberings_give_the_angle() -> None:
    five = np.array([[10, 10], [20, 10], [15, 15], [11, 20], [19, 20]], np.float32)
    many = np.zeros((68, 2), np.float32)
    many[36:42], many[42:48] = (10, 10), (20, 20)
    assert (roll(five), roll(many)) == (0.0, pytest.approx(45.0))
    assert roll(five[:, ::-1] * (1, -1)) == pytest.approx(-90.0)
    assert roll(None) is None
    assert roll(np.full((5, 2), np.nan, np.float32)) is None


@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_a_square_wholly_outside_shows_the_nearest_pixel(degrees: float) -> None:
    """As after a video's frames have become smaller."""
    for center, expected in (((900.0, 100.0), RAMP[100, 299]), ((-500.0, -500.0), RAMP[0, 0])):
        made = crop_face(RAMP, Cut(center, 60, degrees), 32)
        assert np.abs(made.astype(int) - expected).max() <= (0 if not degrees else 1)
    assert (crop_face(RAMP[..., 1], Cut((150.0, 900.0), 60), 32) == 199).all()
