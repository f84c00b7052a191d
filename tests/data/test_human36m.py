"""Human3.6M from tiny files in the formats of its three sources."""

import os
import pickle
import shutil

import human36m_files as files
import numpy as np
import pytest

from diffpose_jax.data import prepared
from diffpose_jax.data.human36m import Human36m, raw, released, sequences, wehrbein
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.skeleton import H36M_FROM_32, MPII_TO_H36M


def join(chunks):
    chunks = list(chunks)
    assert all(set(chunk) == set(chunks[0]) for chunk in chunks)
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def output_pose(points_mm):
    """Camera coordinates (.., 17, 3) to hip-centred axes with y up, written out."""
    x, y, z = np.moveaxis(points_mm - points_mm[..., :1, :], -1, 0)
    return np.stack([x, -y, -z], axis=-1)


def write_pickle(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=protocol)


def prepare(source, data_dir, detector=None, **fields):
    builder = Human36m(fields, source, detector, data_dir)
    builder.prepare()
    return builder


# --- names -------------------------------------------------------------------------------


def test_names():
    for subject, action, subaction, names in (
        ("S1", "Directions", 0, ["Directions"]),
        ("S1", "Photo", 1, ["Photo 1", "TakingPhoto 1"]),
        ("S9", "WalkDog", 0, ["WalkDog", "WalkingDog"]),
        ("S1", "Eating", 1, ["Eating 2"]),
        ("S1", "Sitting", 0, ["Sitting 2"]),
        ("S5", "Discussion", 0, ["Discussion 3"]),
        ("S6", "Waiting", 1, ["Waiting 3"]),
        ("S8", "WalkTogether", 0, ["WalkTogether 2"]),
        ("S11", "Phoning", 1, ["Phoning 2"]),
    ):
        sequence = Sequence(subject, action, subaction, "54138969")
        assert sequences.file_names(sequence) == [f"{name}.54138969" for name in names]


def test_inventory():
    subjects = [subject for split in sequences.SPLITS["standard"].values() for subject in split]
    everything = [s for subject in subjects for s in sequences.expected(subject, sequences.ACTIONS)]
    # 7 subjects, 15 actions, twice, 4 cameras.
    assert len(set(everything)) == len(everything) == 840 - 2
    assert Sequence("S5", "Waiting", 1, "55011271") not in everything
    assert Sequence("S11", "Directions", 0, "54138969") not in everything
    assert Sequence("S11", "Directions", 1, "54138969") in everything
    names = {(s.subject, files.file_name(s)) for s in everything}
    assert len(names) == len(everything)


def test_readings_of_every_64th_frame():
    # Two videos of 20 and 21 stored frames: the second begins at row 20.
    frame = np.concatenate([np.arange(3, 83, 4), np.arange(3, 87, 4)])
    row = np.arange(41)
    assert np.flatnonzero(sequences.every_64th_frame(frame)).tolist() == [0, 16, 20, 36]
    assert np.flatnonzero(sequences.every_16th_row(row)).tolist() == [0, 16, 32]


# --- the owners' files -------------------------------------------------------------------

ACTIONS = ("Photo", "Sitting")


@pytest.fixture(scope="module")
def raw_copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("human36m")
    return folder, files.write_raw(folder, ("S1", "S11"), ACTIONS)


@pytest.fixture
def small_copy(tmp_path):
    """A copy with eight recordings that a test may damage."""
    files.write_raw(tmp_path, ("S5",), ("Waiting",), archive=True)
    return tmp_path


