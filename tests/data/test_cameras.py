"""Projection against plain formulas in float64, and where cameras stand."""

import numpy as np
import pytest

from diffpose_jax.data import cameras


def draw(batch, seed):
    rng = np.random.default_rng(seed)
    subjects = np.zeros((batch, 3))
    subjects[:, :2] = rng.uniform(-500, 500, (batch, 2))
    camera = cameras.sample_cameras(rng, subjects, cameras.CameraConfig())
    points = subjects[:, None] + rng.uniform(-500, 500, (batch, 17, 3)) + [0, 0, 900]
    return subjects, camera, points


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
    _, camera, points = draw(20, seed=1)
    pixels = cameras.project(cameras.world_to_camera(points, camera), camera)
    for i in range(20):
        intrinsic = np.diag([camera.focal_px[i], camera.focal_px[i], 1.0])
        intrinsic[:2, 2] = camera.centre_px[i]
        translation = -camera.rotation[i] @ camera.position_mm[i]
        matrix = intrinsic @ np.column_stack([camera.rotation[i], translation])
        homogeneous = np.column_stack([points[i], np.ones(17)]) @ matrix.T
        expected = homogeneous[:, :2] / homogeneous[:, 2:]
        np.testing.assert_allclose(pixels[i], expected, rtol=1e-9)


def test_sampled_cameras_stand_as_configured():
    subjects, camera, _ = draw(2000, seed=2)
    identity = camera.rotation @ camera.rotation.swapaxes(1, 2)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(3), (2000, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(camera.rotation), 1.0)
    distance = np.linalg.norm(camera.position_mm[:, :2] - subjects[:, :2], axis=-1)
    for values, low, high in ((distance, 4000, 6500), (camera.position_mm[:, 2], 1300, 1700)):
        assert low <= values.min() < values.max() <= high
    # From all sides, looking down, the horizon level, the subject anywhere in the image.
    azimuth = np.arctan2(*(camera.position_mm - subjects)[:, 1::-1].T)
    assert abs(np.exp(1j * azimuth).mean()) < 0.06
    assert camera.rotation[:, 2, 2].max() < 0.0
    assert np.abs(camera.rotation[:, 0, 2]).max() < np.radians(5)
    hips = subjects[:, None] + [0, 0, 900]
    pixels = cameras.project(cameras.world_to_camera(hips, camera), camera)[:, 0]
    assert 60 < pixels[:, 0].std() < 200
    assert 200 < pixels.min() < pixels.max() < 850


def test_too_near_is_an_error():
    _, camera, points = draw(5, seed=0)
    with pytest.raises(ValueError, match="nothing nearer than 100 mm"):
        cameras.project(cameras.world_to_camera(points, camera) * [1, 1, -1], camera)


def test_a_ray_leads_to_its_pixel():
    _, camera, points = draw(20, seed=3)
    seen = cameras.world_to_camera(points, camera)
    pixels = cameras.project(seen, camera)
    found = cameras.rays(pixels[:, 5], camera.focal_px, camera.centre_px)
    expected = seen[:, 5] / np.linalg.norm(seen[:, 5], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_turned_poses_are_those_of_a_camera_that_looks_along_the_ray():
    rng = np.random.default_rng(4)
    rays = rng.normal(size=(50, 3)) * [0.4, 0.4, 0.0] + [0, 0, 1]
    rays[0] = [0, 0, 1]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    turns = cameras.turns_to(rays)
    np.testing.assert_allclose(turns[0], np.eye(3), atol=1e-12)
    identity = np.broadcast_to(np.eye(3), turns.shape)
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), identity, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1.0)
    # A point on the ray lies straight ahead, which is along -z in a pose's axes.
    points = np.stack([np.zeros_like(rays), 700 * rays], axis=1)
    ahead = cameras.output_pose(points) @ turns.swapaxes(1, 2)
    np.testing.assert_allclose(ahead[:, 1], np.tile([0, 0, -700], (50, 1)), atol=1e-9)
    # No turn that does this is smaller.
    angle = np.arccos((np.trace(turns, axis1=1, axis2=2) - 1) / 2)
    np.testing.assert_allclose(angle[1:], np.arccos(rays[1:, 2]), atol=1e-6)
