"""Metrics against brute force in float64; test_reference.py has the published program's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from test_alignment import align_by_svd

from diffpose_jax.evaluation import metrics
from diffpose_jax.evaluation.metrics import MetricSums, per_frame_metrics

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
per_frame = jax.jit(per_frame_metrics)


def finalize(hypotheses, truth):
    """The results of a few frames."""
    sums = jax.tree.map(lambda x: np.sum(x, axis=0), per_frame(hypotheses, truth))
    return MetricSums(len(truth), sums, hypotheses.shape[1]).finalize()


def random_case(seed, B=6, M=8, spread=60):  # few shapes: each is compiled
    rng = np.random.default_rng(seed)
    truth = TRUTH[rng.integers(len(TRUTH), size=B)]
    noise = rng.normal(size=(B, M, 17, 3)) * spread * rng.uniform(0.2, 2, size=(B, M, 1, 1))
    hypotheses = truth[:, None] + noise + rng.normal(size=(B, 1, 17, 3)) * spread
    hypotheses -= hypotheses[:, :, :1]
    return jnp.asarray(hypotheses, jnp.float32), jnp.asarray(truth)


def brute_force(hypotheses, truth):
    """All metrics of a frame but the symmetry, one hypothesis at a time."""
    hypotheses, truth = np.float64(hypotheses), np.float64(truth)
    M = len(hypotheses)
    errors = np.linalg.norm(hypotheses - truth, axis=-1)
    aligned_errors = np.linalg.norm(align_by_svd(hypotheses, truth[None]) - truth, axis=-1)
    mpjpe = errors.mean(1)
    scaled = [pose * np.linalg.norm(truth) / np.linalg.norm(pose) for pose in hypotheses]
    scaled_errors = np.linalg.norm(scaled - truth, axis=-1)

    pck_joints = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    no_spine = [j for j in range(17) if j != 7]
    thresholds = np.arange(1, 301)
    correct = [np.any(np.all(aligned_errors[:, no_spine] < t, axis=1)) for t in thresholds]
    pairs = [
        np.linalg.norm(a - b, axis=-1).mean() for a, b in itertools.permutations(hypotheses, 2)
    ]
    result = {
        "mpjpe_best": mpjpe.min(),
        "mpjpe_mean": mpjpe.mean(),
        "mpjpe_median": np.median(mpjpe),
        "pa_mpjpe_best": aligned_errors.mean(1).min(),
        "pa_mpjpe_mean": aligned_errors.mean(),
        "pck150_best": 100 * (errors[:, pck_joints] < 150).mean(1).max(),
        "pck150_all_best": 100 * (errors < 150).mean(1).max(),
        "pck150_scaled_best": 100 * max((e[pck_joints] < 150).mean() for e in scaled_errors),
        "cps_best": np.trapezoid(np.float64(correct), thresholds),
        "cps_area_best": max(300 - max(1, min(e.max() for e in aligned_errors)), 0),
        "energy_score": mpjpe.mean() - (np.mean(pairs) / 2 if M > 1 else 0),
    }
    if M > 1:
        result["mpjpe_best_at"] = [
            np.mean([min(chosen) for chosen in itertools.combinations(mpjpe, k)])
            for k in metrics.best_at_sizes(M)
        ]
        centre = np.median(hypotheses, axis=0)
        distance = np.linalg.norm(hypotheses - centre, axis=-1)
        truth_distance = np.linalg.norm(truth - centre, axis=-1)
        quantiles = np.quantile(distance, np.arange(21) / 20, axis=0)
        result["within_quantile"] = quantiles > truth_distance
        result["ece_quantile"] = (distance > truth_distance).mean(0)
    return result


@pytest.mark.parametrize(("seed", "M", "spread"), [(1, 8, 60), (2, 8, 150), (3, 5, 20), (4, 1, 60)])
def test_frames_match_brute_force(seed, M, spread):
    hypotheses, truth = random_case(seed, M=M, spread=spread)
    result = per_frame(hypotheses, truth)
    for frame in range(6):
        expected = brute_force(hypotheses[frame], truth[frame])
        assert set(result) == {*expected, "symmetry"}
        for name, value in expected.items():
            np.testing.assert_allclose(result[name][frame], value, atol=1e-3, err_msg=name)


def test_best_at_many_hypotheses_stays_a_mean():
    """The weights at M = 2000, where factorials overflow: rows sum to 1, K = M is the best."""
    weights = metrics._best_at_weights(2000)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(weights[0], 1 / 2000, rtol=1e-12)
    assert weights[-1, 0] == 1
    assert metrics.best_at_sizes(200) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert metrics.best_at_sizes(30) == (1, 2, 5, 10, 20, 30)


def test_results_are_means_over_the_frames():
    hypotheses, truth = random_case(20)
    frames, results = jax.device_get(per_frame(hypotheses, truth)), finalize(hypotheses, truth)
    best_at = results["mpjpe_best_at"]
    assert list(best_at) == [1, 2, 5, 8]
    assert best_at[1] == pytest.approx(np.mean(frames["mpjpe_mean"]), rel=1e-5)
    assert best_at[8] == pytest.approx(np.mean(frames["mpjpe_best"]), rel=1e-5)
    share = np.median(np.mean(frames["ece_quantile"], 0))
    assert results["ece_quantile"] == pytest.approx(share, rel=1e-5)


def gaussian_case(truth_spread_mm):
    """500 frames: 50 hypotheses of a spread of 50 mm around a mean, the truth of another."""
    rng = np.random.default_rng(30)
    mean = rng.normal(size=(500, 17, 3)) * 200
    hypotheses = mean[:, None] + rng.normal(size=(500, 50, 17, 3)) * 50
    truth = mean + rng.normal(size=(500, 17, 3)) * truth_spread_mm
    hypotheses[:, :, 0] = truth[:, 0] = 0
    return finalize(jnp.float32(hypotheses), jnp.float32(truth))


def test_miscalibration_is_seen_and_has_a_side():
    honest, too_narrow, too_wide = (gaussian_case(truth_mm) for truth_mm in (50, 120, 15))
    assert honest["ece"] < 0.025
    assert abs(honest["ece_quantile"] - 0.5) < 0.025
    assert min(too_narrow["ece"], too_wide["ece"]) > 0.2
    assert too_narrow["ece_quantile"] < 0.3
    assert too_wide["ece_quantile"] > 0.7
