"""Pinhole cameras like Human3.6M's, square crops and the coordinates of poses and heatmaps.

World coordinates are millimetres with z up; camera coordinates are millimetres with x right,
y down and z forward, as in Human3.6M; pixels have x right and y down. Everything is numpy and
vectorised over a leading batch axis B. Human3.6M's lens distortion (under 2 px at the people)
is left out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from diffpose_jax.skeleton import HEATMAP_SIZE

CROP_SCALE = 1.2
"""Side of a crop over the larger extent of the projected joints, as published."""


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """Distribution of cameras around a person; the defaults follow Human3.6M's four cameras.

    Attributes:
        focal_length_px_min: Smallest focal length (Human3.6M: 1143.5 to 1149.8 px).
        focal_length_px_max: Largest focal length.
        centre_x_px: Mean principal point, x (images of 1000 x 1000 px).
        centre_y_px: Mean principal point, y.
        centre_std_px: Standard deviation of the principal point on either axis.
        distance_mm_min: Smallest horizontal distance of camera and subject.
        distance_mm_max: Largest horizontal distance.
        height_mm_min: Lowest camera above the floor.
        height_mm_max: Highest camera above the floor.
        offset_mm: Largest horizontal distance of the subject from the optical axis; what the
            camera looks at is drawn uniformly in +- this, so people stand anywhere in the image.
        target_height_mm_min: Lowest point above the floor at which a camera looks.
        target_height_mm_max: Highest such point.
        roll_std_degrees: Standard deviation of the rotation about the optical axis.
    """

    focal_length_px_min: float = 1143.0
    focal_length_px_max: float = 1150.0
    centre_x_px: float = 512.0
    centre_y_px: float = 508.0
    centre_std_px: float = 5.0
    distance_mm_min: float = 4000.0
    distance_mm_max: float = 6500.0
    height_mm_min: float = 1300.0
    height_mm_max: float = 1700.0
    offset_mm: float = 900.0
    target_height_mm_min: float = 700.0
    target_height_mm_max: float = 1100.0
    roll_std_degrees: float = 1.0


class Camera(NamedTuple):
    """A batch of pinhole cameras.

    Attributes:
        rotation: (B, 3, 3), world to camera; its rows are the camera's axes in the world.
        position_mm: (B, 3), the camera's centre in the world.
        focal_px: (B,), focal length.
        centre_px: (B, 2), principal point.
    """

    rotation: np.ndarray
    position_mm: np.ndarray
    focal_px: np.ndarray
    centre_px: np.ndarray


class Crop(NamedTuple):
    """A batch of square crops.

    Attributes:
        corner_px: (B, 2), the left upper corner, whole pixels.
        side_px: (B,), the side, whole pixels.
    """

    corner_px: np.ndarray
    side_px: np.ndarray


def look_at(position_mm: np.ndarray, target_mm: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Gives the rotation of cameras that look at a point.

    Args:
        position_mm: (B, 3), centres of the cameras in the world.
        target_mm: (B, 3), the points in the world that the optical axes pass through; not
            straight above or below the camera.
        roll: (B,), rotation about the optical axis in radians.

    Returns:
        (B, 3, 3), world to camera (x right, y down, z forward).
    """
    forward = target_mm - position_mm
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll)[:, None], np.sin(roll)[:, None]
    return np.stack([cos * right + sin * down, cos * down - sin * right, forward], axis=1)


def sample_cameras(
    rng: np.random.Generator, subjects_mm: np.ndarray, config: CameraConfig
) -> Camera:
    """Draws one camera for each subject, from any side of it (uniform azimuth).

    Args:
        rng: Source of randomness.
        subjects_mm: (B, 3), where the subjects stand in the world; only x and y count.
        config: The distribution of the cameras.

    Returns:
        The cameras.
    """
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


def world_to_camera(points_mm: np.ndarray, camera: Camera) -> np.ndarray:
    """Changes points (B, J, 3) from world to camera coordinates, millimetres."""
    return (points_mm - camera.position_mm[:, None]) @ camera.rotation.swapaxes(1, 2)


def project(points_camera_mm: np.ndarray, camera: Camera) -> np.ndarray:
    """Projects points onto the image.

    Args:
        points_camera_mm: (B, J, 3), camera coordinates.
        camera: The cameras.

    Returns:
        (B, J, 2), pixels.

    Raises:
        ValueError: If a point lies less than 100 mm before the camera, or behind it.
    """
    nearest = float(points_camera_mm[..., 2].min(initial=np.inf))
    if nearest < 100.0:
        raise ValueError(
            f"A point lies {nearest:.0f} mm along a camera's axis: nothing nearer than 100 mm can "
            "be projected. Move the cameras away from the subject (distance_mm_min)."
        )
    xy = points_camera_mm[..., :2] / points_camera_mm[..., 2:]
    return xy * camera.focal_px[:, None, None] + camera.centre_px[:, None]


def square_crop(keypoints_px: np.ndarray, scale: float = CROP_SCALE) -> Crop:
    """Cuts the published preprocessing's crop around projected joints.

    The square is centred on the joints' bounding box, its side is `scale` times the box's larger
    extent, corner and side are rounded to whole pixels. The published program takes all 32 joints
    of the raw files; here it is Human3.6M's 17, which differ by toes and fingers.

    Args:
        keypoints_px: (B, J, 2), projected joints.
        scale: Side over the larger extent.

    Returns:
        The crops; they may reach beyond the image.
    """
    low, high = keypoints_px.min(axis=1), keypoints_px.max(axis=1)
    side = np.maximum(np.round(scale * (high - low).max(axis=-1)), 1.0)
    return Crop(np.round((low + high) / 2 - side[:, None] / 2), side)


def to_heatmap(keypoints_px: np.ndarray, crop: Crop) -> np.ndarray:
    """Changes image pixels into heatmap cells.

    A cell's value belongs to the whole-number coordinate: the argmax of an exact detector stands
    in column `round(x)`, as in the targets that HRNet is trained on.

    Args:
        keypoints_px: (B, J, 2), pixels.
        crop: What the heatmap covers, in 64 x 64 cells.

    Returns:
        (B, J, 2), x (column) and y (row) in cells; outside [-0.5, 63.5) is outside the heatmap.
    """
    cells = HEATMAP_SIZE * (keypoints_px - crop.corner_px[:, None])
    return cells / crop.side_px[:, None, None]


def output_pose(points_camera_mm: np.ndarray) -> np.ndarray:
    """Changes camera coordinates into the poses that the project works with.

    Args:
        points_camera_mm: (B, 17, 3), camera coordinates, the hip first.

    Returns:
        (B, 17, 3), millimetres from the hip; x right, y up, z towards the camera.
    """
    return (points_camera_mm - points_camera_mm[:, :1]) * np.array([1.0, -1.0, -1.0])
