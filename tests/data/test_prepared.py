"""Data sets of detections: prepared part by part, stopped and resumed, and read back."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from paths import TESTS

from diffpose_jax.data import compact
from diffpose_jax.data import prepared as detections
from diffpose_jax.data.prepared import Part

PARTS = (
    ("S1/Walk 1.cam", "train", 7),
    ("S1/Sit", "train", 3),
    ("S9", "test", 4),
    ("S5", "train", 6),
)
CHUNK = 3


class BlobDetector:
    """Answers a crop with blobs at the place that its first pixel names."""

    def __init__(self, fingerprint="blobs-1"):
        self.fingerprint = fingerprint
        self.crops_seen = 0

    def heatmaps(self, crops):
        self.crops_seen += len(crops)
        y, x = np.mgrid[:64, :64]
        place = crops[:, 0, 0].astype(np.float32)[:, None, None, None]
        distance = (x - place[..., 0]) ** 2 + (
            y - place[..., 1] - np.arange(16)[:, None, None]
        ) ** 2
        return np.exp(-distance / 8)


def example_columns(name, rows):
    """What the part of that name holds in these rows; float64 and int64, as readers may give."""
    rng = np.random.default_rng([len(name), *name.encode()])
    crops = rng.integers(5, 45, (100, 4, 4, 3), dtype=np.uint8)
    pose_mm = rng.normal(0, 300, (100, 17, 3))
    return {
        "crops": crops[rows],
        "pose_mm": pose_mm[rows],
        "clip": np.array([f"{name} {'long' * (row % 3)}" for row in rows]),
        "frame": rows,
        "hard": rows % 2 == 0,
        "corner": rng.normal(0, 1, (100, 2))[rows],
    }


class Fake(detections.DetectionsBuilder):
    """Invented recordings.

    For tests.
    """

    VERSION = tfds.core.Version("1.0.0")
    parts_read: list

    def columns(self):
        return {
            "clip": tfds.features.Text(),
            "frame": tfds.features.Scalar(np.int32),
            "hard": tfds.features.Scalar(np.bool_),
            "corner": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="bytes"),
        }

    def parts(self):
        def read(name, length):
            self.parts_read.append(name)
            for start in range(0, length, CHUNK):
                yield self.altered(
                    name, example_columns(name, np.arange(start, min(start + CHUNK, length)))
                )

        return [Part(n, s, lambda n=n, length=length: read(n, length)) for n, s, length in PARTS]

    def altered(self, name, columns):
        """For tests to change a chunk, or to fail."""
        del name
        return columns


def make(folder, altered=None, detector=None, **fields):
    detector = detector or BlobDetector()
    config = detections.DetectionsConfig(name="", detector=detector.fingerprint, **fields)
    builder = Fake(config=detections.named(config, "fake"), detector=detector, data_dir=folder)
    builder.parts_read = []
    if altered:
        builder.altered = altered
    return builder


def expected(split):
    parts = [example_columns(n, np.arange(length)) for n, s, length in PARTS if s == split]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    heatmaps = compact.decode(compact.encode(BlobDetector().heatmaps(columns.pop("crops"))))
    return columns, heatmaps


def contents(builder):
    return {path.name: path.read_bytes() for path in Path(builder.data_dir).iterdir()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = make(tmp_path_factory.mktemp("unbroken"))
    builder.prepare()
    return builder


@pytest.fixture
def damageable(tmp_path):
    builder = make(tmp_path)
    builder.prepare()
    return builder


@pytest.mark.parametrize("by_folder", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_written_is_read_in_any_order(prepared, split, by_folder):
    columns, heatmaps = detections.read(prepared.data_dir if by_folder else prepared, split)
    truth, truth_heatmaps = expected(split)
    assert set(columns) == set(truth)
    for key, values in truth.items():
        np.testing.assert_array_equal(columns[key], values.astype(columns[key].dtype))
    kinds = {key: column.dtype for key, column in columns.items() if key != "clip"}
    assert kinds == {"pose_mm": "f4", "frame": "i4", "hard": "?", "corner": "f4"}
    assert columns["clip"].dtype.kind == "U"
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(truth_heatmaps)), 20))
    read = heatmaps(order)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, truth_heatmaps[order])
    assert heatmaps(order[:0]).shape == (0, 16, 64, 64)


def test_as_data_source(prepared):
    truth, truth_heatmaps = expected("train")
    for builder in (prepared, tfds.builder_from_directory(prepared.data_dir)):
        assert builder.info.description == "Invented recordings."
        source = builder.as_data_source("train")
        assert len(source) == 16
        for row in (0, 9, 15):
            example = source[row]
            np.testing.assert_array_equal(example["heatmaps"], truth_heatmaps[row])
            np.testing.assert_array_equal(example["pose_mm"], truth["pose_mm"][row].astype("f4"))
            assert example["clip"].decode() == truth["clip"][row]
            assert example["hard"] == truth["hard"][row]


def test_a_prepared_data_set_is_not_prepared_again_and_read_without_a_detector(prepared):
    again = Fake(config=prepared.builder_config, data_dir=prepared.data_dir_root)
    again.prepare()
    assert len(detections.read(again, "test")[0]["frame"]) == 4


def test_dense_heatmaps(tmp_path):
    builder = make(tmp_path, loss=None)
    builder.prepare()
    crops = example_columns("S9", np.arange(4))["crops"]
    np.testing.assert_array_equal(
        detections.read(builder, "test")[1](np.arange(4)),
        BlobDetector().heatmaps(crops).astype(np.float16),
    )


def test_parts_may_hold_heatmaps(tmp_path, prepared):
    def detected(name, columns):
        heatmaps = BlobDetector().heatmaps(columns.pop("crops"))
        return columns | {"heatmaps": heatmaps}

    config = detections.named(detections.DetectionsConfig(""), "fake")
    builder = Fake(config=config, data_dir=tmp_path)
    builder.parts_read, builder.altered = [], detected
    builder.prepare()
    for name, content in contents(builder).items():
        if name not in ("dataset_info.json", "configuration.json"):
            assert content == contents(prepared)[name]


def test_several_shards(tmp_path, monkeypatch):
    # The file of each part takes two blocks of 64 KiB, so that the third part begins a shard.
    monkeypatch.setattr(detections, "_SHARD_BYTES", 3 << 16)
    builder = make(tmp_path)
    builder.prepare()
    assert builder.info.splits["train"].shard_lengths == [10, 6]
    order = np.arange(16)[::-1]
    np.testing.assert_array_equal(
        detections.read(builder, "train")[1](order), expected("train")[1][order]
    )


# What a data set is known by.


def test_the_fingerprint_is_of_the_content(prepared, tmp_path):
    known = detections.fingerprint(prepared.data_dir)
    copied = shutil.copytree(prepared.data_dir, tmp_path / "elsewhere" / "fake" / "x" / "1.0.0")
    assert detections.fingerprint(copied) == known
    again = make(tmp_path / "again")
    again.prepare()
    assert detections.fingerprint(again.data_dir) == known
    for number, column in enumerate(("pose_mm", "crops", "clip")):

        def altered(name, columns, column=column):
            if name == "S9" and columns["frame"][0] == 0:
                columns[column] = columns[column].copy()
                columns[column][0] = columns[column][1]
            return columns

        other = make(tmp_path / str(number), altered)
        other.prepare()
        assert detections.fingerprint(other.data_dir) != known, column


def test_two_prepare_the_same_at_once(tmp_path, prepared):
    builders = [make(tmp_path), make(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda builder: builder.prepare(), builders))
    assert sorted(len(builder.parts_read) for builder in builders) == [0, len(PARTS)]
    for builder in builders:
        assert contents(builder) == contents(prepared)
        assert len(detections.read(builder, "train")[0]["frame"]) == 16


# Stopped preparations.


def test_a_part_that_fails(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def broken(name, columns):
        if name == "S9" and columns["frame"][0] > 0:
            raise OSError("the disk is gone")
        return columns

    builder = make(tmp_path, broken)
    with pytest.raises(OSError, match="the disk is gone") as error:
        builder.prepare()
    assert error.value.__notes__ == [
        "in part 'S9'; the finished parts are kept for the next attempt"
    ]
    assert builder.parts_read == ["S1/Walk 1.cam", "S1/Sit", "S9"]
    assert not builder.is_prepared()
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        detections.read(builder, "train")
    again = make(tmp_path)
    again.prepare()
    assert again.parts_read == ["S9", "S5"]
    assert contents(again) == contents(prepared)
    assert [path.name for path in Path(again.data_dir).parent.glob("[!.]*")] == ["1.0.0"]


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_prepared as test_detections

def killed(name, columns):
    first = "S1%2FWalk%201.cam.array_record"
    while name == "S5" and columns["frame"][0] > 0:
        if list(Path({folder!r}).rglob(first)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return columns

builder = test_detections.make({folder!r}, killed if {kill} else None)
builder.prepare()
assert "S1/Walk 1.cam" not in builder.parts_read, builder.parts_read
assert "tensorflow" not in sys.modules
"""


