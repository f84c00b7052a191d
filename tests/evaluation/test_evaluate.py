"""The evaluation: subsets, padding and what results.json holds."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from small import examples, model_of, small_config

from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation import evaluate as evaluation

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
    "pck150_all_best",
    "pck150_scaled_best",
    "cps_best",
    "cps_area_best",
    "symmetry",
    "energy_score",
}
OF_SEVERAL = {"ece", "ece_quantile", "mpjpe_best_at"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


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
        {
            "all": np.ones(NUMBER, bool),
            "ambiguous": wide,
            "clear": ~wide,
            "none": np.zeros(NUMBER, bool),
        },
        num_hypotheses=(NUM_HYPOTHESES,),
        batch_size=4,
    )[NUM_HYPOTHESES]


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


def test_frames_outside_of_all_subsets_are_not_sampled(model, test_split):
    """And frames outside of "all" count where another subset has them."""
    counted, other = np.arange(NUMBER) % 3 == 0, np.arange(NUMBER) == 1
    asked = []

    def heatmaps(rows):
        asked.extend(rows.tolist())
        return test_split.heatmaps(rows)

    results = evaluation.evaluate(
        KEY,
        model,
        None,
        dataclasses.replace(test_split, heatmaps=heatmaps),
        {"all": counted, "ambiguous": other},
        num_hypotheses=(NUM_HYPOTHESES,),
        batch_size=4,
    )[NUM_HYPOTHESES]["subsets"]
    assert set(asked) == {0, 1, 3}
    assert {name: subset["frames"] for name, subset in results.items()} == {
        "all": 2,
        "ambiguous": 1,
    }
    assert set(results["all"]) == {"frames", "model"}


def test_groups_and_their_unweighted_mean(model, controls, test_split):
    """Three frames of one action, one of another; the last two are not in "all"."""
    actions = np.array(["Walking", "Walking", "Eating", "Walking", "Eating", "Posing"])
    results = evaluation.evaluate(
        KEY,
        model,
        controls,
        dataclasses.replace(test_split, groups={"action": actions}),
        {"all": np.arange(NUMBER) < 4},
        num_hypotheses=(NUM_HYPOTHESES,),
        batch_size=4,
        group_by=("action",),
    )[NUM_HYPOTHESES]
    groups, average = results["groups"]["action"], results["averages"]["action"]
    assert {name: group["frames"] for name, group in groups.items()} == {"Eating": 1, "Walking": 3}
    for method in ("model", "mean_pose", "regression", "gaussian"):
        eating, walking = (groups[name][method]["mpjpe_best"] for name in ("Eating", "Walking"))
        assert average[method]["mpjpe_best"] == pytest.approx((eating + walking) / 2)
        overall = results["subsets"]["all"][method]["mpjpe_best"]
        assert overall == pytest.approx((eating + 3 * walking) / 4)
    assert set(average["model"]) == METRICS | OF_SEVERAL
    assert set(results["subsets"]) == {"all"}


def test_several_numbers_of_hypotheses_in_one_pass(model, controls, test_split):
    """Fewer are the first of the most, for the model and for the draws around the regression."""
    everything = {"all": np.ones(NUMBER, bool)}
    evaluate = functools.partial(
        evaluation.evaluate, KEY, model, controls, test_split, everything, batch_size=4
    )
    both = evaluate(num_hypotheses=(NUM_HYPOTHESES, 2))
    assert list(both) == [NUM_HYPOTHESES, 2]
    alone = evaluate(num_hypotheses=(2,))[2]["subsets"]["all"]
    fewer = both[2]["subsets"]["all"]
    assert both[2]["num_hypotheses"] == 2
    assert fewer["model"]["mpjpe_best_at"] == pytest.approx(alone["model"]["mpjpe_best_at"])
    assert (
        fewer["gaussian"]["mpjpe_best"]
        > both[NUM_HYPOTHESES]["subsets"]["all"]["gaussian"]["mpjpe_best"]
    )


def test_single_poses_and_their_radius(model, test_split):
    """Against poses, distances and quantiles made here, on all frames and on two of them."""
    wide = np.isin(np.arange(NUMBER), WIDE)
    calibration = aggregation.uncalibrated(0.5)
    subsets = evaluation.evaluate(
        KEY,
        model,
        None,
        test_split,
        {"all": np.ones(NUMBER, bool), "ambiguous": wide},
        num_hypotheses=(NUM_HYPOTHESES,),
        batch_size=4,
        calibration=calibration.replace(factor=np.full(17, 1.5, np.float32)),
        pose="mean",
    )[NUM_HYPOTHESES]["subsets"]
    maps = test_split.heatmaps(np.arange(NUMBER))
    hypotheses_mm = np.asarray(model.sample(SAMPLE_KEY, maps, NUM_HYPOTHESES), np.float64)
    mean_mm = hypotheses_mm.mean(1)
    distance = np.linalg.norm(mean_mm - test_split.pose_mm, axis=-1)
    radius = 1.5 * np.median(np.linalg.norm(hypotheses_mm - mean_mm[:, None], axis=-1), axis=1)
    for name, frames in (("all", slice(None)), ("ambiguous", wide)):
        methods = subsets[name]
        assert set(methods) == {"frames", "model", *evaluation.SINGLE_POSES}
        found = methods["model_mean"]
        assert set(found) == METRICS | {"coverage", "radius_mm"}
        assert found["mpjpe_best"] == pytest.approx(distance[frames].mean(), rel=1e-4)
        assert found["radius_mm"] == pytest.approx(radius[frames, 1:].mean(), rel=1e-4)
        covered = (distance <= radius)[frames, 1:].mean()
        assert found["coverage"] == pytest.approx(covered, abs=1e-6)
        assert "coverage" not in methods["model_medoid"]


def test_calibration_covers_what_it_was_fitted_on(model):
    """By recording: of two, each weighs the same whatever its number of frames."""
    held_out = dataclasses.replace(examples(5, 40), clips=np.repeat(["short", "long"], [8, 32]))
    fitted = evaluation.fit_calibration(
        KEY, model, held_out, pose="mean", level=0.75, num_hypotheses=4, batch_size=16
    )
    assert (fitted.level, fitted.num_frames, fitted.num_groups) == (0.75, 40, 2)
    maps = held_out.heatmaps(np.arange(40))
    hypotheses_mm = np.asarray(model.sample(KEY, maps, 4), np.float64)
    mean_mm = hypotheses_mm.mean(1)
    distances = np.linalg.norm(mean_mm - held_out.pose_mm, axis=-1)
    radii = np.quantile(np.linalg.norm(hypotheses_mm - mean_mm[:, None], axis=-1), 0.75, axis=1)
    is_within = distances <= 1.0001 * fitted.apply(radii)
    share = (is_within[:8].mean(0) + is_within[8:].mean(0)) / 2
    assert (share[1:] >= 0.75 - 1e-6).all()
    assert (share[1:] < 0.75 + 1 / 8).all()


@pytest.mark.parametrize("num_devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_depends_on_the_number_of_devices(
    model, controls, test_split, results, num_devices
):
    """Six frames on 8 devices at once, and on one in two batches or on three with two each."""
    wide = np.isin(np.arange(NUMBER), WIDE)
    other = evaluation.evaluate(
        KEY,
        model,
        controls,
        test_split,
        {"all": np.ones(NUMBER, bool), "ambiguous": wide},
        num_hypotheses=(NUM_HYPOTHESES,),
        batch_size=4,
        devices=jax.local_devices()[:num_devices],
    )[NUM_HYPOTHESES]["subsets"]
    for subset in ("all", "ambiguous"):
        expected = dict(jax.tree_util.tree_leaves_with_path(results["subsets"][subset]))
        found = dict(jax.tree_util.tree_leaves_with_path(other[subset]))
        assert expected.keys() == found.keys()
        for path, value in expected.items():
            assert found[path] == pytest.approx(value, rel=1e-12), path


def test_each_frame_is_counted_once(model, test_split):
    """22 frames on 8 devices with one at a time: in the last batch two devices have none."""
    many = examples(4, 22)
    found = evaluation.evaluate(
        KEY,
        model,
        None,
        many,
        {"all": np.ones(22, bool)},
        num_hypotheses=(1,),
        batch_size=1,
    )[1]["subsets"]["all"]
    drawn_mm = np.asarray(model.sample(SAMPLE_KEY, many.heatmaps(np.arange(22)), 1), np.float64)
    errors = np.linalg.norm(drawn_mm[:, 0] - many.pose_mm, axis=-1).mean(-1)
    assert found["model"]["mpjpe_best"] == pytest.approx(errors.mean(), rel=1e-5)


def test_no_frame(model, test_split):
    with pytest.raises(ValueError, match="no frame is counted"):
        evaluation.evaluate(
            *(KEY, model, None, test_split, {"all": np.zeros(NUMBER, bool)}),
            num_hypotheses=(1,),
            batch_size=1,
        )


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
