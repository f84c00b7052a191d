"""The choice of the report's frames and the printed table."""

import numpy as np
import pytest

from diffpose_jax import results


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
