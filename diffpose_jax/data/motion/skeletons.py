"""From the joints of a motion file to the 17 of Human3.6M, by the names of the joints.

Definitions, the same for every source: Hip is the midpoint of the two hip joints; Spine lies on
the spine between hip and thorax, near its middle; Thorax is the base of the neck, a little above
the line of the shoulders; Nose is 42 mm in front of the joint that carries the head; Head is the
top of the head; ankles and wrists are the joints about which foot and hand bend. Where a format
has no joint there, it is placed relative to the axes that move with the head.

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
    """Where one of the 17 joints lies.

    Attributes:
        weights: joints of the file and their weights, which add up to one; some may be negative.
        offset_mm: added to that, along the axes that move with the joint `axes`.
        axes: a joint of the file; empty without an offset.
    """

    weights: Mapping[str, float]
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: str = ""

    @property
    def joints(self) -> set[str]:
        """The joints of the file that are needed."""
        return {*self.weights} | ({self.axes} if self.axes else set())


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """How to read the motion of one kind of skeleton.

    Attributes:
        name: for messages.
        landmarks: Human3.6M joint to where it lies; all 17.
        unit_mm: length of the file's unit, where the file does not tell.
        up: "x", "y" or "z": the axis of the file that points up.
        fps: frames a second, where the file does not tell.
        skip_frames: so many frames at the start are no motion (a rest pose).
        stride: only every n-th frame is used.
        marks: further joints that a file of this kind has.
    """

    name: str
    landmarks: Mapping[str, Landmark]
    unit_mm: float | None
    up: str
    fps: float | None = None
    skip_frames: int = 0
    stride: int = 1
    marks: frozenset[str] = frozenset()

    @property
    def joints(self) -> frozenset[str]:
        """The joints that a file of this kind has at least."""
        return self.marks.union(*(landmark.joints for landmark in self.landmarks.values()))


def _one(
    joint: str, offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0), axes: str = ""
) -> Landmark:
    return Landmark({joint: 1.0}, offset_mm, axes)


def _limbs(**sources: str) -> dict[str, Landmark]:
    """Hips and limbs from the names of one side's joints, with {side} and {Side}, {S} in them."""
    landmarks = {}
    for side in ("left", "right"):
        letters = {"side": side[0], "Side": side.title(), "S": side[0].upper()}
        for part, source in sources.items():
            landmarks[side[0].upper() + part] = _one(source.format(**letters))
    hips = {name: 0.5 for side in "LR" for name in landmarks[f"{side}Hip"].weights}
    return {"Hip": Landmark(hips), **landmarks}


CMU_ASF = Skeleton(
    name="CMU (ASF/AMC)",
    landmarks={
        **_limbs(
            Hip="{side}hipjoint", Knee="{side}femur", Ankle="{side}tibia",
            Shoulder="{side}clavicle", Elbow="{side}humerus",
            # The radius bone is only two thirds of the forearm; `wrist` turns about its own
            # length and carries the hand.
            Wrist="{side}wrist",
        ),
        "Spine": _one("lowerback"),
        "Thorax": _one("lowerneck"),
        "Nose": _one("upperneck", (0.0, 0.0, 0.75 * _CMU_UNIT_MM), "head"),
        "Head": _one("head", (0.0, 0.0, 0.40 * _CMU_UNIT_MM), "head"),
    },
    unit_mm=None,
    up="y",
    fps=120.0,
)  # fmt: skip
"""The 31 bones of all .asf files of the CMU database; facing z at rest, y up."""

CMU_BVH = Skeleton(
    name="CMU (BVH conversion)",
    landmarks={
        **_limbs(
            Hip="{Side}UpLeg", Knee="{Side}Leg", Ankle="{Side}Foot",
            Shoulder="{Side}Arm", Elbow="{Side}ForeArm", Wrist="{Side}Hand",
        ),
        "Spine": _one("Spine"),
        "Thorax": _one("Neck1"),
        "Nose": _one("Head", (0.0, 0.0, 0.75 * _CMU_UNIT_MM), "Head"),
        "Head": _one("HeadEnd", (0.0, 0.0, 0.40 * _CMU_UNIT_MM), "Head"),
    },
    unit_mm=_CMU_UNIT_MM,
    up="y",
    skip_frames=1,
    marks=frozenset({"LHipJoint", "LowerBack"}),
)  # fmt: skip
"""The conversion's first frame is a rest pose. It leaves out the bones `thorax` and `lwrist`,
`rwrist` of the original, so that trunk and forearms are shorter than those of `CMU_ASF`."""

