"""The reverse chain where the answer is known, and the keys of hypotheses and images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_heatmaps

from diffpose_jax import diffusion, sampling

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


def sample_gaussian(schedule, num_samples):
    def chain(key):
        noise = jax.random.normal(key, (schedule.num_steps + 1, 2))
        denoise = functools.partial(gaussian_denoise, schedule)
        return sampling.reverse_chain(denoise, schedule, noise, clip=30.0)

    return jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), num_samples))


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

    x = jnp.asarray(noise[0])
    for t, step_noise in zip(range(6, -1, -1), noise[1:], strict=True):
        step_noise = jnp.asarray(step_noise)
        x = diffusion.reverse_step(denoise, schedule, x, jnp.asarray(t), step_noise, 3.0)
    chain = functools.partial(sampling.reverse_chain, denoise, schedule, clip=3.0)
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-1] = 100
    np.testing.assert_allclose(chain(jnp.asarray(noise)), x, atol=1e-5)
    noise[-2] = 100
    assert jnp.abs(chain(jnp.asarray(noise)) - x).max() > 0.1


# --- hypotheses --------------------------------------------------------------------------


def sample_hypotheses(seed, projected, num_hypotheses):
    return sampling.sample_hypotheses(
        jax.random.key(seed),
        lambda x_t, t, projected: 0.3 * x_t + projected,
        projected,
        diffusion.cosine_schedule(5),
        size=4,
        num_hypotheses=num_hypotheses,
        clip=30.0,
    )


def test_more_hypotheses_keep_the_first_ones():
    projected = jnp.asarray([0.1, 0.2, -0.3, 0.4])
    many, few = (sample_hypotheses(3, projected, m) for m in (9, 4))
    assert many.shape == (9, 4)
    np.testing.assert_allclose(many[:4], few, rtol=1e-6)
    assert len(np.unique(many)) == many.size
    assert not np.isin(sample_hypotheses(4, projected, 4), few).any()


def test_each_hypothesis_may_have_a_condition_of_its_own():
    own = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)), jnp.float32)
    hypotheses = sample_hypotheses(6, own, 6)
    for m in range(6):
        shared = sample_hypotheses(6, own[m], 6)
        np.testing.assert_allclose(hypotheses[m], shared[m], rtol=1e-5)


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
