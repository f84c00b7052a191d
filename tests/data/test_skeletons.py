"""The 17 joints out of those of known skeletons and of mapping files: a person stays a person."""

import json

import numpy as np
import pytest
from motion_files import bandai_namco, bvh_text, cmu_bvh, cmu_frame, lafan1, write_cmu

from diffpose_jax.data import motion
from diffpose_jax.data.motion.bvh import read_bvh
from diffpose_jax.data.motion.skeletons import KNOWN, to_h36m
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_LEFT, H36M_RIGHT

JOINT = {name: index for index, name in enumerate(H36M_JOINTS)}


@pytest.mark.parametrize(
    ("text", "fps"),
    [(None, 120), (cmu_bvh(3), 120), (lafan1(2), 30), (bandai_namco(2), 30)],
    ids=["cmu_amc", "cmu_bvh", "lafan1", "bandai_namco"],
)
def test_standing_people_stand_face_forward_and_have_their_left_on_the_left(tmp_path, text, fps):
    path = tmp_path / "05_01.bvh"
    if text is None:
        path = write_cmu(tmp_path, "05_01", [cmu_frame()] * 2)
    else:
        path.write_text(text)
        joints = set(read_bvh(path).joints)
        assert len([known for known in KNOWN if known.joints <= joints]) == 1
    clip = motion.read_clip(path)
    assert clip.fps == pytest.approx(fps, rel=1e-4)
    assert clip.positions_mm.shape == (2, 17, 3)  # the rest pose of the conversion is left out
    body = clip.positions_mm[0].astype(np.float64)
    at = {name: body[index] for name, index in JOINT.items()}
    # y is left, x is the front, z is up.
    left, right = body[list(H36M_LEFT)], body[list(H36M_RIGHT)]
    np.testing.assert_allclose(left, right * [1, -1, 1], atol=1e-2)
    assert np.all(left[:, 1] > 50)
    middle = body[[JOINT[name] for name in ("Hip", "Spine", "Thorax", "Nose", "Head")]]
    np.testing.assert_allclose(middle[:, 1], 0, atol=1e-3)
    assert at["Nose"][0] > (at["Thorax"][0] + at["Head"][0]) / 2 + 15
    assert np.all(np.diff(middle[:, 2]) > 70)
    np.testing.assert_allclose(at["Hip"], (at["LHip"] + at["RHip"]) / 2, atol=1e-3)
    # Proportions of a person, loosely.
    trunk = at["Thorax"][2] - at["Hip"][2]
    arm, forearm = at["LElbow"] - at["LShoulder"], at["LWrist"] - at["LElbow"]
    for value, low, high in (
        (at["LAnkle"][2], 20, 200),
        (at["Head"][2], 1400, 2100),
        (trunk, 400, 620),
        ((at["Spine"][2] - at["Hip"][2]) / trunk, 0.3, 0.6),
        (at["Thorax"][2] - at["LShoulder"][2], -20, 90),
        (at["Head"][2] - at["Thorax"][2], 180, 300),
        (np.linalg.norm(forearm) / np.linalg.norm(arm), 0.6, 1.1),
    ):
        assert low < value < high


def test_limbs_keep_their_lengths_and_their_side_while_turning(tmp_path):
    rng = np.random.default_rng(8)
    turns = np.arange(0, 360, 15)
    frames = [
        cmu_frame(rng, root=(rng.normal(0, 50), 17.5, rng.normal(0, 50), 0, turn, 0))
        for turn in turns
    ]
    positions_mm = motion.read_clip(write_cmu(tmp_path, "05_02", frames)).positions_mm.astype(float)
    for parent, joint in H36M_BONES:
        lengths = np.linalg.norm(positions_mm[:, joint] - positions_mm[:, parent], axis=-1)
        is_rigid = H36M_JOINTS[joint][1:] in ("Hip", "Knee", "Ankle", "Elbow", "Wrist")
        # The others span several bones.
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5 if is_rigid else 0.2)
    thigh = positions_mm[0, JOINT["LKnee"]] - positions_mm[0, JOINT["LHip"]]
    assert np.linalg.norm(thigh) == pytest.approx(
        7.3 * np.hypot(0.34, 0.94) * 25.4 / 0.45, rel=1e-4
    )
    left = positions_mm[:, JOINT["LHip"]] - positions_mm[:, JOINT["RHip"]]
    front = np.cross(left, [0, 0, 1])
    nose = positions_mm[:, JOINT["Nose"]] - positions_mm[:, JOINT["Thorax"]]
    assert np.all(np.sum(nose * front, axis=-1) > 0)
    # The body turns to the left about the vertical, once around.
    yaw = np.unwrap(np.arctan2(front[:, 1], front[:, 0]))
    np.testing.assert_allclose(np.degrees(yaw - yaw[0]), turns, atol=5)


