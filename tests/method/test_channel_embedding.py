"""Eq. 5: responses of overlapping cos^2 kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.method.channel_embedding import channel_embedding, kernel_centres


@pytest.mark.parametrize("num_kernels", [8, 33, 64])
def test_equation_5_in_float64(num_kernels):
    x = np.float32(np.random.default_rng(0).uniform(-1.3, 1.3, (5, 40)))
    width = 8 / num_kernels
    expected = np.zeros((5, 40, num_kernels))
    for k, centre in enumerate(np.linspace(-1, 1, num_kernels)):
        distance = np.abs(np.float64(x) - centre)
        inside = distance < width / 2
        expected[..., k][inside] = np.cos(np.pi * distance[inside] / width) ** 2
    np.testing.assert_allclose(channel_embedding(jnp.asarray(x), num_kernels), expected, atol=1e-5)


def test_a_kernel_is_1_at_its_centre_and_falls_on_both_sides():
    centres = kernel_centres(64)
    at_centres = np.asarray(channel_embedding(jnp.asarray(centres)))
    np.testing.assert_allclose(np.diag(at_centres), 1)
    np.testing.assert_allclose(at_centres, at_centres.T, atol=1e-5)
    assert (np.argmax(at_centres, axis=1) == np.arange(64)).all()


def test_a_coordinate_excites_about_four_kernels():
    x = np.random.default_rng(1).uniform(-0.9, 0.9, 500)
    excited = np.count_nonzero(channel_embedding(jnp.asarray(x, jnp.float32)), axis=-1)
    assert set(excited) == {3, 4}


def test_mirrored_coordinates_have_mirrored_embeddings():
    x = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, 100), jnp.float32)
    mirrored = channel_embedding(-x)[:, ::-1]
    np.testing.assert_allclose(channel_embedding(x), mirrored, atol=1e-5)


def test_nothing_answers_far_outside():
    assert not channel_embedding(jnp.asarray([-1.07, 1.07, 30.0])).any()


@pytest.mark.parametrize("num_kernels", [2, 7, 64])
def test_centres_are_a_linspace_to_rounding(num_kernels):
    centres = kernel_centres(num_kernels)
    np.testing.assert_allclose(centres, np.linspace(-1, 1, num_kernels), atol=2e-7)
    np.testing.assert_allclose(centres, -centres[::-1], atol=2e-7)
    assert centres[0] == -1
    assert centres[-1] == 1


def test_any_leading_shape():
    assert channel_embedding(jnp.zeros((2, 3, 4)), 16).shape == (2, 3, 4, 16)
    assert channel_embedding(jnp.zeros(())).shape == (64,)
