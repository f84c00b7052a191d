"""The choice of frames, the printed table and the written ones."""

import csv

import ml_collections
import numpy as np
import pytest
from small import examples

from configs import protocols
from diffpose_jax.config import ConfigError
from diffpose_jax.evaluation import baselines as controls
from diffpose_jax.evaluation import evaluate as evaluation
from diffpose_jax.report import results


def test_other_data_is_warned_of(caplog, tmp_path):
    for trained_on in ("", "abc"):  # not known, as of version 0.1, or the same
        results.warn_of_other_data(tmp_path, "motion", trained_on, "abc")
    assert not caplog.records
    results.warn_of_other_data(tmp_path, "motion", "def", "abc")
    assert "was trained on a motion with other content (fingerprint def)" in caplog.text


SETTINGS = ml_collections.ConfigDict(
    {"controls": True, "regression_steps": 3, "pose": "mean", "radius_level": 0.9}
)
FITTED_ON = {"data": "abc", "seed": 0}


def fitted_controls(value):
    return controls.Controls(
        mean_pose_mm=np.full((17, 3), value, np.float32),
        regression=controls.RegressionParams({"params": {"a": np.ones(2)}}, *np.ones((4, 1))),
        gaussian=controls.GaussianParams(np.eye(2)),
    )


@pytest.fixture
def fits(monkeypatch):
    """Says how often controls were fitted; each time they are others."""
    values = []

    def fit(*_):
        values.append(float(len(values)))
        return fitted_controls(values[-1])

    monkeypatch.setattr(evaluation, "fit_controls", fit)
    return values


def controls_of(folders, settings=SETTINGS, **fitted_on):
    found = results._controls(None, lambda: (None, None), settings, FITTED_ON | fitted_on, folders)
    return float(np.asarray(found.mean_pose_mm)[0, 0])


def test_controls_are_fitted_once(fits, tmp_path, caplog):
    run, output = tmp_path / "run", tmp_path / "output"
    assert [controls_of((run, run)) for _ in range(2)] == [0.0, 0.0]
    assert controls_of((output, run)) == 0.0
    assert len(fits) == 1
    assert not output.exists()
    assert not caplog.records


def test_controls_are_fitted_anew_for_other_settings_or_data(fits, tmp_path, caplog):
    run, output = tmp_path / "run", tmp_path / "output"
    assert controls_of((run, run)) == 0.0
    longer = SETTINGS.copy_and_resolve_references()
    longer.regression_steps = 4
    assert controls_of((output, run), longer) == 1.0
    assert "controls.npz was fitted under other conditions (regression_steps is 4, was 3)" in (
        caplog.text
    )
    assert controls_of((output, run), longer) == 1.0
    assert controls_of((run, run)) == 0.0
    assert controls_of((run, run), data="def") == 2.0
    assert "data is def, was abc" in caplog.text


@pytest.mark.parametrize(
    ("num_ambiguous", "num_frames", "ambiguous", "others"),
    [(20, 8, 4, 4), (20, 5, 2, 3), (1, 8, 1, 4), (0, 8, 0, 4), (20, 1, 0, 1)],
)
def test_report_rows(num_ambiguous, num_frames, ambiguous, others):
    marks = np.zeros(100, bool)
    marks[np.random.default_rng(0).choice(100, num_ambiguous, replace=False)] = True
    rows = results.report_rows(marks, num_frames)
    assert len(set(rows)) == len(rows)
    assert marks[rows].sum() == ambiguous
    assert (~marks[rows]).sum() == others


def test_print_table(capsys):
    metrics = {"mpjpe_best": 41.25, "pa_mpjpe_best": 30.0, "mpjpe_mean": 90.0, "energy_score": 45.0}
    results.print_table(
        {
            "num_hypotheses": 200,
            "subsets": {
                "all": {"frames": 7, "model": metrics | {"ece": 0.03}, "mean_pose": metrics}
            },
        }
    )
    title, model, mean_pose = capsys.readouterr().out.strip().splitlines()
    assert "all (7 frames)" in title
    assert title.split()[3:] == [
        "mpjpe_best",
        "pa_mpjpe_best",
        "mpjpe_mean",
        "energy_score",
        "ece",
    ]
    assert model.split() == ["model", "41.250", "30.000", "90.000", "45.000", "0.030"]
    assert mean_pose.split() == ["mean_pose", "41.250", "30.000", "90.000", "45.000", "-"]


