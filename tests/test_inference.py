"""From configuration to modules, and from heatmaps to hypotheses in millimetres."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from small import distinct_config, random_heatmaps, small_model, small_network

from diffpose_jax import config as config_lib
from diffpose_jax.method import diffusion, heatmaps, sampling
from diffpose_jax.method import network as model
from diffpose_jax.skeleton import H36M_JOINTS

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
PER_HYPOTHESIS = {"candidates": "per_hypothesis"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


# --- pose vectors ------------------------------------------------------------------------


def hip_between_the_hips(poses_mm):
    right, left = (poses_mm[..., [H36M_JOINTS.index(name)], :] for name in ("RHip", "LHip"))
    poses_mm = np.concatenate([(right + left) / 2, poses_mm[..., 1:, :]], axis=-2)
    return poses_mm - poses_mm[..., :1, :]


def test_a_pose_vector_is_axis_major_mean_centred_decimetres():
    vector = np.asarray(model.pose_to_vector(jnp.asarray(TRUTH))).reshape(-1, 3, 16)
    expected = np.float64(TRUTH)[:, 1:] / 100
    expected = (expected - expected.mean(1, keepdims=True)).swapaxes(1, 2)
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    np.testing.assert_allclose(vector.mean(-1), 0, atol=1e-5)


@pytest.mark.parametrize("pose_scale", [1.0, 10.0])
def test_poses_to_vectors_and_back(pose_scale):
    poses_mm = hip_between_the_hips(TRUTH)[:, None]  # any leading axes
    vector = model.pose_to_vector(jnp.asarray(poses_mm), pose_scale)
    assert vector.shape == (len(TRUTH), 1, 48)
    back = model.vector_to_pose(vector, pose_scale)
    np.testing.assert_allclose(back, poses_mm, atol=1e-3)
    assert not back[..., 0, :].any()


def test_the_place_of_a_pose_is_not_in_its_vector():
    moved = jnp.asarray(TRUTH + np.float32([300, -50, 4000]))
    vector = model.pose_to_vector(jnp.asarray(TRUTH))
    np.testing.assert_allclose(model.pose_to_vector(moved), vector, atol=1e-4)


def random_samples(seed):
    rng = np.random.default_rng(seed)
    cells, likelihood = rng.integers(0, 64 * 64, (6, 16)), rng.uniform(0, 1, (6, 16))
    return heatmaps.Candidates(jnp.asarray(cells), jnp.asarray(likelihood, jnp.float32))


# --- parameters and loss -----------------------------------------------------------------


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
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_loss_has_one_condition_for_all_draws():
    """Against the parts put together by hand."""
    changes = {"encoder_dropout": 0.0, "joint_dropout": 0.0}
    network, params = small_network(**changes), small_model(**changes).params
    x_0 = model.pose_to_vector(jnp.asarray(TRUTH[0]))

    def by_hand(params, key, samples, x_0):
        _, noise_key = jax.random.split(key)
        t, noise = diffusion.draw_time_and_noise(noise_key, network.schedule, (5, 48))
        condition = jnp.tile(network.condition(params, samples), (5, 1))
        x_t = diffusion.q_sample(network.schedule, jnp.tile(x_0, (5, 1)), t, noise)
        eps = network.denoise(params, x_t, t, network.project_condition(params, condition))
        return jnp.mean((eps - noise) ** 2)

    arguments = params, jax.random.key(3), random_samples(1), x_0
    loss = jax.jit(functools.partial(network.loss, num_draws=5))(*arguments)
    np.testing.assert_allclose(loss, jax.jit(by_hand)(*arguments), rtol=1e-5)


def test_loss_uses_dropout():
    network = small_network(encoder_dropout=0.0)
    network = dataclasses.replace(network, encoder=network.encoder.clone(joint_dropout=1.0))
    params = small_model().params
    loss = jax.jit(functools.partial(network.loss, params, jax.random.key(4), x_0=jnp.zeros(48)))
    first, second = random_samples(5), random_samples(6)
    assert loss(first) == loss(second)  # all joints dropped: candidates do not matter
    condition = jax.jit(functools.partial(network.condition, params))
    assert jnp.abs(condition(first) - condition(second)).max() > 1e-3


# --- hypotheses --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_hypotheses_are_hip_centred_poses_none_of_them_equal(changes):
    poses_mm = np.asarray(small_model(**changes).sample(jax.random.key(0), random_heatmaps(2, 3)))
    assert poses_mm.shape == (3, 200, 17, 3)
    assert poses_mm.dtype == np.float32
    assert np.isfinite(poses_mm).all()
    assert not poses_mm[..., 0, :].any()
    hips = poses_mm[..., [H36M_JOINTS.index("RHip"), H36M_JOINTS.index("LHip")], :]
    np.testing.assert_allclose(hips.sum(-2), 0, atol=1e-2)
    # Also not between images.
    assert len(np.unique(poses_mm.reshape(600, -1), axis=0)) == 600


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_the_key_and_the_heatmaps_decide_not_the_batch(changes):
    sample = small_model(**changes).sample
    maps, key = random_heatmaps(2, 3), jax.random.key(1)
    poses_mm = sample(key, maps)
    np.testing.assert_array_equal(sample(key, maps), poses_mm)
    np.testing.assert_allclose(
        sample(key, maps[[2, 0, 1]]), poses_mm[jnp.array([2, 0, 1])], atol=0.1
    )
    if not changes:
        np.testing.assert_allclose(sample(key, maps[1:2]), poses_mm[1:2], atol=0.1)
    other = sample(jax.random.key(2), maps)
    assert not np.isin(other[..., 1:, :], poses_mm[..., 1:, :]).all(axis=(2, 3)).any()


def test_more_hypotheses_keep_the_first_ones():
    sample = small_model(**PER_HYPOTHESIS).sample
    maps, key = random_heatmaps(2, 3), jax.random.key(1)
    few = sample(key, maps, num_hypotheses=7)
    assert few.shape == (3, 7, 17, 3)
    np.testing.assert_allclose(few, sample(key, maps)[:, :7], atol=0.1)


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_images_are_spread_over_devices_remainders_included(changes):
    """On eight of them: each image once, in order, as on one device."""
    small, key = small_model(**changes), jax.random.key(5)
    maps = random_heatmaps(6, 19)
    expected = small.network.sample(small.params, key, jnp.asarray(maps), 7)
    for number in (1, 7, 8, 9, 19):
        poses_mm = small.sample(key, maps[:number], 7)
        assert poses_mm.shape == (number, 7, 17, 3)
        np.testing.assert_allclose(poses_mm, expected[:number], atol=0.1)


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_the_fast_way_is_the_plain_one(changes):
    """To 1e-5 of the deviation: one hypothesis after the other, one step after the other."""
    small, key, number = small_model(**changes), jax.random.key(5), 4
    network, params, maps = small.network, small.params, jnp.asarray(random_heatmaps(6, 3))
    schedule, fast = network.schedule, np.float64(small.sample(key, maps, number))
    denoise = jax.jit(network.denoise)
    plain = np.zeros_like(fast)
    for image, image_key in enumerate(sampling.image_keys(key, maps)):
        candidate_key, noise_key = jax.random.split(image_key)
        for m in range(number):
            own = jax.random.fold_in(candidate_key, m) if changes else candidate_key
            condition = network.condition(params, network.draw_evidence(own, maps[image]))
            projected = network.project_condition(params, condition)
            noise = jax.random.normal(
                jax.random.fold_in(noise_key, m), (schedule.num_steps + 1, 48)
            )
            x = np.float64(noise[0])
            for i, t in enumerate(reversed(range(schedule.num_steps))):
                eps = np.float64(denoise(params, jnp.float32(x), jnp.int32(t), projected))
                a = schedule.alphas_cumprod[t]
                x_0 = np.clip((x - np.sqrt(1 - a) * eps) / np.sqrt(a), -network.clip, network.clip)
                x = schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x
                x = x + np.sqrt(schedule.posterior_variance[t]) * np.float64(noise[i + 1])
            plain[image, m] = model.vector_to_pose(jnp.float32(x), network.pose_scale)
    assert np.sqrt(np.mean((fast - plain) ** 2)) < 1e-5 * fast.std()


def test_more_images_than_fit_are_taken_in_turn(monkeypatch):
    small, key = small_model(), jax.random.key(5)
    maps = random_heatmaps(7, 37)
    expected = small.sample(key, maps, 3)
    monkeypatch.setattr(model, "MAX_IMAGES", 2)
    np.testing.assert_allclose(small.sample(key, maps, 3), expected, atol=0.1)


class CountsTraces(model.DiffPose):
    """Notes the images of each compilation."""

    def draw_evidence(self, key, heatmaps):
        traces.append(heatmaps.shape)
        return super().draw_evidence(key, heatmaps)


traces = []


def of_class(network, of):
    return of(**{f.name: getattr(network, f.name) for f in dataclasses.fields(network)})


def test_few_shapes_are_compiled():
    small = small_model()
    small = dataclasses.replace(small, network=of_class(small.network, CountsTraces))
    maps = random_heatmaps(8, 32)
    traces.clear()
    for number in range(1, 33):
        small.sample(jax.random.key(number), maps[:number], 2)
    assert len(traces) == 3  # 1, 2 and 4 images on each of eight devices


@pytest.mark.parametrize("solver", ["ddpm:3", "ddim:2", "dpm++:4"])
def test_other_solvers(solver):
    small, maps = small_model(), random_heatmaps(9, 2)
    poses_mm = small.sample(jax.random.key(0), maps, 30, solver)
    assert poses_mm.shape == (2, 30, 17, 3)
    assert jnp.isfinite(poses_mm).all()
    paper = small.sample(jax.random.key(0), maps, 30)
    assert jnp.abs(poses_mm[..., 1:, :] - paper[..., 1:, :]).mean() > 1
    with pytest.raises(ValueError, match="solver must be"):
        small.sample(jax.random.key(0), maps, 30, "euler")


class SignOfCondition(model.DiffPose):
    """A noise so large that x_0 is its clip with the condition's sign, whatever x_t is."""

    def denoise(self, params, x_t, t, projected):
        return jnp.broadcast_to(1e6 * projected[..., :48], x_t.shape)


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_candidates_are_drawn_once_an_image_or_once_a_hypothesis(changes):
    small = small_model(denoiser_width=48, **changes)
    network = of_class(small.network, SignOfCondition)
    poses_mm = network.sample(
        small.params, jax.random.key(0), jnp.asarray(random_heatmaps(2, 2)), 8
    )
    for image in poses_mm:
        all_equal = len(np.unique(np.round(image), axis=0)) == 1
        assert all_equal == (changes != PER_HYPOTHESIS)
    assert (jnp.round(poses_mm[0, 0]) != jnp.round(poses_mm[1, 0])).any()


