"""Human3.6M's recordings: who does what before which camera, under which name, and which frames.

Every subject performs every action twice before four cameras (subactions 0 and 1, as the
preprocessing of Wehrbein et al., 2021, and of DiffPose numbers them). The files of the second
performance are mostly named "Eating 1.54138969", those of the first "Eating.54138969", but not
all, and two actions have a second name. The tables below give what these two programs know.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from diffpose_jax.data import cameras

SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    "standard": {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")},
    "validation": {"train": ("S1", "S6", "S7"), "test": ("S5", "S8")},
}
"""Subjects of either split. "validation" holds two of the training subjects out for tests."""

ACTIONS: tuple[str, ...] = (
    "Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing", "Purchases",
    "Sitting", "SittingDown", "Smoking", "Waiting", "WalkDog", "WalkTogether", "Walking",
)  # fmt: skip

CAMERAS: tuple[str, ...] = ("54138969", "55011271", "58860488", "60457274")

STRIDE = 4
"""Every fourth frame is used: 3, 7, 11, .., counted from 0."""

_SECOND_NAMES = {"Photo": "TakingPhoto", "WalkDog": "WalkingDog"}

_SUFFIXES = {
    ("", "2"): "S1 Eating, S1 SittingDown, S5 Photo, S6 Posing, S7 Phoning, S11 Greeting,"
    " S11 Smoking",
    ("", "3"): "S6 Waiting",
    ("2", "1"): "S1 Sitting, S5 Directions, S5 Greeting, S5 Waiting, S6 Eating, S6 Sitting,"
    " S7 Waiting, S7 Walking, S8 WalkTogether, S9 Discussion, S11 Discussion",
    ("3", "2"): "S5 Discussion, S11 Phoning",
}
"""What follows the action in the names of subactions 0 and 1, where it is not "" and "1"."""

_SUFFIXES_OF = {name: pair for pair, names in _SUFFIXES.items() for name in names.split(", ")}


class Sequence(NamedTuple):
    """One recording: such as "S9", one of `ACTIONS`, 0 or 1, one of `CAMERAS`."""

    subject: str
    action: str
    subaction: int
    camera: str


BROKEN: frozenset[Sequence] = frozenset(
    {
        Sequence("S5", "Waiting", 1, "55011271"),
        Sequence("S11", "Directions", 0, "54138969"),
    }
)
"""Left out by both programs: the video of the second is damaged."""


def table(split: str, subset: str) -> str:
    """Which of the published tables, "train" or "test", holds the subset "train" or "test".

    The validation split is a part of the training table: its rows keep their places there.
    `SPLITS["standard"]` has a table's subjects in order.
    """
    return "train" if split == "validation" else subset


def tables(split: str) -> list[str]:
    """The tables that a split is made of."""
    return sorted({table(split, subset) for subset in ("train", "test")})


def file_names(sequence: Sequence) -> list[str]:
    """What the files of a recording may be called, without their endings."""
    suffixes = _SUFFIXES_OF.get(f"{sequence.subject} {sequence.action}", ("", "1"))
    actions = [sequence.action, _SECOND_NAMES.get(sequence.action)]
    return [
        f"{action} {suffixes[sequence.subaction]}".strip() + f".{sequence.camera}"
        for action in actions
        if action
    ]


def expected(subject: str, actions: tuple[str, ...]) -> list[Sequence]:
    """All recordings of a subject but the broken ones."""
    everything = (
        Sequence(subject, action, subaction, camera)
        for action in actions
        for subaction in (0, 1)
        for camera in CAMERAS
    )
    return [sequence for sequence in everything if sequence not in BROKEN]


def columns(
    sequence: Sequence,
    frames: Int[np.ndarray, " N"],
    rows: Int[np.ndarray, " N"],
    points_camera_mm: Float[np.ndarray, "N 17 3"],
) -> dict[str, np.ndarray]:
    """The columns of examples of one recording: frames of the video, rows of the whole table."""
    count = len(frames)
    return {
        "subject": np.full(count, sequence.subject),
        "action": np.full(count, sequence.action),
        "subaction": np.full(count, sequence.subaction, np.int32),
        "camera": np.full(count, sequence.camera),
        "frame": np.asarray(frames, np.int32),
        "row": np.asarray(rows, np.int32),
        "pose_mm": cameras.output_pose(np.asarray(points_camera_mm, np.float64)).astype(np.float32),
    }


def every_64th_frame(frame: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which frames the paper tests on: of each video every 64th, beginning with its first.

    The first frame that is stored of a video is 3, the next are 67, 131, ..
    """
    return frame // STRIDE % (64 // STRIDE) == 0


def every_16th_row(row: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which rows the published program tests on: every 16th of the whole table.

    Counting goes on over the ends of videos, so of a video they are every 64th frame, but from
    the second video on do not begin with its first.
    """
    return row % (64 // STRIDE) == 0
