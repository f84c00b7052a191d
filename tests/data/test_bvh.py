"""The BVH reader against numbers by hand, scipy's rotations, and files that are not in order."""

import time

import numpy as np
import pytest
from motion_files import bvh_text
from scipy.spatial.transform import Rotation

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
    assert recording.positions.dtype == np.float64
    # The root's position channels take the place of its OFFSET.
    rest = [[0, 0, 0], [0, 10, 0], [4, 10, 0], [4, 10, 2]]
    np.testing.assert_allclose(recording.positions[0], rest, atol=1e-12)
    # Rz takes the arm's (0, 10, 0) to (-10, 0, 0), the hand's (4, 0, 0) to (0, 4, 0); Rz Rx takes
    # the end's (0, 0, 2) to Rz (0, -2, 0) = (2, 0, 0).
    turned = [[5, 6, 7], [-5, 6, 7], [-5, 10, 7], [-3, 10, 7]]
    np.testing.assert_allclose(recording.positions[1], turned, atol=1e-12)
    # The columns are the axes that move with the joint; an End Site has those of its joint.
    np.testing.assert_allclose(
        recording.rotations[1, 3], [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12
    )
    np.testing.assert_array_equal(recording.rotations[1, 2], recording.rotations[1, 3])


def test_a_root_without_positions_stays_at_its_offset(tmp_path):
    text = bvh_text(TREE, [[0] * 9], positions=())
    np.testing.assert_array_equal(read_bvh(write(tmp_path, text)).positions[0, 0], [1, 2, 3])


def test_position_channels_of_any_joint_replace_its_offset(tmp_path):
    text = bvh_text(TREE, [[0] * 6 + [7, 8, 9, 90, 0, 0] + [0] * 3], positions=("ROOT", "Arm"))
    positions = read_bvh(write(tmp_path, text)).positions[0]
    np.testing.assert_allclose(positions[1:3], [[7, 8, 9], [7, 12, 9]], atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_random_skeletons_against_scipy(tmp_path, seed):
    rng = np.random.default_rng(seed)
    names = [f"Joint {i}: a" for i in range(12)]
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, 12))]
    offsets = rng.normal(size=(12, 3)).round(4)
    orders = ["".join(rng.permutation(list("XYZ"))) for _ in names]
    placed = {names[i] for i in range(12) if rng.random() < 0.3}
    ends = rng.normal(size=(12, 3)).round(4)

    def subtree(i):
        children = {names[j]: subtree(j) for j in range(12) if parents[j] == i}
        return (offsets[i], children or ends[i])

    written = []  # the order of the file: depth first

    def walk(i):
        written.append(i)
        for j in range(12):
            if parents[j] == i:
                walk(j)

    walk(0)
    frames = 5
    angles = rng.uniform(-180, 180, (frames, 12, 3)).round(3)
    places = rng.normal(size=(frames, 12, 3)).round(4)
    rows = [
        np.concatenate(
            [np.r_[places[f, i], angles[f, i]] if names[i] in placed else angles[f, i]
             for i in written]
        )
        for f in range(frames)
    ]  # fmt: skip
    order = dict(zip(names, orders, strict=True))
    text = bvh_text({names[0]: subtree(0)}, rows, 0.01, order.__getitem__, tuple(placed))
    recording = read_bvh(write(tmp_path, text))

    index = {name: k for k, name in enumerate(recording.joints)}
    for f in range(frames):
        rotations, positions = {}, {}
        for i in written:
            local = Rotation.from_euler(orders[i], angles[f, i], degrees=True)
            place = places[f, i] if names[i] in placed else offsets[i]
            if i == 0:
                rotations[i], positions[i] = local, place
            else:
                rotations[i] = rotations[parents[i]] * local
                positions[i] = positions[parents[i]] + rotations[parents[i]].apply(place)
            found = recording.positions[f, index[names[i]]]
            np.testing.assert_allclose(found, positions[i], atol=1e-10)
            np.testing.assert_allclose(
                recording.rotations[f, index[names[i]]], rotations[i].as_matrix(), atol=1e-10
            )
            if i not in parents:
                end = positions[i] + rotations[i].apply(ends[i])
                np.testing.assert_allclose(
                    recording.positions[f, index[names[i] + "End"]], end, atol=1e-10
                )


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
        (GOOD, "", r"line 1: a BVH file starts with HIERARCHY, not with 'nothing'"),
        ("ROOT", "JOINT", r"line 2: JOINT out of place"),
        ("JOINT Arm", "ROOT Arm", r"line 6: ROOT out of place"),
        ("JOINT Arm", "JOINT Root", r"line 6: the joint name 'Root' is empty or taken"),
        ("JOINT Arm\n", "JOINT\n", r"line 6: the joint name '' is empty or taken"),
        ("OFFSET 0 10 0", "OFFSET 0 ten 0", r"line 8: could not convert string to float: 'ten'"),
        ("OFFSET 0 10 0", "OFFSET 0 nan 0", r"line 8: a number is not finite"),
        ("\tOFFSET 0 10 0\n", "", r"joint Arm ends here without OFFSET"),
        ("\tCHANNELS 3 Zrotation Yrotation Xrotation\n", "", "Arm ends here without CHANNELS"),
        ("CHANNELS 3", "CHANNELS 4", r"line 9: joint Arm has 4 channels; it must have 3"),
        ("CHANNELS 3 Z", "CHANNELS 3 Y", r"line 9: the 3 channels of joint Arm must be Xrot"),
        ("CHANNELS 3 Zrotation", "CHANNELS 3 Xposition", "line 9: the 3 channels of joint Arm"),
        ("CHANNELS 6 X", "CHANNELS 6 Y", r"line 5: the 6 channels of joint Root must be Xpos"),
        ("OFFSET 0 0 2", "OFFSET 0 0 2\nCHANNELS 0", "an End Site none"),
        ("OFFSET 0 0 2", "OFFSET 0 0 2\nJOINT Nail {", "JOINT within an End Site"),
        ("}\nMOTION", "MOTION", r"line 20: 'MOTION' is out of place"),
        (GOOD[GOOD.index("MOTION") :], "", "the file ends within the HIERARCHY; it is cut off"),
        ("JOINT Arm\n{", "JOINT Arm\n", "there is no '{' after the name"),
        ("Frames: 2", "Frames: 3", r"2 frames instead of the 3 that 'Frames:' tells"),
        ("Frames: 2", "Frames: 1", r"2 frames instead of the 1 that 'Frames:' tells"),
        ("Frames: 2", "Frames: 100000000", "2 frames instead of the 100000000"),
        ("Frames: 2", "Frames: 9e999", "a number is not finite"),
        ("Frames: 2\n", "", r"line 22: here must stand 'Frames:' and a number"),
        ("Frames: 2", "Frames:", r"line 22: 0 numbers where there must be 1"),
        ("Frame Time: 0.0333333", "Frame Time: 0", r"line 23: Frame Time must be positive"),
        ("Frame Time: 0.0333333", "Frame Time: fast", r"line 23: could not convert"),
        ("1 1 1 1\n", "1 1 1\n", r"line 25: 11 numbers where there must be 12"),
        ("1 1 1 1\n", "1 1 1 1 1\n", r"line 25: 13 numbers where there must be 12"),
        ("1 1 1 1\n", "1 1 1 nan\n", r"line 25: a number is not finite"),
        ("1 1 1 1\n", "1 1 1 1e300\n", r"line 25: a number is not finite or is far too large"),
        ("1 1 1 1\n", "1 1 1 x\n", r"line 25: could not convert string to float: 'x'"),
    ],
)
def test_errors_name_file_line_and_reason(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=message) as error:
        read_bvh(write(tmp_path, GOOD.replace(old, new, 1), "take 7.bvh"))
    assert "take 7.bvh" in str(error.value)


