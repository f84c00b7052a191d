"""Files made to do harm: to run code, to read or write other files, to fill the memory."""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
import zlib

import fuzzing
import h5py
import human36m_files
import ml_collections
import numpy as np
import programs
import pytest
import scipy.io
from absl import app
from PIL import Image
from test_mpi_inf_3dhp import arrays, write_mat
from test_tensorflow_js import content, entries

import experiments
from diffpose_jax import config
from diffpose_jax.data import hdf5, lsp, motion
from diffpose_jax.data.human36m import raw, released
from diffpose_jax.data.human36m import wehrbein as flow
from diffpose_jax.data.mpi_inf_3dhp import annotations
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


def test_a_matlab_file_with_objects(tmp_path):
    for joints in ({"a": 1.0}, np.array([1.0, "x"], dtype=object), "os.mkdir"):
        scipy.io.savemat(tmp_path / "joints.mat", {"joints": joints})
        with pytest.raises(ValueError, match=r"joints\.mat .*: the variable is no array of real"):
            lsp._read_joints(tmp_path / "joints.mat")


# --- other files ---------------------------------------------------------------------------


def released_file(path):
    rows = human36m_files.released_rows("test", 3)
    human36m_files.write_released(path, trainset=rows, testset=rows)
    return path


def annotations_file(folder):
    folder.mkdir()
    write_mat(folder / "annot_data.mat", arrays(folder.name))
    return folder / "annot_data.mat"


def linked(file, name, other, how):
    """Puts what another file holds in the place of a data set."""
    del file[name]
    if how == "external link":
        file[name] = h5py.ExternalLink(other, name)
    elif how == "soft link":
        file["elsewhere"] = h5py.ExternalLink(other, name)
        file[name] = h5py.SoftLink("/elsewhere")
    else:
        with h5py.File(other) as source:
            layout = h5py.VirtualLayout(source[name].shape, source[name].dtype)
            layout[:] = h5py.VirtualSource(source[name])
        file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("how", ["external link", "soft link", "virtual"])
def test_hdf5_leads_to_no_other_file(tmp_path, how):
    secret = released_file(tmp_path / "secret.h5")
    path = released_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        linked(file, "/dataset/testset", secret, how)
    with h5py.File(path) as file:
        assert len(file["/dataset/testset"]) == 3  # h5py follows it
    with pytest.raises(ValueError, match=r"a\.h5: /dataset/testset (is a link|lies in another fi)"):
        released.check(path, "standard")
    with h5py.File(path, "r+") as file:
        file.move("dataset", "moved")
        file["dataset"] = h5py.ExternalLink(secret, "dataset")
    with pytest.raises(ValueError, match=r"a\.h5: /dataset/testset is a link"):
        released.check(path, "standard")


def test_hdf5_with_its_numbers_in_another_file(tmp_path):
    (tmp_path / "secret").write_bytes(b"s" * 24)
    path = annotations_file(tmp_path / "TS1")
    with h5py.File(path, "r+") as file:
        del file["valid_frame"]
        file.create_dataset("valid_frame", (3, 1), "f8", external=[(tmp_path / "secret", 0, 24)])
    with pytest.raises(ValueError, match=r"annot_data\.mat: valid_frame lies in another file"):
        annotations._read_mat(path)
    with h5py.File(path, "r+") as file:
        linked(file, "annot3", released_file(tmp_path / "b.h5"), "external link")
    with pytest.raises(ValueError, match=r"annot_data\.mat: .* (is a link|lies in another file)"):
        annotations._read_mat(path)


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


@pytest.mark.parametrize(
    "made",
    [
        b"\x80\x04N\x94r\xff\xff\xff\x7f.",  # keeps None under number 2^31 - 1
        b"\x80\x04cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",  # numpy.ndarray(2^32)
        b"\x80\x04cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"\x8a\x05\x00\x00\x00\x00\x01\x85C\x01b\x87R.",  # an empty array of 2^32
        b"\x80\x04\x8d\xff\xff\xff\xff\x00\x00\x00\x00a.",  # a string of 4 GB
    ],
)
def test_pickles_that_ask_for_memory(tmp_path, little_memory, made):
    (tmp_path / "a.pickle").write_bytes(made)
    with pytest.raises(ValueError, match=r"a\.pickle cannot be loaded"):
        flow.load_arrays(tmp_path / "a.pickle")


def test_arrays_of_pickles_are_as_large_as_their_content(tmp_path, little_memory):
    for array in (np.arange(6.0), np.array(["a", None], dtype=object)):
        data = pickle.dumps(array, protocol=4)
        whole, short = bytes([*b"K", len(array), 0x85]), b"K\xff\x85"
        assert data.count(whole) == 1
        (tmp_path / "a.pickle").write_bytes(data.replace(whole, short))
        with pytest.raises(ValueError, match=r"an array of \d numbers cannot be \(255,\)"):
            flow.load_arrays(tmp_path / "a.pickle")


def test_hdf5_with_rows_that_are_not_there(tmp_path, little_memory):
    path = released_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["/dataset/testset"].resize((10**9,))
    with pytest.raises(ValueError, match=r"a\.h5: /dataset/testset .* it is not whole"):
        released.check(path, "standard")
    with pytest.raises(ValueError, match="it is not whole"):
        released.pieces(path, "standard", "test")
    path = annotations_file(tmp_path / "TS1")
    with h5py.File(path, "r+") as file:
        del file["annot2"]
        file.create_dataset("annot2", (10**8, 1, 17, 2), "f8", chunks=(100, 1, 17, 2))
    with pytest.raises(ValueError, match=r"annot_data\.mat: annot2 cannot be read"):
        annotations._read_mat(path)


