"""The page of a prediction in a browser: it draws, turns and needs no network."""

import base64
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffpose_jax.report import page as report
from diffpose_jax.report.figures import ChosenPose
from diffpose_jax.report.page import ReportExample
from diffpose_jax.skeleton import NUM_JOINTS

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

WIDTH, HEIGHT = 900, 800
TIMEOUT_S = 120

# Chromium reads commands from descriptor 3 and answers on 4, wherever the pipes are before.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for wanted, fd in zip((3, 4), ends):
    os.dup2(fd, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium with one page, driven by the DevTools protocol over pipes."""

    def __init__(self, folder):
        self.deadline = time.monotonic() + TIMEOUT_S
        commands_out, self.commands = os.pipe()
        self.answers, answers_in = os.pipe()
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(commands_out), str(answers_in), CHROMIUM, *arguments],
            pass_fds=(commands_out, answers_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands_out)
        os.close(answers_in)
        self.number, self.buffer, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.commands)  # it ends when nobody can command it any more
        os.close(self.answers)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def receive(self):
        while b"\0" not in self.buffer:
            left = self.deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            assert select.select([self.answers], [], [], left)[0], "the browser does not answer"
            read = os.read(self.answers, 1 << 20)
            assert read, "the browser has ended"
            self.buffer += read
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path):
        # A page that turns by itself never shows the same twice.
        reduced = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[reduced])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.call("Page.navigate", url=path.as_uri())
        while self.evaluate("document.readyState") != "complete":
            time.sleep(0.05)

    def evaluate(self, script):
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def settle(self):
        """Waits until what was asked for is drawn."""
        two_frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.evaluate(f"new Promise((done) => {two_frames}).then(() => true)")

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", **more)

    def click(self, selector):
        self.evaluate(f"document.querySelector({selector!r}).click()")
        self.settle()

    def canvas(self):
        """What is on the canvas: (H, W, 4)."""
        self.settle()
        url = self.evaluate("document.getElementById('view').toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
            return np.array(image.convert("RGBA"))

    def faults(self):
        """Exceptions, errors on the console, and whatever was asked for elsewhere."""
        bad = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                bad.append(params["exceptionDetails"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                bad.append(params)
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                bad.append(params["entry"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                bad += [] if url.startswith(("file:", "data:")) else [url]
        return bad


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """A prediction's page: hypotheses around a standing person, without truth."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    standing = np.array(
        [[0, 0], [-130, 0], [-140, -430], [-150, -850], [130, 0], [140, -430], [150, -850],
         [0, 230], [0, 480], [0, 560], [0, 670], [150, 450], [300, 250], [320, 0], [-150, 450],
         [-300, 250], [-320, 0]]
    )  # fmt: skip
    pose_mm = np.concatenate([standing, np.zeros((NUM_JOINTS, 1))], axis=1)
    spread = np.where(np.arange(NUM_JOINTS)[:, None] % 3 == 0, 90, 20)
    hypotheses_mm = pose_mm + rng.normal(size=(30, NUM_JOINTS, 3)) * spread
    meaning = "the joint lies within the radius in 90% of cases (by 500 frames)"
    chosen = ChosenPose(pose_mm, np.linspace(0, 160, NUM_JOINTS), 0.9, "mean", meaning)
    picture = folder / "poses.png"
    Image.new("RGB", (300, 100), "teal").save(picture)
    example = ReportExample("photo <1>.jpg", hypotheses_mm, figure=picture, chosen=chosen)
    path = report.write_report(
        folder / "pose.html",
        title="photo <1>.jpg",
        results={"num_hypotheses": 30},
        examples=[example],
    )
    picture.unlink()  # the page must do without
    browser.open(path)
    return browser


def drawn(canvas):
    return np.count_nonzero(canvas[..., 3])


def difference(a, b):
    return np.count_nonzero((a != b).any(-1))


def test_the_canvas_is_drawn(page):
    canvas = page.canvas()
    assert canvas.shape[0] > 400
    assert canvas.shape[1] > 700
    assert drawn(canvas) > 10_000
    assert len(np.unique(canvas.reshape(-1, 4), axis=0)) > 100
    ink = (canvas[..., :3] < 40).all(-1) & (canvas[..., 3] > 200)
    assert ink.sum() > 500  # the chosen pose
    assert np.ptp(np.nonzero(ink)[0]) > canvas.shape[0] / 2
    np.testing.assert_array_equal(page.canvas(), canvas)


def test_what_it_says(page):
    assert page.evaluate("document.title") == "photo <1>.jpg"
    text = page.evaluate("document.body.innerText")
    assert "chosen pose (mean)" in text
    assert "Radii: the joint lies within the radius in 90% of cases (by 500 frames)." in text
    assert "30 of 30" in text
    assert "80.0 mm" in text  # the median radius
    assert "truth" not in text
    width = page.evaluate("document.querySelector('figure:not([hidden]) img').naturalWidth")
    assert width == 300


def test_a_drag_turns_it_and_a_double_click_turns_it_back(page):
    before = page.canvas()
    box = page.evaluate(
        "(() => { const b = document.getElementById('view').getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height]; })()"
    )
    x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
    page.mouse("mousePressed", x, y, buttons=1, clickCount=1)
    for step in range(1, 5):
        page.mouse("mouseMoved", x + 30 * step, y + 5 * step, buttons=1)
    page.mouse("mouseReleased", x + 120, y + 20, clickCount=1)
    page.mouse("mouseMoved", x + 350, y - 200)  # away from the joints, which would tell their names
    turned = page.canvas()
    assert difference(before, turned) > 5_000
    page.mouse("mouseMoved", x - 350, y - 200)
    np.testing.assert_array_equal(page.canvas(), turned)  # let go, it stays
    page.evaluate("document.getElementById('view').dispatchEvent(new MouseEvent('dblclick'))")
    np.testing.assert_array_equal(page.canvas(), before)


@pytest.mark.parametrize("what", ["hypotheses", "chosen", "radius", "spread", "mean"])
def test_each_part_shows_and_hides(page, what):
    before = page.canvas()
    was = page.evaluate(f"document.getElementById('show-{what}').checked")
    assert was == (what in ("hypotheses", "chosen", "spread"))
    page.click(f"#show-{what}")
    assert difference(before, page.canvas()) > 300
    page.click(f"#show-{what}")
    np.testing.assert_array_equal(page.canvas(), before)


def test_the_name_of_a_joint_under_the_pointer(page):
    page.click("[data-yaw='0'][data-pitch='0']")
    canvas = page.canvas()
    ink = (canvas[..., :3] < 40).all(-1) & (canvas[..., 3] > 200)
    row, column = np.argwhere(ink)[0]  # the ring around the topmost joint
    left, top = page.evaluate(
        "(() => { const b = document.getElementById('view').getBoundingClientRect();"
        " return [b.left, b.top]; })()"
    )
    page.mouse("mouseMoved", left + int(column), top + int(row) + 4)
    page.settle()
    lines = page.evaluate("document.getElementById('tip').textContent").split("\n")
    assert lines[0] == "Head"
    assert lines[1].startswith("spread ")
    assert lines[2] == "90% radius 100 mm"


def test_nothing_went_wrong_and_nothing_was_fetched(page):
    page.settle()
    requested = [e for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert requested
    assert page.faults() == []


def test_a_fault_would_be_noticed(browser, page):
    page.evaluate("setTimeout(() => { throw Error('on purpose'); })")
    page.evaluate("fetch('https://example.com').catch(() => 0).then(() => 1)")
    page.settle()
    assert len(page.faults()) >= 2
