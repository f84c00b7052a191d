import base64
import html
import json
import re

import numpy as np
import pytest

from diffpose_jax.report import figures
from diffpose_jax.report.page import MAX_EXAMPLES, MAX_HYPOTHESES, ReportExample, write_report
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS

EVIL = "</script><script>alert('1')</script> & \"x\" <!-- {{data}}"
NONE = "\N{EN DASH}"
MODEL = {"mpjpe_best": 42.94, "mpjpe_mean": 70.0, "pck150_best": 94.9, "ece": 0.0308}
RESULTS = {
    "num_hypotheses": 200,
    "subsets": {
        "all": {
            "frames": 1640,
            "model": MODEL | {"mpjpe_best_at": {"1": 71.0, "2": 66.0, "10": 52.0}},
            "model_mean": {"mpjpe_best": 62.0, "radius_mm": 90.0},
            "mean_pose": {"mpjpe_best": float("nan")},
            "gaussian": {"mpjpe_best": 55.0, "ece": 0.0314, "mpjpe_best_at": {1: 90.0, 10: 60.0}},
            "regression": {"mpjpe_best": 62.0, "mpjpe_mean": 62.0, "pck150_best": 88.0},
        },
        "ambiguous": {"frames": 41, "model": {"mpjpe_best": 63.1}},
    },
}


class Page:
    """A page's source, what a reader sees, its tables, and the script's data."""

    def __init__(self, path):
        self.source = path.read_text(encoding="utf-8")
        body = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", self.source, flags=re.S)
        self.text = as_text(body)
        tables = re.findall("<table><caption>(.*?)</table>", body, re.S)
        self.tables = [[cells(row) for row in table.split("<tr>")[1:]] for table in tables]
        self.data = "".join(re.findall('id="data">(.*?)</script>', self.source))

    def all(self, attribute):
        return re.findall(f' {attribute}="(.*?)"', self.source)


def as_text(markup):
    return " ".join(html.unescape(re.sub("<[^>]*>", "", markup)).split())


def cells(row):
    found = re.findall("<(t[hd].*?)>(.*?)</t[hd]>", row, re.S)
    return ["*" * ("best" in start) + as_text(cell) for start, cell in found]


def written(folder, **contents):
    return Page(write_report(folder / "r.html", **{"title": "t"} | contents))


def example(name="S9 Walking", count=3, seed=0, **fields):
    rng = np.random.default_rng(seed)
    return ReportExample(name, rng.normal(0, 400, (count, 17, 3)), **fields)


def test_report_needs_nothing_from_outside(tmp_path):
    figure = figures.plot_loss([0, 1], [1.0, 0.5])
    png = figures.save(figure, tmp_path / "loss.png", dpi=40)
    page = written(
        tmp_path / "out",
        results=RESULTS,
        config_text="seed = 1",
        figures=[("Loss", figure), ("Loss again", png)],
        examples=[example(figure=figure)],
    )
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert "<link" not in page.source
    sources = page.all("src")
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert base64.b64decode(sources[2].split(",")[1]) == png.read_bytes()
    assert page.all("width")[2] == str(round(7.4 * 40))
    assert page.all("href") == page.all("action") == page.all("srcset") == []
    assert not re.search(r"@import|url\(|fetch\(|https?://|\{\{|\{%", page.source)
    assert "seed = 1" in page.text


def test_poses_are_whole_millimetres(tmp_path):
    truth = np.random.default_rng(3).normal(0, 400, (17, 3))
    given = example(count=MAX_HYPOTHESES + 7, truth_mm=truth)
    data = json.loads(written(tmp_path, examples=[given]).data)
    assert data["joints"] == list(H36M_JOINTS)
    assert data["bones"] == [list(bone) for bone in H36M_BONES]
    assert [data["groups"][group] for group in data["groupOf"]] == list(figures.JOINT_GROUPS)
    (shown,) = data["examples"]
    poses = np.reshape(shown["hypotheses"], (-1, 17, 3))
    assert len(poses) == MAX_HYPOTHESES
    assert shown["total"] == MAX_HYPOTHESES + 7
    assert np.abs(poses - given.hypotheses_mm[:MAX_HYPOTHESES]).max() <= 0.5
    assert np.abs(np.reshape(shown["truth"], (17, 3)) - truth).max() <= 0.5


def test_names_from_outside_stay_text(tmp_path):
    subset = {"frames": 1, "model": {}, EVIL: {"mpjpe_best": 1.0}}
    page = written(
        tmp_path,
        title=EVIL,
        results={"num_hypotheses": 5, "subsets": {EVIL: subset}},
        config_text=EVIL,
        figures=[(EVIL, figures.plot_loss([], []))],
        examples=[example(EVIL, figure=figures.plot_loss([], []))],
    )
    assert page.source.count("<script") == 2
    assert not set("<>&'") & set(page.data)
    assert json.loads(page.data)["examples"][0]["name"] == EVIL
    # Twice the title; the summary, a table's caption and a row, a figure, the selector, the config.
    assert page.text.lower().replace(page.data.lower(), "").count("alert('1')") == 8
    assert [html.unescape(text) for text in page.all("alt")] == [EVIL, EVIL]


def test_tables_mark_the_best_in_the_right_direction(tmp_path):
    page = written(tmp_path, results=RESULTS)
    metrics, best_of_k, ambiguous = page.tables
    assert metrics == [
        ["", "MPJPE, best mm ↓", "MPJPE, mean mm ↓", "PCK@150, best % ↑", "ECE ↓"],
        ["model", "*42.9", "70.0", "*94.9", "*0.031"],  # equal as shown: bold together
        ["gaussian", "55.0", NONE, NONE, "*0.031"],
        ["regression", "62.0", "*62.0", "88.0", NONE],
        ["mean pose", "n/a", NONE, NONE, NONE],
        ["model mean", "62.0", NONE, NONE, NONE],
    ]
    assert best_of_k == [
        ["", "K = 1 mm ↓", "K = 2 mm ↓", "K = 10 mm ↓"],
        ["model", "*71.0", "66.0", "*52.0"],
        ["gaussian", "90.0", NONE, "60.0"],
    ]
    assert ambiguous[1:] == [["model", "63.1"]]
    assert "200 hypotheses per frame · all: 1,640 frames · ambiguous: 41 frames" in page.text
    assert "MPJPE, best 42.9mm ambiguous 63.1 " in page.text


@pytest.mark.parametrize("results", [None, {"num_hypotheses": 5}])
def test_an_empty_report_is_still_a_page(tmp_path, results):
    page = written(tmp_path, title="Nothing yet", results=results)
    assert not re.search("<(table|section|details|script)", page.source)
    assert "Nothing yet" in page.text


def test_many_examples_are_cut_and_the_page_says_so(tmp_path):
    examples = [example(count=MAX_HYPOTHESES, seed=seed) for seed in range(MAX_EXAMPLES + 2)]
    page = written(tmp_path, results=RESULTS, examples=examples)
    assert len(json.loads(page.data)["examples"]) == MAX_EXAMPLES
    assert f"The first {MAX_EXAMPLES} of {MAX_EXAMPLES + 2} examples." in page.text
    assert len(page.source) < 700_000
