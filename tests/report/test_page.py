import base64
import importlib.resources
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diffpose_jax.report import figures as plotting
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
            "gaussian": {"mpjpe_best": 55.0, "ece": 0.09, "mpjpe_best_at": {"1": 90.0, "10": 60.0}},
            "regression": {"mpjpe_best": 62.0, "mpjpe_mean": 62.0, "pck150_best": 88.0},
            "mean_pose": {"mpjpe_best": float("nan")},
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
            self.tables[-1][-1].append("")
        elif tag == "b":
            self.tables[-1][-1][-1] += "*"

    def handle_endtag(self, tag):
        self.open = self.open[:-1]

    def handle_data(self, data):
        data = data.strip("\n")
        if "data" in self.open[-1:]:
            self.data += data
        elif self.tables and self.tables[-1] and {"td", "th"} & set(self.open[-3:]):
            self.tables[-1][-1][-1] += data
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def example(name="S9 Walking", count=3, seed=0, **fields):
    rng = np.random.default_rng(seed)
    return ReportExample(name, rng.normal(0, 400, (count, 17, 3)), **fields)


def test_report_needs_nothing_from_outside(tmp_path):
    figure = plotting.plot_loss([0, 1], [1.0, 0.5])
    png = plotting.save(figure, tmp_path / "loss.png", dpi=40)
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
    assert [image["src"].split(",")[0] for image in page.all("img")] == [
        "data:image/svg+xml;base64",
        "data:image/svg+xml;base64",
        "data:image/png;base64",
    ]
    assert base64.b64decode(page.all("img")[2]["src"].split(",")[1]) == png.read_bytes()
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"@import|url\(|fetch\(|https?://", page.source)
    assert "{{" not in page.source
    assert "seed = 1" in page.text


def test_poses_are_whole_millimetres(tmp_path):
    truth = np.random.default_rng(3).normal(0, 400, (17, 3))
    given = example(count=MAX_HYPOTHESES + 7, truth_mm=truth)
    page = Page(write_report(tmp_path / "r.html", title="t", examples=[given]))
    data = json.loads(page.data)
    assert data["joints"] == list(H36M_JOINTS)
    assert data["bones"] == [list(bone) for bone in H36M_BONES]
    assert [data["groups"][group] for group in data["groupOf"]] == list(plotting.JOINT_GROUPS)
    (shown,) = data["examples"]
    poses = np.reshape(shown["hypotheses"], (-1, 17, 3))
    assert len(poses) == MAX_HYPOTHESES
    assert shown["total"] == MAX_HYPOTHESES + 7
    assert np.abs(poses - given.hypotheses_mm[:MAX_HYPOTHESES]).max() <= 0.5
    assert np.abs(np.reshape(shown["truth"], (17, 3)) - truth).max() <= 0.5


def test_names_from_outside_stay_text(tmp_path):
    page = Page(
        write_report(
            tmp_path / "r.html",
            title=EVIL,
            results={"subsets": {EVIL: {"frames": EVIL, EVIL: {"mpjpe_best": 1.0}}}},
            config_text=EVIL,
            figures=[(EVIL, plotting.plot_loss([], []))],
            examples=[example(EVIL, figure=plotting.plot_loss([], []))],
        )
    )
    assert len(page.all("script")) == 2
    assert not set("<>&") & set(page.data)
    assert json.loads(page.data)["examples"][0]["name"] == EVIL
    assert page.text.count("alert('1')") >= 4
    assert [image["alt"] for image in page.all("img")] == [EVIL, EVIL]


def test_tables_mark_the_best_in_the_right_direction(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t", results=RESULTS))
    metrics, best_of_k, ambiguous = page.tables
    assert metrics == [
        [
            "",
            "MPJPE, bestmm ↓",
            "MPJPE, meanmm ↓",
            "PCK@150, best% ↑",
            "CPS, bestof 299 ↑",
            "ECE ↓",
        ],
        ["model", "*42.9", "70.0", "*94.9", "195.5", "*0.031"],
        ["gaussian", "55.0", NONE, NONE, NONE, "0.090"],
        ["regression", "62.0", "*62.0", "88.0", NONE, NONE],
        ["mean pose", "n/a", NONE, NONE, NONE, NONE],
    ]
    assert best_of_k == [
        ["", "K = 1mm ↓", "K = 2mm ↓", "K = 10mm ↓"],
        ["model", "*71.0", "66.0", "*52.0"],
        ["gaussian", "90.0", NONE, "60.0"],
    ]
    assert ambiguous[1:] == [["model", "63.1"]]
    assert "200 hypotheses per frame" in page.text
    assert "all: 1,640 frames" in page.text


def test_equal_numbers_are_bold_together(tmp_path):
    results = {"subsets": {"all": {"model": {"symmetry": 14.04}, "gaussian": {"symmetry": 13.96}}}}
    page = Page(write_report(tmp_path / "r.html", title="t", results=results))
    assert [row[1] for row in page.tables[0][1:]] == ["*14.0", "*14.0"]


@pytest.mark.parametrize(
    "results", [None, {}, {"subsets": {}}, {"subsets": {"all": {}}}, {"num_hypotheses": 5}]
)
def test_an_empty_report_is_still_a_page(tmp_path, results):
    page = Page(write_report(tmp_path / "r.html", title="Nothing yet", results=results))
    assert page.tables == []
    sections = page.all("section")
    assert all("hidden" in section for section in sections)
    assert "hidden" in page.all("details")[0]


def test_many_examples_are_cut_and_the_page_says_so(tmp_path):
    examples = [example(f"frame {index}", seed=index) for index in range(MAX_EXAMPLES + 2)]
    page = Page(write_report(tmp_path / "r.html", title="t", examples=examples))
    assert len(json.loads(page.data)["examples"]) == MAX_EXAMPLES
    assert f"The first {MAX_EXAMPLES} of {MAX_EXAMPLES + 2} examples." in page.text


def test_full_page_stays_small(tmp_path):
    examples = [example(f"frame {index}", MAX_HYPOTHESES, index) for index in range(MAX_EXAMPLES)]
    path = write_report(tmp_path / "r.html", title="t", results=RESULTS, examples=examples)
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ReportExample("e", np.zeros((3, 16, 3))), "hypotheses_mm of example 'e'"),
        (ReportExample("e", np.full((1, 17, 3), np.inf)), "not finite"),
        (ReportExample("e", np.zeros((1, 17, 3)), np.zeros((16, 3))), "truth_mm of example 'e'"),
    ],
)
def test_bad_poses_are_refused_and_nothing_is_written(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r.html", title="t", examples=[bad])
    assert list(tmp_path.iterdir()) == []


def test_other_pictures_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"a\.jpg is not a PNG"):
        write_report(tmp_path / "r.html", title="t", figures=[("a", tmp_path / "a.jpg")])


def test_script_and_style_find_what_they_name(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert set(re.findall(r'byId\("([\w-]+[^-])"\)', page.source)) <= ids
    assert {f"show-{name}" for name in re.findall(r'show\("(\w+)"\)', page.source)} <= ids
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)[1]
    assert set(re.findall(r"var\(--([\w-]+)\)", page.source)) <= set(
        re.findall(r"--([\w-]+):", style)
    )
    for group in plotting.GROUP_COLOURS:
        assert f"--{group.replace(' ', '-')}: {plotting.GROUP_COLOURS[group]}" in style


def test_template_is_package_data():
    template = importlib.resources.files("diffpose_jax").joinpath("report_template.html")
    assert template.read_text(encoding="utf-8").startswith("<!doctype html>")
