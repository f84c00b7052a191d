"""The reverse chain where the answer is known, and the keys of hypotheses and images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_heatmaps

from diffpose_jax.method import diffusion, sampling

MEAN = np.array([1.0, -2.0])
COVARIANCE = np.array([[1.5, 0.8], [0.8, 0.7]])


def gaussian_gain(alpha_bar, xp):
    """E[noise | x_t] = gain (x_t - sqrt(alpha-bar) mean) for data N(mean, covariance)."""
    marginal = alpha_bar * COVARIANCE + (1 - alpha_bar) * np.eye(2)
    return xp.sqrt(1 - alpha_bar) * xp.linalg.inv(marginal)


def gaussian_denoise(schedule, x_t, t):
    """The denoiser that training would find for Gaussian data."""
    gains = jnp.asarray([gaussian_gain(a, np) for a in schedule.alphas_cumprod], jnp.float32)
    means = jnp.asarray(np.sqrt(schedule.alphas_cumprod)[:, None] * MEAN, jnp.float32)
    return gains[t] @ (x_t - means[t])


def sample_gaussian(schedule, num_candidates):
    def chain(key):
        noise = jax.random.normal(key, (schedule.num_steps + 1, 2))
        denoise = functools.partial(gaussian_denoise, schedule)
        return sampling.reverse_chain(denoise, schedule, noise, clip=30.0)

    return jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), num_candidates))


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


def test_data_of_one_point_are_found_exactly():
    schedule = diffusion.cosine_schedule()
    point = jnp.asarray([3.0, -7.0, 0.5])
    a = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x_t, t):
        return (x_t - jnp.sqrt(a[t]) * point) / jnp.sqrt(1 - a[t])

    noise = jax.random.normal(jax.random.key(1), (26, 3))
    x_0 = sampling.reverse_chain(denoise, schedule, noise, clip=30.0)
    np.testing.assert_allclose(x_0, point, atol=1e-4)


def test_the_chain_is_the_loop_of_reverse_steps():
    """From t = T - 1 down to 0, each with its own noise; the last noise has no effect."""
    schedule = diffusion.cosine_schedule(7)
    noise = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)

    def denoise(x_t, t):
        return jnp.sin(x_t) + t / 10

    x = np.float64(noise[0])
    for t, step_noise in zip(range(6, -1, -1), np.float64(noise[1:]), strict=True):
        a = schedule.alphas_cumprod[t]
        x_0 = np.clip((x - np.sqrt(1 - a) * (np.sin(x) + t / 10)) / np.sqrt(a), -3, 3)
        x = schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x
        x = x + np.sqrt(schedule.posterior_variance[t]) * step_noise
    chain = functools.partial(sampling.reverse_chain, denoise, schedule, clip=3.0)
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-1] = 100
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-2] = 100
    assert jnp.abs(chain(jnp.asarray(noise)) - x).max() > 0.1


# --- hypotheses --------------------------------------------------------------------------


def sample_hypotheses(seed, condition, indices, solver="ddpm"):
    schedule = diffusion.cosine_schedule(5)

    def one(index):
        return sampling.sample_hypothesis(
            jax.random.key(seed),
            index,
            lambda x_t, t: 0.3 * x_t + condition,
            schedule,
            diffusion.reverse_steps(schedule, solver),
            size=4,
            clip=30.0,
        )

    return jax.vmap(one)(jnp.asarray(indices))


@pytest.mark.parametrize("solver", ["ddpm", "ddpm:3", "ddim:3", "dpm++:3"])
def test_hypotheses_belong_to_their_indices(solver):
    condition = jnp.asarray([0.1, 0.2, -0.3, 0.4])
    many = sample_hypotheses(3, condition, range(9), solver)
    assert many.shape == (9, 4)
    few = sample_hypotheses(3, condition, [5, 0, 2], solver)
    np.testing.assert_allclose(few, many[jnp.array([5, 0, 2])], rtol=1e-5)
    assert len(np.unique(many)) == many.size
    assert not np.isin(sample_hypotheses(4, condition, range(4), solver), many).any()


def test_deterministic_solvers_begin_with_the_same_noise():
    """With a denoiser that knows the one data point every solver finds it from anywhere."""
    schedule = diffusion.cosine_schedule()
    a = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
    point = jnp.asarray([3.0, -7.0, 0.5])
    noise = jax.random.normal(jax.random.key(1), (1, 3))
    for solver in ("ddim:1", "ddim:5", "dpm++:2", "dpm++:8", "dpm++:24"):
        x_0 = sampling.reverse_chain(
            lambda x_t, t: (x_t - jnp.sqrt(a[t]) * point) / jnp.sqrt(1 - a[t]),
            schedule,
            noise,
            30.0,
            diffusion.reverse_steps(schedule, solver),
        )
        np.testing.assert_allclose(x_0, point, atol=1e-4, err_msg=solver)


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
