"""From heatmaps to poses in files: what is written, and what is refused."""

import dataclasses
import functools
import io
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from absl import app
from people import ColourDetector, person, picture
from PIL import Image
from small import random_heatmaps, small_model

from diffpose_jax import detectors, inference
from diffpose_jax.data import cameras, prepared
from diffpose_jax.evaluation import calibration
from diffpose_jax.evaluation.calibration import Calibration
from diffpose_jax.io.pictures import PictureError
from diffpose_jax.prediction import finder, predict
from diffpose_jax.prediction.finder import Detection, PredictionError
from diffpose_jax.report import figures
from diffpose_jax.skeleton import H36M_JOINTS, H36M_PARENTS, MPII_JOINTS

program = programs.load("predict")

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAPS = random_heatmaps(1, 2)


def test_heatmaps_from_files(tmp_path):
    np.save(tmp_path / "one.npy", MAPS[0])
    np.save(tmp_path / "two.npy", MAPS.astype(np.float64))
    np.savez_compressed(tmp_path / "two.npz", heatmaps=MAPS, other=1)
    for name, expected in {"one.npy": MAPS[:1], "two.npy": MAPS, "two.npz": MAPS}.items():
        np.testing.assert_array_equal(predict.read_heatmaps(str(tmp_path / name)), expected)
    with pytest.raises(PredictionError, match="is not a file"):
        predict.read_heatmaps(tmp_path)


def saved(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"hello", "is not a .npy or .npz file of numbers"),
        (saved(np.savez, maps=MAPS), "has no array heatmaps, only maps"),
        (saved(np.save, MAPS[:, :15]), "must be (B, 16, 64, 64), not (2, 15, 64, 64)"),
        (saved(np.save, MAPS * np.nan), "image 0, joint 0 holds NaN"),
        (saved(np.save, MAPS[:0]), "holds the heatmaps of no picture"),
    ],
)
def test_other_files_than_heatmaps(tmp_path, content, message):
    path = tmp_path / "maps.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PredictionError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        predict.read_heatmaps(path)


def test_flat_heatmaps_are_nobody():
    flat = np.ones((16, 64, 64), np.float32)
    with pytest.raises(PredictionError, match="nobody is in these heatmaps"):
        predict.check_not_flat(Detection(flat))
    flat[3, 5, 7] += 1e-3
    assert predict.check_not_flat(Detection(flat)).heatmaps is flat


KEY = jax.random.key(7)
CALIBRATION = Calibration(np.linspace(1, 2, 17, dtype=np.float32), 1.0, 0.8, 90, 12)


@pytest.mark.parametrize(
    ("method", "calibrated", "is_used"),
    [
        ("mean", None, False),
        ("medoid", CALIBRATION, True),
        ("mean", CALIBRATION.replace(solver="ddpm", num_hypotheses=5), True),
        ("mean", CALIBRATION.replace(solver="ddpm:2", num_hypotheses=5), False),
        ("mean", CALIBRATION.replace(solver="ddpm", num_hypotheses=200), False),
    ],
)
def test_the_pose_and_its_uncertainty(method, calibrated, is_used):
    """A calibration of another solver or number of hypotheses is not used."""
    maps = random_heatmaps(2, 1)
    found = predict.predict(small_model(), KEY, maps[0], 5, method, calibrated)
    poses = np.float64(small_model().sample(KEY, maps, 5))[0]
    np.testing.assert_array_equal(found.draw.poses_mm, poses)
    distances = np.linalg.norm(poses[:, None] - poses, axis=-1)
    pose = poses.mean(0) if method == "mean" else poses[distances.mean(-1).sum(1).argmin()]
    np.testing.assert_allclose(found.chosen.pose_mm, pose, rtol=1e-4, atol=1e-2)
    level = 0.8 if is_used else 0.9
    radius = np.quantile(np.linalg.norm(poses - pose, axis=-1), level, axis=0)
    if is_used:
        radius = np.maximum(radius, 1) * calibrated.factor
    np.testing.assert_allclose(found.chosen.radius_mm, radius, rtol=1e-3, atol=1e-2)
    assert (found.chosen.level, found.chosen.method) == (level, method)
    assert found.is_calibrated == is_used == ("not calibrated" not in found.chosen.meaning)


