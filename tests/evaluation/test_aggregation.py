"""Aggregation against float64 numpy, invariants, known answers and fresh data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from scipy.ndimage import map_coordinates
from scipy.stats import binom

from diffpose_jax.data import simulator
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation.aggregation import METHODS, fit_calibration, radius, uncalibrated
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import H36M_MIRROR, MPII_MIRROR, MPII_TO_H36M

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
B = 4
SCALE, CENTRE = 0.025, np.array([33.0, 28.0])  # cells a mm; where the hip is projected
methods = {name: jax.jit(method) for name, method in METHODS.items()}
calibrated_radius = jax.jit(radius)
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


# --- brute force in float64, one frame at a time -------------------------------------------


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


def test_projection_matches_brute_force():
    hypotheses, maps = random_case(5)
    result = project(hypotheses, maps)
    for frame, m in np.ndindex(B, 8):
        expected = brute_project(np.float64(hypotheses[frame, m]), np.float64(maps[frame]))
        np.testing.assert_allclose(result[frame, m], expected, atol=1e-3)


def test_methods_by_name():
    hypotheses, maps = random_case(6)
    medoid = aggregation.aggregate("medoid", hypotheses, maps)
    np.testing.assert_array_equal(medoid, methods["medoid"](hypotheses, maps))
    with pytest.raises(ValueError, match=r"'best'; there are mean, medoid, mode, heatmap_agree"):
        aggregation.aggregate("best", hypotheses, maps)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_are_checked(method):
    hypotheses, maps = random_case(6)
    for wrong in (hypotheses[0], hypotheses[:, :0], hypotheses[:, :, :16]):
        with pytest.raises(ValueError, match=r"hypotheses .* must be \(B, M, 17, 3\)"):
            aggregation.aggregate(method, wrong, maps)


def test_heatmaps_must_be_those_of_the_frames():
    hypotheses, maps = random_case(6)
    with pytest.raises(ValueError, match=r"\(4, 16, 64, 64\)"):
        aggregation.heatmap_agreement(hypotheses, maps[:2])


# --- invariants --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean", "medoid", "mode"])
def test_methods_turn_and_move_with_the_hypotheses(method):
    hypotheses, maps = random_case(7)
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))[0]
    offset = np.array([30.0, -20.0, 900.0])
    moved = jnp.float32(np.asarray(hypotheses) @ rotation.T + offset)
    expected = np.asarray(methods[method](hypotheses, maps)) @ rotation.T + offset
    np.testing.assert_allclose(methods[method](moved, maps), expected, atol=1e-2)


def test_agreement_ignores_position_and_size():
    hypotheses, maps = random_case(9)
    expected = agreement_weights(hypotheses, maps)
    moved = 1.3 * hypotheses + jnp.array([300.0, -200, 900]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(agreement_weights(moved, maps), expected, atol=1e-3)
    np.testing.assert_allclose(agreement_weights(hypotheses, 250 * maps), expected, atol=1e-4)
    whole = jnp.round(10_000 * maps).astype(jnp.int32)
    np.testing.assert_allclose(agreement_weights(hypotheses, whole), expected, atol=1e-2)
    np.testing.assert_allclose(
        agreement_weights(hypotheses, whole // 1000),
        agreement_weights(hypotheses, (whole // 1000).astype(jnp.float32)),
        atol=1e-6,
    )


@pytest.mark.parametrize("method", METHODS)
def test_order_of_hypotheses_does_not_matter(method):
    hypotheses, maps = random_case(10)
    order = np.random.default_rng(11).permutation(8)
    result = methods[method](hypotheses[:, order], maps)
    np.testing.assert_allclose(result, methods[method](hypotheses, maps), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_mirrored_hypotheses_give_the_mirrored_pose(method):
    hypotheses, maps = random_case(12)

    def mirror(poses):
        return poses[..., H36M_MIRROR, :] * jnp.array([-1.0, 1, 1]).reshape(
            (1,) * (poses.ndim - 1) + (3,)
        )

    mirrored_maps = maps[:, np.array(MPII_MIRROR), :, ::-1]
    result = methods[method](mirror(hypotheses), mirrored_maps)
    np.testing.assert_allclose(result, mirror(methods[method](hypotheses, maps)), atol=2e-2)


# --- known answers -----------------------------------------------------------------------


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
    joints_px = project(hypotheses, maps)
    np.testing.assert_allclose(
        np.asarray(joints_px)[np.arange(B), right], projected(poses), atol=0.6
    )


def test_agreement_follows_two_modes_of_a_heatmap():
    """A wrist at one of two places, its faint map 3 : 1 between them: weights 1.1 to 1/3 + 0.1.

    Faint, so that its highest cell does not draw the projection of the whole pose.
    """
    pose = np.float64(TRUTH[0] - TRUTH[0, 0])
    raised = pose.copy()
    raised[16, :2] += [240, 240]
    hypotheses = jnp.float32(np.stack([pose] * 4 + [raised] * 4)[None].repeat(B, 0))
    maps = heatmaps_at(projected(pose))
    maps[10] = 0.02 * (maps[10] + heatmaps_at(projected(raised))[10] / 3)
    weights = np.asarray(agreement_weights(hypotheses, jnp.asarray(maps[None].repeat(B, 0))))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[:, :4].sum(1), 1.1 / (1.1 + 1 / 3 + 0.1), atol=0.02)


@pytest.mark.parametrize("value", [0.0, -0.3, 0.7])
def test_flat_heatmaps_give_the_mean(value):
    hypotheses, maps = random_case(15)
    result = methods["heatmap_agreement"](hypotheses, jnp.full_like(maps, value))
    np.testing.assert_allclose(result, methods["mean"](hypotheses, maps), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_hypotheses_stay_finite(method):
    hypotheses, maps = random_case(16)
    same = jnp.broadcast_to(hypotheses[:, :1], hypotheses.shape)
    np.testing.assert_allclose(methods[method](same, maps), hypotheses[:, 0], atol=1e-3)
    points = jnp.zeros_like(hypotheses)
    np.testing.assert_array_equal(methods[method](points, maps), 0)
    upside_down = hypotheses * -1
    assert np.isfinite(methods[method](upside_down, maps)).all()


def test_one_joint_seen():
    """A single map with a positive cell fixes the translation only; nothing is divided by 0."""
    hypotheses, maps = random_case(17)
    one = jnp.full_like(maps, -1).at[:, 4].set(maps[:, 4])
    weights = agreement_weights(hypotheses, one)
    np.testing.assert_allclose(weights, 1 / 8, rtol=1e-5)


# --- uncertainty -------------------------------------------------------------------------


def test_covariance_matches_numpy():
    hypotheses, _ = random_case(20)
    result = jax.jit(aggregation.covariance)(hypotheses)
    for frame, joint in np.ndindex(B, 17):
        expected = np.cov(np.float64(hypotheses[frame, :, joint]), rowvar=False)
        np.testing.assert_allclose(result[frame, joint], expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(aggregation.covariance(hypotheses[:, :1]), 0)


def test_ellipsoids_rebuild_the_covariance():
    covariance = aggregation.covariance(random_case(21)[0])
    lengths, axes = (np.float64(x) for x in jax.jit(aggregation.ellipsoid)(covariance))
    assert np.all(np.diff(lengths, axis=-1) <= 0)
    rebuilt = np.einsum("...k,...ki,...kj->...ij", lengths**2, axes, axes)
    np.testing.assert_allclose(rebuilt, covariance, atol=0.05)
    np.testing.assert_allclose(axes @ np.swapaxes(axes, -1, -2), np.eye(3) + 0 * axes, atol=1e-5)


def test_ellipsoid_of_a_known_gaussian():
    lengths, axes = aggregation.ellipsoid(jnp.diag(jnp.array([4.0, 100.0, 25.0])))
    np.testing.assert_allclose(lengths, [10, 5, 2], rtol=1e-6)
    np.testing.assert_allclose(np.abs(axes), np.eye(3)[[1, 2, 0]], atol=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.31])
def test_uncalibrated_radius_is_the_quantile_of_the_distances(level):
    hypotheses, _ = random_case(22)
    chosen = aggregation.mean(hypotheses)
    distances = np.linalg.norm(np.float64(hypotheses) - np.float64(chosen)[:, None], axis=-1)
    calibration = uncalibrated(level)
    result = calibrated_radius(hypotheses, chosen, calibration)
    np.testing.assert_allclose(result, np.quantile(distances, level, axis=1), atol=1e-3)
    np.testing.assert_array_equal(result[:, 0], 0)
    assert not calibration.is_guaranteed
    assert "not calibrated" in calibration.meaning


def draw_frames(seed, num_frames, M=50, too_narrow=1.6):
    """Truths and hypotheses Gaussian about the same pose; the hypotheses lie too close to it.

    Frames have very different spreads, so that only radii that follow them can cover well.
    """
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.normal(size=(num_frames, 1, 1)) * 0.7) * np.linspace(10, 50, 17)[:, None]
    sigma[:, 0] = 0
    truth = sigma * rng.normal(size=(num_frames, 17, 3))
    hypotheses = sigma[:, None] / too_narrow * rng.normal(size=(num_frames, M, 17, 3))
    chosen = hypotheses.mean(1)
    return np.float32(hypotheses), np.float32(chosen), np.linalg.norm(truth - chosen, axis=-1)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.75])
def test_calibrated_radii_cover_fresh_frames(level):
    hypotheses, chosen, distances = draw_frames(30, 1000)
    radii = calibrated_radius(hypotheses, chosen, uncalibrated(level))
    calibration = fit_calibration(distances, radii, level)
    np.testing.assert_allclose(calibration.factor[1:], 1.6, rtol=0.15)
    assert calibration.is_guaranteed
    assert f"{100 * level:g}% of cases (by 1000 frames)" in calibration.meaning

    hypotheses, chosen, distances = draw_frames(31, 1000)
    radii = calibrated_radius(hypotheses, chosen, uncalibrated(level))
    calibrated = calibrated_radius(hypotheses, chosen, calibration)
    np.testing.assert_allclose(calibrated, calibration.apply(radii), rtol=1e-6)
    before = aggregation.coverage(distances, radii)
    after = aggregation.coverage(distances, calibrated)
    assert before[0] == after[0] == 1  # the hip
    assert np.all(before[1:] < level - 0.15)
    # Both samples err: a coverage has twice the variance of a frequency among 1000.
    bound = 4 * np.sqrt(2 * level * (1 - level) / 1000)
    np.testing.assert_allclose(after[1:], level, atol=bound)
    assert after[1:].mean() == pytest.approx(level, abs=bound / 4)


def test_factor_is_the_conformal_rank():
    """Scores 1 to 19 at level 0.9: rank ceil(20 x 0.9) = 18, of 18 frames ceil(17.1) = 18."""
    scores = np.random.default_rng(32).permutation(np.arange(1.0, 20))[:, None] * np.ones((1, 17))
    assert np.all(fit_calibration(20 * scores, np.full((19, 17), 20), 0.9).factor == 18)
    assert np.all(fit_calibration(scores[scores[:, 0] < 19], np.ones((18, 17)), 0.9).factor == 18)
    assert np.all(fit_calibration(scores, np.ones((19, 17)), 0.5).factor == 10)
    # Radii below 1 mm count as 1 mm.
    assert np.all(fit_calibration(scores, np.full((19, 17), 0.01), 0.9).factor == 18)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("N", [19, 20, 99, 100])
def test_factor_has_the_rank_for_every_size(level, N):
    """Against the integer arithmetic of ceil((n + 1) q), levels in hundredths."""
    scores = np.arange(1.0, N + 1)[:, None] * np.ones((1, 17))
    rank = -(-(N + 1) * round(100 * level) // 100)
    calibration = fit_calibration(scores, np.ones((N, 17)), level)
    assert rank <= N
    assert np.all(calibration.factor == rank)
    assert calibration.is_guaranteed


def test_few_frames_have_no_guarantee():
    scores = np.arange(1.0, 9)[:, None] * np.ones((1, 17))
    calibration = fit_calibration(scores, np.ones((8, 17)), 0.9)
    assert np.all(calibration.factor == 8)
    assert not calibration.is_guaranteed
    assert "too few for a guarantee" in calibration.meaning
    assert fit_calibration(scores, np.ones((8, 17)), 0.5).is_guaranteed


def test_groups_count_alike():
    """A clip of 100 easy frames weighs no more than each of three clips of a harder frame.

    At 0.6 the four groups must reach 0.6 x 5 / 4 = 0.75: the easy clip's quarter and two more.
    """
    scores = np.concatenate([np.linspace(0, 1, 100), [5, 6, 7]])[:, None] * np.ones((1, 17))
    groups = np.array(["easy"] * 100 + ["a", "b", "c"])
    radii = np.ones((103, 17))
    assert np.all(fit_calibration(scores, radii, 0.6, groups).factor == 6)
    assert np.all(fit_calibration(scores, radii, 0.6).factor < 1)
    calibration = fit_calibration(scores, radii, 0.9, groups)  # four are too few: 0.9 itself
    assert np.all(calibration.factor == 7)
    assert not calibration.is_guaranteed
    assert "103 frames in 4 groups, too few" in calibration.meaning


def test_groups_of_one_frame_are_the_ungrouped():
    _, _, distances = draw_frames(33, 200, M=2)
    radii = np.random.default_rng(34).uniform(5, 50, size=distances.shape)
    by_frame = fit_calibration(distances, radii, 0.9, np.arange(200)[::-1])
    np.testing.assert_array_equal(by_frame.factor, fit_calibration(distances, radii, 0.9).factor)


def clips(seed, num_clips, frames):
    """Distances whose scale is the clip's own: (num_clips * frames, 17) and clip labels."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(num_clips, 1, 17)))
    distances = 20 * scale * np.abs(rng.normal(size=(num_clips, frames, 17)))
    return distances.reshape(-1, 17), np.repeat(np.arange(num_clips), frames)


