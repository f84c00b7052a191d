"""The radius: its conformal calibration on fresh data and known answers, and its file."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.evaluation import calibration
from diffpose_jax.evaluation.calibration import Calibration, fit_calibration, uncalibrated
from diffpose_jax.io.trees import CheckpointError

radius = jax.jit(calibration.radius)


def draw_frames(seed, num_frames, M=50, too_narrow=1.6):
    """Both Gaussian about the same pose, hypotheses too close to it; spreads differ by frame."""
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.normal(size=(num_frames, 1, 1)) * 0.7) * np.linspace(10, 50, 17)[:, None]
    sigma[:, 0] = 0
    truth = sigma * rng.normal(size=(num_frames, 17, 3))
    hypotheses = sigma[:, None] / too_narrow * rng.normal(size=(num_frames, M, 17, 3))
    chosen = jnp.float32(hypotheses.mean(1))
    return jnp.float32(hypotheses), chosen, np.linalg.norm(truth - chosen, axis=-1)


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


@pytest.mark.parametrize("level", [0.05, 0.7, 0.95])
@pytest.mark.parametrize("N", [19, 20, 99])
def test_factor_has_the_conformal_rank(level, N):
    """Against the integer arithmetic of ceil((n + 1) q), levels in hundredths."""
    scores = np.random.default_rng(32).permutation(np.arange(1.0, N + 1))[:, None] * np.ones(17)
    rank = -(-(N + 1) * round(100 * level) // 100)
    fitted = fit_calibration(20 * scores, np.full((N, 17), 20.0), level, np.arange(N))
    assert np.all(fitted.factor == rank)
    assert "too few" not in fitted.meaning
    small = fit_calibration(scores, np.full((N, 17), 0.01), level, np.arange(N))
    assert np.all(small.factor == rank)  # radii below 1 mm count as 1 mm


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


def test_one_hypothesis_is_calibrated_by_the_errors_alone():
    """No spread: the calibrated radius is one number a joint, and it still covers."""
    hypotheses, chosen, distances = draw_frames(50, 500, M=1)
    np.testing.assert_array_equal(radius(hypotheses, chosen, uncalibrated(0.9)), 0)
    fitted = fit_calibration(distances, np.zeros_like(distances), 0.9, np.arange(500))
    radii = np.asarray(radius(hypotheses, chosen, fitted))
    assert np.all(radii == radii[:1])
    assert np.mean(distances <= radii, axis=0)[1:] == pytest.approx(0.9, abs=0.01)


def test_bad_input_is_refused():
    good, frames = np.ones((5, 17)), np.arange(5)
    with pytest.raises(ValueError, match="distances must be numbers"):
        fit_calibration(np.where(np.eye(5, 17), np.nan, good), good, 0.9, frames)
    with pytest.raises(ValueError, match="radii must be numbers"):
        fit_calibration(good, -good, 0.9, frames)


FITTED = Calibration(np.linspace(1, 2, 17, dtype=np.float32), 1.0, 0.8, 90, 12)


def test_calibrations_beside_a_model(tmp_path):
    """By method; found from a run's folder and from those of its steps.

    One that does not say what it was fitted on is taken.
    """
    assert calibration.read_calibration(tmp_path, "mean") is None
    fitted = FITTED.replace(solver="ddpm", num_hypotheses=7)
    fitted_on = {"seed": 1, "solver": "ddpm", "num_hypotheses": 7}
    calibration.write_calibration(tmp_path, "mean", uncalibrated(0.5), {})
    calibration.write_calibration(tmp_path, "mode", uncalibrated(0.9), {})
    calibration.write_calibration(tmp_path, "mean", fitted, fitted_on)
    for folder in (tmp_path, tmp_path / "checkpoints" / "100"):
        chex.assert_trees_all_equal(calibration.read_calibration(folder, "mean", fitted_on), fitted)
        assert calibration.read_calibration(folder, "mode", fitted_on).level == 0.9
        assert calibration.read_calibration(folder, "medoid") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": [1.0] * 16}, "factor must be of type"),
        ({"factor": [1.0] * 16 + [float("nan")]}, "factor must be finite"),
        ({"factor": "big"}, "big"),
        ({"level": 10**400}, "too large"),
        ({"level": 90}, "level must be"),
        ({"colour": 1}, "unknown field colour"),
        ({"fitted_on": {"solver": 3}}, "solver must be"),
        ({"fitted_on": [3]}, ""),
        ("[1", ""),
        ('{"mean": 3}', ""),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, change, message):
    calibration.write_calibration(tmp_path, "mean", FITTED, {})
    path = tmp_path / "calibration.json"
    if isinstance(change, dict):
        change = json.dumps({"mean": json.loads(path.read_text())["mean"] | change})
    path.write_text(change)
    with pytest.raises(CheckpointError, match=rf"json is damaged .*{message}.*; remove it"):
        calibration.read_calibration(tmp_path, "mean")
