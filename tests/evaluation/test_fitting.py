"""Baselines, prediction errors and calibrations are fitted once; which frames are ambiguous."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    examples,
    parsed,
    random_errors,
    random_heatmaps,
    small_config,
    small_model,
    write_motion,
)

from diffpose_jax.config import ConfigError
from diffpose_jax.data import pipeline
from diffpose_jax.data.motion import read_folder
from diffpose_jax.evaluation import baselines, calibration, fitting
from diffpose_jax.method.pose_vector import pose_to_vector

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)
SETTINGS = dataclasses.replace(
    parsed(small_config()).evaluation, pose="mean", num_hypotheses=4, radius_level=0.75
)
FITTED_ON = {"data": "abc", "seed": 0}
HELD_OUT = dataclasses.replace(examples(5, 40), clips=np.repeat(["short", "long"], [8, 32]))


def not_read():
    raise AssertionError("the training split was read")


def fitted_baselines(value):
    moments = np.ones((4, 16, 3), np.float32)
    regression = baselines.RegressionParams({"params": {"a": np.ones(2)}}, *moments)
    gaussian = baselines.GaussianParams(np.eye(48, dtype=np.float32))
    return baselines.Baselines(np.full((17, 3), value, np.float32), regression, gaussian)


def baselines_of(folders, train=lambda: (examples(1, 8), None), fitted_on=FITTED_ON, **settings):
    """By which fit they are."""
    changed = dataclasses.replace(SETTINGS, **settings)
    return fitting.baselines(KEY, train, changed, fitted_on, folders).mean_pose_mm[0, 0]


def fitted_calibration(value):
    return calibration.Calibration(np.full(17, value, np.float32), 1.0, 0.75, 90, 12)


def holding_out(model):
    """Of a training that held recordings out."""
    data = dataclasses.replace(model.config.data, calibration_share=0.5)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))


def calibration_of(
    folders, train=lambda: (None, HELD_OUT), fitted_on=FITTED_ON, solver="ddpm", **settings
):
    """By which fit it is."""
    model = holding_out(small_model())
    model = dataclasses.replace(model, default_solver=model.parse_solver(solver))
    model = dataclasses.replace(model, params=settings.pop("params", model.params))
    changed = dataclasses.replace(SETTINGS, **settings)
    return fitting.radius_calibration(KEY, train, model, changed, fitted_on, folders).factor[0]


@pytest.fixture(params=["baselines", "calibration"])
def fitter(request, monkeypatch):
    """What reads or fits, and the name of its file; each fit gives a number more."""
    times = itertools.count(1)
    fits = {
        "baselines": (baselines, fitted_baselines, baselines_of, "baselines.npz"),
        "calibration": (fitting, fitted_calibration, calibration_of, "calibration.json"),
    }
    module, make, of, name = fits[request.param]
    monkeypatch.setattr(module, f"fit_{request.param}", lambda *_, **__: make(float(next(times))))
    return of, name


@pytest.mark.parametrize(
    ("fitter", "change", "message"),
    [
        ("baselines", {"regression_steps": 4}, "regression_steps is 4, was 10"),
        ("baselines", {"fitted_on": {"data": "def", "seed": 1}}, "data is .*, seed is 1, was 0"),
        ("calibration", {"num_hypotheses": 5}, "num_hypotheses is 5, was 4"),
        ("calibration", {"radius_level": 0.5}, "level is 0.5, was 0.75"),
        ("calibration", {"solver": "ddpm:2"}, "solver is ddpm:2, was ddpm"),
        ("calibration", {"params": {"a": np.ones(2)}}, "parameters is .*, was .*"),
    ],
    indirect=["fitter"],
)
def test_they_are_fitted_anew_for_other_settings_or_data(fitter, tmp_path, caplog, change, message):
    """And not under the same conditions, also when they lie in the checkpoint's folder."""
    run, output = tmp_path / "run", tmp_path / "output"
    of, name = fitter
    assert of((run, run)) == 1
    assert of((output, run), train=not_read) == 1
    assert not output.exists()
    assert not caplog.records
    assert of((output, run), **change) == 2
    assert re.search(rf"{name} was fitted under other conditions \({message}\)", caplog.text)
    assert of((output, run), **change, train=not_read) == 2
    assert of((run, run), train=not_read) == 1


