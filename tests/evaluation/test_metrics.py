"""Metrics against brute force in float64; test_reference.py has the published program's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN

from diffpose_jax.evaluation import metrics
from diffpose_jax.evaluation.metrics import MetricSums, per_frame_metrics

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
per_frame = jax.jit(per_frame_metrics)
compute = jax.jit(MetricSums.compute)


def random_case(seed, B=6, M=8, spread=60):  # few shapes: each is compiled
    rng = np.random.default_rng(seed)
    truth = TRUTH[rng.integers(len(TRUTH), size=B)]
    noise = rng.normal(size=(B, M, 17, 3)) * spread * rng.uniform(0.2, 2, size=(B, M, 1, 1))
    hypotheses = truth[:, None] + noise + rng.normal(size=(B, 1, 17, 3)) * spread
    hypotheses -= hypotheses[:, :, :1]
    return jnp.asarray(hypotheses, jnp.float32), jnp.asarray(truth)


# --- brute force in float64 --------------------------------------------------------------


def align_by_svd(pose, target):
    pose0, target0 = pose - pose.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(target0.T @ pose0)
    signs = np.array([1, 1, np.linalg.det(u @ vt)])
    scale = (s * signs).sum() / (pose0**2).sum()
    return scale * pose0 @ ((u * signs) @ vt).T + target.mean(0)


def brute_force(hypotheses, truth):
    """All metrics of a frame by their definitions, one hypothesis at a time."""
    hypotheses, truth = np.float64(hypotheses), np.float64(truth)
    M = len(hypotheses)
    errors = np.linalg.norm(hypotheses - truth, axis=-1)
    aligned = np.array([align_by_svd(pose, truth) for pose in hypotheses])
    aligned_errors = np.linalg.norm(aligned - truth, axis=-1)
    mpjpe = errors.mean(1)
    scaled = [pose * np.linalg.norm(truth) / np.linalg.norm(pose) for pose in hypotheses]
    scaled_errors = np.linalg.norm(scaled - truth, axis=-1)

    pck_joints = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    no_spine = [j for j in range(17) if j != 7]
    correct = [
        float(any(np.all(e[no_spine] < threshold) for e in aligned_errors))
        for threshold in range(1, 301)
    ]
    arms_legs = [((1, 2), (4, 5)), ((2, 3), (5, 6)), ((8, 14), (8, 11)), ((14, 15), (11, 12)),
                 ((15, 16), (12, 13))]  # fmt: skip
    symmetry = [
        abs(np.linalg.norm(p[a] - p[b]) - np.linalg.norm(p[c] - p[d]))
        for p in hypotheses
        for (a, b), (c, d) in arms_legs
    ]
    pairs = [
        np.linalg.norm(hypotheses[m] - hypotheses[n], axis=-1).mean()
        for m in range(M)
        for n in range(M)
        if m != n
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
        "cps_best": np.trapezoid(correct, np.arange(1, 301)),
        "cps_area_best": max(300 - max(1, min(e.max() for e in aligned_errors)), 0),
        "symmetry": np.mean(symmetry),
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
        assert set(result) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(result[name][frame], value, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("largest", "score"),
    [(0.0, 299.0), (0.999, 299.0), (1.0, 298.5), (1.5, 298.5), (150.2, 149.5), (298.0, 1.5),
     (299.0, 0.5), (299.9, 0.5), (300.0, 0.0), (1e4, 0.0)],
)  # fmt: skip
def test_cps_closed_form_equals_the_loop_over_thresholds(largest, score):
    errors = np.full((2, 17), 400.0, np.float32)
    errors[1] = largest / 2
    errors[1, 3] = largest
    errors[1, 7] = 400  # the spine does not count
    thresholds = np.arange(1, 301)
    by_loop = np.trapezoid((np.float32(largest) < thresholds).astype(float), thresholds)
    assert by_loop == score
    assert metrics.correct_poses_score(jnp.asarray(errors)) == score


@pytest.mark.parametrize("M", [2, 3, 20, 151])
def test_median_of_hypotheses_is_exact(M):
    rng = np.random.default_rng(M)
    values = np.float32(rng.normal(size=(4, M, 17, 3)) * 10.0 ** rng.integers(-3, 4, size=(17, 3)))
    values[:, :, 0] = 0  # ties
    values[:, : M // 2 + 1, 1] = -2.5
    result = jax.jit(metrics._median_over_hypotheses)(values)
    np.testing.assert_allclose(result, np.median(values, axis=1), rtol=1e-6)


def test_best_at_many_hypotheses_stays_a_mean():
    """The weights at M = 2000, where factorials overflow: rows sum to 1, K = M is the best."""
    weights = metrics._best_at_weights(2000)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(weights[0], 1 / 2000, rtol=1e-12)
    assert weights[-1, 0] == 1
    assert metrics.best_at_sizes(200) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert metrics.best_at_sizes(30) == (1, 2, 5, 10, 20, 30)


# --- invariants --------------------------------------------------------------------------


def test_order_of_hypotheses_does_not_matter():
    hypotheses, truth = random_case(5)
    order = np.random.default_rng(6).permutation(8)
    result, permuted = per_frame(hypotheses, truth), per_frame(hypotheses[:, order], truth)
    for name, value in result.items():
        np.testing.assert_allclose(permuted[name], value, atol=2e-4, err_msg=name)


def test_aligned_metrics_ignore_similarities_of_the_hypotheses():
    hypotheses, truth = random_case(7)
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    moved = jnp.float32(1.7 * np.asarray(hypotheses) @ rotation.T + [30, -20, 900])
    result, after = per_frame(hypotheses, truth), per_frame(moved, truth)
    for name in ("pa_mpjpe_best", "pa_mpjpe_mean", "cps_best"):
        np.testing.assert_allclose(after[name], result[name], atol=2e-3, err_msg=name)
    assert np.abs(after["mpjpe_best"] - result["mpjpe_best"]).min() > 1


def test_a_single_hypothesis_scores_its_own_error():
    result = per_frame(*random_case(9, M=1))
    for name in ("mpjpe_best", "mpjpe_median", "energy_score"):
        np.testing.assert_allclose(result[name], result["mpjpe_mean"], rtol=1e-6)
    sums = MetricSums(jnp.ones(()) * 6, jax.tree.map(lambda x: x.sum(0), result), 1)
    assert not {"ece", "ece_quantile", "mpjpe_best_at"} & set(sums.finalize())


# --- sums --------------------------------------------------------------------------------


def assert_same_results(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert result[name].keys() == value.keys()
            value, result[name] = list(value.values()), list(result[name].values())
        np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_merging_splits_equals_one_batch():
    hypotheses, truth = random_case(20)
    whole = compute(hypotheses, truth).finalize()
    parts = [compute(hypotheses[a:b], truth[a:b]) for a, b in ((0, 2), (2, 4), (4, 6))]
    assert_same_results(parts[2].merge(parts[0]).merge(parts[1]).finalize(), whole)
    on_host = [jax.tree.map(np.float64, jax.device_get(part)) for part in parts]
    assert_same_results(on_host[0].merge(on_host[1]).merge(on_host[2]).finalize(), whole)


def test_frames_of_weight_zero_have_no_effect():
    hypotheses, truth = random_case(21)
    used = jnp.arange(6) < 2
    padded = compute(
        jnp.where(used[:, None, None, None], hypotheses, jnp.nan),
        jnp.where(used[:, None, None], truth, jnp.inf),
        used,
    )
    assert_same_results(padded.finalize(), compute(hypotheses[:2], truth[:2]).finalize())


def test_weights_count_frames_repeatedly():
    hypotheses, truth = random_case(22)
    repeated = np.array([0, 0, 0, 0, 2, 2])
    weighted = compute(hypotheses, truth, jnp.array([2.0, 0, 1, 0, 0, 0])).finalize()
    assert_same_results(weighted, compute(hypotheses[repeated], truth[repeated]).finalize())


def test_results_are_the_means_of_the_frames():
    hypotheses, truth = random_case(23)
    frames, result = per_frame(hypotheses, truth), compute(hypotheses, truth).finalize()
    for name in set(result) - {"mpjpe_best_at", "ece", "ece_quantile"}:
        np.testing.assert_allclose(result[name], frames[name].mean(), rtol=1e-5)
    best_at = result["mpjpe_best_at"]
    assert list(best_at) == [1, 2, 5, 8]
    assert best_at[1] == pytest.approx(result["mpjpe_mean"], rel=1e-5)
    assert best_at[8] == pytest.approx(result["mpjpe_best"], rel=1e-5)
    assert sorted(best_at.values(), reverse=True) == list(best_at.values())
    assert result["ece_quantile"] == pytest.approx(
        np.median(np.mean(frames["ece_quantile"], 0)), rel=1e-5
    )


# --- calibration -------------------------------------------------------------------------


def gaussian_case(truth_spread_mm, spread_mm=50):
    """500 frames: 50 hypotheses of one spread around a mean, the truth of another."""
    rng = np.random.default_rng(30)
    mean = rng.normal(size=(500, 17, 3)) * 200
    hypotheses = mean[:, None] + rng.normal(size=(500, 50, 17, 3)) * spread_mm
    truth = mean + rng.normal(size=(500, 17, 3)) * truth_spread_mm
    hypotheses[:, :, 0] = truth[:, 0] = 0
    return compute(jnp.float32(hypotheses), jnp.float32(truth)).finalize()


def test_truths_from_the_hypotheses_distribution_are_calibrated():
    result = gaussian_case(50)
    assert result["ece"] < 0.025
    assert abs(result["ece_quantile"] - 0.5) < 0.025


@pytest.mark.parametrize(("truth_spread_mm", "side"), [(120, -1), (15, 1)])
def test_miscalibration_is_seen_and_has_a_side(truth_spread_mm, side):
    result = gaussian_case(truth_spread_mm)
    assert result["ece"] > 0.2
    assert side * (result["ece_quantile"] - 0.5) > 0.2


def test_energy_score_prefers_the_true_spread():
    """It is proper: lowest for hypotheses from the distribution of the truths."""
    scores = {spread: gaussian_case(50, spread)["energy_score"] for spread in (25, 50, 100)}
    assert min(scores, key=scores.get) == 50


# --- bad input ---------------------------------------------------------------------------


def test_bad_input_is_named():
    hypotheses, truth = random_case(40)
    with pytest.raises(ValueError, match=r"\(6, 8, 16, 3\)"):
        per_frame_metrics(hypotheses[:, :, 1:], truth[:, 1:])
    with pytest.raises(ValueError, match=r"truth \(2, 17, 3\)"):
        per_frame_metrics(hypotheses, truth[:2])
    with pytest.raises(ValueError, match="one per frame"):
        MetricSums.compute(hypotheses, truth, jnp.ones(2))
    sums = compute(hypotheses, truth)
    with pytest.raises(ValueError, match="8 and 9 hypotheses"):
        sums.merge(sums.replace(num_hypotheses=9))
    with pytest.raises(ValueError, match="no frames"):
        compute(hypotheses, truth, jnp.zeros(6)).finalize()
