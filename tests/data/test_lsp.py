"""Tiny copies of lsp_extended in its exact format; their expected values worked out by hand."""

import types

import ml_collections
import numpy as np
import programs
import pytest
import scipy.io
from PIL import Image

from diffpose_jax.data import lsp, prepared
from diffpose_jax.data.lsp import Lsp


def write_copy(folder, joints):
    """`joints` (N, 14, 3); image n is 40 x 30 of the grey 10 n, a red pixel at (2, 1)."""
    (folder / "images").mkdir(parents=True)
    scipy.io.savemat(folder / "joints.mat", {"joints": np.transpose(joints, (1, 2, 0))})
    for number in range(1, len(joints) + 1):
        image = Image.new("RGB", (40, 30), (10 * number,) * 3)
        image.save(folder / "images" / f"im{number:05d}.jpg", quality=95)
    return folder


def pose(visible):
    """Joints at hand-picked places; those that are not visible far outside, as in the data set."""
    joints = np.full((14, 3), -500.0)
    joints[:, 2] = 0
    for name, xy in visible.items():
        joints[lsp.JOINTS.index(name)] = (*xy, 1)
    return joints


SEEN = {"right_ankle": (10, 28), "neck": (14, 8), "left_wrist": (25, 13)}


class GreyDetector:
    """Heatmaps as high as the crop's middle is bright, in all cells."""

    fingerprint = "grey-1"
    input_px = 8

    def heatmaps(self, crops):
        heights = crops[:, 4, 4, 0].astype(np.float32)
        return np.broadcast_to(heights[:, None, None, None], (len(crops), 16, 64, 64))


def test_from_the_program_to_heatmaps(tmp_path, monkeypatch, capsys):
    program = programs.load("prepare")
    fields = ml_collections.ConfigDict({"max_dropped_mass": None})
    flags = {"DATASET": "lsp", "SOURCE": str(tmp_path / "copy"), "DATA_DIR": str(tmp_path)}
    flags |= {"DETECTOR": "grey", "DTYPE": "float32", "CLEAN": None, "CLIPS": None}
    for name, value in flags.items():
        monkeypatch.setattr(program, name, types.SimpleNamespace(value=value))
    monkeypatch.setitem(program.FIELDS, "lsp", types.SimpleNamespace(value=fields))
    monkeypatch.setattr(program.detectors, "load", lambda *_: GreyDetector())
    monkeypatch.setattr("diffpose_jax.data.photographs._PART", 2)
    # The last but one has too few visible joints to tell where to cut.
    joints = [pose(SEEN), pose(SEEN), pose({"neck": (3, 4)}), pose(SEEN | {"neck": (14, 4)})]
    folder = write_copy(tmp_path / "copy", joints)
    Image.new("L", (40, 30), 77).save(folder / "images" / "im00002.jpg")  # grey
    program.main([])
    assert "test 3 examples" in capsys.readouterr().out
    columns, heatmaps = prepared.read(prepared.find(tmp_path, "lsp", {}), "test")
    assert columns["name"].tolist() == ["im00001", "im00002", "im00004"]
    assert set(columns) == {"name", "corner_px", "side_px", "visible"}
    # x 10 to 25, y 8 to 28: side 1.2 x 20 = 24 about (17.5, 18): from (5.5, 6), rounded to even.
    np.testing.assert_array_equal(columns["side_px"], [24, 24, 29])
    np.testing.assert_array_equal(columns["corner_px"][0], [6, 6])
    seen = [lsp.JOINTS[joint] for joint in np.flatnonzero(columns["visible"][0])]
    assert seen == ["right_ankle", "left_wrist", "neck"]
    np.testing.assert_allclose(heatmaps(np.arange(3))[:, 0, 0, 0], [10, 77, 40], atol=2)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"joints\.mat is missing"):
        Lsp({}, tmp_path, GreyDetector()).photographs()
    folder = write_copy(tmp_path / "copy", [pose(SEEN)] * 14)
    for number in (2, *range(4, 15)):
        (folder / "images" / f"im{number:05d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 12 of the 14") as caught:
        Lsp({}, folder, GreyDetector()).photographs()
    assert "im00002.jpg, im00004.jpg" in str(caught.value)
    assert "im00014" not in str(caught.value)


NOT_READ = r"joints\.mat cannot be read as a MATLAB file up to -v7"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", NOT_READ),
        (b"no mat file at all, but long enough to have a header" * 10, NOT_READ),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 400, NOT_READ),
        ({"points": np.zeros(3)}, r"joints\.mat has no array of numbers joints; it has points"),
        ({"joints": "os.mkdir"}, r"joints\.mat has no array of numbers joints"),
        ({"joints": np.zeros((3, 14, 5))}, r"\(3, 14, 5\); it must be \(14, 3, N\)"),
        ({"joints": np.full((14, 3, 5), np.inf)}, "a visible joint is not finite"),
    ],
)
def test_wrong_content(tmp_path, content, message):
    folder = write_copy(tmp_path / "copy", [pose(SEEN)])
    if isinstance(content, bytes):
        (folder / "joints.mat").write_bytes(content)
    else:
        scipy.io.savemat(folder / "joints.mat", content)
    with pytest.raises(ValueError, match=message):
        Lsp({}, folder, GreyDetector()).photographs()


def test_a_picture_that_is_cut_off(tmp_path):
    folder = write_copy(tmp_path / "copy", [pose(SEEN), pose(SEEN)])
    path = folder / "images" / "im00002.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"im00002\.jpg cannot be read"):
        Lsp({}, folder, GreyDetector(), tmp_path).prepare()
