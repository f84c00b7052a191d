"""From an evaluation to what a user reads: the frames of a report, the tables, the warnings."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from small import examples, parsed, small_model

from configs import protocols
from diffpose_jax import inference
from diffpose_jax.config import ConfigError
from diffpose_jax.data import pipeline
from diffpose_jax.report import results

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def evaluate_run(tmp_path, monkeypatch):
    """Evaluates `small_model` on four frames whose fingerprint is "abc"."""
    test = dataclasses.replace(examples(0, 4, wide=(1, 2)), fingerprint="abc")
    monkeypatch.setattr(pipeline, "load", lambda *_: test)

    def run(data_fingerprint="abc", **settings):
        model = dataclasses.replace(small_model(), data_fingerprint=data_fingerprint)
        monkeypatch.setattr(inference, "load", lambda *_: model)
        settings = {"baselines": False, "group_by": (), "batch_size": 2} | settings
        settings = dataclasses.replace(model.config.evaluation, **settings)
        protocol = dataclasses.replace(model.config, evaluation=settings)
        return results.evaluate_run(tmp_path / "run", tmp_path / "output", protocol)

    return run


def test_the_report_shows_the_hypotheses_that_were_measured(evaluate_run, monkeypatch):
    shown = []
    monkeypatch.setattr(results, "write_report", lambda *arguments: shown.extend(arguments[-1]))
    found = evaluate_run(num_hypotheses=3, report_frames=4)["subsets"]
    distances = [example.hypotheses_mm - example.truth_mm for example in shown]
    errors = np.linalg.norm(distances, axis=-1).mean(-1)
    assert errors.shape == (4, 3)
    for subset, frames in (("all", slice(None)), ("ambiguous", slice(2))):
        best = errors[frames].min(1).mean()
        assert found[subset]["model"]["mpjpe_best"] == pytest.approx(best, rel=1e-5)


def assert_shows(figure, candidates):
    """All of (..., S, 16), each cell of a joint once, and nothing else but the argmax."""
    shown, _ = (part for part in figure.axes[0].collections if isinstance(part, PathCollection))
    of_joints = np.asarray(candidates.cells).reshape(-1, 16) + 4096 * np.arange(16)
    rows, columns = np.divmod(np.unique(of_joints) % 4096, 64)
    expected = np.stack([columns, rows], -1).tolist()
    assert sorted(np.asarray(shown.get_offsets()).tolist()) == sorted(expected)


@pytest.mark.parametrize("candidates", ["per_image", "per_hypothesis"])
def test_examples_show_the_candidates_that_their_poses_were_drawn_under(candidates):
    model, test, rows = small_model(candidates=candidates), examples(0, 4), np.array([3, 1])
    shown = results.draw_examples(jax.random.key(7), model, test, rows, ["d", "b"], 3)
    drawn = model.draw(jax.random.key(7), test.heatmaps(rows), 3)
    for i, example in enumerate(shown):
        np.testing.assert_array_equal(example.hypotheses_mm, drawn.poses_mm[i])
        np.testing.assert_array_equal(example.truth_mm, test.pose_mm[rows[i]])
        assert_shows(example.figure, jax.tree.map(lambda x, i=i: x[i], drawn.candidates))


def test_other_data_is_warned_of(evaluate_run, caplog):
    for trained_on in ("", "abc", "def"):
        assert not caplog.records  # not known, as of version 0.1, or the same
        with pytest.raises(ConfigError, match="marks no frames"):
            evaluate_run(trained_on, ambiguous="stored")
    assert "was trained on a human36m with other content (fingerprint def)" in caplog.text


def test_groups_that_the_data_set_does_not_have(evaluate_run):
    with pytest.raises(ConfigError, match="group_by: human36m has no action, mood"):
        evaluate_run(group_by=("action", "mood"))


@pytest.mark.parametrize(
    ("num_ambiguous", "num_frames", "ambiguous", "others"),
    [(20, 5, 2, 3), (1, 8, 1, 4), (0, 8, 0, 4), (20, 0, 0, 0)],
)
def test_report_rows(num_ambiguous, num_frames, ambiguous, others):
    marks = np.zeros(100, bool)
    marks[np.random.default_rng(0).choice(100, num_ambiguous, replace=False)] = True
    rows = results.report_rows(marks, num_frames)
    assert len(set(rows)) == len(rows) == ambiguous + others
    assert marks[rows].sum() == ambiguous


def test_print_table(capsys):
    metrics = {"mpjpe_best": 41.25, "pa_mpjpe_best": 30.0, "mpjpe_mean": 90.0, "energy_score": 45.0}
    methods = {"frames": 7, "mean_pose": metrics}
    results.print_table({"num_hypotheses": 200, "subsets": {"all": methods}})
    title, mean_pose = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["all", "(7", "frames)", *metrics, "ece"]
    assert mean_pose.split() == ["mean_pose", "41.250", "30.000", "90.000", "45.000", "-"]


def content(count, offset):
    def group(mpjpe, frames):
        model = {"mpjpe_best": mpjpe + offset, "pa_mpjpe_best": mpjpe / 2, "pck150_best": 90.0}
        model |= {"pck150_scaled_best": 91.0, "mpjpe_best_at": {1: mpjpe}}
        return {"frames": frames, "model": model}

    return {
        "num_hypotheses": count,
        "subsets": {"all": group(50.0, 4), "ambiguous": group(70.0, 2)},
        "groups": {"scene": {"green_screen": group(40.0, 3), "outdoor": group(80.0, 1)}},
        "averages": {"scene": {"model": group(60.0, 4)["model"]}},
    }


def rows(path):
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_tables_have_all_counts_groups_and_published_rows(tmp_path):
    protocol = protocols.get_config("mpi_inf_3dhp")
    protocol.evaluation.group_by = ("scene",)
    contents = {200: content(200, 0.0), 2000: content(2000, -5.0)}
    results.write_tables(tmp_path, contents, parsed(protocol))
    of_all = rows(tmp_path / "table_all.csv")
    assert of_all["DiffPose, 200 hypotheses"]["mpjpe_best"] == "50.0"
    assert of_all["DiffPose, 2000 hypotheses"]["mpjpe_best"] == "45.0"
    columns = ("green_screen", "outdoor", "mean", "all frames")
    by_scene = rows(tmp_path / "table_scene_mpjpe_best.csv")["DiffPose, 2000 hypotheses"]
    assert [by_scene[c] for c in columns] == ["35.0", "75.0", "55.0", "45.0"]
    pck = rows(tmp_path / "table_scene_pck150_best.csv")["DiffPose, published"]
    assert [pck[c] for c in columns if c != "mean"] == ["87.4", "83.6", "84.7"]
    text = (tmp_path / "tables.md").read_text()
    assert "PCK by scene; mean: unweighted over the 2" in text
    assert "ambiguous frames (2), means over the frames" in text
