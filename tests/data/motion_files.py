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

    Args:
        tree: {root: ((x, y, z), {child: ..})}; instead of children a leaf has its End Site.
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


def chain(*joints):
    """A branch of a tree from pairs of name and offset, with an End Site."""
    branch = (0, 1, 0)
    for name, offset in reversed(joints):
        branch = {name: (offset, branch)}
    return branch


def posed(tree, rows, frame_time, order, angles, place=None, places=None):
    """A file whose frames have these angles by joint, and the root at a place.

    With `places` by joint instead, all joints have position channels, by default their offsets.
    """
    names, row = [], []

    def walk(name, offset, children):
        if places is not None:
            row.extend(places.get(name, offset))
        elif not names:
            row.extend(place)
        names.append(name)
        row.extend(angles.get(name, (0, 0, 0)))
        if isinstance(children, dict):
            for child, below in children.items():
                walk(child, *below)

    ((root, below),) = tree.items()
    walk(root, *below)
    positions = ("ROOT",) if places is None else tuple(names)
    return bvh_text(tree, [row] * rows, frame_time, lambda name: order, positions)


def both_sides(sides, mirrors, *chains):
    """Branches of the left side and, mirrored, of the right: joints with {s} for the side.

    A chain's first joint is mirrored by the first of the two factors, the others by the second.
    """
    branches = [{} for _ in chains]
    for is_right, side in enumerate(sides):
        for branch, joints in zip(branches, chains, strict=True):
            offsets = [
                np.multiply(offset, mirrors[k > 0] if is_right else 1).tolist()
                for k, offset in enumerate(joints.values())
            ]
            names = [name.format(s=side, c=side[0]) for name in joints]
            branch |= chain(*zip(names, offsets, strict=True))
    return branches


def cmu_bvh(rows=1):
    """A standing person in the names of CMU's BVH conversion; the unit is 56.4 mm."""
    legs, arms = both_sides(
        ("Left", "Right"),
        [(-1, 1, 1)] * 2,
        {"{c}HipJoint": (0, 0, 0), "{s}UpLeg": (1.5, -1.8, 0.8), "{s}Leg": (0, -7.2, 0),
         "{s}Foot": (0, -7, 0), "{s}ToeBase": (0, -1, 2)},
        {"{s}Shoulder": (0, 0, 0), "{s}Arm": (3, 1, 0), "{s}ForeArm": (5, 0, 0),
         "{s}Hand": (3.5, 0, 0)},
    )  # fmt: skip
    head = {"Head": ((0, 1.8, 0), (0, 1.8, 0))}
    chest = {"Neck": ((0, 0, 0), {"Neck1": ((0, 1.8, 0), head)})} | arms
    spine = {"Spine": ((0, 2, 0), {"Spine1": ((0, 4, 0), chest)})}
    tree = {"Hips": ((0, 0, 0), legs | {"LowerBack": ((0, 0, 0), spine)})}
    return posed(tree, rows, 0.0083333, "ZYX", {}, (1, 18, 5))


# In the other two data sets the x axis of a bone points along it; of trunk and head y points to
# the front and z to the left. A root that turns these axes upright: Z Y X angles (90, 0, 90).
def lafan1(rows=1):
    legs, arms = both_sides(
        ("Left", "Right"),
        [(1, 1, -1)] * 2,
        {"{s}UpLeg": (0.1, 1.9, 10.5), "{s}Leg": (43, 0, 0), "{s}Foot": (42, 0, 0),
         "{s}Toe": (17, 0, 0)},
        {"{s}Shoulder": (20, -1.5, 6), "{s}Arm": (11, 0, 0), "{s}ForeArm": (33, 0, 0),
         "{s}Hand": (25, 0, 0)},
    )  # fmt: skip
    chest = chain(("Neck", (26, 0, 0)), ("Head", (12, 0, 0))) | arms
    spine = {"Spine1": ((12.6, 0, 0), {"Spine2": ((12.3, 0, 0), chest)})}
    tree = {"Hips": ((0, 0, 0), legs | {"Spine": ((7, -2.6, 0), spine)})}
    angles = {"Hips": (90, 0, 90), "LeftUpLeg": (180, 0, 0), "RightUpLeg": (180, 0, 0)}
    # z to the left: about y to have x point left or right.
    angles |= {"LeftShoulder": (0, -90, 0), "RightShoulder": (0, 90, 0)}
    return posed(tree, rows, 0.0333333, "ZYX", angles, (173, 94, -518))


def bandai_namco(rows=1):
    legs, arms = both_sides(
        ("L", "R"),
        [(1, 1, -1), (-1, 1, 1)],
        {"UpperLeg_{s}": (-2.2, 0, 6.5), "LowerLeg_{s}": (39, 0, 0), "Foot_{s}": (41, 0, 0),
         "Toes_{s}": (12, 0, 0)},
        {"Shoulder_{s}": (13, 0, 5), "UpperArm_{s}": (5.3, 0, 0), "LowerArm_{s}": (24, 0, 0),
         "Hand_{s}": (22, 0, 0)},
    )  # fmt: skip
    chest = chain(("Neck", (16.4, 0, 0)), ("Head", (6.5, 0, 0))) | arms
    spine = {"Spine": ((15.7, 0, 0), {"Chest": ((9, -0.4, 0), chest)})}
    # The OFFSET of the hips, as in the data set, is not where they are.
    tree = {"joint_Root": ((0, 0, 0), {"Hips": ((0.8, 94, -452), spine | legs)})}
    angles = {"Hips": (90, 90, 0), "UpperLeg_L": (180, 0, 0)}
    angles |= {"Shoulder_L": (0, 0, -90), "Shoulder_R": (0, 0, -90)}
    return posed(tree, rows, 0.0333333, "ZXY", angles, places={"Hips": (-0.5, 93.5, -9)})


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
