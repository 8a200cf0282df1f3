"""High dynamic range video, PQ and HLG (ITU-R BT.2100), as a standard display shows it."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

PQ, HLG = 16, 18
"""Numbers of the two transfer functions (ITU-T H.273)."""
BT2020 = 9
"""Number of the primaries of BT.2020 (ITU-T H.273)."""
WHITE = 203.0
"""Luminance in cd/m2 of a white that is no highlight (ITU-R BT.2408)."""
PEAK = 1000.0
"""Luminance in cd/m2 of the display that HLG is shown on."""
KNEE = 0.8
"""Light, as a share of WHITE, above which highlights are compressed."""
STEPS = 4096
"""Number of steps of the tables of transfer functions, as in 12-bit video."""
LUMA = np.array([[0.2627, 0.678, 0.0593]], np.float32)
"""Share of each primary of BT.2020 in luminance."""
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
"""Linear RGB of BT.2020 to linear RGB of BT.709 (ITU-R BT.2087)."""


def is_hdr(frame: Any) -> bool:
    """Whether a decoded frame (av.VideoFrame) is HDR."""
    return int(frame.color_trc) in (PQ, HLG)


def to_sdr(frame: Any) -> NDArray[np.uint8]:
    """A decoded HDR frame as RGB [H, W, 3] of BT.709 at gamma 2.4; light above KNEE is compressed."""
    codes = frame.to_ndarray(format="rgb48le") >> 4
    light = np.take(_light(int(frame.color_trc)), codes)
    if int(frame.color_trc) == HLG:  # the display's part of the transfer: brighter by luminance ** 0.2
        gain = cv2.pow(np.maximum(cv2.transform(light, LUMA), 1e-6), 0.2) * np.float32(PEAK / WHITE)
        light *= gain[..., None]
    if int(frame.color_primaries) == BT2020:
        light = cv2.transform(light, TO_BT709)
    peak = np.maximum(cv2.max(cv2.max(light[..., 0], light[..., 1]), light[..., 2]), KNEE)
    kept = KNEE + (1 - KNEE) * (1 - cv2.exp((KNEE - peak) / (1 - KNEE)))
    light *= (kept / peak)[..., None]
    return np.take(_display(), (light.clip(0, 1) * np.float32(STEPS - 1) + np.float32(0.5)).astype(np.uint16))


@functools.cache
def _light(transfer: int) -> NDArray[np.float32]:
    """Light of each code: of the display as a share of WHITE for PQ, of the scene from 0 to 1 for HLG."""
    code = np.arange(STEPS) / (STEPS - 1)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = code ** (1 / m2)
        light = 10_000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


@functools.cache
def _display() -> NDArray[np.uint8]:
    """8-bit code of each step of light from 0 to 1 (ITU-R BT.1886)."""
    return ((np.arange(STEPS) / (STEPS - 1)) ** (1 / 2.4) * 255 + 0.5).astype(np.uint8)
