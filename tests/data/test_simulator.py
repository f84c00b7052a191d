"""The simulated detector: rendering, geometry of occlusion, statistics of its failures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.data import simulator
from diffpose_jax.data.motion import MotionConfig, load_embedded, make_examples
from diffpose_jax.evaluation.ambiguity import fit_gaussians
from diffpose_jax.skeleton import H36M_JOINTS, H36M_MIRROR, MPII_JOINTS, MPII_MIRROR, MPII_TO_H36M

EXACT = simulator.SimulatorConfig(
    quality_std=0.0, error=0.0, amplitude_std=0.0, sigma_std=0.0, hidden_unsure=0.0, missed=0.0,
    confusion=0.0, confusion_behind=0.0, neighbour=0.0, clutter=0.0, background=0.0,
)  # fmt: skip

# A person who faces the camera from 5 m, in camera axes (x right, y down, z forward); the
# person's left is the camera's right.
STANDING = {
    "Hip": (0, 0, 5000), "RHip": (-130, 0, 5000), "LHip": (130, 0, 5000),
    "RKnee": (-140, 450, 5000), "LKnee": (140, 450, 5000),
    "RAnkle": (-150, 880, 5000), "LAnkle": (150, 880, 5000),
    "Spine": (0, -230, 5000), "Thorax": (0, -480, 5000), "Nose": (0, -590, 4950),
    "Head": (0, -700, 5000),
    "LShoulder": (150, -450, 5000), "LElbow": (350, -250, 5000), "LWrist": (450, 0, 5000),
    "RShoulder": (-150, -450, 5000), "RElbow": (-350, -250, 5000), "RWrist": (-450, 0, 5000),
}  # fmt: skip


def person(**moved):
    joints = STANDING | moved
    return np.array([[joints[name] for name in H36M_JOINTS]], float)


def hidden_names(points):
    hidden = simulator.hidden_joints(points[:, MPII_TO_H36M], 80.0)[0]
    return {name for name, flag in zip(MPII_JOINTS, hidden, strict=True) if flag}


def cells_of(points):
    return 32 + 151.3 * points[..., :2] / points[..., 2:]


def detect(seed, points, config=EXACT, shift=0.0):
    rng = np.random.default_rng(seed)
    return simulator.simulate(rng, points, cells_of(points) + shift, config)


@functools.cache
def examples():
    clips = [clip for clip in load_embedded() if clip.split == "test"]
    positions = np.concatenate([clip.positions_mm for clip in clips])
    rng = np.random.default_rng(0)
    chosen = positions[rng.integers(0, len(positions), 1200)]
    made = make_examples(rng, chosen, MotionConfig())
    made["rendered"] = np.asarray(jax.jit(lambda b: simulator.render(b, jnp))(made["heatmaps"]))
    return made


def test_render_equals_the_sum_of_gaussians():
    rng = np.random.default_rng(1)
    low, high = [-0.1, -5, -5, 0.5, 0.5], [1, 70, 70, 9, 9]
    blobs = rng.uniform(low, high, (3, 16, 7, 5))
    y, x = np.mgrid[:64, :64]
    amplitude, x0, y0, sx, sy = np.moveaxis(blobs, -1, 0)[..., None, None]
    expected = (amplitude * np.exp(-((x - x0) ** 2) / 2 / sx**2 - (y - y0) ** 2 / 2 / sy**2)).sum(2)
    np.testing.assert_allclose(simulator.render(blobs), expected, atol=1e-12)
    on_device = simulator.render(jnp.asarray(blobs, jnp.float32), jnp)
    np.testing.assert_allclose(on_device, expected, atol=2e-6)


def test_hidden_joints():
    assert hidden_names(person()) == set()
    behind = {"LWrist": (30, -100, 5250), "LElbow": (260, -230, 5150)}
    assert hidden_names(person(**behind)) == {"LWrist"}
    before = {"LWrist": (30, -100, 4750), "LElbow": (260, -230, 4850)}
    # Now the forearm is what hides: the spine lies behind it.
    assert hidden_names(person(**before)) <= {"Spine", "Pelvis"}
    # A quarter turn: the person's left side comes to the front.
    x, y, z = np.moveaxis(person(), -1, 0)
    turned = hidden_names(np.stack([z - 5000, y, 5000 - x], -1))
    assert turned >= {"RHip", "RShoulder", "RKnee"}
    assert not turned & {"LKnee", "LAnkle", "LShoulder", "LElbow", "LWrist"}


def test_seen_from_behind():
    poses = np.concatenate([person(), person() * [-1, 1, 1]])[:, MPII_TO_H36M]
    np.testing.assert_allclose(simulator.seen_from_behind(poses), [0, 1], atol=1e-3)


def test_an_exact_detector_is_exact():
    points = np.concatenate([person(), person(LWrist=(30, -100, 5250))])
    cells = cells_of(points)
    heatmaps = simulator.render(detect(2, points).blobs)
    np.testing.assert_allclose(heatmaps.max((2, 3)), 0.9, atol=0.06)
    row, column = np.unravel_index(heatmaps.reshape(2, 16, -1).argmax(-1), (64, 64))
    np.testing.assert_array_equal(np.stack([column, row], -1), np.round(cells[:, MPII_TO_H36M]))
    fit = fit_gaussians(heatmaps)
    np.testing.assert_allclose(fit.centre_xy, cells[:, MPII_TO_H36M], atol=1e-2)
    np.testing.assert_allclose(fit.sigma_px, EXACT.sigma, rtol=1e-2)


def test_mirroring_the_person_mirrors_the_heatmaps():
    points = person(LWrist=(30, -100, 5250), RKnee=(-200, 300, 4700))
    mirrored = (points * [-1, 1, 1])[:, H36M_MIRROR]
    detections = [detect(3, p) for p in (points, mirrored)]
    np.testing.assert_array_equal(detections[0].hidden[:, MPII_MIRROR], detections[1].hidden)
    heatmaps = [simulator.render(found.blobs) for found in detections]
    # Column c becomes 64 - c (the image's centre is cell 32); column 0 has no partner.
    flipped = heatmaps[0][:, MPII_MIRROR, :, :0:-1]
    np.testing.assert_allclose(heatmaps[1][..., 1:], flipped, atol=1e-5)


def test_same_seed_same_detections():
    points = np.concatenate([person()] * 5)
    a, b, c = (detect(seed, points, simulator.SimulatorConfig()).blobs for seed in (4, 4, 5))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a[0], a[1])


def test_joints_outside_the_crop_are_low_and_near_the_border():
    points, shift = np.concatenate([person()] * 200), np.array([0.0, 12.0])
    found = detect(5, points, simulator.SimulatorConfig(missed=0.0), shift)
    cut = (cells_of(points) + shift)[:, MPII_TO_H36M, 1] >= 63.5
    assert cut[0].sum() == 2
    main = found.blobs[..., 0, :]
    assert np.median(main[cut][:, 0]) < 0.2
    assert np.median(main[~cut][:, 0]) > 0.8
    assert np.abs(main[cut][:, 2] - 63).max() < 15


def test_argmax_errors_are_like_a_detectors():
    made = examples()
    truth = made["keypoints_xy"][:, MPII_TO_H36M]
    inside = ((truth > -0.5) & (truth < 63.5)).all(-1)
    best = made["rendered"].reshape(len(truth), 16, -1).argmax(-1)
    error = np.linalg.norm(np.stack([best % 64, best // 64], -1) - truth, axis=-1)
    visible, hidden = error[inside & ~made["hidden"]], error[inside & made["hidden"]]
    assert 0.5 < np.median(error[inside]) < 1.0
    # About half a head's length: the usual PCK.
    assert 0.93 < (error[inside] < 3.2).mean() < 0.97
    assert 0.003 < (error[inside] > 10).mean() < 0.02
    assert np.mean(hidden) > 1.4 * np.mean(visible)
    # Errors of one image go together: many images without a bad joint, some with several.
    bad = (error > 4) & inside
    apart = np.random.default_rng(6).permuted(bad, axis=0)
    assert (bad.sum(1) >= 3).mean() > 2 * (apart.sum(1) >= 3).mean()
    # People are inside their crops but for a few.
    cells = made["keypoints_xy"]
    assert 0.96 < ((cells > -0.5) & (cells < 63.5)).all((1, 2)).mean() < 0.995


def test_heatmaps_are_like_a_detectors():
    made = examples()
    rendered = made["rendered"]
    wide = np.asarray(fit_gaussians(rendered).sigma_px[..., 0] > 5.0)
    # Ambiguous: 6.4 % in Human3.6M's test set; the standard error here is 0.7 %.
    assert 0.045 < wide.any(1).mean() < 0.085
    assert wide[made["hidden"]].mean() > 2 * wide[~made["hidden"]].mean()
    # A faint background of both signs.
    assert -0.02 < rendered.min() < -0.003
    assert np.median(np.abs(rendered)) < 0.003
    assert 0.2 < (rendered < 0).mean() < 0.6


@pytest.mark.parametrize("field", ["confusion", "clutter", "neighbour", "missed", "background"])
def test_every_failure_has_its_parameter(field):
    points = np.concatenate([person()] * 50)
    more = {field: 0.8} | ({"confusion_behind": 0.8} if field == "confusion" else {})
    base, changed = (
        simulator.render(detect(7, points, config).blobs)
        for config in (EXACT, dataclasses.replace(EXACT, **more))
    )
    assert (np.abs(changed - base).max((2, 3)) > 0.02).mean() > 0.1


def test_maps_that_coco_lacks_are_flat_together():
    points = person().repeat(200, 0)
    config = dataclasses.replace(EXACT, without_trunk=0.4)
    blobs = detect(3, points, config).blobs
    flat = (simulator.render(blobs) == 0).all(axis=(2, 3))
    names = np.array(MPII_JOINTS)
    assert set(names[flat.any(0)]) == {"Spine", "Thorax", "Head"}
    assert 0.3 < flat.any(1).mean() < 0.5
    assert (flat.sum(1) % 3 == 0).all()