def test_nose_follows_the_head(tmp_path):
    turned = cmu_frame(head=(0, 90, 0))  # about the vertical, to the left
    path = write_cmu(tmp_path, "05_01", [cmu_frame(), turned])
    positions_mm = motion.read_clip(path).positions_mm
    ahead, left = positions_mm[:, JOINT["Nose"]] - positions_mm[:, JOINT["Thorax"]]
    offset = 0.75 * 25.4 / 0.45
    np.testing.assert_allclose(ahead[:2], [offset, 0], atol=1e-2)
    np.testing.assert_allclose(left[:2], [0, offset], atol=1e-2)


# Mapping files.

MINE = {"Root": ((0, 0, 0), {"Top": ((0, 0, 1.7), (0, 0, 0.2))})}


def custom(tmp_path, changes=None, joints=None, rows=6):
    """A stick with three joints as a person: a mapping file can put the 17 joints anywhere."""
    heights = {"Hip": 0.5, "Spine": 0.35, "Thorax": 0.2, "Nose": 0.1, "Head": 0.0}
    heights |= {f"{side}{part}": value for side in "LR" for part, value in {
        "Hip": 0.5, "Knee": 0.7, "Ankle": 0.9, "Shoulder": 0.2, "Elbow": 0.3, "Wrist": 0.4
    }.items()}  # fmt: skip
    landmarks = {name: {"Root": w, "Top": 1 - w} for name, w in heights.items()} | (joints or {})
    content = {"joints": landmarks, "unit_mm": 1000, "up": "z"} | (changes or {})
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "skeleton.json").write_text(json.dumps(content))
    path = tmp_path / "stick.bvh"
    rows = [[i, 2 * i, 0.1, 0, 0, 0, 0, 0, 0] for i in range(rows)]
    path.write_text(bvh_text(MINE, rows, 0.025))
    return path


def test_a_mapping_file_places_the_joints(tmp_path):
    nose = {"joint": "TopEnd", "offset_mm": [100, 20, -30]}
    joints = {"Head": "TopEnd", "Nose": nose, "LWrist": {"Root": 1.2, "Top": -0.2}}
    clip = motion.read_clip(custom(tmp_path, joints=joints))
    assert clip.fps == pytest.approx(40)
    expected = {
        "Hip": [0, 0, 950], "LKnee": [0, 0, 100 + 0.3 * 1700], "Head": [0, 0, 2000],
        "Nose": [100, 20, 1970], "LWrist": [0, 0, 100 - 0.2 * 1700],
    }  # fmt: skip
    for name, position in expected.items():
        np.testing.assert_allclose(clip.positions_mm[3, JOINT[name]], position, atol=1e-2)
    # The offset turns with its axes.
    nose = {"joint": "TopEnd", "offset_mm": [100, 0, 0], "axes": "Root"}
    path = custom(tmp_path, joints={"Nose": nose})
    path.write_text(bvh_text(MINE, [[0, 0, 0.1, 90, 0, 0, 0, 0, 0]]))
    turned = motion.read_clip(path).positions_mm[0, JOINT["Nose"]]
    np.testing.assert_allclose(turned, [0, 100, 2000], atol=1e-2)


