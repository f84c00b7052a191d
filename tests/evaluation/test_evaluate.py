"""The evaluation: subsets, groups, padding and what results.json holds."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import examples, small_model

from diffpose_jax.evaluation import baselines, calibration, evaluate

NUMBER, COUNTS, MOST = 20, (5, 2), 5
KEY = jax.random.key(7)
METRICS = {
    "mpjpe_best", "mpjpe_mean", "mpjpe_median", "pa_mpjpe_best", "pa_mpjpe_mean", "symmetry",
    "pck150_best", "pck150_all_best", "pck150_scaled_best", "cps_best", "cps_area_best",
    "energy_score", "energy_error", "energy_spread", "energy_score_pose",
}  # fmt: skip
OF_SEVERAL = {
    "ece", "ece_quantile", "mpjpe_best_at", "region_coverage", "sharpness_mm", "reliability",
    "pit_error",
}  # fmt: skip
WIDE = np.isin(np.arange(NUMBER), (1, 4))
ALL = np.arange(NUMBER) < 18
SUBSETS = {"all": ALL, "ambiguous": WIDE, "clear": ALL & ~WIDE, "none": np.zeros(NUMBER, bool)}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def test_split():
    """Groups of six and twelve frames, each a recording, and a third one outside of "all"."""
    actions = np.repeat(["Eating", "Walking", "Posing"], [6, 12, 2])
    test = examples(0, NUMBER, wide=(1, 4))
    return dataclasses.replace(test, clips=actions, groups={"action": actions})


@pytest.fixture(scope="module")
def fitted():
    train = examples(1, 40)
    inputs = np.asarray(evaluate.regression_inputs(jnp.asarray(train.heatmaps(np.arange(40)))))
    how = {"steps": 10, "batch_size": 16, "width": 8, "learning_rate": 1e-3}
    return baselines.fit_baselines(jax.random.key(1), inputs, train.pose_mm, **how)


@pytest.fixture(scope="module")
def evaluated(fitted, test_split):
    calibrated = calibration.uncalibrated(0.5).replace(factor=np.full(17, 1.5, np.float32))
    return functools.partial(
        evaluate.evaluate,
        *(KEY, small_model(), fitted, test_split, SUBSETS),
        num_hypotheses=COUNTS,
        batch_size=2,
        group_by=("action",),
        calibration=calibrated,
        pose="mean",
    )


@pytest.fixture(scope="module")
def contents(evaluated):
    """Eight devices, two images each at a time: 18 frames leave two for the second batch."""
    return evaluated()


@pytest.fixture
def results(contents):
    return contents[MOST]


@pytest.fixture(scope="module")
def poses_mm(test_split):
    """What `evaluate` should have drawn: the hypotheses of all frames."""
    maps = test_split.heatmaps(np.arange(NUMBER))
    return np.float64(small_model().sample(evaluate.hypotheses_key(KEY), maps, MOST))


def test_results_have_the_keys_of_the_contract(results):
    assert set(results) == {"num_hypotheses", "subsets", "groups", "averages"}
    assert results["num_hypotheses"] == MOST
    frames = {name: methods["frames"] for name, methods in results["subsets"].items()}
    assert frames == {"all": 18, "ambiguous": 2, "clear": 16}
    for subset, methods in results["subsets"].items():
        assert set(methods) == {"frames", *evaluate.METHODS}
        intervals = set() if subset == "ambiguous" else {"intervals"}  # of one recording
        for method in ("model", "gaussian"):
            assert set(methods[method]) == METRICS | OF_SEVERAL | intervals
            assert list(methods[method]["mpjpe_best_at"]) == [1, 2, 5]
        for method in ("mean_pose", "regression", "model_medoid"):
            assert set(methods[method]) == METRICS
        assert set(methods["model_mean"]) == METRICS | {"coverage", "radius_mm"} | intervals
    json.dumps(results, allow_nan=False)


def test_groups_and_their_unweighted_mean(results):
    """Of the frames in "all" alone."""
    groups, average = results["groups"]["action"], results["averages"]["action"]
    assert {name: group["frames"] for name, group in groups.items()} == {"Eating": 6, "Walking": 12}
    for method in evaluate.METHODS:
        eating, walking = (groups[name][method]["mpjpe_best"] for name in ("Eating", "Walking"))
        assert average[method]["mpjpe_best"] == pytest.approx((eating + walking) / 2)
        overall = results["subsets"]["all"][method]["mpjpe_best"]
        assert overall == pytest.approx((eating + 2 * walking) / 3)
    assert set(average["model"]) == METRICS | OF_SEVERAL


def test_intervals_of_two_recordings_are_from_one_to_the_other(results):
    """A quarter of the draws has the one twice, another quarter the other."""
    groups, methods = results["groups"]["action"], results["subsets"]["all"]
    for method, name in (
        ("model", "mpjpe_best"), ("model_mean", "coverage"), ("gaussian", "energy_score"),
    ):  # fmt: skip
        ends = sorted(groups[recording][method][name] for recording in ("Eating", "Walking"))
        assert methods[method]["intervals"][name] == pytest.approx(ends)
    assert {"ece", "pit_error", "region_coverage_90"} < set(methods["model"]["intervals"])


def test_the_model_is_scored_on_its_own_hypotheses(contents, poses_mm, test_split):
    """On each frame once and nothing else; fewer hypotheses are the first of the most."""
    distance = np.linalg.norm(poses_mm - test_split.pose_mm[:, None], axis=-1).mean(-1)[ALL]
    for count in COUNTS:
        assert contents[count]["num_hypotheses"] == count
        scored = contents[count]["subsets"]["all"]["model"]
        best = distance[:, :count].min(1).mean()
        assert scored["mpjpe_best"] == pytest.approx(best, rel=1e-4)
        assert scored["mpjpe_mean"] == pytest.approx(distance[:, :count].mean(), rel=1e-4)
        assert scored["mpjpe_best_at"][count] == pytest.approx(scored["mpjpe_best"])


def test_the_baselines_are_scored(contents, fitted, test_split):
    inputs = evaluate.regression_inputs(jnp.asarray(test_split.heatmaps(np.arange(NUMBER))))
    regression = np.asarray(baselines.predict(fitted.regression, inputs))
    for method, pose_mm in {"regression": regression, "mean_pose": fitted.mean_pose_mm}.items():
        error = np.linalg.norm(np.float64(pose_mm) - test_split.pose_mm, axis=-1)[ALL].mean()
        scored = contents[MOST]["subsets"]["all"][method]
        assert scored["mpjpe_best"] == pytest.approx(error, rel=1e-4)
    few, most = (contents[count]["subsets"]["all"]["gaussian"]["mpjpe_best"] for count in (2, MOST))
    assert few > most


def test_single_poses_and_their_radius(results, poses_mm, test_split):
    mean_mm = poses_mm.mean(1)
    distance = np.linalg.norm(mean_mm - test_split.pose_mm, axis=-1)
    radius = 1.5 * np.median(np.linalg.norm(poses_mm - mean_mm[:, None], axis=-1), axis=1)
    for name in ("all", "ambiguous"):
        frames, found = SUBSETS[name], results["subsets"][name]["model_mean"]
        assert found["mpjpe_best"] == pytest.approx(distance[frames].mean(), rel=1e-4)
        assert found["radius_mm"] == pytest.approx(radius[frames, 1:].mean(), rel=1e-4)
        covered = (distance <= radius)[frames, 1:].mean()
        assert found["coverage"] == pytest.approx(covered, abs=1e-6)


def test_nothing_depends_on_the_number_of_devices(evaluated, results):
    other = evaluated(devices=jax.local_devices()[:1])[MOST]
    expected = dict(jax.tree_util.tree_leaves_with_path(results))
    found = dict(jax.tree_util.tree_leaves_with_path(other))
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        assert found[path] == pytest.approx(value, rel=1e-12), path


def test_frames_outside_of_all_subsets_are_not_drawn(test_split):
    """And frames outside of "all" count where another subset has them."""
    asked = []

    def heatmaps(rows):
        asked.extend(rows.tolist())
        return test_split.heatmaps(rows)

    test = dataclasses.replace(test_split, heatmaps=heatmaps)
    score = functools.partial(evaluate.evaluate, KEY, small_model(), None, test)
    at = np.arange(NUMBER)
    masks = {"all": at % 12 == 0, "other": at == 1}
    found = score(masks, num_hypotheses=(1,), batch_size=4)[1]["subsets"]
    assert set(asked) == {0, 1, 12}
    assert {name: methods["frames"] for name, methods in found.items()} == {"all": 2, "other": 1}
    assert set(found["all"]) == {"frames", "model"}
    with pytest.raises(ValueError, match="no frame is counted"):
        score({"all": at < 0}, num_hypotheses=(1,), batch_size=1)
