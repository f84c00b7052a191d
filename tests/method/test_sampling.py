"""Solvers, the reverse chain where the answer is known, the keys of hypotheses and images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_heatmaps, x_0_of

from diffpose_jax.method import diffusion, sampling

SCHEDULE = diffusion.cosine_schedule()
MEAN = np.array([1.0, -2.0])
COVARIANCE = np.array([[1.5, 0.8], [0.8, 0.7]])


def gaussian_gain(alpha_bar, xp):
    """E[noise | x_t] = gain (x_t - sqrt(alpha-bar) mean) for data N(mean, covariance)."""
    marginal = alpha_bar * COVARIANCE + (1 - alpha_bar) * np.eye(2)
    return xp.sqrt(1 - alpha_bar) * xp.linalg.inv(marginal)


def gaussian_noise(schedule, x_t, t):
    """The prediction of the noise that training would find for Gaussian data."""
    gains = jnp.asarray([gaussian_gain(a, np) for a in schedule.alphas_cumprod], jnp.float32)
    means = jnp.asarray(np.sqrt(schedule.alphas_cumprod)[:, None] * MEAN, jnp.float32)
    return gains[t] @ (x_t - means[t])


def sample_gaussian(schedule, num_vectors):
    def chain(key):
        denoise = x_0_of(schedule, functools.partial(gaussian_noise, schedule))
        return sampling.sample(denoise, sampling.parse_solver(schedule), key, size=2)

    return jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), num_vectors))


def propagated_moments(schedule):
    """Mean and covariance of the chain in float64: its steps are linear in x_t and the noise."""
    mean, covariance = np.zeros(2), np.eye(2)
    for t in reversed(range(schedule.num_steps)):
        a, sqrt_a = schedule.alphas_cumprod[t], np.sqrt(schedule.alphas_cumprod[t])
        gain = gaussian_gain(a, np)
        to_x_0 = (np.eye(2) - np.sqrt(1 - a) * gain) / sqrt_a
        matrix = schedule.posterior_mean_coef1[t] * to_x_0 + schedule.posterior_mean_coef2[
            t
        ] * np.eye(2)
        shift = schedule.posterior_mean_coef1[t] * np.sqrt(1 - a) / sqrt_a * gain @ (sqrt_a * MEAN)
        mean = matrix @ mean + shift
        covariance = matrix @ covariance @ matrix.T + schedule.posterior_variance[t] * np.eye(2)
    return mean, covariance


@pytest.mark.parametrize("num_steps", [25, 200])
def test_moments_of_the_chain_with_the_exact_denoiser_of_a_gaussian(num_steps):
    schedule, n = diffusion.cosine_schedule(num_steps), 40_000
    samples = sample_gaussian(schedule, n)
    mean, covariance = propagated_moments(schedule)
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(samples.mean(0), mean, atol=5 * spread.max() / np.sqrt(n))
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=10 / np.sqrt(n))


def test_the_chain_tends_to_the_data_s_distribution_with_its_steps():
    """At T = 25 the fixed posterior variance still makes samples a few percent too narrow."""
    deviations = []
    for num_steps in (25, 200, 2000):
        mean, covariance = propagated_moments(diffusion.cosine_schedule(num_steps))
        deviations.append(np.abs(covariance / COVARIANCE - 1).max())
        np.testing.assert_allclose(mean, MEAN, atol=0.01)
    assert deviations[0] < 0.2
    assert deviations[1] < deviations[0] / 4
    assert deviations[2] < 0.01


@pytest.mark.parametrize("solver", ["ddpm", "ddim:1", "ddim:5", "dpm++:2", "dpm++:24"])
def test_data_of_one_point_are_found_exactly(solver):
    """Every solver finds the one data point from any start."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)
    point = jnp.asarray([3.0, -7.0, 0.5])
    denoise = x_0_of(SCHEDULE, lambda x_t, t: (x_t - jnp.sqrt(a[t]) * point) / jnp.sqrt(1 - a[t]))
    steps = sampling.parse_solver(SCHEDULE, solver)
    x_0 = sampling.sample(denoise, steps, jax.random.key(1), size=3)
    np.testing.assert_allclose(x_0, point, atol=1e-4)


