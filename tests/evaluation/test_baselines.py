"""The baselines learn what they should and keep what they promise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.evaluation import baselines
from diffpose_jax.io.trees import CheckpointError

FIT = {"steps": 400, "batch_size": 64, "width": 128, "learning_rate": 3e-3}


def toy_data(n=900, seed=0):
    """Poses that are a nearly linear function of the inputs; the likelihoods are constant."""
    rng = np.random.default_rng(100)
    to_inputs, to_poses = rng.normal(size=(5, 32)) * 0.2, rng.normal(size=(5, 48)) * 100
    latent = np.random.default_rng(seed).normal(size=(n, 5))
    inputs, poses = np.ones((n, 16, 3)), np.zeros((n, 17, 3))
    inputs[..., :2] = np.tanh(latent @ to_inputs).reshape(n, 16, 2)
    poses[:, 1:] = (latent @ to_poses + 300).reshape(n, 16, 3)
    return np.float32(inputs), np.float32(poses)


def mpjpe(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b), axis=-1).mean())


@pytest.fixture(scope="module")
def regression():
    inputs, poses = toy_data()
    return baselines.fit_regression(jax.random.key(1), inputs, poses, **FIT)


def test_regression_learns_a_nearly_linear_map(regression):
    inputs, poses = toy_data(seed=1)
    predicted = np.asarray(baselines.predict(regression, inputs))
    assert mpjpe(predicted, poses) < 0.25 * mpjpe(poses, poses.mean(0))
    assert not np.any(predicted[:, 0])
    alone = baselines.predict(regression, inputs[3:4])
    np.testing.assert_allclose(alone, predicted[3:4], atol=0.05)


def test_network_is_that_of_the_paper():
    network = baselines.RegressionNetwork(1024)
    shapes = jax.eval_shape(
        lambda key: network.init(key, jnp.zeros((1, 32)), train=False), jax.random.key(0)
    )
    layers = [shapes["params"][f"Dense_{i}"]["kernel"].shape for i in range(6)]
    assert layers == [(32, 1024), *[(1024, 1024)] * 4, (1024, 48)]
    assert sum(name.startswith("BatchNorm") for name in shapes["params"]) == 5


def test_dropout_acts_in_training(regression):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(32, 48)), jnp.float32)
    network = baselines.RegressionNetwork(128)
    how = {"train": True, "mutable": ["batch_stats"]}
    (first, _), (second, _) = (
        network.apply(regression.variables, x, rngs={"dropout": jax.random.key(seed)}, **how)
        for seed in (0, 1)
    )
    assert np.abs(first - second).max() > 0.01


def test_gaussian_recovers_a_full_covariance():
    rng = np.random.default_rng(4)
    mixing = rng.normal(size=(48, 48)) * 5 + np.diag(np.linspace(10, 60, 48))
    covariance = mixing @ mixing.T
    residuals = np.zeros((50_000, 17, 3))
    residuals[:, 1:] = (rng.normal(size=(50_000, 48)) @ mixing.T).reshape(-1, 16, 3)
    gaussian = baselines.fit_gaussian(residuals)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    fitted = np.float64(gaussian.factor_mm) @ np.float64(gaussian.factor_mm).T
    assert np.abs((fitted - covariance) / scale).max() < 0.03

    means = jnp.asarray(np.float32(rng.normal(size=(3, 17, 3)) * 300)).at[:, 0].set(0)
    hypotheses = baselines.draw(jax.random.key(5), gaussian, means, 20_000)
    assert not np.any(hypotheses[:, :, 0])
    np.testing.assert_allclose(hypotheses.mean(1), means, atol=3)
    residuals = np.float64((hypotheses - means[:, None])[:, :, 1:])
    assert np.abs(residuals[0, :4] - residuals[1, :4]).max() > 1  # each frame has its own
    drawn = np.cov(residuals.reshape(-1, 48).T)
    assert np.abs((drawn - covariance) / scale).max() < 0.03


def test_singular_covariances_are_drawn_from_their_span():
    direction = np.concatenate([np.zeros((1, 3)), np.random.default_rng(8).normal(size=(16, 3))])
    residuals = np.linspace(-20, 20, 10)[:, None, None] * direction
    gaussian = baselines.fit_gaussian(residuals)
    drawn = np.asarray(baselines.draw(jax.random.key(9), gaussian, jnp.zeros((1, 17, 3)), 50))[0]
    length = np.sum(drawn * direction, (1, 2)) / np.sum(direction**2)
    assert np.std(length) > 5
    np.testing.assert_allclose(drawn, length[:, None, None] * direction, atol=0.01)


def test_the_three_baselines_come_from_the_same_frames(regression):
    inputs, poses = toy_data()
    fitted = baselines.fit_baselines(jax.random.key(1), inputs, poses, **FIT)
    chex.assert_trees_all_equal(fitted.regression, regression)  # the same key, the same parameters
    np.testing.assert_allclose(fitted.mean_pose_mm, poses.mean(0, dtype=np.float64), rtol=1e-5)
    errors = poses - np.asarray(baselines.predict(fitted.regression, inputs))
    spread = np.sqrt(np.sum(np.float64(fitted.gaussian.factor_mm) ** 2) / 48)
    assert spread == pytest.approx(np.sqrt(np.mean(errors[:, 1:] ** 2)), rel=1e-3)


def test_saved_and_read_again(regression, tmp_path):
    path = tmp_path / "baselines.npz"
    gaussian = baselines.GaussianParams(jnp.eye(48))
    fitted = baselines.Baselines(jnp.arange(51.0).reshape(17, 3), regression, gaussian)
    baselines.save(path, fitted, {"seed": 1, "rate": 1e-3})
    found, fitted_on = baselines.load(path)
    assert fitted_on == {"seed": 1, "rate": 1e-3}
    chex.assert_trees_all_equal(found, fitted)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"baselines\.npz is damaged .*; remove it"):
        baselines.load(path)