BANDAI_NAMCO = Skeleton(
    name="Bandai-Namco-Research-Motiondataset",
    landmarks={
        **_limbs(
            Hip="UpperLeg_{S}", Knee="LowerLeg_{S}", Ankle="Foot_{S}",
            Shoulder="UpperArm_{S}", Elbow="LowerArm_{S}", Wrist="Hand_{S}",
        ),
        "Spine": _one("Spine"),
        "Thorax": _one("Neck"),
        # The head's x axis points up and its y axis to the front.
        "Nose": _one("Head", (35.0, 42.0, 0.0), "Head"),
        "Head": _one("Head", (135.0, 23.0, 0.0), "Head"),
    },
    unit_mm=10.0,
    up="y",
    marks=frozenset({"joint_Root", "Chest", "Shoulder_L", "Toes_L"}),
)  # fmt: skip
"""22 joints, all with position channels; the End Sites coincide with their joints."""

LAFAN1 = Skeleton(
    name="LaFAN1",
    landmarks={
        **_limbs(
            Hip="{Side}UpLeg", Knee="{Side}Leg", Ankle="{Side}Foot",
            Shoulder="{Side}Arm", Elbow="{Side}ForeArm", Wrist="{Side}Hand",
        ),
        "Spine": Landmark({"Spine1": 0.5, "Spine2": 0.5}),
        "Thorax": _one("Neck"),
        # The head's x axis points up and its y axis to the front.
        "Nose": _one("Head", (0.0, 42.0, 0.0), "Head"),
        "Head": _one("Head", (100.0, 23.0, 0.0), "Head"),
    },
    unit_mm=10.0,
    up="y",
    marks=frozenset({"Hips", "Spine", "LeftToe", "LeftShoulder"}),
)  # fmt: skip
"""22 joints; the End Sites coincide with their joints."""

KNOWN = (CMU_ASF, CMU_BVH, BANDAI_NAMCO, LAFAN1)
"""The skeletons that are recognised by the names of their joints."""


def to_h36m(
    path: Path, recording: Recording, mapping: Path | None = None
) -> tuple[np.ndarray, float]:
    """Gives the motion of a recording in this package's convention.

    Args:
        path: the file that the recording comes from, for messages.
        recording: of a known skeleton, or of the one that `mapping` describes.
        mapping: a `skeleton.json`, or None.

    Returns:
        (F, 17, 3) float64, Human3.6M joints, millimetres, z up; and the frames a second.

    Raises:
        ValueError: the skeleton is unknown, the mapping is wrong or does not fit the file, or
            unit or frame rate are told by neither.
    """
    skeleton = _recognise(recording)
    if mapping is not None:
        skeleton, recording = _apply_mapping(mapping, skeleton, recording)
    if skeleton is None:
        raise ValueError(
            f"{path}: the joints are those of no known skeleton "
            f"({', '.join(known.name for known in KNOWN)}); put a {MAPPING_FILE} into the folder "
            f"that says where the 17 joints lie. The file has: {listed(recording.joints)}"
        )
    missing = sorted(skeleton.joints - set(recording.joints))
    if missing:
        raise ValueError(
            f"{path}: {skeleton.name} needs the joints {listed(missing)}, which the file does not "
            f"have. The file has: {listed(recording.joints)}"
        )
    unit_mm, fps = recording.unit_mm or skeleton.unit_mm, recording.fps or skeleton.fps
    if unit_mm is None or fps is None:
        field = "unit_mm" if unit_mm is None else "fps"
        raise ValueError(f"{path} does not tell its {field}; give it in a {MAPPING_FILE}")
    frames = slice(skeleton.skip_frames, None, skeleton.stride)
    index = {name: column for column, name in enumerate(recording.joints)}
    points = []
    for name in H36M_JOINTS:
        landmark = skeleton.landmarks[name]
        weighted = (
            weight * unit_mm * recording.positions[frames, index[joint]]
            for joint, weight in landmark.weights.items()
        )
        point = sum(weighted, np.zeros(3))
        if landmark.axes:
            rotation = recording.rotations[frames, index[landmark.axes]]
            point = point + rotation @ np.array(landmark.offset_mm)
        points.append(point)
    positions_mm = np.stack(points, axis=1)[..., _AXES_Z_UP[skeleton.up]]
    return positions_mm, fps / skeleton.stride