def test_no_text_and_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"clip\.bvh is not a text file"):
        read_bvh(write(tmp_path, b"HIERARCHY\0\1\2"))
    with pytest.raises(FileNotFoundError):
        read_bvh(tmp_path / "absent.bvh")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    # Only where nothing but white space is lost, or the last digits of a number.
    text = bvh_text(TREE, [[0.5] * 12, [10.25] * 12])
    for end in range(len(text) - 7):
        with pytest.raises(ValueError, match=r"clip\.bvh, line \d+: "):
            read_bvh(write(tmp_path, text[:end]))


def test_damaged_files_give_value_errors_and_nothing_else(tmp_path):
    rng = np.random.default_rng(17)
    for _ in range(400):
        data = bytearray(GOOD.encode())
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place] = rng.integers(1, 256)
        try:
            read_bvh(write(tmp_path, bytes(data)))
        except ValueError as error:
            assert "clip.bvh" in str(error)  # noqa: PT017


def test_deep_and_wide_skeletons_need_no_recursion(tmp_path):
    depth = 2500
    lines = ["HIERARCHY", "ROOT J0 { OFFSET 0 0 0 CHANNELS 3 Xrotation Yrotation Zrotation"]
    lines += [
        f"JOINT J{i} {{ OFFSET 0 1 0 CHANNELS 3 Xrotation Yrotation Zrotation"
        for i in range(1, depth)
    ]
    lines += ["}"] * depth + ["MOTION", "Frames: 1", "Frame Time: 1", "0 " * (3 * depth)]
    started = time.process_time()
    recording = read_bvh(write(tmp_path, "\n".join(lines)))
    assert time.process_time() - started < 5
    assert recording.positions[0, -1, 1] == depth - 1


def test_more_than_fits_into_memory_is_refused(tmp_path):
    lines = ["HIERARCHY", "ROOT R { OFFSET 0 0 0 CHANNELS 3 Xrotation Yrotation Zrotation"]
    lines += ["JOINT J { OFFSET 0 0 0 CHANNELS 3 Xrotation Yrotation Zrotation End Site {"]
    lines += ["OFFSET 0 0 0 } } }", "MOTION", "Frames: 2", "Frame Time: 1", *["0 " * 6] * 2]
    path = write(tmp_path, "\n".join(lines))
    read_bvh(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffpose_jax.data.motion.recording._MOST_POSITIONS", 5)
        with pytest.raises(ValueError, match="2 frames of 3 joints are too many"):
            read_bvh(path)
