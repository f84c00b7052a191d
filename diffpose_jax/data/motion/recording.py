"""What a motion file of any format becomes, and what the readers of text share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

_LARGEST = 1e9
_MOST_POSITIONS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Recording:
    """The joints of one skeleton over time, as a file gives them.

    Attributes:
      joints: N names.
      positions: world axes and unit of the file.
      rotations: the columns are the axes that move with the joint.
      fps: frames a second; None if the file does not tell.
      unit_mm: length of the file's unit; None if the file does not tell.
    """

    joints: tuple[str, ...]
    positions: Float[np.ndarray, "F N 3"]
    rotations: Float[np.ndarray, "F N 3 3"]
    fps: float | None
    unit_mm: float | None


def read_lines(path: Path) -> list[str]:
    """Lines of a text file; bytes that are no UTF-8 (old comments) become replacement characters.

    Raises:
      ValueError: it is not a text file.
    """
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} is not a text file")
    return data.decode("utf-8-sig", errors="replace").splitlines()


def error_at(path: Path, line: int, reason: str) -> ValueError:
    """Makes the error for a line, counted from one, of a file."""
    return ValueError(f"{path}, line {line}: {reason}")


def parse_floats(
    path: Path, line: int, words: Sequence[str], count: int
) -> Float[np.ndarray, " {count}"]:
    """Reads the numbers of a line.

    Raises:
      ValueError: there are more or fewer, or one is no finite number of a sensible size.
    """
    if len(words) != count:
        raise error_at(path, line, f"{len(words)} numbers where there must be {count}")
    try:
        numbers = np.array(list(map(float, words)))
    except ValueError as error:
        raise error_at(path, line, str(error)[:80]) from error
    if not np.abs(numbers).sum() < _LARGEST:  # nan is refused, too
        raise error_at(path, line, "a number is not finite or is far too large")
    return numbers


def listed(names: Iterable[str]) -> str:
    """Joins the names of a file for a message, which they must not flood."""
    names = [name[:60] for name in names]
    return ", ".join(names[:100]) + (", .." if len(names) > 100 else "")


def check_size(path: Path, num_frames: int, num_joints: int) -> None:
    """Raises ValueError if a recording has more positions than fit into memory."""
    if num_frames * num_joints > _MOST_POSITIONS:
        raise ValueError(
            f"{path}: {num_frames} frames of {num_joints} joints are too many to place at once "
            f"(at most {_MOST_POSITIONS} positions); split the file"
        )
