"""Schedule, forward process and loss, by what defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffpose_jax.method import diffusion

SCHEDULE = diffusion.cosine_schedule()


@pytest.mark.parametrize(("T", "offset", "max_beta"), [(25, 0.008, 0.999), (4, 0.1, 0.5)])
def test_cosine_schedule_is_equation_17(T, offset, max_beta):
    def f(t):
        return np.cos((t / T + offset) / (1 + offset) * np.pi / 2) ** 2

    alphas_cumprod = 1.0
    schedule = diffusion.cosine_schedule(T, offset, max_beta)
    for t in range(T):
        beta = min(1 - f(t + 1) / f(t), max_beta)
        np.testing.assert_allclose(schedule.betas[t], beta, rtol=1e-12)
        alphas_cumprod *= 1 - beta
        np.testing.assert_allclose(schedule.alphas_cumprod[t], alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize("arguments", [(25,), (10, 0.02), (1000, 0.008, 0.99)])
def test_posterior_by_bayes_rule(arguments):
    """q(x_{t-1} | x_t, x_0) from the two Gaussians; the last step is exactly x_0."""
    schedule = diffusion.cosine_schedule(*arguments)
    alpha_bar, beta = schedule.alphas_cumprod, schedule.betas[1:]
    previous = alpha_bar[:-1]
    precision = 1 / (1 - previous) + (1 - beta) / beta
    expected = {
        "x_t": (0, np.sqrt(1 - beta) / beta / precision),
        "x_0": (1, np.sqrt(previous) / (1 - previous) / precision),
        "variance": (0, 1 / precision),
    }
    all_found = diffusion.posterior(alpha_bar, np.append(1.0, previous))
    for (name, (last, others)), found in zip(expected.items(), all_found, strict=True):
        np.testing.assert_allclose(found[0], last, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found[1:], others, rtol=1e-9, err_msg=name)


def batch(seed, shape):
    rng = np.random.default_rng(seed)
    x_0, noise = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return 3 * x_0, jnp.asarray(rng.integers(0, 25, shape[:-1])), noise


def test_each_time_scales_its_own_row():
    x_0, t, noise = batch(1, (2, 3, 48))
    x_t = SCHEDULE.level(t).noised(x_0, noise)
    for i in np.ndindex(t.shape):
        a = SCHEDULE.alphas_cumprod[t[i]]
        expected = np.sqrt(a) * np.float64(x_0[i]) + np.sqrt(1 - a) * np.float64(noise[i])
        np.testing.assert_allclose(x_t[i], expected, atol=2e-6)


def edm_target(level):
    return diffusion.edm_target(level, jnp.full((1, 48), 3.0))


@pytest.mark.parametrize(("target", "times"), [(diffusion.noise_target, 24), (edm_target, 25)])
def test_the_true_target_gives_back_x_0(target, times):
    """Not at the last time for the noise: there float32 keeps 2 digits of x_0."""
    x_0, _, noise = batch(2, (times, 48))
    level = SCHEDULE.level(jnp.arange(times))
    weights = target(level)
    found = weights.of_x_0 * x_0 + weights.of_noise * noise
    x_t = level.noised(x_0, noise)
    np.testing.assert_allclose(weights.skip * x_t + weights.out * found, x_0, atol=1e-4)
    if target is diffusion.noise_target:
        np.testing.assert_array_equal(found, noise)


def test_the_edm_target_is_karras_table_1():
    """In their notation: sigma = s / a, D(x / a; sigma) = c_skip x / a + c_out F, and unit F."""
    level = SCHEDULE.level(jnp.arange(25))
    a, s = (np.float64(x) for x in (level.signal, level.noise))
    sigma, data = s / a, 3.0
    weights = edm_target(level)
    spread = np.sqrt(sigma**2 + data**2)
    np.testing.assert_allclose(weights.skip[:, :1], data**2 / spread**2 / a, rtol=1e-5)
    np.testing.assert_allclose(weights.out[:, :1], sigma * data / spread, rtol=1e-5)
    variance = (weights.of_x_0 * data) ** 2 + weights.of_noise**2
    np.testing.assert_allclose(variance, 1, rtol=1e-5)


def test_times_are_uniform_and_noise_is_standard_normal():
    t, noise = diffusion.draw_time_and_noise(jax.random.key(4), SCHEDULE, (25_000, 4))
    assert stats.chisquare(np.bincount(t, minlength=25)).pvalue > 1e-3
    assert t.max() == 24
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    rows = np.corrcoef(np.c_[t, noise].T)
    np.testing.assert_allclose(rows, np.eye(5), atol=4 / np.sqrt(25_000))
