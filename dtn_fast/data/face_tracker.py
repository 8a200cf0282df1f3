"""Faces followed through a video: numbered by person, their boxes held still.

norfair and ByteTrack link boxes that were found, but cannot search near the last ones: with a search of the whole frame
at every eighth, they kept 12 % and 4 % of the faces in 24 frames, FaceTracker all.  Neither compares appearances.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box, Cut, FoundFace, crop_face, roll
from dtn_fast.data.finder_base import FaceFinder

Look = NDArray[np.float32]

MEMORY = 8
"""Number of frames for which a lost face is known by its place; by its appearance it is known to the clip's end."""
JUMP = 0.5
"""Distance, as a share of the side, or relative growth, that is a jump."""
HOLD_DEGREES = 3.0
"""Angle that the eyes turn by before the box's angle follows."""
SAME = 0.6
"""Likeness from which on two faces are one person's wherever they are: reached by 0.1 % of pairs of other people."""
OTHER = 0.2
"""Likeness below which a face in the place of another, after a cut, is another person's."""
CUT = 0.8
"""Likeness of two frames below which there may be a cut between them."""
LOOKS = 4
"""Number of appearances kept of a person."""
KNOWN = 200
"""Number of people known at a time; the one that was lost first is forgotten."""
TURNED_EVERY = 8
"""In a row of frames without a face, one in so many is searched turned too."""


class Tracked(NamedTuple):
    person: int
    """Number of the face's track in this video, from 0."""
    box: Box
    """The face's box, held still while the face moves little."""
    points: NDArray[np.float32] | None = None
    """Landmarks [K, 2] in pixels of the frame; see :class:`~dtn_fast.data.faces.FoundFace`."""
    degrees: float | None = None
    """Clockwise angle of the eyes, held still like the box; None without landmarks."""


@dataclass(eq=False)
class Track:
    """One person's face."""

    person: int
    face: FoundFace
    center: NDArray[np.float64]
    side: float
    degrees: float | None
    frame: int
    """Number of the last frame in which the face was found."""
    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=LOOKS))
    """Appearances [192]."""

    @classmethod
    def begin(cls, person: int, face: FoundFace, frame: int) -> Track:
        return cls(person, face, np.array(face.box.center), float(face.box.side), roll(face.points), frame)

    def follow(self, face: FoundFace, frame: int, hold: float) -> None:
        """Moves the box by as much as the face is more than ``hold`` sides away from it, and its side likewise; after a
        gap or a jump, puts it on the face.

        The box stands still while the face moves less than its finder's boxes shake, and then stays that far behind at
        most: a third to a half of what the usual margin leaves on each side.
        """
        center, side, degrees = np.array(face.box.center), float(face.box.side), roll(face.points)
        step, growth = center - self.center, math.log(side / self.side)
        away = float(np.linalg.norm(step)) / self.side
        if frame == self.frame + 1 and max(away, abs(growth)) < JUMP:
            center = self.center + step * (max(away - hold, 0.0) / max(away, 1e-9))
            side = self.side * math.exp(math.copysign(max(abs(growth) - hold, 0.0), growth))
            if degrees is not None and self.degrees is not None:
                change = (degrees - self.degrees + 180) % 360 - 180
                degrees = self.degrees + math.copysign(max(abs(change) - HOLD_DEGREES, 0.0), change)
        self.center, self.side, self.degrees, self.frame = center, side, degrees, frame
        self.face = face._replace(box=Box.around((center[0], center[1]), side))

    def remember(self, look: Look) -> None:
        """Keeps an appearance that differs from those already kept."""
        if not self.looks or float(alike(look[None], np.stack(self.looks)).max()) < (1 + SAME) / 2:
            self.looks.append(look)