def test_grouped_calibration_covers_new_clips():
    """Thirty times: twelve clips calibrate, the frames of a hundred new ones are covered.

    New clips are covered at 0.9 on average over the calibrations, and more; by frames they are not.
    """
    grouped, ungrouped = [], []
    for seed in range(30):
        distances, groups = clips(100 + seed, 12, 30)
        new, _ = clips(500 + seed, 100, 30)
        radii = np.full_like(distances, 20)
        for result, labels in ((grouped, groups), (ungrouped, None)):
            factor = fit_calibration(distances, radii, 0.9, labels).factor
            result.append(aggregation.coverage(new, 20 * factor[None]))
    assert np.mean(grouped) > 0.9
    assert np.mean(ungrouped) < 0.895


def test_held_out_coverage_leaves_each_group_out():
    distances, groups = clips(40, 5, 40)
    order = np.random.default_rng(41).permutation(len(groups))
    distances, groups = distances[order], groups[order]
    radii = np.random.default_rng(42).uniform(0.2, 30, size=distances.shape)
    result = aggregation.held_out_coverage(distances, radii, 0.5, groups)
    assert result.shape == (5, 17)
    for label in range(5):
        out = groups == label
        factor = fit_calibration(distances[~out], radii[~out], 0.5, groups[~out]).factor
        for joint in range(17):
            within = distances[out, joint] <= factor[joint] * np.maximum(radii[out, joint], 1)
            assert result[label, joint] == pytest.approx(within.mean())
    with pytest.raises(ValueError, match="two groups"):
        aggregation.held_out_coverage(distances, radii, 0.5, np.zeros(len(groups)))


