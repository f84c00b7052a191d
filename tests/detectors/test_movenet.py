"""MoveNet: its network against TensorFlow.js, its heatmaps, its published files.

`golden/movenet_thunder_case.npz` holds every fifth row and column of the logits of the maps that
TensorFlow.js 4.22 (CPU) computed from the published graph with the weights of
`graph_models.seeded`, with 1 / 127.5 of 32 instead of 16 bits, and the crop of the test. The
published weights are in the folder DIFFPOSE_MOVENET, if that is set.
"""

import os
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
from diffpose_jax.detectors import crops, movenet
from diffpose_jax.skeleton import MPII_JOINTS, MPII_MIRROR

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDES = ("Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle")
COCO = [*("Nose", "LEye", "REye", "LEar", "REar"), *(side + n for n in SIDES for side in "LR")]
UNKNOWN = [MPII_JOINTS.index(name) for name in ("Spine", "Thorax", "Head")]
PELVIS = MPII_JOINTS.index("Pelvis")
KNOWN = [j for j, name in enumerate(MPII_JOINTS) if name in COCO]


@pytest.fixture(scope="module")
def tensors():
    return graph_models.tensors_of("movenet_thunder_shapes.json")


@pytest.fixture(scope="module")
def params(tensors):
    return movenet.from_tensors(tensors)


@jax.jit
def logits(params, crop):
    _, state = movenet.MoveNet().apply(
        {"params": params}, crop[None], capture_intermediates=True, mutable=["intermediates"]
    )
    return state["intermediates"]["maps"]["__call__"][0][0]


def test_the_maps_are_those_of_tensorflow_js(params):
    crop = np.random.default_rng(6).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = np.load(GOLDEN / "movenet_thunder_case.npz")["maps"]
    # Random weights enlarge what rounding differs.
    atol = 3e-4 * expected.std()
    np.testing.assert_allclose(logits(params, crop)[::5, ::5], expected, rtol=0, atol=atol)


def blob(x, y, height, sigma=1.53):
    """A map (64, 64) with a Gaussian at cell (x, y)."""
    return simulator.render(np.array([[height, x, y, sigma, sigma]]))


def maps_of(**joints):
    """The network's maps (1, 64, 64, 17): those of some joints, and of all others the floor."""
    maps = np.full((1, 64, 64, 17), 0.0015)
    for name, joint in joints.items():
        maps[0, ..., COCO.index(name)] += joint
    return jnp.asarray(maps, jnp.float32)


def heatmap_of(joint):
    return np.asarray(movenet.to_heatmaps(maps_of(LKnee=joint)))[0, MPII_JOINTS.index("LKnee")]


def test_a_blob_comes_out_as_the_simulated_detector_would_draw_it():
    """Cell i of the network's maps covers pixels 4 i to 4 i + 4 of 256."""
    x, y = 20.3, 51.8
    expected = blob(x + 0.5, y + 0.5, 0.87, 2.07)
    np.testing.assert_allclose(heatmap_of(blob(x, y, 0.87)), expected, rtol=0, atol=0.02)


def test_a_blob_at_the_border_is_not_darkened():
    heatmap = heatmap_of(blob(63, 0, 0.87))
    assert heatmap.max() == pytest.approx(0.87, abs=0.01)
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) in {(0, 63), (1, 63)}


def test_a_second_mode_keeps_its_share():
    heatmap = heatmap_of(blob(13, 20, 0.8) + blob(44, 22, 0.4))
    assert heatmap[:, 30:].max() / heatmap[:, :30].max() == pytest.approx(0.5, abs=0.02)


def test_what_is_not_seen_or_not_known_is_zero():
    heatmaps = np.asarray(movenet.to_heatmaps(maps_of(Nose=blob(30, 9, 0.9))))
    np.testing.assert_array_equal(heatmaps, 0)
    heatmaps = np.asarray(movenet.to_heatmaps(jnp.full((2, 64, 64, 17), 0.6)))
    np.testing.assert_array_equal(heatmaps[:, UNKNOWN], 0)
    assert sorted([*KNOWN, PELVIS, *UNKNOWN]) == list(range(16))


def test_order_of_the_joints():
    """Each map holds its number."""
    maps = jnp.broadcast_to(jnp.arange(1.0, 18.0) / 20, (1, 64, 64, 17))
    heights = 20 * np.asarray(movenet.to_heatmaps(maps))[0, KNOWN, 32, 32]
    assert [COCO[round(float(height)) - 1] for height in heights] == [MPII_JOINTS[j] for j in KNOWN]


