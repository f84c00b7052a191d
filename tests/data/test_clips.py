"""The embedded motion capture, the script that made it, and a user's own folder."""

import dataclasses
import itertools
import json
import sys
import zipfile

import numpy as np
import pytest
from motion_files import cmu_bvh, cmu_frame, lafan1, write_cmu

from diffpose_jax.data.motion import bodies, clips, make
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_LEFT, H36M_RIGHT

JOINT = {name: index for index, name in enumerate(H36M_JOINTS)}
CLIPS = clips.load_embedded()


def test_archive_holds_what_the_readme_says():
    assert clips.ARCHIVE.stat().st_size < 1_000_000
    names, frames = {"train": set(), "test": set()}, {"train": 0, "test": 0}
    for clip in CLIPS:
        names[clip.split].add(clip.name)
        frames[clip.split] += len(clip.positions_mm)
    assert frames == {"train": 2285, "test": 440}
    assert names["test"] == make.TEST_CLIPS
    assert len(names["train"] | names["test"]) == len(CLIPS) == 16  # no clip is in both
    readme = clips.ARCHIVE.with_name("README.md").read_text()
    assert all(text in readme for text in ("2,285", "440", *names["train"], *names["test"]))
    for name, text in (("pybullet", "permission"), ("cmu", "free for use in research")):
        assert text in clips.ARCHIVE.with_name(f"LICENSE.{name}").read_text().lower()


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_clips_keep_the_conventions(clip):
    positions_mm = clip.positions_mm
    assert np.isfinite(positions_mm).all()
    assert 10 < clip.fps < 130
    np.testing.assert_array_equal(positions_mm[:, 0, :2], 0)
    # The body reaches the floor but is not under it.
    assert -50 < positions_mm[..., 2].min() < 110
    assert positions_mm[..., 2].max() < 2500
    parents, joints = np.array(H36M_BONES).T
    lengths = np.linalg.norm(positions_mm[:, joints] - positions_mm[:, parents], axis=-1)
    expected = [bodies.BONES_MM[H36M_JOINTS[joint]] for joint in joints]
    np.testing.assert_allclose(lengths, np.broadcast_to(expected, lengths.shape), atol=0.2)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_bodies_are_not_mirrored(clip):
    """Nose in front, knees bending backwards: both fail where left and right are exchanged."""
    at = {name: clip.positions_mm[:, index].astype(np.float64) for name, index in JOINT.items()}
    left = at["LHip"] - at["RHip"]
    front = np.cross(left, at["Thorax"] - at["Hip"])
    front /= np.linalg.norm(front, axis=-1, keepdims=True)
    nose = np.sum((at["Nose"] - (at["Thorax"] + at["Head"]) / 2) * front, axis=-1)
    assert np.median(nose) > 20
    assert nose.min() > -20  # the head turns against the trunk
    for side in "LR":
        thigh, shin = at[side + "Knee"] - at[side + "Hip"], at[side + "Ankle"] - at[side + "Knee"]
        hinge = np.cross(thigh, shin)
        bent = np.linalg.norm(hinge, axis=-1) > np.sin(np.radians(20)) * 443 * 454
        assert bent.any()
        assert (np.sum(hinge * left, axis=-1)[bent] > 0).all()
    assert (np.sum((at["LShoulder"] - at["RShoulder"]) * left, axis=-1) > 0).all()


