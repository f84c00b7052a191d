"""Bodies of recorded poses in the world: the standard one; others, mirrored and exchanged ones."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from diffpose_jax.config import check_range
from diffpose_jax.skeleton import (
    H36M_BONES,
    H36M_JOINTS,
    H36M_MIRROR,
    H36M_PARENTS,
    NUM_JOINTS,
)

BONES_MM = {
    "RHip": 133, "RKnee": 443, "RAnkle": 454, "LHip": 133, "LKnee": 443, "LAnkle": 454,
    "Spine": 233, "Thorax": 257, "Nose": 121, "Head": 115, "LShoulder": 151, "LElbow": 279,
    "LWrist": 252, "RShoulder": 151, "RElbow": 279, "RWrist": 252,
}  # fmt: skip
"""Length of the bone that ends in each joint: the Human3.6M skeleton, to the millimetre."""

CLEARANCE_MM = {
    "Hip": 100, "RHip": 90, "RKnee": 55, "RAnkle": 80, "LHip": 90, "LKnee": 55, "LAnkle": 80,
    "Spine": 90, "Thorax": 80, "Nose": 40, "Head": 20, "LShoulder": 70, "LElbow": 40,
    "LWrist": 30, "RShoulder": 70, "RElbow": 40, "RWrist": 30,
}  # fmt: skip
"""Height of each joint when the body part around it rests on the floor."""

# Bones, named by their lower joint, that share one factor: always left with right.
_BONE_GROUPS: tuple[tuple[str, ...], ...] = (
    ("RHip", "LHip"), ("RKnee", "LKnee"), ("RAnkle", "LAnkle"), ("Spine", "Thorax"),
    ("Nose", "Head"), ("LShoulder", "RShoulder"), ("LElbow", "RElbow"), ("LWrist", "RWrist"),
)  # fmt: skip
_GROUP_OF_JOINT = np.array(
    [0] + [next(g for g, group in enumerate(_BONE_GROUPS) if j in group) for j in H36M_JOINTS[1:]]
)
STATURE_JOINTS = [H36M_JOINTS.index(name) for name in ("LAnkle", "LKnee", *H36M_JOINTS[7:11])]
STATURE_PARENTS = [H36M_PARENTS[joint] for joint in STATURE_JOINTS]
"""Ends of the bones that add up to a standing body, from the ankle to the top of the head."""

# What is exchanged, the joint that it hangs on, and the right and left joint that tell where it
# faces: the upper body (hip; hips), the arms (thorax; shoulders).
_PARTS = ((slice(7, None), 0, 1, 4), (slice(11, None), 8, 14, 11))
# What `bend` turns about which joint, and how far relative to legs and arms.
_TURNED = (
    (slice(7, None), 0, 0.5), (slice(9, 11), 8, 0.5),
    (slice(2, 4), 1, 1.0), (slice(5, 7), 4, 1.0),
    (slice(12, 14), 11, 1.0), (slice(15, 17), 14, 1.0),
)  # fmt: skip
_HINGES = ((1, 2, 3), (4, 5, 6), (11, 12, 13), (14, 15, 16))
_MOST_BENT = np.radians(150)
# The ankle stands about 5 % of the stature above the floor.
_STATURE_FACTOR = 1.05


@dataclasses.dataclass(frozen=True)
class BodyConfig:
    """Variation of the bodies."""

    bone_std: float = 0.06  # log; of the length factors of the groups of bones
    height_mm_min: float = 1500.0  # stature, drawn uniformly, whoever was recorded
    height_mm_max: float = 1950.0
    mirror: float = 0.5  # chance
    exchange: float = 0.7  # chance that a training pose gets another's upper body, then its arms
    bend_std_degrees: float = 0.0  # of the turns of a training pose's joints, see `bend`

    def __post_init__(self) -> None:
        check_range(self, bone_std=(0, 1), mirror=(0, 1), exchange=(0, 1))
        check_range(self, bend_std_degrees=(0, 90))
        check_range(self, height_mm_min=(100, self.height_mm_max))


def retarget(points: Float[np.ndarray, "F 17 3"]) -> Float[np.ndarray, "F 17 3"]:
    """Puts the standard body, in millimetres, into the poses of another one, in any unit; z is up.

    Every bone keeps its direction and gets its length from `BONES_MM`. The hip keeps its height in
    units of the legs, so that the feet stay where they were, and the clip is then moved vertically
    until the lowest body part touches the floor (`CLEARANCE_MM`) in its lowest frames. The
    horizontal position of the hip is zero.
    """
    leg = np.linalg.norm(np.diff(points[:, 1:4], axis=1), axis=-1).sum(1)  # hip, knee, ankle
    scale = (BONES_MM["RKnee"] + BONES_MM["RAnkle"]) / np.median(leg)
    body = np.zeros(points.shape)
    body[:, 0, 2] = scale * points[:, 0, 2]
    for parent, joint in H36M_BONES:
        bone = points[:, joint] - points[:, parent]
        bone *= BONES_MM[H36M_JOINTS[joint]] / np.linalg.norm(bone, axis=-1, keepdims=True)
        body[:, joint] = body[:, parent] + bone
    clearance = np.array([CLEARANCE_MM[name] for name in H36M_JOINTS], np.float64)
    # A low quantile rather than the minimum: single frames of the sources sink into the floor.
    body[..., 2] -= np.quantile((body[..., 2] - clearance).min(axis=1), 0.02)
    return body


def mirror_poses(positions_mm: Float[np.ndarray, "*B 17 3"]) -> Float[np.ndarray, "*B 17 3"]:
    """Mirrors poses in the plane x = 0: left and right are exchanged."""
    return positions_mm[..., H36M_MIRROR, :] * np.array([-1.0, 1.0, 1.0])


def exchange_parts(
    rng: np.random.Generator,
    positions_mm: Float[np.ndarray, "B 17 3"],
    donors_mm: Float[np.ndarray, "N 17 3"],
    chance: float,
) -> Float[np.ndarray, "B 17 3"]:
    """Gives poses the upper body, and then the arms, of other poses, each with a chance.

    A few thousand recorded frames hold few combinations of what legs, trunk and arms can do; a
    network that has only seen these takes the legs as proof of what the arms do. The part is turned
    about the vertical (z) so that hips (shoulders) face the same way, and put on the hip (thorax).
    """
    positions_mm = positions_mm.copy()
    for joints, root, right, left in _PARTS:
        donors = donors_mm[rng.integers(len(donors_mm), size=len(positions_mm))]
        turn = _heading(positions_mm, right, left) - _heading(donors, right, left)
        part = _turned(donors[:, joints] - donors[:, [root]], turn) + positions_mm[:, [root]]
        chosen = np.flatnonzero(rng.random(len(positions_mm)) < chance)
        positions_mm[chosen, joints] = part[chosen]
    return positions_mm


def bend(
    rng: np.random.Generator, positions_mm: Float[np.ndarray, "B 17 3"], std_degrees: float
) -> Float[np.ndarray, "B 17 3"]:
    """Turns the joints of poses by random angles, within what bodies can do.

    Legs and arms turn as a whole about hip and shoulder, and the upper body and the head about hip
    and thorax, these two by half as much. Knees and elbows bend or stretch in their own plane: not
    beyond straight, and not so far that shank or forearm would be in the thigh or upper arm. The
    lowest joint keeps its height.
    """
    bent, batch = positions_mm.astype(np.float64), len(positions_mm)
    std = np.radians(std_degrees)
    for joints, root, share in _TURNED:
        turn = Rotation.from_rotvec(share * std * rng.standard_normal((batch, 3))).as_matrix()
        arms = bent[:, joints] - bent[:, [root]]
        bent[:, joints] = arms @ turn.swapaxes(1, 2) + bent[:, [root]]
    for upper, hinge, end in _HINGES:
        inner, outer = bent[:, hinge] - bent[:, upper], bent[:, end] - bent[:, hinge]
        axis = np.cross(inner, outer)
        norm = np.linalg.norm(axis, axis=1, keepdims=True)
        angle = np.arctan2(norm[:, 0], np.sum(inner * outer, axis=1))
        wanted = np.clip(angle + std * rng.standard_normal(batch), 0.0, _MOST_BENT)
        # A straight joint has no plane, and beyond `_MOST_BENT` it is only left as it is.
        can = (norm[:, 0] > 1e-3 * np.linalg.norm(inner, axis=1)) & (angle < _MOST_BENT)
        turns = np.where(can, wanted - angle, 0.0)[:, None] * axis / np.maximum(norm, 1e-9)
        bent[:, end] = bent[:, hinge] + Rotation.from_rotvec(turns).apply(outer)
    bent[..., 2] += (positions_mm[..., 2].min(1) - bent[..., 2].min(1))[:, None]
    return bent


def _heading(positions_mm: np.ndarray, right: int, left: int) -> Float[np.ndarray, " B"]:
    """Direction on the floor from a right joint to the left one, in radians."""
    x, y, _ = (positions_mm[:, left] - positions_mm[:, right]).T
    return np.arctan2(y, x)


def _turned(points: Float[np.ndarray, "B N 3"], angle: Float[np.ndarray, " B"]) -> np.ndarray:
    """Points turned about the vertical."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1)


