"""Cleaning of recorded motion: each rule on a made clip, folders, lists, and the command."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from motion_files import cmu_frame, write_cmu
from programs import environment

from configs import h36m
from diffpose_jax.data.motion import cleaning, clips
from diffpose_jax.data.motion.bodies import BONES_MM
from diffpose_jax.data.motion.cleaning import clean, clean_folder
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS

PICTURES = Path(h36m.__file__).with_name("pictures_clips.txt")
CLIPS = clips.load_embedded()
DANCE = CLIPS[0]
ARM_MM = BONES_MM["LElbow"] + BONES_MM["LWrist"]


def standing(degrees):
    """A person whose straight arms are raised sideways, one frame for each angle: (F, 17, 3)."""
    degrees = np.atleast_1d(np.asarray(degrees, float))
    swing = np.stack([np.sin(np.radians(degrees)), 0 * degrees, -np.cos(np.radians(degrees))], -1)
    toward = dict.fromkeys(("Spine", "Thorax", "Head"), (0, 0, 1)) | {"Nose": (0, 0.6, 0.8)}
    for side, sign in (("L", -1), ("R", 1)):  # it faces y
        toward |= {f"{side}Hip": (sign, 0, 0), f"{side}Shoulder": (0.96 * sign, 0, -0.28)}
        toward |= dict.fromkeys((f"{side}Knee", f"{side}Ankle"), (0, 0, -1))
        toward |= dict.fromkeys((f"{side}Elbow", f"{side}Wrist"), swing * [sign, 1, 1])
    positions_mm = np.zeros((len(degrees), 17, 3))
    positions_mm[:, 0, 2] = 977
    for parent, joint in H36M_BONES:
        name = H36M_JOINTS[joint]
        positions_mm[:, joint] = positions_mm[:, parent] + BONES_MM[name] * np.array(toward[name])
    return positions_mm


def recorded(positions_mm, fps=60.0, name="a"):
    return clips.Clip(name, "train", fps, positions_mm.astype(np.float32))


DOWN = np.full(40, 10.0)  # hanging arms, longer than half a second at 60 a second


def lengths(pieces):
    return [len(piece.positions_mm) for piece in pieces]


def dropped(counts):
    """Frames dropped as rest pose, as short, by thinning; they and what is kept are all."""
    return counts[cleaning._AT_REST], counts[cleaning._SHORT], counts[cleaning._THINNED]


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_real_motion_loses_nothing_but_what_the_rules_say(clip):
    pieces, counts = clean(clip)
    if clip.name == "humanoid3d_spinkick":  # three steps of 12.1 to 12.5 m/s
        assert (lengths(pieces), counts["cuts"], dropped(counts)) == ([46, 30], 3, (0, 2, 0))
        return
    (piece,) = pieces
    assert (counts["cuts"], dropped(counts)) == (0, (0, 0, 0))
    assert (piece.name, piece.split, piece.fps) == (clip.name, clip.split, clip.fps)
    # Rounded to 0.1 mm when it was stored, which is up to 0.2 for a bone, and bones add up.
    np.testing.assert_allclose(piece.positions_mm, clip.positions_mm, atol=1)


def test_bones_get_one_set_of_lengths_and_keep_their_directions():
    points = DANCE.positions_mm.astype(np.float64)
    factors = np.random.default_rng(5).uniform(0.7, 1.3, 17)
    other = np.zeros_like(points)
    other[:, 0] = points[:, 0]
    for parent, joint in H36M_BONES:
        bone = factors[joint] * (points[:, joint] - points[:, parent])
        other[:, joint] = other[:, parent] + bone
    ((piece,), _) = clean(recorded(other))
    for parent, joint in H36M_BONES:
        bone = piece.positions_mm[:, joint] - piece.positions_mm[:, parent]
        wanted = points[:, joint] - points[:, parent]
        wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
        # float32 rounds a coordinate of up to 2 m by 6e-5 mm.
        np.testing.assert_allclose(bone, BONES_MM[H36M_JOINTS[joint]] * wanted, atol=1e-3)


def test_a_rest_pose_at_the_start_goes():
    t_pose = np.full(12, 88.0)
    cut, counts = clean(recorded(standing([*t_pose, *DOWN])))
    assert (lengths(cut), counts["cuts"], dropped(counts)) == ([40], 1, (12, 0, 0))
    assert cut[0].name == "a"
    # Without a cut: an actor lets the arms sink by 3 degrees a frame and lifts them again.
    sinking = np.array([*t_pose, *np.arange(87, 10, -3), *DOWN, *np.arange(12, 88, 3)])
    (piece,), counts = clean(recorded(standing(sinking)))
    rest = int(np.argmax(sinking < 70))
    assert dropped(counts) == (rest, 0, 0)  # the T at the end is motion
    assert len(piece.positions_mm) == len(sinking) - rest
    # Longer than half a second between cuts, and nothing else.
    for angles, left in (([*DOWN, *np.full(50, 90), *DOWN], [40, 40]), (np.full(50, 90), [])):
        pieces, counts = clean(recorded(standing(angles)))
        assert (lengths(pieces), dropped(counts)) == (left, (50, 0, 0))


def test_bent_knees_are_no_rest_pose():
    points = standing(np.full(40, 90.0))
    for knee, ankle in ((2, 3), (5, 6)):
        points[:, ankle] = points[:, knee] + np.array([0, -0.5, -0.866]) * BONES_MM["RAnkle"]
    assert dropped(clean(recorded(points))[1]) == (0, 0, 0)


def test_a_cut_divides_and_short_pieces_go():
    angles = [*DOWN, *np.full(29, 170.0), *DOWN, *np.full(30, 170.0)]
    pieces, counts = clean(recorded(standing(angles)))
    assert [piece.name for piece in pieces] == ["a", "a.2", "a.3"]
    assert lengths(pieces) == [40, 40, 30]
    assert (counts["cuts"], counts[cleaning._KEPT], dropped(counts)) == (3, 110, (0, 29, 0))


@pytest.mark.parametrize(("rise_mm", "cuts"), [(190, 0), (210, 1)])
def test_the_height_of_the_hip_counts(rise_mm, cuts):
    points = standing([*DOWN, *DOWN])
    points[40:, :, 2] += rise_mm  # 12 m/s are 200 mm a frame
    assert clean(recorded(points))[1]["cuts"] == cuts


def test_the_poses_of_a_smeared_cut_go():
    before, after = standing(DOWN - 60), standing(DOWN + 50)
    shares = np.arange(1, 6)[:, None, None] / 6
    smear = before[-1] + shares * (after[0] - before[-1])
    whole = np.concatenate([before, before, smear, after, after])
    pieces, counts = clean(recorded(whole, fps=120.0))
    assert (lengths(pieces), counts["cuts"], dropped(counts)) == ([80, 80], 6, (0, 5, 0))


@pytest.mark.parametrize(("speed", "cuts"), [(9, 0), (11.9, 0), (12.1, 238)])
def test_fast_motion_stays(speed, cuts):
    """The wrists go up and down at one speed, between 15 and 60 degrees."""
    step = np.degrees(2 * np.arcsin(speed * 1000 / 120 / ARM_MM / 2))
    there = 15 + step * np.arange(5)
    angles = np.resize([*there, *there[-2:0:-1]], 239)
    clip = recorded(standing(angles), fps=120.0)
    speeds = cleaning.step_speeds(clip.positions_mm.astype(np.float64), clip.fps)
    np.testing.assert_allclose(speeds, speed, rtol=1e-4)
    pieces, counts = clean(clip)
    assert counts["cuts"] == cuts
    assert lengths(pieces) == ([] if cuts else [239])


def test_pieces_are_thinned():
    pieces, counts = clean(recorded(standing([*DOWN, *(DOWN + 150)])), fps=20.0)
    assert [(len(piece.positions_mm), piece.fps) for piece in pieces] == [(14, 20.0)] * 2
    assert (counts[cleaning._KEPT], dropped(counts)) == (28, (0, 0, 52))


def test_a_bone_without_length_is_an_error():
    points = standing(DOWN)
    points[7, 9] = points[7, 8]
    with pytest.raises(ValueError, match="a: the bone that ends in Nose has no length"):
        clean(recorded(points))


# Folders.


def save(path, positions_mm, fps=60.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, positions_mm=positions_mm, fps=fps)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "recorded"
    save(folder / "deep/cut.npz", standing([*DOWN, *(DOWN + 150)]))
    save(folder / "dance.npz", DANCE.positions_mm)
    save(folder / "rest.npz", standing(np.full(50, 90.0)))
    save(folder / "test/held.npz", standing(DOWN))
    write_cmu(folder / "01", "01_01", [cmu_frame()] * 70)
    return folder


def files(folder):
    """What lies in a folder: {path: (content, time of the last change)}."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


