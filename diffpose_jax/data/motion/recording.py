"""What a motion file of any format becomes: the moving joints of a skeleton, and shared helpers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_LARGEST = 1e9
_MOST_POSITIONS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Recording:
    """The joints of one skeleton over time, as a file gives them.

    Attributes:
        joints: N names.
        positions: (F, N, 3) float64, world axes and unit of the file.
        rotations: (F, N, 3, 3) float64; the columns are the axes that move with the joint.
        fps: frames a second; None if the format does not tell.
        unit_mm: length of the file's unit; None if the format does not tell.
    """

    joints: tuple[str, ...]
    positions: np.ndarray
    rotations: np.ndarray
    fps: float | None
    unit_mm: float | None


def read_lines(path: Path) -> list[str]:
    """Reads a text file.

    Args:
        path: the file.

    Returns:
        Its lines; bytes that are no UTF-8 (old comments) become replacement characters.

    Raises:
        ValueError: it is not a text file.
        FileNotFoundError: there is no such file.
    """
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} is not a text file")
    return data.decode("utf-8-sig", errors="replace").splitlines()


def error_at(path: Path, line: int, reason: str) -> ValueError:
    """Makes the error for a line, counted from one, of a file."""
    return ValueError(f"{path}, line {line}: {reason}")


def parse_floats(path: Path, line: int, words: Sequence[str], count: int) -> list[float]:
    """Reads the numbers of a line.

    Args:
        path: the file, for messages.
        line: number of the line.
        words: the numbers.
        count: how many there must be.

    Returns:
        The numbers.

    Raises:
        ValueError: there are more or fewer words, or one is no finite number of a sensible size.
    """
    if len(words) != count:
        raise error_at(path, line, f"{len(words)} numbers where there must be {count}")
    try:
        numbers = list(map(float, words))
    except ValueError as error:
        raise error_at(path, line, str(error)[:80]) from error
    if not sum(map(abs, numbers)) < _LARGEST:  # nan is refused, too
        raise error_at(path, line, "a number is not finite or is far too large")
    return numbers


def listed(names: Iterable[str]) -> str:
    """Joins the names of a file for a message, which they must not flood."""
    names = [name[:60] for name in names]
    return ", ".join(names[:100]) + (", .." if len(names) > 100 else "")


def check_size(path: Path, num_frames: int, num_joints: int) -> None:
    """Refuses a recording that would not fit into memory.

    Raises:
        ValueError: the file has more joints times frames than any honest recording.
    """
    if num_frames * num_joints > _MOST_POSITIONS:
        raise ValueError(
            f"{path}: {num_frames} frames of {num_joints} joints are too many to place at once "
            f"(at most {_MOST_POSITIONS} positions); split the file"
        )


def about_axis(axis: str, angle: np.ndarray) -> np.ndarray:
    """Rotation about a coordinate axis, right-handed, for column vectors.

    Args:
        axis: "X", "Y" or "Z".
        angle: (...,), radians.

    Returns:
        (..., 3, 3) float64.
    """
    fixed = "XYZ".index(axis)
    first, second = (fixed + 1) % 3, (fixed + 2) % 3
    rotation = np.zeros((*np.shape(angle), 3, 3))
    rotation[..., fixed, fixed] = 1
    rotation[..., first, first] = rotation[..., second, second] = np.cos(angle)
    rotation[..., second, first] = np.sin(angle)
    rotation[..., first, second] = -np.sin(angle)
    return rotation


def turn_in_order(axes: Sequence[str], angles: np.ndarray) -> np.ndarray:
    """Product of rotations about coordinate axes, the last of them applied first.

    Args:
        axes: K letters "X", "Y", "Z"; none gives the identity.
        angles: (..., K), radians.

    Returns:
        (..., 3, 3) float64: the rotation about `axes[0]` times that about `axes[1]` and so on.
    """
    rotation = np.broadcast_to(np.eye(3), (*np.shape(angles)[:-1], 3, 3))
    for column, axis in enumerate(axes):
        rotation = rotation @ about_axis(axis, angles[..., column])
    return rotation
