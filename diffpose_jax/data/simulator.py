"""A simulated 2D detector: joint positions in, heatmaps that fail as detectors' heatmaps fail out.

A heatmap is a sum of R axis-aligned Gaussian blobs, so that a data set stores 16 x R x 5 numbers
instead of 16 x 64 x 64 and a batch is rendered by one matrix product. The blobs of a joint are

* the main mode near the joint: 2 cells wide and about 0.9 high as in a network trained on
  Gaussian targets of that size; wider, lower and further off for joints hidden behind the body;
  low and flat at the border for joints outside the crop; nearly gone for missed joints;
* a mode on the mirrored joint (arms or legs are confused together, above all seen from behind),
  one on a neighbour along the skeleton, one on clutter;
* very wide and faint background of either sign.

Errors of one image share its quality, so that some images are bad in many joints. The geometry is
real; the rest imitates HRNet's output and is calibrated on two figures: about 6.4 % of the frames
have a joint whose fitted Gaussian is wider than 5 px (the published share in Human3.6M's test
set), and the error of the argmax.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from diffpose_jax.config import check_range
from diffpose_jax.skeleton import (
    HEATMAP_SIZE,
    MPII_BONES,
    MPII_JOINTS,
    MPII_MIRROR,
    MPII_TO_H36M,
    NUM_HEATMAPS,
)

NUM_BLOBS = 7
"""R: main, mirrored, neighbour, clutter, and three of background."""

_BASE_ERROR = np.array(
    # Ankle, knee, hip of the right, then of the left leg; pelvis, spine, thorax, head;
    # wrist, elbow, shoulder of the right, then shoulder, elbow, wrist of the left arm.
    [1.1, 0.8, 0.8, 0.8, 0.8, 1.1, 0.7, 0.8, 0.6, 0.6, 1.2, 0.9, 0.7, 0.7, 0.9, 1.2]
)
"""Relative localisation error of the 16 joints: limbs' ends are harder than the trunk."""

_ARMS = np.array([name[1:] in ("Wrist", "Elbow", "Shoulder") for name in MPII_JOINTS])
_LEGS = np.array([name[1:] in ("Ankle", "Knee", "Hip") for name in MPII_JOINTS])
_NOT_IN_COCO = [MPII_JOINTS.index(name) for name in ("Spine", "Thorax", "Head")]

# Two neighbours along the skeleton; a joint at an end has one, twice.
_ADJACENT = [
    [other for bone in MPII_BONES if joint in bone for other in bone if other != joint]
    for joint in range(NUM_HEATMAPS)
]
_NEIGHBOURS = np.array([[joints[0], joints[-1]] for joints in _ADJACENT])

