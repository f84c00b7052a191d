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
        np.testing.assert_allclose(schedule.alphas_cumprod_prev[t], alphas_cumprod, rtol=1e-12)
        alphas_cumprod *= 1 - beta
        np.testing.assert_allclose(schedule.alphas_cumprod[t], alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize("arguments", [(25,), (10, 0.02), (1000, 0.008, 0.99)])
def test_posterior_by_bayes_rule(arguments):
    """q(x_{t-1} | x_t, x_0) from the two Gaussians; the last step is exactly x_0."""
    schedule = diffusion.cosine_schedule(*arguments)
    previous, beta = schedule.alphas_cumprod_prev[1:], schedule.betas[1:]
    precision = 1 / (1 - previous) + (1 - beta) / beta
    expected = {
        "posterior_mean_coef1": (1, np.sqrt(previous) / (1 - previous) / precision),
        "posterior_mean_coef2": (0, np.sqrt(1 - beta) / beta / precision),
        "posterior_variance": (0, 1 / precision),
    }
    for name, (last, others) in expected.items():
        found = getattr(schedule, name)
        np.testing.assert_allclose(found[0], last, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(found[1:], others, rtol=1e-9, err_msg=name)


def batch(seed, shape):
    rng = np.random.default_rng(seed)
    x_0, noise = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return 3 * x_0, jnp.asarray(rng.integers(0, 25, shape[:-1])), noise


def test_each_time_scales_its_own_row():
    x_0, t, noise = batch(1, (2, 3, 48))
    x_t = diffusion.q_sample(SCHEDULE, x_0, t, noise)
    for i in np.ndindex(t.shape):
        a = SCHEDULE.alphas_cumprod[t[i]]
        expected = np.sqrt(a) * np.float64(x_0[i]) + np.sqrt(1 - a) * np.float64(noise[i])
        np.testing.assert_allclose(x_t[i], expected, atol=2e-6)


def test_the_true_noise_gives_back_x_0():
    x_0, _, noise = batch(2, (24, 48))
    t = jnp.arange(24)  # not the last: there float32 keeps 2 digits of x_0
    x_t = diffusion.q_sample(SCHEDULE, x_0, t, noise)
    result = diffusion.predict_x_0(SCHEDULE, x_t, t, noise, clip=30.0)
    np.testing.assert_allclose(result, x_0, atol=1e-4)


def test_x_0_is_clipped():
    t = jnp.full((3,), 24)
    x_t = jnp.asarray([[1.0], [-1.0], [1e-3]])
    result = diffusion.predict_x_0(SCHEDULE, x_t, t, jnp.zeros((3, 1)), clip=2.0)
    np.testing.assert_allclose(result[:2], [[2.0], [-2.0]])
    expected = 1e-3 / np.sqrt(SCHEDULE.alphas_cumprod[-1])
    np.testing.assert_allclose(result[2], expected, rtol=1e-5)


def test_loss_is_the_mean_square_of_the_noise_s_error():
    x_0, t, noise = batch(3, (6, 48))
    seen = {}

    def denoise(x_t, t):
        seen["x_t"], seen["t"] = x_t, t
        return 0.5 * x_t + t[..., None] / 10

    loss = diffusion.noise_prediction_loss(denoise, SCHEDULE, x_0, t, noise)
    np.testing.assert_array_equal(seen["t"], t)
    np.testing.assert_array_equal(seen["x_t"], diffusion.q_sample(SCHEDULE, x_0, t, noise))
    error = 0.5 * np.float64(seen["x_t"]) + np.asarray(t)[:, None] / 10 - np.float64(noise)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
    perfect = diffusion.noise_prediction_loss(lambda x_t, t: noise, SCHEDULE, x_0, t, noise)
    assert perfect == 0


def test_times_are_uniform_and_noise_is_standard_normal():
    t, noise = diffusion.draw_time_and_noise(jax.random.key(4), SCHEDULE, (25_000, 4))
    assert stats.chisquare(np.bincount(t, minlength=25)).pvalue > 1e-3
    assert t.max() == 24
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    rows = np.corrcoef(np.c_[t, noise].T)
    np.testing.assert_allclose(rows, np.eye(5), atol=4 / np.sqrt(25_000))