@pytest.mark.parametrize("packing", ["gzip", "lzf"])
def test_hdf5_chunks_that_unpack_to_much_more(tmp_path, little_memory, packing):
    path, shape = annotations_file(tmp_path / "TS1"), (1000, 1, 17, 2)
    # What is no LZF is refused as what is: by its size.
    packed = zlib.compress(bytes(2_000 * MEBIBYTE), 1) if packing == "gzip" else bytes(7 * MEBIBYTE)
    with h5py.File(path, "r+") as file:
        del file["annot2"]
        storage = {"compression": packing, "shuffle": True, "fletcher32": True}
        made = file.create_dataset("annot2", shape, "f8", chunks=shape, **storage)
        made.id.write_direct_chunk((0, 0, 0, 0), packed)
    with pytest.raises(ValueError, match=r"annot2 is not read, it unpacks to more"):
        annotations._read_mat(path)


def test_large_hdf5_chunks_that_are_honest(tmp_path):
    path = tmp_path / "a.h5"
    numbers = np.random.default_rng(0).normal(size=200_000)
    with h5py.File(path, "w") as file:
        for storage in ("gzip", "lzf", None):
            file.create_dataset(
                str(storage), data=numbers, chunks=numbers.shape, compression=storage
            )
        # Two filters that pack, one of what the other made.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((10,))
        for _ in range(2):
            properties.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((10,))
        h5py.h5d.create(file.id, b"twice", h5py.h5t.NATIVE_DOUBLE, space, properties)
        file["twice"][...] = 1
    with hdf5.opened(path, "human36m") as file:
        for name in ("gzip", "lzf", "None"):
            np.testing.assert_array_equal(hdf5.dataset(file, name)[:], numbers)
        with pytest.raises(ValueError, match="twice is not read, it unpacks to more"):
            hdf5.dataset(file, "twice")


def test_matlab_arrays_of_many_numbers(tmp_path, little_memory):
    path = tmp_path / "joints.mat"
    scipy.io.savemat(path, {"joints": np.ones((14, 3, 2))})
    data = path.read_bytes()
    for whole, damaged, reason in (
        (struct.pack("<3i", 14, 3, 2), struct.pack("<3i", 14, 3, 10**9), "it holds 84 numbers for"),
        (struct.pack("<2I", 9, 672), struct.pack("<2I", 9, 2**32 - 8), "it is cut off"),
        # SciPy's reader would crash.
        (struct.pack("<2I", 9, 672), struct.pack("<2I", 0x109, 672), "unknown type 265"),
    ):
        assert data.count(whole) == 1
        path.write_bytes(data.replace(whole, damaged))
        with pytest.raises(ValueError, match=rf"joints\.mat .* damaged: .*{reason}"):
            lsp._read_joints(path)
    bomb = zlib.compress(bytes(80 * MEBIBYTE))
    path.write_bytes(data[:128] + struct.pack("<2I", 15, len(bomb)) + bomb)
    with pytest.raises(ValueError, match=r"joints\.mat .* it unpacks to more than 67,108,864"):
        lsp._read_joints(path)


def test_cdf_that_leads_in_circles(tmp_path, little_memory):
    path = tmp_path / "a.cdf"
    human36m_files.write_cdf(path, np.ones((1, 8, 64)))
    data = bytearray(path.read_bytes())
    # The descriptor record: 12 bytes, six numbers of 8 and 4 bytes, then the count of variables.
    at = int.from_bytes(data[20:28], "big")
    assert int.from_bytes(data[at + 60 : at + 64], "big") == 1
    data[at + 60 : at + 64] = (2**31 - 1).to_bytes(4, "big")
    first = int.from_bytes(data[at + 20 : at + 28], "big")
    data[first + 12 : first + 20] = first.to_bytes(8, "big")  # the next variable is this one
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.cdf cannot be read as a CDF file: it leads in circ"):
        raw.read_poses(path, 2)


def test_cdf_that_unpacks_to_much_more(tmp_path, little_memory):
    path = tmp_path / "a.cdf"
    human36m_files.write_cdf(path, np.zeros((1, 8_000, 64)))
    whole = path.read_bytes()
    assert raw.read_poses(path, 2).shape == (8_000, 32, 2)
    # The block of values is in a record of its own; the index leads to another.
    record = whole.index(b"\x1f\x8b\x08") - 24
    assert whole[record + 8 : record + 12] == (13).to_bytes(4, "big")
    assert whole.count(record.to_bytes(8, "big")) == 1
    packed = gzip.compress(bytes(400 * MEBIBYTE), 1)
    bomb = struct.pack(">QIIQ", 24 + len(packed), 13, 0, len(packed)) + packed
    path.write_bytes(whole.replace(record.to_bytes(8, "big"), len(whole).to_bytes(8, "big")) + bomb)
    with pytest.raises(ValueError, match=r"a\.cdf unpacks to far more than poses are"):
        raw.read_poses(path, 2)
    path.write_bytes(whole + b"\x1f\x8b\x08" * 20 * MEBIBYTE)  # and each could be a block
    with pytest.raises(ValueError, match=r"a\.cdf unpacks to far more than poses are"):
        raw.read_poses(path, 2)
    path.write_bytes(whole[:4] + bytes.fromhex("cccc0001") + b"\0\xff" * 3 * MEBIBYTE)
    with pytest.raises(ValueError, match=r"a\.cdf is packed as a whole"):
        raw.read_poses(path, 2)


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
