"""Data sets of detections: prepared part by part, stopped and resumed, and read back."""

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

from diffpose_jax.config import ConfigError
from diffpose_jax.data import compact, prepared
from diffpose_jax.data.prepared import Part, builder
from diffpose_jax.data.prepared.reader import VERSION

PARTS = (
    ("S1/Walk 1.cam", "train", 7),
    ("S1/Sit", "train", 3),
    ("S9", "test", 4),
    ("S5", "train", 6),
)
CHUNK = 3


class BlobDetector:
    """Answers a crop with blobs at the place that its first pixel names."""

    input_px = 4

    def __init__(self, fingerprint="blobs-1"):
        self.fingerprint = fingerprint

    def heatmaps(self, crops):
        y, x = np.mgrid[:64, :64]
        first_x, first_y = crops[:, 0, 0, :2].T[..., None, None, None].astype(np.float32)
        down = y - first_y - np.arange(16)[:, None, None]
        return np.exp(-((x - first_x) ** 2 + down**2) / 8)


BLOBS = BlobDetector()


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
        "ambiguous": rows % 2 == 0,
        "corner": rng.normal(0, 1, (100, 2))[rows],
    }


class Fake(prepared.DetectionsBuilder):
    """Invented recordings.

    For tests.
    """

    def columns(self):
        return {
            "pose_mm": prepared.POSE,
            "clip": tfds.features.Text(),
            "frame": tfds.features.Scalar(np.int32),
            "ambiguous": tfds.features.Scalar(np.bool_),
            "corner": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="bytes"),
        }

    def parts(self):
        def read(name, length):
            self.parts_read.append(name)
            for start in range(0, length, CHUNK):
                rows = np.arange(start, min(start + CHUNK, length))
                yield self.altered(name, example_columns(name, rows))

        return [Part(n, s, lambda n=n, length=length: read(n, length)) for n, s, length in PARTS]


def make(folder, altered=lambda name, columns: columns, detector=BLOBS, **fields):
    """`altered` is for tests to change a chunk, or to fail."""
    made = Fake(fields, "", detector, folder)
    made.parts_read, made.altered = [], altered
    return made


def expected(split):
    parts = [example_columns(n, np.arange(length)) for n, s, length in PARTS if s == split]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    heatmaps = compact.decode(compact.encode(BLOBS.heatmaps(columns.pop("crops"))))
    return columns, heatmaps


def contents(made):
    return {path.name: path.read_bytes() for path in Path(made.data_dir).iterdir()}


def beside(made):
    """What lies beside a data set in its folder, but the lock."""
    return [name for name in os.listdir(Path(made.data_dir).parent) if name != ".lock"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    made = make(tmp_path_factory.mktemp("unbroken"))
    made.prepare()
    return made


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_written_is_read_in_any_order(unbroken, split):
    columns, heatmaps = prepared.read(unbroken.data_dir, split)
    truth, truth_heatmaps = expected(split)
    assert set(columns) == set(truth)
    for key, values in truth.items():
        np.testing.assert_array_equal(columns[key], values.astype(columns[key].dtype))
    kinds = {key: column.dtype for key, column in columns.items() if key != "clip"}
    assert kinds == {"pose_mm": "f4", "frame": "i4", "ambiguous": "?", "corner": "f4"}
    assert columns["clip"].dtype.kind == "U"
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(truth_heatmaps)), 20))
    read = heatmaps(order)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, truth_heatmaps[order])
    assert heatmaps(order[:0]).shape == (0, 16, 64, 64)


def test_as_data_source(unbroken):
    truth, truth_heatmaps = expected("train")
    for made in (unbroken, tfds.builder_from_directory(unbroken.data_dir)):
        assert made.info.description == "Invented recordings."
        source = made.as_data_source("train")
        assert len(source) == 16
        for row in (0, 15):
            example = source[row]
            np.testing.assert_array_equal(example["heatmaps"], truth_heatmaps[row])
            np.testing.assert_array_equal(example["pose_mm"], truth["pose_mm"][row].astype("f4"))
            assert example["clip"].decode() == truth["clip"][row]
            assert example["ambiguous"] == truth["ambiguous"][row]