def test_writing_the_clips_again_gives_the_archive(tmp_path):
    make.write(CLIPS, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again, np.load(clips.ARCHIVE) as archive:
        assert sorted(again) == sorted(archive)
        for key in archive:
            np.testing.assert_array_equal(again[key], archive[key], strict=True)


# The script, on two sources made up here.

OFFSETS = {
    "chest": (0, 1, 0), "neck": (0, 1, 0),
    "right_hip": (0, 0, 0.4), "right_knee": (0, -2, 0), "right_ankle": (0, -2, 0),
    "left_hip": (0, 0, -0.4), "left_knee": (0, -2, 0), "left_ankle": (0, -2, 0),
    "right_shoulder": (0, 1, 0.8), "right_elbow": (0, -1.2, 0), "right_wrist": (0, -1, 0),
    "left_shoulder": (0, 1, -0.8), "left_elbow": (0, -1.2, 0), "left_wrist": (0, -1, 0),
}  # fmt: skip
ARRAYS = {name: np.array(offset, float) for name, offset in OFFSETS.items()}
RIGHT_KNEE, LEFT_SHOULDER, LEFT_ELBOW = 20, 39, 43  # columns of a frame


def humanoid_frames(count):
    """Frames of the humanoid standing at rest, one metre above the ground."""
    frames = np.zeros((count, 44))
    frames[:, 0] = 1 / 30
    frames[:, 2] = 1
    for column in (4, 8, 12, 16, 21, 25, 30, 35, 39):
        frames[:, column] = 1
    return frames


def test_humanoid_joints_rotate_about_their_parents():
    frames = humanoid_frames(2)
    half = np.sqrt(0.5)
    frames[1, 4:8] = np.array([half, 0, half, 0]) * 1.01  # quarter turn to the left, not unit
    frames[1, RIGHT_KNEE] = -np.pi / 2
    frames[1, LEFT_SHOULDER : LEFT_SHOULDER + 4] = [half, 0, 0, half]  # arm raised to the front
    frames[1, LEFT_ELBOW] = np.pi / 2  # forearm up
    rest, turned = make.humanoid_points(frames, ARRAYS)
    # At rest it faces x, with the left side at positive y.
    np.testing.assert_allclose(rest[JOINT["LWrist"]], [0, 0.2, 0.95], atol=1e-12)
    assert rest[JOINT["Nose"], 0] > 0.03
    mirrored = rest[list(H36M_RIGHT)] * [1, -1, 1]
    np.testing.assert_allclose(rest[list(H36M_LEFT)], mirrored, atol=1e-12)
    for parent, joint, expected in (
        ("Hip", "LHip", [-0.1, 0, 0]),
        ("RKnee", "RAnkle", [0, -0.5, 0]),  # backwards
        ("LShoulder", "LElbow", [0, 0.3, 0]),
        ("LElbow", "LWrist", [0, 0, 0.25]),
    ):
        bone = turned[JOINT[joint]] - turned[JOINT[parent]]
        np.testing.assert_allclose(bone, expected, atol=1e-12)


def test_retargeting_keeps_directions_and_puts_the_feet_on_the_floor():
    rng = np.random.default_rng(11)
    points = rng.normal(loc=[3.0, -2.0, 9.0], size=(40, 17, 3))
    body = bodies.retarget(points)
    for parent, joint in H36M_BONES:
        before, after = points[:, joint] - points[:, parent], body[:, joint] - body[:, parent]
        cosine = np.sum(before * after, -1) / np.linalg.norm(before, axis=-1)
        np.testing.assert_allclose(cosine, bodies.BONES_MM[H36M_JOINTS[joint]], rtol=1e-9)
    standing = bodies.retarget(np.repeat(points[:1], 5, axis=0) * 0.01)
    clearance = standing[0, :, 2] - [bodies.CLEARANCE_MM[name] for name in H36M_JOINTS]
    assert clearance.min() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(bodies.retarget(points * 7), body, atol=1e-6)  # in any unit


def test_script_writes_an_archive_from_a_wheel_and_a_folder(tmp_path, monkeypatch, capsys):
    joints = (
        f'<joint name="{name}"><origin xyz="{x} {y} {z}"/></joint>'
        for name, (x, y, z) in OFFSETS.items()
    )
    motion = json.dumps({"Loop": "wrap", "Frames": humanoid_frames(3).tolist()})
    with zipfile.ZipFile(tmp_path / "pybullet.whl", "w") as wheel:
        for name, content in {
            "humanoid/humanoid.urdf": f"<robot>{''.join(joints)}</robot>\0",
            "data/motions/humanoid3d_walk.txt": motion,
            "data/motions/laikago_walk.txt": "a dog",
            "data/motions/walker/": "",
            "data/motions/walker/turn.txt": motion,
        }.items():
            wheel.writestr(f"pybullet_data/{name}", content)
    for name in ("01_01", "01_03"):
        (tmp_path / f"{name}.bvh").write_text(cmu_bvh(2))
    command = f"make --pybullet_wheel {tmp_path}/pybullet.whl --bvh_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", f"{tmp_path}/out.npz"])
    make.main()
    names = ["humanoid3d_walk", "walker_turn", "cmu_01_01", "cmu_01_03"]
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["names"].tolist() == names
        assert archive["splits"].tolist() == ["test", "train", "train", "train"]
        assert archive["lengths"].tolist() == [3, 3, 1, 1]
        assert archive["fps"].tolist() == [30, 30, 30, 30]
        assert archive["positions"].shape == (8, 17, 3)
    assert "walker_turn" in capsys.readouterr().out


# A user's own folder.

GOOD = CLIPS[0].positions_mm[:3]