def vary_bodies(
    rng: np.random.Generator, positions_mm: Float[np.ndarray, "B 17 3"], config: BodyConfig
) -> Float[np.ndarray, "B 17 3"]:
    """Gives every pose another body, which may be mirrored.

    Directions of the bones stay; lengths are multiplied by a factor for each bone group and then
    together to the drawn stature. The lowest joint's height above the floor (z = 0) scales with the
    body, and the hip's horizontal position stays.
    """
    batch = len(positions_mm)
    factors = rng.lognormal(0.0, config.bone_std, (batch, len(_BONE_GROUPS)))[:, _GROUP_OF_JOINT]
    height = rng.uniform(config.height_mm_min, config.height_mm_max, batch)
    mirrored = rng.random(batch) < config.mirror

    parents = np.array(H36M_PARENTS[1:])
    bones = np.zeros(positions_mm.shape)
    bones[:, 1:] = positions_mm[:, 1:] - positions_mm[:, parents]
    lowest = positions_mm[..., 2].min(-1) * height / stature(bones)
    bones *= factors[..., None]
    bones *= (height / stature(bones))[:, None, None]

    varied = positions_mm + np.zeros(bones.shape)
    for joint in range(1, NUM_JOINTS):
        varied[:, joint] = varied[:, H36M_PARENTS[joint]] + bones[:, joint]
    varied[..., 2] += (lowest - varied[..., 2].min(-1))[:, None]
    return np.where(mirrored[:, None, None], mirror_poses(varied), varied)


def stature(bones: Float[np.ndarray, "B 17 3"]) -> Float[np.ndarray, " B"]:
    """Stature in mm, were the body to stand, from the bones to each joint."""
    return _STATURE_FACTOR * np.linalg.norm(bones[:, STATURE_JOINTS], axis=-1).sum(-1)