def test_contents():
    xy = person(5, (60, 30), (230, 270), 14)
    detection = finder.detect(ColourDetector(), picture(301, 457, xy, size=14))
    found = predict.predict(small_model(), KEY, detection.heatmaps, 5, "mode")
    arrays = predict.contents(detection, found)
    shapes = {
        "poses_mm": (5, 17, 3), "joint_names": (17,), "pose_mm": (17, 3), "pose_method": (),
        "covariance_mm2": (17, 3, 3), "axes": (), "radius_mm": (17,), "radius_level": (),
        "radius_calibrated": (), "heatmaps": (16, 64, 64), "joints_2d_names": (16,),
        "joints_2d_height": (16,), "crop_corner_px": (2,), "crop_side_px": (),
        "joints_2d_px": (16, 2),
    }  # fmt: skip
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert (arrays["poses_mm"].dtype, arrays["heatmaps"].dtype) == (np.float32, np.float16)
    assert arrays["joint_names"].tolist() == list(H36M_JOINTS)
    assert arrays["joints_2d_names"].tolist() == list(MPII_JOINTS)
    assert (arrays["pose_method"], arrays["axes"]) == ("mode", "camera")
    assert not arrays["radius_calibrated"]
    np.testing.assert_array_equal(arrays["joints_2d_px"], np.float32(detection.joints_px))
    arrays = predict.contents(Detection(detection.heatmaps * np.float32(1e6)), found)
    assert np.isfinite(arrays["heatmaps"]).all()
    assert set(shapes) - set(arrays) == {"crop_corner_px", "crop_side_px", "joints_2d_px"}


def test_poses_turned_to_the_camera_and_of_a_known_height():
    found = predict.predict(small_model(), KEY, random_heatmaps(2, 1)[0], 5, "mean")
    ray = np.array([0.48, -0.6, 0.64])
    turned = dataclasses.replace(found, axes="crop").in_camera_axes(ray)
    assert turned.axes == "camera"
    turn = cameras.turns_to(ray[None])[0]
    back = turned.draw.poses_mm @ turn.T
    np.testing.assert_allclose(back, found.draw.poses_mm, rtol=1e-5, atol=1e-2)
    scaled = turned.of_height(1600.0)
    standing = ("LAnkle", "LKnee", "Spine", "Thorax", "Nose", "Head")
    joints = [H36M_JOINTS.index(name) for name in standing]
    parents = [H36M_PARENTS[joint] for joint in joints]
    bones = scaled.chosen.pose_mm[joints] - scaled.chosen.pose_mm[parents]
    assert 1.05 * np.linalg.norm(bones, axis=1).sum() == pytest.approx(1600, rel=1e-5)
    # The covariance and the radii go with the hypotheses.
    poses = np.float64(scaled.draw.poses_mm)
    expected = np.stack([np.cov(poses[:, joint].T, bias=True) for joint in range(17)])
    of_found = np.cov(np.float64(found.draw.poses_mm)[:, 3].T, bias=True)
    bias = found.covariance_mm2[3, 0, 0] / of_found[0, 0]  # 1, or M / (M - 1)
    np.testing.assert_allclose(scaled.covariance_mm2, bias * expected, rtol=1e-3, atol=0.1)
    ratio = scaled.chosen.radius_mm[1:] / found.chosen.radius_mm[1:]
    sizes = [np.linalg.norm(each.draw.poses_mm) for each in (scaled, found)]
    np.testing.assert_allclose(ratio, sizes[0] / sizes[1], rtol=1e-5)