def read_raw(found, crop="all_joints", input_px=32):
    """All of some recordings, with places counted from 0."""
    counts = [raw.count_poses(recording.poses_2d) // 4 for recording in found]
    rows = np.cumsum([0, *counts]).tolist()
    return join(
        chunk
        for recording, row in zip(found, rows[:-1], strict=True)
        for chunk in raw.read(recording, row, crop, input_px)
    )


def find(folder, subjects=("S1", "S11"), actions=ACTIONS, poses="mono"):
    return raw.recordings(folder, subjects, actions, poses)


def test_recordings_in_the_order_of_the_published_table(raw_copy):
    folder, written = raw_copy
    found = find(folder)
    assert {recording.sequence for recording in found} == set(written)
    assert len(found) == 32
    names = [recording.video.stem for recording in found]
    # A space comes before a point, and S1 takes its photo under another name.
    assert names[:2] == ["Sitting 1.54138969", "Sitting 1.55011271"]
    assert names[8:9] == ["TakingPhoto 1.54138969"]
    assert names[16:17] == ["Photo 1.54138969"]
    assert names[24:25] == ["Sitting 1.54138969"]
    assert names[28:29] == ["Sitting.54138969"]


def test_universal_poses(raw_copy):
    folder, _ = raw_copy
    poses = [
        read_raw(find(folder, ("S1",), poses=poses))["pose_mm"]
        for poses in ("mono", "mono_universal")
    ]
    np.testing.assert_allclose(poses[1], 0.9 * poses[0], atol=5e-3)


@pytest.mark.parametrize("crop", raw.CROPS)
def test_crops_show_the_right_frame_at_the_right_place(raw_copy, crop):
    folder, written = raw_copy
    found = find(folder)[:5]
    columns = read_raw(found, crop, 128)
    joints = list(range(32)) if crop == "all_joints" else np.array(H36M_FROM_32)[[*MPII_TO_H36M]]
    for i, picture in enumerate(columns["crops"].astype(float)):
        frame = columns["frame"][i]
        keypoints_px = written[found[i // 2].sequence][0][frame]
        low, high = keypoints_px[joints].min(0), keypoints_px[joints].max(0)
        side = round(1.2 * (high - low).max())
        corner = np.round((low + high) / 2 - side / 2)
        # The disc on the hip: alone in red and blue.
        weight = picture[..., 0] + picture[..., 2]
        centre = [(weight.sum(axis) * np.arange(128)).sum() / weight.sum() for axis in (0, 1)]
        # A picture's pixel p covers (p, p + 1) of the resized one's axis.
        seen_px = corner + side * (np.array(centre) + 0.5) / 128 - 0.5
        assert np.abs(seen_px - keypoints_px[0]).max() < 0.7
        # The frame, where nothing else is seen.
        green = picture[..., 1][(picture[..., 0] < 16) & (picture[..., 1] > 0)]
        assert abs(np.median(green) - files.green_of(frame)) < 4


def test_official_archives_and_the_broken_recording(small_copy):
    found = find(small_copy, ("S5",), ("Waiting",))
    assert len(found) == 7
    raw.check(found)
    # The broken one is left out also where its files are there.
    for path in small_copy.rglob("Waiting 2.55011271.*"):
        shutil.copy(path, path.with_stem("Waiting 1.55011271"))
    files.write_cdf(small_copy / "S5/MyPoseFeatures/D2_Positions/_ALL.54138969.cdf", np.ones(3))
    assert find(small_copy, ("S5",), ("Waiting",)) == found


def path_of(folder, kind):
    name = "Waiting 2.54138969"
    return {
        "video": folder / f"S5/Videos/{name}.mp4",
        "2d": folder / f"S5/MyPoseFeatures/D2_Positions/{name}.cdf",
        "3d": folder / f"S5/MyPoseFeatures/D3_Positions_mono/{name}.cdf",
    }[kind]


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def fast_start(path):
    # With the index before the content, a cut file still opens.
    noise = np.random.default_rng(0).integers(0, 255, (12, 128, 128, 3), np.uint8)
    files.write_video(path, noise, movflags="faststart")
    cut(path, 0.5)


def shorten(path):
    files.write_cdf(path, np.ones((1, 3, 64)))
    solid = path.parents[1] / "D3_Positions_mono" / path.name
    files.write_cdf(solid, np.ones((1, 3, 96)))


def leave_out_one(path):
    count = raw.count_poses(path_of(path.parents[2], "2d"))
    files.write_video(path, files.pictures_of(np.ones((count - 1, 32, 2))))


DAMAGES = {
    "cut video": ("video", lambda path: cut(path, 0.5), "cannot be read as a video"),
    "video without its end": ("video", fast_start, "cut off: it holds . of its 12"),
    "short video": ("video", leave_out_one, "frames, fewer than the"),
    "no fourth frame": ("2d", shorten, "at least 4"),
    "no 2D": ("2d", lambda path: path.unlink(), "1 files of 7 recordings"),
    "cut CDF": ("2d", lambda path: cut(path, 0.5), "cannot be read as a CDF"),
    "another variable": (
        "3d",
        lambda path: files.write_cdf(path, np.ones((1, 9, 96)), "Angles"),
        "no variable Pose, only Angles",
    ),
    "17 joints": (
        "3d",
        lambda path: files.write_cdf(path, np.ones((1, 9, 51))),
        r"shape \(1, 9, 51\); 32 joints make it \(1, F, 96\)",
    ),
    "not finite": ("2d", lambda path: files.write_cdf(path, np.full((1, 9, 64), np.nan)), "NaN"),
    "another length": ("3d", lambda path: files.write_cdf(path, np.ones((1, 5, 96))), "5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # cdflib leaves damaged files open
def test_damaged_files(small_copy, damage):
    kind, do, message = DAMAGES[damage]
    path = path_of(small_copy, kind)
    do(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        raw.check(find(small_copy, ("S5",), ("Waiting",)))
    assert str(path) in str(raised.value)


def test_a_crop_beside_the_picture_names_the_frame(small_copy):
    files.write_cdf(path_of(small_copy, "2d"), np.ones((1, 9, 64)) * np.linspace(5000, 5100, 64))
    files.write_cdf(path_of(small_copy, "3d"), np.ones((1, 9, 96)))
    with pytest.raises(ValueError, match=r"Waiting 2\.54138969\.mp4: frame 3"):
        read_raw(find(small_copy, ("S5",), ("Waiting",)))


# --- the released file -------------------------------------------------------------------


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "H36M.h5"
    tables = {f"{table}set": files.released_rows(table, 13) for table in ("train", "test")}
    files.write_released(path, **tables)
    return path, tables


@pytest.mark.parametrize("split", sequences.SPLITS)
def test_prepared_from_the_released_file(released_file, tmp_path, split, monkeypatch):
    monkeypatch.setattr(released, "_ROWS", 3)
    monkeypatch.setattr(released, "_PIECE_ROWS", 7)
    path, tables = released_file
    builder = prepare(path, tmp_path, format="released", split=split, max_dropped_mass=None)
    for subset, subjects in sequences.SPLITS[split].items():
        columns, heatmaps = prepared.read(builder.data_dir, subset)
        table = tables[f"{sequences.table(split, subset)}set"]
        place = np.flatnonzero(np.isin(table["subject"].astype(str), subjects))
        rows = table[place]
        np.testing.assert_array_equal(columns["row"], place)
        np.testing.assert_array_equal(heatmaps(np.arange(len(rows))), rows["heatmap"])
        np.testing.assert_array_equal(columns["frame"], rows["frame_orig"])
        np.testing.assert_array_equal(columns["ambiguous"], rows["hardsubset"][:, 0] == 1)
        for name, field in (("subject", "subject"), ("action", "action"), ("camera", "cam")):
            assert columns[name].tolist() == [text.decode() for text in rows[field]]
        assert columns["subaction"].tolist() == [int(text) for text in rows["subaction"]]
        points_mm = np.float64(rows["gt_3d"]).swapaxes(1, 2)
        np.testing.assert_allclose(columns["pose_mm"], output_pose(points_mm), atol=1e-3)


def test_released_file_that_is_none(tmp_path):
    (tmp_path / "text.h5").write_text("a page of a server that says no")
    with pytest.raises(ValueError, match=r"text.h5 is not an HDF5 file"):
        released.check(tmp_path / "text.h5", "standard")
    rows = files.released_rows("test", 13)
    files.write_released(tmp_path / "cut.h5", trainset=rows, testset=rows)
    cut(tmp_path / "cut.h5", 0.6)
    with pytest.raises(ValueError, match=r"cut.h5 cannot be read as an HDF5 file"):
        released.check(tmp_path / "cut.h5", "standard")


def transposed(rows):
    other = [(n, ("<f4", (17, 3)) if n == "gt_3d" else rows.dtype[n]) for n in rows.dtype.names]
    return np.zeros(len(rows), other)


def without(rows, field):
    rest = [name for name in rows.dtype.names if name != field]
    return rows[rest].astype([(name, rows.dtype[name]) for name in rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"trainset": rows}, "/dataset/testset is missing"),
        (lambda rows: {"trainset": rows, "testset": np.ones(3)}, "or not a table"),
        (
            lambda rows: {"trainset": rows, "testset": without(rows, "heatmap")},
            "testset: column heatmap is missing",
        ),
        (
            lambda rows: {"testset": rows, "trainset": transposed(rows)},
            r"column gt_3d has shape \(17, 3\); it must have shape \(3, 17\)",
        ),
    ],
)
def test_released_tables_that_are_wrong(tmp_path, change, message):
    path = tmp_path / "wrong.h5"
    files.write_released(path, **change(files.released_rows("test", 3)))
    with pytest.raises(ValueError, match=message) as raised:
        released.check(path, "standard")
    assert str(path) in str(raised.value)


# --- the pickles of Wehrbein et al. ------------------------------------------------------


@pytest.fixture(scope="module")
def wehrbein_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wehrbein")
    return folder, files.write_wehrbein(folder)


def gaussian(fit):
    """The fitted function as its authors write it, cell by cell."""
    amplitude, x0, y0, sigma_x, theta, sigma_y = fit[:6]
    y, x = np.mgrid[:64, :64].astype(float)
    cos2, sin2 = np.cos(theta) ** 2, np.sin(theta) ** 2
    a = cos2 / (2 * sigma_x**2) + sin2 / (2 * sigma_y**2)
    b = np.sin(2 * theta) / 4 * (1 / sigma_y**2 - 1 / sigma_x**2)
    c = sin2 / (2 * sigma_x**2) + cos2 / (2 * sigma_y**2)
    return amplitude * np.exp(
        -(a * (x - x0) ** 2 + 2 * b * (x - x0) * (y - y0) + c * (y - y0) ** 2)
    )


def test_rendered_fits():
    rng = np.random.default_rng(3)
    fits = rng.uniform([0.1, 0, 0, 1, -4, 1, 0], [1.2, 63, 63, 9, 4, 9, 1], (5, 7))
    expected = np.stack([gaussian(fit) for fit in fits])
    np.testing.assert_allclose(wehrbein.render(fits), expected, atol=1e-5)
    # A least-squares fit may leave a width negative, or at zero.
    flipped = fits * np.array([1, 1, 1, -1, 1, -1, 1])
    np.testing.assert_allclose(wehrbein.render(flipped), expected, atol=1e-5)
    assert np.isfinite(wehrbein.render(np.zeros((1, 7)))).all()


def test_prepared_from_the_pickles(wehrbein_folder, tmp_path):
    folder, contents = wehrbein_folder
    builder = prepare(folder, tmp_path, format="wehrbein", max_dropped_mass=None)
    columns, heatmaps = prepared.read(builder.data_dir, "test")
    # 2 subjects, 2 actions, 2 subactions, 4 cameras, less the broken one, 3 frames each.
    assert columns["row"].tolist() == list(range(31 * 3))
    assert columns["frame"].tolist() == [3, 7, 11] * 31
    assert columns["subject"].tolist() == ["S9"] * 48 + ["S11"] * 45
    assert columns["camera"][:13:3].tolist() == [*sequences.CAMERAS, sequences.CAMERAS[0]]
    assert columns["subaction"][:13:3].tolist() == [0, 0, 0, 0, 1]
    assert not columns["ambiguous"].any()
    part = contents["test"]["S11"]["Sitting"]["1"]["60457274"]
    points_mm = part["3d_gt"].reshape(3, 3, 17).swapaxes(1, 2)
    np.testing.assert_allclose(columns["pose_mm"][-3:], output_pose(points_mm), atol=1e-3)
    fits = part["gaussfit"].reshape(3, 16, 7)
    np.testing.assert_allclose(heatmaps(np.array([91]))[0, 9], gaussian(fits[1, 9]), atol=5e-4)


def test_ambiguous_frames_have_a_wide_fit(tmp_path):
    contents = files.write_wehrbein(tmp_path)
    fits = contents["test"]["S9"]["Directions"]["0"]["54138969"]["gaussfit"].reshape(3, 16, 7)
    fits[0, 3, 3], fits[1, 3, 4], fits[2, 0, 5] = 5.1, 20.0, 6.0  # the second is an angle
    write_pickle(tmp_path / wehrbein.FILES["test"], contents["test"])
    columns = join(wehrbein.read(tmp_path, "standard", "test"))
    assert np.flatnonzero(columns["ambiguous"]).tolist() == [0, 2]


def test_wehrbein_validation_split(wehrbein_folder):
    columns = join(wehrbein.read(wehrbein_folder[0], "validation", "test"))
    assert set(columns["subject"]) == {"S5", "S8"}
    # After 16 recordings of S1.
    assert columns["row"][0] == 16 * 3
    train = join(wehrbein.read(wehrbein_folder[0], "validation", "train"))
    assert not set(train["row"]) & set(columns["row"])


class Touch:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [3, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("where", ["in a dict", "in an array"])
def test_a_pickle_runs_no_code(tmp_path, where, protocol):
    bomb = Touch(tmp_path / "ran")
    content = {"S9": [bomb]} if where == "in a dict" else np.array([1, bomb], dtype=object)
    write_pickle(tmp_path / "bomb.pickle", content, protocol)
    with pytest.raises(ValueError, match=r"bomb.pickle cannot .*: it holds posix.mkdir, which"):
        wehrbein.load_arrays(tmp_path / "bomb.pickle")
    assert not (tmp_path / "ran").exists()
    # The test itself can fail: an ordinary unpickler runs it.
    with (tmp_path / "bomb.pickle").open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "ran").exists()


OBJECTS = pickle.dumps(np.array([None], dtype=object), protocol=4)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pickle.dumps(eval), "it holds builtins.eval"),
        (pickle.dumps(np.float64(1.0)), "it holds numpy"),
        # Protocol 4 looks names up along their dots.
        (b"\x80\x04\x8c\x05numpy\x8c\x18ndarray.__init__.__new__\x93.", "it holds numpy.ndarray._"),
        # numpy.ndarray((1,), "O", bytes) takes the bytes for an address.
        (b"\x80\x04cnumpy\nndarray\n(K\x01\x85X\x01\0\0\0OC\x08AAAAAAAAtR.", "not callable"),
        # So does an array of objects whose type says that it holds none.
        (
            OBJECTS.replace(b"K?t\x94b", b"K\0t\x94b").replace(b"]\x94Na", b"C\x08AAAAAAAA"),
            "objects",
        ),
        # NumPy would read on behind the list.
        (OBJECTS.replace(b"K\x01\x85", b"K\xff\x85"), "another size than its content"),
        (pickle.dumps(np.arange(10_000))[:9_000], "cannot be read"),
        (b"a page of a server that says no", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_pickles_that_are_refused(tmp_path, made, reason):
    (tmp_path / "odd.pickle").write_bytes(made)
    with pytest.raises(ValueError, match=reason) as raised:
        wehrbein.load_arrays(tmp_path / "odd.pickle")
    assert "odd.pickle cannot be read" in str(raised.value)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_loaded(tmp_path, protocol):
    rng = np.random.default_rng(1)
    nested = {"a": np.arange(3)}
    content = {
        "array": rng.normal(size=(3, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "objects": np.array(["/S9/4.jpg", None, nested], dtype=object),
        "list": [1, 2.5, "text", b"bytes", (True, None)],
    }
    if protocol >= 4:  # older ones name the sets' classes
        content["list"] += [{3, 4}, frozenset({5})]
    write_pickle(tmp_path / "fine.pickle", content, protocol)
    loaded = wehrbein.load_arrays(tmp_path / "fine.pickle")
    np.testing.assert_array_equal(loaded["objects"][2].pop("a"), nested.pop("a"))
    np.testing.assert_equal(loaded, content)


def test_arrays_of_older_numpy_are_loaded(tmp_path):
    """NumPy 1 named its modules numpy.core, today's are numpy._core."""
    array = np.arange(6.0).reshape(2, 3)
    today = pickle.dumps(array, protocol=3)
    assert b"numpy._core" in today
    (tmp_path / "old.pickle").write_bytes(today.replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(wehrbein.load_arrays(tmp_path / "old.pickle"), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.pop("3d_gt"), r"create_data\.py .* 3d_gt\): KeyError"),
        (lambda part: part["imgpath"].pop(), "cannot reshape array"),
        (lambda part: part.update(gaussfit=np.ones((3, 96))), "cannot reshape array"),
        (lambda part: part["gaussfit"].__setitem__((1, 1), np.nan), "it holds NaN"),
        (lambda part: part["imgpath"].__setitem__(0, "/S9/x.jpg"), "invalid literal for int"),
    ],
)
def test_wehrbein_content_that_is_wrong(tmp_path, change, message):
    contents = files.write_wehrbein(tmp_path)
    change(contents["test"]["S9"]["Sitting"]["1"]["58860488"])
    write_pickle(tmp_path / wehrbein.FILES["test"], contents["test"])
    with pytest.raises(ValueError, match=message) as raised:
        wehrbein.check(tmp_path, "standard")
    assert "testset_h36m.pickle: S9/Sitting/1/58860488" in str(raised.value)


def test_missing_and_empty_recordings(tmp_path):
    contents = files.write_wehrbein(tmp_path, frames=0)
    with pytest.raises(ValueError, match=r"trainset_h36m.pickle holds no frames"):
        wehrbein.check(tmp_path, "validation")
    del contents["train"]["S7"]["Photo"]
    write_pickle(tmp_path / wehrbein.FILES["train"], contents["train"])
    with pytest.raises(ValueError, match=r"trainset_h36m.pickle: S7/Photo/0/54138969 is missing"):
        wehrbein.check(tmp_path, "validation")


# --- the builder -------------------------------------------------------------------------


class RedDetector:
    """Finds every joint where a crop is red."""

    fingerprint = "red-1"
    input_px = 64

    def heatmaps(self, crops):
        return np.repeat(crops[:, None, :, :, 0], 16, axis=1) / np.float32(255)


@pytest.fixture(scope="module")
def whole_copy(tmp_path_factory):
    """All seven people in one action."""
    folder = tmp_path_factory.mktemp("whole")
    subjects = [subject for split in sequences.SPLITS["standard"].values() for subject in split]
    return folder, files.write_raw(folder, subjects, ("Waiting",))


RAW = {"actions": ("Waiting",), "input_px": 64}


@pytest.fixture(scope="module")
def prepared_raw(whole_copy, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    return prepare(whole_copy[0], data_dir, RedDetector(), **RAW)


def test_prepared_from_raw(whole_copy, prepared_raw):
    _, written = whole_copy
    for split, subjects in sequences.SPLITS["standard"].items():
        columns, _ = prepared.read(prepared_raw.data_dir, split)
        count = 2 * (8 * len(subjects) - (split == "train"))  # without the broken one
        assert len(columns["row"]) == count
        assert columns["row"].tolist() == list(range(count))
        assert list(dict.fromkeys(columns["subject"])) == list(subjects)
        # 8 to 11 frames: 3 and 7 are stored.
        assert columns["frame"].tolist() == [3, 7] * (count // 2)
        assert not columns["ambiguous"].any()
        for i in range(0, count, 5):
            named = (columns[name][i] for name in ("subject", "action", "subaction", "camera"))
            points_mm = written[Sequence(*named)][1][columns["frame"][i]]
            pose_mm = output_pose(points_mm[[*H36M_FROM_32]])
            np.testing.assert_allclose(columns["pose_mm"][i], pose_mm, atol=2e-3)


def test_prepared_data_need_no_source(whole_copy, prepared_raw):
    again = prepare("gone", str(prepared_raw.data_path.parents[2]), RedDetector(), **RAW)
    assert again.data_path == prepared_raw.data_path


def test_validation_split_from_raw(whole_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_FRAMES", 1)
    changes = {"split": "validation", "max_dropped_mass": None} | RAW
    builder = prepare(whole_copy[0], tmp_path, RedDetector(), **changes)
    test, _ = prepared.read(builder.data_dir, "test")
    train, _ = prepared.read(builder.data_dir, "train")
    assert set(test["subject"]) == {"S5", "S8"}
    # S1's eight recordings come first in the table, and S5's seven.
    assert test["row"].tolist() == [*range(16, 30), *range(62, 78)]
    assert train["row"].tolist() == [*range(16), *range(30, 62)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "flow"}, "human36m.format must be one of raw, released, wehrbein, not 'flow'"),
        ({"split": "dev"}, "human36m.split must be one of standard, validation, not 'dev'"),
        ({"actions": ("Dancing",)}, r"actions must be some of .*, not \('Dancing',\)"),
        ({"actions": ()}, "actions must be some of"),
        ({"stride": 4}, "unknown field stride; the fields are max_dropped_mass, format"),
        ({"input_px": 255}, "needs --detector, one that reads crops of input_px = 255 px"),
        ({"format": "released", "crop": "detector_joints"}, "crop cannot be chosen"),
        ({"format": "wehrbein", "input_px": 255}, "input_px cannot be chosen"),
    ],
)
def test_configurations_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, tmp_path, RedDetector(), **changes)
    with pytest.raises(ValueError, match="the raw form needs --detector"):
        prepare(tmp_path, tmp_path)


def test_names_tell_contents_apart(tmp_path, wehrbein_folder):
    detector = RedDetector()

    def name(source=tmp_path, **fields):
        return Human36m(fields, source, detector, tmp_path).builder_config.name

    raw_fields = [
        {},
        {"split": "validation"},
        {"poses": "mono_universal"},
        {"crop": "detector_joints"},
        {"actions": ("Eating",)},
        {"max_dropped_mass": 0.01},
    ]
    raw_names = {name(input_px=64, **fields) for fields in raw_fields}
    assert len(raw_names) == 6
    assert name(tmp_path / "elsewhere", input_px=64) in raw_names
    detector.fingerprint = "red-2"
    assert name(input_px=64) not in raw_names

    # Two released files of one size, whose heatmaps are of different detectors.
    rows = files.released_rows("test", 6)
    paths = [tmp_path / path for path in ("a.h5", "b.h5", "c.h5")]
    for path in paths:
        rows["heatmap"] *= -1
        files.write_released(path, compression=None, trainset=rows, testset=rows)
    released_names = [name(path, format="released") for path in paths]
    assert released_names[0] == released_names[2] != released_names[1]
    assert name(wehrbein_folder[0], format="wehrbein").startswith("wehrbein_standard_")


def test_sources_are_checked_before_anything_is_written(tmp_path):
    class NoDetector(RedDetector):
        def heatmaps(self, crops):
            raise AssertionError("it must not come to this")

    with pytest.raises(FileNotFoundError, match=r"gone.h5: there is no such file"):
        prepare(tmp_path / "gone.h5", tmp_path / "data", format="released")
    folder = tmp_path / "copy"
    files.write_raw(folder, ("S1", "S5", "S6", "S7", "S8"), ("Waiting",))
    path = next((folder / "S8/Videos").iterdir())
    cut(path, 0.5)
    with pytest.raises(ValueError, match="cannot be read as a video") as raised:
        prepare(folder, tmp_path / "data", NoDetector(), split="validation", **RAW)
    assert str(path) in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"S9 has no folder Poses_D2_Positions nor MyPose"):
        prepare(folder, tmp_path / "data", NoDetector(), **RAW)
    assert not list((tmp_path / "data").rglob("*.array_record"))
