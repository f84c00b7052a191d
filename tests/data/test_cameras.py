"""Projection against plain formulas in float64; crops and coordinates."""

import numpy as np
import pytest

from diffpose_jax.data import cameras


def draw(batch=200, seed=0, **changes):
    rng = np.random.default_rng(seed)
    subjects = np.zeros((batch, 3))
    subjects[:, :2] = rng.uniform(-500, 500, (batch, 2))
    camera = cameras.sample_cameras(rng, subjects, cameras.CameraConfig(**changes))
    points = subjects[:, None] + rng.uniform(-500, 500, (batch, 17, 3)) + [0, 0, 900]
    return subjects, camera, points


def test_rotations_are_rotations():
    _, camera, _ = draw()
    identity = camera.rotation @ camera.rotation.swapaxes(1, 2)
    np.testing.assert_allclose(identity, np.eye(3)[None].repeat(200, 0), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(camera.rotation), 1.0)


def test_axes_of_a_known_camera():
    # At y = -5 m, looking along +y from 1.5 m: right is +x, down is -z.
    position = np.array([[0.0, -5000.0, 1500.0]])
    rotation = cameras.look_at(position, np.array([[0.0, 0.0, 1500.0]]), np.zeros(1))
    camera = cameras.Camera(rotation, position, np.array([1000.0]), np.array([[500.0, 510.0]]))
    points = np.array([[[100.0, 0.0, 1500.0], [0.0, 0.0, 1600.0], [0.0, 1000.0, 1500.0]]])
    seen = cameras.world_to_camera(points, camera)
    np.testing.assert_allclose(seen[0], [[100, 0, 5000], [0, -100, 5000], [0, 0, 6000]], atol=1e-9)
    pixels = cameras.project(seen, camera)
    np.testing.assert_allclose(pixels[0], [[520, 510], [500, 490], [500, 510]], atol=1e-9)
    pose = cameras.output_pose(seen)
    np.testing.assert_allclose(pose[0], [[0, 0, 0], [-100, 100, 0], [-100, 0, -1000]], atol=1e-9)


def test_projection_equals_the_projection_matrix():
    _, camera, points = draw(seed=1)
    for i in range(20):
        intrinsic = np.array(
            [
                [camera.focal_px[i], 0, camera.centre_px[i, 0]],
                [0, camera.focal_px[i], camera.centre_px[i, 1]],
                [0, 0, 1],
            ]
        )
        extrinsic = np.column_stack(
            [camera.rotation[i], -camera.rotation[i] @ camera.position_mm[i]]
        )
        homogeneous = np.column_stack([points[i], np.ones(17)]) @ (intrinsic @ extrinsic).T
        expected = homogeneous[:, :2] / homogeneous[:, 2:]
        pixels = cameras.project(cameras.world_to_camera(points, camera), camera)[i]
        np.testing.assert_allclose(pixels, expected, rtol=1e-9)


def test_sampled_cameras_stand_as_configured():
    subjects, camera, _ = draw(2000, seed=2)
    distance = np.linalg.norm(camera.position_mm[:, :2] - subjects[:, :2], axis=-1)
    assert distance.min() >= 4000
    assert distance.max() <= 6500
    assert camera.position_mm[:, 2].min() >= 1300
    assert camera.position_mm[:, 2].max() <= 1700
    # From all sides, looking down, the horizon level, the subject anywhere in the image.
    azimuth = np.arctan2(*(camera.position_mm - subjects)[:, 1::-1].T)
    assert abs(np.exp(1j * azimuth).mean()) < 0.06
    assert camera.rotation[:, 2, 2].max() < 0.0
    assert np.abs(camera.rotation[:, 0, 2]).max() < np.radians(5)
    hips = subjects[:, None] + [0, 0, 900]
    pixels = cameras.project(cameras.world_to_camera(hips, camera), camera)[:, 0]
    assert 60 < pixels[:, 0].std() < 200
    assert pixels.min() > 200
    assert pixels.max() < 850


def test_too_near_is_an_error():
    _, camera, points = draw(5)
    with pytest.raises(ValueError, match="nothing nearer than 100 mm"):
        cameras.project(cameras.world_to_camera(points, camera) * [1, 1, -1], camera)


def test_crop_holds_all_joints_with_the_published_margin():
    rng = np.random.default_rng(3)
    keypoints = rng.uniform(100, 900, (300, 1, 2)) + rng.uniform(-200, 200, (300, 17, 2))
    crop = cameras.square_crop(keypoints)
    np.testing.assert_array_equal(crop.corner_px, np.round(crop.corner_px))
    np.testing.assert_array_equal(crop.side_px, np.round(crop.side_px))
    extent = np.ptp(keypoints, axis=1)
    np.testing.assert_allclose(crop.side_px, 1.2 * extent.max(-1), atol=0.5)
    centre = crop.corner_px + crop.side_px[:, None] / 2
    middle = (keypoints.min(1) + keypoints.max(1)) / 2
    np.testing.assert_allclose(centre, middle, atol=0.5 + 1e-9)
    cells = cameras.to_heatmap(keypoints, crop)
    # A margin of a twelfth on either side: 5.33 cells, up to the rounding.
    np.testing.assert_allclose(cells.min((1, 2)), 64 / 12, atol=0.4)
    np.testing.assert_allclose(cells.max((1, 2)), 64 - 64 / 12, atol=0.4)


def test_heatmap_cells():
    crop = cameras.Crop(np.array([[100.0, 200.0]]), np.array([128.0]))
    cells = cameras.to_heatmap(np.array([[[100.0, 200.0], [228.0, 328.0], [164.0, 210.0]]]), crop)
    np.testing.assert_allclose(cells[0], [[0, 0], [64, 64], [32, 5]])
