"""Where the joints of a person are found in a picture, and when nobody is."""

import numpy as np
import pytest
from people import COLOURS, GREY, ColourDetector, person, picture

from diffpose_jax.prediction.finder import Box, PredictionError, detect
from diffpose_jax.skeleton import MPII_JOINTS


def assert_found(found, xy, corners=None, atol=None):
    """Joints to half a cell of the heatmap and a pixel; the crop is a fifth larger."""
    assert found.is_found.all()
    np.testing.assert_allclose(found.heights, 0.9, atol=0.1)
    assert np.abs(found.joints_px - xy).max() <= 0.5 * found.crop.side_px[0] / 64 + 1.5
    corners = (xy.min(0), xy.max(0)) if corners is None else corners
    extent = np.ptp(corners, axis=0).max()
    atol = atol or 0.04 * extent
    assert found.crop.side_px[0] == pytest.approx(1.2 * extent, abs=1.5 * atol)
    centre = found.crop.corner_px[0] + found.crop.side_px[0] / 2
    np.testing.assert_allclose(centre, np.mean(corners, axis=0), atol=atol)


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "size"),
    [
        (301, 457, (40, 30), (180, 270), 14),  # odd sizes, at the left
        (901, 240, (30, 600), (200, 880), 16),  # high: in the padded square the person is small
        (500, 640, (400, 90), (520, 250), 8),  # small: looked for in parts
        (200, 200, (8, 8), (192, 192), 14),  # all of it
    ],
)
def test_joints_are_where_they_were_put(height, width, low, high, size):
    xy = person(0, low, high, size)
    detector = ColourDetector()
    found = detect(detector, picture(height, width, xy, size=size))
    assert_found(found, xy)
    assert found.image.shape == (160, 160, 3)
    assert (len(detector.looks) > 3) == (size == 8) or height > 900


@pytest.mark.parametrize(("low", "high"), [((240, 120), (392, 292)), ((8, 130), (150, 292))])
def test_a_box_at_the_border(low, high):
    """It reaches beyond the picture; the part within counts."""
    xy = person(2, low, high, 12)
    low, high = np.array(low), np.array(high)
    box = np.where(low < 20, low - 60, low), np.where(high > [380, 280], high + 60, high)
    detector = ColourDetector()
    found = detect(detector, picture(300, 400, xy, size=12), Box(*box[0], *(box[1] - box[0])))
    assert_found(found, xy, np.clip(box, 0, [400, 300]), atol=0.6)
    assert len(detector.looks) == 1


def test_nobody():
    blank = np.full((200, 300, 3), GREY, np.uint8)
    with pytest.raises(PredictionError, match=r"nobody was found in the picture: 0 of 16.*--box"):
        detect(ColourDetector(), blank)
    with pytest.raises(PredictionError, match="nobody was found in the box: 0 of 16"):
        detect(ColourDetector(), blank, Box(10, 10, 100, 100))


def test_six_joints_are_somebody_and_five_nobody():
    xy = person(4, (40, 30), (150, 190), 12)
    image = picture(220, 300, xy, size=12)
    for x, y in xy[6:]:
        image[round(y) - 7 : round(y) + 7, round(x) - 7 : round(x) + 7] = GREY
    assert detect(ColourDetector(), image).is_found.sum() == 6
    image[: round(xy[0, 1]) + 8, : round(xy[0, 0]) + 8] = GREY
    with pytest.raises(PredictionError, match="nobody"):
        detect(ColourDetector(), image)


def test_joints_in_one_place_are_nobody():
    class Point(ColourDetector):
        def heatmap(self, crop, colour):
            blob = np.exp(-((np.arange(64) - 30.0) ** 2) / 2)
            return np.float32(0.9 * blob * blob[:, None])

    with pytest.raises(PredictionError, match="too close together"):
        detect(Point(), np.full((200, 300, 3), GREY, np.uint8))


def test_a_head_without_a_map_is_in_the_crop_all_the_same():
    """It is put half a trunk above the shoulders, here where it is."""
    places = {"RHip": (110, 180), "LHip": (150, 180), "Head": (130, 60), "Thorax": (130, 90)}
    places |= {"RShoulder": (110, 100), "LShoulder": (150, 100)}
    others = iter((60 + 15 * i, 260 - 10 * (i % 2)) for i in range(10))
    xy = np.array([places.get(name) or next(others) for name in MPII_JOINTS])

    class Headless(ColourDetector):
        def heatmap(self, crop, colour):
            known = not np.array_equal(colour, COLOURS[MPII_JOINTS.index("Head")])
            return known * super().heatmap(crop, colour)

    image = picture(320, 300, xy, size=9)
    whole, found = (detect(detector(), image) for detector in (ColourDetector, Headless))
    assert (whole.is_found.sum(), found.is_found.sum()) == (16, 15)
    np.testing.assert_allclose(found.crop.corner_px, whole.crop.corner_px, atol=3)
    np.testing.assert_allclose(found.crop.side_px, whole.crop.side_px, atol=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "a box is x,y,w,h in pixels, not '1,2,3'"),
        ("1,2,3,-4", "has no area"),
        ("nan,0,1,1", "has no area"),
        ("300,0,10,10", "lies outside of the picture, which has 300 x 200 px"),
    ],
)
def test_boxes_that_cannot_be(text, message):
    with pytest.raises(PredictionError, match=message):
        Box.parse(text).crop(np.zeros((200, 300, 3), np.uint8))


def test_the_ray_to_the_crop():
    """Of a pinhole camera that looks through the middle of the picture."""
    xy = person(3, (240, 60), (370, 270), 12)
    found = detect(ColourDetector(), picture(300, 400, xy, size=12), focal_px=500.0)
    x, y = found.crop.corner_px[0] + found.crop.side_px[0] / 2
    expected = np.array([x - 200, y - 150, 500])
    np.testing.assert_allclose(found.ray, expected / np.linalg.norm(expected), atol=1e-12)
    assert detect(ColourDetector(), picture(300, 400, xy, size=12)).ray is None