class FaceTracker:
    """Finds and numbers the faces of a video, given its frames in order.

    The finder is asked for each face near its last place, which costs about a tenth of a search of the whole frame.
    The whole frame is searched for the first frame, for every ``every``-th after it (to find new faces), after a cut,
    and whenever a face is no longer near its last place; by a finder that does not look near a place, always.

    Faces are given to people by place and appearance: a person seen again keeps the number, and a cut does not swap two
    people's, as far as the pictures tell.
    """

    def __init__(self, finder: FaceFinder, every: int) -> None:
        self._finder, self._every = finder, every
        self._tracks: list[Track] = []
        self._frame = self._since = self._people = self._empty = 0
        self._scene: Look | None = None
        self._shape: tuple[int, ...] = ()
        self.crowded = False
        """Whether the last frame has more faces than were given."""

    def __call__(self, image: NDArray[np.uint8]) -> list[Tracked]:
        """Faces in the next RGB frame [H, W, 3], largest first."""
        self._frame += 1
        if image.shape != self._shape:  # places in a frame of another size mean nothing
            self._shape, self._frame = image.shape, self._frame + MEMORY + 1
        scene = look_of(image)
        cut = self._scene is not None and _is_cut(self._scene, scene)
        self._scene = scene
        current = [track for track in self._tracks if track.frame == self._frame - 1]
        near = None
        if current and self._since < self._every:
            near = self._follow(image, current, cut)
        self._since = 1 if near is None else self._since + 1
        if near is None:
            near = self._finder([image], turned=self._empty % TURNED_EVERY == 0)[0]
            self.crowded = getattr(self._finder, "crowded", False)
        self._empty = 0 if near else self._empty + 1
        found = self._link(image, near, cut)
        return [
            Tracked(track.person, track.face.box, track.face.points, track.degrees)
            for track in sorted(found, key=lambda track: -track.face.box.area)
        ]

    def _follow(self, image: NDArray[np.uint8], tracks: list[Track], cut: bool) -> list[FoundFace] | None:
        """The last frame's faces in this frame, or None when one is lost, two boxes overlap by half or, after what may
        be a cut, one looks like another person's."""
        found = [face for track in tracks if (face := self._finder.near(image, track.face)) is not None]
        apart = all(a.box.overlap(b.box) < 0.5 for a, b in itertools.combinations(found, 2))
        if not apart or len(found) < len(tracks):
            return None
        if cut:
            looks = np.stack([_look_of(image, face) for face in found])
            own = [alike(look[None], np.stack(track.looks)).max() for look, track in zip(looks, tracks, strict=True)]
            return found if min(own) > SAME else None
        return found

    def _link(self, image: NDArray[np.uint8], faces: list[FoundFace], cut: bool) -> list[Track]:
        """Gives each face to the person whom place and appearance suggest most, or to a new one."""
        looks = [_look_of(image, face) for face in faces]
        pairs = []
        for number, (face, likenesses) in enumerate(zip(faces, self._likeness(looks), strict=True)):
            for track, likeness in zip(self._tracks, likenesses, strict=True):
                place = face.box.overlap(track.face.box) if self._frame - track.frame <= MEMORY else 0.0
                if likeness > SAME or (place > 0.2 and (likeness > OTHER or not cut)):
                    pairs.append((likeness + place / 2, number, track))
        given: dict[int, Track] = {}
        for _, number, track in sorted(pairs, key=lambda pair: -pair[0]):
            if number not in given and track not in given.values():
                given[number] = track
        for number, (face, look) in enumerate(zip(faces, looks, strict=True)):
            if number in given:
                given[number].follow(face, self._frame, self._finder.shake)
            else:
                given[number] = Track.begin(self._people, face, self._frame)
                self._people += 1
                self._tracks.append(given[number])
            given[number].remember(look)
        self._tracks = sorted(self._tracks, key=lambda track: track.frame)[-KNOWN:]
        return list(given.values())

    def _likeness(self, looks: list[Look]) -> NDArray[np.float32]:
        """Likeness [N, T] of each face to each person: to the most similar of the person's appearances."""
        if not looks or not self._tracks:
            return np.zeros((len(looks), len(self._tracks)), np.float32)
        known = np.stack([look for track in self._tracks for look in track.looks])
        starts = np.cumsum([0, *(len(track.looks) for track in self._tracks[:-1])])
        return np.maximum.reduceat(alike(np.stack(looks), known), starts, axis=1)


LOOK_SIDE = 32
"""Side in pixels of the picture that an appearance is taken from."""
SURROUNDINGS = 1.6
"""Side of that picture divided by the box's, so that hair and collar are in it."""


def look_of(image: NDArray[np.uint8]) -> Look:
    """The appearance of an RGB picture: lightness of 8 x 8 fields, normalised against light, then their colours.

    A face network would tell people apart far better, but has to be fetched; within one clip, clothes, hair and light
    are the same and this suffices: of faces in 40 photographs, shifted, turned, scaled and lit anew, 99 % were more
    like themselves than 97 % of the others.
    """
    lab = cv2.cvtColor(cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB).astype(np.float32)
    light = lab[..., 0].ravel() - lab[..., 0].mean()
    return np.concatenate([light / max(float(np.linalg.norm(light)), 1.0), (lab[..., 1:].ravel() - 128) / 40])


def alike(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Likeness [N, M] of appearances [N, 192] and [M, 192]: correlation of lightness (at most 1) less the mean
    difference of colour."""
    return a[:, :64] @ b[:, :64].T - np.stack([np.abs(a[:, 64:] - other[64:]).mean(1) for other in b], 1)


def _is_cut(before: Look, after: Look) -> bool:
    """Whether a frame may begin another scene; a blank one after a blank one does not."""
    return bool(alike(before[None], after[None])[0, 0] < CUT * float(before[:64] @ before[:64]))


def _look_of(image: NDArray[np.uint8], face: FoundFace) -> Look:
    """The appearance of a face and what surrounds it, upright."""
    side = max(1, round(SURROUNDINGS * face.box.side))
    cut = Cut(face.box.center, side, roll(face.points) or float(face.turn))
    return look_of(crop_face(image, cut, LOOK_SIDE))