@pytest.mark.parametrize(("up", "expected"), [("x", (2, 3, 1)), ("y", (3, 1, 2)), ("z", (1, 2, 3))])
def test_axis_that_points_up_stride_first_frames_and_rate(tmp_path, up, expected):
    """The axes are exchanged in a cycle, so that no body is mirrored."""
    changes = {"up": up, "stride": 2, "skip_frames": 1, "fps": 100}
    path = custom(tmp_path, changes, dict.fromkeys(H36M_JOINTS, "Root"))
    path.write_text(bvh_text(MINE, [np.r_[1, 2, 3, [0] * 6] * i for i in range(6)]))
    positions_mm, fps = to_h36m(path, read_bvh(path), path.with_name("skeleton.json"))
    assert fps == 50
    np.testing.assert_allclose(positions_mm[:, 4], np.outer([1000, 3000, 5000], expected))


def test_a_mapping_file_may_only_correct_a_known_skeleton(tmp_path):
    path = write_cmu(tmp_path, "05_01", [cmu_frame()])
    before = motion.read_clip(path)
    (tmp_path / "skeleton.json").write_text('{"unit_mm": 50, "fps": 60}')
    after = motion.read_clip(path)
    assert (before.fps, after.fps) == (120, 60)
    # All but what is given in millimetres.
    legs = before.positions_mm[:, :9] * 50 / (25.4 / 0.45)
    np.testing.assert_allclose(after.positions_mm[:, :9], legs, rtol=1e-5, atol=1e-3)


def test_the_nearest_mapping_file_holds_up_to_the_folder(tmp_path):
    folder = tmp_path / "data"
    for path in (folder / "05_01", folder / "test" / "06_01", folder / "slow" / "deep" / "07_01"):
        write_cmu(path.parent, path.name, [cmu_frame()] * 2)
    (tmp_path / "skeleton.json").write_text("not in the folder, not read")
    (folder / "skeleton.json").write_text('{"fps": 100}')
    (folder / "slow" / "skeleton.json").write_text('{"fps": 50}')
    rates = {clip.name: clip.fps for clip in motion.read_folder(folder)}
    assert rates == {"05_01": 100, "06_01": 100, "slow/deep/07_01": 50}
    assert motion.read_clip(folder / "test" / "06_01.amc").fps == 120


def test_an_unknown_skeleton_is_told_what_to_do(tmp_path):
    path = custom(tmp_path)
    (tmp_path / "skeleton.json").unlink()
    with pytest.raises(ValueError, match=r"stick\.bvh.*no known skeleton.*skeleton\.json.*TopEnd"):
        motion.read_clip(path)
    for text, message in (
        ('{"unit_mm": 10}', "no known skeleton"),
        ("", r"skeleton\.json is no JSON file"),
        ("[1, 2]", r"skeleton\.json must hold fields"),
    ):
        (tmp_path / "skeleton.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            motion.read_clip(path)


@pytest.mark.parametrize(
    ("changes", "joints", "message"),
    [
        ({}, {"Head": "Hat"}, r"needs the joints Hat\. The file has: Root, Top, TopEnd"),
        ({}, {"Head": {"Root": 0.5, "Top": 0.4}}, r"the weights of Head add up to 0\.9, not 1"),
        ({}, {"Head": {"Root": "all"}}, r'Head is {"Root": "all"}; give "joint"'),
        ({}, {"Head": {"joint": "Top", "offset_mm": [1, 2, "3"]}}, "Head is"),
        ({}, {"Head": {"joint": "Top", "offset": [1, 2, 3]}}, "Head is"),
        ({}, {"Head": {"joint": "Top", "offset_mm": [1, 2, 3], "axes": 1}}, "Head is"),
        ({"joints": {"Hip": "Root"}}, {}, "missing or unknown joints: Head, LAnkle"),
        ({"unit": 10}, {}, "unknown field unit; the fields are joints, unit_mm, up, fps"),
        ({"up": None}, {}, "up must be one of x, y, z, not None"),
        ({"unit_mm": None}, {}, r"stick\.bvh does not tell its unit_mm; give it in a skel"),
        ({"unit_mm": 0}, {}, r"skeleton\.json\.unit_mm must be 1e-06 to 1000000.0, not 0"),
        ({"fps": 10**400}, {}, "fps must be"),
        ({"skip_frames": 6}, {}, r"shape \(0, 17, 3\)"),
    ],
)
def test_mapping_errors(tmp_path, changes, joints, message):
    with pytest.raises(ValueError, match=message):
        motion.read_clip(custom(tmp_path, changes, joints))
