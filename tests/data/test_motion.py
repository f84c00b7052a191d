"""The TFDS builder, end to end on a tiny configuration, and the variation of bodies."""

import collections

import ml_collections
import numpy as np
import pytest

from diffpose_jax.data import motion, simulator
from diffpose_jax.data.motion import bodies
from diffpose_jax.data.motion.builder import data_set_name
from diffpose_jax.data.motion.clips import thin
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_MIRROR


def write_clips(folder, lengths):
    """Short pieces of the embedded clips as a user's folder."""
    for clip, (name, length) in zip(motion.load_embedded(), lengths.items(), strict=False):
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
    for columns, views, lengths in ((train, 3, {"a": 5, "b": 7}), (test, 2, {"c": 6, "d": 4})):
        found = sorted(zip(columns["clip"], columns["frame"], strict=True))
        assert found == [(c, f) for c, n in lengths.items() for f in range(n) for _ in range(views)]


def test_decoded_examples_are_the_rendered_blobs(prepared):
    everything = motion.read_all(prepared, "train")
    source = prepared.as_data_source("train")
    for i in (0, 7, 35):
        example = source[i]
        assert example["heatmaps"].shape == (16, 64, 64)
        assert example["heatmaps"].dtype == np.float32
        np.testing.assert_array_equal(example["heatmaps"], simulator.render(everything["blobs"][i]))
        for key in ("pose_mm", "keypoints_xy", "hidden", "ray"):
            np.testing.assert_array_equal(example[key], everything[key][i])
            assert everything[key].dtype == example[key].dtype
        assert example["clip"].decode() == everything["clip"][i]


def test_the_pose_explains_the_keypoints(prepared):
    # Under weak perspective a person at 5 m is an affine image of the pose, y turned around.
    data = motion.read_all(prepared, "train")
    np.testing.assert_array_equal(data["pose_mm"][:, 0], 0.0)
    for pose, cells in zip(data["pose_mm"], data["keypoints_xy"], strict=True):
        image = cells - cells[0]
        plane = pose[:, :2] * [1, -1]
        scale = (plane * image).sum() / (plane**2).sum()
        residual = np.linalg.norm(scale * plane - image) / np.linalg.norm(image)
        assert scale > 0
        assert residual < 0.2


def test_same_seed_same_records(folder, prepared, tmp_path):
    first, again, other = (
        motion.read_all(builder, "train")
        for builder in (prepared, *(motion.prepare(tiny(folder, seed=s), tmp_path) for s in (0, 1)))
    )
    for key, value in again.items():
        np.testing.assert_array_equal(value, first[key])
    assert not np.array_equal(other["blobs"], first["blobs"])


def test_examples_do_not_depend_on_the_number_of_others(folder, prepared, tmp_path):
    more = motion.prepare(tiny(folder, train_views_per_frame=4, test_stride=2), tmp_path)
    few, many = motion.read_all(prepared, "train"), motion.read_all(more, "train")
    kept = {pose.tobytes() for pose in many["pose_mm"]}
    assert all(pose.tobytes() in kept for pose in few["pose_mm"])
    assert set(motion.read_all(more, "test")["frame"]) == {0, 2, 4}


