"""The TFDS builder, end to end on a tiny configuration, and the variation of bodies."""

import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffpose_jax.data import motion, simulator
from diffpose_jax.data.motion import clips as mocap
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_MIRROR


def write_clips(folder, lengths, seed=0):
    """Short pieces of the embedded clips as a user's folder."""
    clips = mocap.load_embedded()
    rng = np.random.default_rng(seed)
    for name, length in lengths.items():
        clip = clips[rng.integers(len(clips))]
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, positions_mm=clip.positions_mm[:length], fps=clip.fps)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), {"a": 5, "b": 7, "test/c": 6, "test/d": 4})


def tiny(folder, **changes):
    return ml_collections.ConfigDict(
        {"source": str(folder), "train_views_per_frame": 3, "test_views_per_frame": 2} | changes
    )


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    return motion.prepare(tiny(folder), tmp_path_factory.mktemp("data"))


def test_splits(prepared):
    train, test = (motion.read_all(prepared, split) for split in ("train", "test"))
    assert len(train["frame"]) == 3 * (5 + 7)
    assert len(test["frame"]) == 2 * (6 + 4)
    assert set(train["clip"]) == {"a", "b"}
    assert set(test["clip"]) == {"c", "d"}
    names, counts = np.unique(
        [f"{c}{f}" for c, f in zip(train["clip"], train["frame"], strict=True)], return_counts=True
    )
    assert len(names) == 12
    assert set(counts) == {3}


def test_decoded_examples_are_the_rendered_blobs(prepared):
    everything = motion.read_all(prepared, "train")
    source = prepared.as_data_source("train")
    for i in (0, 7, 35):
        example = source[i]
        assert example["heatmaps"].shape == (16, 64, 64)
        assert example["heatmaps"].dtype == np.float32
        np.testing.assert_array_equal(example["heatmaps"], simulator.render(everything["blobs"][i]))
        for key in ("pose_mm", "keypoints_xy", "hidden"):
            np.testing.assert_array_equal(example[key], everything[key][i])
            assert everything[key].dtype == example[key].dtype
        assert example["clip"].decode() == everything["clip"][i]
        assert example["frame"] == everything["frame"][i]


def test_poses_are_hip_centred_and_upright(prepared):
    pose = motion.read_all(prepared, "train")["pose_mm"]
    np.testing.assert_array_equal(pose[:, 0], 0.0)
    bones = np.array([np.linalg.norm(pose[:, b] - pose[:, a], axis=-1) for a, b in H36M_BONES])
    assert bones.min() > 20
    assert bones.max() < 700


def test_the_pose_explains_the_keypoints(prepared):
    # Under weak perspective a person at 5 m is an affine image of the pose, y turned around.
    data = motion.read_all(prepared, "train")
    for pose, cells in zip(data["pose_mm"], data["keypoints_xy"], strict=True):
        image = cells - cells[0]
        plane = pose[:, :2] * [1, -1]
        scale = (plane * image).sum() / (plane**2).sum()
        residual = np.linalg.norm(scale * plane - image) / np.linalg.norm(image)
        assert scale > 0
        assert residual < 0.2


def test_same_seed_same_records(folder, prepared, tmp_path):
    again = motion.prepare(tiny(folder), tmp_path)
    other = motion.prepare(tiny(folder, seed=1), tmp_path)
    first = motion.read_all(prepared, "train")
    for key, value in motion.read_all(again, "train").items():
        np.testing.assert_array_equal(value, first[key])
    assert other.builder_config.name != again.builder_config.name
    assert not np.array_equal(motion.read_all(other, "train")["blobs"], first["blobs"])


def test_examples_do_not_depend_on_the_number_of_others(folder, prepared, tmp_path):
    more = motion.prepare(tiny(folder, train_views_per_frame=4, test_stride=2), tmp_path)
    few, many = motion.read_all(prepared, "train"), motion.read_all(more, "train")
    kept = {pose.tobytes() for pose in many["pose_mm"]}
    assert all(pose.tobytes() in kept for pose in few["pose_mm"])
    assert set(motion.read_all(more, "test")["frame"]) == {0, 2, 4}


def test_features_survive_their_json(prepared):
    features = tfds.features.FeaturesDict.from_config(prepared.data_dir)
    assert isinstance(features["heatmaps"], motion.RenderedHeatmaps)
    assert features["heatmaps"].shape == (16, 64, 64)
    with pytest.raises(ValueError, match=r"must be \(16, R, 5\)"):
        features["heatmaps"].encode_example(np.zeros((16, 64, 64), np.float32))


