import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diffpose_jax.report import figures
from diffpose_jax.report.page import MAX_EXAMPLES, MAX_HYPOTHESES, ReportExample, write_report
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS

EVIL = "</script><script>alert('1')</script> & \"x\" <!-- {{data}}"
NONE = "\N{EN DASH}"
RESULTS = {
    "num_hypotheses": 200,
    "subsets": {
        "all": {
            "frames": 1640,
            "model": {
                "mpjpe_best": 42.94,
                "mpjpe_mean": 70.0,
                "pck150_best": 94.9,
                "cps_best": 195.5,
                "ece": 0.031,
                "mpjpe_best_at": {"1": 71.0, "2": 66.0, "10": 52.0},
            },
            "model_mean": {"mpjpe_best": 62.0, "radius_mm": 90.0},
            "mean_pose": {"mpjpe_best": float("nan")},
            "gaussian": {"mpjpe_best": 55.0, "ece": 0.09, "mpjpe_best_at": {1: 90.0, 10: 60.0}},
            "regression": {"mpjpe_best": 62.0, "mpjpe_mean": 62.0, "pck150_best": 88.0},
        },
        "ambiguous": {"frames": 41, "model": {"mpjpe_best": 63.1}},
    },
}


class Page(HTMLParser):
    """Collects what the tests ask for."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.tables, self.data = "", [], [], ""
        self.open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.open.append(attributes.get("id") if tag == "script" else tag)
        if tag == "table" and attributes.get("class") != "readout":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("*" if attributes.get("class") == "best" else "")

    def handle_endtag(self, tag):
        self.open = self.open[:-1]

    def handle_data(self, data):
        if "data" in self.open[-1:]:
            self.data += data
        elif self.tables and self.tables[-1] and {"td", "th"} & set(self.open[-3:]):
            self.tables[-1][-1][-1] += data.strip()
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder, **contents):
    return Page(write_report(folder / "r.html", **{"title": "t"} | contents))


def example(name="S9 Walking", count=3, seed=0, **fields):
    rng = np.random.default_rng(seed)
    return ReportExample(name, rng.normal(0, 400, (count, 17, 3)), **fields)


def test_report_needs_nothing_from_outside(tmp_path):
    figure = figures.plot_loss([0, 1], [1.0, 0.5])
    png = figures.save(figure, tmp_path / "loss.png", dpi=40)
    path = write_report(
        tmp_path / "out" / "report.html",
        title="Run",
        results=RESULTS,
        config_text="seed = 1",
        figures=[("Loss", figure), ("Loss again", png)],
        examples=[example(figure=figure)],
    )
    assert list(path.parent.iterdir()) == [path]
    page = Page(path)
    assert not page.all("link")
    sources = [image["src"].split(",") for image in page.all("img")]
    assert [kind for kind, _ in sources] == ["data:image/png;base64"] * 3
    assert base64.b64decode(sources[2][1]) == png.read_bytes()
    assert page.all("img")[2]["width"] == str(round(7.4 * 40))
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"@import|url\(|fetch\(|https?://", page.source)
    assert not re.search(r"\{\{|\{%", page.source)
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
    assert len(page.all("script")) == 2
    assert not set("<>&'") & set(page.data)
    assert json.loads(page.data)["examples"][0]["name"] == EVIL
    # Twice the title; the summary, a table's caption and a row, a figure, the selector, the config.
    assert page.text.lower().count("alert('1')") == 8
    assert [image["alt"] for image in page.all("img")] == [EVIL, EVIL]


def test_tables_mark_the_best_in_the_right_direction(tmp_path):
    page = written(tmp_path, results=RESULTS)
    metrics, best_of_k, ambiguous, _ = [*page.tables, None]
    assert metrics == [
        ["", "MPJPE, bestmm ↓", "MPJPE, meanmm ↓", "PCK@150, best% ↑", "CPS, bestof 299 ↑", "ECE↓"],
        ["model", "*42.9", "70.0", "*94.9", "195.5", "*0.031"],
        ["gaussian", "55.0", NONE, NONE, NONE, "0.090"],
        ["regression", "62.0", "*62.0", "88.0", NONE, NONE],
        ["mean pose", "n/a", NONE, NONE, NONE, NONE],
        ["model mean", "62.0", NONE, NONE, NONE, NONE],
    ]
    assert best_of_k == [
        ["", "K = 1mm ↓", "K = 2mm ↓", "K = 10mm ↓"],
        ["model", "*71.0", "66.0", "*52.0"],
        ["gaussian", "90.0", NONE, "60.0"],
    ]
    assert ambiguous[1:] == [["model", "63.1"]]
    assert "200 hypotheses per frame · all: 1,640 frames · ambiguous: 41 frames" in page.text
    tiles = re.findall(r"MPJPE, best\s+([\d.]+)mm\s+(.*)", page.text)
    assert tiles[0] == ("42.9", "ambiguous 63.1 ")


def test_equal_numbers_are_bold_together(tmp_path):
    subset = {"frames": 1, "model": {"symmetry": 14.04}, "gaussian": {"symmetry": 13.96}}
    page = written(tmp_path, results={"num_hypotheses": 5, "subsets": {"all": subset}})
    assert [row[1] for row in page.tables[0][1:]] == ["*14.0", "*14.0"]


@pytest.mark.parametrize("results", [None, {"num_hypotheses": 5}])
def test_an_empty_report_is_still_a_page(tmp_path, results):
    page = written(tmp_path, title="Nothing yet", results=results)
    assert page.tables == page.all("section") == page.all("details") == page.all("script") == []
    assert "Nothing yet" in page.text


def test_many_examples_are_cut_and_the_page_says_so(tmp_path):
    examples = [
        example(f"frame {index}", MAX_HYPOTHESES, index) for index in range(MAX_EXAMPLES + 2)
    ]
    page = written(tmp_path, results=RESULTS, examples=examples)
    assert len(json.loads(page.data)["examples"]) == MAX_EXAMPLES
    assert f"The first {MAX_EXAMPLES} of {MAX_EXAMPLES + 2} examples." in page.text
    assert len(page.source) < 700_000


def test_script_and_style_find_what_they_name(tmp_path):
    page = written(tmp_path, examples=[example()])
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert set(re.findall(r'byId\("([\w-]+[^-])"\)', page.source)) <= ids
    assert {f"show-{name}" for name in re.findall(r'show\("(\w+)"\)', page.source)} <= ids
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)[1]
    assert set(re.findall(r"var\(--([\w-]+)\)", page.source)) <= set(
        re.findall(r"--([\w-]+):", style)
    )
    for group, colour in figures.GROUP_COLOURS.items():
        assert f"--{group.replace(' ', '-')}: {colour}" in style