def test_the_chain_is_the_loop_of_reverse_steps():
    """From t = T - 1 down to 0, each with its own noise; the last noise has no effect."""
    schedule = diffusion.cosine_schedule(7)
    noise = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)

    denoise = x_0_of(schedule, lambda x_t, t: jnp.sin(x_t) + t / 10, clip=3.0)

    x = np.float64(noise[0])
    for t, step_noise in zip(range(6, -1, -1), np.float64(noise[1:]), strict=True):
        a = schedule.alphas_cumprod[t]
        x_0 = np.clip((x - np.sqrt(1 - a) * (np.sin(x) + t / 10)) / np.sqrt(a), -3, 3)
        x = schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x
        x = x + np.sqrt(schedule.posterior_variance[t]) * step_noise
    steps = sampling.parse_solver(schedule)
    chain = functools.partial(sampling.reverse_chain, denoise, steps)
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-1] = 100
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-2] = 100
    assert jnp.abs(chain(jnp.asarray(noise)) - x).max() > 0.1


# --- hypotheses --------------------------------------------------------------------------


def sample_hypotheses(seed, indices, solver):
    schedule = diffusion.cosine_schedule(5)
    denoise = x_0_of(schedule, lambda x_t, t: 0.3 * x_t + 0.1)
    steps = sampling.parse_solver(schedule, solver)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))
    return jax.vmap(lambda key: sampling.sample(denoise, steps, key, size=4))(keys)


@pytest.mark.parametrize("solver", ["ddpm", "ddpm:3", "ddim:3", "dpm++:3"])
def test_hypotheses_belong_to_their_keys(solver):
    many = sample_hypotheses(3, range(9), solver)
    assert many.shape == (9, 4)
    few = sample_hypotheses(3, [5, 0, 2], solver)
    np.testing.assert_allclose(few, many[jnp.array([5, 0, 2])], rtol=1e-5)
    assert len(np.unique(many)) == many.size
    assert not np.isin(sample_hypotheses(4, range(4), solver), many).any()


@pytest.mark.parametrize("t", [0, 1, 12, 24])
def test_a_step_draws_from_the_posterior(t):
    """With the true x_0, q(x_{t-1} | x_t, x_0) by Bayes' rule on the two Gaussians."""
    x_0, x_t = 1.5, np.sqrt(SCHEDULE.alphas_cumprod[t]) * 1.5 + 0.3
    previous, beta = SCHEDULE.alphas_cumprod_prev[t], SCHEDULE.betas[t]
    if t == 0:
        mean, variance = x_0, 0.0
    else:
        precision = 1 / (1 - previous) + (1 - beta) / beta
        weighted = np.sqrt(previous) * x_0 / (1 - previous) + np.sqrt(1 - beta) * x_t / beta
        mean, variance = weighted / precision, 1 / precision
    # A chain of that step alone, from a start and a noise that are given.
    step = jax.tree.map(lambda x: x[[24 - t]], sampling.parse_solver(SCHEDULE))
    noise = np.random.default_rng(5).normal(size=100)
    start = np.full(100, x_t)
    draws = sampling.reverse_chain(
        lambda x_t, t: jnp.full(x_t.shape, x_0), step, jnp.float32([start, noise])
    )
    np.testing.assert_allclose(draws, mean + np.sqrt(variance) * noise, rtol=1e-5, atol=1e-5)


# --- solvers -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [10, 25])
def test_the_paper_s_steps_are_the_posterior(num_steps):
    schedule = diffusion.cosine_schedule(num_steps)
    steps = sampling.parse_solver(schedule)
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
    schedule = SCHEDULE
    steps = sampling.parse_solver(schedule, solver)
    assert len(steps) == int(solver.split(":")[1])
    assert steps.times[0] == 23
    # Evenly spread: as many times are left below the last one as between two.
    gaps = -np.diff(np.append(steps.times, -1))
    assert gaps.sum() == 24
    assert np.ptp(gaps) <= 1
    last = [getattr(steps, name)[-1] for name in ("x_t", "x_0", "last_x_0")]
    np.testing.assert_allclose(last, [0, 1, 0], atol=1e-12)
    assert (steps.noise is None) == (not solver.startswith("ddpm"))
    assert steps.name == solver


