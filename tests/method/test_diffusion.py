"""Schedule, forward process, loss and reverse step, by what defines them."""

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


@pytest.mark.parametrize("num_steps", [-1, 0, 1])
def test_too_few_steps_are_an_error(num_steps):
    with pytest.raises(ValueError, match=f"at least 2 diffusion steps, not {num_steps}"):
        diffusion.cosine_schedule(num_steps)


# --- forward process and loss ------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 12, 24])
def test_moments_of_the_forward_process(t):
    """Against steps of their own: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise."""
    schedule, n = SCHEDULES[0], 200_000
    x_0 = jnp.asarray([[2.0, -3.0]])
    noise = jax.random.normal(jax.random.key(0), (n, 2))
    x_t = diffusion.q_sample(schedule, x_0, jnp.full((1,), t), noise)
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


# --- reverse step ------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 12, 24])
def test_reverse_step_draws_from_the_posterior(t):
    """With the true noise, q(x_{t-1} | x_t, x_0) by Bayes' rule on the two Gaussians."""
    schedule, n = SCHEDULES[0], 100_000
    x_0, x_t = 1.5, np.sqrt(schedule.alphas_cumprod[t]) * 1.5 + 0.3
    eps = 0.3 / np.sqrt(1 - schedule.alphas_cumprod[t])
    previous, beta = schedule.alphas_cumprod_prev[t], schedule.betas[t]
    if t == 0:
        mean, variance = x_0, 0.0
    else:
        precision = 1 / (1 - previous) + (1 - beta) / beta
        weighted = np.sqrt(previous) * x_0 / (1 - previous) + np.sqrt(1 - beta) * x_t / beta
        mean, variance = weighted / precision, 1 / precision
    draws, found_x_0 = diffusion.reverse_step(
        lambda x_t, t: jnp.full(x_t.shape, eps),
        schedule,
        jax.tree.map(lambda x: x[24 - t], diffusion.reverse_steps(schedule)),
        jnp.full((n, 1), x_t),
        jnp.zeros((n, 1)),
        jax.random.normal(jax.random.key(5), (n, 1)),
        clip=30.0,
    )
    np.testing.assert_allclose(found_x_0, x_0, atol=0.02)
    # At t = 24 float32 leaves x_0 a hundredth, but its weight in the mean is small.
    np.testing.assert_allclose(draws.mean(), mean, atol=5 * np.sqrt(variance / n) + 1e-3)
    np.testing.assert_allclose(draws.std(), np.sqrt(variance), rtol=5 / np.sqrt(2 * n), atol=1e-6)


# --- solvers -----------------------------------------------------------------------------


def test_the_paper_s_steps_are_the_posterior(schedule):
    steps = diffusion.reverse_steps(schedule)
    assert steps.times.tolist() == list(range(schedule.num_steps))[::-1]
    expected = {
        "x_t": schedule.posterior_mean_coef2,
        "x_0": schedule.posterior_mean_coef1,
        "noise": np.sqrt(schedule.posterior_variance),
        "last_x_0": np.zeros(schedule.num_steps),
    }
    for name, weights in expected.items():
        found = getattr(steps, name)[::-1]
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-12, err_msg=name)


FEW = [f"{name}:{number}" for name in ("ddpm", "ddim", "dpm++") for number in (1, 2, 3, 8, 24)]


@pytest.mark.parametrize("solver", FEW)
def test_few_steps_begin_where_the_gain_is_sane_and_land_on_x_0(solver):
    schedule = SCHEDULES[0]
    steps = diffusion.reverse_steps(schedule, solver)
    assert steps.num_steps == int(solver.split(":")[1])
    assert steps.times[0] == 23
    # Evenly spread: as many times are left below the last one as between two.
    gaps = -np.diff(np.append(steps.times, -1))
    assert gaps.sum() == 24
    assert np.ptp(gaps) <= 1
    last = [getattr(steps, name)[-1] for name in ("x_t", "x_0", "last_x_0", "noise")]
    np.testing.assert_allclose(last, [0, 1, 0, 0], atol=1e-12)
    assert steps.is_deterministic == (not solver.startswith("ddpm") or steps.num_steps == 1)


@pytest.mark.parametrize("solver", ["ddim:8", "dpm++:8"])
def test_deterministic_steps_keep_the_noise(solver):
    """Of one data point and one noise each solver goes from x_t to x_s of the same two."""
    schedule, x_0, eps = SCHEDULES[0], 1.7, -0.6
    steps = diffusion.reverse_steps(schedule, solver)
    alpha_bar = np.append(schedule.alphas_cumprod[steps.times], 1.0)
    x = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
    found = steps.x_t * x[:-1] + (steps.x_0 + steps.last_x_0) * x_0
    np.testing.assert_allclose(found, x[1:], rtol=1e-9)


def gaussian_flow_error(solver, schedule, mean=0.8, variance=0.3):
    """Error at t = 0 on data N(mean, variance), where the probability flow is known.

    It scales the distance from the mean as the standard deviation: in float64, by the table alone.
    """
    steps = diffusion.reverse_steps(schedule, solver)
    z, last_x_0 = 1.3, 0.0
    a = schedule.alphas_cumprod[steps.times]
    marginal = a * variance + 1 - a
    x = np.sqrt(a[0]) * mean + np.sqrt(marginal[0]) * z
    for i in range(steps.num_steps):
        shift = x - np.sqrt(a[i]) * mean
        x_0 = mean + np.sqrt(a[i]) * variance / marginal[i] * shift
        x = steps.x_t[i] * x + steps.x_0[i] * x_0 + steps.last_x_0[i] * last_x_0
        last_x_0 = x_0
    return abs(x - (mean + np.sqrt(variance) * z))


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    schedule, numbers = diffusion.cosine_schedule(20_000), np.array([10, 20, 40, 80, 160])
    ddim, dpm = (
        np.array([gaussian_flow_error(f"{name}:{n}", schedule) for n in numbers])
        for name in ("ddim", "dpm++")
    )
    np.testing.assert_allclose(ddim * numbers, 1.0, atol=0.06)
    # Its error changes sign: of second order is what bounds it.
    assert (dpm * numbers**2 < 3.5).all(), dpm
    assert (dpm < ddim / 3).all()


@pytest.mark.parametrize(
    "solver", ["", "euler", "ddpm:0", "ddpm:25", "ddim", "dpm++", "ddim:-3", "ddim:8.0", "ddim:x:3"]
)
def test_unknown_solvers_are_errors(solver):
    with pytest.raises(ValueError, match="ddpm or ddim or dpm") as error:
        diffusion.reverse_steps(SCHEDULES[0], solver)
    assert repr(solver) in str(error.value)
    assert "1 to 24 steps" in str(error.value)
