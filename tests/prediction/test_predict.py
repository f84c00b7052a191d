"""From pictures to poses: where joints are found, what is written, and what is refused.

A detector that knows 16 colours stands for the network: where a colour is, there is the joint.
"""

import functools
import io
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from absl import app
from PIL import Image
from small import distinct_config, random_heatmaps, small_network

from diffpose_jax import detectors
from diffpose_jax.evaluation import aggregation
from diffpose_jax.io import pictures
from diffpose_jax.method import network as model
from diffpose_jax.prediction.predict import Box, Detection, PredictionError
from diffpose_jax.prediction.predict import predict as prediction
from diffpose_jax.report import figures as plotting
from diffpose_jax.report.figures import ChosenPose
from diffpose_jax.skeleton import H36M_JOINTS, MPII_JOINTS
from diffpose_jax.training import checkpoints

predict = programs.load("predict")

GREY = 128
COLOURS = np.array([[r, g, b] for r in (0, 255) for g in (0, 120, 240) for b in (0, 110, 255)])
COLOURS = COLOURS[1:17]  # without black, which is around a picture


class ColourDetector:
    """Sees a colour where at least six pixels of its crop have it."""

    input_px = 160

    def __init__(self):
        self.looks = 0

    def heatmaps(self, crops):
        assert crops.dtype == np.uint8
        assert crops.shape[1:] == (160, 160, 3)
        self.looks += len(crops)
        return np.stack([[self.heatmap(crop, colour) for colour in COLOURS] for crop in crops])

    def heatmap(self, crop, colour):
        rows, columns = np.nonzero(np.abs(crop.astype(int) - colour).max(-1) < 40)
        if len(rows) < 6:
            return np.zeros((64, 64), np.float32)
        x, y = (np.mean(places) + 0.5 for places in (columns, rows))
        cell = np.arange(64) * (160 / 64)
        squares = (cell - x) ** 2 + (cell[:, None] - y) ** 2
        return np.float32(0.9 * np.exp(-squares / (2 * 4.0**2)))


def person(seed, low, high, size):
    """16 joints (x, y) between two corners; the first two are at them."""
    rng = np.random.default_rng(seed)
    low, high = np.array(low), np.array(high)
    while True:
        xy = np.concatenate([[low, high], rng.uniform(low, high, (14, 2))])
        distances = np.abs(xy[:, None] - xy).max(-1) + 1e9 * np.eye(16)
        if distances.min() > 1.2 * size:
            return xy


def picture(height, width, *people, size):
    """People's joints as squares of `size` pixels on grey."""
    image = np.full((height, width, 3), GREY, np.uint8)
    for xy in people:
        for (x, y), colour in zip(xy, COLOURS, strict=True):
            top, left = (max(round(value - size / 2), 0) for value in (y, x))
            image[top : top + size, left : left + size] = colour
    return image


def assert_found(found, xy):
    """To half a cell of the heatmap and a pixel."""
    assert found.is_found.all()
    np.testing.assert_allclose(found.heights, 0.9, atol=0.1)
    assert np.abs(found.joints_px - xy).max() <= 0.5 * found.crop.side_px[0] / 64 + 1.5


PEOPLE = [
    (301, 457, (40, 30), (180, 270), 14),  # odd sizes, at the left
    (457, 301, (150, 200), (270, 430), 14),  # upright, low
    (240, 901, (600, 20), (760, 225), 14),  # wide: in the padded square the person is small
    (901, 240, (30, 600), (200, 880), 16),
    (200, 200, (8, 8), (192, 192), 14),  # all of it
]


@pytest.mark.parametrize(("height", "width", "low", "high", "size"), PEOPLE)
def test_joints_are_where_they_were_put(height, width, low, high, size):
    xy = person(0, low, high, size)
    detector = ColourDetector()
    found = prediction.detect(detector, picture(height, width, xy, size=size), None)
    assert_found(found, xy)
    extent = np.ptp(xy, axis=0).max()
    assert found.crop.side_px[0] == pytest.approx(1.2 * extent, rel=0.06)
    centre = found.crop.corner_px[0] + found.crop.side_px[0] / 2
    np.testing.assert_allclose(centre, (xy.min(0) + xy.max(0)) / 2, atol=0.04 * extent)
    assert found.image.shape == (160, 160, 3)
    assert detector.looks == 3 or max(height, width) > 900