@pytest.mark.parametrize("solver", ["ddim:8", "dpm++:8"])
def test_deterministic_steps_keep_the_noise(solver):
    """Of one data point and one noise each solver goes from x_t to x_s of the same two."""
    schedule, x_0, eps = SCHEDULE, 1.7, -0.6
    steps = sampling.parse_solver(schedule, solver)
    alpha_bar = np.append(schedule.alphas_cumprod[steps.times], 1.0)
    x = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
    found = steps.x_t * x[:-1] + (steps.x_0 + steps.last_x_0) * x_0
    np.testing.assert_allclose(found, x[1:], rtol=1e-9)


def gaussian_flow_error(solver, schedule, mean=0.8, variance=0.3):
    """Error at t = 0 on data N(mean, variance), where the probability flow is known.

    It scales the distance from the mean as the standard deviation: in float64, by the table alone.
    """
    steps = sampling.parse_solver(schedule, solver)
    z, last_x_0 = 1.3, 0.0
    a = schedule.alphas_cumprod[steps.times]
    marginal = a * variance + 1 - a
    x = np.sqrt(a[0]) * mean + np.sqrt(marginal[0]) * z
    for i in range(len(steps)):
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
        sampling.parse_solver(SCHEDULE, solver)
    assert repr(solver) in str(error.value)
    assert "1 to 24 steps" in str(error.value)


# --- passes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count", "per_pass", "passes"),
    [(12, 12, 4, 3), (12, 12, 5, 3), (12, 5, 5, 1), (12, 6, 5, 2), (3, 3, 10, 1), (12, 0, 4, 0)],
)
def test_rows_in_passes_are_the_rows(size, count, per_pass, passes):
    """All rows that are wanted, and no pass more than they take."""
    seen = []

    def function(indices):
        jax.debug.callback(lambda i: seen.append(np.asarray(i).tolist()), indices, ordered=True)
        return jnp.stack([indices, indices**2], axis=1) + 1

    def run(count):
        return sampling.in_passes(function, size, count, per_pass)

    for call in (run, jax.jit(run)):  # the count known and traced
        rows = call(count)
        jax.effects_barrier()
        expected = np.arange(count)
        np.testing.assert_array_equal(rows[:count], np.c_[expected, expected**2] + 1)
        assert rows.shape == (size, 2)
        assert len(seen) == passes
        assert all(len(indices) == min(per_pass, size) for indices in seen)
        seen.clear()


# --- keys of images ----------------------------------------------------------------------


def key_bits(seed, heatmaps):
    keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(heatmaps))
    return [tuple(bits) for bits in np.asarray(jax.random.key_data(keys)).tolist()]


def test_keys_belong_to_the_images_and_not_to_their_places():
    heatmaps = random_heatmaps(7, 5)
    keys = key_bits(0, heatmaps)
    order = np.random.default_rng(8).permutation(5)
    assert key_bits(0, heatmaps[order]) == [keys[i] for i in order]
    assert key_bits(0, heatmaps[2:3]) == [keys[2]]
    assert len(set(keys)) == 5
    assert not set(keys) & set(key_bits(1, heatmaps))


def test_equal_images_have_equal_keys():
    heatmaps = random_heatmaps(9, 2)[[0, 1, 0]]
    keys = key_bits(0, heatmaps)
    assert keys[0] == keys[2] != keys[1]


def test_the_smallest_difference_gives_another_key():
    """A last bit, two cells exchanged, maps exchanged, mirrored, a constant elsewhere."""
    image = random_heatmaps(10, 1)[0]
    variants = [image]
    for place in ((0, 0, 0), (15, 63, 63)):
        variants.append(image.copy())
        variants[-1][place] = np.nextafter(image[place], np.float32(1))
    variants.append(image.copy())
    variants[-1][3, 5, [7, 8]] = image[3, 5, [8, 7]]
    variants += [image[::-1], image[..., ::-1]]
    variants += [np.float32([np.full((64, 64), c)] * 16) for c in (0, 0.5, 1, 2)]
    one_hot = np.zeros((64, *image.shape), np.float32)
    one_hot[range(64), 0, 0, range(64)] = 1
    keys = key_bits(0, np.concatenate([variants, one_hot]))
    assert len(set(keys)) == len(keys)
