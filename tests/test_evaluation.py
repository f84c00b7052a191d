"""The evaluation: subsets, padding and what results.json holds."""

import json

import jax
import numpy as np
import pytest
from small import examples, model_of, small_config

from diffpose_jax import evaluation

NUMBER, NUM_HYPOTHESES = 6, 5
KEY = jax.random.key(7)
SAMPLE_KEY, _ = jax.random.split(KEY)
WIDE = (1, 4)
METRICS = {
    "mpjpe_best",
    "mpjpe_mean",
    "mpjpe_median",
    "pa_mpjpe_best",
    "pa_mpjpe_mean",
    "pck150_best",
    "cps_best",
    "symmetry",
    "energy_score",
}
OF_SEVERAL = {"ece", "ece_quantile", "mpjpe_best_at"}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def test_split():
    return examples(0, NUMBER, wide=WIDE)


@pytest.fixture(scope="module")
def model():
    return model_of(small_config(), jax.random.key(0))


@pytest.fixture(scope="module")
def controls():
    return evaluation.fit_controls(jax.random.key(1), examples(1, 40), small_config().evaluation)


@pytest.fixture(scope="module")
def results(model, controls, test_split):
    """Evaluated in batches of 4, the second of them with 2 frames and 2 of padding."""
    wide = np.isin(np.arange(NUMBER), WIDE)
    return evaluation.evaluate(
        KEY,
        model,
        controls,
        test_split,
        {"ambiguous": wide, "clear": ~wide, "none": np.zeros(NUMBER, bool)},
        num_hypotheses=NUM_HYPOTHESES,
        batch_size=4,
    )


def test_results_have_the_keys_of_the_contract(results):
    assert set(results) == {"num_hypotheses", "subsets"}
    assert results["num_hypotheses"] == NUM_HYPOTHESES
    assert set(results["subsets"]) == {"all", "ambiguous", "clear"}
    for subset, frames in (("all", 6), ("ambiguous", 2), ("clear", 4)):
        methods = results["subsets"][subset]
        assert methods["frames"] == frames
        assert set(methods) == {"frames", "model", "mean_pose", "regression", "gaussian"}
        for method in ("model", "gaussian"):
            assert set(methods[method]) == METRICS | OF_SEVERAL
            assert list(methods[method]["mpjpe_best_at"]) == [1, 2, 5]
        for method in ("mean_pose", "regression"):
            assert set(methods[method]) == METRICS
    content = json.loads(json.dumps(results, allow_nan=False))
    assert content["subsets"]["all"]["model"]["mpjpe_best_at"].keys() == {"1", "2", "5"}


def test_subsets_add_up(results):
    subsets = results["subsets"]
    for method in ("model", "mean_pose", "regression", "gaussian"):
        for metric in METRICS:
            parts = [subsets[s]["frames"] * subsets[s][method][metric] for s in subsets]
            assert parts[0] == pytest.approx(parts[1] + parts[2], rel=1e-4)


def test_model_is_scored_on_its_own_samples(results, model, test_split):
    """On all six frames and nothing else: padding does not count."""
    maps = test_split.heatmaps(np.arange(NUMBER))
    hypotheses_mm = np.asarray(model.sample(SAMPLE_KEY, maps, NUM_HYPOTHESES), np.float64)
    distance = np.linalg.norm(hypotheses_mm - test_split.pose_mm[:, None], axis=-1).mean(-1)
    scored = results["subsets"]["all"]["model"]
    assert scored["mpjpe_best"] == pytest.approx(distance.min(1).mean(), rel=1e-4)
    assert scored["mpjpe_mean"] == pytest.approx(distance.mean(), rel=1e-4)
    assert scored["mpjpe_best_at"][NUM_HYPOTHESES] == pytest.approx(scored["mpjpe_best"])


def test_mean_pose_is_that_of_the_training_split(results, controls, test_split):
    mean_mm = examples(1, 40).pose_mm.astype(np.float64).mean(0)
    np.testing.assert_allclose(controls.mean_pose_mm, mean_mm, atol=1e-2)
    error = np.linalg.norm(mean_mm[None] - test_split.pose_mm, axis=-1).mean()
    assert results["subsets"]["all"]["mean_pose"]["mpjpe_best"] == pytest.approx(error, rel=1e-4)


def test_gaussian_draws_differ_between_batches(model, controls):
    """Two batches of the same frames: equal but for the draws around the regression."""
    one = examples(3, 4)
    twice = evaluation.Examples(
        pose_mm=np.tile(one.pose_mm, (2, 1, 1)),
        clips=np.tile(one.clips, 2),
        names=np.tile(one.names, 2),
        heatmaps=lambda rows: one.heatmaps(rows % 4),
    )
    first = np.arange(8) < 4
    subsets = evaluation.evaluate(
        KEY,
        model,
        controls,
        twice,
        {"ambiguous": first, "clear": ~first, "none": np.zeros(8, bool)},
        num_hypotheses=NUM_HYPOTHESES,
        batch_size=4,
    )["subsets"]
    assert subsets["ambiguous"]["model"] == subsets["clear"]["model"]
    assert subsets["ambiguous"]["gaussian"] != subsets["clear"]["gaussian"]


def test_ambiguous_frames(test_split):
    marks = evaluation.ambiguous_frames(test_split, 5.0, 4)
    assert marks.dtype == bool
    assert np.flatnonzero(marks).tolist() == list(WIDE)
    assert not evaluation.ambiguous_frames(test_split, 30.0, 4).any()


def test_regression_inputs(test_split):
    maps = test_split.heatmaps(np.arange(NUMBER))
    inputs = np.asarray(evaluation.regression_inputs(maps))
    flat = maps.reshape(NUMBER, 16, -1)
    row, column = np.divmod(flat.argmax(-1), 64)
    np.testing.assert_allclose(inputs[..., 0], (column - 32) / 32, atol=1e-6)
    np.testing.assert_allclose(inputs[..., 1], (row - 32) / 32, atol=1e-6)
    np.testing.assert_allclose(inputs[..., 2], flat.max(-1), atol=1e-6)
