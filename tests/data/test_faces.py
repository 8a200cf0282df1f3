"""Face detection on a real photograph, and the geometry of crops."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from dtn_fast.data.faces import Box, FaceFinder, crop_face


@pytest.fixture(scope="module")
def detector() -> FaceFinder:
    return FaceFinder()


@pytest.mark.parametrize("scale", [1, 3])
def test_finds_the_astronaut_at_any_resolution(detector: FaceFinder, scale: int) -> None:
    image = np.repeat(np.repeat(data.astronaut(), scale, 0), scale, 1)
    (box,) = detector(image)
    x, y = (box.left + box.right) / 2 / scale, (box.top + box.bottom) / 2 / scale
    assert (x, y) == pytest.approx((224, 112), abs=25)
    assert box.area > 0


def test_several_faces_largest_first_and_none(detector: FaceFinder) -> None:
    face = data.astronaut()[:256, 96:352]
    canvas = np.zeros((512, 800, 3), np.uint8)
    canvas[:256, 500:756] = face
    canvas[:512, :512] = np.repeat(np.repeat(face, 2, 0), 2, 1)
    boxes = detector(canvas)
    assert len(boxes) == 2
    assert boxes[0].area > 2 * boxes[1].area
    assert boxes[0].left < 300 < boxes[1].left
    assert detector(np.zeros((100, 100, 3), np.uint8)) == []
    assert detector(np.zeros((1, 1, 3), np.uint8)) == []


def test_crop_is_the_square_around_the_box_times_the_margin() -> None:
    yy, xx = np.mgrid[0:200, 0:300].astype(np.uint8)
    image = np.stack([xx, yy, xx], 2)
    crop = crop_face(image, Box(100, 60, 140, 100), 80, margin=2.0)  # side 80 about (120, 80)
    assert np.array_equal(crop, image[40:120, 80:160])
    assert crop_face(image, Box(100, 60, 120, 100), 80, margin=2.0).shape == (80, 80, 3)  # the longest side counts


@pytest.mark.parametrize("box", [Box(-30, -30, 20, 20), Box(280, 180, 340, 240), Box(-50, -50, 350, 250)])
def test_crop_over_the_edge_replicates_it(box: Box) -> None:
    image = np.full((200, 300, 3), 7, np.uint8)
    assert (crop_face(image, box, 64, 1.3) == 7).all()
