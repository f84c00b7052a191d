"""Labelled pictures, and what is fitted to them by `experiments.calibrate`."""

import dataclasses
import io
import json
import types

import numpy as np
import programs
import pytest
from absl import app
from PIL import Image
from small import small_model

from diffpose_jax import detectors, inference
from diffpose_jax.config import ConfigError
from diffpose_jax.data import cameras, labelled, simulator_fit
from diffpose_jax.detectors import Detector
from diffpose_jax.evaluation import calibration
from diffpose_jax.io.files import FileError
from diffpose_jax.skeleton import MPII_TO_H36M

program = programs.load("calibrate")

SIZE, SCALE, FOCAL = (160, 200), 0.5, 300.0  # width and height of the stored pictures


@dataclasses.dataclass(frozen=True, eq=False)
class GreenDetector(Detector):
    """All maps have a blob where a crop is green."""

    network: None = None
    params: None = None
    input_px: int = 64
    fingerprint: str = "green"

    def heatmaps(self, crops):
        rows, columns = np.nonzero(crops[0].astype(int)[..., 1] > 150)
        cell = np.arange(64)
        squares = (cell - columns.mean()) ** 2 + (cell[:, None] - rows.mean()) ** 2
        return np.float32(np.tile(np.exp(-squares / 8), (1, 16, 1, 1)))


def jpeg(green_xy):
    image = Image.new("RGB", SIZE, "white")
    image.paste((200, 0, 0), (0, 0, *SIZE))
    x, y = map(round, green_xy)
    image.paste((0, 255, 0), (x - 3, y - 3, x + 4, y + 4))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def contents(number=3):
    """People seen by one camera; the wrist of each is the green square."""
    rng = np.random.default_rng(0)
    points = rng.normal(0, 300, (number, 17, 3)) * [1, 1, 0.2] + [200, 0, 4000]
    matrix = np.array([[FOCAL, 0, 160], [0, FOCAL, 200], [0, 0, 1]])
    pixels = (points @ matrix.T)[..., :2] / points[..., 2:]
    files = [jpeg((pixels[i, 13] + 0.5) * SCALE - 0.5) for i in range(number)]
    valid = np.ones((number, 17), bool)
    valid[:, 9] = False
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "image_index": np.arange(number),
        "pose_camera_mm": points,
        "pose_pixels": pixels,
        "joint_valid": valid,
        "scale": SCALE,
        "camera_K": matrix[None],
        "camera_index": np.zeros(number, int),
        "frame_index": np.array([4, 4, 8, *range(9, 6 + number)]),
    }


def written(path, **changes):
    """A file; what is None is left out."""
    content = {name: x for name, x in (contents() | changes).items() if x is not None}
    np.savez(path, **content)
    return path


def test_joints_lie_where_the_pictures_show_them(tmp_path):
    people = labelled.read(written(tmp_path / "a.npz"))
    assert people.moments.tolist() == [4, 4, 8]
    found = people.detect(GreenDetector())
    wrist = MPII_TO_H36M.index(13)
    cells = found.heatmaps[:, wrist].reshape(3, -1).argmax(1)
    seen = np.stack([cells % 64, cells // 64], axis=-1)
    assert np.abs(seen - found.keypoints_xy[:, 13]).max() < 1.0
    assert found.is_valid.all()  # the nose, which is not valid, has no heatmap
    rays = people.rays
    squares = people.crops
    middle = (squares.corner_px + squares.side_px[:, None] / 2 + 0.5) / SCALE - 0.5
    expected = np.column_stack([(middle - [160, 200]) / FOCAL, np.ones(3)])
    np.testing.assert_allclose(rays, expected / np.linalg.norm(expected, axis=1, keepdims=True))


def test_poses_in_both_axes(tmp_path):
    people = labelled.read(written(tmp_path / "a.npz"))
    in_camera = people.poses_mm("camera")
    points = contents()["pose_camera_mm"]
    expected = (points - points[:, :1]) * [1, -1, -1]
    np.testing.assert_allclose(in_camera, expected)
    turned = people.poses_mm("crop") @ cameras.turns_to(people.rays)
    np.testing.assert_allclose(turned, expected, atol=1e-9)
    without = labelled.read(written(tmp_path / "b.npz", camera_K=None))
    assert without.rays is None
    with pytest.raises(ValueError, match="the axes of the crop need camera_K"):
        without.poses_mm("crop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose_pixels": None}, r"it lacks \['pose_pixels'\]"),
        ({"pose_pixels": np.zeros((3, 16, 2))}, r"pose_pixels is \(3, 16, 2\), not \(3, 17, 2\)"),
        ({"image_index": np.array([0, 1, 3])}, "image_index names pictures that are not there"),
        ({"pose_camera_mm": np.full((3, 17, 3), np.nan)}, "numbers that are not finite"),
        ({"camera_index": np.array([0, 0, 1])}, "out of bounds"),
    ],
)
def test_files_that_hold_something_else(tmp_path, changes, message):
    path = written(tmp_path / "a.npz", **changes)
    with pytest.raises(FileError, match=message) as error:
        labelled.read(path)
    assert str(path) in str(error.value)


def test_not_a_file(tmp_path):
    with pytest.raises(FileError, match=r"no\.npz does not exist"):
        labelled.read(tmp_path / "no.npz")
    (tmp_path / "a.npz").write_bytes(b"hello")
    with pytest.raises(FileError, match="does not hold labelled pictures"):
        labelled.read(tmp_path / "a.npz")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `experiments.calibrate` with a detector "green" and a model "small"."""
    model = small_model()
    monkeypatch.setattr(detectors, "load", {"green": GreenDetector()}.__getitem__)
    monkeypatch.setattr(inference, "load", {"small": model}.__getitem__)
    defaults = {"detector": "green", "checkpoint": None, "output": str(tmp_path / "out")}
    defaults["source"] = str(written(tmp_path / "a.npz"))

    def run(**flags):
        for name, value in (defaults | flags).items():
            monkeypatch.setattr(program, name.upper(), types.SimpleNamespace(value=value))
        program.main([])
        return tmp_path / "out"

    return run


def test_a_radius_fitted_to_pictures(command, capsys):
    output = command(what="radius", checkpoint="small")
    model = small_model()
    fitted = calibration.read_calibration(output, model.config.evaluation.pose)
    assert (fitted.num_frames, fitted.num_groups) == (3, 2)
    assert fitted.factor[9] == np.median(np.delete(fitted.factor, [0, 9]))
    assert "by 3 frames in 2 groups" in capsys.readouterr().out


def test_a_simulator_fitted_to_pictures(command, monkeypatch):
    monkeypatch.setattr(simulator_fit, "_ROUNDS", 1)
    output = command(what="simulator")
    fields = json.loads((output / "simulator.json").read_text())
    assert fields["sigma"] != simulator_fit.SimulatorConfig().sigma
    with Image.open(output / "simulator.png") as image:
        assert image.width > image.height > 100


def test_flags_that_do_not_fit(command, tmp_path):
    with pytest.raises(app.UsageError, match="--checkpoint is needed for --what radius"):
        command(what="radius")
    with pytest.raises(app.UsageError, match="and only for it"):
        command(what="simulator", checkpoint="small")
    valid = np.eye(3, 17, dtype=bool)
    source = str(written(tmp_path / "b.npz", joint_valid=valid))
    with pytest.raises(ConfigError, match="in no picture all joints are valid"):
        command(what="radius", checkpoint="small", source=source)
