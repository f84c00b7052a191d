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
    ("stored", "weights", "problem"),
    [
        (content()[:-1], entries(), r"w\.bin ends before the tensor b/bias: truncated"),
        (content() + b"\0", entries(), "37 bytes lie there for tensors of 36"),
        (content(), changed(shape=[1 << 40, 1 << 40]), r"w\.bin ends before the tensor a/kernel"),
        (content(), changed(shape=[2, -3]), "reshape"),
        (content(), [*entries(), "text"], "indices"),
        (content(), changed(dtype="string"), "a/kernel is quantised or string, which is not"),
        (content(), changed(quantization={"dtype": "float16"}), "a/kernel is quantised"),
    ],
)
def test_files_that_do_not_fit(tmp_path, stored, weights, problem):
    path = write(tmp_path, ({"w.bin": stored}, weights))
    with pytest.raises(ValueError, match=problem) as error:
        tensorflow_js.read_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weightsManifest": [{}]}'])
def test_no_manifest(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no TensorFlow\.js graph model"):
        tensorflow_js.read_weights(path)


def test_a_missing_file_is_named(tmp_path):
    path = write(tmp_path, ({"w.bin": content()}, entries()))
    (tmp_path / "w.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"w\.bin"):
        tensorflow_js.read_weights(path)
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        tensorflow_js.read_weights(tmp_path / "other.json")