DEFAULTS = dict.fromkeys(("image", "heatmaps", "lsp", "data_dir", "detector", "solver"))
DEFAULTS |= dict.fromkeys(("focal_px", "height_mm"))
DEFAULTS |= {"box": []}
DEFAULTS |= {"checkpoint": "small", "num_hypotheses": 5, "pose": "heatmap_agreement", "seed": 0}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the program; the detector's folder is named "colours", the model's "small"."""
    models, colours = {"small": small_model()}, {"colours": ColourDetector()}
    load = inference.load
    monkeypatch.setattr(inference, "load", lambda folder: models.get(folder) or load(folder))
    monkeypatch.setattr(detectors, "load", colours.__getitem__)
    monkeypatch.setattr(figures, "save", functools.partial(figures.save, dpi=30))

    def run(**values):
        for name, value in (DEFAULTS | {"output": tmp_path / "out"} | values).items():
            value = str(value) if isinstance(value, Path) else value
            monkeypatch.setattr(program, name.upper(), types.SimpleNamespace(value=value))
        program.main([])
        return tmp_path / "out"

    return run


def written(folder):
    """The arrays, once the three files, and they alone, are there."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith("person_")}
    assert names == {"hypotheses.npz", "poses.png", "pose.html"}
    with Image.open(folder / "poses.png") as image:
        assert image.width > 2 * image.height > 100
    with np.load(folder / "hypotheses.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_people_in_a_picture(command, tmp_path, capsys):
    people = [person(6, (20, 30), (150, 230), 12), person(7, (240, 60), (370, 270), 12)]
    path = tmp_path / "two & <b>.png"
    Image.fromarray(picture(300, 400, *people, size=12)).save(path)
    boxes = [",".join(map(str, [*(xy.min(0) - 6), *(np.ptp(xy, axis=0) + 12)])) for xy in people]
    output = command(image=path, detector="colours", box=boxes)
    for number, xy in enumerate(people, start=1):
        arrays = written(output / f"person_{number}")
        assert np.abs(arrays["joints_2d_px"] - xy).max() < 0.5 * arrays["crop_side_px"] / 64 + 1.5
    page = (output / "person_2" / "pose.html").read_text(encoding="utf-8")
    assert "<title>two &amp; &lt;b&gt;.png, person 2</title>" in page
    printed = capsys.readouterr().out
    assert f"{output / 'person_1'}: 5 hypotheses, chosen pose (heatmap agreement), 90%" in printed
    assert "not calibrated on data" in printed

    # One box alone: into the output itself.
    command(image=path, detector="colours", box=boxes[1:], pose="mode", seed=3, height_mm=1234.0)
    alone = written(output)
    np.testing.assert_array_equal(alone["heatmaps"], arrays["heatmaps"])
    assert alone["pose_method"] == "mode"
    assert np.abs(alone["poses_mm"] - arrays["poses_mm"]).max() > 1


def test_a_folder_of_pictures(command, tmp_path, capsys):
    folder, output = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    image = Image.fromarray(picture(300, 400, person(8, (20, 30), (150, 230), 12), size=12))
    for name in ("a.png", "c.png"):
        image.save(folder / name)
    (folder / "b.jpg").write_text("hello")
    Image.new("RGB", (100, 100)).save(folder / "c.bmp")
    with pytest.raises(SystemExit, match="2 of 4 gave no poses"):
        command(image=folder, detector="colours")
    assert {path.name for path in output.iterdir()} == {"a", "c.png"}
    first, second = (written(output / name) for name in ("a", "c.png"))
    np.testing.assert_array_equal(first["poses_mm"], second["poses_mm"])
    unreadable, empty = capsys.readouterr().err.splitlines()
    assert unreadable.startswith(f"error: {folder / 'b.jpg'} is not a picture")
    assert empty.startswith("error: c.bmp: nobody was found in the picture")
    with pytest.raises(SystemExit, match=r"^1$"):
        command(image=folder / "c.bmp", detector="colours", output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_heatmaps_of_several_with_an_export_and_its_calibration(command, tmp_path, capsys):
    inference.export(small_model(), tmp_path / "export")
    calibration.write_calibration(tmp_path / "export", "mean", CALIBRATION, {"num_hypotheses": 5})
    maps = np.concatenate([np.zeros((1, 16, 64, 64), np.float32), random_heatmaps(3, 1)])
    np.save(tmp_path / "maps.npy", maps)
    given = {"heatmaps": tmp_path / "maps.npy", "checkpoint": tmp_path / "export", "seed": 4}
    given["solver"] = "ddpm:2"
    with pytest.raises(SystemExit, match="1 of 2 gave no poses"):
        command(**given, pose="mean")
    (output,) = (tmp_path / "out").iterdir()
    assert output.name == "heatmaps_0001"
    arrays = written(output)
    expected = small_model().sample(jax.random.key(4), maps[1:], 5, "ddpm:2")[0]
    np.testing.assert_array_equal(arrays["poses_mm"], expected)
    assert arrays["radius_calibrated"]
    assert "error: maps.npy, 0: nobody is in these heatmaps" in capsys.readouterr().err


def test_pictures_of_a_prepared_lsp(command, monkeypatch):
    columns = {"name": np.array(["a", "b"]), "corner_px": np.eye(2), "side_px": np.full(2, 63.0)}
    monkeypatch.setattr(prepared, "find", lambda *_: Path())
    monkeypatch.setattr(prepared, "read", lambda *_: (columns, lambda rows: MAPS[rows]))
    arrays = written(command(lsp=["b"]) / "b")
    np.testing.assert_array_equal(arrays["heatmaps"], MAPS[1].astype(np.float16))
    assert arrays["crop_corner_px"].tolist() == [0, 1]
    with pytest.raises(PredictionError, match="--lsp: c, d are not among the 2 pictures"):
        command(lsp=["c", "a", "d"])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"output": None}, app.UsageError, "--checkpoint and --output are needed"),
        ({"detector": None}, app.UsageError, "--image needs --detector"),
        ({"image": None}, app.UsageError, "one of --image, --heatmaps and --lsp"),
        ({"heatmaps": "b.npy"}, app.UsageError, "one of --image, --heatmaps and --lsp"),
        ({"image": "/", "box": ["1,2,3,4"]}, app.UsageError, "--box says where people are"),
        ({"box": ["0,0,9,9", "100,0,5,5"]}, PredictionError, "outside of the picture"),
        ({"image": "/no.png"}, PictureError, "no.png does not exist"),
        ({"output": "."}, PredictionError, r"a\.png is a file; name a folder"),
    ],
)
def test_flags_that_do_not_fit(command, tmp_path, monkeypatch, values, error, message):
    """It is told before the model is read."""
    monkeypatch.setattr(inference, "load", lambda _: sys.exit("the model was read"))
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 100)).save(path)
    if values.get("output"):
        values = {"output": path}
    with pytest.raises(error, match=message):
        command(**{"image": path, "detector": "colours"} | values)
