"""Eq. 5: responses of overlapping cos^2 kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.method.channel_embedding import channel_embedding, kernel_centres


@pytest.mark.parametrize("num_kernels", [8, 33, 64])
def test_equation_5_in_float64(num_kernels):
    x = np.float32(np.random.default_rng(0).uniform(-1.3, 1.3, (5, 40)))
    x[0, 0] = 30
    width = 8 / num_kernels
    expected = np.zeros((5, 40, num_kernels))
    for k, centre in enumerate(np.linspace(-1, 1, num_kernels)):
        distance = np.abs(np.float64(x) - centre)
        inside = distance < width / 2
        expected[..., k][inside] = np.cos(np.pi * distance[inside] / width) ** 2
    np.testing.assert_allclose(channel_embedding(jnp.asarray(x), num_kernels), expected, atol=1e-5)


@pytest.mark.parametrize("num_kernels", [2, 7, 64])
def test_centres_are_a_linspace_to_rounding(num_kernels):
    centres = kernel_centres(num_kernels)
    np.testing.assert_allclose(centres, np.linspace(-1, 1, num_kernels), atol=2e-7)
    np.testing.assert_allclose(centres, -centres[::-1], atol=2e-7)
    assert centres[0] == -1
    assert centres[-1] == 1