def test_parts_may_hold_heatmaps(tmp_path, unbroken):
    def detected(name, columns):
        return columns | {"heatmaps": BLOBS.heatmaps(columns.pop("crops"))}

    made = make(tmp_path, detected, detector=None)
    made.prepare()
    # The others tell of the detector and of the folder.
    same = set(contents(unbroken)) - {"dataset_info.json", "configuration.json"}
    assert {n: contents(made)[n] for n in same} == {n: contents(unbroken)[n] for n in same}


def test_dense_heatmaps_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_SHARD_BYTES", 3 << 16)  # so that the third part begins a shard
    made = make(tmp_path, max_dropped_mass=None)
    made.prepare()
    assert made.info.splits["train"].shard_lengths == [10, 6]
    parts = [example_columns(n, np.arange(length)) for n, s, length in PARTS if s == "train"]
    dense = BLOBS.heatmaps(np.concatenate([part["crops"] for part in parts])).astype(np.float16)
    order = np.arange(16)[::-1]
    np.testing.assert_array_equal(prepared.read(made.data_dir, "train")[1](order), dense[order])


def test_the_fingerprint_is_of_the_content(unbroken, tmp_path):
    known = prepared.fingerprint(unbroken.data_dir)
    copied = shutil.copytree(unbroken.data_dir, tmp_path / "elsewhere" / "fake" / "x" / VERSION)
    assert prepared.fingerprint(copied) == known
    for column in (None, "pose_mm", "crops", "clip"):

        def altered(name, columns, column=column):
            if column and name == "S9" and columns["frame"][0] == 0:
                columns[column] = columns[column].copy()
                columns[column][0] = columns[column][1]
            return columns

        other = make(tmp_path / str(column), altered)
        other.prepare()
        assert (prepared.fingerprint(other.data_dir) == known) == (column is None), column