def test_one_hypothesis_is_calibrated_by_the_errors_alone():
    """M = 1: no spread, so the calibrated radius is one number a joint, and it still covers."""
    level = 0.9
    hypotheses, chosen, distances = draw_frames(50, 500, M=1)
    np.testing.assert_array_equal(calibrated_radius(hypotheses, chosen, uncalibrated(level)), 0)
    calibration = fit_calibration(distances, np.zeros_like(distances), level)
    hypotheses, chosen, distances = draw_frames(51, 500, M=1)
    radii = np.asarray(calibrated_radius(hypotheses, chosen, calibration))
    assert np.all(np.isfinite(radii))
    assert np.all(radii == radii[:1])
    covered = (distances[:, 5] <= radii[:, 5]).sum()
    assert 1e-4 < binom.cdf(covered, 500, level) < 1 - 1e-4


def test_hip_has_no_radius():
    hypotheses, chosen, distances = draw_frames(52, 50)
    radii = calibrated_radius(hypotheses, chosen, uncalibrated(0.9))
    calibration = fit_calibration(distances, radii, 0.9)
    assert calibration.factor[0] == 0
    np.testing.assert_array_equal(calibrated_radius(hypotheses, chosen, calibration)[:, 0], 0)


def test_calibration_survives_json():
    hypotheses, chosen, distances = draw_frames(53, 50)
    radii = calibrated_radius(hypotheses, chosen, uncalibrated(0.9))
    groups = np.arange(50) // 5
    calibration = fit_calibration(distances, radii, 0.9, groups)
    content = json.loads(json.dumps(aggregation.to_json(calibration), allow_nan=False))
    again = aggregation.from_json(content)
    assert again.meaning == calibration.meaning
    np.testing.assert_array_equal(
        calibrated_radius(hypotheses, chosen, again),
        calibrated_radius(hypotheses, chosen, calibration),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": [1.0] * 16}, "17 finite factors"),
        ({"factor": [1.0] * 16 + [float("nan")]}, "17 finite factors"),
        ({"factor": "big"}, "no calibration"),
        ({"level": 90}, "between 0 and 1"),
        ({"level": None}, "no calibration"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_no_calibration_is_refused(change, message):
    content = aggregation.to_json(uncalibrated(0.9))
    with pytest.raises(ValueError, match=message):
        aggregation.from_json({**content, **change})
    del content["factor"]
    with pytest.raises(ValueError, match=r"no calibration.*factor"):
        aggregation.from_json(content)


def test_bad_input_is_refused():
    good = np.ones((5, 17))
    bad = good.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"distances must be finite.*frame 3, joint 2"):
        fit_calibration(bad, good, 0.9)
    with pytest.raises(ValueError, match=r"radii must be finite.*frame 3, joint 2 holds -1"):
        fit_calibration(good, np.where(np.isnan(bad), -1, good), 0.9)
    for wrong in ((good[:4], good, None), (good[:0], good[:0], None), (good, good, np.ones(4))):
        with pytest.raises(ValueError, match=r"must be \(N, 17\)"):
            fit_calibration(*wrong[:2], 0.9, wrong[2])
    for level in (0, 1, 90):
        with pytest.raises(ValueError, match="between 0 and 1"):
            uncalibrated(level)
        with pytest.raises(ValueError, match="between 0 and 1"):
            fit_calibration(good, good, level)
    hypotheses, _ = random_case(54)
    with pytest.raises(ValueError, match="chosen poses"):
        radius(hypotheses, hypotheses[:, :2, 0], uncalibrated(0.9))


# --- beside a model ----------------------------------------------------------------------


def test_calibrations_beside_a_model(tmp_path):
    """By method; found from a run's folder and from those of its steps."""
    assert aggregation.read_calibration(tmp_path, "mean") is None
    factor = np.linspace(1, 2, 17, dtype=np.float32)
    of_mean = aggregation.Calibration(factor, 1.0, 0.8, 90, 12)
    aggregation.write_calibration(tmp_path, "mean", aggregation.uncalibrated(0.5), {})
    aggregation.write_calibration(tmp_path, "mode", aggregation.uncalibrated(0.9), {})
    aggregation.write_calibration(tmp_path, "mean", of_mean, {"seed": 1, "data": "abc"})
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "100"):
        found = aggregation.read_calibration(folder, "mean")
        np.testing.assert_array_equal(found.factor, factor)
        assert (found.level, found.num_groups) == (0.8, 12)
        assert aggregation.read_calibration(folder, "mode").level == 0.9
        assert aggregation.read_calibration(folder, "medoid") is None


def test_a_calibration_under_other_conditions_counts_as_none(tmp_path, caplog):
    fitted_on = {"seed": 1, "data": "abc"}
    aggregation.write_calibration(tmp_path, "mean", aggregation.uncalibrated(0.5), fitted_on)
    assert aggregation.read_calibration(tmp_path, "mean", fitted_on) is not None
    assert not caplog.records
    other = {"seed": 1, "data": "def"}
    assert aggregation.read_calibration(tmp_path, "mean", other) is None
    assert "calibration.json was fitted under other conditions (data is def, was abc)" in (
        caplog.text
    )
    # One of before this was noted is taken as it is.
    path = tmp_path / aggregation.CALIBRATIONS
    content = json.loads(path.read_text())
    del content["mean"]["fitted_on"]
    path.write_text(json.dumps(content))
    assert aggregation.read_calibration(tmp_path, "mean", other) is not None


@pytest.mark.parametrize("damaged", ["", "[1", '{"mean": {}}', '{"mean": 3}', "3"])
def test_damaged_calibrations(tmp_path, damaged):
    (tmp_path / "calibration.json").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"calibration\.json is damaged .*; remove it"):
        aggregation.read_calibration(tmp_path, "mean")