def test_a_cleaned_folder_is_read_as_it_is(source, tmp_path):
    out = tmp_path / "out"
    counts = clean_folder(source, out, fps=20.0)
    assert counts["recordings cleaned"] == 4
    assert counts["recordings of which nothing is left"] == 1
    assert counts["clips written"] == 5
    assert (counts["cuts"], counts[cleaning._AT_REST]) == (1, 50)
    assert counts[cleaning._KEPT] + sum(dropped(counts)) == 80 + 98 + 50 + 40 + 70
    names = ["01/01_01", "dance", "deep/cut", "deep/cut.2", "test/held"]
    assert sorted(files(out)) == sorted([*(f"{name}.npz" for name in names), "cleaning.json"])
    found = {clip.name: clip for clip in clips.read_folder(out)}
    assert [name for name, clip in found.items() if clip.split == "test"] == ["held"]
    assert {name: (len(clip.positions_mm), clip.fps) for name, clip in found.items()} == {
        "01/01_01": (12, 20.0), "dance": (33, 20.0), "deep/cut": (14, 20.0),
        "deep/cut.2": (14, 20.0), "held": (14, 20.0),
    }  # fmt: skip
    (expected,), _ = clean(dataclasses.replace(DANCE, fps=60.0), 20.0)
    with np.load(out / "dance.npz") as written:
        np.testing.assert_array_equal(written["positions_mm"], expected.positions_mm, strict=True)