# Parts of the body that can hide a joint: two MPII joints and a radius in mm.
_BODY_PARTS: tuple[tuple[str, str, float], ...] = (
    ("Pelvis", "Thorax", 120.0), ("RHip", "LHip", 90.0), ("RShoulder", "LShoulder", 70.0),
    ("Thorax", "Head", 85.0), ("RShoulder", "RElbow", 45.0), ("RElbow", "RWrist", 38.0),
    ("LShoulder", "LElbow", 45.0), ("LElbow", "LWrist", 38.0), ("RHip", "RKnee", 70.0),
    ("RKnee", "RAnkle", 50.0), ("LHip", "LKnee", 70.0), ("LKnee", "LAnkle", 50.0),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SimulatorConfig:
    """Parameters of the simulated detector: lengths are heatmap cells, chances lie in [0, 1].

    A hidden joint (behind another part of the body) is "unsure" with the chance `hidden_unsure`;
    the other fields `hidden_*` and `*_hidden` are for unsure joints.
    """

    quality_std: float = 0.35  # log; of an image's factor on all its errors and chances of failure
    error: float = 0.55  # scale of the localisation error of a joint of average difficulty
    error_tail: float = 4.0  # degrees of freedom of its Student distribution: few are heavy-tailed
    amplitude: float = 0.9  # height of a joint's mode
    amplitude_std: float = 0.07
    sigma: float = 2.05  # width of a joint's mode
    sigma_std: float = 0.08  # log, separately on both axes
    occlusion_margin_mm: float = 80.0  # how much nearer the axis of a part must be to hide a joint
    hidden_unsure: float = 0.5  # chance that a hidden joint is not localised like a visible one
    hidden_error: float = 2.5  # factor on the error
    hidden_spread: float = 0.25  # mean of the exponentially distributed widening of the mode
    cut_amplitude: float = 0.12  # mean height of the low flat mode of a joint outside the crop
    missed: float = 0.0005  # chance of nothing but an almost flat map
    missed_hidden: float = 0.006
    confusion: float = 0.02  # chance to confuse the arms, or the legs, of a person from the front
    confusion_behind: float = 0.1  # the same from behind; in between it is interpolated
    confusion_together: float = 0.0  # chance that arms and legs are, a front taken for a back
    neighbour: float = 0.01  # chance of a second mode on a neighbouring joint
    neighbour_hidden: float = 0.1
    clutter: float = 0.01  # chance of a second mode anywhere
    clutter_hidden: float = 0.06
    second_amplitude: float = 0.35  # mean height of these two modes relative to `amplitude`
    background: float = 0.003  # standard deviation of the amplitudes of the background blobs
    without_trunk: float = 0.0  # chance of no maps of Spine, Thorax and Head, which COCO lacks

    def __post_init__(self) -> None:
        chances = ["hidden_unsure", "missed", "missed_hidden", "confusion", "confusion_behind"]
        chances += ["confusion_together", "without_trunk", "neighbour", "neighbour_hidden"]
        chances += ["clutter", "clutter_hidden"]
        check_range(self, **dict.fromkeys(chances, (0, 1)), error_tail=(0.1, 1e9), sigma=(0.1, 64))


class Detections(NamedTuple):
    """What the simulated detector gives for a batch; joints in MPII order."""

    blobs: Float[np.ndarray, "B 16 R 5"]  # see `render`
    hidden: Bool[np.ndarray, "B 16"]  # behind another part of the body


def render(
    blobs: Float[Array | np.ndarray, "*B R 5"], xp: ModuleType = np
) -> Float[Array | np.ndarray, "*B 64 64"]:
    """Renders heatmaps (row = y, column = x), with `xp` = `jax.numpy` on the device.

    A heatmap is the sum over its R blobs (amplitude, x, y, sigma_x, sigma_y) of
    amplitude exp(-(column - x)^2 / 2 sigma_x^2 - (row - y)^2 / 2 sigma_y^2).
    """
    cells = xp.arange(HEATMAP_SIZE, dtype=blobs.dtype)
    cells = cells.reshape((1,) * blobs.ndim + (HEATMAP_SIZE,))
    # (..., R, 2, 64): the columns' factor and the rows'.
    factors = xp.exp(-0.5 * ((cells - blobs[..., 1:3, None]) / blobs[..., 3:5, None]) ** 2)
    columns = blobs[..., :1] * factors[..., 0, :]
    return xp.matmul(xp.swapaxes(factors[..., 1, :], -1, -2), columns)


def hidden_joints(
    joints_mm: Float[np.ndarray, "B 16 3"], margin_mm: float
) -> Bool[np.ndarray, "B 16"]:
    """Finds the joints (MPII order, camera coordinates) behind another part of the body.

    The parts are capsules around the bones. A part hides a joint that is not one of its ends if
    the ray from the camera to the joint passes within the part's radius of its axis (measured
    where the projected axis comes nearest to the projected joint) and the axis is there nearer to
    the camera than the joint by the margin.
    """
    depth = joints_mm[..., 2]
    plane = joints_mm[..., :2] / depth[..., None]
    hidden = np.zeros(depth.shape, bool)
    for first, second, radius in _BODY_PARTS:
        i, j = MPII_JOINTS.index(first), MPII_JOINTS.index(second)
        axis = plane[:, j] - plane[:, i]
        to_joint = plane - plane[:, i, None]
        along = np.einsum("bjd,bd->bj", to_joint, axis) / ((axis**2).sum(-1)[:, None] + 1e-9)
        along = np.clip(along, 0.0, 1.0)
        gap = np.linalg.norm(to_joint - along[..., None] * axis[:, None], axis=-1)
        part_depth = depth[:, i, None] + along * (depth[:, j] - depth[:, i])[:, None]
        behind = (gap * part_depth < radius) & (part_depth + margin_mm < depth)
        behind[:, [i, j]] = False
        hidden |= behind
    return hidden


def seen_from_behind(joints_mm: Float[np.ndarray, "B 16 3"]) -> Float[np.ndarray, " B"]:
    """How far people are turned away: 0 faces the camera, 0.5 in profile, 1 from behind."""
    points = [joints_mm[:, MPII_JOINTS.index(n)] for n in ("RHip", "LHip", "Pelvis", "Thorax")]
    rhip, lhip, pelvis, thorax = points
    forward, to_camera = np.cross(lhip - rhip, thorax - pelvis), -pelvis
    norms = np.linalg.norm(forward, axis=-1) * np.linalg.norm(to_camera, axis=-1)
    return 0.5 - 0.5 * (forward * to_camera).sum(-1) / (norms + 1e-9)


def simulate(
    rng: np.random.Generator,
    points_camera_mm: Float[np.ndarray, "B 17 3"],
    keypoints_xy: Float[np.ndarray, "B 17 2"],
    config: SimulatorConfig,
) -> Detections:
    """Simulates a detector on people, from their joints in camera coordinates and heatmap cells."""
    joints_mm, truth = points_camera_mm[:, MPII_TO_H36M], keypoints_xy[:, MPII_TO_H36M]
    shape = B, J = truth.shape[:2]
    hidden = hidden_joints(joints_mm, config.occlusion_margin_mm)
    behind = seen_from_behind(joints_mm)
    cut = np.any((truth < -0.5) | (truth >= HEATMAP_SIZE - 0.5), axis=-1)

    quality = rng.lognormal(0.0, config.quality_std, (B, 1))
    unsure = hidden & (rng.random(shape) < config.hidden_unsure * quality)

    def happens(chance: float, chance_unsure: float) -> np.ndarray:
        return np.less(rng.random(shape), np.where(unsure, chance_unsure, chance) * quality)

    # The main mode.
    widening = np.where(unsure, config.hidden_spread * rng.exponential(1.0, shape), 0.0) * quality
    scale = config.error * _BASE_ERROR * quality * np.where(unsure, config.hidden_error, 1.0)
    centre = truth + scale[..., None] * rng.standard_t(config.error_tail, (B, J, 2))
    sigma = config.sigma * np.exp(rng.normal(0.0, config.sigma_std, (B, J, 2)))
    # A mode may be wider along one axis than along the other.
    sigma = sigma * (1.0 + widening[..., None] * rng.uniform(0.5, 1.0, (B, J, 2)))
    height = config.amplitude + config.amplitude_std * rng.standard_normal(shape)
    height = np.clip(height, 0.3, 1.05) * (1.0 + widening) ** -1.5

    # Outside of the crop there is nothing to see: a low flat mode where the body leaves it.
    inside = np.clip(truth, 0.0, HEATMAP_SIZE - 1.0) + rng.normal(0.0, 2.5, (B, J, 2))
    centre = np.where(cut[..., None], inside, centre)
    sigma = np.where(cut[..., None], rng.uniform(2.5, 5.5, (B, J, 2)), sigma)
    height = np.where(cut, config.cut_amplitude * rng.exponential(1.0, shape), height)
    missed = happens(config.missed, config.missed_hidden)
    height = np.where(missed, 0.02 * rng.random(shape), height)

    # Left and right: both arms (or both legs) share how strongly they are confused.
    chance = config.confusion + behind * (config.confusion_behind - config.confusion)
    mirrored = np.zeros(shape)
    for limb in (_ARMS, _LEGS):
        confused = rng.random(B) < chance * quality[:, 0]
        mirrored += limb * (confused * rng.beta(0.8, 1.6, B))[:, None]
    if config.confusion_together:
        together = rng.random(B) < config.confusion_together * quality[:, 0]
        share = (together * rng.beta(0.8, 1.6, B))[:, None]
        mirrored = np.maximum(mirrored, (_ARMS | _LEGS) * share)
    mirrored = np.clip(mirrored * rng.uniform(0.8, 1.2, shape), 0.0, 1.0) * ~cut
    confused_with = truth[:, MPII_MIRROR] + scale[..., None] * rng.standard_normal((B, J, 2))
    blobs = [
        _blob(height * (1.0 - mirrored), centre, sigma),
        _blob(height * mirrored, confused_with, sigma),
    ]

    def second_height(present: np.ndarray) -> np.ndarray:
        # A gamma distribution of shape 2: mostly faint, now and then as high as the main mode.
        relative = config.second_amplitude / 2 * rng.gamma(2.0, 1.0, shape)
        return present * config.amplitude * np.minimum(relative, 1.0)

    side = rng.integers(0, 2, shape)
    fraction = rng.uniform(0.5, 1.0, shape)[..., None]
    there = truth[np.arange(B)[:, None], _NEIGHBOURS[np.arange(J), side]]
    height = second_height(happens(config.neighbour, config.neighbour_hidden))
    sigma = config.sigma * rng.uniform(0.9, 1.5, (B, J, 2))
    blobs.append(_blob(height, truth + fraction * (there - truth), sigma))

    height = second_height(happens(config.clutter, config.clutter_hidden))
    centre = rng.uniform(2.0, HEATMAP_SIZE - 3.0, (B, J, 2))
    blobs.append(_blob(height, centre, config.sigma * rng.uniform(0.8, 1.8, (B, J, 2))))

    for _ in range(NUM_BLOBS - 4):
        height = config.background * rng.standard_normal(shape)
        centre = rng.uniform(0.0, HEATMAP_SIZE, (B, J, 2))
        blobs.append(_blob(height, centre, rng.uniform(4.0, 14.0, (B, J, 2))))
    stacked = np.stack(blobs, axis=2).astype(np.float32)
    if config.without_trunk:
        without = np.flatnonzero(rng.random(B) < config.without_trunk)
        stacked[without[:, None], _NOT_IN_COCO, :, 0] = 0.0
    return Detections(stacked, hidden)


def _blob(amplitude: np.ndarray, centre: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Joins (B, 16), (B, 16, 2) and (B, 16, 2) to (B, 16, 5)."""
    return np.concatenate([amplitude[..., None], centre, sigma], axis=-1)