def _recognise(recording: Recording) -> Skeleton | None:
    names = set(recording.joints)
    return next((known for known in KNOWN if known.joints <= names), None)


def _apply_mapping(
    path: Path, skeleton: Skeleton | None, recording: Recording
) -> tuple[Skeleton | None, Recording]:
    """Lets the fields of a mapping file overrule the file and the known skeleton."""
    content = read_json(path)
    known = {"joints", "unit_mm", "up", "fps", "skip_frames", "stride"}
    if not isinstance(content, dict) or not set(content) <= known:
        raise ValueError(
            f"{path} must hold an object with some of the fields {', '.join(sorted(known))}"
        )
    for field, kind, least in (
        ("unit_mm", float, 1e-6), ("fps", float, 1e-6), ("skip_frames", int, 0), ("stride", int, 1)
    ):  # fmt: skip
        if field in content and not _is_number(content[field], kind, least):
            raise ValueError(
                f"{path}: {field} is {content[field]!r}; it must be a number of type "
                f"{kind.__name__}, at least {least:g}"
            )
    if content.get("up", "y") not in tuple(_AXES_Z_UP):
        raise ValueError(f'{path}: up is {content["up"]!r}; it must be "x", "y" or "z"')
    changes: dict[str, Any] = {
        field: content[field] for field in ("up", "skip_frames", "stride") if field in content
    }
    if "joints" in content:
        if "up" not in content:
            raise ValueError(f"{path}: a file with joints must also say which axis is up")
        skeleton = Skeleton(str(path), _landmarks(path, content["joints"]), None, content["up"])
    of_recording: dict[str, Any] = {
        field: float(content[field]) for field in ("unit_mm", "fps") if field in content
    }
    return (
        skeleton and dataclasses.replace(skeleton, **changes),
        dataclasses.replace(recording, **of_recording),
    )


def _landmarks(path: Path, joints: Any) -> dict[str, Landmark]:
    if not isinstance(joints, dict):
        raise ValueError(f"{path}: joints must be an object with the 17 joints as fields")
    missing = [name for name in H36M_JOINTS if name not in joints]
    unknown = sorted(set(joints) - set(H36M_JOINTS))
    if missing or unknown:
        raise ValueError(
            f"{path}: joints lacks: {', '.join(missing) or 'none'}; unknown: "
            f"{listed(unknown) or 'none'}; it must have each of {', '.join(H36M_JOINTS)}"
        )
    return {name: _landmark(path, name, source) for name, source in joints.items()}


def _landmark(path: Path, name: str, source: Any) -> Landmark:
    """Understands "joint", {"joint": weight, ..} and {"joint": .., "offset_mm": .., "axes": ..}."""
    if isinstance(source, str):
        return _one(source)
    if isinstance(source, dict) and isinstance(joint := source.get("joint"), str):
        offset_mm, axes = source.get("offset_mm"), source.get("axes", joint)
        if (
            set(source) <= {"joint", "offset_mm", "axes"}
            and isinstance(axes, str)
            and axes
            and isinstance(offset_mm, list)
            and len(offset_mm) == 3
            and all(_is_number(value, float, -1e6) for value in offset_mm)
        ):
            x, y, z = map(float, offset_mm)
            return _one(joint, (x, y, z), axes)
    elif isinstance(source, dict) and all(_is_number(w, float, -1e6) for w in source.values()):
        if abs(sum(source.values()) - 1) < 1e-6:
            return Landmark({joint: float(weight) for joint, weight in source.items()})
        raise ValueError(f"{path}: the weights of {name} add up to {sum(source.values()):g}, not 1")
    raise ValueError(
        f'{path}: {name} is {json.dumps(source)[:200]}; give "joint", or {{"joint a": 0.5, '
        f'"joint b": 0.5}}, or {{"joint": "joint a", "offset_mm": [x, y, z], "axes": "joint b"}}'
    )


def _is_number(value: Any, kind: type, least: float) -> bool:
    is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    return is_kind and not isinstance(value, bool) and least <= value <= 1e6
