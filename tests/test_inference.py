"""From heatmaps to hypotheses in millimetres, `Model.draw`, and to densities, `Model.log_prob`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from paths import GOLDEN
from small import random_heatmaps, small_model

import diffpose_jax
from diffpose_jax import inference
from diffpose_jax.method import diffusion, likelihood, sampling
from diffpose_jax.method.pose_vector import pose_to_vector, vector_to_pose
from diffpose_jax.skeleton import H36M_JOINTS

PER_HYPOTHESIS = {"candidates": "per_hypothesis"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("candidates", ["per_image", "per_hypothesis"])
def test_checkpoints_of_earlier_versions_give_the_poses_they_gave(candidates):
    """Exports with the old names of fields, and what the code that wrote them drew."""
    with np.load(GOLDEN / "old_checkpoint_poses.npz") as golden:
        model = diffpose_jax.load(GOLDEN / f"old_checkpoint_{candidates}")
        for solver in ("ddpm", "ddpm:2", "ddim:3", "dpm++:4"):
            maps = np.float32(golden["heatmaps"])
            poses_mm = model.sample(jax.random.key(7), maps, 3, solver)
            expected = golden[f"{candidates}/{solver}"]
            np.testing.assert_allclose(poses_mm, expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_hypotheses_are_hip_centred_poses_none_of_them_equal(changes):
    poses_mm = np.asarray(small_model(**changes).sample(jax.random.key(0), random_heatmaps(2, 3)))
    assert poses_mm.shape == (3, 200, 17, 3)
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
    if changes == PER_HYPOTHESIS:  # more hypotheses keep the first ones
        np.testing.assert_allclose(sample(key, maps, 7), poses_mm[:, :7], atol=0.1)
    else:
        np.testing.assert_allclose(sample(key, maps[1:2]), poses_mm[1:2], atol=0.1)
    other = sample(jax.random.key(2), maps)
    assert not np.isin(other[..., 1:, :], poses_mm[..., 1:, :]).all(axis=(2, 3)).any()


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_images_are_spread_over_devices_remainders_included(changes):
    """On eight of them: each image once, in order, as on one device."""
    small, key = small_model(**changes), jax.random.key(5)
    maps = random_heatmaps(6, 19)
    draw = small.network.draw
    expected = draw(small.params, key, small.solver, jnp.asarray(maps), 7).poses_mm
    for number in (1, 7, 8, 9, 19):
        poses_mm = small.sample(key, maps[:number], 7)
        assert poses_mm.shape == (number, 7, 17, 3)
        np.testing.assert_allclose(poses_mm, expected[:number], atol=0.1)


def x_0_by_hand(model, x, t, found):
    """In float64: of the noise that was found, or of the target of Karras et al. (2022)."""
    a = model.network.schedule.alphas_cumprod[t]
    if model.network.target == "noise":
        return (x - np.sqrt(1 - a) * found) / np.sqrt(a)
    mean, std = (np.float64(model.params["moments"][name]) for name in ("mean", "std"))
    variance = a * std**2 + 1 - a
    best_linear = mean + np.sqrt(a) * std**2 / variance * (x - np.sqrt(a) * mean)
    return best_linear + std * np.sqrt(1 - a) / np.sqrt(variance) * found


@pytest.mark.parametrize(
    "changes", [{}, PER_HYPOTHESIS, {"target": "edm"}, {"candidate_sets": 3}], ids=str
)
def test_the_fast_way_is_the_plain_one(changes):
    """To 1e-5 of the deviation: one hypothesis after the other, one step after the other.

    The poses are drawn under the candidates that the draw holds.
    """
    small, key, number = small_model(**changes), jax.random.key(5), 4
    network, params, maps = small.network, small.params, jnp.asarray(random_heatmaps(6, 3))
    drawn = small.draw(key, maps, number)
    np.testing.assert_allclose(small.sample(key, maps, number), drawn.poses_mm, atol=0.1)
    schedule, fast = network.schedule, np.float64(drawn.poses_mm)
    alpha_bar = schedule.alphas_cumprod
    of_x_t, of_x_0, variance = diffusion.posterior(alpha_bar, np.append(1.0, alpha_bar[:-1]))
    predict, sets = jax.jit(network.predict), changes.get("candidate_sets", 1)
    sets = number if changes == PER_HYPOTHESIS else sets
    plain = np.zeros_like(fast)
    for image, image_key in enumerate(sampling.image_keys(key, maps)):
        candidate_key, noise_key = jax.random.split(image_key)
        for m in range(number):
            own = jax.random.fold_in(candidate_key, m % sets) if sets > 1 else candidate_key
            candidates = network.encoder_input(own, maps[image])
            place = (image, m) if sets > 1 else (image,)
            chex.assert_trees_all_equal(
                candidates, jax.tree.map(lambda x, at=place: x[at], drawn.candidates)
            )
            condition = network.condition(params, candidates)
            projected = network.project_condition(params, condition)
            noise = jax.random.normal(
                jax.random.fold_in(noise_key, m), (schedule.num_steps + 1, 48)
            )
            x = np.float64(noise[0])
            for i, t in enumerate(reversed(range(schedule.num_steps))):
                time = network.time_input(jnp.int32(t), schedule.level(jnp.int32(t)))
                found = np.float64(predict(params, jnp.float32(x), time, projected))
                x_0 = np.clip(x_0_by_hand(small, x, t, found), -network.clip, network.clip)
                step_noise = np.sqrt(variance[t]) * np.float64(noise[i + 1])
                x = of_x_0[t] * x_0 + of_x_t[t] * x + step_noise
            plain[image, m] = vector_to_pose(jnp.float32(x), network.pose_scale)
    assert np.sqrt(np.mean((fast - plain) ** 2)) < 1e-5 * fast.std()


def test_more_images_than_fit_are_taken_in_turn(monkeypatch):
    small, key = small_model(), jax.random.key(5)
    maps = random_heatmaps(7, 37)
    expected = small.sample(key, maps, 3)
    monkeypatch.setattr(inference, "MAX_IMAGES", 2)
    np.testing.assert_allclose(small.sample(key, maps, 3), expected, atol=0.1)


def test_few_shapes_are_compiled(monkeypatch):
    """1, 2 and 4 images on each of eight devices."""
    chex.clear_trace_counter()
    draw = chex.assert_max_traces(inference._draw_poses, n=3)
    monkeypatch.setattr(inference, "_draw_poses", draw)
    small, maps = small_model(), random_heatmaps(8, 32)
    for number in range(1, 33):
        small.sample(jax.random.key(number), maps[:number], 2)
    with pytest.raises(AssertionError, match="max"):
        small.sample(jax.random.key(0), maps[:1], 3)


def test_an_unknown_joint_is_no_error():
    maps = random_heatmaps(4, 1)
    maps[:, 5] = -0.01
    assert jnp.isfinite(small_model().sample(jax.random.key(4), maps)).all()
    assert jnp.isfinite(small_model().sample(jax.random.key(4), np.zeros_like(maps))).all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heatmaps": np.zeros((16, 64, 64))}, r"heatmaps\[None\]"),
        ({"heatmaps": np.full((1, 16, 64, 64), np.nan)}, "image 0, joint 0"),
        ({"num_hypotheses": 0}, "num_hypotheses must be at least 1, not 0"),
        ({"solver": "euler"}, "solver must be"),
        (
            {"solver": "ddpm:2@4+cov"},
            r"ddpm:2@4\+cov needs the model's prediction_errors\.npz.*experiments\.evaluate",
        ),
    ],
)
def test_bad_input_is_one_clear_error(changes, problem):
    arguments = {"heatmaps": np.zeros((1, 16, 64, 64)), "num_hypotheses": 30} | changes
    with pytest.raises(ValueError, match=problem):
        small_model().sample(jax.random.key(0), **arguments)


def random_poses(seed, *batch):
    return np.random.default_rng(seed).normal(0, 300, (*batch, 17, 3)).astype(np.float32)


@pytest.mark.parametrize("pose_scale", [10.0, 7.0])
def test_the_density_of_a_gaussian(pose_scale):
    """That of the moments, where the network adds nothing to them; in decimetres in any unit."""
    gaussian = small_model(target="edm", pose_scale=pose_scale, diffusion_steps=25)
    mean_mm, unit = random_poses(2) / 3, pose_scale / 10
    poses_mm = mean_mm + random_poses(1, 2, 3)
    mean = unit * pose_to_vector(jnp.asarray(mean_mm))
    params = jax.tree.map(jnp.zeros_like, gaussian.params)
    params["moments"] = {"mean": mean, "std": jnp.full(48, 2.5 * unit)}
    gaussian = dataclasses.replace(gaussian, params=params)
    found = gaussian.log_prob(jax.random.key(0), random_heatmaps(2, 2), poses_mm)
    # At t = 0 the vectors have been noised once.
    alpha_bar = gaussian.network.schedule.alphas_cumprod[0]
    std = np.sqrt(alpha_bar * 2.5**2 + (1 - alpha_bar) / unit**2)
    vectors = np.float64(pose_to_vector(jnp.asarray(poses_mm)))
    squares = np.sum((vectors - np.sqrt(alpha_bar) * np.float64(mean) / unit) ** 2, axis=-1)
    expected = -0.5 * squares / std**2 - 45 * np.log(std * np.sqrt(2 * np.pi))
    assert np.std(expected) > 1
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_density_is_the_mean_of_those_under_sets_of_candidates():
    """Each of them that of the probability flow under its condition: against it by hand."""
    small, key = small_model(target="edm"), jax.random.key(3)
    network, params = small.network, small.params
    maps, poses_mm = random_heatmaps(3, 2), random_poses(4, 2, 2)
    basis = likelihood.centred_basis(16)

    @jax.jit
    def by_hand(candidate_key, heatmaps, pose_mm):
        condition = network.condition(params, network.encoder_input(candidate_key, heatmaps))
        projected = network.project_condition(params, condition)

        def predict(x_t, t, level):
            target, mean = network.target_at(params, level)
            found = network.predict(params, x_t, network.time_input(t, level), projected)
            return mean + target.skip * (x_t - level.signal * mean) + target.out * found

        y = pose_to_vector(pose_mm) @ jnp.asarray(basis, jnp.float32)
        return likelihood.log_density(predict, network.schedule, y, basis)

    of_sets = np.zeros((2, 2, 3))
    for image, image_key in enumerate(sampling.image_keys(key, jnp.asarray(maps))):
        candidate_key = jax.random.split(image_key)[0]
        for m, s in np.ndindex(2, 3):
            of_sets[image, m, s] = by_hand(
                jax.random.fold_in(candidate_key, s),
                *(jnp.asarray(maps[image]), jnp.asarray(poses_mm[image, m])),
            )
    assert np.ptp(of_sets, axis=2).min() > 0.01
    scale = 1e-5 * np.abs(of_sets).max()
    expected = scipy.special.logsumexp(of_sets, axis=-1) - np.log(3)
    one, three = (small.log_prob(key, maps, poses_mm, number) for number in (1, 3))
    np.testing.assert_allclose(one, of_sets[..., 0], atol=scale)
    np.testing.assert_allclose(three, expected, atol=scale)
    np.testing.assert_array_equal(small.log_prob(key, maps, poses_mm, 3), three)


def test_densities_of_images_spread_over_devices():
    """Nine on eight of them, remainders included: each as if it were alone."""
    small, key = small_model(), jax.random.key(5)
    maps, poses_mm = random_heatmaps(6, 9), random_poses(7, 9, 2)
    found = small.log_prob(key, maps, poses_mm)
    assert found.shape == (9, 2)
    assert len(np.unique(found)) == 18
    for i in (0, 4, 8):
        alone = small.log_prob(key, maps[[i]], poses_mm[[i]])[0]
        np.testing.assert_allclose(found[i], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heatmaps": np.zeros((16, 64, 64))}, r"heatmaps\[None\]"),
        ({"poses_mm": np.zeros((2, 17, 3))}, r"poses_mm must be \(B, M, 17, 3\), not \(2, 17, 3\)"),
        ({"poses_mm": np.zeros((2, 1, 16, 3))}, r"not \(2, 1, 16, 3\)"),
        ({"poses_mm": np.zeros((3, 1, 17, 3))}, "2 heatmaps, but poses of 3 images"),
        ({"poses_mm": np.full((2, 1, 17, 3), np.nan)}, "poses_mm holds numbers that are"),
        ({"num_candidate_sets": 0}, "num_candidate_sets must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_bad_input_to_the_density_is_one_clear_error(changes, problem):
    arguments = {"heatmaps": np.zeros((2, 16, 64, 64)), "poses_mm": np.zeros((2, 1, 17, 3))}
    with pytest.raises(ValueError, match=problem):
        small_model().log_prob(jax.random.key(0), **(arguments | changes))


@pytest.mark.parametrize(("number", "poses"), [(0, 3), (2, 0)])
def test_densities_of_nothing(number, poses):
    maps, poses_mm = np.zeros((number, 16, 64, 64)), np.zeros((number, poses, 17, 3))
    assert small_model().log_prob(jax.random.key(0), maps, poses_mm).shape == (number, poses)


@pytest.mark.parametrize("encoder", ["candidates", "heatmaps"])
def test_hypotheses_of_other_encoders(encoder):
    """They follow the heatmaps that they are conditioned on."""
    other = small_model(encoder=encoder, resnet_width=4)
    assert (other.network.sampler is None) == (encoder == "heatmaps")
    maps = random_heatmaps(5, 2)
    poses_mm = other.sample(jax.random.key(6), maps, 4)
    assert jnp.isfinite(poses_mm).all()

    @jax.jit
    def draw(keys):
        read = jax.vmap(other.network.encoder_input)(keys, jnp.asarray(maps))
        return read, other.network.condition(other.params, read)

    read, condition = draw(jax.random.split(jax.random.key(7)))
    if encoder == "heatmaps":
        np.testing.assert_array_equal(read, maps)
    assert condition.shape == (2, {"candidates": 3 * 6 * 16, "heatmaps": 8 * 4}[encoder])
    assert jnp.abs(condition[0] - condition[1]).max() > 0.01


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64]
)
def test_real_numbers_are_accepted(dtype):
    maps = np.arange(2 * 16 * 64 * 64).reshape(2, 16, 64, 64) % 100
    checked = inference.check_heatmaps(maps.astype(dtype))
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, maps)


def with_value(value):
    maps = np.zeros((3, 16, 64, 64))
    maps[1, 4, 63, 0] = maps[2, 0, 0, 0] = value
    return maps


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((2, 17, 64, 64)), r"\(B, 16, 64, 64\), not \(2, 17, 64, 64\)$"),
        (np.zeros((64, 64)), r"\(B, 16, 64, 64\), not \(64, 64\)$"),
        (np.zeros((16, 64, 64)), r"one image\? add a leading axis: heatmaps\[None\]"),
        (with_value(np.nan), "image 1, joint 4"),
        (with_value(-np.inf), "image 1, joint 4"),
        (np.zeros((1, 16, 64, 64), object), "real numbers, not object"),
        (np.zeros((1, 16, 64, 64), np.bool_), "real numbers, not bool"),
    ],
)
def test_other_heatmaps_are_errors(maps, message):
    with pytest.raises(ValueError, match=message):
        inference.check_heatmaps(maps)
