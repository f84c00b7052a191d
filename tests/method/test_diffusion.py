"""Schedule, forward process and loss, by what defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffpose_jax.method import diffusion

SCHEDULES = [diffusion.cosine_schedule(*args) for args in ((25,), (10, 0.02), (1000, 0.008, 0.99))]


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: f"{schedule.num_steps} steps")
def schedule(request):
    return request.param


# --- schedule ----------------------------------------------------------------------------


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


def test_noise_grows_and_only_the_last_step_is_clipped(schedule):
    assert schedule.betas.dtype == np.float64
    assert (np.diff(schedule.betas) > 0).all()
    assert (schedule.betas > 0).all()
    assert (schedule.betas[:-1] < schedule.betas[-1]).all()
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert schedule.alphas_cumprod[-1] < 1e-2


def test_alpha_bar_of_the_paper_s_last_step():
    alphas_cumprod = diffusion.cosine_schedule().alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod[-1], 3.88e-6, rtol=2e-3)


def test_posterior_leads_from_q_t_to_q_of_the_step_before(schedule):
    """q(x_{t-1} | x_0) is the integral of q(x_{t-1} | x_t, x_0) q(x_t | x_0): both moments."""
    mean = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * np.sqrt(
        schedule.alphas_cumprod
    )
    variance = schedule.posterior_variance + schedule.posterior_mean_coef2**2 * (
        1 - schedule.alphas_cumprod
    )
    np.testing.assert_allclose(mean, np.sqrt(schedule.alphas_cumprod_prev), rtol=1e-9)
    np.testing.assert_allclose(variance, 1 - schedule.alphas_cumprod_prev, atol=1e-12)


def test_the_last_reverse_step_is_exact(schedule):
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_mean_coef2[0] == 0
    np.testing.assert_allclose(schedule.posterior_mean_coef1[0], 1, rtol=1e-12)


# --- forward process and loss ------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 12, 24])
def test_moments_of_the_forward_process(t):
    """Against steps of their own: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise."""
    schedule, n = SCHEDULES[0], 200_000
    x_0 = jnp.asarray([[2.0, -3.0]])
    noise = jax.random.normal(jax.random.key(0), (n, 2))
    x_t = diffusion.q_sample(schedule, jnp.tile(x_0, (n, 1)), jnp.full((n,), t), noise)
    mean, variance = np.array([2.0, -3.0]), 0.0
    for beta in schedule.betas[: t + 1]:
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    np.testing.assert_allclose(x_t.mean(0), mean, atol=5 * np.sqrt(variance / n))
    np.testing.assert_allclose(x_t.var(0), variance, rtol=5 * np.sqrt(2 / n))


def batch(seed, schedule, shape=(6, 48)):
    rng = np.random.default_rng(seed)
    x_0, noise = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return 3 * x_0, jnp.asarray(rng.integers(0, schedule.num_steps, shape[:-1])), noise


def test_each_time_scales_its_own_row():
    schedule = SCHEDULES[0]
    x_0, t, noise = batch(1, schedule, (2, 3, 48))
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    for i in np.ndindex(t.shape):
        a = schedule.alphas_cumprod[t[i]]
        expected = np.sqrt(a) * np.float64(x_0[i]) + np.sqrt(1 - a) * np.float64(noise[i])
        np.testing.assert_allclose(x_t[i], expected, atol=2e-6)


def test_the_true_noise_gives_back_x_0():
    schedule = SCHEDULES[0]
    x_0, _, noise = batch(2, schedule, (24, 48))
    t = jnp.arange(24)  # not the last: there float32 keeps 2 digits of x_0
    x_t = diffusion.q_sample(schedule, x_0, t, noise)
    result = diffusion.predict_x_0(schedule, x_t, t, noise, clip=30.0)
    np.testing.assert_allclose(result, x_0, atol=1e-4)


def test_x_0_is_clipped():
    schedule = SCHEDULES[0]
    t = jnp.full((3,), 24)
    x_t = jnp.asarray([[1.0], [-1.0], [1e-3]])
    result = diffusion.predict_x_0(schedule, x_t, t, jnp.zeros((3, 1)), clip=2.0)
    np.testing.assert_allclose(result[:2], [[2.0], [-2.0]])
    expected = 1e-3 / np.sqrt(schedule.alphas_cumprod[-1])
    np.testing.assert_allclose(result[2], expected, rtol=1e-5)


def test_loss_is_the_mean_square_of_the_noise_s_error():
    schedule = SCHEDULES[0]
    x_0, t, noise = batch(3, schedule)
    seen = {}

    def denoise(x_t, t):
        seen["x_t"], seen["t"] = x_t, t
        return 0.5 * x_t + t[..., None] / 10

    loss = diffusion.noise_prediction_loss(denoise, schedule, x_0, t, noise)
    np.testing.assert_array_equal(seen["t"], t)
    np.testing.assert_array_equal(seen["x_t"], diffusion.q_sample(schedule, x_0, t, noise))
    error = 0.5 * np.float64(seen["x_t"]) + np.asarray(t)[:, None] / 10 - np.float64(noise)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
    perfect = diffusion.noise_prediction_loss(lambda x_t, t: noise, schedule, x_0, t, noise)
    assert perfect == 0


def test_times_are_uniform_and_noise_is_standard_normal():
    t, noise = diffusion.draw_time_and_noise(jax.random.key(4), SCHEDULES[0], (25_000, 4))
    assert stats.chisquare(np.bincount(t, minlength=25)).pvalue > 1e-3
    assert t.max() == 24
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    rows = np.corrcoef(np.c_[t, noise].T)
    np.testing.assert_allclose(rows, np.eye(5), atol=4 / np.sqrt(25_000))
