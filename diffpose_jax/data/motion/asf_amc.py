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
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from diffpose_jax.data.motion.recording import Line, Recording, listed, place, read_lines

ROOT = "root"
_ROTATIONS = ("RX", "RY", "RZ")
_TRANSLATIONS = ("TX", "TY", "TZ")


@dataclasses.dataclass(frozen=True)
class Bone:
    """A bone of an ASF skeleton, or its root; the position of its name is the bone's end."""

    name: str
    parent: int  # index of the parent among the skeleton's bones; -1 for the root
    vector: Float[np.ndarray, " 3"]  # start to end in the rest pose; of the root: where it is
    axes: Float[np.ndarray, "3 3"]  # C
    freedoms: tuple[str, ...]  # RX, RY, RZ and, of the root, TX, TY, TZ, in the order of the file


def read_asf(path: str | Path) -> tuple[list[Bone], float, bool]:
    """Reads a skeleton: bones, parents first, the unit in millimetres, and if angles are degrees.

    `length` among the `:units` is taken as the CMU database uses it: lengths divided by it are
    inches (mocap.cs.cmu.edu, FAQ: 0.45, so that the unit is 56.4 mm).
    """
    path = Path(path)
    sections: dict[str, list[Line]] = {}
    section: list[Line] = []
    for line in read_lines(path):
        word = line.words[0]
        if word.startswith(":"):
            section = sections.setdefault(word[1:].lower(), [])
        elif not word.startswith("#"):
            section.append(line)
    for needed in ("units", "root", "bonedata", "hierarchy"):
        if not sections.get(needed):
            raise ValueError(f"{path}: no section :{needed}; it is no ASF file or is cut off")
    units = _fields(sections["units"], "length 1", "angle deg")
    length = float(units["length"].floats(1)[0])
    if length < 1e-6:
        raise units["length"].error(f"length is {length}; it must be positive")
    in_degrees = units["angle"].words[1:2] != ["rad"]
    bones, block = [_root(sections["root"], in_degrees)], []
    for line in sections["bonedata"]:
        block.append(line)
        if line.words[0] == "end":
            bones.append(_bone(block, in_degrees))
            block = []
    return _connect(bones, sections["hierarchy"]), 25.4 / length, in_degrees


def find_asf(path: str | Path) -> Path:
    """Finds the skeleton of a motion, an .amc file, in the same folder.

    It is the .asf file with the name of the motion or with that name up to the last underscore
    (CMU: `02.asf` for `02_01.amc`), or else the only one in the folder, unless both names have
    CMU's form and tell different subjects.
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
    """Reads a motion of the skeleton that `find_asf` finds; a frame has all bones that can move.

    The joints are "root" and the bones; a position is where the bone ends, and the axes are the
    world's as the bone moves them. `fps` is None unless the file has :SAMPLES-PER-SECOND.

    Raises:
      ValueError: a file is no such file, is cut off or contradicts itself; names the line.
    """
    path = Path(path)
    lines = [line for line in read_lines(path) if not line.text.lstrip().startswith("#")]
    bones, unit_mm, in_degrees = read_asf(find_asf(path))
    starts = [index for index, line in enumerate(lines) if line.text.strip().isdecimal()]
    if not starts:
        raise ValueError(f"{path}: no frames; it is no AMC file or is cut off")
    fps = None
    for line in lines[: starts[0]]:
        keyword = line.words[0].upper()
        if keyword == ":SAMPLES-PER-SECOND":
            fps = float(line.floats(1)[0])
        elif keyword in (":DEGREES", ":RADIANS"):
            in_degrees = keyword == ":DEGREES"
        elif not keyword.startswith(":"):
            raise line.error(f"{keyword[:40]!r} before the first frame's number")
    sizes = {bone.name: len(bone.freedoms) for bone in bones if bone.freedoms}
    frames = [
        _frame(lines[start:end], sizes) for start, end in itertools.pairwise([*starts, len(lines)])
    ]
    ends = np.cumsum([len(bone.freedoms) for bone in bones])
    columns = np.split(np.stack(frames), ends[:-1], axis=1)
    moved = [_moved(*each, in_degrees) for each in zip(bones, columns, strict=True)]
    names = tuple(bone.name for bone in bones)
    return Recording(names, *place(path, len(frames), moved), fps, unit_mm)


def _frame(lines: list[Line], sizes: dict[str, int]) -> Float[np.ndarray, " C"]:
    """Numbers of a frame, in the order of the skeleton's bones."""
    numbers = {}
    for line in lines[1:]:
        name, *words = line.words
        if name not in sizes:
            raise line.error(f"{name[:40]!r} is neither a bone that moves nor a frame's number")
        numbers[name] = line.floats(sizes[name], words)
    if missing := [name for name in sizes if name not in numbers]:
        reason = f"the frame that starts here lacks {listed(missing)}"
        raise lines[0].error(f"{reason}; the file is cut off or has another skeleton")
    return np.concatenate([numbers[name] for name in sizes])