def settings(ambiguous):
    return ml_collections.ConfigDict(
        {"ambiguous": str(ambiguous), "ambiguous_sigma_px": 5.0, "batch_size": 4}
    )


def test_ambiguous_frames_by_rule_and_by_list(tmp_path):
    test = examples(0, 6, wide=(1, 4))
    assert np.flatnonzero(results.ambiguous_frames(test, settings("rule"))).tolist() == [1, 4]
    listed = tmp_path / "frames.txt"
    listed.write_text("clip 5\n\n clip 0\n")
    assert np.flatnonzero(results.ambiguous_frames(test, settings(listed))).tolist() == [0, 5]
    listed.write_text("clip 5\nclip 7\nclip 8\n")
    with pytest.raises(ConfigError, match=r"named 'clip 7' \(2 names are unknown\); .* 'clip 0'"):
        results.ambiguous_frames(test, settings(listed))
    with pytest.raises(ConfigError, match="rule, stored, or a file; there is no no/such"):
        results.ambiguous_frames(test, settings("no/such"))
    with pytest.raises(ConfigError, match="marks no frames"):
        results.ambiguous_frames(test, settings("stored"))


def metrics(mpjpe, pck):
    return {
        "mpjpe_best": mpjpe,
        "pa_mpjpe_best": mpjpe / 2,
        "pck150_best": pck,
        "pck150_scaled_best": pck + 1,
        "mpjpe_best_at": {1: mpjpe},
    }


def content(count, offset):
    def group(mpjpe, frames):
        return {"frames": frames, "model": metrics(mpjpe + offset, 90.0)}

    return {
        "num_hypotheses": count,
        "subsets": {"all": group(50.0, 4), "ambiguous": group(70.0, 2)},
        "groups": {"scene": {"green_screen": group(40.0, 3), "outdoor": group(80.0, 1)}},
        "averages": {"scene": {"model": metrics(60.0 + offset, 90.0)}},
    }


def rows(path):
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_tables_have_all_counts_groups_and_published_rows(tmp_path):
    protocol = protocols.get_config("mpi_inf_3dhp")
    protocol.evaluation.group_by = ("scene",)
    contents = {200: content(200, 0.0), 2000: content(2000, -5.0)}
    results.write_tables(tmp_path, contents, protocol)
    of_all = rows(tmp_path / "table_all.csv")
    assert of_all["DiffPose, 200 hypotheses"]["mpjpe_best"] == "50.0"
    assert of_all["DiffPose, 2000 hypotheses"]["mpjpe_best"] == "45.0"
    by_scene = rows(tmp_path / "table_scene_mpjpe_best.csv")["DiffPose, 2000 hypotheses"]
    assert [by_scene[c] for c in ("green_screen", "outdoor", "mean", "all frames")] == [
        "35.0",
        "75.0",
        "55.0",
        "45.0",
    ]
    pck = rows(tmp_path / "table_scene_pck150_best.csv")
    assert pck["DiffPose, published"]["outdoor"] == "83.6"
    assert pck["DiffPose, published"]["green_screen"] == "87.4"
    assert pck["DiffPose, published"]["all frames"] == "84.7"
    text = (tmp_path / "tables.md").read_text()
    assert "PCK by scene; mean: unweighted over the 2" in text
    assert "ambiguous frames (2), means over the frames" in text


def test_published_rows_of_human36m(tmp_path):
    results.write_tables(tmp_path, {200: content(200, 0.0)}, protocols.get_config("human36m"))
    of_all, hard = (rows(tmp_path / f"table_{name}.csv") for name in ("all", "ambiguous"))
    assert of_all["DiffPose (Holmquist and Wandt), published"]["mpjpe_best"] == "42.9"
    assert hard["Wehrbein et al., published"]["cps_best"] == "171.0"
