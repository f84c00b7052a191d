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

from diffpose_jax.data.motion.recording import Line, Recording, place, read_lines

_ROTATIONS = [f"{axis}ROTATION" for axis in "XYZ"]
_POSITIONS = [f"{axis}POSITION" for axis in "XYZ"]


@dataclasses.dataclass
class _Joint:
    name: str
    parent: int  # index, -1 for the root
    is_end: bool  # an End Site, which has no channels
    offset: np.ndarray | None = None
    channels: list[str] = dataclasses.field(default_factory=list)


def read_bvh(path: str | Path) -> Recording:
    """Reads a BVH file: one skeleton, each joint with 3 rotation and perhaps 3 position channels.

    The joints are in the order of the file, End Sites among them as the name of their joint and
    "End", with the axes of that joint.

    Raises:
      ValueError: the file is no BVH, is cut off or contradicts itself; names the line.
    """
    path = Path(path)
    lines = read_lines(path)
    joints, motion = _read_hierarchy(lines)
    ends = np.cumsum([len(joint.channels) for joint in joints])
    frame_time, numbers = _read_motion(lines[lines.index(motion) :], int(ends[-1]))
    moved = list(map(_moved, joints, np.split(numbers, ends[:-1], axis=1)))
    names = tuple(joint.name for joint in joints)
    return Recording(names, *place(path, len(numbers), moved), fps=1 / frame_time, unit_mm=None)


def _tokens(lines: list[Line]) -> Iterator[tuple[Line, str]]:
    for line in lines:
        for token in line.text.replace("{", " { ").replace("}", " } ").split():
            yield line, token
    raise lines[-1].error("the file ends within the HIERARCHY; it is cut off")


def _read_hierarchy(lines: list[Line]) -> tuple[list[_Joint], Line]:
    """The joints, parents first, and the line that says MOTION."""
    tokens = _tokens(lines)
    line, token = next(tokens)
    if token.upper() != "HIERARCHY":
        raise line.error(f"a BVH file starts with HIERARCHY, not with {token[:40]!r}")
    joints: list[_Joint] = []
    names: set[str] = set()
    open_joints: list[int] = []
    while True:
        line, token = next(tokens)
        keyword = token.upper()
        inside = joints[open_joints[-1]] if open_joints else None
        if keyword == "MOTION" and joints and inside is None:
            return joints, line
        if (keyword == "ROOT" and not joints) or (keyword in ("JOINT", "END") and inside):
            words = itertools.takewhile(lambda word: word != "{", (word for _, word in tokens))
            name = " ".join(words)
            if keyword == "END" and inside:
                name = f"{inside.name}End"
            if not name or name in names:
                raise line.error(f"the joint name {name[:60]!r} is empty or taken")
            names.add(name)
            joints.append(_Joint(name, open_joints[-1] if inside else -1, keyword == "END"))
            open_joints.append(len(joints) - 1)
        elif keyword == "OFFSET" and inside:
            inside.offset = line.floats(3, [next(tokens)[1] for _ in range(3)])
        elif keyword == "CHANNELS" and inside and not inside.is_end:
            count = next(tokens)[1]
            inside.channels = [next(tokens)[1].upper() for _ in range(6 if count == "6" else 3)]
            wanted = {"3": {*_ROTATIONS}, "6": {*_ROTATIONS, *_POSITIONS}}
            if set(inside.channels) != wanted.get(count):
                raise line.error(
                    f"the {count[:40]} channels of joint {inside.name[:60]} must be Xrotation, "
                    "Yrotation and Zrotation, with or without the three positions, in any order"
                )
        elif keyword == "}" and inside:
            if inside.offset is None or not (inside.channels or inside.is_end):
                raise line.error(f"joint {inside.name[:60]} ends without OFFSET or CHANNELS")
            open_joints.pop()
        else:
            raise line.error(f"{token[:40]!r} is out of place in the HIERARCHY")


def _read_motion(
    lines: list[Line], num_channels: int
) -> tuple[float, Float[np.ndarray, "F {num_channels}"]]:
    """The frame time in seconds and the numbers of the frames, from the lines after MOTION."""
    header: list[float] = []
    for line, key in itertools.zip_longest(lines[1:3], ("Frames", "Frame Time")):
        name, _, value = line.text.partition(":") if line else ("", "", "")
        if " ".join(name.split()).upper() != key.upper():
            raise (line or lines[-1]).error(f"here must stand '{key}:' and a number")
        header.append(float(line.floats(1, value.split())[0]))
        if header[-1] <= 0:
            raise line.error(f"{key} must be positive")
    num_frames, frame_time = header
    rows = lines[3:]
    if len(rows) != num_frames:
        raise lines[-1].error(
            f"{len(rows)} frames instead of the {num_frames:.0f} that 'Frames:' tells; "
            "the file is cut off or damaged"
        )
    return frame_time, np.stack([row.floats(num_channels, row.words) for row in rows])


def _moved(joint: _Joint, values: Float[np.ndarray, "F C"]) -> tuple[int, np.ndarray, np.ndarray]:
    """What `place` needs of a joint, from the numbers of its channels."""
    offset, rotation = np.asarray(joint.offset), np.eye(3)
    turning = [k for k, channel in enumerate(joint.channels) if channel in _ROTATIONS]
    if turning:
        order = "".join(joint.channels[k][0] for k in turning)  # upper case: the last acts first
        rotation = Rotation.from_euler(order, values[:, turning], degrees=True).as_matrix()
    if len(turning) < len(joint.channels):
        offset = values[:, [joint.channels.index(channel) for channel in _POSITIONS]]
    return joint.parent, offset, rotation