def test_the_pelvis_is_between_the_hips():
    """Where their highest cells are: in column 23 and row 32, and in 36 and 35."""
    right, left = blob(22.3, 31.2, 0.9), blob(35.3, 34.2, 0.6)
    heatmaps = np.asarray(movenet.to_heatmaps(maps_of(RHip=right, LHip=left)))[0]
    lower = heatmaps[MPII_JOINTS.index("LHip")].max()
    assert lower == pytest.approx(0.6, abs=0.02)
    expected = blob(29.5, 33.5, lower, 2.27)
    np.testing.assert_allclose(heatmaps[PELVIS], expected, rtol=0, atol=1e-5)
    for one in ({"RHip": right}, {"LHip": left}):
        heatmaps = np.asarray(movenet.to_heatmaps(maps_of(**one)))[0]
        np.testing.assert_array_equal(heatmaps[PELVIS], 0)
        assert heatmaps.max() > 0.5


def test_loading_and_fingerprint(params, tmp_path):
    detectors.save(tmp_path / "detector", "movenet_thunder", params)
    detector = detectors.load(tmp_path / "detector")
    assert (detector.input_px, detector.network) == (256, movenet.MoveNet())
    assert detector.fingerprint.startswith("movenet_thunder-")
    with pytest.raises(ValueError, match="crops of 256 pixels, not 255 x 255"):
        detectors.load(tmp_path / "detector", input_px=255)


def test_every_bad_tensor_is_named(tensors):
    bad, model = dict(tensors), "StatefulPartitionedCall/center_net_mobile_net_v2fpn_feature_extra"
    model += "ctor/model_1"
    offset = f"{model}/model/block_7_depthwise/depthwise_bn_offset"
    del bad[offset]
    head = "StatefulPartitionedCall/kpt_heatmap_0/separable_conv2d_4/separable_conv2d"
    bad[f"{head}/ReadVariableOp"] = np.zeros((3, 3, 1, 24), np.float32)
    with pytest.raises(ValueError, match=r"Thunder: [^;]*;[^;]*$") as error:
        movenet.from_tensors(bad)
    for problem in ("ReadVariableOp is (3, 3, 1, 24), not (3, 3, 24, 1)", f"{offset:.100} is miss"):
        assert problem in str(error.value)


def test_converted(tensors, tmp_path, monkeypatch):
    """The published weights have 16 bits."""
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    stored = {"dtype": "float16", "original_dtype": "float32"}
    for name, content in graph_models.publish(
        movenet, halves, monkeypatch, quantization=stored
    ).items():
        (tmp_path / name).write_bytes(content)
    converted = movenet.convert(tmp_path / "movenet-thunder.json")
    jax.tree.map(np.testing.assert_array_equal, converted, movenet.from_tensors(halves))
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


# In pixels of the picture, read off it: the man faces the camera, his right is on the left.
JOINTS_PX = {
    "RAnkle": (158, 615), "RKnee": (140, 505), "RHip": (228, 365),
    "LHip": (292, 398), "LKnee": (252, 548), "LAnkle": (294, 660), "Pelvis": (262, 384),
    "RWrist": (140, 146), "RElbow": (210, 171), "RShoulder": (296, 160),
    "LShoulder": (415, 243), "LElbow": (433, 352), "LWrist": (425, 458),
}  # fmt: skip


@pytest.mark.skipif("DIFFPOSE_MOVENET" not in os.environ, reason="needs its weights")
def test_a_person(tmp_path):
    weights = Path(os.environ["DIFFPOSE_MOVENET"]) / "movenet-thunder.json"
    detectors.save(tmp_path / "d", "movenet_thunder", movenet.convert(weights))
    detector = detectors.load(tmp_path / "d")
    image = np.array(Image.open(ROOT / "docs" / "person.jpg").convert("RGB"))
    known = sorted([*KNOWN, PELVIS])
    truth = np.array([JOINTS_PX.get(name, (0, 0)) for name in MPII_JOINTS])
    for corner, side in (((-160, 0), 800), ((-61, 30), 690), ((-40, 60), 640)):
        crop = crops.square_crop_image(image, np.array(corner), side, detector.input_px)
        heatmaps = detector.heatmaps(crop[None])[0]
        best = heatmaps.reshape(16, -1).argmax(-1)
        cells = np.stack([best % 64, best // 64], -1)
        joints = crops.cells_to_pixels(cells, np.array(corner), np.array(float(side)))
        error = np.linalg.norm(joints - truth, axis=-1)[known]
        assert error.max() < 30
        assert error.mean() < 12
        mirrored = np.linalg.norm(joints - truth[np.array(MPII_MIRROR)], axis=-1)[known]
        assert (error <= mirrored).all()
        assert heatmaps.max((1, 2))[known].min() > 0.4