def test_baselines_are_of_the_training_split(tmp_path):
    train = examples(1, 40)
    found = fitting.baselines(KEY, lambda: (train, None), SETTINGS, FITTED_ON, (tmp_path,))
    mean_mm = train.pose_mm.astype(np.float64).mean(0)
    np.testing.assert_allclose(found.mean_pose_mm, mean_mm, atol=1e-2)
    assert found.regression.variables["params"]["Dense_0"]["kernel"].shape[1] == 8  # the width


def test_prediction_errors_are_those_of_the_plain_loop():
    """In float64, one frame after the other, of 70 frames among 75: each of them once."""
    model, frames = small_model(target="edm"), examples(5, 75)
    network, params, schedule = model.network, model.params, model.network.schedule
    found = fitting.measure_errors(KEY, model, frames, max_frames=70)
    times = jnp.tile(jnp.arange(5), (4, 1))

    @jax.jit
    def predictions(key, heatmaps, x_t):
        projected = network.project_condition(
            params, network.condition(params, network.encoder_input(key, heatmaps))
        )
        return jax.vmap(jax.vmap(network.denoise(params, projected)))(x_t, times)

    rows, key, expected = np.linspace(0, 74, 70).astype(int), KEY, np.zeros((3, 5, 48, 48))
    a = schedule.alphas_cumprod[:, None]
    for i, row in enumerate(rows):
        if i % 64 == 0:
            key, batch_key = jax.random.split(key)
            keys = jax.random.split(batch_key, 64)
        candidate_key, noise_key = jax.random.split(keys[i % 64])
        noise = np.float64(jax.random.normal(noise_key, (4, 5, 48)))
        x_0 = np.float64(pose_to_vector(jnp.asarray(frames.pose_mm[row])))
        x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise
        maps = jnp.asarray(frames.heatmaps(np.array([row]))[0])
        predicted = np.float64(predictions(candidate_key, maps, jnp.float32(x_t)))
        e, r = x_0 - predicted, x_t - np.sqrt(a) * predicted
        pairs = ((e, e), (e, r), (r, r))
        expected += np.stack([np.einsum("dti,dtj->tij", x, y) for x, y in pairs]) / (4 * 70)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected[0].max())


def test_errors_are_measured_once_for_the_same_parameters(tmp_path, monkeypatch):
    """From the folder or the model; beside them the moments of the training poses."""
    times = itertools.count(1)
    moments = np.ones((3, 5, 48, 48), np.float32)
    monkeypatch.setattr(fitting, "measure_errors", lambda *_: list(next(times) * moments))
    monkeypatch.setattr(fitting, "fit_noise", lambda *_: 0.25 * next(times))
    model, train = holding_out(small_model()), examples(1, 8)
    model_errors = functools.partial(fitting.prediction_errors, KEY)
    solver, split = "ddpm:2+cov", lambda: (train, HELD_OUT)
    first = model_errors(split, model, solver, tmp_path)
    assert first.noise == {solver: 0.5}
    vectors = np.float64(pose_to_vector(jnp.asarray(train.pose_mm)))
    np.testing.assert_allclose(first.mean, vectors.mean(0), atol=1e-5)
    np.testing.assert_allclose(first.variance, vectors.var(0), rtol=1e-5)
    again = model_errors(not_read, model, solver, tmp_path)
    chex.assert_trees_all_equal(again, first)
    assert again.noise == first.noise
    model = dataclasses.replace(model, errors=first)
    assert model_errors(not_read, model, solver, tmp_path / "other") is first
    # Another solver has noise of its own, from the same errors; one without any needs none.
    both = model_errors(split, model, "ddpm+var", tmp_path)
    assert both.noise == {solver: 0.5, "ddpm+var": 0.75}
    chex.assert_trees_all_equal(both.error, first.error)
    assert model_errors(not_read, model, "ddpm:3@4", tmp_path).noise == both.noise
    other = dataclasses.replace(model, errors=None, params={"a": np.ones(2)})
    assert model_errors(split, other, solver, tmp_path).error[0, 0, 0] == 4


def test_no_errors_are_measured_where_nothing_was_held_out(tmp_path):
    assert fitting.prediction_errors(KEY, not_read, small_model(), "ddpm+cov", tmp_path) is None


def test_the_noise_of_a_solver_is_found():
    """By frames whose truth is drawn with it."""
    factor = 0.25
    solver, maps = "ddpm:3+cov", random_heatmaps(3, 640)
    model = small_model(target="edm", candidate_sets=1)
    errors = random_errors(4).replace(noise={solver: factor})
    model = dataclasses.replace(model, errors=errors)
    truth_mm = np.asarray(model.sample(jax.random.key(8), maps, 1, solver))[:, 0]
    names = np.arange(640).astype(str)
    frames = pipeline.Examples(truth_mm, names, names, lambda rows: maps[rows])
    assert fitting.fit_noise(KEY, model, frames, solver, 640) == pytest.approx(factor, rel=0.35)


