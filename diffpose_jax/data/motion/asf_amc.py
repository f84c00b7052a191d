"""Reader of Acclaim motion: a skeleton (.asf) and the motion of that skeleton (.amc).

In the skeleton every bone has a `direction` and a `length` in world axes of the rest pose, and
starts where its parent ends. Its own axes are turned from the world's by `axis` (matrix C); the
motion turns it by its degrees of freedom about these axes (matrix M), hence C M C^-1 about the
world axes that move with the parent (research.cs.wisc.edu/graphics/Courses/cs-838-1999/Jeff/
ASF-AMC.html). The rotations of a triple act in the order written, about fixed axes: X first for
"XYZ" (graphics.cs.cmu.edu/nsp/course/cs229/info/ACCLAIMdef.html).
"""

from __future__ import annotations

import dataclasses
import graphlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from diffpose_jax.data.motion.recording import (
    Recording,
    check_size,
    error_at,
    listed,
    parse_floats,
    read_lines,
)

ROOT = "root"
_INCH_MM = 25.4
_ROTATIONS = ("RX", "RY", "RZ")
_TRANSLATIONS = ("TX", "TY", "TZ")

_Line = tuple[int, list[str]]  # its number and its words


@dataclasses.dataclass(frozen=True)
class Bone:
    """A bone of an ASF skeleton, or its root (a bone of no length).

    Attributes:
      name: as in the file; the position of this name is the bone's end.
      parent: index of the parent among the skeleton's bones; -1 for the root.
      vector: from start to end in the rest pose, world axes. For the root: its preset position.
      axes: the matrix C.
      freedoms: what a line of the motion holds: "RX", "RY", "RZ" and, of the root, also "TX",
        "TY", "TZ", each at most once, in the order of the file.
    """

    name: str
    parent: int
    vector: Float[np.ndarray, " 3"]
    axes: Rotation
    freedoms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AcclaimSkeleton:
    """An ASF file: the root and the bones, parents first, and the units of its numbers."""

    bones: tuple[Bone, ...]
    unit_mm: float
    in_degrees: bool


def read_asf(path: str | Path) -> AcclaimSkeleton:
    """Reads a skeleton.

    `length` among the `:units` is taken as the CMU database uses it: lengths divided by it are
    inches (mocap.cs.cmu.edu, FAQ: 0.45, so that the unit is 56.4 mm).

    Raises:
      ValueError: the file is no ASF, is cut off or contradicts itself; names the line.
    """
    path = Path(path)
    sections: dict[str, list[_Line]] = {}
    for number, line in enumerate(read_lines(path), 1):
        words = re.sub(r"[(),]", " ", line.partition("#")[0]).split()
        if words and words[0].startswith(":"):
            section = sections.setdefault(words[0][1:].lower(), [])
        elif words and sections:
            section.append((number, words))
    for needed in ("root", "bonedata", "hierarchy"):
        if not sections.get(needed):
            raise ValueError(f"{path}: no section :{needed}; it is no ASF file or is cut off")
    units = _fields(sections.get("units", []))
    number, words = units.get("length", (1, ["1"]))
    (length,) = parse_floats(path, number, words, 1)
    if length < 1e-6:
        raise error_at(path, number, f"length is {length}; it must be positive")
    in_degrees = units.get("angle", (1, ["deg"]))[1][:1] != ["rad"]

    bones = [_root(path, sections["root"], in_degrees)]
    block: list[_Line] = []
    for number, words in sections["bonedata"]:
        block.append((number, words))
        if words[0] == "end":
            bones.append(_bone(path, block, in_degrees))
            block = []
    bones = _connect(path, bones, sections["hierarchy"])
    return AcclaimSkeleton(tuple(bones), _INCH_MM / float(length), in_degrees)