def save(path, positions_mm=GOOD, fps=50.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # `savez` adds a suffix to other paths than .npz
        np.savez(file, positions_mm=positions_mm, fps=fps)
    return path


def test_read_clip_centres_the_hip_and_keeps_the_height(tmp_path):
    wanted = CLIPS[4].positions_mm[:6]
    elsewhere = wanted.astype(np.float64) + np.array([4e5, -2e5, 0])
    path = save(tmp_path / "mine.npz", elsewhere, fps=25)
    clip = clips.read_clip(path)
    assert (clip.name, clip.split, clip.fps) == ("mine", "train", 25.0)
    assert clip.positions_mm.dtype == np.float32
    np.testing.assert_allclose(clip.positions_mm, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("positions_mm", "fps", "message"),
    [
        (GOOD[0], 50, r"shape \(17, 3\)"),
        (np.where(np.arange(17)[:, None] == 5, np.nan, GOOD), 50, "not finite"),
        (GOOD.astype(str), 50, "not finite numbers"),
        (GOOD / 1000, 50, "metres x 1000"),
        (GOOD - GOOD[:, :1], 50, "not positions relative to the hip"),
        (GOOD, np.nan, "fps is nan"),
        (GOOD, "fast", "fps .one number"),
    ],
)
def test_read_clip_says_what_is_wrong_with_which_file(tmp_path, positions_mm, fps, message):
    with pytest.raises(ValueError, match=rf"clip_a\.npz.*{message}"):
        clips.read_clip(save(tmp_path / "clip_a.npz", positions_mm, fps))


def test_read_clip_rejects_what_is_not_such_a_file(tmp_path):
    np.savez(tmp_path / "no_fps.npz", positions_mm=GOOD)
    for name, error, message in (
        ("no_fps.npz", ValueError, r"no_fps\.npz is not a motion file"),
        ("absent.npz", FileNotFoundError, "absent"),
        ("walk.fbx", ValueError, r"convert this \.fbx file to one of: .*\.npz"),
    ):
        with pytest.raises(error, match=message):
            clips.read_clip(tmp_path / name)


def splits_of(folder, **options):
    return {clip.name: clip.split for clip in clips.read_folder(folder, **options)}


def test_read_folder_divides_by_name_where_there_is_no_test_folder(tmp_path):
    for index in range(60):
        save(tmp_path / f"clip{index}.npz")
    splits = splits_of(tmp_path)
    assert 5 <= list(splits.values()).count("test") <= 20
    # Another clip moves none of the others.
    save(tmp_path / "another.npz")
    assert splits_of(tmp_path).items() > splits.items()
    # Of two clips neither split is empty.
    for pair in itertools.pairwise(splits):
        assert len(clips._test_names(pair)) == 1


def test_read_folder_errors(tmp_path):
    for added, message in (
        ("walk.fbx", r"no motion files under .*\.npz"),
        ("walk.npz", "gives no test clip: it needs at least two motion files"),
        ("test/walk.npz", "same clip name 'walk'"),
    ):
        save(tmp_path / added)
        with pytest.raises(ValueError, match=message):
            clips.read_folder(tmp_path)


def test_read_folder_takes_test_clips_from_a_sub_folder_and_by_a_pattern(tmp_path):
    for name in ("03_01", "02_01", "deep/03_03", "deep/test/05_01", "test/04_01"):
        save(tmp_path / f"{name}.NPZ")
    (tmp_path / "notes.txt").write_text("passed over")
    assert list(splits_of(tmp_path)) == ["02_01", "03_01", "04_01", "deep/03_03", "deep/test/05_01"]

    def test_clips_of(pattern):
        splits = splits_of(tmp_path, test_clips=pattern)
        return {name for name, split in splits.items() if split == "test"}

    assert test_clips_of("") == {"04_01"}
    assert test_clips_of("03_*") == {"03_01", "04_01"}
    assert test_clips_of("*03_*") == {"03_01", "deep/03_03", "04_01"}
    with pytest.raises(ValueError, match=r"no clip that matches test_clips '05_\*'; it has: 02_01"):
        test_clips_of("05_*")
    with pytest.raises(ValueError, match="gives no train clip"):
        test_clips_of("*")
    # Without the folder test/ there is no other division than the pattern's.
    (tmp_path / "test" / "04_01.NPZ").unlink()
    (tmp_path / "test").rmdir()
    assert test_clips_of("02_01") == {"02_01"}


def test_read_folder_takes_motion_of_all_formats_and_thins_it(tmp_path):
    save(tmp_path / "mine.npz", CLIPS[0].positions_mm[:9], fps=60)
    for name in ("02_01", "03_01"):
        write_cmu(tmp_path, name, [cmu_frame()] * 6)
    (tmp_path / "person.bvh").write_text(lafan1(2))
    found = clips.read_folder(tmp_path, test_clips="03_*", fps=20.0)
    lengths = {clip.name: len(clip.positions_mm) for clip in found}
    assert lengths == {"02_01": 1, "03_01": 1, "mine": 3, "person": 2}


@pytest.mark.parametrize(
    ("fps", "wanted", "stride"),
    [(120, 0, 1), (120, 25, 4), (120.00048, 30, 4), (29.97, 30, 1), (30, 24, 1), (30, 0.1, 300)],
)
def test_thinning_leaves_at_least_the_wanted_rate(fps, wanted, stride):
    whole = dataclasses.replace(CLIPS[0], fps=float(fps))
    clip = clips.thin(whole, float(wanted))
    assert clip.fps == pytest.approx(fps / stride)
    np.testing.assert_array_equal(clip.positions_mm, whole.positions_mm[::stride])