def test_recordings_held_out_are_as_recorded(tmp_path):
    """And the same ones as the training leaves out."""
    config = small_config()
    config.data.calibration_share = 0.5
    config.data.builder.source = str(write_motion(tmp_path / "motion"))
    config.data.builder.update(train_views_per_frame=6, test_views_per_frame=1)
    config.data.builder.body.update(exchange=1.0, mirror=0.0)
    config = parsed(config)
    train, held_out = fitting.training_split(config, tmp_path / "data")()
    everything = pipeline.load(config.data, "train", tmp_path / "data")
    expected, left = pipeline.hold_out(everything, 0.5)
    assert set(train.clips) == set(expected.clips)
    assert set(held_out.clips) == set(left.clips)
    assert len(held_out) == 4 / 6 * len(left)
    # The angle of the elbow is the recording's, whatever the body.
    clip = next(c for c in read_folder(tmp_path / "motion") if c.name == held_out.clips[0])

    def elbows(poses):
        upper, lower = poses[:, 12] - poses[:, 11], poses[:, 13] - poses[:, 12]
        lengths = np.linalg.norm(upper, axis=-1) * np.linalg.norm(lower, axis=-1)
        return np.degrees(np.arccos((upper * lower).sum(-1) / lengths))

    recorded = elbows(np.float64(clip.positions_mm))
    off = np.abs(elbows(np.float64(held_out.pose_mm))[:, None] - recorded).min(1)
    assert off.max() < 0.01
    assert np.abs(elbows(np.float64(left.pose_mm))[:, None] - recorded).min(1).max() > 1


def test_a_calibration_covers_what_it_was_fitted_on():
    """By recording: of two, each weighs the same whatever its number of frames."""
    settings = dataclasses.replace(SETTINGS, batch_size=16)
    fitted = fitting.fit_calibration(KEY, small_model(), HELD_OUT, settings)
    assert (fitted.level, fitted.num_frames, fitted.num_groups) == (0.75, 40, 2)
    assert (fitted.solver, fitted.num_hypotheses) == ("ddpm", 4)
    maps = HELD_OUT.heatmaps(np.arange(40))
    hypotheses_mm = np.float64(small_model().sample(KEY, maps, 4))
    mean_mm = hypotheses_mm.mean(1)
    distances = np.linalg.norm(mean_mm - HELD_OUT.pose_mm, axis=-1)
    radii = np.quantile(np.linalg.norm(hypotheses_mm - mean_mm[:, None], axis=-1), 0.75, axis=1)
    is_within = distances <= 1.0001 * fitted.factor * np.maximum(radii, fitted.floor_mm)
    share = (is_within[:8].mean(0) + is_within[8:].mean(0)) / 2
    assert (share[1:] >= 0.75 - 1e-6).all()
    assert (share[1:] < 0.75 + 1 / 8).all()


def marked(test, **settings):
    marks = fitting.ambiguous_frames(test, dataclasses.replace(SETTINGS, batch_size=4, **settings))
    assert marks.dtype == bool
    return np.flatnonzero(marks).tolist()


def test_ambiguous_frames_by_rule_by_the_data_set_and_by_list(tmp_path):
    test = examples(0, 6, wide=(1, 4))
    assert marked(test, ambiguous="rule", ambiguous_sigma_px=5.0) == [1, 4]
    assert marked(test, ambiguous="rule", ambiguous_sigma_px=30.0) == []
    stored = dataclasses.replace(test, ambiguous=np.arange(6) == 2)
    assert marked(stored, ambiguous="stored") == [2]
    with pytest.raises(ConfigError, match="marks no frames"):
        marked(test, ambiguous="stored")
    listed = tmp_path / "frames.txt"
    listed.write_text("clip 5\n\n clip 0\n")
    assert marked(test, ambiguous=str(listed)) == [0, 5]
    listed.write_text("clip 5\nclip 7\nclip 8\n")
    with pytest.raises(ConfigError, match=r"named 'clip 7' \(2 names are unknown\); .* 'clip 0'"):
        marked(test, ambiguous=str(listed))
    with pytest.raises(ConfigError, match="rule, stored, or a file; there is no no/such"):
        marked(test, ambiguous="no/such")
