"""Tables of results, and the published numbers that stand in them."""

import csv
import math

import pytest

from configs import ablations
from diffpose_jax.report import published, tables
from diffpose_jax.report.tables import Table

TABLE = Table(
    ("mpjpe_best", "pck150_best", "ece"),
    (
        ("three seeds", {"mpjpe_best": [63.0, 64.0, 65.06], "ece": [0.1, 0.2, 0.3]}),
        ("one seed", {"mpjpe_best": [42.96], "pck150_best": (94.87,), "ece": [0.00449]}),
        ("unfinished", {}),
        ("two, equal", {"pck150_best": [90, 90], "mpjpe_best": [], "cps_best": [1, 2, 3]}),
    ),
)


def test_markdown():
    # The sample standard deviation of 63, 64, 65.06 is 1.0301.
    assert TABLE.to_markdown() == (
        "|  | MPJPE | PCK | ECE |\n"
        "| --- | --- | --- | --- |\n"
        "| three seeds | 64.0 ± 1.0 |  | 0.200 ± 0.100 |\n"
        "| one seed | 43.0 | 94.9 | 0.004 |\n"
        "| unfinished |  |  |  |\n"
        "| two, equal |  | 90.0 ± 0.0 |  |\n"
    )


def test_csv():
    header, *lines = csv.reader(TABLE.to_csv().splitlines())
    assert header == ["name", "values", "mpjpe_best", "mpjpe_best spread", "pck150_best",
                      "pck150_best spread", "ece", "ece spread"]  # fmt: skip
    assert [line[:2] for line in lines] == [
        ["three seeds", "3"], ["one seed", "1"], ["unfinished", "0"], ["two, equal", "3"]
    ]  # fmt: skip
    assert [float(cell or "nan") for cell in lines[0][2:]] == pytest.approx(
        [64.02, math.sqrt((1.02**2 + 0.02**2 + 1.04**2) / 2), math.nan, math.nan, 0.2, 0.1],
        nan_ok=True,
    )
    assert lines[1][2:] == ["42.96", "", "94.87", "", "0.00449", ""]
    assert lines[2][2:] == [""] * 6
    assert lines[3][2:] == ["", "", "90.0", "0.0", "", ""]
    assert TABLE.to_csv().endswith("\n")
    assert "\r" not in TABLE.to_csv()


def test_mean_and_spread():
    assert tables.mean_and_spread([1, 2, 3, 6]) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    mean, spread = tables.mean_and_spread([5.0])
    assert (mean, math.isnan(spread)) == (5.0, True)
    assert all(math.isnan(value) for value in tables.mean_and_spread([]))


def test_the_paper_s_columns_come_first():
    headings = [heading for heading, _ in tables.COLUMNS.values()]
    assert headings[:5] == ["MPJPE", "PA-MPJPE", "PCK", "CPS", "Sym"]


# --- published numbers -------------------------------------------------------------------


def test_published_numbers():
    """A few of each table, typed in anew."""
    h36m = published.H36M["DiffPose (Holmquist and Wandt)"]
    assert h36m == {"mpjpe_best": 42.9, "pa_mpjpe_best": 30.8}
    assert published.H36M["Martinez et al., one pose"]["pa_mpjpe_best"] == 47.7
    ours = {"mpjpe_best": 63.1, "pa_mpjpe_best": 46.7, "pck150_best": 94.9, "cps_best": 195.5,
            "symmetry": 14.9}  # fmt: skip
    assert published.H36MA["DiffPose (Holmquist and Wandt)"] == ours
    assert published.ABLATIONS["full"] == ours
    assert published.H36MA["DiffPose, 2000 hypotheses"] == {
        "mpjpe_best": 56.5, "pa_mpjpe_best": 41.2
    }  # fmt: skip
    assert published.H36MA["Wehrbein et al."]["cps_best"] == 171.0
    assert published.H36MA["Sharma et al."]["symmetry"] == 23.9
    assert published.H36MA["Li and Lee"] == {
        "mpjpe_best": 81.1, "pa_mpjpe_best": 66.0, "pck150_best": 85.7, "cps_best": 119.9
    }  # fmt: skip
    assert list(published.ABLATIONS["full_heatmap"].values()) == [173.8, 283.3, 37.3, 24.1, 13.4]
    assert published.ABLATIONS["without_sampling"]["symmetry"] == 21.8
    assert published.ABLATIONS["sample_free"]["symmetry"] == 25.7
    assert published.ABLATIONS["without_joint_dropout"]["mpjpe_best"] == 65.0
    assert published.MPI_INF_3DHP_PCK == {
        "green_screen": 87.4, "no_green_screen": 82.7, "outdoor": 83.6, "all": 84.7
    }  # fmt: skip


def test_published_rows_have_columns_and_configurations():
    for rows in (published.H36M, published.H36MA, published.ABLATIONS):
        assert all(set(row) <= set(tables.COLUMNS) for row in rows.values())
    assert set(published.ABLATIONS) == {*ablations.TABLES["embedding"],
                                        *ablations.TABLES["components"]}  # fmt: skip