def test_name_follows_content(folder, tmp_path):
    names = {
        motion.builder_config(ml_collections.ConfigDict(changes)).name
        for changes in (
            {},
            {"seed": 1},
            {"fps": 20.0},
            {"simulator": {"clutter": 0.5}},
            {"camera": {"offset_mm": 0.0}},
            {"body": {"mirror": 0.0}},
            {"crop": {"cut": 0.0}},
        )
    }
    assert len(names) == 7
    copy = write_clips(tmp_path / "copy", {"a": 5, "test/c": 6})
    before = motion.builder_config(tiny(copy)).name
    assert motion.builder_config(tiny(copy)).name == before
    write_clips(tmp_path / "copy", {"a": 4, "test/c": 6})
    assert motion.builder_config(tiny(copy)).name != before
    # Defaults written out are the defaults.
    default = motion.builder_config(motion.default_config())
    assert default.name == motion.builder_config(ml_collections.ConfigDict()).name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, r"data\.sead is unknown"),
        ({"camera": {"hight": 1.0}}, r"data\.camera\.hight is unknown"),
        ({"camera": 3.0}, r"data\.camera is 3\.0; it must hold"),
        ({"seed": "a"}, r"data\.seed is 'a'; it must be a int"),
        ({"fps": -1.0}, r"data\.fps is -1\.0; it must be at least 0"),
        ({"fps": float("nan")}, r"data\.fps is nan; it must be at least 0"),
        ({"test_clips": 3}, r"data\.test_clips is 3; it must be a str"),
        ({"test_stride": 0}, r"data\.test_stride is 0; it must be at least 1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        motion.builder_config(ml_collections.ConfigDict(changes))


def test_a_folder_is_thinned_and_divided_as_configured(folder, tmp_path):
    config = tiny(folder, fps=25.0, test_clips="a", test_views_per_frame=1)
    builder = motion.prepare(config, tmp_path)
    test = motion.read_all(builder, "test")
    clips = {clip.name: clip for clip in mocap.read_folder(folder, fps=25.0, test_clips="a")}
    assert set(test["clip"]) == {"a", "c", "d"}
    assert set(motion.read_all(builder, "train")["clip"]) == {"b"}
    for name in ("a", "c", "d"):
        assert (test["clip"] == name).sum() == len(clips[name].positions_mm)


def test_embedded_clips_are_thinned_but_not_divided_anew(tmp_path):
    config = {"fps": 2.0, "train_views_per_frame": 1, "test_views_per_frame": 1}
    builder = motion.prepare(ml_collections.ConfigDict(config), tmp_path)
    expected = [mocap.thin(clip, 2.0) for clip in mocap.load_embedded()]
    frames = sum(len(clip.positions_mm) for clip in expected if clip.split == "test")
    assert len(motion.read_all(builder, "test")["frame"]) == frames < 100
    with pytest.raises(ValueError, match=r"data\.test_clips is 'a', but the embedded clips have"):
        motion.builder_config(ml_collections.ConfigDict({"test_clips": "a"}))


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be 'embedded' or a folder"):
        motion.builder_config(tiny(tmp_path / "nothing"))


def test_too_many_examples_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="Use fewer views per frame"):
        motion.prepare(tiny(folder, train_views_per_frame=100_000), tmp_path)


