"""Augmentation of recorded poses in the world: bodies of other proportions, mirrored, exchanged."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from diffpose_jax.config import check_range
from diffpose_jax.skeleton import H36M_JOINTS, H36M_MIRROR, H36M_PARENTS, NUM_JOINTS

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

    def __post_init__(self) -> None:
        check_range(self, bone_std=(0, 1), mirror=(0, 1), exchange=(0, 1))
        check_range(self, height_mm_min=(100, self.height_mm_max))


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
