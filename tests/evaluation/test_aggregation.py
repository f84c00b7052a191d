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


def projected(poses_mm):
    """(..., 17, 3) -> (..., 16, 2), columns and rows, by a camera of known scale."""
    return CENTRE + SCALE * poses_mm[..., MPII_TO_H36M, :2] * [1, -1]


def heatmaps_at(joints_px, sigma=2.0):
    blobs = np.zeros((*joints_px.shape[:-1], 1, 5), np.float32)
    blobs[..., 0, 0], blobs[..., 0, 1:3], blobs[..., 0, 3:] = 0.9, joints_px, sigma
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
    brute = globals()[f"brute_{method}"]
    expected = [
        brute(*frame) for frame in zip(np.float64(hypotheses), np.float64(maps), strict=True)
    ]
    np.testing.assert_allclose(methods[method](hypotheses, maps), expected, atol=2e-2)


def test_agreement_takes_whole_numbers_for_heights():
    hypotheses, maps = random_case(9)
    whole = jnp.round(10_000 * maps).astype(jnp.int32)
    expected = agreement_weights(hypotheses, maps)
    np.testing.assert_allclose(agreement_weights(hypotheses, whole), expected, atol=1e-2)


def test_agreement_finds_the_hypothesis_that_fits():
    hypotheses, _ = random_case(14, spread=150)
    right = np.array([3, 0, 7, 5])
    poses = np.asarray(hypotheses)[np.arange(B), right]
    maps = jnp.asarray(heatmaps_at(projected(poses)))
    weights = np.asarray(agreement_weights(hypotheses, maps))
    assert np.all(weights[np.arange(B), right] > 0.99)
    joints_px = np.asarray(aggregation.project(hypotheses, maps))[np.arange(B), right]
    np.testing.assert_allclose(joints_px, projected(poses), atol=0.6)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_hypotheses_stay_finite(method):
    hypotheses, maps = random_case(16)
    same = jnp.broadcast_to(hypotheses[:, :1], hypotheses.shape)
    np.testing.assert_allclose(methods[method](same, maps), hypotheses[:, 0], atol=1e-3)
    np.testing.assert_array_equal(methods[method](jnp.zeros_like(hypotheses), maps), 0)
    assert np.isfinite(methods[method](-hypotheses, maps)).all()  # upside down


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
