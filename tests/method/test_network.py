"""From configuration to modules, pose vectors, and the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from small import random_heatmaps, small_model, small_network

from diffpose_jax.method import diffusion, heatmaps
from diffpose_jax.method.pose_vector import pose_to_vector, vector_to_pose
from diffpose_jax.skeleton import H36M_JOINTS

EDM = {"target": "edm", "pose_scale": 7.0}
TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def hip_between_the_hips(poses_mm):
    right, left = (poses_mm[..., [H36M_JOINTS.index(name)], :] for name in ("RHip", "LHip"))
    poses_mm = np.concatenate([(right + left) / 2, poses_mm[..., 1:, :]], axis=-2)
    return poses_mm - poses_mm[..., :1, :]


def test_a_pose_vector_is_axis_major_mean_centred_decimetres():
    vector = np.asarray(pose_to_vector(jnp.asarray(TRUTH))).reshape(-1, 3, 16)
    expected = np.float64(TRUTH)[:, 1:] / 100
    expected = (expected - expected.mean(1, keepdims=True)).swapaxes(1, 2)
    np.testing.assert_allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize("pose_scale", [1.0, 10.0])
def test_poses_to_vectors_and_back(pose_scale):
    poses_mm = hip_between_the_hips(TRUTH)[:, None]  # any leading axes
    vector = pose_to_vector(jnp.asarray(poses_mm), pose_scale)
    assert vector.shape == (len(TRUTH), 1, 48)
    back = vector_to_pose(vector, pose_scale)
    np.testing.assert_allclose(back, poses_mm, atol=1e-3)
    assert not back[..., 0, :].any()


def random_samples(seed):
    rng = np.random.default_rng(seed)
    cells, likelihood = rng.integers(0, 64 * 64, (6, 16)), rng.uniform(0, 1, (6, 16))
    return heatmaps.Candidates(jnp.asarray(cells), jnp.asarray(likelihood, jnp.float32))


def test_parameters_of_the_paper_s_size():
    network = small_network(
        num_candidates=32, num_kernels=64, encoder_layers=4, encoder_feed_forward=512,
        condition_size=2048, denoiser_width=1024, denoiser_blocks=2,
    )  # fmt: skip
    params = jax.eval_shape(network.init, jax.random.key(0))
    # A linear layer from n to m has m (n + 1) numbers.
    encoder_layer = 3 * 128 * 129 + 128 * 129 + 512 * 129 + 128 * 513 + 4 * 128
    encoder = 128 * 129 + 16 * 128 + 4 * encoder_layer + 2048 * 2049
    denoiser = 1024 * 2098 + 4 * 1024 * 1025 + 48 * 1025
    sizes = {k: sum(p.size for p in jax.tree.leaves(tree)) for k, tree in params.items()}
    assert sizes == {"encoder": encoder, "denoiser": denoiser}


@pytest.mark.parametrize("target", ["noise", "edm"])
def test_loss_has_one_condition_for_all_draws(target):
    """Against the parts put together by hand."""
    changes = {"encoder_dropout": 0.0, "joint_dropout": 0.0, "target": target}
    network, params = small_network(**changes), small_model(**changes).params
    x_0 = pose_to_vector(jnp.asarray(TRUTH[0]))

    def by_hand(params, key, samples, x_0):
        _, noise_key = jax.random.split(key)
        t, noise = diffusion.draw_time_and_noise(noise_key, network.schedule, (5, 48))
        condition = jnp.tile(network.condition(params, samples), (5, 1))
        x_t = network.schedule.level(t).noised(jnp.tile(x_0, (5, 1)), noise)
        share = jnp.asarray(network.schedule.alphas_cumprod, jnp.float32)[t]
        time = t if target == "noise" else 0.25 * jnp.log((1 - share) / share)
        projected = network.project_condition(params, condition)
        found = network.predict(params, x_t, time, projected)
        if target == "noise":
            return jnp.mean((found - noise) ** 2)
        # What the best linear prediction of x_0 leaves to find, over its deviation.
        mean, std = (params["moments"][name][None] for name in ("mean", "std"))
        a = share[:, None]
        variance = a * std**2 + 1 - a
        left = x_0[None] - mean - jnp.sqrt(a) * std**2 / variance * (x_t - jnp.sqrt(a) * mean)
        return jnp.mean((found - left / (std * jnp.sqrt((1 - a) / variance))) ** 2)

    arguments = params, jax.random.key(3), random_samples(1), x_0
    loss = jax.jit(functools.partial(network.loss, num_draws=5))(*arguments)
    np.testing.assert_allclose(loss, jax.jit(by_hand)(*arguments), rtol=1e-5)


def test_the_moments_of_the_training_poses_are_measured():
    """Where the target needs them and the configuration does not say."""
    edm, given, noise = (small_network(**changes) for changes in (EDM, EDM | {"data_std": 2.5}, {}))
    vectors = np.float64(pose_to_vector(jnp.asarray(TRUTH), 7.0))
    found = edm.with_moments({}, TRUTH)["moments"]
    np.testing.assert_allclose(found["mean"], vectors.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["std"], vectors.std(0), rtol=1e-5)
    one_frame = edm.with_moments({}, TRUTH[:1])["moments"]
    np.testing.assert_allclose(one_frame["std"], 1e-3)
    params = given.init(jax.random.key(0))
    assert given.with_moments(params, TRUTH) is params
    np.testing.assert_array_equal(params["moments"]["mean"], np.zeros(48))
    np.testing.assert_array_equal(params["moments"]["std"], np.full(48, 2.5))
    assert noise.with_moments({}, TRUTH) == {}


def test_loss_uses_dropout():
    network = small_network(encoder_dropout=0.0)
    network = dataclasses.replace(network, encoder=network.encoder.clone(joint_dropout=1.0))
    params = small_model().params
    loss = jax.jit(functools.partial(network.loss, params, jax.random.key(4), x_0=jnp.zeros(48)))
    first, second = random_samples(5), random_samples(6)
    assert loss(first) == loss(second)  # all joints dropped: candidates do not matter
    condition = jax.jit(functools.partial(network.condition, params))
    assert jnp.abs(condition(first) - condition(second)).max() > 1e-3


def test_fields_reach_their_modules():
    network = small_network(
        candidates="per_hypothesis", coordinates="standardised", include_argmax=False,
        likelihood="probability", likelihood_scaling=False, joint_dropout=0.5, pose_scale=7.0,
        schedule_offset=0.1, clip=3.0, num_candidates=9, denoiser_blocks=3, encoder_dropout=0.25,
        target="edm", data_std=2.5, candidate_sets=3,
    )  # fmt: skip
    assert network.candidates_per_hypothesis
    assert network.encoder.standardise
    assert network.sampler == heatmaps.CandidateSampler(9, include_argmax=False, normalised=True)
    assert not network.encoder.likelihood_scaling
    assert network.encoder.joint_dropout == 0.5
    assert network.encoder.dropout == 0.25
    assert network.denoiser.num_blocks == 3
    expected = diffusion.cosine_schedule(5, 0.1, 0.999).betas
    np.testing.assert_array_equal(network.schedule.betas, expected)
    assert (network.pose_scale, network.clip) == (7.0, 3.0)
    assert (network.target, network.data_std, network.candidate_sets) == ("edm", 2.5, 3)
    # Of heatmaps that are read themselves all sets would be the same.
    assert small_network(encoder="heatmaps", candidate_sets=3).candidate_sets == 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("bfloat16", 1e-4, 0.05), ("float16", 1e-5, 0.005)]
)
def test_16_bits_are_near_float32(dtype, low, high):
    exact, rough = small_model(), small_network(matmul_dtype=dtype)
    x_t, t = jnp.asarray(np.random.default_rng(5).normal(size=(9, 48)), jnp.float32), jnp.arange(9)

    def denoise(network, params):
        projected = network.project_condition(params, network.condition(params, random_samples(7)))
        return network.predict(params, x_t, t, projected[None])

    expected, result = (
        jax.jit(functools.partial(denoise, network))(exact.params)
        for network in (exact.network, rough)
    )
    assert low < jnp.std(result - expected) / jnp.std(expected) < high
    poses_mm = small_model(matmul_dtype=dtype).sample(jax.random.key(1), random_heatmaps(2, 1), 3)
    assert jnp.isfinite(poses_mm).all()
