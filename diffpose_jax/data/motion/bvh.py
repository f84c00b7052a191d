"""Reader of BVH (Biovision hierarchy) motion files.

The format: a `HIERARCHY` of joints, each with its `OFFSET` from the parent and its `CHANNELS`,
and a `MOTION` part with one line of numbers a frame. Rotations are degrees; those of a joint
multiply in the order of its channels, the last acting first
(research.cs.wisc.edu/graphics/Courses/cs-838-1999/Jeff/BVH). Position channels take the place of
the joint's OFFSET and are not added to it: so do the files of today (Bandai-Namco's repeat the
offsets in the position channels of every joint) and their readers.
"""

from __future__ import annotations

import array
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from diffpose_jax.data.motion.recording import (
    Recording,
    check_size,
    error_at,
    parse_floats,
    read_lines,
    turn_in_order,
)

_CHANNEL = re.compile(r"([XYZ])(position|rotation)", re.IGNORECASE)
_KINDS = {3: {"rotation"}, 6: {"position", "rotation"}}


@dataclasses.dataclass
class _Joint:
    """A joint or an End Site (which has no channels); `parent` is an index, -1 for the root."""

    name: str
    parent: int
    is_end: bool
    offset: list[float] | None = None
    channels: list[tuple[str, str]] | None = None  # ("X", "rotation"), in the file's order


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
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    lines = read_lines(path)
    joints, motion_line = _read_hierarchy(path, lines)
    num_channels = sum(len(joint.channels or ()) for joint in joints)
    frame_time, numbers = _read_motion(path, lines, motion_line, num_channels)
    check_size(path, len(numbers), len(joints))
    positions, rotations = _place(joints, numbers)
    names = tuple(joint.name for joint in joints)
    return Recording(names, positions, rotations, 1 / frame_time, None)


def _tokens(lines: list[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        for token in line.replace("{", " { ").replace("}", " } ").split():
            yield number, token


def _read_hierarchy(path: Path, lines: list[str]) -> tuple[list[_Joint], int]:
    """Gives the joints, parents first, and the number of the line that says MOTION."""
    tokens = _tokens(lines)

    def take() -> tuple[int, str]:
        found = next(tokens, None)
        if found is None:
            raise error_at(path, len(lines), "the file ends within the HIERARCHY; it is cut off")
        return found

    def open_block(number: int) -> str:
        words = []
        while (token := take()[1]) != "{":
            words.append(token)
            if token in ("OFFSET", "CHANNELS", "}") or len(words) > 20 or len(token) > 100:
                raise error_at(path, number, "there is no '{' after the name of the joint")
        return " ".join(words)

    joints: list[_Joint] = []
    names: set[str] = set()
    open_joints: list[int] = []
    number, token = next(tokens, (1, "nothing"))
    if token.upper() != "HIERARCHY":
        raise error_at(path, number, f"a BVH file starts with HIERARCHY, not with {token[:40]!r}")
    while True:
        number, token = take()
        keyword = token.upper()
        inside = joints[open_joints[-1]] if open_joints else None
        if keyword == "MOTION" and inside is None:
            break
        if keyword in ("ROOT", "JOINT", "END"):
            if (keyword == "ROOT") != (not joints) or (joints and inside is None):
                raise error_at(path, number, f"{token} out of place: there must be one ROOT first")
            if inside is not None and inside.is_end:
                raise error_at(path, number, f"{token} within an End Site")
            name = open_block(number)
            if inside is not None and keyword == "END":
                name = f"{inside.name}End"
            if not name or name in names:
                raise error_at(path, number, f"the joint name {name!r} is empty or taken")
            names.add(name)
            joints.append(_Joint(name, open_joints[-1] if joints else -1, keyword == "END"))
            open_joints.append(len(joints) - 1)
        elif keyword == "OFFSET" and inside is not None and inside.offset is None:
            inside.offset = parse_floats(path, number, [take()[1] for _ in range(3)], 3)
        elif keyword == "CHANNELS" and inside is not None and inside.channels is None:
            inside.channels = _channels(path, number, inside, take()[1], take)
        elif keyword == "}" and inside is not None:
            _check_joint(path, number, inside)
            open_joints.pop()
        else:
            raise error_at(path, number, f"{token[:40]!r} is out of place in the HIERARCHY")
    if not joints:
        raise error_at(path, number, "the HIERARCHY has no ROOT")
    return joints, number


def _channels(
    path: Path, number: int, joint: _Joint, count: str, take: Callable[[], tuple[int, str]]
) -> list[tuple[str, str]]:
    if joint.is_end or count not in ("3", "6"):
        raise error_at(
            path,
            number,
            f"joint {joint.name} has {count[:40]} channels; it must have 3 (rotations) or 6 "
            "(positions and rotations), an End Site none",
        )
    matches = [_CHANNEL.fullmatch(take()[1]) for _ in range(int(count))]
    channels = [(match[1].upper(), match[2].lower()) for match in matches if match]
    wanted = {(axis, kind) for axis in "XYZ" for kind in _KINDS[int(count)]}
    if set(channels) != wanted:
        raise error_at(
            path,
            number,
            f"the {count} channels of joint {joint.name} must be "
            f"{', '.join(sorted(axis + kind for axis, kind in wanted))} in any order",
        )
    return channels


def _check_joint(path: Path, number: int, joint: _Joint) -> None:
    if joint.is_end:
        joint.channels = []
    if joint.offset is None or joint.channels is None:
        missing = "OFFSET" if joint.offset is None else "CHANNELS"
        raise error_at(path, number, f"joint {joint.name} ends here without {missing}")


def _read_motion(
    path: Path, lines: list[str], motion_line: int, num_channels: int
) -> tuple[float, np.ndarray]:
    """Gives the frame time in seconds and the numbers (F, channels) float64."""
    rows = [
        (number, line)
        for number, line in enumerate(lines[motion_line:], motion_line + 1)
        if line.strip()
    ]
    header: list[float] = []
    for key in ("Frames", "Frame Time"):
        number, line = rows[len(header)] if len(header) < len(rows) else (len(lines), "")
        name, _, value = line.partition(":")
        if " ".join(name.split()).upper() != key.upper():
            raise error_at(path, number, f"here must stand '{key}:' and a number")
        header.extend(parse_floats(path, number, value.split(), 1))
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
    numbers = array.array("d")
    for number, line in rows:
        numbers.extend(parse_floats(path, number, line.split(), num_channels))
    table = np.frombuffer(numbers).reshape(len(rows), num_channels)
    return frame_time, table


def _place(joints: list[_Joint], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward kinematics: (F, channels) -> (F, N, 3) and (F, N, 3, 3)."""
    positions = np.empty((len(numbers), len(joints), 3))
    rotations = np.empty((len(numbers), len(joints), 3, 3))
    column = 0
    for index, joint in enumerate(joints):
        columns = {channel: column + k for k, channel in enumerate(joint.channels or ())}
        column += len(columns)
        turns = {axis: k for (axis, kind), k in columns.items() if kind == "rotation"}
        rotation = turn_in_order(list(turns), np.radians(numbers[:, list(turns.values())]))
        place = np.broadcast_to(np.array(joint.offset), (len(numbers), 3))
        if ("X", "position") in columns:
            place = numbers[:, [columns[axis, "position"] for axis in "XYZ"]]
        if joint.parent < 0:
            positions[:, index], rotations[:, index] = place, rotation
        else:
            parent = rotations[:, joint.parent]
            positions[:, index] = positions[:, joint.parent] + (parent @ place[..., None])[..., 0]
            rotations[:, index] = parent @ rotation
    return positions, rotations
