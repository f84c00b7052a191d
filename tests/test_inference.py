"""From heatmaps to hypotheses in millimetres: `Model.draw` and `Model.sample`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from small import random_heatmaps, small_model

import diffpose_jax
from diffpose_jax import inference
from diffpose_jax.method import sampling
from diffpose_jax.method.pose_vector import vector_to_pose
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
    if changes:  # more hypotheses keep the first ones
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


@pytest.mark.parametrize("changes", [{}, PER_HYPOTHESIS], ids=str)
def test_the_fast_way_is_the_plain_one(changes):
    """To 1e-5 of the deviation: one hypothesis after the other, one step after the other.

    The poses are drawn under the candidates that the draw holds.
    """
    small, key, number = small_model(**changes), jax.random.key(5), 4
    network, params, maps = small.network, small.params, jnp.asarray(random_heatmaps(6, 3))
    drawn = small.draw(key, maps, number)
    np.testing.assert_allclose(small.sample(key, maps, number), drawn.poses_mm, atol=0.1)
    schedule, fast = network.schedule, np.float64(drawn.poses_mm)
    predict_noise = jax.jit(network.predict_noise)
    plain = np.zeros_like(fast)
    for image, image_key in enumerate(sampling.image_keys(key, maps)):
        candidate_key, noise_key = jax.random.split(image_key)
        for m in range(number):
            own = jax.random.fold_in(candidate_key, m) if changes else candidate_key
            candidates = network.encoder_input(own, maps[image])
            place = (image, m) if changes else (image,)
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
                eps = np.float64(predict_noise(params, jnp.float32(x), jnp.int32(t), projected))
                a = schedule.alphas_cumprod[t]
                x_0 = np.clip((x - np.sqrt(1 - a) * eps) / np.sqrt(a), -network.clip, network.clip)
                x = schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x
                x = x + np.sqrt(schedule.posterior_variance[t]) * np.float64(noise[i + 1])
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
    ],
)
def test_bad_input_is_one_clear_error(changes, problem):
    arguments = {"heatmaps": np.zeros((1, 16, 64, 64)), "num_hypotheses": 30} | changes
    with pytest.raises(ValueError, match=problem):
        small_model().sample(jax.random.key(0), **arguments)


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
