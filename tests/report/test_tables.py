"""Tables of results, and the published numbers that stand in them."""

import csv

import pytest

from configs import ablations
from diffpose_jax.report import published
from diffpose_jax.report.tables import Table

TABLE = Table(
    ("mpjpe_best", "pck150_best", "ece"),
    (
        ("three seeds", {"mpjpe_best": [63.0, 64.0, 65.06], "ece": [0.1, 0.2, 0.3]}),
        ("one seed", {"mpjpe_best": [42.96], "pck150_best": (94.87,), "ece": [0.00449]}),
        ("unfinished", {}),
        ("two, equal", {"pck150_best": [90.0, 90.0], "mpjpe_best": [], "cps_best": [1.0] * 3}),
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
    three_seeds, *others = csv.DictReader(TABLE.to_csv().splitlines())
    assert three_seeds["values"] == "3"
    assert float(three_seeds["mpjpe_best"]) == pytest.approx(64.02)
    assert float(three_seeds["mpjpe_best spread"]) == pytest.approx(1.0301, abs=1e-4)
    assert [list(row.values()) for row in others] == [
        ["one seed", "1", "42.96", "", "94.87", "", "0.00449", ""],
        ["unfinished", "0", *[""] * 6],
        ["two, equal", "3", "", "", "90.0", "0.0", "", ""],
    ]
    assert TABLE.to_csv().endswith("\n")
    assert "\r" not in TABLE.to_csv()


def test_published_numbers():
    """Some of each table, typed in anew."""
    ours = {"mpjpe_best": 63.1, "pa_mpjpe_best": 46.7, "pck150_best": 94.9, "cps_best": 195.5,
            "symmetry": 14.9}  # fmt: skip
    assert published.ABLATIONS["full"] == published.H36MA["DiffPose (Holmquist and Wandt)"] == ours
    assert list(published.ABLATIONS["full_heatmap"].values()) == [173.8, 283.3, 37.3, 24.1, 13.4]
    assert list(published.H36M["Martinez et al., one pose"].values()) == [62.9, 47.7]
    assert published.H36MA["Sharma et al."]["symmetry"] == 23.9
    assert published.H36MA["Li and Lee"].keys() == ours.keys() - {"symmetry"}
    assert published.MPI_INF_3DHP_PCK["outdoor"] == 83.6
    assert set(published.ABLATIONS) == {
        *ablations.TABLES["embedding"], *ablations.TABLES["components"]
    }  # fmt: skip
