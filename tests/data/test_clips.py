"""The embedded motion capture, the readers, and the script that made the archive."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from motion_files import bvh_text, cmu_frame, write_cmu

from diffpose_jax.data.motion import clips as mocap
from diffpose_jax.data.motion import make
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_LEFT, H36M_MIRROR, H36M_RIGHT

JOINT = {name: index for index, name in enumerate(H36M_JOINTS)}
ARCHIVE = Path(mocap.__file__).with_name("mocap.npz")
CLIPS = mocap.load_embedded()
every_clip = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)


def bone_lengths(positions_mm):
    parents, joints = np.array(H36M_BONES).T
    return np.linalg.norm(positions_mm[:, joints] - positions_mm[:, parents], axis=-1)


def body_axes(positions_mm):
    """Unit vectors to the left, to the front and up along the trunk, each (F, 3)."""
    left = positions_mm[:, JOINT["LHip"]] - positions_mm[:, JOINT["RHip"]]
    front = np.cross(left, positions_mm[:, JOINT["Thorax"]] - positions_mm[:, JOINT["Hip"]])
    left /= np.linalg.norm(left, axis=-1, keepdims=True)
    front /= np.linalg.norm(front, axis=-1, keepdims=True)
    return left, front, np.cross(front, left)


def test_archive_is_small_and_holds_what_the_readme_says():
    assert ARCHIVE.stat().st_size < 1_000_000
    frames = dict.fromkeys(("train", "test"), 0)
    for clip in CLIPS:
        frames[clip.split] += len(clip.positions_mm)
    assert len(CLIPS) == 16
    assert frames == {"train": 2285, "test": 440}
    readme = ARCHIVE.with_name("README.md").read_text()
    assert all(clip.name in readme for clip in CLIPS)
    assert "2,285" in readme
    assert "440" in readme


def test_licences_lie_beside_the_archive():
    assert "permission" in ARCHIVE.with_name("LICENSE.pybullet").read_text().lower()
    assert "free for use in research" in ARCHIVE.with_name("LICENSE.cmu").read_text()


def test_names_are_unique_so_no_clip_is_in_both_splits():
    names = [clip.name for clip in CLIPS]
    assert len(set(names)) == len(names)
    assert set(make.TEST_CLIPS) == {clip.name for clip in CLIPS if clip.split == "test"}


def test_test_frames_are_related_to_the_training_frames_but_not_contained():
    poses = {"train": [], "test": []}
    for clip in CLIPS:
        positions_mm = clip.positions_mm.astype(np.float64)
        positions_mm -= positions_mm[:, :1]
        left = positions_mm[:, JOINT["LHip"]]
        yaw = np.arctan2(left[:, 1], left[:, 0])
        cos, sin = np.cos(yaw), np.sin(yaw)
        turn = np.array(
            [[cos, sin, 0 * yaw], [-sin, cos, 0 * yaw], [0 * yaw, 0 * yaw, 0 * yaw + 1]]
        )
        poses[clip.split].append(np.einsum("abf,fjb->fja", turn, positions_mm)[:, 1:])
    train = np.concatenate(poses["train"])[::2]
    nearest = [
        np.linalg.norm(train - pose, axis=-1).mean(1).min()
        for pose in np.concatenate(poses["test"])[::4]
    ]
    assert 60 < np.median(nearest) < 110
    assert min(nearest) > 5


@every_clip
def test_clip_keeps_the_conventions(clip):
    assert clip.positions_mm.dtype == np.float32
    assert clip.positions_mm.shape[1:] == (17, 3)
    assert np.isfinite(clip.positions_mm).all()
    assert 10 < clip.fps < 130
    np.testing.assert_array_equal(clip.positions_mm[:, 0, :2], 0)
    lowest = clip.positions_mm[..., 2].min(axis=1)
    assert -50 < lowest.min() < 110  # the body reaches the floor but is not under it
    assert clip.positions_mm[..., 2].max() < 2500


@every_clip
def test_all_clips_have_the_standard_bone_lengths_in_every_frame(clip):
    expected = [make.BONES_MM[H36M_JOINTS[joint]] for _, joint in H36M_BONES]
    lengths = bone_lengths(clip.positions_mm)
    np.testing.assert_allclose(lengths, np.broadcast_to(expected, lengths.shape), atol=0.2)


@every_clip
def test_the_body_is_not_mirrored(clip):
    """Nose in front, knees bending backwards: both fail where left and right are exchanged."""
    positions_mm = clip.positions_mm.astype(np.float64)
    left, front, _ = body_axes(positions_mm)
    head = (positions_mm[:, JOINT["Thorax"]] + positions_mm[:, JOINT["Head"]]) / 2
    nose = np.sum((positions_mm[:, JOINT["Nose"]] - head) * front, axis=-1)
    assert np.median(nose) > 20
    assert nose.min() > -20  # the head turns against the trunk
    for side in "LR":
        thigh = positions_mm[:, JOINT[side + "Knee"]] - positions_mm[:, JOINT[side + "Hip"]]
        shin = positions_mm[:, JOINT[side + "Ankle"]] - positions_mm[:, JOINT[side + "Knee"]]
        hinge = np.cross(thigh, shin)
        bent = np.linalg.norm(hinge, axis=-1) > np.sin(np.radians(20)) * 443 * 454
        assert bent.any()
        assert (np.sum(hinge * left, axis=-1)[bent] > 0).all()
    shoulders = positions_mm[:, JOINT["LShoulder"]] - positions_mm[:, JOINT["RShoulder"]]
    assert (np.sum(shoulders * left, axis=-1) > 0).all()


def test_forearms_bend_forwards_when_the_arms_hang():
    forwards = []
    for clip in CLIPS:
        positions_mm = clip.positions_mm.astype(np.float64)
        _, front, up = body_axes(positions_mm)
        for side in "LR":
            arm = positions_mm[:, JOINT[side + "Elbow"]] - positions_mm[:, JOINT[side + "Shoulder"]]
            forearm = (
                positions_mm[:, JOINT[side + "Wrist"]] - positions_mm[:, JOINT[side + "Elbow"]]
            )
            arm /= 279
            forearm /= 252
            hanging = (np.sum(arm * up, -1) < -0.85) & (np.sum(arm * forearm, -1) < 0.94)
            forwards.append(np.sum((forearm - arm) * front, axis=-1)[hanging] > 0)
    forwards = np.concatenate(forwards)
    assert len(forwards) > 1000
    assert forwards.mean() > 0.98


@pytest.mark.parametrize("name", ["humanoid3d_walk", "walker_0walk_forward", "cmu_01_01"])
def test_upright_clips_are_upright_with_the_head_on_top(name):
    (clip,) = (clip for clip in CLIPS if clip.name == name)
    height = clip.positions_mm[..., 2]
    assert (height[:, JOINT["Head"]] > height[:, JOINT["Hip"]] + 500).mean() > 0.95
    assert 1600 < np.median(height[:, JOINT["Head"]]) < 1750
    assert 75 < np.quantile(height[:, [JOINT["LAnkle"], JOINT["RAnkle"]]], 0.05) < 100


def test_writing_the_clips_again_gives_the_archive(tmp_path):
    for name in ("a.npz", "b.npz"):
        make.write(CLIPS, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as again, np.load(ARCHIVE) as archive:
        assert sorted(again) == sorted(archive)
        for key in archive:
            np.testing.assert_array_equal(again[key], archive[key], strict=True)


# The script, on two sources made up here.


def cmu_bvh_text():
    """Two frames, of which the first is the rest pose of the conversion, of a stick man."""

    def limb(first, *rest):
        name, offset = first
        return {name: (offset, limb(*rest) if rest else (0, 2, 0))}

    tree = {"Hips": ((0, 0, 0), limb(("LowerBack", (0, 0, 0)), ("Spine", (0, 2, 0))))}
    body = tree["Hips"][1]
    body["LowerBack"][1]["Spine"] = (
        (0, 2, 0),
        limb(("Neck1", (0, 4, 0)), ("Head", (0, 2, 0)))
        | limb(("LeftArm", (3, 3, 0)), ("LeftForeArm", (5, 0, 0)), ("LeftHand", (4, 0, 0)))
        | limb(("RightArm", (-3, 3, 0)), ("RightForeArm", (-5, 0, 0)), ("RightHand", (-4, 0, 0))),
    )
    down = (0, -7, 0)
    for side, x in (("Left", 1.3), ("Right", -1.3)):
        leg = limb((f"{side}UpLeg", (x, -2, 0)), (f"{side}Leg", down), (f"{side}Foot", down))
        body[f"{side[0]}HipJoint"] = ((0, 0, 0), leg)
    row = [0, 20, 0] + [0] * 3 * 19
    return bvh_text(tree, [row, row], 0.0083333)


OFFSETS = {
    "chest": (0, 1, 0), "neck": (0, 1, 0),
    "right_hip": (0, 0, 0.4), "right_knee": (0, -2, 0), "right_ankle": (0, -2, 0),
    "left_hip": (0, 0, -0.4), "left_knee": (0, -2, 0), "left_ankle": (0, -2, 0),
    "right_shoulder": (0, 1, 0.8), "right_elbow": (0, -1.2, 0), "right_wrist": (0, -1, 0),
    "left_shoulder": (0, 1, -0.8), "left_elbow": (0, -1.2, 0), "left_wrist": (0, -1, 0),
}  # fmt: skip
RIGHT_KNEE, LEFT_SHOULDER, LEFT_ELBOW = 20, 39, 43  # columns of a frame


def humanoid_frames(count):
    """Frames of the humanoid standing at rest, one metre above the ground."""
    frames = np.zeros((count, 44))
    frames[:, 0] = 1 / 30
    frames[:, 2] = 1
    for column in (4, 8, 12, 16, 21, 25, 30, 35, 39):
        frames[:, column] = 1
    return frames


def test_humanoid_at_rest_faces_x_with_the_left_side_at_y():
    offsets = {name: np.array(offset, float) for name, offset in OFFSETS.items()}
    (points,) = make.humanoid_points(humanoid_frames(1), offsets)
    np.testing.assert_allclose(points[JOINT["Hip"]], [0, 0, 1])
    np.testing.assert_allclose(points[JOINT["RAnkle"]], [0, -0.1, 0])
    np.testing.assert_allclose(points[JOINT["LWrist"]], [0, 0.2, 0.95])
    assert points[JOINT["Nose"], 0] > 0.03
    assert points[JOINT["Head"], 2] > points[JOINT["Nose"], 2] > points[JOINT["Thorax"], 2]
    np.testing.assert_allclose(points[list(H36M_RIGHT)], points[list(H36M_LEFT)] * [1, -1, 1])


def test_humanoid_joints_rotate_about_their_parents():
    offsets = {name: np.array(offset, float) for name, offset in OFFSETS.items()}
    frames = humanoid_frames(1)
    half = np.sqrt(0.5)
    frames[0, 4:8] = np.array([half, 0, half, 0]) * 1.01  # quarter turn to the left, not unit
    frames[0, RIGHT_KNEE] = -np.pi / 2
    frames[0, LEFT_SHOULDER : LEFT_SHOULDER + 4] = [half, 0, 0, half]  # arm raised to the front
    frames[0, LEFT_ELBOW] = np.pi / 2  # forearm up
    (points,) = make.humanoid_points(frames, offsets)
    shin = points[JOINT["RAnkle"]] - points[JOINT["RKnee"]]
    arm = points[JOINT["LElbow"]] - points[JOINT["LShoulder"]]
    forearm = points[JOINT["LWrist"]] - points[JOINT["LElbow"]]
    np.testing.assert_allclose(points[JOINT["LHip"]], [-0.1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(shin, [0, -0.5, 0], atol=1e-12)  # backwards
    np.testing.assert_allclose(arm, [0, 0.3, 0], atol=1e-12)
    np.testing.assert_allclose(forearm, [0, 0, 0.25], atol=1e-12)


def test_retargeting_keeps_directions_and_puts_the_feet_on_the_floor():
    rng = np.random.default_rng(11)
    points = rng.normal(loc=[3.0, -2.0, 9.0], size=(40, 17, 3))
    body = make.retarget(points)
    for parent, joint in H36M_BONES:
        before, after = points[:, joint] - points[:, parent], body[:, joint] - body[:, parent]
        cosine = np.sum(before * after, -1) / np.linalg.norm(before, axis=-1)
        np.testing.assert_allclose(cosine, make.BONES_MM[H36M_JOINTS[joint]], rtol=1e-9)
    standing = make.retarget(np.repeat(points[:1], 5, axis=0) * 0.01)
    clearance = standing[0, :, 2] - [make.CLEARANCE_MM[name] for name in H36M_JOINTS]
    assert clearance.min() == pytest.approx(0, abs=1e-9)
    # The unit does not matter.
    np.testing.assert_allclose(make.retarget(points * 7), body, atol=1e-6)


def test_script_writes_an_archive_from_a_wheel_and_a_folder(tmp_path, monkeypatch, capsys):
    urdf = "".join(
        f'<joint name="{name}"><origin xyz="{x} {y} {z}"/></joint>'
        for name, (x, y, z) in OFFSETS.items()
    )
    motion = json.dumps({"Loop": "wrap", "Frames": humanoid_frames(3).tolist()})
    with zipfile.ZipFile(tmp_path / "pybullet.whl", "w") as wheel:
        wheel.writestr("pybullet_data/humanoid/humanoid.urdf", f"<robot>{urdf}</robot>\0")
        wheel.writestr("pybullet_data/data/motions/humanoid3d_walk.txt", motion)
        wheel.writestr("pybullet_data/data/motions/laikago_walk.txt", "a dog")
        wheel.writestr("pybullet_data/data/motions/walker/", "")
        wheel.writestr("pybullet_data/data/motions/walker/turn.txt", motion)
    for name in ("01_01", "01_03"):
        (tmp_path / f"{name}.bvh").write_text(cmu_bvh_text())
    command = f"make --pybullet_wheel {tmp_path}/pybullet.whl --bvh_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", f"{tmp_path}/out.npz"])
    make.main()
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["names"].tolist() == [
            "humanoid3d_walk", "walker_turn", "cmu_01_01", "cmu_01_03",
        ]  # fmt: skip
        assert archive["splits"].tolist() == ["test", "train", "train", "train"]
        assert archive["lengths"].tolist() == [3, 3, 1, 1]
        assert archive["fps"].tolist() == [30, 30, 30, 30]
        assert archive["positions"].shape == (8, 17, 3)
    assert "walker_turn" in capsys.readouterr().out


# A user's own folder.


def save(path, positions_mm=None, fps=50.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if positions_mm is None:
        positions_mm = CLIPS[0].positions_mm[:4]
    np.savez(path, positions_mm=positions_mm, fps=fps)
    return path


def test_read_clip_centres_the_hip_and_keeps_the_height(tmp_path):
    wanted = CLIPS[4].positions_mm[:6]
    elsewhere = wanted.astype(np.float64) + np.array([4e5, -2e5, 0])
    path = save(tmp_path / "mine.npz", elsewhere, fps=25)
    clip = mocap.read_clip(path)
    assert (clip.name, clip.split, clip.fps) == ("mine", "train", 25.0)
    assert clip.positions_mm.dtype == np.float32
    np.testing.assert_allclose(clip.positions_mm, wanted, atol=1e-3)


GOOD = CLIPS[0].positions_mm[:3]


@pytest.mark.parametrize(
    ("positions_mm", "fps", "message"),
    [
        (GOOD[0], 50, r"shape \(17, 3\)"),
        (GOOD[:0], 50, r"shape \(0, 17, 3\)"),
        (GOOD[:, list(range(16))], 50, r"shape \(3, 16, 3\)"),
        (np.where(np.arange(17)[:, None] == 5, np.nan, GOOD), 50, "not finite"),
        (GOOD.astype(str), 50, "not finite numbers"),
        (GOOD / 1000, 50, "metres x 1000"),
        (GOOD * 10, 50, "no adult"),
        (GOOD - GOOD[:, :1], 50, "not positions relative to the hip"),
        (GOOD, 0, "fps is 0.0"),
        (GOOD, np.nan, "fps is nan"),
        (GOOD, [50, 60], "fps .one number"),
        (GOOD, "fast", "fps .one number"),
    ],
)
def test_read_clip_says_what_is_wrong_with_which_file(tmp_path, positions_mm, fps, message):
    path = save(tmp_path / "clip_a.npz", positions_mm, fps)
    with pytest.raises(ValueError, match=message) as error:
        mocap.read_clip(path)
    assert "clip_a.npz" in str(error.value)


def test_read_clip_rejects_what_is_not_such_an_archive(tmp_path):
    np.savez(tmp_path / "no_fps.npz", positions_mm=GOOD)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("not an archive")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, GOOD)
    for name in ("no_fps", "empty", "text", "array"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is not a motion file"):
            mocap.read_clip(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        mocap.read_clip(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"\.fbx file; convert it to one of: .*\.npz"):
        mocap.read_clip(tmp_path / "walk.fbx")


def test_read_folder_takes_the_test_clips_from_the_sub_folder(tmp_path):
    for name in ("b.npz", "deep/a.NPZ", "test/c.npz", "deep/test/d.npz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:  # savez would add its suffix to a.NPZ
            np.savez(file, positions_mm=GOOD, fps=50)
    (tmp_path / "notes.txt").write_text("passed over")
    clips = mocap.read_folder(tmp_path)
    assert [(clip.name, clip.split) for clip in clips] == [
        ("b", "train"), ("c", "test"), ("deep/a", "train"), ("deep/test/d", "train"),
    ]  # fmt: skip


def test_read_folder_divides_by_name_where_there_is_no_test_folder(tmp_path):
    for index in range(60):
        save(tmp_path / f"clip{index}.npz")
    splits = {clip.name: clip.split for clip in mocap.read_folder(tmp_path)}
    assert 5 <= list(splits.values()).count("test") <= 20
    # Another clip moves none of the others.
    save(tmp_path / "another.npz")
    more = {clip.name: clip.split for clip in mocap.read_folder(tmp_path)}
    assert {name: more[name] for name in splits} == splits


@pytest.mark.parametrize("start", range(0, 40, 2))
def test_read_folder_gives_two_clips_one_split_each(tmp_path, start):
    for index in (start, start + 1):
        save(tmp_path / f"clip{index}.npz")
    assert {clip.split for clip in mocap.read_folder(tmp_path)} == {"train", "test"}


def test_the_split_keeps_a_clip_for_training_where_the_hash_takes_all():
    names = [f"n{index}" for index in range(100)]
    taken = sorted(mocap._test_names(names))
    assert mocap._test_names(taken[:3]) < set(taken[:3])
    assert len(mocap._test_names(taken[:3])) == 2


def test_read_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no motion files under .*\.npz"):
        mocap.read_folder(tmp_path / "absent")
    (tmp_path / "walk.fbx").write_text("")
    with pytest.raises(ValueError, match=r"no motion files under .*\.npz"):
        mocap.read_folder(tmp_path)
    save(tmp_path / "walk.npz")
    with pytest.raises(ValueError, match="at least two motion files"):
        mocap.read_folder(tmp_path)
    save(tmp_path / "test" / "walk.npz")
    with pytest.raises(ValueError, match="same clip name 'walk'"):
        mocap.read_folder(tmp_path)
    (tmp_path / "test" / "walk.npz").unlink()
    with pytest.raises(ValueError, match="gives no test clip"):
        mocap.read_folder(tmp_path)
    save(tmp_path / "test" / "run.npz")
    (tmp_path / "walk.npz").unlink()
    with pytest.raises(ValueError, match="gives no train clip"):
        mocap.read_folder(tmp_path)


def test_read_folder_holds_out_what_a_pattern_names(tmp_path):
    for name in ("02_01", "03_01", "03_02", "deep/03_03", "test/04_01"):
        save(tmp_path / f"{name}.npz")

    def test_clips_of(pattern):
        clips = mocap.read_folder(tmp_path, test_clips=pattern)
        return {clip.name for clip in clips if clip.split == "test"}

    assert test_clips_of("03_*") == {"03_01", "03_02", "04_01"}
    assert test_clips_of("*03_*") == {"03_01", "03_02", "deep/03_03", "04_01"}
    assert test_clips_of("deep/*") == {"deep/03_03", "04_01"}
    with pytest.raises(ValueError, match=r"no clip that matches test_clips '05_\*'; the names are"):
        test_clips_of("05_*")
    with pytest.raises(ValueError, match="gives no train clip"):
        test_clips_of("*")
    # Without the folder test/ there is no other division than the pattern's.
    (tmp_path / "test" / "04_01.npz").unlink()
    (tmp_path / "test").rmdir()
    assert test_clips_of("02_01") == {"02_01"}


def test_read_folder_takes_motion_of_all_formats(tmp_path):
    save(tmp_path / "mine.npz")
    write_cmu(tmp_path, "02_01", [cmu_frame()] * 3)
    write_cmu(tmp_path, "03_01", [cmu_frame()] * 3)
    (tmp_path / "stick.bvh").write_text(cmu_bvh_text())
    clips = mocap.read_folder(tmp_path, test_clips="03_*")
    assert [(clip.name, clip.split, len(clip.positions_mm)) for clip in clips] == [
        ("02_01", "train", 3), ("03_01", "test", 3), ("mine", "train", 4), ("stick", "train", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fps", "wanted", "stride"),
    [(120, 0, 1), (120, 20, 6), (120, 25, 4), (120.00048, 30, 4), (30.00003, 30, 1), (29.97, 30, 1),
     (30, 24, 1), (30, 100, 1), (59.94, 30, 2), (30, 0.1, 300)],
)  # fmt: skip
def test_thinning_leaves_at_least_the_wanted_rate(fps, wanted, stride):
    positions_mm = np.arange(1000 * 51, dtype=np.float32).reshape(1000, 17, 3)
    clip = mocap.thin(mocap.Clip("a", "test", fps, positions_mm), wanted)
    assert (clip.name, clip.split) == ("a", "test")
    assert clip.fps == pytest.approx(fps / stride)
    np.testing.assert_array_equal(clip.positions_mm, positions_mm[::stride])


def test_read_folder_thins(tmp_path):
    save(tmp_path / "a.npz", CLIPS[0].positions_mm[:9], fps=60)
    save(tmp_path / "test" / "b.npz", CLIPS[0].positions_mm[:9], fps=20)
    clips = mocap.read_folder(tmp_path, fps=20)
    assert [(clip.fps, len(clip.positions_mm)) for clip in clips] == [(20, 3), (20, 9)]


def test_readers_are_chosen_by_suffix(tmp_path, monkeypatch):
    monkeypatch.setitem(mocap.READERS, ".c3d", lambda path, mapping: (GOOD, 100.0))
    (tmp_path / "take.c3d").write_text("")
    np.testing.assert_array_equal(mocap.read_clip(tmp_path / "take.c3d").positions_mm, GOOD)


def test_mirror_table_and_the_checks_agree():
    """The anatomical check of this file does notice a body with exchanged sides."""
    mirrored = CLIPS[0].positions_mm[:, list(H36M_MIRROR)].astype(np.float64)
    _, front, _ = body_axes(mirrored)
    head = (mirrored[:, JOINT["Thorax"]] + mirrored[:, JOINT["Head"]]) / 2
    assert np.median(np.sum((mirrored[:, JOINT["Nose"]] - head) * front, axis=-1)) < -20
