"""Writes small BVH, ASF and AMC files, and a standing person in several ways of naming joints."""

import numpy as np


def bvh_text(tree, rows, frame_time=0.0333333, channels=lambda name: "ZYX", positions=("ROOT",)):
    """Text of a BVH file.

    Args:
        tree: {root: ((x, y, z), {child: ..})}; a joint without children gets an End Site, whose
            offset is the value "End" of the tree's leaf: ((x, y, z), (x, y, z)).
        rows: frames, numbers in the order of the channels.
        frame_time: in the file.
        channels: joint name to its rotation axes in order.
        positions: joints (or "ROOT") with position channels before the rotations.
    """
    lines = ["HIERARCHY"]

    def add(kind, name, offset, children):
        lines.extend([f"{kind} {name}", "{", "\tOFFSET " + " ".join(map(str, offset))])
        axes = [f"{axis}rotation" for axis in channels(name)]
        if kind in positions or name in positions:
            axes = ["Xposition", "Yposition", "Zposition", *axes]
        lines.append(f"\tCHANNELS {len(axes)} {' '.join(axes)}")
        if isinstance(children, dict):
            for child, (child_offset, grandchildren) in children.items():
                add("JOINT", child, child_offset, grandchildren)
        else:
            end = " ".join(map(str, children))
            lines.extend(["End Site", "{", f"OFFSET {end}", "}"])
        lines.append("}")

    ((root, (offset, children)),) = tree.items()
    add("ROOT", root, offset, children)
    lines += ["MOTION", f"Frames: {len(rows)}", f"Frame Time: {frame_time}"]
    lines += [" ".join(map(str, row)) for row in rows]
    return "\n".join(lines) + "\n"


def asf_text(bones, hierarchy, units=("length 0.45", "angle deg"), root=()):
    """Text of an ASF file.

    Args:
        bones: name -> (direction, length, axis, dof); `axis` as in the file.
        hierarchy: parent -> children.
        units: lines below :units.
        root: lines below :root after the order.
    """
    lines = ["# made up", ":version 1.10", ":name TEST", ":units", *units]
    lines += [":documentation", "   begin of a note, with (parentheses)"]
    lines += [":root", "order TX TY TZ RX RY RZ", *(root or ("axis XYZ", "position 0 0 0"))]
    lines.append(":bonedata")
    for index, (name, (direction, length, axis, dof)) in enumerate(bones.items(), 1):
        lines += ["  begin", f"    id {index}", f"    name {name}"]
        lines.append("    direction " + " ".join(map(str, direction)))
        lines += [f"    length {length}", f"    axis {axis}"]
        if dof:
            lines += [f"    dof {dof}", "    limits (-90.0 90.0)"]
            lines += ["           (-90.0 90.0)"] * (len(dof.split()) - 1)
        lines.append("  end")
    lines += [":hierarchy", "  begin"]
    lines += [f"    {parent} {' '.join(children)}" for parent, children in hierarchy.items()]
    return "\n".join([*lines, "  end"]) + "\n"


def amc_text(frames, header=(":FULLY-SPECIFIED", ":DEGREES")):
    """Text of an AMC file; a frame is a dict of bone -> numbers."""
    lines = ["#!OML:ASF made up", *header]
    for number, frame in enumerate(frames, 1):
        lines.append(str(number))
        lines += [f"{name} {' '.join(map(str, values))}" for name, values in frame.items()]
    return "\n".join(lines) + "\n"


def _cmu_bones():
    """A body with the bones of CMU's files, about as tall as a person: name -> bone."""
    bones = {}
    for side, sign in (("l", 1), ("r", -1)):
        leg = (0.34 * sign, -0.94, 0)
        bones |= {
            f"{side}hipjoint": ((0.6 * sign, -0.74, 0.3), 2.5, "0 0 0 XYZ", ""),
            f"{side}femur": (leg, 7.3, f"0 0 {20 * sign} XYZ", "rx ry rz"),
            f"{side}tibia": (leg, 7.4, f"0 0 {20 * sign} XYZ", "rx"),
            f"{side}foot": ((0, -0.2, 0.98), 2.3, f"-90 0 {20 * sign} XYZ", "rx rz"),
        }
    for name in ("lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head"):
        bones[name] = ((0, 1, 0), 2.0, "0 0 0 XYZ", "rx ry rz")
    for side, sign in (("l", 1), ("r", -1)):
        axis = f"180 {-30 * sign} {-90 * sign} XYZ"
        bones |= {
            f"{side}clavicle": ((0.93 * sign, 0.36, 0), 3.5, "0 0 0 XYZ", "ry rz"),
            f"{side}humerus": ((sign, 0, 0), 5.0, axis, "rx ry rz"),
            f"{side}radius": ((sign, 0, 0), 3.4, axis, "rx"),
            f"{side}wrist": ((sign, 0, 0), 1.7, f"0 {90 * sign} {90 * sign} XYZ", "ry"),
        }
    return bones


CMU_BONES = _cmu_bones()
CMU_HIERARCHY = {
    "root": ("lhipjoint", "rhipjoint", "lowerback"),
    **{f"{s}hipjoint": (f"{s}femur",) for s in "lr"},
    **{f"{s}femur": (f"{s}tibia",) for s in "lr"},
    **{f"{s}tibia": (f"{s}foot",) for s in "lr"},
    "lowerback": ("upperback",),
    "upperback": ("thorax",),
    "thorax": ("lowerneck", "lclavicle", "rclavicle"),
    "lowerneck": ("upperneck",),
    "upperneck": ("head",),
    **{f"{s}clavicle": (f"{s}humerus",) for s in "lr"},
    **{f"{s}humerus": (f"{s}radius",) for s in "lr"},
    **{f"{s}radius": (f"{s}wrist",) for s in "lr"},
}


def cmu_frame(rng=None, **angles):
    """A frame of that body: standing on the floor with hanging arms, facing z, plus `angles`."""
    frame = {"root": (3.0, 17.5, -8.0, 0.0, 0.0, 0.0)}
    for name, (_, _, _, dof) in CMU_BONES.items():
        if dof:
            noise = rng.normal(0, 2, len(dof.split())) if rng else np.zeros(len(dof.split()))
            frame[name] = tuple(noise.round(3))
    frame["lhumerus"], frame["rhumerus"] = (0, 0, 75), (0, 0, -75)
    return frame | angles


def write_cmu(folder, name, frames):
    """Writes `<name>.amc` and the .asf of its subject into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    asf = folder / f"{name.split('_')[0]}.asf"
    asf.write_text(asf_text(CMU_BONES, CMU_HIERARCHY))
    path = folder / f"{name}.amc"
    path.write_text(amc_text(frames))
    return path
