"""Reader of Acclaim motion: a skeleton (.asf) and the motion of that skeleton (.amc).

In the skeleton every bone has a `direction` and a `length` in world axes of the rest pose, and
starts where its parent ends. Its own axes are turned from the world's by `axis` (matrix C); the
motion turns it by its degrees of freedom about these axes (matrix M), hence C M C^-1 about the
world axes that move with the parent (research.cs.wisc.edu/graphics/Courses/cs-838-1999/Jeff/
ASF-AMC.html). The rotations of a triple act in the order written, about fixed axes: X first for
"XYZ" (graphics.cs.cmu.edu/nsp/course/cs229/info/ACCLAIMdef.html).
"""

from __future__ import annotations

import array
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffpose_jax.data.motion.recording import (
    Recording,
    check_size,
    error_at,
    listed,
    parse_floats,
    read_lines,
    turn_in_order,
)

ROOT = "root"
_INCH_MM = 25.4
_ROTATIONS = {"RX": "X", "RY": "Y", "RZ": "Z"}
_TRANSLATIONS = ("TX", "TY", "TZ")


@dataclasses.dataclass(frozen=True)
class Bone:
    """A bone of an ASF skeleton, or its root (a bone of no length).

    Attributes:
        name: as in the file; the position of this name is the bone's end.
        parent: index of the parent among the skeleton's bones; -1 for the root.
        vector: (3,) from start to end in the rest pose, world axes, unit of the file. For the
            root: its preset position.
        axes: (3, 3), the matrix C.
        degrees_of_freedom: what a line of the motion holds: "RX", "RY", "RZ" and, of the root,
            also "TX", "TY", "TZ", each at most once, in the order of the file.
    """

    name: str
    parent: int
    vector: np.ndarray
    axes: np.ndarray
    degrees_of_freedom: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AcclaimSkeleton:
    """An ASF file.

    Attributes:
        bones: the root and the bones, parents first.
        unit_mm: length of the file's unit.
        in_degrees: whether its angles are degrees, not radians.
    """

    bones: tuple[Bone, ...]
    unit_mm: float
    in_degrees: bool


