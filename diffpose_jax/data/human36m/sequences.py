"""Human3.6M's recordings: who does what before which camera, under which name, and which frames.

Every subject performs every action twice before four cameras (subactions 0 and 1, as the
preprocessing of Wehrbein et al., 2021, and of DiffPose numbers them). The files of the second
performance are mostly named "Eating 1.54138969", those of the first "Eating.54138969", but not
all, and two actions have a second name. The tables below give what these two programs know.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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

_CANONICAL = {"TakingPhoto": "Photo", "WalkingDog": "WalkDog"}

_SUFFIXES = {
    ("S1", "Eating"): ("", "2"),
    ("S1", "Sitting"): ("2", "1"),
    ("S1", "SittingDown"): ("", "2"),
    ("S5", "Directions"): ("2", "1"),
    ("S5", "Discussion"): ("3", "2"),
    ("S5", "Greeting"): ("2", "1"),
    ("S5", "Photo"): ("", "2"),
    ("S5", "Waiting"): ("2", "1"),
    ("S6", "Eating"): ("2", "1"),
    ("S6", "Posing"): ("", "2"),
    ("S6", "Sitting"): ("2", "1"),
    ("S6", "Waiting"): ("", "3"),
    ("S7", "Phoning"): ("", "2"),
    ("S7", "Waiting"): ("2", "1"),
    ("S7", "Walking"): ("2", "1"),
    ("S8", "WalkTogether"): ("2", "1"),
    ("S9", "Discussion"): ("2", "1"),
    ("S11", "Discussion"): ("2", "1"),
    ("S11", "Greeting"): ("", "2"),
    ("S11", "Phoning"): ("3", "2"),
    ("S11", "Smoking"): ("", "2"),
}
"""What follows the action in the names of subactions 0 and 1, where it is not "" and "1"."""


class Sequence(NamedTuple):
    """One recording.

    Attributes:
        subject: Such as "S9".
        action: One of `ACTIONS`.
        subaction: 0 or 1.
        camera: One of `CAMERAS`.
    """

    subject: str
    action: str
    subaction: int
    camera: str


BROKEN = frozenset(
    {Sequence("S5", "Waiting", 1, "55011271"), Sequence("S11", "Directions", 0, "54138969")}
)
"""Left out by both programs: the video of the second is damaged."""


def table(division: str, split: str) -> str:
    """Tells which of the published tables a split is taken from.

    The validation split is a part of the training table: its rows keep their places there.

    Args:
        division: A key of `SPLITS`.
        split: "train" or "test".

    Returns:
        "train" or "test"; `SPLITS["standard"]` has the table's subjects in order.
    """
    return "train" if division == "validation" else split


def parse(subject: str, name: str) -> Sequence:
    """Tells the recording of a file.

    Args:
        subject: Such as "S9".
        name: The file's name without its ending, such as "TakingPhoto 1.54138969".

    Returns:
        The recording, with the canonical name of its action.

    Raises:
        ValueError: If no recording of the subject has such a name.
    """
    performance, _, camera = name.partition(".")
    action, _, suffix = performance.partition(" ")
    action = _CANONICAL.get(action, action)
    suffixes = _SUFFIXES.get((subject, action), ("", "1"))
    if action not in ACTIONS or camera not in CAMERAS or suffix not in suffixes:
        raise ValueError(f"{name!r} is not the name of a recording of {subject} in Human3.6M.")
    return Sequence(subject, action, suffixes.index(suffix), camera)


def expected(subject: str, actions: tuple[str, ...]) -> list[Sequence]:
    """Lists all recordings of a subject but the broken ones."""
    everything = (
        Sequence(subject, action, subaction, camera)
        for action in actions
        for subaction in (0, 1)
        for camera in CAMERAS
    )
    return [sequence for sequence in everything if sequence not in BROKEN]


def columns(
    sequence: Sequence, frames: np.ndarray, rows: np.ndarray, points_camera_mm: np.ndarray
) -> dict[str, np.ndarray]:
    """Makes the columns that examples of one recording have in common.

    Args:
        sequence: The recording.
        frames: (n,), frames of the video, from 0.
        rows: (n,), places in the whole table of the split.
        points_camera_mm: (n, 17, 3), camera coordinates, the hip first.

    Returns:
        `subject`, `action`, `camera` (n,) str, `subaction`, `frame`, `row` (n,) int32, `pose_mm`
        (n, 17, 3) float32.
    """
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


def every_64th_frame(frame: np.ndarray) -> np.ndarray:
    """Tells the paper's test frames: of each video every 64th, beginning with its first.

    The first frame that is stored of a video is 3, the next are 67, 131, ..

    Args:
        frame: (N,), frames of the videos.

    Returns:
        (N,) bool.
    """
    return frame // STRIDE % (64 // STRIDE) == 0


def every_16th_row(row: np.ndarray) -> np.ndarray:
    """Tells the published program's test frames: every 16th row of the whole table.

    Counting goes on over the ends of videos, so of a video they are every 64th frame, but from
    the second video on do not begin with its first.

    Args:
        row: (N,), places in the whole table.

    Returns:
        (N,) bool.
    """
    return row % (64 // STRIDE) == 0
