"""Tiny copies of MPI-INF-3DHP's test set in its exact format; expected values by hand."""

import os
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image

from diffpose_jax.data import mpi_inf_3dhp, prepared
from diffpose_jax.data.mpi_inf_3dhp import MpiInf3dhp
from diffpose_jax.skeleton import H36M_JOINTS

# A person who faces the camera, in the data set's words: x right, y down in the image, mm.
STANDING = {
    "head_top": (0, -700, 0),
    "neck": (0, -500, 10),
    "right_shoulder": (-180, -480, 5),
    "right_elbow": (-200, -200, 0),
    "right_wrist": (-210, 40, -30),
    "left_shoulder": (180, -480, 5),
    "left_elbow": (200, -200, 0),
    "left_wrist": (210, 40, -30),
    "right_hip": (-100, 0, 0),
    "right_knee": (-110, 450, 0),
    "right_ankle": (-120, 850, 40),
    "left_hip": (100, 0, 0),
    "left_knee": (110, 450, 0),
    "left_ankle": (120, 850, 40),
    "pelvis": (0, 0, 0),
    "spine": (0, -250, 20),
    "head": (0, -600, -20),
}
FRAMES = {"TS1": 3, "TS2": 2, "TS3": 4, "TS4": 1, "TS5": 2, "TS6": 2}
INVALID = {"TS1": [0], "TS3": [1, 2], "TS6": [1]}


def arrays(subject):
    """The arrays of `annot_data.mat` as MATLAB has them, (3, 17, 1, F) and (1, F)."""
    frames = FRAMES[subject]
    body = np.array([STANDING[name] for name in mpi_inf_3dhp.JOINTS], np.float64)
    # The frame tells in the depth: frame f stands 4000 + f mm away.
    points = np.stack([body + np.array([50.0, -30.0, 4000.0 + frame]) for frame in range(frames)])
    pixels = 1000.0 * points[..., :2] / 4000.0 + (512.0, 500.0)
    valid = np.ones((1, frames), np.uint8)
    valid[0, INVALID.get(subject, [])] = 0
    points[valid[0] == 0] = np.nan  # frames that are not valid may hold anything
    return {
        "annot2": pixels.T[:, :, None],
        "annot3": points.T[:, :, None],
        "univ_annot3": 0.9 * points.T[:, :, None],
        "valid_frame": valid,
        "activity_annotation": 1.0 + np.arange(frames)[None] % 7,
    }


