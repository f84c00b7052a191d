"""Writes small BVH, ASF and AMC files, and a standing person in several ways of naming joints."""

import itertools

import numpy as np


def turn(axes, degrees):
    """Product of rotations about coordinate axes, the last of them acting first: (3, 3)."""
    product = np.eye(3)
    for axis, angle in zip(axes, np.radians(degrees), strict=True):
        fixed = "XYZ".index(axis)
        i, j = (fixed + 1) % 3, (fixed + 2) % 3
        rotation = np.eye(3)
        rotation[i, i] = rotation[j, j] = np.cos(angle)
        rotation[j, i], rotation[i, j] = np.sin(angle), -np.sin(angle)
        product = product @ rotation
    return product


def bvh_text(tree, rows, frame_time=0.0333333, channels=lambda name: "ZYX", positions=("ROOT",)):
    """Text of a BVH file.

    `tree` is {root: ((x, y, z), {child: ..})}; instead of children a leaf has its End Site. `rows`
    are the frames, in the order of the channels. `channels` gives a joint's rotation axes in order;
    `positions` are the joints (or "ROOT") with position channels before them.
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


def _standing(root, joints, sides, mirror, place, turned, rows, order="ZYX", moved=False, fps=30):
    """A person whose joints all hang on the root, with offsets in its axes; {s} stands for a side.

    Where they are `moved`, position channels say the offsets, and OFFSET says nothing.
    """
    offsets = {}
    for name, offset in joints.items():
        for side, factor in zip(sides, (1, mirror), strict=True):
            offsets[name.format(s=side, c=side[0])] = np.multiply(offset, factor).tolist()
    row = [*place, *turned]
    for offset in offsets.values():
        row += [*(offset if moved else ()), 0, 0, 0]
    children = {name: ((0, 0, 0) if moved else at, (0, 1.8, 0)) for name, at in offsets.items()}
    positions = ("ROOT", *offsets) if moved else ("ROOT",)
    tree = {root: ((0, 0, 0), children)}
    return bvh_text(tree, [row] * rows, 1 / fps, lambda name: order, positions)


def cmu_bvh(rows=1):
    """Names of CMU's BVH conversion, whose first frame is a rest pose; the unit is 56.4 mm."""
    joints = {
        "{c}HipJoint": (0, 0, 0), "{s}UpLeg": (1.5, -1.8, 0.8), "{s}Leg": (1.5, -9, 0.8),
        "{s}Foot": (1.5, -16, 0.8), "{s}Arm": (3, 7, 0), "{s}ForeArm": (8, 7, 0),
        "{s}Hand": (11.5, 7, 0), "LowerBack": (0, 0, 0), "Spine": (0, 2, 0), "Spine1": (0, 6, 0),
        "Neck": (0, 6, 0), "Neck1": (0, 7.8, 0), "Head": (0, 9.6, 0),
    }  # fmt: skip
    sides = ("Left", "Right")
    return _standing("Hips", joints, sides, (-1, 1, 1), (1, 18, 5), (0, 0, 0), rows, fps=120)


# In the other two data sets the x axis of trunk and head points up, y to the front and z to the
# left. A root that turns these axes upright: Z Y X angles (90, 0, 90).
def lafan1(rows=1):
    joints = {
        "{s}UpLeg": (0.1, 1.9, 10.5), "{s}Leg": (-43, 1.9, 10.5), "{s}Foot": (-85, 1.9, 10.5),
        "{s}Toe": (-85, 19, 10.5), "{s}Shoulder": (52, -4, 6), "{s}Arm": (52, -4, 17),
        "{s}ForeArm": (52, -4, 50), "{s}Hand": (52, -4, 75), "Spine": (7, -2.6, 0),
        "Spine1": (19.6, -2.6, 0), "Spine2": (32, -2.6, 0), "Neck": (58, -2.6, 0),
        "Head": (70, -2.6, 0),
    }  # fmt: skip
    sides = ("Left", "Right")
    return _standing("Hips", joints, sides, (1, 1, -1), (173, 94, -518), (90, 0, 90), rows)


def bandai_namco(rows=1):
    joints = {
        "UpperLeg_{s}": (-2.2, 0, 6.5), "LowerLeg_{s}": (-41, 0, 6.5), "Foot_{s}": (-82, 0, 6.5),
        "Toes_{s}": (-82, 12, 6.5), "Shoulder_{s}": (38, -0.4, 5), "UpperArm_{s}": (38, -0.4, 10),
        "LowerArm_{s}": (38, -0.4, 34), "Hand_{s}": (38, -0.4, 56), "Hips": (0, 0, 0),
        "Spine": (15.7, 0, 0), "Chest": (25, -0.4, 0), "Neck": (41, -0.4, 0), "Head": (48, -0.4, 0),
    }  # fmt: skip
    place, turned = (-0.5, 93.5, -9), (90, 90, 0)
    mirror = (1, 1, -1)
    return _standing("joint_Root", joints, "LR", mirror, place, turned, rows, "ZXY", moved=True)


def asf_text(bones, hierarchy, units=("length 0.45", "angle deg"), root=()):
    """Text of an ASF file.

    `bones` are name -> (direction, length, axis, dof), `hierarchy` is parent -> children, `units`
    and `root` are lines of these sections.
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
CMU_HIERARCHY = {}
for _chain in (
    "root lhipjoint lfemur ltibia lfoot", "root rhipjoint rfemur rtibia rfoot",
    "root lowerback upperback thorax lowerneck upperneck head",
    "thorax lclavicle lhumerus lradius lwrist", "thorax rclavicle rhumerus rradius rwrist",
):  # fmt: skip
    for _parent, _child in itertools.pairwise(_chain.split()):
        CMU_HIERARCHY.setdefault(_parent, []).append(_child)


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
