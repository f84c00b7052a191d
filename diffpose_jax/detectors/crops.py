"""Square crops out of pictures, and between pixels of a picture and cells of a heatmap.

Pixels have x right and y down. A crop is a corner (left, upper) and a side in whole pixels; it
may reach beyond the picture. A heatmap covers its crop with 64 x 64 cells whose values belong to
whole-number coordinates, without a half-pixel shift, as in the targets that HRNet is trained on.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffpose_jax.skeleton import HEATMAP_SIZE


def square_crop_image(
    image: np.ndarray, corner_px: np.ndarray, side_px: float, size: int
) -> np.ndarray:
    """Cuts a square out of a picture and resizes it.

    Bilinear with antialiasing: where the crop shrinks, a pixel averages all that it covers. The
    published program resizes with torchvision, which does the same since its version 0.17 and
    took four neighbours alone before.

    Args:
        image: (H, W, 3) uint8, RGB.
        corner_px: (2,), x and y of the left upper corner, whole pixels.
        side_px: The side, whole pixels.
        size: Side of the result.

    Returns:
        (size, size, 3) uint8; black where the square lies outside of the picture.

    Raises:
        ValueError: If the image is not such an image, or the square is none or lies beside it.
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


def pixels_to_cells(pixels: np.ndarray, corner_px: np.ndarray, side_px: np.ndarray) -> np.ndarray:
    """Changes pixels of a picture into heatmap cells.

    Args:
        pixels: (..., J, 2), x and y.
        corner_px: (..., 2), the crops' left upper corners.
        side_px: (...), their sides.

    Returns:
        (..., J, 2), x (column) and y (row); outside [-0.5, 63.5) is outside the heatmap.
    """
    corner, side = np.asarray(corner_px)[..., None, :], np.asarray(side_px)[..., None, None]
    return HEATMAP_SIZE * (pixels - corner) / side


def cells_to_pixels(cells: np.ndarray, corner_px: np.ndarray, side_px: np.ndarray) -> np.ndarray:
    """Changes heatmap cells (..., J, 2) into pixels, the inverse of `pixels_to_cells`."""
    corner, side = np.asarray(corner_px)[..., None, :], np.asarray(side_px)[..., None, None]
    return cells * side / HEATMAP_SIZE + corner
