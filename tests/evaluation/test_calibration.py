"""The radius: its conformal calibration on fresh data and known answers, and its file."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from diffpose_jax.evaluation import aggregation, calibration
from diffpose_jax.evaluation.calibration import Calibration, fit_calibration, uncalibrated
from diffpose_jax.io.trees import CheckpointError

radius = jax.jit(calibration.radius)


def draw_frames(seed, num_frames, M=50, too_narrow=1.6):
    """Truths and hypotheses Gaussian about the same pose; the hypotheses lie too close to it.

    Frames have very different spreads, so that only radii that follow them can cover well.
    """
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.normal(size=(num_frames, 1, 1)) * 0.7) * np.linspace(10, 50, 17)[:, None]
    sigma[:, 0] = 0
    truth = sigma * rng.normal(size=(num_frames, 17, 3))
    hypotheses = sigma[:, None] / too_narrow * rng.normal(size=(num_frames, M, 17, 3))
    chosen = jnp.float32(hypotheses.mean(1))
    return jnp.float32(hypotheses), chosen, np.linalg.norm(truth - chosen, axis=-1)


def test_uncalibrated_radius_is_the_quantile_of_the_distances():
    hypotheses, chosen, _ = draw_frames(22, 4, M=8)
    distances = np.linalg.norm(np.float64(hypotheses) - np.float64(chosen)[:, None], axis=-1)
    for level in (0.5, 0.9, 0.31):
        result = radius(hypotheses, chosen, uncalibrated(level))
        np.testing.assert_allclose(result, np.quantile(distances, level, axis=1), atol=1e-3)
        np.testing.assert_array_equal(result[:, 0], 0)
        assert "not calibrated" in uncalibrated(level).meaning


def test_choose_is_one_program_for_all_calibrations():
    hypotheses, chosen, _ = draw_frames(23, 3, M=5)
    maps = jnp.zeros((3, 16, 64, 64))
    chex.clear_trace_counter()
    choose = jax.jit(chex.assert_max_traces(calibration.choose.__wrapped__, n=1), static_argnums=0)
    for factor in (1, 2):
        fitted = Calibration(np.full(17, factor, np.float32), 1.0, 0.8, 90, 12)
        pose, radii, covariance = choose("mean", hypotheses, maps, fitted)
        np.testing.assert_allclose(pose, chosen, atol=1e-3)
        np.testing.assert_allclose(radii, radius(hypotheses, pose, fitted), rtol=1e-6)
        expected = aggregation.covariance(hypotheses)
        np.testing.assert_allclose(covariance, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_calibrated_radii_cover_fresh_frames(level):
    hypotheses, chosen, distances = draw_frames(30, 1000)
    radii = np.asarray(radius(hypotheses, chosen, uncalibrated(level)))
    fitted = fit_calibration(distances, radii, level, np.arange(1000))
    np.testing.assert_allclose(fitted.factor[1:], 1.6, rtol=0.15)
    assert fitted.factor[0] == 0  # the hip
    assert f"{100 * level:g}% of cases (by 1000 frames)" in fitted.meaning

    hypotheses, chosen, distances = draw_frames(31, 1000)
    before = np.mean(distances <= radius(hypotheses, chosen, uncalibrated(level)), axis=0)
    after = np.mean(distances <= radius(hypotheses, chosen, fitted), axis=0)
    assert np.all(before[1:] < level - 0.15)
    # Both samples err: a coverage has twice the variance of a frequency among 1000.
    bound = 4 * np.sqrt(2 * level * (1 - level) / 1000)
    np.testing.assert_allclose(after[1:], level, atol=bound)
    assert after[1:].mean() == pytest.approx(level, abs=bound / 4)
    assert after[0] == 1


@pytest.mark.parametrize("level", [0.05, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("N", [19, 20, 99])
def test_factor_has_the_conformal_rank(level, N):
    """Against the integer arithmetic of ceil((n + 1) q), levels in hundredths."""
    scores = np.random.default_rng(32).permutation(np.arange(1.0, N + 1))[:, None] * np.ones(17)
    rank = -(-(N + 1) * round(100 * level) // 100)
    fitted = fit_calibration(20 * scores, np.full((N, 17), 20.0), level, np.arange(N))
    assert np.all(fitted.factor == rank)
    assert "too few" not in fitted.meaning
    # Radii below 1 mm count as 1 mm.
    assert np.all(
        fit_calibration(scores, np.full((N, 17), 0.01), level, np.arange(N)).factor == rank
    )


def test_groups_count_alike():
    """A clip of 100 easy frames weighs no more than each of three clips of a harder frame.

    At 0.6 the four groups must reach 0.6 x 5 / 4 = 0.75: the easy clip's quarter and two more.
    """
    scores = np.concatenate([np.linspace(0, 1, 100), [5, 6, 7]])[:, None] * np.ones((1, 17))
    groups = np.array(["easy"] * 100 + ["a", "b", "c"])
    radii = np.ones((103, 17))
    assert np.all(fit_calibration(scores, radii, 0.6, groups).factor == 6)
    assert np.all(fit_calibration(scores, radii, 0.6, np.arange(103)).factor < 1)
    fitted = fit_calibration(scores, radii, 0.9, groups)  # four are too few: 0.9 itself
    assert np.all(fitted.factor == 7)
    assert "103 frames in 4 groups, too few for a guarantee" in fitted.meaning
    assert "too few" not in fit_calibration(scores, radii, 0.6, groups).meaning


def test_grouped_calibration_covers_new_clips():
    """Thirty times: twelve clips calibrate, the frames of a hundred new ones are covered.

    A clip's distances have its own scale. New clips are covered at 0.9 on average over the
    calibrations, and more; by frames they are not.
    """
    covered = {"clips": [], "frames": []}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scale = 20 * np.exp(rng.normal(size=(112, 1, 17)))
        distances = scale * np.abs(rng.normal(size=(112, 30, 17)))
        fitted_on, new = distances[:12].reshape(-1, 17), distances[12:].reshape(-1, 17)
        for by, groups in (("clips", np.repeat(np.arange(12), 30)), ("frames", np.arange(360))):
            factor = fit_calibration(fitted_on, np.full_like(fitted_on, 20), 0.9, groups).factor
            covered[by].append(np.mean(new <= 20 * factor))
    assert np.mean(covered["clips"]) > 0.9
    assert np.mean(covered["frames"]) < 0.895


def test_one_hypothesis_is_calibrated_by_the_errors_alone():
    """M = 1: no spread, so the calibrated radius is one number a joint, and it still covers."""
    hypotheses, chosen, distances = draw_frames(50, 500, M=1)
    np.testing.assert_array_equal(radius(hypotheses, chosen, uncalibrated(0.9)), 0)
    fitted = fit_calibration(distances, np.zeros_like(distances), 0.9, np.arange(500))
    hypotheses, chosen, distances = draw_frames(51, 500, M=1)
    radii = np.asarray(radius(hypotheses, chosen, fitted))
    assert np.all(radii == radii[:1])
    covered = (distances[:, 5] <= radii[:, 5]).sum()
    assert 1e-4 < binom.cdf(covered, 500, 0.9) < 1 - 1e-4


def test_bad_input_is_refused():
    good, frames = np.ones((5, 17)), np.arange(5)
    with pytest.raises(ValueError, match="distances must be numbers"):
        fit_calibration(np.where(np.eye(5, 17), np.nan, good), good, 0.9, frames)
    with pytest.raises(ValueError, match="radii must be numbers"):
        fit_calibration(good, -good, 0.9, frames)
    with pytest.raises(ValueError, match="level must be"):
        uncalibrated(90.0)


def fitted_calibration(**changes):
    factor = np.linspace(1, 2, 17, dtype=np.float32)
    return Calibration(factor, 1.0, 0.8, 90, 12).replace(**changes)


def test_calibrations_beside_a_model(tmp_path):
    """By method; found from a run's folder and from those of its steps."""
    assert calibration.read_calibration(tmp_path, "mean") is None
    fitted = fitted_calibration(solver="ddpm", num_hypotheses=7)
    fitted_on = {"seed": 1, "solver": "ddpm", "num_hypotheses": 7}
    calibration.write_calibration(tmp_path, "mean", uncalibrated(0.5), {})
    calibration.write_calibration(tmp_path, "mode", uncalibrated(0.9), {})
    calibration.write_calibration(tmp_path, "mean", fitted, fitted_on)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "100"):
        chex.assert_trees_all_equal(calibration.read_calibration(folder, "mean", fitted_on), fitted)
        assert calibration.read_calibration(folder, "mode").level == 0.9
        assert calibration.read_calibration(folder, "medoid") is None
    assert fitted.fits("ddpm", 7)
    assert not fitted.fits("ddpm:4", 7)
    assert not fitted.fits("ddpm", 8)
    assert uncalibrated(0.5).fits("ddpm:4", 8)  # not known: taken as it is


