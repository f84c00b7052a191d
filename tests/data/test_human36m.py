"""Human3.6M from tiny files in the formats of its three sources."""

import os
import pickle
import shutil
from pathlib import Path

import human36m_files as files
import numpy as np
import pytest

from diffpose_jax.data import prepared
from diffpose_jax.data.human36m import Human36m, raw, released, sequences, wehrbein
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.skeleton import H36M_FROM_32, MPII_TO_H36M

SUBJECTS = [subject for split in sequences.SPLITS["standard"].values() for subject in split]
ACTIONS = ("Photo", "Sitting")


def join(chunks):
    chunks = list(chunks)
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def output_pose(points_mm):
    """Camera coordinates (.., 17, 3) to hip-centred axes with y up, written out."""
    x, y, z = np.moveaxis(points_mm - points_mm[..., :1, :], -1, 0)
    return np.stack([x, -y, -z], axis=-1)


def prepare(source, data_dir, detector=None, **fields):
    builder = Human36m(fields, source, detector, data_dir)
    builder.prepare()
    return builder


def test_names():
    for subject, action, subaction, names in (
        ("S1", "Directions", 0, ["Directions"]),
        ("S1", "Photo", 1, ["Photo 1", "TakingPhoto 1"]),
        ("S9", "WalkDog", 0, ["WalkDog", "WalkingDog"]),
        ("S1", "Eating", 1, ["Eating 2"]),
        ("S5", "Discussion", 0, ["Discussion 3"]),
        ("S6", "Waiting", 1, ["Waiting 3"]),
        ("S8", "WalkTogether", 0, ["WalkTogether 2"]),
        ("S11", "Phoning", 1, ["Phoning 2"]),
    ):
        sequence = Sequence(subject, action, subaction, "54138969")
        assert sequences.file_names(sequence) == [f"{name}.54138969" for name in names]


def test_inventory():
    everything = [s for subject in SUBJECTS for s in sequences.expected(subject, sequences.ACTIONS)]
    # 7 subjects, 15 actions, twice, 4 cameras.
    assert len(set(everything)) == len(everything) == 840 - 2
    assert Sequence("S5", "Waiting", 1, "55011271") not in everything
    assert Sequence("S11", "Directions", 0, "54138969") not in everything
    names = {(s.subject, files.file_name(s)) for s in everything}
    assert len(names) == len(everything)


def test_readings_of_every_64th_frame():
    # Two videos of 20 and 21 stored frames: the second begins at row 20.
    frame = np.concatenate([np.arange(3, 83, 4), np.arange(3, 87, 4)])
    row = np.arange(41)
    assert np.flatnonzero(sequences.every_64th_frame(frame)).tolist() == [0, 16, 20, 36]
    assert np.flatnonzero(sequences.every_16th_row(row)).tolist() == [0, 16, 32]


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
    chunks = (chunk for recording in found for chunk in raw.read(recording, 0, crop, input_px))
    return join(chunks)


def find(folder, subjects=("S1", "S11"), actions=ACTIONS, poses="mono"):
    return raw.recordings(folder, subjects, actions, poses)


def test_recordings_in_the_order_of_the_published_table(raw_copy):
    folder, written = raw_copy
    found = find(folder)
    assert {recording.sequence for recording in found} == set(written)
    names = [recording.video.stem for recording in found]
    # A space comes before a point, and S1 takes its photo under another name.
    assert len(names) == 32
    assert names[:2] == ["Sitting 1.54138969", "Sitting 1.55011271"]
    assert names[8::8] == [f"{name}.54138969" for name in ("TakingPhoto 1", "Photo 1", "Sitting 1")]
    assert names[28] == "Sitting.54138969"


def test_universal_poses(raw_copy):
    found = [find(raw_copy[0], ("S1",), poses=poses) for poses in raw.POSES]
    mono, universal = (read_raw(recordings)["pose_mm"] for recordings in found)
    np.testing.assert_allclose(universal, 0.9 * mono, atol=5e-3)


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
    return next((folder / "S5").rglob(f"{kind}/Waiting 2.54138969.*"))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def fast_start(path):
    # With the index before the content, a cut file still opens.
    noise = np.random.default_rng(0).integers(0, 255, (12, 128, 128, 3), np.uint8)
    files.write_video(path, noise, movflags="faststart")
    cut(path)


def leave_out_one(path):
    count = raw.count_poses(path_of(path.parents[2], "D2_Positions"))
    files.write_video(path, files.pictures_of(np.ones((count - 1, 32, 2))))


def shorten(path):
    files.write_cdf(path, np.ones((1, 3, 64)))
    files.write_cdf(path_of(path.parents[3], "D3_Positions_mono"), np.ones((1, 3, 96)))