def test_name_follows_content(tmp_path):
    write_clips(tmp_path, {"a": 5, "test/c": 6})
    changes = (
        {}, {"seed": 1}, {"fps": 20.0}, {"body": bodies.BodyConfig(mirror=0.0)},
        {"simulator": simulator.SimulatorConfig(clutter=0.5)}, {"source": str(tmp_path)},
    )  # fmt: skip
    names = {data_set_name(motion.MotionConfig(**change)) for change in changes}
    assert len(names) == len(changes)
    assert data_set_name(motion.MotionConfig()) in names
    write_clips(tmp_path, {"a": 4, "test/c": 6})
    assert data_set_name(motion.MotionConfig(source=str(tmp_path))) not in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, r"config\.data\.builder: unknown field sead"),
        ({"seed": "a"}, r"config\.data\.builder\.seed must be of type int, not 'a'"),
        ({"fps": float("nan")}, r"config\.data\.builder\.fps must be of type float, not 'nan'"),
        ({"body": {"height_mm_min": 2000}}, r"builder\.body\.height_mm_min must be 100 to 1950"),
        ({"simulator": {"missed": 1.5}}, r"builder\.simulator\.missed must be 0 to 1, not 1\.5"),
        ({"camera": {"distance_mm_min": 0}}, r"builder\.camera\.distance_mm_min must be 1 to 6500"),
        ({"test_clips": "a"}, "must be empty: the embedded clips have fixed splits"),
        ({"source": "no/such/folder"}, "must be 'embedded' or a folder, not 'no/such/folder'"),
        ({"train_views_per_frame": 200_000}, "Use fewer views per frame"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        motion.prepare(changes, tmp_path)


def test_clips_are_thinned_and_divided_as_configured(folder, tmp_path):
    config = tiny(folder, fps=25.0, test_clips="a", test_views_per_frame=1)
    found = motion.read_all(motion.prepare(config, tmp_path), "test")["clip"]
    clips = motion.read_folder(folder, fps=25.0, test_clips="a")
    expected = {clip.name: len(clip.positions_mm) for clip in clips if clip.split == "test"}
    assert collections.Counter(found.tolist()) == expected
    assert set(expected) == {"a", "c", "d"}

    fields = {"fps": 2.0, "train_views_per_frame": 1, "test_views_per_frame": 1}
    found = motion.read_all(motion.prepare(fields, tmp_path), "test")["clip"]
    clips = [thin(clip, 2.0) for clip in motion.load_embedded() if clip.split == "test"]
    assert collections.Counter(found.tolist()) == {c.name: len(c.positions_mm) for c in clips}


# Bodies.


POSES = np.concatenate([clip.positions_mm for clip in motion.load_embedded()]).astype(float)


def embedded_poses(number, seed):
    return POSES[np.random.default_rng(seed).integers(0, len(POSES), number)]


def bones_of(poses):
    return np.stack([poses[:, b] - poses[:, a] for a, b in H36M_BONES], axis=1)


def vary(seed, poses, **config):
    return bodies.vary_bodies(np.random.default_rng(seed), poses, bodies.BodyConfig(**config))


def test_bodies_keep_the_directions_and_the_floor():
    poses = embedded_poses(300, seed=1)
    varied = vary(2, poses, mirror=0.0, bone_std=0.2)
    before, after = bones_of(poses), bones_of(varied)
    lengths, new = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    np.testing.assert_allclose((before * after).sum(-1) / (lengths * new), 1.0, atol=1e-9)
    ratio = dict(zip([H36M_JOINTS[b] for _, b in H36M_BONES], (new / lengths).T, strict=True))
    for part in ("Hip", "Knee", "Ankle", "Shoulder", "Elbow", "Wrist"):
        np.testing.assert_allclose(ratio["L" + part], ratio["R" + part])
    assert np.std(np.log(ratio["LElbow"] / ratio["LKnee"])) == pytest.approx(0.28, abs=0.05)
    np.testing.assert_allclose(varied[:, 0, :2], poses[:, 0, :2])
    floor = poses[..., 2].min(-1)
    shift = varied[..., 2].min(-1) / np.where(floor == 0, 1, floor)
    assert np.all((shift > 0.4) & (shift < 2.0) | (np.abs(floor) < 1))


def test_stature_is_the_drawn_one():
    varied = vary(3, POSES[:1].repeat(500, 0))
    parts = [H36M_JOINTS.index(n) for n in ("LAnkle", "LKnee", "Spine", "Thorax", "Nose", "Head")]
    lengths = np.linalg.norm(bones_of(varied), axis=-1)[:, np.array(parts) - 1].sum(-1) * 1.05
    # The bones from ankle to head; mirrored bodies have the same ones.
    assert lengths.min() == pytest.approx(1500, abs=15)
    assert lengths.max() == pytest.approx(1950, abs=15)


def test_mirrored_bodies():
    poses = embedded_poses(50, seed=4)
    plain, mirrored = (vary(5, poses, bone_std=0.1, mirror=chance) for chance in (0.0, 1.0))
    np.testing.assert_allclose(mirrored, plain[:, H36M_MIRROR] * [-1, 1, 1])
    np.testing.assert_allclose(bodies.mirror_poses(mirrored), plain)


def test_exchanged_parts_keep_the_legs_and_the_bones():
    rng = np.random.default_rng(11)
    receivers = embedded_poses(40, seed=11)
    mixed = bodies.exchange_parts(rng, receivers, POSES[::7], chance=1.0)
    np.testing.assert_array_equal(mixed[:, :7], receivers[:, :7])
    assert np.all(np.abs(mixed[:, 11:] - receivers[:, 11:]).max(axis=(1, 2)) > 1)
    # The embedded clips share one body, to the 0.1 mm that they are stored with.
    before, after = (np.linalg.norm(bones_of(poses), axis=-1) for poses in (receivers, mixed))
    np.testing.assert_allclose(after, before, atol=0.5)
    same = bodies.exchange_parts(rng, receivers, POSES[::7], chance=0.0)
    np.testing.assert_array_equal(same, receivers)


def test_exchange_takes_each_part_from_one_donor_turned_about_the_vertical():
    receiver, donor = POSES[:1], POSES[-1:]
    mixed = bodies.exchange_parts(np.random.default_rng(12), receiver, donor, chance=1.0)[0]
    # One donor gives trunk and arms, so that the upper body is the donor's but for a turn.
    upper, given = mixed[7:] - mixed[0], donor[0, 7:] - donor[0, 0]
    np.testing.assert_allclose(upper[:, 2], given[:, 2], atol=1e-6)
    np.testing.assert_allclose((upper**2).sum(-1), (given**2).sum(-1), rtol=1e-6)

    def twist(pose):
        """Angle on the floor from the line of the shoulders to that of the hips."""
        hips, shoulders = pose[4] - pose[1], pose[11] - pose[14]
        return np.arctan2(*hips[1::-1]) - np.arctan2(*shoulders[1::-1])

    np.testing.assert_allclose(np.cos(twist(mixed) - twist(donor[0])), 1.0, atol=1e-9)


def test_bent_poses_keep_the_bones_the_hip_and_the_lowest_point():
    poses = embedded_poses(400, seed=13)
    bent = bodies.bend(np.random.default_rng(14), poses, 20.0)
    before, after = bones_of(poses), bones_of(bent)
    lengths = np.linalg.norm(before, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(after, axis=-1), lengths, rtol=1e-6)
    np.testing.assert_array_equal(bent[:, 0, :2], poses[:, 0, :2])
    np.testing.assert_allclose(bent[..., 2].min(1), poses[..., 2].min(1), atol=1e-9)
    cosine = (before * after).sum(-1) / lengths**2
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    names = [H36M_JOINTS[child] for _, child in H36M_BONES]
    # A bone's direction turns by two of the three components of a random turn.
    assert np.median(angle[:, names.index("Spine")]) == pytest.approx(10 * 1.18, rel=0.1)
    assert np.median(angle[:, names.index("RKnee")]) == pytest.approx(20 * 1.18, rel=0.1)
    assert angle[:, names.index("RHip")].max() < 1e-3
    same = bodies.bend(np.random.default_rng(14), poses, 0.0)
    np.testing.assert_allclose(same, poses, atol=1e-6)


def test_knees_and_elbows_bend_in_their_plane_and_not_backwards(monkeypatch):
    monkeypatch.setattr(bodies, "_TURNED", ())
    poses = embedded_poses(400, seed=15)
    bent = bodies.bend(np.random.default_rng(16), poses, 40.0)
    for upper, hinge, end in ((1, 2, 3), (4, 5, 6), (11, 12, 13), (14, 15, 16)):
        normals, angles = [], []
        for of in (poses, bent):
            inner, outer = of[:, hinge] - of[:, upper], of[:, end] - of[:, hinge]
            normal = np.cross(inner, outer)
            angles.append(np.arctan2(np.linalg.norm(normal, axis=-1), (inner * outer).sum(-1)))
            norm = np.linalg.norm(normal, axis=-1, keepdims=True)
            normals.append(normal / np.maximum(norm, 1e-9))
        assert np.degrees(angles[1]).max() < 150 + 1e-6
        assert np.degrees(np.std(angles[1] - angles[0])) > 20
        sure = (angles[0] > 0.05) & (angles[1] > 0.05)
        np.testing.assert_allclose(normals[1][sure], normals[0][sure], atol=1e-3)
