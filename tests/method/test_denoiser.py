"""The split first layer against the plain network over the concatenated inputs, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.method.denoiser import Denoiser

CONDITION_SIZE, WIDTH = 20, 32


def random_params(module, seed):
    def both(denoiser, x_t, t, condition):
        return denoiser(x_t, t, denoiser.project_condition(condition))

    inputs = jnp.zeros(module.pose_size), jnp.zeros((), int), jnp.zeros(CONDITION_SIZE)
    init = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=both))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, 0.3, p.shape)), init["params"])


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x_t, t, condition):
    projected = module.apply({"params": params}, condition, method=Denoiser.project_condition)
    return module.apply({"params": params}, x_t, t, projected)


def plain(params, num_blocks, x_t, t, condition):
    """concat -> linear -> residual blocks -> linear, in float64."""
    params = jax.tree.map(np.float64, params)

    def leaky_relu(x):
        return np.where(x > 0, x, 0.01 * x)

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    kernel = np.concatenate([params["input"]["kernel"], params["condition"]["kernel"]])
    everything = np.concatenate([x_t, np.asarray(t)[..., None], condition], axis=-1)
    h = np.float64(everything) @ kernel + params["input"]["bias"]
    for block in range(num_blocks):
        first, second = (params[f"blocks_{block}_{i}"] for i in range(2))
        h = h + leaky_relu(linear(leaky_relu(linear(h, first)), second))
    return linear(h, params["output"])


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_the_concatenated_network_in_float64(num_blocks, shape):
    module = Denoiser(width=WIDTH, num_blocks=num_blocks)
    params = random_params(module, 1)
    assert "bias" not in params["condition"]
    rng = np.random.default_rng(2)
    x_t = jnp.asarray(rng.normal(size=(*shape, 48)), jnp.float32)
    t = jnp.asarray(rng.integers(0, 25, shape))
    condition = jnp.asarray(rng.normal(size=(*shape, CONDITION_SIZE)), jnp.float32)
    eps = apply(module, params, x_t, t, condition)
    expected = plain(params, num_blocks, x_t, t, condition)
    np.testing.assert_allclose(eps, expected, atol=2e-6 * np.abs(expected).max())