def test_a_small_person_is_looked_for_in_parts():
    xy = person(1, (400, 90), (520, 250), 8)
    image = picture(500, 640, xy, size=8)
    detector = ColourDetector()
    assert_found(prediction.detect(detector, image), xy)
    assert detector.looks > 3


@pytest.mark.parametrize(
    ("low", "high"), [((8, 8), (150, 170)), ((240, 120), (392, 292)), ((8, 130), (150, 292))]
)
def test_a_box_at_the_border(low, high):
    """It reaches beyond the picture; the part within counts."""
    xy = person(2, low, high, 12)
    image = picture(300, 400, xy, size=12)
    low, high = np.array(low), np.array(high)
    box = np.where(low < 20, low - 60, low), np.where(high > [380, 280], high + 60, high)
    detector = ColourDetector()
    found = prediction.detect(detector, image, Box(*box[0], *(box[1] - box[0])))
    assert_found(found, xy)
    assert detector.looks == 1
    inside = np.clip(box, 0, [400, 300])
    assert found.crop.side_px[0] == round(1.2 * np.ptp(inside, axis=0).max())
    centre = found.crop.corner_px[0] + found.crop.side_px[0] / 2
    np.testing.assert_allclose(centre, inside.mean(0), atol=0.6)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_pixels_are_those_of_the_upright_picture(tmp_path, orientation):
    xy = person(3, (40, 30), (150, 190), 12)
    upright = picture(220, 300, xy, size=12)
    stored = {2: upright[:, ::-1], 3: upright[::-1, ::-1]}.get(orientation)
    if stored is None:
        stored = np.rot90(upright, 1 if orientation == 6 else -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert_found(prediction.detect(ColourDetector(), pictures.read(tmp_path / "a.png")), xy)


def test_nobody():
    blank = np.full((200, 300, 3), GREY, np.uint8)
    with pytest.raises(PredictionError, match=r"nobody was found in the picture: 0 of 16.*--box"):
        prediction.detect(ColourDetector(), blank)
    with pytest.raises(PredictionError, match="nobody was found in the box: 0 of 16"):
        prediction.detect(ColourDetector(), blank, Box(10, 10, 100, 100))


def test_a_few_joints_are_nobody():
    xy = person(4, (40, 30), (150, 190), 12)
    image = picture(220, 300, xy, size=12)
    for (x, y), _ in list(zip(xy, COLOURS, strict=True))[6:]:
        image[round(y) - 7 : round(y) + 7, round(x) - 7 : round(x) + 7] = GREY
    found = prediction.detect(ColourDetector(), image)
    assert found.is_found.sum() == 6
    image[: round(xy[0, 1]) + 8, : round(xy[0, 0]) + 8] = GREY
    with pytest.raises(PredictionError, match="nobody"):
        prediction.detect(ColourDetector(), image)


def test_joints_in_one_place_are_nobody():
    class Dot(ColourDetector):
        def heatmap(self, crop, colour):
            return np.float32(0.9 * np.exp(-((np.arange(64) - 30.0) ** 2 / 2)[:, None] - 0.0))

    class Point(ColourDetector):
        def heatmap(self, crop, colour):
            blob = np.exp(-((np.arange(64) - 30.0) ** 2) / 2)
            return np.float32(0.9 * blob * blob[:, None])

    image = np.full((200, 300, 3), GREY, np.uint8)
    for detector in (Dot(), Point()):
        with pytest.raises(PredictionError, match="too close together"):
            prediction.detect(detector, image)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1;2;3;4"])
def test_no_box(text):
    with pytest.raises(PredictionError, match="a box is x,y,w,h in pixels, not"):
        Box.parse(text)


@pytest.mark.parametrize("text", ["1,2,0,4", "1,2,3,-4", "nan,0,1,1", "0,0,inf,1"])
def test_a_box_without_area(text):
    with pytest.raises(PredictionError, match="has no area"):
        Box.parse(text)


@pytest.mark.parametrize("text", ["300,0,10,10", "0,200,9,9", "-20,0,20,50", "1e9,1e9,5,5"])
def test_a_box_outside(text):
    image = np.zeros((200, 300, 3), np.uint8)
    with pytest.raises(PredictionError, match="outside of the picture, which has 300 x 200 px"):
        prediction.detect(ColourDetector(), image, Box.parse(text))


# --- heatmaps from files -----------------------------------------------------------------


def test_heatmaps_from_files(tmp_path):
    maps = random_heatmaps(0, 3)
    np.save(tmp_path / "one.npy", maps[0])
    np.save(tmp_path / "three.npy", maps.astype(np.float64))
    np.savez_compressed(tmp_path / "three.npz", heatmaps=maps, other=1)
    np.testing.assert_array_equal(prediction.read_heatmaps(tmp_path / "one.npy"), maps[:1])
    for name in ("three.npy", "three.npz"):
        np.testing.assert_array_equal(prediction.read_heatmaps(str(tmp_path / name)), maps)


def saved(save, *args, **kwargs):
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


MAPS = random_heatmaps(1, 2)
NPY, NPZ = saved(np.save, MAPS), saved(np.savez, heatmaps=MAPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a .npy or .npz file of numbers"),
        (b"hello", "is not a .npy or .npz file of numbers"),
        (NPY[:-100], "is not a .npy or .npz file of numbers"),
        (NPY[:60], "is not a .npy or .npz file of numbers"),
        (NPZ[: len(NPZ) // 2], "is not a .npy or .npz file of numbers"),
        (saved(np.save, np.array([None])), "is not a .npy or .npz file of numbers"),
        (saved(np.savez, heatmaps=np.array([{}])), "is not a .npy or .npz file of numbers"),
        (NPY.replace(b"(2, 16,", b"(9999999, 16,")[: len(NPY)], "is not a .npy"),
        (saved(np.savez, maps=MAPS), "has no array heatmaps, only maps"),
        (saved(np.savez), "has no array heatmaps, only nothing"),
        (saved(np.save, MAPS[:, :15]), "must be (B, 16, 64, 64), not (2, 15, 64, 64)"),
        (saved(np.save, MAPS[0, 0]), "must be (B, 16, 64, 64), not (64, 64)"),
        (saved(np.save, MAPS * np.nan), "image 0, joint 0 holds NaN"),
        (saved(np.save, MAPS.astype(complex)), "must be real numbers"),
        (saved(np.save, MAPS[:0]), "holds the heatmaps of no picture"),
    ],
)
def test_other_files_than_heatmaps(tmp_path, content, message):
    path = tmp_path / "maps.npy"
    path.write_bytes(content)
    with pytest.raises(PredictionError) as error:
        prediction.read_heatmaps(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_no_heatmap_file(tmp_path):
    for path, reason in ((tmp_path / "none.npy", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(PredictionError, match=reason):
            prediction.read_heatmaps(path)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_flat_heatmaps_are_nobody(value):
    flat = np.full((16, 64, 64), value, np.float32)
    with pytest.raises(PredictionError, match="nobody is in these heatmaps"):
        prediction.check_not_flat(Detection(flat))
    flat[3, 5, 7] += 1e-3
    if value >= 0:
        assert prediction.check_not_flat(Detection(flat)).heatmaps is flat


# --- the prediction ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    network = small_network()
    return model.Model(network, jax.jit(network.init)(jax.random.key(5)), distinct_config())


CALIBRATION = aggregation.Calibration(np.linspace(1, 2, 17, dtype=np.float32), 1.0, 0.8, 90, 12)


@pytest.mark.parametrize("method", ["mean", "medoid"])
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_the_pose_and_its_uncertainty(small, method, calibration):
    maps = random_heatmaps(2, 1)
    key = jax.random.key(7)
    found = prediction.predict(small, key, maps[0], 5, method, calibration)
    poses = np.float64(small.sample(key, maps, 5))[0]
    np.testing.assert_array_equal(found.poses_mm, poses)
    distances = np.linalg.norm(poses[:, None] - poses, axis=-1)
    pose = poses.mean(0) if method == "mean" else poses[distances.mean(-1).sum(1).argmin()]
    np.testing.assert_allclose(found.chosen.pose_mm, pose, rtol=1e-4, atol=1e-2)
    covariance = np.stack([np.cov(poses[:, joint].T) for joint in range(17)])
    np.testing.assert_allclose(found.covariance_mm2, covariance, rtol=1e-3, atol=1)
    level = 0.9 if calibration is None else 0.8
    radius = np.quantile(np.linalg.norm(poses - pose, axis=-1), level, axis=0)
    if calibration is not None:
        radius = np.maximum(radius, 1) * calibration.factor
    np.testing.assert_allclose(found.chosen.radius_mm, radius, rtol=1e-3, atol=1e-2)
    assert (found.chosen.level, found.chosen.method) == (level, method)
    assert found.is_calibrated == (calibration is not None)
    assert ("not calibrated" in found.chosen.meaning) == (calibration is None)


def test_contents(small):
    xy = person(5, (60, 30), (230, 270), 14)
    detection = prediction.detect(ColourDetector(), picture(301, 457, xy, size=14))
    found = prediction.predict(small, jax.random.key(0), detection.heatmaps, 5, "mode")
    arrays = prediction.contents(detection, found)
    shapes = {
        "poses_mm": (5, 17, 3), "joint_names": (17,), "pose_mm": (17, 3), "pose_method": (),
        "covariance_mm2": (17, 3, 3), "radius_mm": (17,), "radius_level": (),
        "radius_calibrated": (), "heatmaps": (16, 64, 64), "joints_2d_names": (16,),
        "joints_2d_height": (16,), "crop_corner_px": (2,), "crop_side_px": (),
        "joints_2d_px": (16, 2),
    }  # fmt: skip
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert arrays["poses_mm"].dtype == np.float32
    assert arrays["heatmaps"].dtype == np.float16
    assert arrays["joint_names"].tolist() == list(H36M_JOINTS)
    assert arrays["joints_2d_names"].tolist() == list(MPII_JOINTS)
    assert arrays["pose_method"] == "mode"
    assert not arrays["radius_calibrated"]
    np.testing.assert_array_equal(arrays["joints_2d_px"], np.float32(detection.joints_px))
    large = Detection(detection.heatmaps * np.float32(1e6))
    arrays = prediction.contents(large, found)
    assert np.isfinite(arrays["heatmaps"]).all()
    assert set(shapes) - set(arrays) == {"crop_corner_px", "crop_side_px", "joints_2d_px"}


def test_the_figure_shows_the_crop_the_chosen_pose_and_its_radii():
    rng = np.random.default_rng(9)
    hypotheses, pose = rng.normal(0, 300, (10, 17, 3)), rng.normal(0, 300, (17, 3))
    chosen = ChosenPose(pose, rng.uniform(10, 99, 17), 0.85, "heatmap_agreement", "meaning")
    maps, xy = random_heatmaps(4, 1)[0], rng.uniform(-1, 0.9, (6, 16, 2))
    crop = rng.integers(0, 256, (50, 50, 3), np.uint8)
    figure = plotting.plot_example(maps, xy, xy[..., 0], hypotheses, chosen=chosen, crop=crop)
    evidence, front, side, spread = figure.axes
    (image,) = evidence.images
    np.testing.assert_array_equal(image.get_array(), crop)
    # A cell's value belongs to its whole-number coordinate, where `crops` puts cell 0 on the edge.
    assert image.get_extent() == [0, 64, 64, 0]
    rows, columns = np.divmod(maps.reshape(16, -1).argmax(1), 64)
    argmax = evidence.collections[-1].get_offsets()
    np.testing.assert_array_equal(argmax, np.stack([columns, rows], -1))
    for axes, across in ((front, 0), (side, 2)):
        np.testing.assert_allclose(axes.collections[-1].get_offsets(), pose[:, [across, 1]])
    outlines = [bar for bar in spread.patches if not bar.get_fill()]
    joints = [H36M_JOINTS.index(label.get_text()) for label in spread.get_yticklabels()]
    widths = [bar.get_width() for bar in outlines]
    np.testing.assert_allclose(widths, np.asarray(chosen.radius_mm)[joints])
    assert spread.get_xlim()[1] > max(widths)
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"chosen pose (heatmap agreement)", "85% radius"} <= set(texts)
    with pytest.raises(ValueError, match="radius_mm"):
        plotting.plot_example(
            maps, xy, xy[..., 0], hypotheses, chosen=ChosenPose(pose, [1.0], 0.9, "a", "b")
        )


# --- the command -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "export"
    checkpoints.export(small, folder)
    return folder


DEFAULTS = {
    "image": None,
    "heatmaps": None,
    "detector": None,
    "box": [],
    "num_hypotheses": 5,
    "pose": "heatmap_agreement",
    "seed": 0,
}


@pytest.fixture
def command(exported, tmp_path, monkeypatch):
    """Runs the program; the detector's folder is named "colours"."""

    def load(folder):
        assert folder == "colours"
        return ColourDetector()

    monkeypatch.setattr(detectors, "load", load)

    # Small, as drawing it is most of the time.
    monkeypatch.setattr(plotting, "save", functools.partial(plotting.save, dpi=30))

    def run(**values):
        values = DEFAULTS | {"checkpoint": exported, "output": tmp_path / "out"} | values
        for name, value in values.items():
            value = str(value) if isinstance(value, Path) else value
            monkeypatch.setattr(predict, name.upper(), types.SimpleNamespace(value=value))
        predict.main([])
        return tmp_path / "out"

    return run


@pytest.fixture
def loaded(small, monkeypatch):
    """The model itself instead of its export: what is compiled is compiled once."""
    monkeypatch.setattr(checkpoints, "load", lambda _: small)


def written(folder):
    """The arrays, once the three files, and they alone, are there."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith("person_")}
    assert names == {"hypotheses.npz", "poses.png", "pose.html"}
    with Image.open(folder / "poses.png") as image:
        assert image.width > 2 * image.height > 100
    with np.load(folder / "hypotheses.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.usefixtures("loaded")
def test_people_in_a_picture(command, tmp_path, capsys):
    people = [person(6, (20, 30), (150, 230), 12), person(7, (240, 60), (370, 270), 12)]
    image = picture(300, 400, *people, size=12)
    Image.fromarray(image).save(tmp_path / "two & <b>.png")
    boxes = [",".join(map(str, [*(xy.min(0) - 6), *(np.ptp(xy, axis=0) + 12)])) for xy in people]
    path = str(tmp_path / "two & <b>.png")
    output = command(image=path, detector="colours", box=boxes)
    for number, xy in enumerate(people, start=1):
        arrays = written(output / f"person_{number}")
        assert np.abs(arrays["joints_2d_px"] - xy).max() < 0.5 * arrays["crop_side_px"] / 64 + 1.5
    page = (output / "person_2" / "pose.html").read_text(encoding="utf-8")
    assert "<title>two &amp; &lt;b&gt;.png, person 2</title>" in page
    printed = capsys.readouterr().out
    assert (
        f"{output / 'person_1'}: 5 hypotheses, chosen pose (heatmap agreement), 90% radius"
        in printed
    )
    assert "not calibrated on data" in printed

    # One box alone: into the output itself, in place of what is there.
    (output / "pose.html").write_text("old")
    command(image=path, detector="colours", box=boxes[1:], pose="heatmap_agreement", seed=3)
    alone = written(output)
    np.testing.assert_array_equal(alone["heatmaps"], arrays["heatmaps"])
    assert alone["pose_method"] == "heatmap_agreement"
    assert np.abs(alone["poses_mm"] - arrays["poses_mm"]).max() > 1
    data = (output / "pose.html").read_text(encoding="utf-8")
    data = json.loads(data.split('id="data">')[1].split("</script>")[0])
    (example,) = data["examples"]
    np.testing.assert_allclose(np.reshape(example["hypotheses"], (5, 17, 3)), alone["poses_mm"],
                               atol=0.51)  # fmt: skip
    np.testing.assert_allclose(np.reshape(example["chosen"]["pose"], (17, 3)), alone["pose_mm"],
                               atol=0.51)  # fmt: skip
    np.testing.assert_allclose(example["chosen"]["radius"], alone["radius_mm"], atol=0.51)


@pytest.mark.usefixtures("loaded")
def test_a_folder_of_pictures(command, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = Image.fromarray(picture(300, 400, person(8, (20, 30), (150, 230), 12), size=12))
    image.save(folder / "a.png")
    image.save(folder / "c.png")
    (folder / "b.jpg").write_text("hello")
    Image.new("RGB", (100, 100)).save(folder / "c.bmp")
    with pytest.raises(SystemExit, match="2 of 4 gave no poses"):
        command(image=str(folder), detector="colours")
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {"a", "c.png"}
    first, second = (written(output / name) for name in ("a", "c.png"))
    np.testing.assert_array_equal(first["poses_mm"], second["poses_mm"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"error: {folder / 'b.jpg'} is not a picture")
    assert errors[1].startswith("error: c.bmp: nobody was found in the picture")


@pytest.mark.usefixtures("loaded")
def test_heatmaps(command, small, tmp_path, capsys):
    maps = np.concatenate([np.zeros((1, 16, 64, 64), np.float32), random_heatmaps(3, 1)])
    np.save(tmp_path / "maps.npy", maps)
    with pytest.raises(SystemExit, match="1 of 2 gave no poses"):
        command(heatmaps=str(tmp_path / "maps.npy"), seed=4)
    output = tmp_path / "out"
    assert [path.name for path in output.iterdir()] == ["heatmaps_0001"]
    arrays = written(output / "heatmaps_0001")
    expected = small.sample(jax.random.key(4), maps[1:], 5)[0]
    np.testing.assert_array_equal(arrays["poses_mm"], expected)
    assert "error: maps.npy, 0: nobody is in these heatmaps" in capsys.readouterr().err


def test_of_nobody_nothing_is_written(command, tmp_path, capsys):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as error:
        command(image=str(tmp_path / "a.png"), detector="colours")
    assert error.value.code == 1
    assert not (tmp_path / "out").exists()
    assert "error: a.png: nobody was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": "a.png"}, "--image needs --detector"),
        ({}, "either --image or --heatmaps"),
        ({"image": "a.png", "heatmaps": "b.npy"}, "either --image or --heatmaps"),
        ({"heatmaps": "b.npy", "box": ["1,2,3,4"]}, "--box says where people are"),
        ({"image": "/", "detector": "colours", "box": ["1,2,3,4"]}, "--box says where people are"),
        ({"image": "a.png", "output": None}, "--checkpoint and --output are needed"),
    ],
)
def test_flags_that_do_not_fit(command, values, message):
    with pytest.raises(app.UsageError, match=message):
        command(**values)


def test_before_any_work(command, tmp_path, monkeypatch):
    """A wrong picture, box or output is told before the model is read."""
    monkeypatch.setattr(checkpoints, "load", lambda _: sys.exit("the model was read"))
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    given = {"image": str(tmp_path / "a.png"), "detector": "colours"}
    with pytest.raises(PredictionError, match="outside of the picture"):
        command(**given, box=["0,0,50,50", "100,0,5,5"])
    with pytest.raises(PredictionError, match="a box is x,y,w,h"):
        command(**given, box=["0,0"])
    with pytest.raises(pictures.PictureError, match=r"b\.png does not exist"):
        command(**(given | {"image": str(tmp_path / "b.png")}))
    with pytest.raises(PredictionError, match=r"a\.png is a file; name a folder"):
        command(**given, output=str(tmp_path / "a.png"))
    with pytest.raises(SystemExit, match="the model was read"):
        command(**given)
