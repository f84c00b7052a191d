"""The single pose against float64 numpy and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from scipy.ndimage import map_coordinates

from diffpose_jax.data import simulator
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation.aggregation import METHODS
from diffpose_jax.skeleton import MPII_TO_H36M

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
B = 4
SCALE, CENTRE = 0.025, np.array([33.0, 28.0])  # cells a mm; where the hip is projected
methods = {name: jax.jit(method) for name, method in METHODS.items()}
agreement_weights = jax.jit(aggregation.agreement_weights)
project = jax.jit(aggregation.project)


def projected(poses_mm):
    """(..., 17, 3) -> (..., 16, 2), columns and rows, by a camera of known scale."""
    return CENTRE + SCALE * poses_mm[..., MPII_TO_H36M, :2] * [1, -1]


def heatmaps_at(joints_px, sigma=2.0, height=0.9):
    blobs = np.zeros((*joints_px.shape[:-1], 1, 5), np.float32)
    blobs[..., 0, 0], blobs[..., 0, 1:3], blobs[..., 0, 3:] = height, joints_px, sigma
    return np.float32(simulator.render(blobs))


def random_case(seed, M=8, spread=60):
    rng = np.random.default_rng(seed)
    truth = TRUTH[rng.integers(len(TRUTH), size=B)]
    hypotheses = truth[:, None] + rng.normal(size=(B, M, 17, 3)) * spread
    hypotheses -= hypotheses[:, :, :1]
    maps = heatmaps_at(projected(truth) + rng.normal(size=(B, 16, 2)), 2.5)
    maps = maps * rng.uniform(0.2, 1, size=(B, 16, 1, 1)) + rng.normal(size=maps.shape) * 0.01
    return jnp.asarray(hypotheses, jnp.float32), jnp.asarray(maps, jnp.float32)


# Brute force in float64, one frame at a time.
def brute_mean(hypotheses, _):
    return hypotheses.mean(0)


def brute_medoid(hypotheses, _):
    mpjpe = [[np.linalg.norm(a - b, axis=-1).mean() for b in hypotheses] for a in hypotheses]
    return hypotheses[np.argmin(np.sum(mpjpe, axis=1))]


def brute_mode(hypotheses, _):
    M = len(hypotheses)
    squares = np.array([[((a - b) ** 2).sum() for b in hypotheses] for a in hypotheses])
    variance = 0.1 * squares.sum() / max(M * (M - 1), 1) + 1e-9
    pose = hypotheses[np.argmax(np.exp(-squares / (2 * variance)).sum(1))]
    for _ in range(20):
        weights = np.exp(-((hypotheses - pose) ** 2).sum((1, 2)) / (2 * variance))
        pose = np.average(hypotheses, axis=0, weights=weights)
    return pose


def brute_project(hypothesis, maps):
    """Weighted least squares with a design matrix: column = s x + a, row = -s y + b."""
    flat = maps.reshape(16, -1).argmax(1)
    height = maps.reshape(16, -1).max(1)
    joints = hypothesis[list(MPII_TO_H36M)]
    design = np.zeros((32, 3))
    design[:16, 0], design[:16, 1] = joints[:, 0], 1
    design[16:, 0], design[16:, 2] = -joints[:, 1], 1
    target = np.concatenate([flat % 64, flat // 64])
    root = np.sqrt(np.tile(np.maximum(height, 0), 2))
    solution = np.linalg.lstsq(root[:, None] * design, root * target, rcond=None)[0]
    return (design @ solution).reshape(2, 16).T


def brute_heatmap_agreement(hypotheses, maps):
    weights = []
    for hypothesis in hypotheses:
        product = 1.0
        for heatmap, (column, row) in zip(maps, brute_project(hypothesis, maps), strict=True):
            height = map_coordinates(heatmap, [[row], [column]], order=1, mode="constant")[0]
            product *= max(height, 0) / heatmap.max() + 0.1
        weights.append(product)
    return np.average(hypotheses, axis=0, weights=weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("seed", "M", "spread"), [(1, 8, 60), (2, 8, 200), (3, 7, 20), (4, 1, 60)])
def test_methods_match_brute_force(method, seed, M, spread):
    hypotheses, maps = random_case(seed, M, spread)
    result = methods[method](hypotheses, maps)
    assert result.shape == (B, 17, 3)
    for frame in range(B):
        expected = globals()[f"brute_{method}"](
            np.float64(hypotheses[frame]), np.float64(maps[frame])
        )
        np.testing.assert_allclose(result[frame], expected, atol=2e-2)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"'best'; there are mean, medoid, mode, heatmap_agree"):
        aggregation.aggregate("best", *random_case(6))


def test_agreement_takes_whole_numbers_for_heights():
    hypotheses, maps = random_case(9)
    whole = jnp.round(10_000 * maps).astype(jnp.int32)
    expected = agreement_weights(hypotheses, maps)
    np.testing.assert_allclose(agreement_weights(hypotheses, whole), expected, atol=1e-2)


def test_two_clusters():
    """The mean lies between clusters of 70 and 30 percent, medoid and mode in the larger one."""
    rng = np.random.default_rng(13)
    centres = TRUTH[:2] - TRUTH[:2, :1]
    in_second = np.zeros((B, 20), bool)
    in_second[:, rng.permutation(20)[:6]] = True
    noise = rng.normal(size=(B, 20, 17, 3)) * 5
    hypotheses = jnp.float32(np.where(in_second[..., None, None], centres[1], centres[0]) + noise)
    maps = jnp.zeros((B, 16, 64, 64))

    def distance(pose, centre):
        return np.linalg.norm(np.asarray(pose) - centre, axis=-1).mean(-1).max()

    between = 0.7 * centres[0] + 0.3 * centres[1]
    assert distance(centres[0], centres[1]) > 100
    assert distance(methods["mean"](hypotheses, maps), between) < 5
    assert distance(methods["medoid"](hypotheses, maps), centres[0]) < 15
    # 14 of them averaged: 5 mm / sqrt(14) on each axis.
    assert distance(methods["mode"](hypotheses, maps), centres[0]) < 4


def test_agreement_finds_the_hypothesis_that_fits():
    hypotheses, _ = random_case(14, spread=150)
    right = np.array([3, 0, 7, 5])
    poses = np.asarray(hypotheses)[np.arange(B), right]
    maps = jnp.asarray(heatmaps_at(projected(poses)))
    weights = agreement_weights(hypotheses, maps)
    np.testing.assert_array_equal(np.argmax(weights, axis=1), right)
    assert np.all(np.asarray(weights)[np.arange(B), right] > 0.99)
    np.testing.assert_allclose(methods["heatmap_agreement"](hypotheses, maps), poses, atol=15)
    joints_px = np.asarray(project(hypotheses, maps))[np.arange(B), right]
    np.testing.assert_allclose(joints_px, projected(poses), atol=0.6)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_hypotheses_stay_finite(method):
    hypotheses, maps = random_case(16)
    same = jnp.broadcast_to(hypotheses[:, :1], hypotheses.shape)
    np.testing.assert_allclose(methods[method](same, maps), hypotheses[:, 0], atol=1e-3)
    points = jnp.zeros_like(hypotheses)
    np.testing.assert_array_equal(methods[method](points, maps), 0)
    upside_down = hypotheses * -1
    assert np.isfinite(methods[method](upside_down, maps)).all()


def test_heatmaps_without_a_preference_weigh_all_alike():
    hypotheses, maps = random_case(15)
    for value in (0.0, -0.3, 0.7):
        weights = agreement_weights(hypotheses, jnp.full_like(maps, value))
        np.testing.assert_allclose(weights, 1 / 8, rtol=1e-3)
    # A single map with a positive cell fixes the translation only; nothing is divided by 0.
    one = jnp.full_like(maps, -1).at[:, 4].set(maps[:, 4])
    np.testing.assert_allclose(agreement_weights(hypotheses, one), 1 / 8, rtol=1e-5)


def test_covariance_matches_numpy():
    hypotheses, _ = random_case(20)
    result = aggregation.covariance(hypotheses)
    for frame, joint in np.ndindex(B, 17):
        expected = np.cov(np.float64(hypotheses[frame, :, joint]), rowvar=False)
        np.testing.assert_allclose(result[frame, joint], expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(aggregation.covariance(hypotheses[:, :1]), 0)
