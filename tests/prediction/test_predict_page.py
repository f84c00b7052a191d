"""The page of a prediction in a browser: it draws, turns and needs no network."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from diffpose_jax.evaluation.calibration import SinglePose
from diffpose_jax.report.page import ReportExample, write_report
from diffpose_jax.skeleton import H36M_LEFT, H36M_RIGHT, NUM_JOINTS

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# Uses the page as a person would, and leaves what was seen as JSON in its place.
VISIT = """<script>
// A browser without a window shows no frames.
window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 16);
const seen = { faults: [], checked: {}, canvases: {} };
addEventListener("error", (event) => seen.faults.push(event.message));
addEventListener("securitypolicyviolation", (event) => seen.faults.push(event.blockedURI));
addEventListener("load", async () => {
  const find = (selector) => document.querySelector(selector), view = find("#view");
  view.setPointerCapture = () => {}; // a pointer made by a script cannot be captured
  const frame = () => new Promise(requestAnimationFrame);
  const keep = async (name) => {
    await frame(); await frame();
    seen.canvases[name] = view.toDataURL();
  };
  const pointer = (type, x, y) => {
    const { left, top } = view.getBoundingClientRect();
    const at = { pointerId: 1, clientX: left + x, clientY: top + y };
    view.dispatchEvent(new PointerEvent(type, at));
  };
  await keep("start");
  seen.text = document.body.innerText;
  seen.title = document.title;
  seen.width = find("figure:not([hidden]) img").naturalWidth;
  pointer("pointerdown", 400, 300);
  for (const step of [1, 2, 3, 4]) pointer("pointermove", 400 + 30 * step, 300 + 5 * step);
  pointer("pointerup", 520, 320);
  await keep("turned");
  view.dispatchEvent(new MouseEvent("dblclick"));
  await keep("turned back");
  for (const part of ["hypotheses", "chosen", "radius", "spread", "mean"]) {
    const box = find(`#show-${part}`);
    seen.checked[part] = box.checked;
    box.click();
    await keep(`${part} switched`);
    box.click();
    await keep(`${part} switched back`);
  }
  find("[data-yaw='0'][data-pitch='0']").click();
  await keep("front");
  const { width, height } = view;
  const pixels = view.getContext("2d").getImageData(0, 0, width, height).data;
  // The first dark pixel is of the ring around the topmost joint.
  for (let i = 0; i < pixels.length && !seen.tip; i += 4)
    if (pixels[i + 3] > 200 && Math.max(...pixels.slice(i, i + 3)) < 40) {
      pointer("pointermove", (i / 4) % width, Math.floor(i / 4 / width) + 4);
      await frame(); await frame();
      seen.tip = find("#tip").textContent;
    }
  seen.honest = [...seen.faults];
  setTimeout(() => { throw Error("on purpose"); });
  await fetch("https://example.com").catch(() => 0);
  await frame();
  document.documentElement.innerHTML = "<pre></pre>";
  find("pre").textContent = JSON.stringify(seen);
});
</script></head>"""

HEIGHT_MM = [0, 0, -430, -850, 0, -430, -850, 230, 480, 560, 670, 450, 250, 0, 450, 250, 0]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a visit to a prediction's page shows: a standing person, without truth."""
    folder = tmp_path_factory.mktemp("page")
    pose_mm = np.zeros((NUM_JOINTS, 3))
    pose_mm[:, 1] = HEIGHT_MM
    pose_mm[H36M_LEFT, 0], pose_mm[H36M_RIGHT, 0] = 150, -150
    spread = np.where(np.arange(NUM_JOINTS)[:, None] % 3 == 0, 90, 20)
    noise = np.random.default_rng(0).normal(size=(30, NUM_JOINTS, 3))
    meaning = "the joint lies within the radius in 90% of cases (by 500 frames)"
    chosen = SinglePose(pose_mm, np.linspace(0, 160, NUM_JOINTS), 0.9, "mean", meaning)
    Image.new("RGB", (300, 100), "teal").save(folder / "poses.png")
    name = "photo <1>.jpg"
    example = ReportExample(name, pose_mm + noise * spread, None, folder / "poses.png", chosen)
    page = write_report(folder / "pose.html", title=name, examples=[example])
    (folder / "poses.png").unlink()  # the page must do without
    page.write_text(page.read_text().replace("</head>", VISIT))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
        "--force-prefers-reduced-motion", "--window-size=900,800", "--virtual-time-budget=9000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    seen = json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout, re.S)[1]))
    seen["canvases"] = {name: pixels(url) for name, url in seen["canvases"].items()}
    return seen


def pixels(url):
    png = io.BytesIO(base64.b64decode(url.split(",")[1]))
    return np.array(Image.open(png).convert("RGBA"))


def difference(a, b):
    return np.count_nonzero((a != b).any(-1))


def test_the_canvas_is_drawn_and_turns(seen):
    canvas, turned = seen["canvases"]["start"], seen["canvases"]["turned"]
    assert np.count_nonzero(canvas[..., 3]) > 10_000
    assert len(np.unique(canvas.reshape(-1, 4), axis=0)) > 100
    ink = (canvas[..., :3] < 40).all(-1) & (canvas[..., 3] > 200)
    assert ink.sum() > 500  # the chosen pose
    assert np.ptp(np.nonzero(ink)[0]) > canvas.shape[0] / 2
    assert difference(canvas, turned) > 5_000
    np.testing.assert_array_equal(seen["canvases"]["turned back"], canvas)


def test_what_it_says(seen):
    assert seen["title"] == "photo <1>.jpg"
    radii = "Radii: the joint lies within the radius in 90% of cases (by 500 frames)."
    # The last is the median radius.
    for text in ("chosen pose (mean)", radii, "30 of 30", "80.0 mm"):
        assert text in seen["text"]
    assert "truth" not in seen["text"]
    assert seen["width"] == 300
    name, spread, radius = seen["tip"].split("\n")  # of the joint under the pointer
    assert (name, spread[:7], radius) == ("Head", "spread ", "90% radius 100 mm")


@pytest.mark.parametrize("part", ["hypotheses", "chosen", "radius", "spread", "mean"])
def test_each_part_shows_and_hides(seen, part):
    canvases = seen["canvases"]
    assert seen["checked"][part] == (part in ("hypotheses", "chosen", "spread"))
    assert difference(canvases["start"], canvases[f"{part} switched"]) > 300
    np.testing.assert_array_equal(canvases[f"{part} switched back"], canvases["start"])


def test_nothing_went_wrong_and_nothing_was_fetched(seen):
    assert seen["honest"] == []
    assert len(seen["faults"]) == 2  # those on purpose are noticed
