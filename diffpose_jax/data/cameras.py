"""Pinhole cameras like Human3.6M's, and the coordinates of poses.

World coordinates are millimetres with z up; camera coordinates are millimetres with x right,
y down and z forward, as in Human3.6M; pixels have x right and y down. Human3.6M's lens distortion
(under 2 px at the people) is left out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffpose_jax.config import check_range


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """Distribution of cameras around a person; the defaults follow Human3.6M's four cameras."""

    focal_length_px_min: float = 1143.0  # Human3.6M: 1143.5 to 1149.8, images of 1000 x 1000 px
    focal_length_px_max: float = 1150.0
    centre_x_px: float = 512.0  # mean of the principal point
    centre_y_px: float = 508.0
    centre_std_px: float = 5.0
    distance_mm_min: float = 4000.0  # horizontal distance of camera and subject
    distance_mm_max: float = 6500.0
    height_mm_min: float = 1300.0  # of the camera above the floor
    height_mm_max: float = 1700.0
    offset_mm: float = 900.0  # largest, uniform: between the subject and what a camera looks at
    target_height_mm_min: float = 700.0  # above the floor, of the point at which a camera looks
    target_height_mm_max: float = 1100.0
    roll_std_degrees: float = 1.0  # rotation about the optical axis

    def __post_init__(self) -> None:
        check_range(
            self,
            focal_length_px_min=(1, self.focal_length_px_max),
            distance_mm_min=(1, self.distance_mm_max),
            height_mm_min=(-1e5, self.height_mm_max),
            target_height_mm_min=(-1e5, self.target_height_mm_max),
            **dict.fromkeys(("centre_std_px", "offset_mm", "roll_std_degrees"), (0, 1e5)),
        )


class Camera(NamedTuple):
    """A batch of pinhole cameras; `rotation` is world to camera, its rows the camera's axes."""

    rotation: Float[np.ndarray, "B 3 3"]
    position_mm: Float[np.ndarray, "B 3"]
    focal_px: Float[np.ndarray, " B"]
    centre_px: Float[np.ndarray, "B 2"]


def look_at(
    position_mm: Float[np.ndarray, "B 3"],
    target_mm: Float[np.ndarray, "B 3"],
    roll: Float[np.ndarray, " B"],
) -> Float[np.ndarray, "B 3 3"]:
    """Rotation, world to camera, of cameras that look at a target; `roll` in radians."""
    forward = target_mm - position_mm
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll)[:, None], np.sin(roll)[:, None]
    return np.stack([cos * right + sin * down, cos * down - sin * right, forward], axis=1)


def sample_cameras(
    rng: np.random.Generator, subjects_mm: Float[np.ndarray, "B 3"], config: CameraConfig
) -> Camera:
    """Draws a camera for each subject, from any side of it; of the subjects only x and y count."""
    batch = len(subjects_mm)
    azimuth = rng.uniform(0.0, 2.0 * np.pi, batch)
    distance = rng.uniform(config.distance_mm_min, config.distance_mm_max, batch)
    height = rng.uniform(config.height_mm_min, config.height_mm_max, batch)
    offset = rng.uniform(-config.offset_mm, config.offset_mm, batch)
    target_height = rng.uniform(config.target_height_mm_min, config.target_height_mm_max, batch)
    roll = np.radians(rng.normal(0.0, config.roll_std_degrees, batch))
    focal = rng.uniform(config.focal_length_px_min, config.focal_length_px_max, batch)
    centre = np.array([config.centre_x_px, config.centre_y_px])
    centre = centre + rng.normal(0.0, config.centre_std_px, (batch, 2))

    ground = subjects_mm[:, :2]
    away = np.stack([np.cos(azimuth), np.sin(azimuth)], axis=-1)
    aside = np.stack([-away[:, 1], away[:, 0]], axis=-1)
    position = np.concatenate([ground + distance[:, None] * away, height[:, None]], axis=-1)
    target = np.concatenate([ground + offset[:, None] * aside, target_height[:, None]], axis=-1)
    return Camera(look_at(position, target, roll), position, focal, centre)


def world_to_camera(
    points_mm: Float[np.ndarray, "B N 3"], camera: Camera
) -> Float[np.ndarray, "B N 3"]:
    """Points of the world in camera coordinates."""
    return (points_mm - camera.position_mm[:, None]) @ camera.rotation.swapaxes(1, 2)


def project(
    points_camera_mm: Float[np.ndarray, "B N 3"], camera: Camera
) -> Float[np.ndarray, "B N 2"]:
    """Points in camera coordinates as pixels of the image; refused less than 100 mm before it."""
    nearest = float(points_camera_mm[..., 2].min(initial=np.inf))
    if nearest < 100.0:
        raise ValueError(
            f"A point lies {nearest:.0f} mm along a camera's axis: nothing nearer than 100 mm can "
            "be projected. Move the cameras away from the subject (distance_mm_min)."
        )
    xy = points_camera_mm[..., :2] / points_camera_mm[..., 2:]
    return xy * camera.focal_px[:, None, None] + camera.centre_px[:, None]


def rays(
    pixels: Float[np.ndarray, "B 2"],
    focal_px: Float[np.ndarray, " B"],
    centre_px: Float[np.ndarray, "B 2"],
) -> Float[np.ndarray, "B 3"]:
    """Unit vectors from a camera to what it sees at a pixel each, in camera coordinates."""
    ray = np.concatenate([(pixels - centre_px) / focal_px[:, None], np.ones((len(pixels), 1))], 1)
    return ray / np.linalg.norm(ray, axis=1, keepdims=True)


def turns_to(rays: Float[np.ndarray, "B 3"]) -> Float[np.ndarray, "B 3 3"]:
    """Rotations of output poses from a camera's axes to those of one that looks along the ray.

    A crop shows a person as a virtual camera sees them that looks at the crop's centre: what stands
    at the picture's edge is seen from another side than what stands in its middle, and the crop
    does not tell which it was. Of all such cameras this is the one that is reached by the smallest
    turn. The transpose turns back.

    Args:
      rays: unit vectors in camera coordinates, in front of the camera.
    """
    x, y, z = np.asarray(rays, np.float64).T
    zero = np.zeros_like(x)
    # Rodrigues' formula for the turn of (x, y, z) to (0, 0, 1), about their cross product.
    rows = ((zero, zero, -x), (zero, zero, -y), (x, y, zero))
    cross = np.moveaxis(np.array(rows), -1, 0)
    turn = np.eye(3) + cross + cross @ cross / (1.0 + z)[:, None, None]
    flip = np.array([1.0, -1.0, -1.0])  # as of `output_pose`
    return flip[:, None] * turn * flip


def output_pose(points_camera_mm: Float[np.ndarray, "B N 3"]) -> Float[np.ndarray, "B N 3"]:
    """Camera coordinates as the poses of this package: from the hip, the first joint; y up."""
    return (points_camera_mm - points_camera_mm[:, :1]) * np.array([1.0, -1.0, -1.0])
