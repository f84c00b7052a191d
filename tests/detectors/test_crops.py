"""Square crops around joints and of pictures, and pixels to heatmap cells and back."""

import numpy as np
import pytest

from diffpose_jax.detectors import crops


def random_image(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def triangle_weights(size, side):
    """(size, side): antialiased bilinear resampling of one axis, from its definition."""
    scale = side / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(side) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def test_a_crop_holds_all_joints_with_the_published_margin():
    rng = np.random.default_rng(3)
    keypoints = rng.uniform(100, 900, (300, 1, 2)) + rng.uniform(-200, 200, (300, 17, 2))
    crop = crops.square_crop(keypoints)
    for values in crop:
        np.testing.assert_array_equal(values, np.round(values))
    extent = np.ptp(keypoints, axis=1)
    np.testing.assert_allclose(crop.side_px, 1.2 * extent.max(-1), atol=0.5)
    centre = crop.corner_px + crop.side_px[:, None] / 2
    middle = (keypoints.min(1) + keypoints.max(1)) / 2
    np.testing.assert_allclose(centre, middle, atol=0.5 + 1e-9)
    cells = crops.pixels_to_cells(keypoints, *crop)
    # A margin of a twelfth on either side: 5.33 cells, up to the rounding.
    np.testing.assert_allclose(cells.min((1, 2)), 64 / 12, atol=0.4)
    np.testing.assert_allclose(cells.max((1, 2)), 64 - 64 / 12, atol=0.4)
    np.testing.assert_allclose(crops.cells_to_pixels(cells, *crop), keypoints, atol=1e-9)


@pytest.mark.parametrize(
    ("corner", "side"), [((13, 5), 30), ((-7, -4), 30), ((45, 20), 30), ((-9, -12), 90)]
)
def test_a_square_of_the_results_size_is_cut_out_and_black_beside_the_picture(corner, side):
    image = random_image(2, 40, 60)
    around = np.zeros((240, 260, 3), np.uint8)
    around[50:90, 50:110] = image
    x, y = 50 + corner[0], 50 + corner[1]
    crop = crops.square_crop_image(image, np.array(corner), float(side), side)
    np.testing.assert_array_equal(crop, around[y : y + side, x : x + side])


@pytest.mark.parametrize("size", [16, 45, 100])
def test_resizing_is_bilinear_and_antialiased(size):
    image = random_image(4, 64, 80)
    crop = crops.square_crop_image(image, np.array([10, 0]), 64, size)
    weights = triangle_weights(size, 64)
    expected = np.einsum("ay,bx,yxc->abc", weights, weights, image[:, 10:74])
    assert crop.shape == (size, size, 3)
    # Pillow rounds after each of the two axes.
    assert np.abs(crop - expected).max() < 1.2


def test_only_the_square_of_a_big_picture_is_copied():
    """A view of 3 terabytes: cut before anything else, or out of memory."""
    image = np.broadcast_to(np.uint8(7), (10**6, 10**6, 3))
    crop = crops.square_crop_image(image, np.array([500_000, 999_900]), 200, 50)
    assert (crop[:24] == 7).all()
    assert (crop[26:] == 0).all()


@pytest.mark.parametrize(
    ("image", "corner", "side", "problem"),
    [
        (np.zeros((40, 60, 4), np.uint8), (0, 0), 10, r"\(40, 60, 4\)"),
        (np.zeros((40, 60, 3), np.float32), (0, 0), 10, "float32"),
        (np.zeros((40, 60, 3), np.uint8), (60, 0), 10, r"at \(60, 0\) .* 60 x 40 px"),
        (np.zeros((40, 60, 3), np.uint8), (0, -10), 10, r"10 px at \(0, -10\)"),
        (np.zeros((40, 60, 3), np.uint8), (0, 0), 0, "0 px"),
    ],
)
def test_what_cannot_be_cut(image, corner, side, problem):
    with pytest.raises(ValueError, match=problem):
        crops.square_crop_image(image, np.array(corner), side, 32)


def test_a_dot_of_the_picture_stands_in_its_cell():
    """A crop of 64 pixels is a picture of the cells: corner, scale and axes agree."""
    image = np.zeros((300, 400, 3), np.uint8)
    image[150:154, 120:124] = 255
    corner, side = np.array([20.0, -30.0]), 256.0
    crop = crops.square_crop_image(image, corner, side, 64)
    row, column = np.unravel_index(np.argmax(crop[..., 0]), (64, 64))
    cell = crops.pixels_to_cells(np.array([[120.0, 150.0]]), corner, side)[0]
    np.testing.assert_array_equal([column, row], cell)
