"""Finds one person's joints in a picture: crops that a detector looks at."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from diffpose_jax.data import cameras
from diffpose_jax.detectors import Detector, crops
from diffpose_jax.detectors.crops import Crop
from diffpose_jax.skeleton import HEATMAP_SIZE, MPII_JOINTS

# Heatmaps are about as high as sure: 0.9 is usual for a joint in view. Measured with
# EfficientPose on 14 pictures without a person and one of a man cut off at the hips: in the last
# crop, at most 2 maps were higher than 0.3, and 8. MoveNet, three of whose maps are always 0, found
# nobody in 21 pictures without a person, nor in these mirrored.
_FOUND = 0.3
_FEWEST_JOINTS = 6
# Of fewer pixels than the heatmap has cells a detector imagines people.
_SMALLEST_CROP_PX = HEATMAP_SIZE
# The first crop around what was found is wider than the last: a joint may have been missed.
_WIDE_SCALE = 1.5
_HEAD = MPII_JOINTS.index("Head")
_TRUNK = [MPII_JOINTS.index(name) for name in ("RHip", "LHip", "RShoulder", "LShoulder")]


class PredictionError(ValueError):
    """There is nothing to make poses of; the message says why."""


class Box(NamedTuple):
    """A rectangle in a picture, in pixels: left, upper, width, height."""

    x: float
    y: float
    width: float
    height: float

    @classmethod
    def parse(cls, text: str) -> Box:
        """Reads "x,y,w,h".

        Raises:
          PredictionError: if the text is not four numbers, or the box has no area.
        """
        try:
            box = cls(*map(float, text.split(",")))
        except (TypeError, ValueError) as error:
            raise PredictionError(f"a box is x,y,w,h in pixels, not {text!r}") from error
        if not all(map(math.isfinite, box)) or box.width <= 0 or box.height <= 0:
            raise PredictionError(f"the box {text!r} has no area: it is x,y,w,h in pixels")
        return box

    def crop(self, image: UInt8[np.ndarray, "H W 3"]) -> Crop:
        """The square around the part of the box that lies in a picture.

        Raises:
          PredictionError: if no part of it does.
        """
        height, width = image.shape[:2]
        left, top = max(self.x, 0.0), max(self.y, 0.0)
        right, bottom = min(self.x + self.width, width), min(self.y + self.height, height)
        if right - left < 1 or bottom - top < 1:
            raise PredictionError(
                f"the box {','.join(f'{value:g}' for value in self)} lies outside of the picture,"
                f" which has {width} x {height} px"
            )
        return crops.square_crop(np.array([[[left, top], [right, bottom]]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """What was found of one person.

    Attributes:
      heatmaps: MPII joint order.
      crop: a batch of one, the square of the picture that they cover; None without a picture.
      image: that square; None without a picture.
      ray: unit vector from the camera to the crop's centre, in camera coordinates; None if the
        focal length is not known.
    """

    heatmaps: Float[np.ndarray, "16 64 64"]
    crop: Crop | None = None
    image: UInt8[np.ndarray, "P P 3"] | None = None
    ray: Float[np.ndarray, " 3"] | None = None

    @property
    def heights(self) -> Float[np.ndarray, 16]:
        """The height of each map's highest cell."""
        return self.heatmaps.max(axis=(1, 2))

    @property
    def joints_px(self) -> Float[np.ndarray, "16 2"]:
        """X and y of the highest cells in the picture."""
        if self.crop is None:
            raise ValueError("these heatmaps are of no picture")
        cells = self.heatmaps.reshape(len(self.heatmaps), -1).argmax(axis=-1)
        column_row = np.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1)
        return crops.cells_to_pixels(column_row[None], *self.crop)[0]

    @property
    def is_found(self) -> Bool[np.ndarray, 16]:
        """Which joints the detector is fairly sure of."""
        return self.heights >= _FOUND