def _fields(lines: list[Line], *defaults: str) -> dict[str, Line]:
    """Lines by their first word."""
    presets = [lines[0]._replace(text=text) for text in defaults]
    return {line.words[0].lower(): line for line in [*presets, *lines]}


def _root(section: list[Line], in_degrees: bool) -> Bone:
    fields = _fields(section, "order", "position 0 0 0", "orientation 0 0 0", "axis XYZ")
    freedoms = tuple(word.upper() for word in fields["order"].words[1:])
    if sorted(freedoms) != sorted(_ROTATIONS + _TRANSLATIONS):
        raise fields["order"].error("the root's order must hold TX TY TZ RX RY RZ, in any order")
    words = [*fields["orientation"].words[1:], *fields["axis"].words[1:]]
    axes = _axes(fields["orientation"], words, in_degrees)
    return Bone(ROOT, -1, fields["position"].floats(3), axes, freedoms)


def _bone(block: list[Line], in_degrees: bool) -> Bone:
    fields = _fields(block, "dof")
    for needed in ("name", "direction", "length", "axis"):
        if needed not in fields or len(fields[needed].words) < 2:
            raise block[0].error(f"the bone that begins here has no {needed}")
    name = fields["name"].words[1]
    vector = fields["length"].floats(1) * fields["direction"].floats(3)
    freedoms = tuple(word.upper() for word in fields["dof"].words[1:])
    if not set(freedoms) <= set(_ROTATIONS) or len(set(freedoms)) < len(freedoms):
        raise fields["dof"].error(f"dof of {name[:60]} may hold rx, ry and rz once each")
    axes = _axes(fields["axis"], fields["axis"].words[1:], in_degrees)
    return Bone(name, -1, vector, axes, freedoms)


def _axes(line: Line, words: list[str], in_degrees: bool) -> Float[np.ndarray, "3 3"]:
    """The matrix C of three angles (about X, Y and Z) and the order in which they act."""
    angles, order = line.floats(3, words[:3]), "".join(words[3:]).upper()
    if sorted(order) != ["X", "Y", "Z"]:
        raise line.error(f"the order of the axes is {order[:40]!r}; give such as XYZ")
    return _turn(order, angles[["XYZ".index(axis) for axis in order]], in_degrees)


def _turn(
    order: str, angles: Float[np.ndarray, "*F N"], in_degrees: bool
) -> Float[np.ndarray, "*F 3 3"]:
    """Rotations about fixed axes (lower case for scipy), the first of `order` acting first."""
    return Rotation.from_euler(order.lower(), angles, in_degrees).as_matrix()


def _connect(bones: list[Bone], section: list[Line]) -> list[Bone]:
    """Gives the bones their parents, and orders them parents first."""
    by_name = {bone.name: bone for bone in bones}
    if len(by_name) < len(bones):
        raise section[0].error(f"two of these bones have one name, or one is named {ROOT}")
    parents: dict[str, str] = {}
    for line in section:
        parent, *names = line.words
        if parent not in ("begin", "end"):
            for name in (parent, *names):
                if name not in by_name:
                    raise line.error(f"there is no bone {name[:40]!r}")
            parents |= dict.fromkeys(names, parent)
    lost = set(by_name) - set(parents) - {ROOT}
    if lost:
        raise section[-1].error(f"bones that hang on nothing: {listed(sorted(lost))}")
    hierarchy = {name: [parent] for name, parent in parents.items()}
    try:
        order = list(graphlib.TopologicalSorter(hierarchy).static_order())
    except graphlib.CycleError as error:
        raise section[0].error(f"a bone hangs on itself: {listed(error.args[1])}") from error
    places = {name: place for place, name in enumerate(order)}
    parent_of = {name: places[parent] for name, parent in parents.items()}
    return [dataclasses.replace(by_name[name], parent=parent_of.get(name, -1)) for name in order]


def _moved(
    bone: Bone, values: Float[np.ndarray, "F C"], in_degrees: bool
) -> tuple[int, np.ndarray, np.ndarray]:
    """What `place` needs of a bone, from the numbers of its degrees of freedom."""
    turning = [k for k, freedom in enumerate(bone.freedoms) if freedom in _ROTATIONS]
    order = "".join(bone.freedoms[k][1] for k in turning)
    motion = _turn(order, values[:, turning], in_degrees) if turning else np.eye(3)
    rotation = bone.axes @ motion @ bone.axes.T
    if bone.parent < 0:
        moving = [bone.freedoms.index(freedom) for freedom in _TRANSLATIONS]
        return bone.parent, bone.vector + values[:, moving], rotation
    return bone.parent, rotation @ bone.vector, rotation
