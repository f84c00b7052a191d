"""Tiny copies of lsp_extended in its exact format; their expected values worked out by hand."""

import numpy as np
import pytest
import scipy.io
from PIL import Image

from diffpose_jax.data import lsp


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


def test_picture_by_hand(tmp_path):
    folder = write_copy(tmp_path / "copy", [pose(SEEN), pose(SEEN)])
    first, second = lsp.read(folder)
    assert (first.name, second.name) == ("im00001", "im00002")
    assert first.image.shape == (30, 40, 3)
    assert first.image.dtype == np.uint8
    assert abs(int(second.image[15, 20, 0]) - 20) <= 2
    # x 10 to 25, y 8 to 28: side 1.2 x 20 = 24 about (17.5, 18): from (5.5, 6), rounded to even.
    np.testing.assert_array_equal(first.crop.side_px, [24])
    np.testing.assert_array_equal(first.crop.corner_px, [[6, 6]])


def test_joint_order():
    mirror = [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13]
    swap = {"left": "right", "right": "left"}
    for joint, other in zip(lsp.JOINTS, np.array(lsp.JOINTS)[mirror], strict=True):
        side, _, part = joint.partition("_")
        assert other == (f"{swap[side]}_{part}" if side in swap else joint)
    assert len(set(lsp.JOINTS)) == 14


def test_grey_images_become_rgb(tmp_path):
    folder = write_copy(tmp_path / "copy", [pose(SEEN)])
    Image.new("L", (40, 30), 77).save(folder / "images" / "im00001.jpg")
    (picture,) = lsp.read(folder)
    assert picture.image.shape == (30, 40, 3)


def test_pictures_without_two_visible_joints_are_left_out(tmp_path):
    joints = [pose({}), pose(SEEN), pose({"neck": (3, 4)})]
    folder = write_copy(tmp_path / "copy", joints)
    assert [picture.name for picture in lsp.read(folder)] == ["im00002"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"joints\.mat is missing"):
        lsp.read(tmp_path)
    folder = write_copy(tmp_path / "copy", [pose(SEEN)] * 14)
    for number in (2, *range(4, 15)):
        (folder / "images" / f"im{number:05d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 12 of the 14") as caught:
        lsp.read(folder)  # says so before the first picture is asked for
    assert "im00002.jpg, im00004.jpg" in str(caught.value)
    assert "im00014" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header is another"),
        (b"no mat file at all, but long enough to have a header" * 10, "its header is another"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 400, "7.3; save it with -v7"),
    ],
    ids=["empty", "text", "version_7_3"],
)
def test_not_a_version_5_file(tmp_path, content, reason):
    folder = write_copy(tmp_path / "copy", [pose(SEEN)])
    (folder / "joints.mat").write_bytes(content)
    with pytest.raises(ValueError, match=rf"joints\.mat is not a MATLAB version 5.*({reason})"):
        lsp.read(folder)


def test_wrong_content(tmp_path):
    folder = write_copy(tmp_path / "copy", [pose(SEEN)])
    scipy.io.savemat(folder / "joints.mat", {"points": np.zeros(3)})
    with pytest.raises(ValueError, match=r"joints\.mat has no array joints; it has points"):
        lsp.read(folder)
    scipy.io.savemat(folder / "joints.mat", {"joints": np.zeros((3, 14, 5))})
    with pytest.raises(ValueError, match=r"\(3, 14, 5\); it must be \(14, 3, N\)"):
        lsp.read(folder)


def test_unreadable_image(tmp_path):
    folder = write_copy(tmp_path / "copy", [pose(SEEN), pose(SEEN)])
    path = folder / "images" / "im00002.jpg"
    path.write_bytes(path.read_bytes()[:300])
    pictures = lsp.read(folder)
    assert next(pictures).name == "im00001"
    with pytest.raises(ValueError, match=r"im00002\.jpg cannot be read"):
        next(pictures)
