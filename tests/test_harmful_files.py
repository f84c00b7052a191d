"""Files made to do harm: to run code, to read or write other files, to fill the memory."""

import contextlib
import io
import json
import os
import resource
import struct
import tracemalloc
import zipfile
import zlib

import fuzzing
import ml_collections
import numpy as np
import programs
import pytest
from absl import app
from PIL import Image
from test_tensorflow_js import content, entries

import experiments
from diffpose_jax import config
from diffpose_jax.data import motion
from diffpose_jax.detectors import tensorflow_js
from diffpose_jax.interop import torch_weights
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.io import arrays as numpy_files
from diffpose_jax.io import files, pictures, scalars
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method import network as model
from diffpose_jax.prediction.predict import predict as prediction
from diffpose_jax.training import checkpoints

torch = pytest.importorskip("torch")

MEBIBYTE = 1 << 20


class MakesFolder:
    """Pickled, it makes a folder when it is loaded by somebody careless."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def little_memory():
    """Fails a test whose process grows by more than 300 MB of pages."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# --- code ----------------------------------------------------------------------------------


def test_arrays_of_objects_run_no_code(tmp_path):
    bomb = np.array([MakesFolder(tmp_path / "ran")], dtype=object)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", positions_mm=bomb, heatmaps=bomb, fps=30)
    for read in (numpy_files.read, prediction.read_heatmaps):
        for name in ("a.npy", "a.npz"):
            with pytest.raises(ValueError, match=rf"{name} .* Python objects, which are not load"):
                read(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.npz is not a motion file"):
        motion.read_clip(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
    # The test itself can fail: NumPy runs it when it is told to trust the file.
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': __import__('os').mkdir('RAN') or '<f4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', __import__('os').mkdir('RAN'))], 'fortran_order': 0, 'shape': (1,)}",
        "__import__('os').mkdir('RAN')",
        "(" * 4_000,
        "-" * 9_000 + "1",
    ],
)
def test_a_header_is_no_program(tmp_path, header):
    header = header.replace("RAN", str(tmp_path / "ran")).encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(4)
    (tmp_path / "a.npy").write_bytes(data)
    (tmp_path / "a.npz").write_bytes(fuzzing.zip_of({"heatmaps.npy": data}))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a \.npy or \.npz file of numbers"):
            numpy_files.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_torch_file_runs_no_code(tmp_path, is_archive):
    bomb = {"model": {"w": torch.ones(2), "x": MakesFolder(tmp_path / "ran")}}
    path = tmp_path / "a.pt"
    torch.save(bomb, path, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(WeightsError, match=r"a\.pt is not a PyTorch file of tensors alone"):
        torch_weights.read_file(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_words_in_a_configuration_stay_words(tmp_path):
    fields = ml_collections.ConfigDict(
        {"encoder": '!!python/object/apply:os.mkdir ["ran"]', "clip": "{{ 7 * 7 }}"}
    )

    def function(*, encoder: str, clip: float):
        raise AssertionError((encoder, clip))

    with pytest.raises(config.ConfigError, match=r"config\.clip must be of type float, not '{{ 7"):
        config.call(function, fields, "config")
    del fields["clip"]
    assert config.call(lambda *, encoder: encoder, fields, "config") == fields.encoder
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load(tmp_path / "$(mkdir ran)")
    assert not list(tmp_path.iterdir())


# --- other files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "a/b", "\ud800", 7])
def test_weights_lie_beside_their_manifest(tmp_path, name):
    (tmp_path / "secret").write_bytes(content())
    folder = tmp_path / "model"
    folder.mkdir()
    manifest = {"weightsManifest": [{"paths": [name], "weights": entries()}]}
    (folder / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model\.json: (its manifest names|no file can have)"):
        tensorflow_js.read_weights(folder / "model.json")


def test_members_of_archives_are_not_unpacked_to_the_disk(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    stream = io.BytesIO()
    np.save(stream, np.ones((1, 16, 64, 64), np.float32))
    names = ("../out.npy", "/out.npy", "heatmaps.npy")
    (folder / "a.npz").write_bytes(fuzzing.zip_of(dict.fromkeys(names, stream.getvalue())))
    assert prediction.read_heatmaps(folder / "a.npz").shape == (1, 16, 64, 64)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "a.npz"]


def test_names_of_pictures_stay_within_the_output(tmp_path):
    predict = programs.load("predict")
    for name in ("a.jpg", "a.png", "..b.jpg", "c..jpg", "$x$ <b>.jpg", "...jpg", "....jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name, "PNG")
    output = tmp_path / "output"
    subjects = predict._pictures(tmp_path, output, lambda: None)
    folders = [subject.folder.resolve() for subject in subjects]
    assert len(set(folders)) == len(folders) == 4
    assert all(folder.parent == output for folder in folders)


def test_an_error_says_nothing_to_the_terminal(capsys, monkeypatch):
    def main(_):
        raise files.FileError("a\x1b]0;owned\x07b\n\u202ec é")

    monkeypatch.setattr(app, "run", lambda main, **_: main([]))
    with pytest.raises(SystemExit) as stopped:
        experiments.run(main)
    assert str(stopped.value) == "error: a\\x1b]0;owned\\x07b\n\\u202ec é"


# --- memory --------------------------------------------------------------------------------


def deflated(size, compression=zipfile.ZIP_DEFLATED):
    """A .npz that unpacks to as many bytes of zeros."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(0, np.uint8))
    head = stream.getvalue().replace(b"(0,)", f"({size},)".encode())[:128]
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", compression) as archive,
        archive.open("heatmaps.npy", "w", force_zip64=True) as member,
    ):
        member.write(head)
        for _ in range(size // (16 * MEBIBYTE)):
            member.write(bytes(16 * MEBIBYTE))
    return packed.getvalue()


def test_an_archive_that_unpacks_to_much_more(tmp_path, monkeypatch):
    monkeypatch.setattr(numpy_files, "MAX_UNPACKED_BYTES", 32 * MEBIBYTE)
    path = tmp_path / "a.npz"
    whole = deflated(128 * MEBIBYTE)
    says_less = whole.replace(struct.pack("<I", 128 * MEBIBYTE + 128), bytes(4))
    assert says_less != whole
    lzma = deflated(16 * MEBIBYTE, zipfile.ZIP_LZMA)
    tracemalloc.start()
    for data, reason in (
        (whole, r"a\.npz .*: it unpacks to 134,217,856 bytes, more than 33,554,432"),
        (says_less, r"a\.npz is not .* or is damaged"),
        (lzma, "is packed in a way that NumPy does not"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=reason):
            numpy_files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MEBIBYTE


@pytest.mark.parametrize("shape", ["(9999999999,)", "(4294967296, 4294967296)", "(-1, -4)"])
def test_a_header_that_says_too_much(tmp_path, little_memory, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npy is not"):
        numpy_files.read(tmp_path / "a.npy")


def test_a_torch_file_that_unpacks_to_much_more(tmp_path, little_memory):
    torch.save({"w": torch.zeros(8 * MEBIBYTE)}, tmp_path / "whole.pt")
    members = fuzzing.unzip((tmp_path / "whole.pt").read_bytes())
    path = tmp_path / "a.pt"
    path.write_bytes(fuzzing.zip_of(members, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < MEBIBYTE
    with pytest.raises(WeightsError, match=r"a\.pt is not a PyTorch file of tensors alone"):
        torch_weights.read_file(path)


def test_tensors_of_many_elements_in_few_bytes(tmp_path, little_memory):
    path = tmp_path / "a.pt"
    for tensor in (
        torch.ones(1, dtype=torch.float16).expand(10**6, 10**6),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
    ):
        torch.save({"w": tensor}, path)
        with pytest.raises(WeightsError, match=r"a\.pt (holds a tensor|is not a PyTorch file)"):
            torch_weights.read_file(path)
    endless = {}
    endless["again"] = endless
    torch.save(endless, path)
    with pytest.raises(WeightsError, match=r"a\.pt holds dictionaries within dictionaries"):
        torch_weights.read_file(path)


def test_pictures_that_unpack_to_much_more(tmp_path, little_memory):
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "PNG")
    parts = fuzzing.png_chunks(stream.getvalue())
    head, *rest = parts.items()
    packed = zlib.compress(bytes(400 * MEBIBYTE), 1)
    for chunk, start in (("zTXt", b"a\0\0"), ("iCCP", b"a\0\0"), ("iTXt", b"a\0\1\0\0\0")):
        (tmp_path / "a.png").write_bytes(
            fuzzing.png_of(dict([head, (f"1 {chunk}", start + packed), *rest]))
        )
        with contextlib.suppress(pictures.PictureError):  # either will do
            assert pictures.read(tmp_path / "a.png").shape == (20, 20, 3)


def test_files_that_are_named_many_times(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(MEBIBYTE))
    manifest = {"weightsManifest": [{"paths": ["a.bin"] * 300, "weights": []}]}
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model\.json: its files hold more than 268,435,456"):
        tensorflow_js.read_weights(tmp_path / "model.json")


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900])
def test_deep_json(tmp_path, deep):
    path = tmp_path / "model.json"
    path.write_text(deep + "\n")
    with pytest.raises(ValueError, match=r"model\.json"):
        tensorflow_js.read_weights(path)
    with pytest.raises(files.FileError, match=r"model\.json, line 1 is damaged"):
        scalars.read_scalars(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("denoiser_blocks", 10**9), ("diffusion_steps", 10**12), ("condition_size", 10**15),
     ("pose_scale", 0.0), ("encoder_layers", True), ("clip", float("nan"))],
)  # fmt: skip
def test_a_configuration_of_absurd_size(field, value, little_memory):
    fields = programs.importlib.import_module("configs.h36m").get_config().model
    with fields.ignore_type():
        fields[field] = value
    with pytest.raises(config.ConfigError, match=rf"config\.model\.{field} must be"):
        config.call(model.build, fields, "config.model")