def read_asf(path: str | Path) -> AcclaimSkeleton:
    """Reads a skeleton.

    `length` among the `:units` is taken as the CMU database uses it: lengths divided by it are
    inches (mocap.cs.cmu.edu, FAQ: 0.45, so that the unit is 56.4 mm).

    Args:
        path: the .asf file.

    Returns:
        The skeleton.

    Raises:
        ValueError: the file is no ASF, is cut off or contradicts itself; names the line.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    sections = _sections(path, read_lines(path))
    units = {words[0]: (number, words[1:]) for number, words in sections.get("units", [])}
    number, words = units.get("length", (1, ["1"]))
    (length,) = parse_floats(path, number, words, 1)
    if length < 1e-6:
        raise error_at(path, number, f"length is {length}; it must be positive")
    in_degrees = units.get("angle", (1, ["deg"]))[1][:1] != ["rad"]
    for needed in ("root", "bonedata", "hierarchy"):
        if needed not in sections:
            raise ValueError(f"{path}: no section :{needed}; it is no ASF file or is cut off")
    bones = [_root(path, sections["root"], in_degrees)]
    for block in _blocks(path, sections["bonedata"]):
        bones.append(_bone(path, block, in_degrees))
    return AcclaimSkeleton(
        _connect(path, bones, sections["hierarchy"]), _INCH_MM / length, in_degrees
    )


def find_asf(path: str | Path) -> Path:
    """Finds the skeleton of a motion in the same folder.

    It is the .asf file with the name of the motion or with that name up to the last underscore
    (CMU: `02.asf` for `02_01.amc`), or else the only one in the folder, unless both names have
    CMU's form and tell different subjects.

    Args:
        path: the .amc file.

    Returns:
        The .asf file.

    Raises:
        ValueError: there is none, or none can be chosen.
    """
    path = Path(path)
    found = {
        file.stem: file for file in sorted(path.parent.iterdir()) if file.suffix.lower() == ".asf"
    }
    subject = path.stem.rpartition("_")[0]
    for stem in (path.stem, subject):
        if stem in found:
            return found[stem]
    if len(found) == 1:
        (stem,) = found
        if not (re.fullmatch(r"\d+", subject) and re.fullmatch(r"\d+", stem)):
            return found[stem]
    raise ValueError(
        f"{path}: no skeleton for this motion; put {subject or path.stem}.asf beside it "
        f"(the folder has: {listed(file.name for file in found.values()) or 'no .asf file'})"
    )


def read_amc(path: str | Path, skeleton: AcclaimSkeleton | None = None) -> Recording:
    """Reads a motion and places the bones of its skeleton.

    Args:
        path: the .amc file; every frame must have all bones that can move.
        skeleton: whose motion it is; by default that of the file that `find_asf` finds.

    Returns:
        "root" and the bones; a position is where the bone ends, and the axes are the world's as
        the bone moves them. `fps` is None unless the file has :SAMPLES-PER-SECOND.

    Raises:
        ValueError: a file is no such file, is cut off or contradicts itself; names the line.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    lines = read_lines(path)
    if skeleton is None:
        skeleton = read_asf(find_asf(path))
    slots, num_columns = {}, 0
    for bone in skeleton.bones:
        if bone.degrees_of_freedom:
            slots[bone.name] = slice(num_columns, num_columns + len(bone.degrees_of_freedom))
            num_columns += len(bone.degrees_of_freedom)

    fps, in_degrees = None, skeleton.in_degrees
    numbers = array.array("d")
    starts: list[int] = []
    frame: list[float] = []
    missing: set[str] = set()
    number = 0

    def close_frame() -> None:
        if missing:
            raise error_at(
                path,
                number,
                f"the frame that starts in line {starts[-1]} ends without "
                f"{listed(sorted(missing))}; the file is cut off or has another skeleton",
            )
        numbers.extend(frame)

    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0]
        if name in slots and starts:
            slot = slots[name]
            if name not in missing:
                raise error_at(path, number, f"{name[:60]} twice in one frame")
            missing.remove(name)
            frame[slot] = parse_floats(path, number, words[1:], slot.stop - slot.start)
        elif len(words) == 1 and name.isdecimal():
            if starts:
                close_frame()
            starts.append(number)
            frame, missing = [math.nan] * num_columns, set(slots)
        elif name.startswith(":") and not starts:
            keyword = name[1:].upper()
            if keyword in ("DEGREES", "RADIANS"):
                in_degrees = keyword == "DEGREES"
            elif keyword == "SAMPLES-PER-SECOND":
                (fps,) = parse_floats(path, number, words[1:], 1)
        else:
            raise error_at(
                path, number, f"{name[:40]!r} is neither a bone that moves nor a frame's number"
            )
    if not starts:
        raise ValueError(f"{path}: no frames; it is no AMC file or is cut off")
    close_frame()
    check_size(path, len(starts), len(skeleton.bones))
    table = np.frombuffer(numbers).reshape(len(starts), num_columns)
    positions, rotations = _place(skeleton.bones, table, in_degrees)
    names = tuple(bone.name for bone in skeleton.bones)
    return Recording(names, positions, rotations, fps, skeleton.unit_mm)


def _sections(path: Path, lines: list[str]) -> dict[str, list[tuple[int, list[str]]]]:
    """Splits an ASF file at its keywords: name -> (line number, words) of all lines below it."""
    sections: dict[str, list[tuple[int, list[str]]]] = {}
    current: list[tuple[int, list[str]]] = []
    for number, line in enumerate(lines, 1):
        words = re.sub(r"[(),]", " ", line.partition("#")[0]).split()
        if words and words[0].startswith(":"):
            name = words[0][1:].lower()
            if name in sections:
                raise error_at(path, number, f":{name[:40]} a second time")
            current = sections[name] = []
        elif words:
            current.append((number, words))
    return sections


def _blocks(
    path: Path, section: list[tuple[int, list[str]]]
) -> list[dict[str, tuple[int, list[str]]]]:
    """Splits a section at its `begin` and `end`: one dict of first word -> rest a block."""
    blocks: list[dict[str, tuple[int, list[str]]]] = []
    is_open = False
    for number, words in section:
        if words[0] in ("begin", "end"):
            if is_open == (words[0] == "begin"):
                raise error_at(path, number, f"{words[0]} out of place")
            is_open = not is_open
            if is_open:
                blocks.append({"begin": (number, [])})
        elif is_open:
            # Further lines of `limits` start with a number and collide with nothing.
            blocks[-1].setdefault(words[0], (number, words[1:]))
        else:
            raise error_at(path, number, f"{words[0][:40]!r} outside of begin and end")
    if is_open:
        raise error_at(path, section[-1][0], "the block never ends; the file is cut off")
    return blocks


def _root(path: Path, section: list[tuple[int, list[str]]], in_degrees: bool) -> Bone:
    fields = {words[0].lower(): (number, words[1:]) for number, words in section}
    number, order = fields.get("order", (section[0][0] if section else 1, []))
    order = [token.upper() for token in order]
    if sorted(order) != sorted((*_ROTATIONS, *_TRANSLATIONS)):
        raise error_at(path, number, "the root's order must hold TX TY TZ RX RY RZ, in any order")
    number, words = fields.get("position", (1, ["0"] * 3))
    position = np.array(parse_floats(path, number, words, 3))
    axis = fields.get("axis", (1, ["XYZ"]))[1]
    number, words = fields.get("orientation", (1, ["0"] * 3))
    axes = _axes(path, number, [*words, *axis], in_degrees)
    return Bone(ROOT, -1, position, axes, tuple(order))


