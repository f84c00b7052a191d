"""HRNet, its published weights, and detectors as folders.

The numbers of the network are compared with the published one's in `test_reference.py`.
"""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from seeded_weights import seeded_weights

from diffpose_jax import detectors
from diffpose_jax.detectors import efficientpose, hrnet, movenet
from diffpose_jax.io.trees import CheckpointError

SPEC = GOLDEN / "hrnet_w32_state_dict.json"


@pytest.fixture(scope="module")
def tensors():
    return seeded_weights(SPEC, seed=1)


@pytest.fixture(scope="module")
def params(tensors):
    return hrnet.from_torch(tensors)


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors") / "hrnet"
    detectors.save(folder, "hrnet_w32", params)
    return folder


@pytest.fixture(scope="module")
def detector(folder):
    return detectors.load(folder)


def random_crops(seed, number, size=256):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def test_an_image_does_not_depend_on_its_batch(detector):
    """Three images: with chunks of two, one is padded."""
    crops = random_crops(2, 3)
    heatmaps = detector.heatmaps(crops)
    deviation = heatmaps.std()
    assert np.abs(heatmaps[0] - heatmaps[2]).max() > 0.1 * deviation
    assert detector.heatmaps(crops[:0]).shape == (0, 16, 64, 64)
    others = detector.heatmaps(crops[[2, 0]])
    np.testing.assert_allclose(others, heatmaps[[2, 0]], rtol=0, atol=1e-5 * deviation)


def test_255_pixels_are_256_with_a_padding_of_the_mean_colour(params):
    """The first convolution pads each side and of 256 pixels never sees the last."""

    @jax.jit
    def stem(images):
        _, state = hrnet.HRNet().apply(
            {"params": params},
            images,
            capture_intermediates=lambda module, _: module.name == "conv2",
            mutable=["intermediates"],
        )
        return state["intermediates"]["conv2"]["__call__"][0]

    crops = jnp.asarray(random_crops(4, 1, 255), jnp.float32)
    grey = jnp.broadcast_to(255 * jnp.array(hrnet._MEAN, jnp.float32), (1, 256, 256, 3))
    padded = stem(grey.at[:, :255, :255].set(crops))
    np.testing.assert_allclose(stem(crops), padded, rtol=0, atol=1e-5 * np.std(padded))


@pytest.mark.parametrize(
    ("network", "side", "number"),
    [
        (hrnet.HRNet, 256, 293),
        (efficientpose.EfficientPose, 276, 55),
        (movenet.MoveNet, 256, 44),
    ],
)
def test_bfloat16_is_for_the_convolutions(network, side, number):
    network = network(dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    program = jax.make_jaxpr(network.apply)(variables, images)
    convolutions = [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == number
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    assert program.out_avals[0].dtype == jnp.float32


def test_names_under_a_prefix(tensors, params):
    """As in a training checkpoint that holds the network beside other things."""
    renamed = {f"net.module.{name}": tensor for name, tensor in tensors.items()}
    renamed["net.module.stage4.2.branches.0.0.bn1.num_batches_tracked"] = np.zeros((), np.int64)
    renamed["epoch"] = np.array(3)
    chex.assert_trees_all_equal(hrnet.from_torch(renamed), params)


def test_every_bad_tensor_is_named(tensors):
    bad = dict(tensors)
    bad["final_layer.bias"] = np.zeros(17, np.float32)
    bad["conv1.weight"] = bad["conv1.weight"].transpose(2, 3, 1, 0)
    del bad["stage3.1.fuse_layers.2.0.1.1.running_var"]
    bad["incre_modules.0.0.conv1.weight"] = np.zeros((32, 32, 1, 1), np.float32)
    with pytest.raises(ValueError, match="HRNet-W32 with 16 joints") as error:
        hrnet.from_torch(bad)
    for problem in (
        "final_layer.bias is (17,), not (16,);",
        "conv1.weight is (3, 3, 3, 64), not (64, 3, 3, 3);",
        "stage3.1.fuse_layers.2.0.1.1.running_var is missing;",
        "incre_modules.0.0.conv1.weight is unknown.",
    ):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 3


def test_loading(folder, detector, params):
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, detector.params), params)
    assert (detector.input_px, detector.network) == (256, hrnet.HRNet())
    detector = detectors.load(folder, input_px=255, dtype="bfloat16")
    assert detector.network.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"\(B, 255, 255, 3\) uint8, not \(1, 256, 256, 3\)"):
        detector.heatmaps(random_crops(5, 1))
    with pytest.raises(ValueError, match=r"not \(255, 255, 3\) uint8 \(one crop\?"):
        detector.heatmaps(random_crops(5, 1, 255)[0])
    with pytest.raises(ValueError, match="float32"):
        detector.heatmaps(random_crops(5, 1, 255).astype(np.float32))
    with pytest.raises(ValueError, match="253 to 256 pixels, not 384 x 384"):
        detectors.load(folder, input_px=384)
    with pytest.raises(ValueError, match="float32, bfloat16, not 'float16'"):
        detectors.load(folder, dtype="float16")


def test_saving_overwrites_nothing(folder, params):
    with pytest.raises(CheckpointError, match="there already"):
        detectors.save(folder, "hrnet_w32", params)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "not a converted detector"),
        ("{", "not a converted detector"),
        (json.dumps({"format": "diffpose_jax detector 2", "network": "hrnet_w32"}), "detector 2"),
        (json.dumps({"format": detectors.FORMAT, "network": "hrnet_w48"}), "hrnet_w48"),
        (json.dumps({"format": detectors.FORMAT, "network": "hrnet_w32"}), "cannot read weights"),
    ],
)
def test_folders_that_are_no_detector(tmp_path, metadata, problem):
    if metadata is not None:
        (tmp_path / "detector.json").write_text(metadata)
    with pytest.raises(ValueError, match=problem) as error:
        detectors.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_weights_that_do_not_fit(tmp_path):
    changed = {"final_layer": {"kernel": np.zeros((1, 1, 32, 17), np.float32)}}
    detectors.save(tmp_path / "detector", "hrnet_w32", changed)
    problem = r"fit: final_layer\.kernel is \(1, 1, 32, 17\), .* conv1\.bias is missing; .* more"
    with pytest.raises(ValueError, match=problem):
        detectors.load(tmp_path / "detector")
