"""Names and layouts of released PyTorch weights."""

import json

import chex
import jax
import numpy as np
import pytest
from paths import GOLDEN
from small import network as full_network
from small import small_network

from configs import h36m
from diffpose_jax.interop import torch_weights
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.method import diffusion

SPEC = json.loads((GOLDEN / "diffpose_state_dict.json").read_text())


def deep_network(**changes):
    return small_network(**{"encoder_layers": 2, "denoiser_blocks": 2} | changes)


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def random_params(network, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), shapes_of(network))


def to_torch(network, params):
    return torch_weights.to_torch(params, network.schedule)


def test_names_and_shapes_are_the_published_programs():
    network = full_network(h36m.get_config())
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes_of(network))
    tensors = to_torch(network, params)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes | SPEC == shapes
    assert set(torch_weights.unused(shapes)) >= shapes.keys() - SPEC
    assert {tensors[name].dtype for name in SPEC} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder_layers": 0}, {"cross_spatial": False}, {"denoiser_blocks": 3},
     {"encoder_heads": 1}],
)  # fmt: skip
def test_there_and_back(changes):
    network = deep_network(**changes)
    params = random_params(network, seed=1)
    tensors = to_torch(network, params)
    chex.assert_trees_all_equal(torch_weights.from_torch(tensors, shapes_of(network)), params)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("condition_emb.transformer.layers.1.norm2.bias", None, "layers.1.norm2.bias is missing"),
        ("module.betas", np.zeros(25), "module.betas is unknown"),
        ("denoise_fn.upscale.weight", np.zeros((32, 68)), r"upscale.weight is \(32, 68\), not"
         r" \(32, 69\)"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(name, value, problem):
    network = deep_network()
    tensors = to_torch(network, random_params(network, seed=5))
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ValueError, match=f"{problem}.*configuration") as error:
        torch_weights.from_torch(tensors, shapes_of(network))
    assert ";" not in str(error.value)


def test_schedule_buffers_are_the_published_programs():
    with np.load(GOLDEN / "diffpose_case.npz") as case:
        names = [name for name in case.files if name.startswith("schedule/")]
        golden = {name.removeprefix("schedule/"): case[name] for name in names}
    buffers = torch_weights.schedule_buffers(diffusion.cosine_schedule(25, 0.008, 0.999))
    kept = np.cumprod(1 - np.float64(golden["betas"]))
    variance = np.float64(golden["posterior_variance"])
    expected = golden | {
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "p2_loss_weight": np.ones(25),
    }
    assert variance[0] == 0
    assert len(expected) == 13
    assert buffers.keys() == expected.keys()
    for name, values in buffers.items():
        assert (values.dtype, values.shape) == (np.float32, (25,))
        np.testing.assert_allclose(values, expected[name], rtol=5e-5, err_msg=name)


def test_another_target_is_refused():
    network = deep_network(target="edm")
    with pytest.raises(WeightsError, match='not the target "edm"'):
        to_torch(network, random_params(network, 0))


def test_the_schedule_of_the_weights_is_checked():
    schedule = diffusion.cosine_schedule(25, 0.008, 0.999)
    torch_weights.check_schedule(torch_weights.schedule_buffers(schedule), schedule)
    torch_weights.check_schedule({}, schedule)  # a state dict without it
    for arguments in ((24, 0.008, 0.999), (25, 0.009, 0.999), (25, 0.008, 0.99)):
        tensors = torch_weights.schedule_buffers(diffusion.cosine_schedule(*arguments))
        with pytest.raises(WeightsError, match=f"of {arguments[0]} steps, than .* 25; see"):
            torch_weights.check_schedule(tensors, schedule)


def test_what_the_program_never_uses_is_neutral():
    network = deep_network()
    tensors = to_torch(network, random_params(network, seed=6))
    centres = tensors["condition_emb.pos_encoder.centers"]
    np.testing.assert_allclose(centres, np.linspace(-1, 1, 8), atol=1e-6)
    norms = {
        f"denoise_fn.res_pose{block}.bn{layer}.{kind}": kind
        for block in (1, 2)
        for layer in (1, 2)
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    others = {"condition_emb.conf_out.weight", "condition_emb.conf_out.bias",
              "condition_emb.pos_encoder.centers",
              *torch_weights.schedule_buffers(network.schedule)}  # fmt: skip
    assert set(torch_weights.unused(tensors)) == norms.keys() | others
    for name, kind in norms.items():
        is_count = kind == "num_batches_tracked"
        assert (tensors[name] == (kind in ("weight", "running_var"))).all()
        assert tensors[name].shape == (() if is_count else (32,))
        assert tensors[name].dtype == (np.int64 if is_count else np.float32)