def test_tensorflow_is_never_imported(folder, tmp_path):
    program = f"""
import sys
import ml_collections
from diffpose_jax.data import motion
config = ml_collections.ConfigDict({tiny(folder).to_dict()!r})
builder = motion.prepare(config, {str(tmp_path)!r})
assert builder.as_data_source("train")[0]["heatmaps"].shape == (16, 64, 64)
motion.read_all(builder, "test")
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "WARNING" not in done.stderr


# Bodies.


def embedded_poses(number, seed):
    positions = np.concatenate([clip.positions_mm for clip in mocap.load_embedded()])
    return positions[np.random.default_rng(seed).integers(0, len(positions), number)]


def bones_of(poses):
    return np.stack([poses[:, b] - poses[:, a] for a, b in H36M_BONES], axis=1)


def test_bodies_keep_the_directions_and_the_floor():
    poses = embedded_poses(300, seed=1)
    varied = motion.vary_bodies(
        np.random.default_rng(2), poses, motion.BodyConfig(mirror=0.0, bone_std=0.2)
    )
    before, after = bones_of(poses.astype(float)), bones_of(varied)
    lengths, new = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    # Some bones of the source may be very short.
    np.testing.assert_allclose((before * after).sum(-1) / (lengths * new), 1.0, atol=1e-9)
    ratio = dict(zip([H36M_JOINTS[b] for _, b in H36M_BONES], (new / lengths).T, strict=True))
    for part in ("Hip", "Knee", "Ankle", "Shoulder", "Elbow", "Wrist"):
        np.testing.assert_allclose(ratio["L" + part], ratio["R" + part])
    assert np.std(np.log(ratio["LElbow"] / ratio["LKnee"])) == pytest.approx(0.28, abs=0.05)
    np.testing.assert_allclose(varied[:, 0, :2], poses[:, 0, :2])
    shift = varied[..., 2].min(-1) / np.where(poses[..., 2].min(-1) == 0, 1, poses[..., 2].min(-1))
    assert np.all((shift > 0.4) & (shift < 2.0) | (np.abs(poses[..., 2].min(-1)) < 1))


def test_stature_is_the_drawn_one():
    standing = np.concatenate([c.positions_mm[:1] for c in mocap.load_embedded()][:1]).repeat(
        500, 0
    )
    varied = motion.vary_bodies(np.random.default_rng(3), standing, motion.BodyConfig())
    parts = [H36M_JOINTS.index(n) for n in ("LAnkle", "LKnee", "Spine", "Thorax", "Nose", "Head")]
    lengths = np.linalg.norm(bones_of(varied), axis=-1)[:, np.array(parts) - 1].sum(-1) * 1.05
    # The bones from ankle to head; mirrored bodies have the same ones.
    assert lengths.min() == pytest.approx(1500, abs=15)
    assert lengths.max() == pytest.approx(1950, abs=15)


def test_mirrored_bodies():
    poses = embedded_poses(50, seed=4)
    fixed = {"bone_std": 0.1, "height_mm_min": 1700.0, "height_mm_max": 1800.0}
    plain, mirrored = (
        motion.vary_bodies(
            np.random.default_rng(5), poses, motion.BodyConfig(mirror=chance, **fixed)
        )
        for chance in (0.0, 1.0)
    )
    np.testing.assert_allclose(mirrored, plain[:, H36M_MIRROR] * [-1, 1, 1])
    np.testing.assert_allclose(motion.mirror_poses(mirrored), plain)


def test_exchanged_parts_keep_the_legs_the_bones_and_the_heading():
    rng = np.random.default_rng(11)
    poses = np.concatenate([clip.positions_mm for clip in mocap.load_embedded()]).astype(float)
    receivers, donors = poses[rng.integers(len(poses), size=40)], poses[::7]
    mixed = motion.exchange_parts(rng, receivers, donors, chance=1.0)
    np.testing.assert_array_equal(mixed[:, :7], receivers[:, :7])
    assert np.all(np.abs(mixed[:, 11:] - receivers[:, 11:]).max(axis=(1, 2)) > 1)

    def bone_lengths(positions_mm):
        return np.stack(
            [
                np.linalg.norm(positions_mm[:, a] - positions_mm[:, b], axis=-1)
                for a, b in H36M_BONES
            ]
        )

    # The embedded clips share one body, to the 0.1 mm that they are stored with.
    np.testing.assert_allclose(bone_lengths(mixed), bone_lengths(receivers), atol=0.5)


def test_exchange_takes_each_part_from_one_donor_turned_about_the_vertical():
    rng = np.random.default_rng(12)
    clips = mocap.load_embedded()
    receiver, donor = clips[0].positions_mm[:1].astype(float), clips[-1].positions_mm[40:41]
    mixed = motion.exchange_parts(rng, receiver, donor.astype(float), chance=1.0)[0]
    # One donor gives trunk and arms, so that the upper body is the donor's but for a turn.
    upper, given = mixed[7:] - mixed[0], donor[0, 7:] - donor[0, 0]
    np.testing.assert_allclose(upper[:, 2], given[:, 2], atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(upper, axis=-1), np.linalg.norm(given, axis=-1), rtol=1e-6
    )
    hips, donor_hips = mixed[4] - mixed[1], donor[0, 4] - donor[0, 1]
    shoulders, donor_shoulders = mixed[11] - mixed[14], donor[0, 11] - donor[0, 14]
    angle = np.arctan2(*hips[1::-1]) - np.arctan2(*shoulders[1::-1])
    donor_angle = np.arctan2(*donor_hips[1::-1]) - np.arctan2(*donor_shoulders[1::-1])
    np.testing.assert_allclose(np.cos(angle - donor_angle), 1.0, atol=1e-9)


def test_no_exchange_leaves_poses_alone():
    rng = np.random.default_rng(13)
    poses = mocap.load_embedded()[0].positions_mm
    np.testing.assert_array_equal(motion.exchange_parts(rng, poses, poses[::-1], 0.0), poses)