def test_started_again_it_goes_on_with_what_is_missing(source, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    clean_folder(source, whole)
    write, calls = cleaning.write_atomic, itertools.count()

    def stopped(path, content):
        if next(calls) == 3:  # one piece of `cut` is there, the other one is not
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(cleaning, "write_atomic", stopped)
    with pytest.raises(KeyboardInterrupt):
        clean_folder(source, out)
    monkeypatch.undo()
    before = files(out)
    assert sorted(before) == ["01/01_01.npz", "cleaning.json", "dance.npz", "deep/cut.2.npz"]
    counts = clean_folder(source, out)
    assert counts["recordings that were there already"] == 2
    after = files(out)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in files(whole).items()
    }
    assert all(after[name] == before[name] for name in ("01/01_01.npz", "dance.npz"))


def test_a_list_names_recordings(source, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("# a comment\n\n01_*  # in whatever folder\ndeep/*\nhel[cd]\n")
    counts = clean_folder(source, tmp_path / "out", names=names)
    assert counts["recordings cleaned"] == 3
    found = sorted(files(tmp_path / "out"))
    assert found[:3] == ["01/01_01.npz", "cleaning.json", "deep/cut.2.npz"]
    assert found[3:] == ["deep/cut.npz", "test/held.npz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dance\n1_*\nDance\n", r"for 1_\*, Dance; it has: 01/01_01, dance, deep/cut"),
        ("# nothing\n", "for an empty list; it has"),
        ("\0", "not a text file"),
    ],
)
def test_a_list_that_does_not_fit_is_one_error(source, tmp_path, content, message):
    names = tmp_path / "list.txt"
    names.write_text(content)
    with pytest.raises(ValueError, match=rf"list\.txt.*{message}"):
        clean_folder(source, tmp_path / "out", names=names)
    assert not (tmp_path / "out").exists()


def test_the_list_of_the_pictures_weights_fits_the_archive_of_cmu():
    subjects = [*range(1, 10), 10, 101, 102, 105]
    names = [f"{subject:02}/{subject:02}_{trial:02}" for subject in subjects for trial in (1, 2)]
    found = {name: Path(name) for name in names}
    chosen = cleaning._chosen(found, PICTURES, Path())
    assert sorted({name[:-3] for name in chosen}) == [
        f"{subject:02}/{subject:02}" for subject in (1, 2, 3, 5, 6, 7, 8, 9)
    ]
    assert len(chosen) == 16


def test_a_file_that_cannot_be_read_is_named(source, tmp_path):
    (source / "deep" / "cut.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"deep/cut\.npz is not a motion file"):
        clean_folder(source, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["01/01_01.npz", "cleaning.json", "dance.npz"]


def test_a_folder_holds_one_kind_of_cleaned_motion(source, tmp_path):
    clean_folder(source, tmp_path / "out", fps=20.0)
    with pytest.raises(ValueError, match=r"out holds motion cleaned with \{'fps': 20.0\}"):
        clean_folder(source, tmp_path / "out")
    for inside in (source, source / "deep" / "er"):
        with pytest.raises(ValueError, match="would be read as recordings"):
            clean_folder(source, inside)


def test_the_command_prints_what_it_dropped(source, tmp_path):
    (tmp_path / "list.txt").write_text("cut\nrest\n")
    command = [sys.executable, "-m", "experiments.prepare", "--dataset=motion", "--clips=list.txt"]
    command += [f"--source={source}", "--clean=out", "--motion.fps=20"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert {"1 cuts", "28 frames kept", "50 frames dropped: rest poses"} <= set(printed)
    assert {"0 frames dropped: in pieces under 0.5 s", "52 frames dropped: thinned"} <= set(printed)
    assert len(clips.read_folder(tmp_path / "out")) == 2
