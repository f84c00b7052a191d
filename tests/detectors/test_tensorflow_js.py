"""Weights of TensorFlow.js models: what is read, and that broken files are told apart."""

import json

import numpy as np
import pytest

from diffpose_jax.detectors import tensorflow_js

TENSORS = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
    "a/axis": np.array(3, np.int32),
    "b/none": np.zeros((0, 4), np.float32),
    "b/bias": np.array([-1.5, 2.5], np.float32),
}


def entries(names=TENSORS):
    return [
        {"name": n, "shape": list(TENSORS[n].shape), "dtype": str(TENSORS[n].dtype)} for n in names
    ]


def write(folder, *groups):
    """Writes groups (file contents by name, entries) as a model; returns its JSON file."""
    manifest = []
    for files, weights in groups:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        manifest.append({"paths": list(files), "weights": weights})
    path = folder / "model.json"
    path.write_text(json.dumps({"modelTopology": {"node": []}, "weightsManifest": manifest}))
    return path


def content(*names):
    return b"".join(TENSORS[name].tobytes() for name in names or TENSORS)


def test_two_groups_one_of_them_in_two_files(tmp_path):
    first = content("a/kernel", "a/axis")
    path = write(
        tmp_path,
        ({"1.bin": first[:10], "2.bin": first[10:]}, entries(["a/kernel", "a/axis"])),
        ({"3.bin": content("b/none", "b/bias")}, entries(["b/none", "b/bias"])),
    )
    tensors = tensorflow_js.read_weights(path)
    assert list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


def changed(**fields):
    first, *others = entries()
    return [first | fields, *others]


@pytest.mark.parametrize(
    ("files", "weights", "problem"),
    [
        ({"w.bin": content()[:-1]}, entries(), r"w.bin should hold 36 bytes.*b/bias.*holds 35"),
        ({"w.bin": content() + b"\0"}, entries(), "holds 37 bytes, its tensors have 36"),
        ({"w.bin": content()}, changed(shape=[1 << 40, 1 << 40]), "up to the tensor a/kernel"),
        ({"w.bin": content()}, changed(shape=[2, -3]), "describes no tensor.*a/kernel"),
        ({"w.bin": content()}, changed(shape=[2, 1.5]), "describes no tensor"),
        ({"w.bin": content()}, changed(shape=7), "describes no tensor"),
        ({"w.bin": content()}, [*entries(), "text"], "describes no tensor with text"),
        ({"w.bin": content()}, changed(dtype="string"), "a/kernel is string; only plain float32"),
        ({"w.bin": content()}, changed(quantization={"dtype": "float16"}), "float32, quantised"),
        ({"w.bin": content()}, changed(name="b/bias"), "b/bias is there twice"),
    ],
)
def test_files_that_do_not_fit(tmp_path, files, weights, problem):
    path = write(tmp_path, (files, weights))
    with pytest.raises(ValueError, match=problem) as error:
        tensorflow_js.read_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["../w.bin", "/w.bin", "..", "", 3])
def test_a_file_elsewhere_is_not_read(tmp_path, name):
    (tmp_path / "w.bin").write_bytes(content())
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.json"
    group = {"paths": [name], "weights": entries()}
    path.write_text(json.dumps({"weightsManifest": [group]}))
    with pytest.raises(ValueError, match="which is not beside it"):
        tensorflow_js.read_weights(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weightsManifest": 3}', '{"weightsManifest": [{}]}', "\0\xff"]
)
def test_no_manifest(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a TensorFlow\.js graph model"):
        tensorflow_js.read_weights(path)


def test_a_missing_file_is_named(tmp_path):
    path = write(tmp_path, ({"w.bin": content()}, entries()))
    (tmp_path / "w.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"w\.bin"):
        tensorflow_js.read_weights(path)
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        tensorflow_js.read_weights(tmp_path / "other.json")
