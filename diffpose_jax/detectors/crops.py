"""Square crops: around joints, out of pictures, and their pixels as cells of a heatmap.

Pixels have x right and y down. A crop may reach beyond the picture. A heatmap covers its crop with
64 x 64 cells whose values belong to whole-number coordinates, without a half-pixel shift, as in the
targets of HRNet's training: the argmax of an exact detector stands in column `round(x)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real, UInt8
from PIL import Image

from diffpose_jax.skeleton import HEATMAP_SIZE

CROP_SCALE = 1.2
"""Side of a crop over the larger extent of the projected joints, as published."""


class Crop(NamedTuple):
    """A batch of square crops: left upper corners (x, y) and sides, whole pixels."""

    corner_px: Real[np.ndarray, "B 2"]
    side_px: Real[np.ndarray, " B"]

    @property
    def middle_px(self) -> Float[np.ndarray, "B 2"]:
        """The squares' centres."""
        return self.corner_px + self.side_px[:, None] / 2


def square_crop(keypoints_px: Real[np.ndarray, "B N 2"], scale: float = CROP_SCALE) -> Crop:
    """The crop of the published preprocessing around projected joints.

    The square is centred on the joints' bounding box, and its side is `scale` times the box's
    larger extent. The published program takes all 32 joints of the raw files, which differ from
    Human3.6M's 17 by toes and fingers.
    """
    low, high = keypoints_px.min(axis=1), keypoints_px.max(axis=1)
    side = np.maximum(np.round(scale * (high - low).max(axis=-1)), 1.0)
    return Crop(np.round((low + high) / 2 - side[:, None] / 2), side)


def square_crop_image(
    image: np.ndarray,
    corner_px: Real[np.ndarray, " 2"],
    side_px: int | float | np.number,
    size: int,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Cuts a square out of an RGB picture and resizes it; it is black beside the picture.

    Bilinear with antialiasing: where the crop shrinks, a pixel averages all that it covers. The
    published program resizes with torchvision, which does so since its version 0.17.

    Raises:
      ValueError: if the image is not (H, W, 3) uint8, or the square has no part of it.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    (height, width), side = image.shape[:2], round(float(side_px))
    left, top = (round(float(value)) for value in corner_px)
    if side < 1 or not (-side < left < width and -side < top < height):
        raise ValueError(
            f"a square of {side} px at ({left}, {top}) has no part of an image of {width} x"
            f" {height} px"
        )
    # The part first: Pillow copies what it is given.
    x, y = max(left, 0), max(top, 0)
    part = Image.fromarray(np.ascontiguousarray(image[y : top + side, x : left + side]))
    square = part.crop((left - x, top - y, left - x + side, top - y + side))
    return np.array(square.resize((size, size), Image.Resampling.BILINEAR))


def pixels_to_cells(
    pixels: Real[np.ndarray, "*B N 2"],
    corner_px: Real[np.ndarray, "*B 2"],
    side_px: Real[np.ndarray, "*B"] | float,
) -> Float[np.ndarray, "*B N 2"]:
    """Pixels of a picture as heatmap cells; outside [-0.5, 63.5) is outside of the heatmap."""
    corner, side = np.asarray(corner_px)[..., None, :], np.asarray(side_px)[..., None, None]
    return HEATMAP_SIZE * (pixels - corner) / side


def cells_to_pixels(
    cells: Real[np.ndarray, "*B N 2"],
    corner_px: Real[np.ndarray, "*B 2"],
    side_px: Real[np.ndarray, "*B"] | float,
) -> Float[np.ndarray, "*B N 2"]:
    """Heatmap cells as pixels of the picture, the inverse of `pixels_to_cells`."""
    corner, side = np.asarray(corner_px)[..., None, :], np.asarray(side_px)[..., None, None]
    return cells * side / HEATMAP_SIZE + corner