def write_mat(path, content):
    """MATLAB version 7.3: HDF5 behind a block of 512 bytes, the axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in content.items():
            file[name] = array.T
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def draw(subject, frame):
    """64 x 48 pixels, of another red in every frame."""
    return Image.new("RGB", (64, 48), (40 * int(subject[2]) + frame, 30, 200))


@pytest.fixture
def copy(tmp_path):
    source = tmp_path / "mpi_inf_3dhp_test_set"
    for subject, frames in FRAMES.items():
        folder = source / subject
        (folder / "imageSequence").mkdir(parents=True)
        write_mat(folder / "annot_data.mat", arrays(subject))
        for frame in set(range(frames)) - set(INVALID.get(subject, [])):
            path = folder / "imageSequence" / f"img_{frame + 1:06d}.jpg"
            draw(subject, frame).save(path, quality=95)
    return source


class FakeDetector:
    """Heatmaps that are what the detector was shown: red, green and blue of the crop."""

    fingerprint = "fake-1"
    input_px = 16
    calls = 0

    def heatmaps(self, crops):
        self.calls += 1
        heatmaps = np.zeros((len(crops), 16, 64, 64), np.float32)
        heatmaps[:, :3, :16, :16] = crops.transpose(0, 3, 1, 2)
        return heatmaps


def read_annotations(source, annotation="univ_annot3"):
    return MpiInf3dhp({"annotation": annotation}, source, FakeDetector()).photographs()


def test_joints_are_reordered_by_name():
    meaning = {"head_top": "Head", "head": "Nose", "neck": "Thorax", "pelvis": "Hip"}
    names = []
    for source in mpi_inf_3dhp.TO_H36M:
        joint = mpi_inf_3dhp.JOINTS[source]
        side, _, part = joint.rpartition("_")
        sided = {"left": "L", "right": "R"}.get(side)
        names.append(sided + part.capitalize() if sided else meaning.get(joint, joint.capitalize()))
    assert tuple(names) == H36M_JOINTS


def test_first_recording_by_hand(copy):
    first = read_annotations(copy, "annot3")[0]
    columns = first.columns
    assert first.name == columns["subject"][0] == "TS1"
    # Of three frames, the first of which is not valid.
    np.testing.assert_array_equal(columns["frame"], [2, 3])
    np.testing.assert_array_equal(columns["activity"], [2, 3])
    assert [path.name for path in first.paths] == ["img_000002.jpg", "img_000003.jpg"]
    pose = dict(zip(H36M_JOINTS, columns["pose_mm"][0].tolist(), strict=True))
    assert pose["Hip"] == [0, 0, 0]
    assert pose["Nose"] == [0, 600, 20]
    assert pose["RWrist"] == [-210, -40, 30]
    assert pose["LAnkle"] == [120, -850, -40]
    # y 317.5 to 705 and x 472 to 577 (512 + 12.5 +- 52.5): side 1.2 x 387.5 = 465.
    np.testing.assert_array_equal(first.squares.side_px, [465, 465])
    np.testing.assert_array_equal(first.squares.corner_px[0], [292, 279])


def annotate(**content):
    return lambda folder: write_mat(folder / "annot_data.mat", content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "imageSequence"), r"lacks.*number 2, 3\."),
        (
            lambda folder: draw("TS1", 3).save(folder / "imageSequence" / "img_000004.jpg"),
            "there are 3 annotated frames.*images of number 4",
        ),
        (lambda folder: (folder / "annot_data.mat").unlink(), "there is no such file"),
        (
            lambda folder: (folder / "annot_data.mat").write_bytes(b"MATLAB 5.0"),
            r"is not an HDF5 .*save with -v7\.3",
        ),
        (lambda folder: os.truncate(folder / "annot_data.mat", 4000), "cannot be read as an HDF5"),
        (annotate(activity_annotation=np.ones((1, 3))), "has no array valid_frame; it has act"),
        (
            annotate(**arrays("TS1") | {"annot3": np.zeros((3, 28, 1, 3))}),
            r"annot3 is \(3, 1, 28, 3\); it must be",
        ),
        (
            annotate(**arrays("TS1") | {"annot2": np.zeros((2, 17, 1, 5))}),
            r"annot2 is \(5, 1, 17, 2\); it must be \(3, ",
        ),
        (
            annotate(**arrays("TS1") | {"univ_annot3": np.full((3, 17, 1, 3), np.nan)}),
            r"not finite in valid frames, images of number 2, 3\.",
        ),
    ],
)
def test_files_that_are_refused(copy, damage, message):
    damage(copy / "TS1")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        read_annotations(copy)
    assert str(copy / "TS1") in str(raised.value)


@pytest.fixture
def in_view(copy):
    """A copy whose people stand in their images of 64 x 48 pixels: x 10 to 24, y 6 to 46."""
    for subject in FRAMES:
        pixels = arrays(subject)["annot2"].T
        low, high = pixels.min((0, 1, 2)), pixels.max((0, 1, 2))
        pixels = (pixels - low) / (high - low) * (14.0, 40.0) + (10.0, 6.0)
        write_mat(copy / subject / "annot_data.mat", arrays(subject) | {"annot2": pixels.T})
    return copy


def prepare(source, data_dir, detector=None, **fields):
    builder = MpiInf3dhp(fields, source, detector or FakeDetector(), data_dir)
    builder.prepare()
    return builder


def test_prepared_examples(in_view, tmp_path):
    builder = prepare(in_view, tmp_path / "data", max_dropped_mass=None)
    assert list(builder.info.splits) == ["test"]
    folder = prepared.find(tmp_path / "data", "mpi_inf_3dhp", {"annotation": "univ_annot3"})
    columns, heatmaps = prepared.read(folder, "test")
    assert columns["subject"].tolist() == [f"TS{n}" for n in (1, 1, 2, 2, 3, 3, 4, 5, 5, 6)]
    for name in ("frame", "activity"):
        assert columns[name].tolist() == [2, 3, 1, 2, 1, 4, 1, 1, 2, 1]
    scenes = ["green_screen"] * 4 + ["no_green_screen"] * 3 + ["outdoor"] * 3
    assert columns["scene"].tolist() == scenes
    poses = [recording.columns["pose_mm"] for recording in read_annotations(in_view)]
    np.testing.assert_array_equal(columns["pose_mm"], np.concatenate(poses).astype(np.float32))
    # The square is 1.2 x 40 = 48 px about (17, 26), from (-7, 2); three pixels make one of its 16.
    # So columns 0 and 1 and a third of column 2 lie beside the image, and two thirds of row 15.
    seen = heatmaps(np.arange(10))[:, :3, :16, :16]
    for frame, subject, crop in zip(columns["frame"], columns["subject"], seen, strict=True):
        colour = np.array(draw(subject, frame - 1).getpixel((0, 0)))
        assert np.abs(crop[:, 1:14, 4:] - colour[:, None, None]).max() <= 4
        np.testing.assert_array_equal(crop[:, :, 0], 0)
        # A pixel weighs 1 - distance / 3: here 2/3, 1/3 in the image and 1, 2/3 below it.
        np.testing.assert_allclose(crop[:, 15, 8], colour * 3 / 8, atol=3)


def test_prepared_once_for_each_annotation(in_view, tmp_path):
    detector = FakeDetector()
    published = prepare(in_view, tmp_path, detector)
    measured = prepare(in_view, tmp_path, detector, annotation="annot3")
    calls = detector.calls
    shutil.rmtree(in_view)
    prepare(in_view, tmp_path, detector, annotation="univ_annot3")
    assert detector.calls == calls == 12  # six recordings twice, and nothing the third time
    one, other = (prepared.read(b.data_dir, "test")[0]["pose_mm"] for b in (published, measured))
    np.testing.assert_allclose(one, 0.9 * other, rtol=1e-5)


def test_what_it_cannot_be_made_with(tmp_path):
    with pytest.raises(ValueError, match=r"mpi_inf_3dhp\.annotation must be one of .* 'annot2'"):
        prepare(tmp_path, tmp_path, annotation="annot2")
    with pytest.raises(ValueError, match="the pictures need a detector: give --detector"):
        MpiInf3dhp({}, tmp_path)


def test_images_are_looked_at_before_the_detector_runs(in_view, tmp_path):
    detector = FakeDetector()
    path = in_view / "TS6" / "imageSequence" / "img_000001.jpg"
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"TS6/imageSequence/img_000001\.jpg is not a picture"):
        prepare(in_view, tmp_path, detector)
    # People about (512, 500), as in large images.
    write_mat(in_view / "TS6" / "annot_data.mat", arrays("TS6"))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"TS6.*img_000001\.jpg is 64 x 48 px.* lies outside"):
        prepare(in_view, tmp_path, detector)
    assert not detector.calls
