"""The BVH reader against numbers by hand, rotations by definition, and files not in order."""

import numpy as np
import pytest
from motion_files import bvh_text, turn

from diffpose_jax.data.motion.bvh import read_bvh

TREE = {"Root": ((1, 2, 3), {"Arm": ((0, 10, 0), {"Hand": ((4, 0, 0), (0, 0, 2))})})}


def write(tmp_path, text, name="clip.bvh"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_by_hand(tmp_path):
    rows = [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        # Root at (5, 6, 7), a quarter turn about z; the arm a quarter turn about x.
        [5, 6, 7, 90, 0, 0, 0, 0, 90, 0, 0, 0],
    ]
    recording = read_bvh(write(tmp_path, bvh_text(TREE, rows, frame_time=0.02)))
    assert recording.joints == ("Root", "Arm", "Hand", "HandEnd")
    assert recording.fps == pytest.approx(50)
    assert recording.unit_mm is None
    # The root's position channels take the place of its OFFSET.
    rest = [[0, 0, 0], [0, 10, 0], [4, 10, 0], [4, 10, 2]]
    np.testing.assert_allclose(recording.positions[0], rest, atol=1e-12)
    # Rz takes the arm's (0, 10, 0) to (-10, 0, 0), the hand's (4, 0, 0) to (0, 4, 0); Rz Rx takes
    # the end's (0, 0, 2) to Rz (0, -2, 0) = (2, 0, 0).
    turned = [[5, 6, 7], [-5, 6, 7], [-5, 10, 7], [-3, 10, 7]]
    np.testing.assert_allclose(recording.positions[1], turned, atol=1e-12)
    # The columns are the axes that move with the joint; an End Site has those of its joint.
    axes = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(recording.rotations[1, 3], axes, atol=1e-12)
    np.testing.assert_array_equal(recording.rotations[1, 2], recording.rotations[1, 3])


def test_position_channels_of_any_joint_replace_its_offset(tmp_path):
    text = bvh_text(TREE, [[0] * 6 + [7, 8, 9, 90, 0, 0] + [0] * 3], positions=("ROOT", "Arm"))
    positions = read_bvh(write(tmp_path, text)).positions[0]
    np.testing.assert_allclose(positions[1:3], [[7, 8, 9], [7, 12, 9]], atol=1e-12)
    still = read_bvh(write(tmp_path, bvh_text(TREE, [[0] * 9], positions=())))
    np.testing.assert_array_equal(still.positions[0, 0], [1, 2, 3])


def test_random_numbers_against_rotations_by_definition(tmp_path):
    rng = np.random.default_rng(0)
    parents = {"A: a b": "", "B": "A: a b", "C": "B", "D": "B", "E": "A: a b", "F": "E"}
    joints = list(parents)  # depth first, as in the file
    orders = {name: "".join(rng.permutation(list("XYZ"))) for name in joints}
    offsets = {name: rng.normal(size=3).round(4) for name in (*joints, "CEnd", "DEnd", "FEnd")}
    moved = ("A: a b", "C", "E")  # with position channels

    def subtree(name):
        children = {child: subtree(child) for child in joints if parents[child] == name}
        return (offsets[name], children or offsets[f"{name}End"])

    angles, places = rng.uniform(-180, 180, (4, 6, 3)).round(3), rng.normal(size=(4, 6, 3)).round(4)
    rows = [
        np.concatenate([
            np.r_[places[f, i] if name in moved else [], angles[f, i]]
            for i, name in enumerate(joints)
        ])
        for f in range(4)
    ]  # fmt: skip
    text = bvh_text({joints[0]: subtree(joints[0])}, rows, 0.01, orders.__getitem__, moved)
    recording = read_bvh(write(tmp_path, text))

    assert set(recording.joints) == set(offsets)
    for f in range(4):
        rotations, positions = {"": np.eye(3)}, {"": np.zeros(3)}
        for i, name in enumerate(joints):
            parent, place = parents[name], places[f, i] if name in moved else offsets[name]
            positions[name] = positions[parent] + rotations[parent] @ place
            rotations[name] = rotations[parent] @ turn(orders[name], angles[f, i])
            end = f"{name}End"
            if end in offsets:
                positions[end] = positions[name] + rotations[name] @ offsets[end]
                rotations[end] = rotations[name]
        for k, name in enumerate(recording.joints):
            for found, expected in (
                (recording.positions[f, k], positions[name]),
                (recording.rotations[f, k], rotations[name]),
            ):
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_layout_does_not_matter(tmp_path):
    rows = np.random.default_rng(5).normal(size=(3, 12)).round(3)
    text = bvh_text(TREE, rows)
    expected = read_bvh(write(tmp_path, text))
    variants = {
        "windows": text.replace("\n", "\r\n"),
        "tabs": text.replace(" ", "\t").replace("End\tSite", "End Site"),
        "braces": text.replace("\n{", " {"),
        "case": text.replace("Xrotation", "xRotation").replace("HIERARCHY", "Hierarchy"),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "blank lines": text.replace("MOTION\n", "MOTION\n\n") + "\n \n",
        "no last newline": text.rstrip("\n"),
    }
    for name, variant in variants.items():
        recording = read_bvh(write(tmp_path, variant, f"{name}.bvh"))
        assert recording.joints == expected.joints, name
        np.testing.assert_array_equal(recording.positions, expected.positions)


def test_channels_may_be_mixed(tmp_path):
    text = bvh_text(TREE, [[1, 2, 3, 0, 0, 90] + [0] * 6])
    mixed = text.replace(
        "Xposition Yposition Zposition Zrotation Yrotation Xrotation",
        "Zposition Xrotation Yposition Zrotation Yrotation Xposition",
    ).replace("1 2 3 0 0 90", "3 90 2 0 0 1")
    expected, found = (read_bvh(write(tmp_path, t)) for t in (text, mixed))
    np.testing.assert_allclose(found.positions, expected.positions, atol=1e-12)


GOOD = bvh_text(TREE, [[0] * 12, [1] * 12])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HIERARCHY", "hello", r"line 1: a BVH file starts with HIERARCHY, not with 'hello'"),
        (GOOD, "HIERARCHY\0", r"is not a text file"),
        ("JOINT Arm", "ROOT Arm", r"line 6: 'ROOT' is out of place"),
        ("JOINT Arm", "JOINT Root", r"line 6: the joint name 'Root' is empty or taken"),
        ("OFFSET 0 10 0", "OFFSET 0 ten 0", r"line 8: could not convert string to float: 'ten'"),
        ("\tOFFSET 0 10 0\n", "", r"joint Arm ends without OFFSET or CHANNELS"),
        ("\tCHANNELS 3 Zrotation Yrotation Xrotation\n", "", "Arm ends without OFFSET or CHANNELS"),
        ("CHANNELS 3", "CHANNELS 4", r"line 9: the 4 channels of joint Arm must be Xrotation"),
        ("CHANNELS 6 X", "CHANNELS 6 Y", r"line 5: the 6 channels of joint Root must be Xrot"),
        ("}\nMOTION", "MOTION", r"line 20: 'MOTION' is out of place"),
        (GOOD[GOOD.index("MOTION") :], "", "the file ends within the HIERARCHY; it is cut off"),
        ("Frames: 2", "Frames: 100000000", "2 frames instead of the 100000000 that"),
        ("Frames: 2\n", "", r"line 22: here must stand 'Frames:' and a number"),
        ("Frame Time: 0.0333333", "Frame Time: 0", r"line 23: Frame Time must be positive"),
        ("1 1 1 1\n", "1 1 1\n", r"line 25: 11 numbers where there must be 12"),
        ("1 1 1 1\n", "1 1 1 1e300\n", r"line 25: a number is not finite or is far too large"),
    ],
)
def test_errors_name_file_line_and_reason(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=message) as error:
        read_bvh(write(tmp_path, GOOD.replace(old, new, 1), "take 7.bvh"))
    assert "take 7.bvh" in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    # Only where nothing but white space is lost, or the last digits of a number.
    text = bvh_text(TREE, [[0.5] * 12, [10.25] * 12])
    for end in range(1, len(text) - 7):
        with pytest.raises(ValueError, match=r"clip\.bvh, line \d+: "):
            read_bvh(write(tmp_path, text[:end]))


def test_more_than_fits_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpose_jax.data.motion.recording._MOST_POSITIONS", 7)
    with pytest.raises(ValueError, match="2 frames of 4 joints are more than 7 positions"):
        read_bvh(write(tmp_path, GOOD))