def detect(
    detector: Detector,
    image: UInt8[np.ndarray, "H W 3"],
    box: Box | None = None,
    focal_px: float | None = None,
) -> Detection:
    """Finds one person's joints.

    With a box, the crop is the square around it, `crops.CROP_SCALE` times as wide as what models
    are trained on. Without, the whole picture, padded to a square, is looked at first, and, if
    nobody is seen there, nine overlapping parts of half its side; then a wide crop around the
    joints that were found, at last one of that scale.

    Args:
      detector: the detector.
      image: RGB.
      box: where the person is; only the part within the picture counts.
      focal_px: the camera's focal length, if it is known; its axis goes through the picture's
        centre.

    Raises:
      PredictionError: if the box lies outside of the picture, or nobody is there.
    """
    look = functools.partial(_look, detector, image)
    if box is not None:
        found = look(box.crop(image))
    else:
        found = _search(look, image)
        for scale in (_WIDE_SCALE, crops.CROP_SCALE):
            seen_px = _outline_px(found)
            if not len(seen_px) or scale * np.ptp(seen_px, axis=0).max() < _SMALLEST_CROP_PX:
                raise PredictionError(_nobody(found, box))
            found = look(crops.square_crop(seen_px[None], scale))
    if found.is_found.sum() < _FEWEST_JOINTS:
        raise PredictionError(_nobody(found, box))
    if focal_px is None or found.crop is None:
        return found
    centre_px = np.array([[image.shape[1] / 2, image.shape[0] / 2]])
    ray = cameras.rays(found.crop.middle_px, np.array([focal_px]), centre_px)[0]
    return dataclasses.replace(found, ray=ray)


def _outline_px(found: Detection) -> Float[np.ndarray, "N 2"]:
    """What a crop is put around: the joints that were seen, and a head that has no map.

    Without the head, where a detector knows none (MoveNet), crops would be smaller than those that
    models are trained on: by 12 % in the median of the embedded motion capture. With the head half
    a trunk above the shoulders they differ by 2 % in the mean.
    """
    seen_px = found.joints_px[found.is_found]
    if found.heights[_HEAD] > 0 or not found.is_found[_TRUNK].all():
        return seen_px
    hips, shoulders = found.joints_px[_TRUNK].reshape(2, 2, 2).mean(axis=1)
    return np.append(seen_px, [shoulders + (shoulders - hips) / 2], axis=0)


def _nobody(found: Detection, box: Box | None) -> str:
    where, hint = "in the box", ""
    if box is None:
        where, hint = "in the picture", ". Is the person small? Say where: --box x,y,w,h"
    return (
        f"nobody was found {where}: {found.is_found.sum()} of 16 joints were seen (a height of"
        f" {_FOUND}), too few or too close together{hint}"
    )


def _look(detector: Detector, image: np.ndarray, crop: Crop) -> Detection:
    square = crops.square_crop_image(image, crop.corner_px[0], crop.side_px[0], detector.input_px)
    return Detection(detector.heatmaps(square[None])[0], crop, square)


def _search(look: Callable[[Crop], Detection], image: np.ndarray) -> Detection:
    """The whole picture, or the part of it where most is seen."""
    height, width = image.shape[:2]
    whole = crops.square_crop(np.array([[[0, 0], [width, height]]]), scale=1.0)
    found = look(whole)
    if found.is_found.sum() >= _FEWEST_JOINTS:
        return found
    side = max(height, width) / 2
    centres = np.array([[x, y] for x in (1, 2, 3) for y in (1, 2, 3)]) * side / 2
    centres += whole.corner_px[0]
    inside = np.all((centres > 0) & (centres < [width, height]), axis=1)
    parts = [
        look(crops.square_crop(np.array([[centre - side / 2, centre + side / 2]]), scale=1.0))
        for centre in centres[inside]
    ]
    return max([found, *parts], key=lambda part: part.heights.sum())