def test_any_real_heatmaps():
    sample = small_model().sample
    maps = np.float16(random_heatmaps(3, 1))
    expected = sample(jax.random.key(3), np.float32(maps))
    for same in (maps, np.float64(maps), jnp.asarray(maps), np.float32(maps).tolist()):
        np.testing.assert_array_equal(sample(jax.random.key(3), same), expected)


def test_an_unknown_joint_is_no_error():
    maps = random_heatmaps(4, 1)
    maps[:, 5] = -0.01
    assert jnp.isfinite(small_model().sample(jax.random.key(4), maps)).all()
    assert jnp.isfinite(small_model().sample(jax.random.key(4), np.zeros_like(maps))).all()


@pytest.mark.parametrize(
    ("maps", "num_hypotheses", "problem"),
    [
        (np.zeros((2, 16, 64, 63)), 200, r"\(2, 16, 64, 63\)"),
        (np.zeros((16, 64, 64)), 200, r"heatmaps\[None\]"),
        (np.full((1, 16, 64, 64), np.nan), 200, "image 0, joint 0"),
        (np.zeros((1, 16, 64, 64)), 0, "num_hypotheses must be at least 1, not 0"),
        (np.zeros((1, 16, 64, 64)), -5, "num_hypotheses must be at least 1, not -5"),
    ],
)
def test_bad_input_is_one_clear_error(maps, num_hypotheses, problem):
    with pytest.raises(ValueError, match=problem):
        small_model().sample(jax.random.key(0), maps, num_hypotheses)


