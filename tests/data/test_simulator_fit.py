"""Fitting the simulated detector: one with known parameters is found again."""

import dataclasses

import numpy as np
import pytest

from diffpose_jax.data import cameras, simulator, simulator_fit
from diffpose_jax.data.motion import load_embedded
from diffpose_jax.data.simulator import SimulatorConfig
from diffpose_jax.data.simulator_fit import Labelled
from diffpose_jax.detectors import crops

TRUTH = SimulatorConfig(
    amplitude=0.7,
    amplitude_std=0.12,
    sigma=2.6,
    error=1.1,
    confusion=0.25,
    confusion_behind=0.6,
    confusion_together=0.3,
    clutter=0.15,
    background=0.008,
)


def simulated_people(rng, number):
    """Joints in camera coordinates and in cells, of recorded poses seen from all sides."""
    poses = np.concatenate([clip.positions_mm for clip in load_embedded()])
    world = np.float64(poses[rng.integers(len(poses), size=number)])
    camera = cameras.sample_cameras(rng, world[:, 0], cameras.CameraConfig())
    points_mm = cameras.world_to_camera(world, camera)
    pixels = cameras.project(points_mm, camera)
    return points_mm, crops.pixels_to_cells(pixels, *crops.square_crop(pixels))


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    points_mm, keypoints_xy = simulated_people(rng, 300)
    blobs = simulator.simulate(rng, points_mm, keypoints_xy, TRUTH).blobs
    maps = np.asarray(simulator.render(blobs))
    return Labelled(maps, points_mm, keypoints_xy, np.ones((300, 16), bool))


def test_known_parameters_are_found(labelled, monkeypatch):
    monkeypatch.setattr(simulator_fit, "_COPIES", 2)
    rng = np.random.default_rng(1)
    fitted, real, simulated = simulator_fit.fit(rng, labelled, SimulatorConfig())
    for name in ("amplitude", "amplitude_std", "sigma", "error"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUTH, name), rel=0.15), name
    assert fitted.confusion_behind == pytest.approx(0.6, abs=0.25)
    wanted, reached = simulator_fit.summary(real), simulator_fit.summary(simulated)
    for name in ("amplitude", "sigma", "error", "hidden_error", "background"):
        assert reached[name] == pytest.approx(wanted[name], rel=0.12), name
    for name in simulator_fit.CHANCES:
        assert reached[name] == pytest.approx(wanted[name], abs=0.06), name


def test_what_is_measured_of_a_made_map(labelled):
    """A Gaussian three cells beside its joint, another mode far off, and two exchanged limbs."""
    one = Labelled(*(part[:1].copy() for part in labelled))
    truth = np.round(one.keypoints_xy[0, list(simulator.MPII_TO_H36M)])
    one.keypoints_xy[0, list(simulator.MPII_TO_H36M)] = truth
    y, x = np.mgrid[:64, :64]

    def blob(height, centre, width):
        return height * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))

    placed = truth.copy()
    arms = [10, 11, 12, 13, 14, 15]
    placed[arms] = truth[arms[::-1]]
    placed[9] = truth[9] + [3, 0]
    one.heatmaps[0] = [blob(0.8, centre, 2.0) for centre in placed]
    far = np.where(placed[9] < 32, 55, 8)
    one.heatmaps[0, 9] += blob(0.4, far, 1.5)
    one.is_valid[0, 0] = False
    found = simulator_fit.measure(one, 80.0)
    np.testing.assert_allclose(found.height[0, 1:], 0.8, rtol=1e-3)
    assert np.isnan(found.height[0, 0])
    assert found.error[0, 9] == pytest.approx(3.0)
    assert found.second[0, 9] == pytest.approx(0.5, rel=1e-2)
    np.testing.assert_allclose(found.width[0, 1:6], 2.0, rtol=0.03)
    assert found.exchanged[0].tolist() == [1.0, 0.0]


def test_arms_and_legs_are_confused_together():
    rng = np.random.default_rng(2)
    points_mm, keypoints_xy = simulated_people(rng, 400)
    config = dataclasses.replace(
        SimulatorConfig(), confusion=0.0, confusion_behind=0.0, confusion_together=0.5,
        quality_std=0.0,
    )  # fmt: skip
    blobs = simulator.simulate(rng, points_mm, keypoints_xy, config).blobs
    mirrored = blobs[:, :, 1, 0] > 0
    arms, legs = mirrored[:, 10], mirrored[:, 0]
    assert 0.4 < arms.mean() < 0.6
    assert (arms == legs).mean() > 0.95  # but for joints outside of the crop
    assert not mirrored[:, 6:10].any()
