"""What a motion file of any format becomes, and what the readers of text share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_LARGEST = 1e9
_MOST_POSITIONS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Recording:
    """The joints of one skeleton over time, as a file gives them, in its axes and unit."""

    joints: tuple[str, ...]
    positions: Float[np.ndarray, "F N 3"]
    rotations: Float[np.ndarray, "F N 3 3"]  # the columns are the axes that move with the joint
    fps: float | None  # frames a second, if the file tells
    unit_mm: float | None  # length of the file's unit, if the file tells


class Line(NamedTuple):
    """A line of a text file."""

    path: Path
    number: int  # counted from one
    text: str

    @property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    def error(self, reason: str) -> ValueError:
        """Makes an error that names file and line."""
        return ValueError(f"{self.path}, line {self.number}: {reason}")

    def floats(
        self, count: int, words: Sequence[str] | None = None
    ) -> Float[np.ndarray, " {count}"]:
        """The numbers of the line: the words after the first one, if none are given."""
        words = self.words[1:] if words is None else words
        if len(words) != count:
            raise self.error(f"{len(words)} numbers where there must be {count}")
        try:
            numbers = list(map(float, words))
        except ValueError as error:
            raise self.error(str(error)[:80]) from error
        if not sum(map(abs, numbers)) < _LARGEST:  # nan is refused, too
            raise self.error("a number is not finite or is far too large")
        return np.array(numbers)


def read_lines(path: Path) -> list[Line]:
    """Reads the lines of a text file that are not blank; bytes that are no UTF-8 are replaced."""
    data = path.read_bytes()
    if b"\0" in data or not data.strip():
        raise ValueError(f"{path} is not a text file")
    lines = data.decode("utf-8-sig", errors="replace").splitlines()
    return [Line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def listed(names: Iterable[str]) -> str:
    """Joins the names of a file for a message, which they must not flood."""
    names = [name[:60] for name in names]
    return ", ".join(names[:100]) + (", .." if len(names) > 100 else "")


def place(
    path: Path, num_frames: int, joints: Sequence[tuple[int, np.ndarray, np.ndarray]]
) -> tuple[Float[np.ndarray, "F N 3"], Float[np.ndarray, "F N 3 3"]]:
    """Forward kinematics: positions and rotations of the joints, refused if they fill the memory.

    A joint is its parent (an earlier joint, or -1 for the world), its offset (F, 3) or (3,) from it
    and its rotation (F, 3, 3) or (3, 3), both in the axes that move with the parent.
    """
    if num_frames * len(joints) > _MOST_POSITIONS:
        raise ValueError(
            f"{path}: {num_frames} frames of {len(joints)} joints are more than "
            f"{_MOST_POSITIONS} positions; split the file"
        )
    positions = np.zeros((num_frames, len(joints) + 1, 3))  # the last one is the world
    rotations = np.broadcast_to(np.eye(3), (num_frames, len(joints) + 1, 3, 3)).copy()
    for index, (parent, offset, rotation) in enumerate(joints):
        moved = (rotations[:, parent] @ offset[..., None])[..., 0]
        positions[:, index] = positions[:, parent] + moved
        rotations[:, index] = rotations[:, parent] @ rotation
    return positions[:, :-1], rotations[:, :-1]
