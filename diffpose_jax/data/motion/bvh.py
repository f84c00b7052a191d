"""Reader of BVH (Biovision hierarchy) motion files.

The format: a `HIERARCHY` of joints, each with its `OFFSET` from the parent and its `CHANNELS`,
and a `MOTION` part with one line of numbers a frame. Rotations are degrees; those of a joint
multiply in the order of its channels, the last acting first
(research.cs.wisc.edu/graphics/Courses/cs-838-1999/Jeff/BVH). Position channels take the place of
the joint's OFFSET and are not added to it: so do the files of today (Bandai-Namco's repeat the
offsets in the position channels of every joint) and their readers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from diffpose_jax.data.motion.recording import (
    Recording,
    check_size,
    error_at,
    parse_floats,
    read_lines,
)

_ROTATIONS = [f"{axis}ROTATION" for axis in "XYZ"]
_POSITIONS = [f"{axis}POSITION" for axis in "XYZ"]


@dataclasses.dataclass
class _Joint:
    """A joint or an End Site (which has no channels); `parent` is an index, -1 for the root."""

    name: str
    parent: int
    is_end: bool
    offset: np.ndarray | None = None
    channels: list[str] = dataclasses.field(default_factory=list)


def read_bvh(path: str | Path) -> Recording:
    """Reads a BVH file and places its joints.

    Args:
      path: the file; one skeleton, each joint with 3 rotation channels or 3 rotation and 3
        position channels in any order.

    Returns:
      The joints in the order of the file, End Sites among them as the name of their joint and
      "End", with the axes of that joint. `unit_mm` is None: the format has no unit.

    Raises:
      ValueError: the file is no BVH, is cut off or contradicts itself; names the line.
    """
    path = Path(path)
    lines = read_lines(path)
    joints, motion_line = _read_hierarchy(path, lines)
    num_channels = sum(len(joint.channels) for joint in joints)
    frame_time, numbers = _read_motion(path, lines, motion_line, num_channels)
    check_size(path, len(numbers), len(joints))
    positions, rotations = _place(joints, numbers)
    names = tuple(joint.name for joint in joints)
    return Recording(names, positions, rotations, 1 / frame_time, None)


def _tokens(path: Path, lines: list[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        for token in line.replace("{", " { ").replace("}", " } ").split():
            yield number, token
    raise error_at(path, len(lines), "the file ends within the HIERARCHY; it is cut off")


def _read_hierarchy(path: Path, lines: list[str]) -> tuple[list[_Joint], int]:
    """The joints, parents first, and the number of the line that says MOTION."""
    tokens = _tokens(path, lines)
    number, token = next(tokens)
    if token.upper() != "HIERARCHY":
        raise error_at(path, number, f"a BVH file starts with HIERARCHY, not with {token[:40]!r}")
    joints: list[_Joint] = []
    names: set[str] = set()
    open_joints: list[int] = []
    while True:
        number, token = next(tokens)
        keyword = token.upper()
        inside = joints[open_joints[-1]] if open_joints else None
        if keyword == "MOTION" and joints and inside is None:
            return joints, number
        if (keyword == "ROOT" and not joints) or (keyword in ("JOINT", "END") and inside):
            words = itertools.takewhile(lambda word: word != "{", (word for _, word in tokens))
            name = " ".join(words)
            if keyword == "END" and inside is not None:
                name = f"{inside.name}End"
            if not name or name in names:
                raise error_at(path, number, f"the joint name {name[:60]!r} is empty or taken")
            names.add(name)
            joints.append(_Joint(name, open_joints[-1] if inside else -1, keyword == "END"))
            open_joints.append(len(joints) - 1)
        elif keyword == "OFFSET" and inside:
            inside.offset = parse_floats(path, number, [next(tokens)[1] for _ in range(3)], 3)
        elif keyword == "CHANNELS" and inside and not inside.is_end:
            count = next(tokens)[1]
            inside.channels = [next(tokens)[1].upper() for _ in range(6 if count == "6" else 3)]
            if set(inside.channels) not in ({*_ROTATIONS}, {*_ROTATIONS, *_POSITIONS}):
                raise error_at(
                    path,
                    number,
                    f"the {count[:40]} channels of joint {inside.name[:60]} must be Xrotation, "
                    "Yrotation and Zrotation, with or without the three positions, in any order",
                )
        elif keyword == "}" and inside:
            if inside.offset is None or not (inside.channels or inside.is_end):
                reason = f"joint {inside.name[:60]} ends here without OFFSET or CHANNELS"
                raise error_at(path, number, reason)
            open_joints.pop()
        else:
            raise error_at(path, number, f"{token[:40]!r} is out of place in the HIERARCHY")


def _read_motion(
    path: Path, lines: list[str], motion_line: int, num_channels: int
) -> tuple[float, Float[np.ndarray, "F {num_channels}"]]:
    """The frame time in seconds and the numbers of the frames."""
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [(number, line) for number, line in rows if number > motion_line]
    header: list[float] = []
    for key in ("Frames", "Frame Time"):
        number, line = rows[len(header)] if len(header) < len(rows) else (len(lines), "")
        name, _, value = line.partition(":")
        if " ".join(name.split()).upper() != key.upper():
            raise error_at(path, number, f"here must stand '{key}:' and a number")
        header.append(float(parse_floats(path, number, value.split(), 1)[0]))
        if header[-1] <= 0:
            raise error_at(path, number, f"{key} must be positive")
    num_frames, frame_time = header
    rows = rows[2:]
    if len(rows) != num_frames:
        raise error_at(
            path,
            len(lines),
            f"{len(rows)} frames instead of the {num_frames:.0f} that 'Frames:' tells; "
            "the file is cut off or damaged",
        )
    frames = [parse_floats(path, number, line.split(), num_channels) for number, line in rows]
    return frame_time, np.stack(frames)


def _place(
    joints: list[_Joint], numbers: Float[np.ndarray, "F C"]
) -> tuple[Float[np.ndarray, "F N 3"], Float[np.ndarray, "F N 3 3"]]:
    """Forward kinematics: positions and rotations of the joints."""
    positions = np.empty((len(numbers), len(joints), 3))
    rotations = np.empty((len(numbers), len(joints), 3, 3))
    column = 0
    for index, joint in enumerate(joints):
        values = dict(zip(joint.channels, numbers.T[column:], strict=False))
        column += len(joint.channels)
        offset, rotation = np.broadcast_to(np.asarray(joint.offset), (len(numbers), 3)), np.eye(3)
        if not joint.is_end:
            axes = [channel for channel in joint.channels if channel in _ROTATIONS]
            order = "".join(axis[0] for axis in axes)  # upper case: the last acts first
            angles = np.stack([values[axis] for axis in axes], axis=-1)
            rotation = Rotation.from_euler(order, angles, degrees=True).as_matrix()
        if _POSITIONS[0] in values:
            offset = np.stack([values[axis] for axis in _POSITIONS], axis=-1)
        if joint.parent < 0:
            positions[:, index], rotations[:, index] = offset, rotation
        else:
            parent = rotations[:, joint.parent]
            positions[:, index] = positions[:, joint.parent] + (parent @ offset[..., None])[..., 0]
            rotations[:, index] = parent @ rotation
    return positions, rotations