@pytest.mark.parametrize("encoder", ["candidates", "heatmaps"])
def test_hypotheses_of_other_encoders(encoder):
    """They follow the heatmaps that they are conditioned on."""
    other = small_model(encoder=encoder, resnet_width=4)
    assert other.network.reads_heatmaps == (encoder == "heatmaps")
    maps = random_heatmaps(5, 2)
    poses_mm = other.sample(jax.random.key(6), maps, 4)
    assert poses_mm.shape == (2, 4, 17, 3)
    assert jnp.isfinite(poses_mm).all()

    @jax.jit
    def draw(keys):
        evidence = jax.vmap(other.network.draw_evidence)(keys, maps)
        return evidence, other.network.condition(other.params, evidence)

    evidence, condition = draw(jax.random.split(jax.random.key(7)))
    if encoder == "heatmaps":
        np.testing.assert_array_equal(evidence, maps)
    assert condition.shape == (2, {"candidates": 3 * 6 * 16, "heatmaps": 8 * 4}[encoder])
    assert jnp.abs(condition[0] - condition[1]).max() > 0.01


# --- configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"candidates": "per_batch"}, "candidates must be one of per_image, per_hypothesis, not"),
        ({"coordinates": "pixels"}, "coordinates must be one of image, standardised, not 'pix"),
        ({"matmul_dtype": "float64"}, "matmul_dtype must be one of float32, bfloat16, float16, n"),
        ({"encoder": "resnet"}, "encoder must be one of embedding, candidates, heatmaps, not"),
        ({"likelihood": "raw"}, "likelihood must be one of height, probability, not 'raw'"),
        ({"resnet_width": 6}, "resnet_width must be a positive multiple of 4, not 6"),
        ({"resnet_width": 0}, "resnet_width must be a positive multiple of 4, not 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, not 0"),
        ({"encoder_heads": 3}, "3 encoder_heads do not divide 2 num_kernels = 16"),
        ({"diffusion_steps": 1}, r"diffusion_steps must be 2 to 10000, not 1"),
    ],
)
def test_a_bad_value_is_named(changes, problem):
    with pytest.raises(ValueError, match=problem):
        small_network(**changes)


