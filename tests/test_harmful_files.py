"""Files made to do harm: to run code, to write other files, to fill the memory.

`test_convert` has PyTorch's files, `test_human36m` pickles.
"""

import contextlib
import io
import os
import resource
import struct
import tracemalloc
import zipfile

import numpy as np
import programs
import pytest
from absl import app
from PIL import Image

import experiments
from diffpose_jax.data import motion
from diffpose_jax.io import arrays, files, scalars
from diffpose_jax.prediction import predict

MEBIBYTE = 1 << 20


class MakesFolder:
    """Pickled, it makes a folder when it is loaded by somebody careless."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_arrays_of_objects_run_no_code(tmp_path):
    bomb = np.array([MakesFolder(tmp_path / "ran")], dtype=object)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", positions_mm=bomb, heatmaps=bomb, fps=30)
    for read in (arrays.read, predict.read_heatmaps):
        for name in ("a.npy", "a.npz"):
            with pytest.raises(ValueError, match=rf"{name} .* Python objects are not loaded"):
                read(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.npz is not a motion file"):
        motion.read_clip(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
    # The test itself can fail: NumPy runs it when it is told to trust the file.
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()


@contextlib.contextmanager
def in_little_memory():
    """Fails if the process grows by more than 300 MB of pages."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_an_archive_that_unpacks_to_much_more_than_it_has_or_says(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_UNPACKED_BYTES", 32 * MEBIBYTE)
    packed, path = io.BytesIO(), tmp_path / "a.npz"
    np.savez_compressed(packed, heatmaps=np.zeros(128 * MEBIBYTE, np.uint8))
    whole = packed.getvalue()
    says_less = whole.replace(struct.pack("<I", 128 * MEBIBYTE + 128), bytes(4))
    assert says_less != whole
    tracemalloc.start()
    for content, problem in (
        (whole, r"unpacks to 134,217,856 bytes, more than 33,554,432"),
        (says_less, r"a\.npz is not .* or is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            arrays.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MEBIBYTE


@pytest.mark.parametrize("shape", ["(9999999999,)", "(4294967296, 4294967296)", "(-1, -4)"])
def test_a_header_that_says_too_much(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("heatmaps.npy", data)
    for name in ("a.npy", "a.npz"):
        with in_little_memory(), pytest.raises(ValueError, match=rf"{name} is not"):
            arrays.read(tmp_path / name)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_json(tmp_path, deep):
    path = tmp_path / "a.json"
    path.write_text(deep + "\n")
    with pytest.raises(files.FileError, match=r"a\.json"):
        files.read_json(path)
    with pytest.raises(files.FileError, match=r"a\.json, line 1 is damaged"):
        scalars.read_scalars(path)


def test_names_of_pictures_stay_within_the_output(tmp_path):
    for name in ("a.jpg", "a.png", "..b.jpg", "c..jpg", "$x$ <b>.jpg", "...jpg", "....jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name, "PNG")
    output = tmp_path / "output"
    subjects = programs.load("predict")._pictures(tmp_path, output, lambda: None)
    folders = [subject.folder.resolve() for subject in subjects]
    assert len(set(folders)) == len(folders) == 4
    assert all(folder.parent == output for folder in folders)


def test_an_error_says_nothing_to_the_terminal(monkeypatch):
    def main(_):
        raise files.FileError("a\x1b]0;owned\x07b\n\u202ec é")

    monkeypatch.setattr(app, "run", lambda main, **_: main([]))
    with pytest.raises(SystemExit) as stopped:
        experiments.run(main)
    assert str(stopped.value) == "error: a\\x1b]0;owned\\x07b\n\\u202ec é"
