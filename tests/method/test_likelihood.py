"""Log-densities by the probability flow, where they are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffpose_jax.method import diffusion, likelihood
from diffpose_jax.method.pose_vector import pose_to_vector

SCHEDULE = diffusion.cosine_schedule()


class Mixture:
    """Two Gaussians in D dimensions, far from and wider than each other."""

    def __init__(self, seed, size):
        rng = np.random.default_rng(seed)
        self.weights = np.array([0.3, 0.7])
        self.means = rng.normal(size=(2, size)) * 2
        factors = rng.normal(size=(2, size, size)) / np.sqrt(size)
        self.covariances = factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(size)

    def log_density(self, y, blur):
        """Of draws plus noise of the deviation `blur`, in float64."""
        of_modes = [
            scipy.stats.multivariate_normal(mean, covariance + blur**2 * np.eye(y.shape[1]))
            for mean, covariance in zip(self.means, self.covariances, strict=True)
        ]
        logs = np.stack([mode.logpdf(y) for mode in of_modes], axis=1)
        return scipy.special.logsumexp(logs + np.log(self.weights), axis=1)

    def x_0(self, x, level):
        """E[x_0 | x_t]: each mode's linear answer, weighed by the mode's probability."""
        means, covariances = (jnp.asarray(a, x.dtype) for a in (self.means, self.covariances))
        a, s = level.signal[0], level.noise[0]
        marginals = a**2 * covariances + s**2 * jnp.eye(len(x), dtype=x.dtype)[None]
        shift = x[None] - a * means
        solved = jnp.linalg.solve(marginals, shift[..., None])[..., 0]
        logits = jnp.log(jnp.asarray(self.weights, x.dtype)) - 0.5 * (
            jnp.sum(shift * solved, axis=1) + jnp.linalg.slogdet(marginals)[1]
        )
        of_modes = means + a * jnp.einsum("kij,kj->ki", covariances, solved)
        return jax.nn.softmax(logits) @ of_modes


@pytest.fixture
def mixture():
    return Mixture(1, 6)


def densities(mixture, y, num_steps, basis=None):
    basis = np.eye(y.shape[1]) if basis is None else basis

    def predict(x, t, level):
        del t
        coordinates = jnp.asarray(basis, x.dtype)
        return coordinates @ mixture.x_0(coordinates.T @ x, level)

    of_one = functools.partial(
        likelihood.log_density, predict, SCHEDULE, basis=basis, num_steps=num_steps
    )
    return np.float64(jax.jit(jax.vmap(of_one))(jnp.asarray(y, jnp.float32)))


def test_the_density_of_a_mixture_is_found(mixture):
    """Of x at t = 0, which is a x_0 + s eps: of draws of the modes and of points between them."""
    rng = np.random.default_rng(2)
    modes = rng.integers(0, 2, 40)
    draws = [
        rng.multivariate_normal(mixture.means[mode], mixture.covariances[mode]) for mode in modes
    ]
    y = np.concatenate([draws, rng.normal(size=(10, 6)) * 2])
    a = np.sqrt(SCHEDULE.alphas_cumprod[0])
    blur = np.sqrt(1 - a**2) / a
    expected = mixture.log_density(y / a, blur) - y.shape[1] * np.log(a)
    found = densities(mixture, y, likelihood.NUM_STEPS)
    np.testing.assert_allclose(found, expected, atol=0.05)
    np.testing.assert_allclose(found, densities(mixture, y, 2 * likelihood.NUM_STEPS), atol=0.05)


def test_a_basis_leaves_the_density_as_it_is(mixture):
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(9, 6)))[0]
    y = np.random.default_rng(4).normal(size=(5, 6))
    np.testing.assert_allclose(
        densities(mixture, y, 32, basis), densities(mixture, y, 32), atol=1e-3
    )


def test_the_basis_spans_the_vectors_of_poses():
    basis = likelihood.centred_basis(16)
    assert basis.shape == (48, 45)
    np.testing.assert_allclose(basis.T @ basis, np.eye(45), atol=1e-12)
    pose_mm = np.random.default_rng(5).normal(size=(4, 17, 3)).astype(np.float32) * 500
    vectors = np.float64(pose_to_vector(jnp.asarray(pose_mm)))
    np.testing.assert_allclose(vectors @ basis @ basis.T, vectors, atol=1e-5)