def find_asf(path: str | Path) -> Path:
    """Finds the skeleton of a motion, an .amc file, in the same folder.

    It is the .asf file with the name of the motion or with that name up to the last underscore
    (CMU: `02.asf` for `02_01.amc`), or else the only one in the folder, unless both names have
    CMU's form and tell different subjects.

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
    if len(found) == 1 and not (subject.isdecimal() and next(iter(found)).isdecimal()):
        return next(iter(found.values()))
    raise ValueError(
        f"{path}: no skeleton for this motion; put {subject or path.stem}.asf beside it "
        f"(the folder has: {listed(file.name for file in found.values()) or 'no .asf file'})"
    )


def read_amc(path: str | Path) -> Recording:
    """Reads a motion and places the bones of its skeleton, the file that `find_asf` finds.

    Args:
      path: the .amc file; every frame must have all bones that can move.

    Returns:
      "root" and the bones; a position is where the bone ends, and the axes are the world's as
      the bone moves them. `fps` is None unless the file has :SAMPLES-PER-SECOND.

    Raises:
      ValueError: a file is no such file, is cut off or contradicts itself; names the line.
    """
    path = Path(path)
    lines = read_lines(path)
    skeleton = read_asf(find_asf(path))
    slots, num_columns = {}, 0
    for bone in skeleton.bones:
        if bone.freedoms:
            slots[bone.name] = slice(num_columns, num_columns + len(bone.freedoms))
            num_columns += len(bone.freedoms)

    fps, in_degrees = None, skeleton.in_degrees
    frames: list[np.ndarray] = []
    starts: list[int] = []
    for number, line in enumerate(lines, 1):
        name, *words = line.split() or ["#"]
        keyword = name.upper()
        if name in slots and frames:
            slot = slots[name]
            frames[-1][slot] = parse_floats(path, number, words, slot.stop - slot.start)
        elif name.isdecimal() and not words:
            starts.append(number)
            frames.append(np.full(num_columns, np.nan))
        elif keyword == ":SAMPLES-PER-SECOND":
            fps = float(parse_floats(path, number, words, 1)[0])
        elif keyword in (":DEGREES", ":RADIANS"):
            in_degrees = keyword == ":DEGREES"
        elif not name.startswith("#") and (frames or not name.startswith(":")):
            raise error_at(
                path, number, f"{name[:40]!r} is neither a bone that moves nor a frame's number"
            )
    if not frames:
        raise ValueError(f"{path}: no frames; it is no AMC file or is cut off")
    check_size(path, len(frames), len(skeleton.bones))
    table = np.stack(frames)
    for start, frame in zip(starts, table, strict=True):
        missing = [name for name, slot in slots.items() if np.isnan(frame[slot]).any()]
        if missing:
            reason = f"the frame that starts here lacks {listed(missing)}"
            raise error_at(path, start, f"{reason}; the file is cut off or has another skeleton")
    positions, rotations = _place(skeleton.bones, table, in_degrees)
    names = tuple(bone.name for bone in skeleton.bones)
    return Recording(names, positions, rotations, fps, skeleton.unit_mm)


def _fields(lines: list[_Line]) -> dict[str, _Line]:
    """First words of lines, the number and the other words of each; the first such line counts."""
    return {words[0].lower(): (number, words[1:]) for number, words in reversed(lines)}


def _root(path: Path, section: list[_Line], in_degrees: bool) -> Bone:
    fields = _fields(section)
    number, order = fields.get("order", (section[0][0], []))
    freedoms = tuple(word.upper() for word in order)
    if sorted(freedoms) != sorted(_ROTATIONS + _TRANSLATIONS):
        raise error_at(path, number, "the root's order must hold TX TY TZ RX RY RZ, in any order")
    position = parse_floats(path, *fields.get("position", (1, ["0"] * 3)), 3)
    number, words = fields.get("orientation", (1, ["0"] * 3))
    order = fields.get("axis", (1, ["XYZ"]))[1]
    return Bone(ROOT, -1, position, _axes(path, number, [*words, *order], in_degrees), freedoms)


def _bone(path: Path, block: list[_Line], in_degrees: bool) -> Bone:
    start, fields = block[0][0], _fields(block)
    for needed in ("name", "direction", "length", "axis"):
        if not fields.get(needed, (0, []))[1]:
            raise error_at(path, start, f"the bone that begins here has no {needed}")
    name = fields["name"][1][0]
    direction = parse_floats(path, *fields["direction"], 3)
    length = parse_floats(path, *fields["length"], 1)
    number, words = fields.get("dof", (start, []))
    freedoms = tuple(word.upper() for word in words)
    if not set(freedoms) <= set(_ROTATIONS) or len(set(freedoms)) < len(freedoms):
        reason = f"dof of {name[:60]} may hold rx, ry and rz once each, not: {listed(freedoms)}"
        raise error_at(path, number, reason)
    return Bone(name, -1, length * direction, _axes(path, *fields["axis"], in_degrees), freedoms)


def _axes(path: Path, number: int, words: list[str], in_degrees: bool) -> Rotation:
    """The matrix C of three angles (about X, Y and Z) and the order in which they act."""
    angles = parse_floats(path, number, words[:3], 3)
    order = "".join(words[3:]).upper()
    if sorted(order) != ["X", "Y", "Z"]:
        raise error_at(path, number, f"the order of the axes is {order[:40]!r}; give such as XYZ")
    return _turn(order, angles[["XYZ".index(axis) for axis in order]], in_degrees)


def _turn(order: str, angles: Float[np.ndarray, "*F N"], in_degrees: bool) -> Rotation:
    """Rotations about fixed axes (lower case for scipy), the first of `order` acting first."""
    return Rotation.from_euler(order.lower(), angles, in_degrees) if order else Rotation.identity()


def _connect(path: Path, bones: list[Bone], section: list[_Line]) -> list[Bone]:
    """Gives the bones their parents, and orders them parents first."""
    by_name = {bone.name: bone for bone in bones}
    if len(by_name) < len(bones):
        raise ValueError(f"{path}: two bones have one name, or one is named {ROOT}")
    parents: dict[str, str] = {}
    for number, words in section:
        if words[0] in ("begin", "end"):
            continue
        for name in words:
            if name not in by_name:
                raise error_at(path, number, f"there is no bone {name[:40]!r}")
        parents |= dict.fromkeys(words[1:], words[0])
    lost = set(by_name) - set(parents) - {ROOT}
    if lost:
        raise ValueError(f"{path}: bones that hang on nothing: {listed(sorted(lost))}")
    hierarchy = {name: [parent] for name, parent in parents.items()}
    try:
        order = list(graphlib.TopologicalSorter(hierarchy).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"{path}: a bone hangs on itself: {listed(error.args[1])}") from error
    index = {name: place for place, name in enumerate(order)}
    return [
        dataclasses.replace(by_name[name], parent=index.get(parents.get(name, ""), -1))
        for name in order
    ]


def _place(
    bones: Sequence[Bone], table: Float[np.ndarray, "F C"], in_degrees: bool
) -> tuple[Float[np.ndarray, "F N 3"], Float[np.ndarray, "F N 3 3"]]:
    """Forward kinematics: positions and rotations of the bones."""
    positions = np.empty((len(table), len(bones), 3))
    rotations = np.empty((len(table), len(bones), 3, 3))
    column = 0
    for index, bone in enumerate(bones):
        values = dict(zip(bone.freedoms, table.T[column:], strict=False))
        column += len(bone.freedoms)
        turns = [freedom for freedom in bone.freedoms if freedom in _ROTATIONS]
        angles = np.stack([values[turn] for turn in turns], axis=-1) if turns else np.zeros(0)
        motion = _turn("".join(turn[1] for turn in turns), angles, in_degrees)
        rotation = (bone.axes * motion * bone.axes.inv()).as_matrix()
        if bone.parent < 0:
            rotations[:, index] = rotation
            moved = np.stack([values[name] for name in _TRANSLATIONS], axis=-1)
            positions[:, index] = bone.vector + moved
        else:
            rotations[:, index] = rotations[:, bone.parent] @ rotation
            positions[:, index] = positions[:, bone.parent] + rotations[:, index] @ bone.vector
    return positions, rotations