def _bone(path: Path, block: dict[str, tuple[int, list[str]]], in_degrees: bool) -> Bone:
    start = block["begin"][0]
    for needed in ("name", "direction", "length", "axis"):
        if not block.get(needed, (0, []))[1]:
            raise error_at(path, start, f"the bone that begins here has no {needed}")
    name = block["name"][1][0]
    direction = parse_floats(path, *block["direction"], 3)
    (length,) = parse_floats(path, *block["length"], 1)
    number, words = block.get("dof", (start, []))
    freedoms = tuple(token.upper() for token in words)
    if not set(freedoms) <= set(_ROTATIONS) or len(set(freedoms)) < len(freedoms):
        raise error_at(
            path,
            number,
            f"dof of {name[:60]} may hold rx, ry and rz once each, not: {listed(freedoms)}",
        )
    axes = _axes(path, *block["axis"], in_degrees)
    return Bone(name, -1, length * np.array(direction), axes, freedoms)


def _axes(path: Path, number: int, words: list[str], in_degrees: bool) -> np.ndarray:
    """The matrix C of three angles (about X, Y and Z) and the order in which they act."""
    angles = dict(zip("XYZ", parse_floats(path, number, words[:3], 3), strict=True))
    order = "".join(words[3:]).upper()
    if sorted(order) != ["X", "Y", "Z"]:
        raise error_at(path, number, f"the order of the axes is {order[:40]!r}; give such as XYZ")
    return _turn(order, np.array([angles[axis] for axis in order]), in_degrees)


def _turn(order: Sequence[str], angles: np.ndarray, in_degrees: bool) -> np.ndarray:
    """Rotations (..., K) about fixed axes, the first of `order` acting first -> (..., 3, 3)."""
    angles = np.radians(angles) if in_degrees else angles
    return turn_in_order(order[::-1], angles[..., ::-1])


def _connect(
    path: Path, bones: list[Bone], section: list[tuple[int, list[str]]]
) -> tuple[Bone, ...]:
    """Gives the bones their parents, and orders them parents first."""
    by_name = {bone.name: bone for bone in bones}
    if len(by_name) < len(bones):
        raise ValueError(f"{path}: two bones have one name, or one is named {ROOT}")
    children: dict[str, list[str]] = {}
    placed = {ROOT}
    for block in _blocks(path, section):
        del block["begin"]
        for parent, (number, names) in block.items():
            for name in (parent, *names):
                if name not in by_name:
                    raise error_at(path, number, f"there is no bone {name[:40]!r}")
            for name in names:
                if name in placed:
                    raise error_at(path, number, f"{name[:60]} has two parents or is the root")
                placed.add(name)
            children.setdefault(parent, []).extend(names)
    # Every bone but the root has at most one parent, so that the walk ends.
    ordered, names = [by_name[ROOT]], [ROOT]
    for index, parent in enumerate(names):  # grows while it is walked
        for name in children.get(parent, ()):
            names.append(name)
            ordered.append(dataclasses.replace(by_name[name], parent=index))
    if len(ordered) < len(bones):
        lost = sorted(set(by_name) - set(names))
        raise ValueError(f"{path}: bones that hang on nothing: {listed(lost)}")
    return tuple(ordered)


def _place(
    bones: Sequence[Bone], table: np.ndarray, in_degrees: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Forward kinematics: numbers (F, degrees of freedom) -> (F, N, 3) and (F, N, 3, 3)."""
    positions = np.empty((len(table), len(bones), 3))
    rotations = np.empty((len(table), len(bones), 3, 3))
    column = 0
    for index, bone in enumerate(bones):
        columns = {name: column + k for k, name in enumerate(bone.degrees_of_freedom)}
        column += len(columns)
        turns = [name for name in columns if name in _ROTATIONS]
        motion = _turn(
            [_ROTATIONS[name] for name in turns],
            table[:, [columns[name] for name in turns]],
            in_degrees,
        )
        rotation = bone.axes @ motion @ bone.axes.T
        if bone.parent < 0:
            rotations[:, index] = rotation
            positions[:, index] = bone.vector + table[:, [columns[name] for name in _TRANSLATIONS]]
        else:
            rotations[:, index] = rotations[:, bone.parent] @ rotation
            positions[:, index] = positions[:, bone.parent] + rotations[:, index] @ bone.vector
    return positions, rotations