def test_find(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it with experiments.prepare --dataset fake"):
        prepared.find(tmp_path, "fake", {})
    loose, dense = make(tmp_path), make(tmp_path, max_dropped_mass=None)
    other = make(tmp_path, detector=BlobDetector("blobs-2"))
    assert len({loose.data_dir, dense.data_dir, other.data_dir}) == 3
    assert make(tmp_path).data_dir == loose.data_dir
    for one in (loose, dense):
        one.prepare()
    assert prepared.find(tmp_path, "fake", {"max_dropped_mass": None}) == Path(dense.data_dir)
    wanted = {"max_dropped_mass": 5e-4, "made no difference": (1, 2)}
    assert prepared.find(tmp_path, "fake", wanted) == Path(loose.data_dir)
    with pytest.raises(ValueError, match=r"several prepared fake have .*; say more"):
        prepared.find(tmp_path, "fake", {"input_px": 4})
    with pytest.raises(FileNotFoundError, match=r"no fake with .*'blobs-2'.* There are:\n"):
        prepared.find(tmp_path, "fake", {"detector": "blobs-2"})
    # Those of an earlier version do not count.
    Path(dense.data_dir).rename(Path(dense.data_dir).with_name("1.0.0"))
    assert prepared.find(tmp_path, "fake", {"input_px": 4}) == Path(loose.data_dir)


def test_two_prepare_the_same_at_once(tmp_path, unbroken):
    made = [make(tmp_path), make(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.prepare(), made))
    assert sorted(len(one.parts_read) for one in made) == [0, len(PARTS)]
    for one in made:
        assert contents(one) == contents(unbroken)
        assert one.info.splits["train"].num_examples == 16


def test_a_part_that_fails(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def broken(name, columns):
        if name == "S9" and columns["frame"][0] > 0:
            raise OSError("the disk is gone")
        return columns

    made = make(tmp_path, broken)
    with pytest.raises(OSError, match="the disk is gone") as error:
        made.prepare()
    (note,) = error.value.__notes__
    assert note == "in part 'S9'; the finished parts are kept for the next attempt"
    assert made.parts_read == ["S1/Walk 1.cam", "S1/Sit", "S9"]
    assert not made.is_prepared()
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        prepared.read(made.data_dir, "train")
    again = make(tmp_path)
    again.prepare()
    assert again.parts_read == ["S9", "S5"]
    assert contents(again) == contents(unbroken)
    assert beside(again) == [VERSION]


def test_a_full_disk(tmp_path, monkeypatch):
    class Full(builder.ArrayRecordWriter):
        def write(self, record):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(builder, "ArrayRecordWriter", Full)
    made = make(tmp_path)
    with pytest.raises(OSError, match=r"cannot be prepared: No space left") as error:
        made.prepare()
    assert str(made.data_dir) in str(error.value)
    assert "in part 'S" in error.value.__notes__[0]


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + '/data']
import test_prepared

def killed(name, columns):
    first = "S1%2FWalk%201.cam.array_record"
    while name == "S5" and columns["frame"][0] > 0:
        if list(Path({folder!r}).rglob(first)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return columns

made = test_prepared.make({folder!r}, {altered})
made.prepare()
assert "S1/Walk 1.cam" not in made.parts_read, made.parts_read
assert "tensorflow" not in sys.modules
"""


def test_a_kill(tmp_path, unbroken):
    def run(altered):
        program = PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), altered=altered)
        command = [sys.executable, "-W", "error", "-c", program]
        return subprocess.run(command, capture_output=True, text=True)

    first, second = run("killed"), run("")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    assert "WARNING" not in second.stderr
    made = make(tmp_path)
    assert contents(made) == contents(unbroken)
    assert beside(made) == [VERSION]


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
    assert 1 <= most <= 2  # of the 8 chunks, one of each of two parts


def test_refused_before_the_first_part(tmp_path):
    def check():
        raise FileNotFoundError("subject S7 is missing")

    made = make(tmp_path)
    made.check = check
    with pytest.raises(FileNotFoundError, match="S7"):
        made.prepare()
    assert made.parts_read == []
    with pytest.raises(ConfigError, match=r"fake\.max_dropped_mass must be 0 to"):
        make(tmp_path, max_dropped_mass=1.0)


def changed(**changes):
    """What gives every chunk these columns; one that is None is removed."""

    def altered(name, columns):
        return {key: c for key, c in (columns | changes).items() if c is not None}

    return {"altered": altered}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed(frame=None), "its columns are"),
        (changed(extra=np.arange(CHUNK)), "its columns are"),
        (changed(pose_mm=np.zeros((CHUNK, 16, 3))), r"pose_mm has shape \(3, 16, 3\)"),
        (changed(pose_mm=np.full((CHUNK, 17, 3), np.nan)), "pose_mm is not finite"),
        (changed(crops=None, heatmaps=np.full((CHUNK, 16, 64, 64), np.nan)), "image 0, joint 0"),
        ({"detector": None}, "there is no detector"),
        ({"parts": lambda: [Part("S1", "train", lambda: iter([]))]}, "it holds no examples"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, changes, message):
    made = make(tmp_path)
    vars(made).update(changes)
    with pytest.raises(ValueError, match=message) as error:
        made.prepare()
    assert "in part 'S" in error.value.__notes__[0]


def test_unknown_split(unbroken):
    with pytest.raises(ValueError, match="no split 'validation', but train, test"):
        prepared.read(unbroken.data_dir, "validation")


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard, columns: shard.write_bytes(shard.read_bytes()[:-1000]),
        lambda shard, columns: shard.unlink(),
        lambda shard, columns: columns.unlink(),
        lambda shard, columns: columns.with_name("columns_test.npz").replace(columns),
    ],
    ids=["truncated", "missing", "without columns", "another's columns"],
)
def test_a_damaged_data_set(unbroken, tmp_path, damage):
    folder = Path(shutil.copytree(unbroken.data_dir, tmp_path / "fake" / "x" / VERSION))
    damage(*folder.glob("*train.array_record*"), folder / "columns_train.npz")
    with pytest.raises(ValueError, match=r"delete the folder and prepare it again") as error:
        prepared.read(folder, "train")
    assert str(folder) in str(error.value)


def test_a_damaged_record(unbroken, tmp_path):
    folder = Path(shutil.copytree(unbroken.data_dir, tmp_path / "fake" / "x" / VERSION))
    (shard,) = folder.glob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    _, heatmaps = prepared.read(folder, "train")
    with pytest.raises(ValueError, match="prepare it again"):
        heatmaps(np.arange(16))