def test_a_calibration_under_other_conditions_counts_as_none(tmp_path, caplog):
    fitted_on, other = {"seed": 1, "data": "abc"}, {"seed": 1, "data": "def"}
    calibration.write_calibration(tmp_path, "mean", uncalibrated(0.5), fitted_on)
    assert calibration.read_calibration(tmp_path, "mean", fitted_on) is not None
    assert not caplog.records
    assert calibration.read_calibration(tmp_path, "mean", other) is None
    assert "was fitted under other conditions (data is def, was abc)" in caplog.text
    # A file of before this was noted is taken as it is.
    path = tmp_path / "calibration.json"
    content = json.loads(path.read_text())
    del content["mean"]["fitted_on"]
    path.write_text(json.dumps(content))
    assert calibration.read_calibration(tmp_path, "mean", other) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": [1.0] * 16}, "factor must be of type"),
        ({"factor": [1.0] * 16 + [float("nan")]}, "factor must be finite"),
        ({"factor": "big"}, "big"),
        ({"factor": [1e300] * 17}, "factor must be finite"),
        ({"level": 10**400}, "too large"),
        ({"level": 90}, "level must be"),
        ({"colour": 1}, "unknown field colour"),
        ({"fitted_on": {"solver": 3}}, "solver must be"),
        ({"fitted_on": [3]}, ""),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, change, message):
    calibration.write_calibration(tmp_path, "mean", fitted_calibration(), {})
    path = tmp_path / "calibration.json"
    fields = json.loads(path.read_text())["mean"] | change
    for content in (json.dumps({"mean": fields}), "[1", "3", '{"mean": {}}', '{"mean": 3}'):
        path.write_text(content)
        message = message if "factor" in content else ""
        with pytest.raises(CheckpointError, match=rf"json is damaged .*{message}.*; remove it"):
            calibration.read_calibration(tmp_path, "mean")
