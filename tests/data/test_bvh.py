"""The BVH reader against numbers by hand, rotations by definition, and files not in order."""

import numpy as np
import pytest
from motion_files import bvh_text, turn

from diffpose_jax.data.motion.bvh import read_bvh

TREE = {"Root": ((1, 2, 3), {"Arm": ((0, 10, 0), {"Hand": ((4, 0, 0), (0, 0, 2))})})}


def write(tmp_path, text):
    path = tmp_path / "clip.bvh"
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
            found = recording.positions[f, k], recording.rotations[f, k]
            np.testing.assert_allclose(found[0], positions[name], rtol=0, atol=1e-13)
            np.testing.assert_allclose(found[1], rotations[name], rtol=0, atol=1e-13)


def test_layout_does_not_matter(tmp_path):
    numbers = "1 2 3 40 50 60 0 0 10 20 0 0"
    text = bvh_text(TREE, [numbers.split()])
    expected = read_bvh(write(tmp_path, text))
    channels = "Xposition Yposition Zposition Zrotation Yrotation Xrotation"
    mixed = "Zposition Zrotation Yposition Yrotation Xrotation Xposition"
    for variant in (
        text.replace("\n", "\r\n"),
        text.replace(" ", "\t").replace("End\tSite", "End Site"),
        text.replace("\n{", " {"),
        text.replace("Xrotation", "xRotation").replace("HIERARCHY", "Hierarchy"),
        b"\xef\xbb\xbf" + text.encode(),  # a byte order mark
        text.replace("MOTION\n", "MOTION\n\n") + "\n \n",
        text.rstrip("\n"),
        text.replace(channels, mixed).replace("1 2 3 40 50 60", "3 40 2 50 60 1"),
    ):
        recording = read_bvh(write(tmp_path, variant))
        assert recording.joints == expected.joints
        np.testing.assert_array_equal(recording.positions, expected.positions)


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
        ("CHANNELS 3", "CHANNELS 4", r"line 9: the 4 channels of joint Arm must be Xrotation"),
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
    with pytest.raises(ValueError, match=rf"clip\.bvh.*{message}"):
        read_bvh(write(tmp_path, GOOD.replace(old, new, 1)))


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