def test_a_kill(tmp_path, prepared):
    def run(kill):
        program = PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), kill=kill)
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            capture_output=True,
            text=True,
            check=False,
        )

    first = run(kill=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = run(kill=False)
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    assert "WARNING" not in second.stderr
    builder = make(tmp_path)
    assert contents(builder) == contents(prepared)
    assert [path.name for path in Path(builder.data_dir).parent.glob("[!.]*")] == ["1.0.0"]


def test_another_detector_does_not_reuse_parts(tmp_path):
    def broken(name, columns):
        if name == "S5":
            raise OSError("unreadable")
        return columns

    first = make(tmp_path, broken)
    with pytest.raises(OSError, match="unreadable"):
        first.prepare()
    detector = BlobDetector("blobs-2")
    other = make(tmp_path, detector=detector)
    other.prepare()
    assert other.data_dir != first.data_dir
    assert sorted(other.parts_read) == sorted(name for name, *_ in PARTS)
    assert detector.crops_seen == sum(length for *_, length in PARTS)
    wrong = Fake(config=first.builder_config, detector=detector, data_dir=tmp_path)
    with pytest.raises(ValueError, match="for the detector 'blobs-1', not for 'blobs-2'"):
        wrong.prepare()


def test_the_name_follows_the_content():
    @dataclasses.dataclass(eq=False)
    class Config(detections.DetectionsConfig):
        stride: int = 1

    configs = [Config(""), Config("", stride=2), Config("", loss=None), Config("", detector="a")]
    names = [detections.named(config, "h36m").name for config in configs]
    assert len(set(names)) == 4
    assert all(name.startswith("h36m_") for name in names)
    assert detections.named(detections.named(configs[0], "x"), "h36m").name == names[0]


def test_few_chunks_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alive, most = set(), 0

    def watched(name, columns):
        nonlocal most
        chunk = columns["crops"]
        alive.add(id(chunk))
        weakref.finalize(chunk, alive.discard, id(chunk))
        most = max(most, len(alive))
        return columns

    make(tmp_path, watched).prepare()
    # Of the 8 chunks, one of each of two parts is read while another is with the detector.
    assert 1 <= most <= 3


# Refusals.


def test_check_comes_before_the_first_part(tmp_path):
    builder = make(tmp_path)

    def check():
        raise FileNotFoundError("subject S7 is missing")

    builder.check = check
    with pytest.raises(FileNotFoundError, match="S7"):
        builder.prepare()
    assert builder.parts_read == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": None}, "its columns are"),
        ({"extra": np.arange(CHUNK)}, "its columns are"),
        ({"pose_mm": np.zeros((CHUNK, 16, 3))}, r"pose_mm has shape \(3, 16, 3\)"),
        ({"frame": np.arange(CHUNK + 1)}, r"frame has shape \(4,\)"),
        ({"heatmaps": np.full((CHUNK, 16, 64, 64), np.nan)}, "image 0, joint 0"),
    ],
)
def test_chunks_that_do_not_fit(tmp_path, changes, message):
    def altered(name, columns):
        if "heatmaps" in changes:
            del columns["crops"]
        columns = columns | changes
        return {key: column for key, column in columns.items() if column is not None}

    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, altered).prepare()
    assert "in part 'S" in error.value.__notes__[0]