def rename(path):
    files.write_cdf(path, np.ones((1, 9, 96)), "Angles")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Videos", cut, "cannot be read as a video"),
        ("Videos", fast_start, "cut off: it holds . of its 12"),
        ("Videos", leave_out_one, "frames, fewer than the"),
        ("D2_Positions", shorten, "at least 4"),
        ("D2_Positions", Path.unlink, "1 files of 7 recordings"),
        ("D2_Positions", cut, "cannot be read as a CDF"),
        ("D2_Positions", np.full((1, 9, 64), np.nan), "NaN"),
        ("D3_Positions_mono", rename, "no variable Pose, only Angles"),
        ("D3_Positions_mono", np.ones((1, 5, 96)), "5"),
        ("D3_Positions_mono", np.ones((1, 9, 51)), r"\(1, 9, 51\); 32 joints make it \(1, F, 96\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # cdflib leaves damaged files open
def test_damaged_files(small_copy, kind, change, message):
    path = path_of(small_copy, kind)
    if callable(change):
        change(path)
    else:
        files.write_cdf(path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        raw.check(find(small_copy, ("S5",), ("Waiting",)))
    assert str(path) in str(raised.value)


def test_a_crop_beside_the_picture_names_the_frame(small_copy):
    keypoints_px = np.ones((1, 9, 64)) * np.linspace(5000, 5100, 64)
    files.write_cdf(path_of(small_copy, "D2_Positions"), keypoints_px)
    files.write_cdf(path_of(small_copy, "D3_Positions_mono"), np.ones((1, 9, 96)))
    with pytest.raises(ValueError, match=r"Waiting 2\.54138969\.mp4: frame 3"):
        read_raw(find(small_copy, ("S5",), ("Waiting",)))


@pytest.mark.parametrize("split", sequences.SPLITS)
def test_prepared_from_the_released_file(tmp_path, split, monkeypatch):
    monkeypatch.setattr(released, "_ROWS", 3)
    monkeypatch.setattr(released, "_PIECE_ROWS", 7)
    tables = {f"{table}set": files.released_rows(table, 13) for table in ("train", "test")}
    path = tmp_path / "H36M.h5"
    files.write_released(path, **tables)
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
        for name in ("subject", "action", "subaction", "camera"):
            field = "cam" if name == "camera" else name
            np.testing.assert_array_equal(columns[name].astype(str), rows[field].astype(str))
        points_mm = np.float64(rows["gt_3d"]).swapaxes(1, 2)
        np.testing.assert_allclose(columns["pose_mm"], output_pose(points_mm), atol=1e-3)


def transposed(rows):
    other = [(n, ("<f4", (17, 3)) if n == "gt_3d" else rows.dtype[n]) for n in rows.dtype.names]
    return np.zeros(len(rows), other)


@pytest.mark.parametrize(
    ("testset", "message"),
    [
        (lambda rows: np.ones(3), "is missing, empty or not a table"),
        (lambda rows: rows[:0], "is missing, empty or not a table"),
        (lambda rows: rows[["cam"]], "column action is missing"),
        (transposed, r"column gt_3d has shape \(17, 3\); it must have shape \(3, 17\)"),
    ],
)
def test_released_tables_that_are_wrong(tmp_path, testset, message):
    rows = files.released_rows("test", 3)
    files.write_released(tmp_path / "wrong.h5", trainset=rows, testset=testset(rows))
    with pytest.raises(ValueError, match=rf"wrong.h5: /dataset/testset:? {message}"):
        released.check(tmp_path / "wrong.h5", "standard")


@pytest.fixture(scope="module")
def wehrbein_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wehrbein")
    contents = files.write_wehrbein(folder)
    # Frames with a wide fit are ambiguous; the second is an angle.
    fits = contents["test"]["S9"]["Directions"]["0"]["54138969"]["gaussfit"].reshape(3, 16, 7)
    fits[0, 3, 3], fits[1, 3, 4], fits[2, 0, 5] = 5.1, 20.0, 6.0
    (folder / wehrbein.FILES["test"]).write_bytes(pickle.dumps(contents["test"]))
    return folder, contents


def gaussian(fit):
    """The fitted function as its authors write it, cell by cell."""
    amplitude, x0, y0, sigma_x, theta, sigma_y = fit[:6]
    y, x = np.mgrid[:64, :64] - np.array([y0, x0])[:, None, None]
    cos2, sin2 = np.cos(theta) ** 2, np.sin(theta) ** 2
    a = cos2 / (2 * sigma_x**2) + sin2 / (2 * sigma_y**2)
    b = np.sin(2 * theta) / 4 * (1 / sigma_y**2 - 1 / sigma_x**2)
    c = sin2 / (2 * sigma_x**2) + cos2 / (2 * sigma_y**2)
    return amplitude * np.exp(-(a * x**2 + 2 * b * x * y + c * y**2))


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
    assert np.flatnonzero(columns["ambiguous"]).tolist() == [0, 2]
    part = contents["test"]["S11"]["Sitting"]["1"]["60457274"]
    points_mm = part["3d_gt"].reshape(3, 3, 17).swapaxes(1, 2)
    np.testing.assert_allclose(columns["pose_mm"][-3:], output_pose(points_mm), atol=1e-3)
    fits = part["gaussfit"].reshape(3, 16, 7)
    np.testing.assert_allclose(heatmaps(np.array([91]))[0, 9], gaussian(fits[1, 9]), atol=5e-4)


def test_wehrbein_validation_split(wehrbein_folder):
    columns = join(wehrbein.read(wehrbein_folder[0], "validation", "test"))
    assert set(columns["subject"]) == {"S5", "S8"}
    # After 16 recordings of S1.
    assert columns["row"][0] == 16 * 3
    train = join(wehrbein.read(wehrbein_folder[0], "validation", "train"))
    assert not set(train["row"]) & set(columns["row"])


class Touch(str):
    """Pickled, it makes a folder of its name when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("protocol", [3, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_runs_no_code(tmp_path, protocol):
    content = {"S9": np.array([1, Touch(tmp_path / "ran")], dtype=object)}
    (tmp_path / "bomb.pickle").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=r"bomb.pickle cannot .*: it holds posix.mkdir, which"):
        wehrbein.load_arrays(tmp_path / "bomb.pickle")
    assert not (tmp_path / "ran").exists()
    # The test itself can fail: an ordinary unpickler runs it.
    pickle.loads((tmp_path / "bomb.pickle").read_bytes())
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
    with pytest.raises(ValueError, match=f"(?=.*odd.pickle cannot be read).*{reason}"):
        wehrbein.load_arrays(tmp_path / "odd.pickle")


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_loaded(tmp_path, protocol):
    array = np.random.default_rng(1).normal(size=(3, 4))
    content = {
        "arrays": [array, np.asfortranarray(array)],
        "objects": np.array(["/S9/4.jpg", None, {"a": 1}], dtype=object),
        "list": [1, 2.5, "text", b"bytes", (True, None)],
    }
    if protocol >= 4:  # older ones name the sets' classes
        content["list"] += [{3, 4}, frozenset({5})]
    today = pickle.dumps(content, protocol)
    # NumPy 1 named its modules numpy.core, today's are numpy._core.
    older = today.replace(b"cnumpy._core", b"cnumpy.core")
    assert (older != today) == (protocol == 3)
    for made in (today, older):
        (tmp_path / "fine.pickle").write_bytes(made)
        np.testing.assert_equal(wehrbein.load_arrays(tmp_path / "fine.pickle"), content)


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
    (tmp_path / wehrbein.FILES["test"]).write_bytes(pickle.dumps(contents["test"]))
    with pytest.raises(ValueError, match=rf"testset_h36m.pickle: S9/Sitting/1/58860488.*{message}"):
        wehrbein.check(tmp_path, "standard")


def test_missing_and_empty_recordings(tmp_path):
    contents = files.write_wehrbein(tmp_path, frames=0)
    with pytest.raises(ValueError, match=r"trainset_h36m.pickle holds no frames"):
        wehrbein.check(tmp_path, "validation")
    del contents["train"]["S7"]["Photo"]
    (tmp_path / wehrbein.FILES["train"]).write_bytes(pickle.dumps(contents["train"]))
    with pytest.raises(ValueError, match=r"trainset_h36m.pickle: S7/Photo/0/54138969 is missing"):
        wehrbein.check(tmp_path, "validation")


class RedDetector:
    fingerprint = "red-1"
    input_px = 64

    def heatmaps(self, crops):
        return np.repeat(crops[:, None, :, :, 0], 16, axis=1) / np.float32(255)


@pytest.fixture(scope="module")
def whole_copy(tmp_path_factory):
    """All seven people in one action."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, files.write_raw(folder, SUBJECTS, ("Waiting",))


RAW = {"actions": ("Waiting",), "input_px": 64}


def test_prepared_from_raw(whole_copy, tmp_path):
    folder, written = whole_copy
    builder = prepare(folder, tmp_path, RedDetector(), **RAW)
    for split, subjects in sequences.SPLITS["standard"].items():
        columns, _ = prepared.read(builder.data_dir, split)
        count = 2 * (8 * len(subjects) - (split == "train"))  # without the broken one
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
    # Prepared data need no source.
    assert prepare("gone", tmp_path, RedDetector(), **RAW).data_path == builder.data_path


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

    changes = {
        "split": "validation",
        "poses": "mono_universal",
        "crop": "detector_joints",
        "actions": ("Eating",),
        "max_dropped_mass": 0.01,
    }
    raw_names = {name(input_px=64, **{field: value}) for field, value in changes.items()}
    raw_names.add(name(input_px=64))
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
    cut(next((folder / "S8/Videos").iterdir()))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        prepare(folder, tmp_path / "data", NoDetector(), split="validation", **RAW)
    with pytest.raises(FileNotFoundError, match=r"S9 has no folder Poses_D2_Positions nor MyPose"):
        prepare(folder, tmp_path / "data", NoDetector(), **RAW)
    assert not list((tmp_path / "data").rglob("*.array_record"))
