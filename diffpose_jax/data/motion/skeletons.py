"""From the joints of a motion file to the 17 of Human3.6M, by the names of the joints.

Hip is the midpoint of the hip joints; Spine lies on the spine, near the middle between hip and
thorax; Thorax is the base of the neck, a little above the line of the shoulders; Nose is 42 mm in
front of the joint that carries the head; Head is the top of the head; ankles and wrists are the
joints about which foot and hand bend. Where a format has no joint there, it is placed relative to
the axes that move with the head.

The names and units come from files and documents of the data sets: CMU (mocap.cs.cmu.edu, the
.asf files and its FAQ), B. Hahne's BVH conversion of it (cgspeed.com, release for MotionBuilder),
Bandai-Namco-Research-Motiondataset 1 and 2, and Ubisoft's LaFAN1 (repositories of these names).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffpose_jax.config import check_choice, check_range, parse
from diffpose_jax.data.motion.recording import Recording, listed
from diffpose_jax.io.files import read_json
from diffpose_jax.skeleton import H36M_JOINTS

MAPPING_FILE = "skeleton.json"
"""Name of the file that a user puts beside motion of an unknown skeleton (see `README.md`)."""

_CMU_UNIT_MM = 25.4 / 0.45
# Cyclic permutations of the axes, so that no body is mirrored; z up stays as it is.
_AXES_Z_UP = {"x": [1, 2, 0], "y": [2, 0, 1], "z": [0, 1, 2]}


@dataclasses.dataclass(frozen=True)
class Landmark:
    """Where one of the 17 joints lies."""

    weights: Mapping[str, float]  # of joints of the file, one in sum; some may be negative
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: str = ""  # the joint of the file with whose axes the offset moves; empty without offset


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """How to read the motion of one kind of skeleton."""

    name: str
    landmarks: dict[str, Landmark]  # of all 17 joints of Human3.6M
    up: str = "y"  # the axis of the file that points up
    unit_mm: float | None = None  # length of the file's unit, where the file does not tell
    fps: float | None = None  # frames a second, where the file does not tell
    skip_frames: int = 0  # at the start, which are no motion (a rest pose)
    stride: int = 1  # only every n-th frame is used
    marks: frozenset[str] = frozenset()  # further joints that a file of this kind has

    @property
    def joints(self) -> set[str]:
        """The joints that a file of this kind has at least."""
        axes = {landmark.axes for landmark in self.landmarks.values()} - {""}
        return axes.union(self.marks, *(landmark.weights for landmark in self.landmarks.values()))


def _landmarks(where: Path | str, joints: Mapping[str, Any]) -> dict[str, Landmark]:
    if wrong := set(joints) ^ set(H36M_JOINTS):
        raise ValueError(f"{where}: missing or unknown joints: {listed(sorted(wrong))}")
    return {name: _landmark(where, name, source) for name, source in joints.items()}


def _landmark(where: Path | str, name: str, source: Any) -> Landmark:
    """Understands "joint", {"joint": weight, ..} and {"joint": .., "offset_mm": .., "axes": ..}."""
    match source:
        case str():
            return Landmark({source: 1.0})
        case {"joint": str(joint), "offset_mm": [x, y, z], **rest}:
            axes = rest.pop("axes", joint)
            if all(map(_is_number, (x, y, z))) and isinstance(axes, str) and axes and not rest:
                return Landmark({joint: 1.0}, (float(x), float(y), float(z)), axes)
        case dict() if all(map(_is_number, source.values())):
            if abs(total := sum(source.values()) - 1) > 1e-6:
                raise ValueError(f"{where}: the weights of {name} add up to {total + 1:g}, not 1")
            return Landmark({joint: float(weight) for joint, weight in source.items()})
    raise ValueError(
        f'{where}: {name} is {json.dumps(source)[:200]}; give "joint", or {{"joint a": 0.5, '
        f'"joint b": 0.5}}, or {{"joint": "joint a", "offset_mm": [x, y, z], "axes": "joint b"}}'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _skeleton(
    name: str, limbs: str, sides: tuple[str, str], trunk: dict[str, Any], **fields: Any
) -> Skeleton:
    """Makes a skeleton from names of hip to ankle, shoulder to wrist, with {s} for the side."""
    parts = ("Hip", "Knee", "Ankle", "Shoulder", "Elbow", "Wrist")
    joints: dict[str, Any] = {
        f"{letter}{part}": joint
        for letter, side in zip("LR", sides, strict=True)
        for part, joint in zip(parts, limbs.format(s=side).split(), strict=True)
    }
    joints["Hip"] = {joints["LHip"]: 0.5, joints["RHip"]: 0.5}
    return Skeleton(name, _landmarks(name, joints | trunk), **fields)


CMU_ASF = _skeleton(
    "CMU (ASF/AMC)",
    # The radius bone is only two thirds of the forearm; `wrist` turns about its own length and
    # carries the hand.
    "{s}hipjoint {s}femur {s}tibia {s}clavicle {s}humerus {s}wrist",
    ("l", "r"),
    {
        "Spine": "lowerback",
        "Thorax": "lowerneck",
        "Nose": {"joint": "upperneck", "offset_mm": [0, 0, 0.75 * _CMU_UNIT_MM], "axes": "head"},
        "Head": {"joint": "head", "offset_mm": [0, 0, 0.40 * _CMU_UNIT_MM]},
    },
    fps=120.0,
)
"""The 31 bones of all .asf files of the CMU database; facing z at rest, y up."""

CMU_BVH = _skeleton(
    "CMU (BVH conversion)",
    "{s}UpLeg {s}Leg {s}Foot {s}Arm {s}ForeArm {s}Hand",
    ("Left", "Right"),
    {
        "Spine": "Spine",
        "Thorax": "Neck1",
        "Nose": {"joint": "Head", "offset_mm": [0, 0, 0.75 * _CMU_UNIT_MM]},
        "Head": {"joint": "HeadEnd", "offset_mm": [0, 0, 0.40 * _CMU_UNIT_MM], "axes": "Head"},
    },
    unit_mm=_CMU_UNIT_MM,
    skip_frames=1,
    marks=frozenset({"LHipJoint", "LowerBack"}),
)
"""The conversion's first frame is a rest pose. It leaves out the bones `thorax` and `lwrist`,
`rwrist` of the original, so that trunk and forearms are shorter than those of `CMU_ASF`."""

BANDAI_NAMCO = _skeleton(
    "Bandai-Namco-Research-Motiondataset",
    "UpperLeg_{s} LowerLeg_{s} Foot_{s} UpperArm_{s} LowerArm_{s} Hand_{s}",
    ("L", "R"),
    {
        "Spine": "Spine",
        "Thorax": "Neck",
        # The head's x axis points up and its y axis to the front.
        "Nose": {"joint": "Head", "offset_mm": [35, 42, 0]},
        "Head": {"joint": "Head", "offset_mm": [135, 23, 0]},
    },
    unit_mm=10.0,
    marks=frozenset({"joint_Root", "Chest", "Shoulder_L", "Toes_L"}),
)
"""22 joints, all with position channels; the End Sites coincide with their joints."""

LAFAN1 = _skeleton(
    "LaFAN1",
    "{s}UpLeg {s}Leg {s}Foot {s}Arm {s}ForeArm {s}Hand",
    ("Left", "Right"),
    {
        "Spine": {"Spine1": 0.5, "Spine2": 0.5},
        "Thorax": "Neck",
        # The head's x axis points up and its y axis to the front.
        "Nose": {"joint": "Head", "offset_mm": [0, 42, 0]},
        "Head": {"joint": "Head", "offset_mm": [100, 23, 0]},
    },
    unit_mm=10.0,
    marks=frozenset({"Hips", "Spine", "LeftToe", "LeftShoulder"}),
)
"""22 joints; the End Sites coincide with their joints."""

KNOWN = (CMU_ASF, CMU_BVH, BANDAI_NAMCO, LAFAN1)
"""The skeletons that are recognised by the names of their joints."""


@dataclasses.dataclass(frozen=True)
class _MappingFile:
    """The fields of a `skeleton.json`, which overrule the motion file and the known skeleton."""

    joints: Mapping[str, Any] | None = None
    unit_mm: int | float | None = None
    up: str | None = None
    fps: int | float | None = None
    skip_frames: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        least = {"unit_mm": 1e-6, "fps": 1e-6, "skip_frames": 0, "stride": 1}
        given = [field for field in least if getattr(self, field) is not None]
        check_range(self, **{field: (least[field], 1e6) for field in given})
        if self.up is not None or self.joints is not None:
            check_choice(self, up=tuple(_AXES_Z_UP))


def to_h36m(
    path: Path, recording: Recording, mapping: Path | None = None
) -> tuple[Float[np.ndarray, "F 17 3"], float]:
    """Human3.6M's joints of a recording (millimetres, z up), and the frames a second.

    `path` is the file that it comes from, for messages, `mapping` a `skeleton.json`.

    Raises:
      ValueError: the skeleton is unknown, the mapping is wrong or does not fit, or neither tells
        the unit or the frame rate.
    """
    names = set(recording.joints)
    skeleton = next((known for known in KNOWN if known.joints <= names), None)
    if mapping is not None:
        skeleton, recording = _apply_mapping(mapping, skeleton, recording)
    has = f"The file has: {listed(recording.joints)}"
    if skeleton is None:
        raise ValueError(
            f"{path}: the joints are those of no known skeleton "
            f"({', '.join(known.name for known in KNOWN)}); put a {MAPPING_FILE} into the folder "
            f"that says where the 17 joints lie. {has}"
        )
    if missing := sorted(skeleton.joints - names):
        raise ValueError(f"{path}: {skeleton.name} needs the joints {listed(missing)}. {has}")
    unit_mm, fps = recording.unit_mm or skeleton.unit_mm, recording.fps or skeleton.fps
    if unit_mm is None or fps is None:
        field = "unit_mm" if unit_mm is None else "fps"
        raise ValueError(f"{path} does not tell its {field}; give it in a {MAPPING_FILE}")
    landmarks = [skeleton.landmarks[name] for name in H36M_JOINTS]
    weights = [[mark.weights.get(joint, 0.0) for joint in recording.joints] for mark in landmarks]
    frames = slice(skeleton.skip_frames, None, skeleton.stride)
    positions_mm = unit_mm * (np.array(weights) @ recording.positions[frames])
    for index, mark in enumerate(landmarks):
        if mark.axes:
            rotations = recording.rotations[frames, recording.joints.index(mark.axes)]
            positions_mm[:, index] += rotations @ np.array(mark.offset_mm)
    return positions_mm[..., _AXES_Z_UP[skeleton.up]], fps / skeleton.stride


def _apply_mapping(
    path: Path, skeleton: Skeleton | None, recording: Recording
) -> tuple[Skeleton | None, Recording]:
    """Lets the fields of a mapping file overrule the motion file and the known skeleton."""
    fields = parse(_MappingFile, read_json(path), str(path))
    given = {name: value for name, value in vars(fields).items() if value is not None}
    if "joints" in given:
        skeleton = Skeleton(str(path), _landmarks(path, given.pop("joints")))
    for name in {"unit_mm", "fps"} & set(given):
        changes: dict[str, Any] = {name: float(given.pop(name))}
        recording = dataclasses.replace(recording, **changes)
    return skeleton and dataclasses.replace(skeleton, **given), recording