def test_parts_that_do_not_fit(tmp_path):
    builder = make(tmp_path)
    part = Part("a", "train", lambda: iter([]))
    builder.parts = lambda: [part, part]
    with pytest.raises(ValueError, match="2 parts have the name 'a'"):
        builder.prepare()
    builder.parts = lambda: [part]
    with pytest.raises(ValueError, match="holds no examples"):
        builder.prepare()


def test_crops_need_a_detector(tmp_path):
    config = detections.named(detections.DetectionsConfig(""), "fake")
    builder = Fake(config=config, data_dir=tmp_path)
    builder.parts_read = []
    with pytest.raises(ValueError, match="there is no detector"):
        builder.prepare()
    unnamed = Fake(config=detections.DetectionsConfig("fake"), data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'fake' was not made by `detections\.named`"):
        unnamed.prepare()


def test_unknown_split_and_folder(prepared, tmp_path):
    with pytest.raises(ValueError, match="no split 'validation', but train, test"):
        detections.read(prepared, "validation")
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        detections.read(tmp_path, "train")


@pytest.mark.parametrize("damage", ["truncated", "missing", "without columns", "another's columns"])
def test_a_damaged_data_set(damageable, damage):
    folder = Path(damageable.data_dir)
    (shard,) = folder.glob("*train.array_record*")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing":
        shard.unlink()
    elif damage == "without columns":
        (folder / "columns_train.npz").unlink()
    else:
        (folder / "columns_test.npz").replace(folder / "columns_train.npz")
    with pytest.raises(ValueError, match=r"delete the folder and prepare it again") as error:
        detections.read(damageable, "train")
    assert str(folder) in str(error.value)


def test_a_damaged_record(damageable):
    (shard,) = Path(damageable.data_dir).glob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    _, heatmaps = detections.read(damageable, "train")
    with pytest.raises(ValueError, match="prepare it again"):
        heatmaps(np.arange(16))
