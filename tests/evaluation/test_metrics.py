"""Metrics against brute force in float64; test_reference.py has the published program's."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from scipy import stats
from test_alignment import align_by_svd

from diffpose_jax.evaluation import metrics
from diffpose_jax.evaluation.metrics import ECE_LEVELS, MetricSums, per_frame_metrics
from diffpose_jax.skeleton import H36M_JOINTS

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
per_frame = jax.jit(per_frame_metrics)


def sums_of(hypotheses, truth):
    sums = jax.tree.map(lambda x: np.sum(x, axis=0), per_frame(hypotheses, truth))
    return MetricSums(len(truth), sums, hypotheses.shape[1])


def finalize(hypotheses, truth):
    """The results of a few frames."""
    return sums_of(hypotheses, truth).finalize()


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
    pairs = [a - b for a, b in itertools.permutations(hypotheses, 2)] or [np.zeros((17, 3))]
    spread = np.linalg.norm(pairs, axis=-1).mean() / 2
    pose_error = np.mean([np.linalg.norm(pose - truth) for pose in hypotheses]) / 4
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
        "energy_score": mpjpe.mean() - spread,
        "energy_error": mpjpe.mean(),
        "energy_spread": spread,
        "energy_score_pose": pose_error - np.mean([np.linalg.norm(pair) for pair in pairs]) / 8,
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
        result["sharpness_mm"] = np.quantile(distance, 0.9, axis=0)[1:].mean()
        rank = (hypotheses < truth).sum(0)[1:]
        result["pit"] = [np.clip(q * (M + 1) - rank, 0, 1) for q in np.arange(21) / 20]
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


@pytest.fixture(scope="module")
def gaussian_case():
    """400 frames: 200 hypotheses with a deviation of 50 mm around a mean, and other truths."""
    rng = np.random.default_rng(30)
    mean = rng.normal(size=(400, 17, 3)) * 200
    hypotheses = mean[:, None] + rng.normal(size=(400, 200, 17, 3)) * 50
    noise = rng.normal(size=(400, 17, 3))
    hypotheses[:, :, 0] = 0

    def results(truth_spread_mm, shift_mm=0.0):
        truth = mean + noise * truth_spread_mm + shift_mm
        truth[:, 0] = 0
        return finalize(jnp.float32(hypotheses), jnp.float32(truth))

    return results


def test_miscalibration_is_seen_and_has_a_side(gaussian_case):
    honest, too_narrow, too_wide = (gaussian_case(truth_mm) for truth_mm in (50, 120, 15))
    assert honest["ece"] < 0.025
    assert abs(honest["ece_quantile"] - 0.5) < 0.025
    assert min(too_narrow["ece"], too_wide["ece"]) > 0.2
    assert too_narrow["ece_quantile"] < 0.3
    assert too_wide["ece_quantile"] > 0.7


@pytest.mark.parametrize("truth_mm", [50, 120])
def test_regions_cover_as_the_gaussian_says(gaussian_case, truth_mm):
    """The distance from the centre over the deviation has the chi distribution of 3 degrees."""
    coverage = gaussian_case(truth_mm)["region_coverage"]
    assert list(coverage) == ["50", "80", "90", "95"]
    for percent, share in coverage.items():
        expected = stats.chi(3).cdf(stats.chi(3).ppf(int(percent) / 100) * 50 / truth_mm)
        deviation = np.sqrt(expected * (1 - expected) / (400 * 16))
        # The centre and the quantile are those of 200 hypotheses: each is off by about one.
        assert share == pytest.approx(expected, abs=4 * deviation + 2 / 200)


def test_energy_and_sharpness_of_a_gaussian(gaussian_case):
    """Between two draws the deviation is 50 mm times the root of 2; sampling leaves a percent."""
    found, between = gaussian_case(50), 50 * np.sqrt(2)
    expected = between * stats.chi(3).mean() * 16 / 17  # the hip has none
    assert found["energy_error"] == pytest.approx(expected, rel=0.01)
    assert found["energy_spread"] == pytest.approx(expected / 2, rel=0.01)
    score = found["energy_error"] - found["energy_spread"]
    assert found["energy_score"] == pytest.approx(score, rel=1e-5)
    of_pose = between * stats.chi(48).mean() / 8
    assert found["energy_score_pose"] == pytest.approx(of_pose, rel=0.01)
    assert found["sharpness_mm"] == pytest.approx(50 * stats.chi(3).ppf(0.9), rel=0.01)


SAMPLING = 5 * np.sqrt(ECE_LEVELS * (1 - ECE_LEVELS) / 400) + 1e-6  # and the rounding of sums
"""Five deviations of the frequency in 400 frames: one of 1,008 is beyond in some 2,000 runs."""


def frequencies(results, axis):
    reliability = results["reliability"][axis]
    assert tuple(reliability) == H36M_JOINTS[1:]
    return np.array(list(reliability.values()))


def test_reliability_of_the_right_distribution_is_the_diagonal(gaussian_case):
    found = gaussian_case(50)
    for axis in "xyz":
        assert np.all(np.abs(frequencies(found, axis) - ECE_LEVELS) <= SAMPLING)
    assert found["pit_error"] < np.mean(SAMPLING) / 5


def test_reliability_shows_opposite_shifts_of_one_axis(gaussian_case):
    """By a deviation up and down in y, which the other axes must not show, nor a median hide."""
    sign = np.where(np.arange(17) % 2, 1, -1)
    found = gaussian_case(50, 50 * sign[:, None] * np.array([[0, 1, 0]]))
    for axis in "xz":
        assert np.all(np.abs(frequencies(found, axis) - ECE_LEVELS) <= SAMPLING)
    normal = stats.norm()
    expected = normal.cdf(normal.ppf(ECE_LEVELS) - sign[1:, None])
    # The quantiles are those of 200 hypotheses.
    assert np.all(np.abs(frequencies(found, "y") - expected) <= SAMPLING + 2 / 200)
    error = np.mean(np.abs(expected - ECE_LEVELS)) / 3
    assert error < found["pit_error"] < error + np.mean(SAMPLING) / 5


def test_ties_leave_the_transform_uniform():
    """Truth and nine hypotheses of the same four values."""
    draws = np.random.default_rng(31).integers(4, size=(400, 10, 17, 3)).astype(np.float32)
    found = metrics.pit(jnp.asarray(draws[:, 1:]), jnp.asarray(draws[:, 0]))
    off = np.abs(np.mean(found, axis=0) - ECE_LEVELS[:, None, None])
    assert np.all(off <= SAMPLING[:, None, None])


def test_sums_of_parts_are_those_of_the_whole():
    """Errors of frequencies are of those over all frames, not the mean over the parts."""
    parts = [random_case(seed) for seed in (20, 21)]
    sums = [sums_of(*part) for part in parts]
    whole = jax.tree.map(np.add, *sums).finalize()
    reliability = [one.finalize()["reliability"] for one in sums]
    mean = jax.tree.map(lambda *x: np.mean(x), *reliability)
    found, expected = jax.tree.leaves(whole["reliability"]), jax.tree.leaves(mean)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    off = np.abs(np.reshape(expected, (-1, 21)) - ECE_LEVELS)
    assert whole["pit_error"] == pytest.approx(off.mean(), rel=1e-6)
    json.dumps(whole, allow_nan=False)


def test_a_single_hypothesis_has_no_calibration():
    found = set(finalize(*random_case(4, M=1)))
    assert {"energy_error", "energy_score_pose"} <= found
    assert not found & {"ece", "region_coverage", "sharpness_mm", "reliability", "pit_error"}