def test_unknown_and_missing_fields_are_named():
    config = distinct_config().model
    config.encoder_layer = config.encoder_layers
    del config.encoder_layers
    problem = r"config\.model: unknown field encoder_layer, missing field encoder_layers"
    with pytest.raises(ValueError, match=problem):
        config_lib.call(model.build, config, "config.model")


def test_fields_reach_their_modules():
    network = small_network(
        candidates="per_hypothesis", coordinates="standardised", include_argmax=False,
        likelihood="probability", likelihood_scaling=False, joint_dropout=0.5, pose_scale=7.0,
        schedule_offset=0.1, clip=3.0, num_candidates=9, denoiser_blocks=3, encoder_dropout=0.25,
    )  # fmt: skip
    assert network.candidates_per_hypothesis
    assert network.encoder.standardise
    assert not network.include_argmax
    assert network.normalised_likelihood
    assert not network.encoder.likelihood_scaling
    assert network.encoder.joint_dropout == 0.5
    assert network.encoder.dropout == 0.25
    assert network.denoiser.num_blocks == 3
    expected = diffusion.cosine_schedule(5, 0.1, 0.999).betas
    np.testing.assert_array_equal(network.schedule.betas, expected)
    assert (network.pose_scale, network.clip) == (7.0, 3.0)
    samples = jax.eval_shape(network.draw_candidates, jax.random.key(0), jnp.zeros((16, 64, 64)))
    assert samples.cells.shape == (9, 16)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("bfloat16", 1e-4, 0.05), ("float16", 1e-5, 0.005)]
)
def test_16_bits_are_near_float32(dtype, low, high):
    exact = small_model()
    rough = model.Model(small_network(matmul_dtype=dtype), exact.params, exact.config)
    x_t, t = jnp.asarray(np.random.default_rng(5).normal(size=(9, 48)), jnp.float32), jnp.arange(9)

    def denoise(network, params):
        projected = network.project_condition(params, network.condition(params, random_samples(7)))
        return network.denoise(params, x_t, t, projected[None])

    expected, result = (
        jax.jit(functools.partial(denoise, m.network))(m.params) for m in (exact, rough)
    )
    assert result.dtype == jnp.float32
    assert low < jnp.std(result - expected) / jnp.std(expected) < high


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_sample(dtype):
    rough = small_model(matmul_dtype=dtype)
    poses_mm = rough.sample(jax.random.key(1), random_heatmaps(2, 1), 3)
    assert poses_mm.dtype == jnp.float32
    assert jnp.isfinite(poses_mm).all()
