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


def inputs(seed, shape):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(*shape, 48)), jnp.float32),
        jnp.asarray(rng.integers(0, 25, shape)),
        jnp.asarray(rng.normal(size=(*shape, CONDITION_SIZE)), jnp.float32),
    )


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
    x_t, t, condition = inputs(2, shape)
    eps = apply(module, params, x_t, t, condition)
    expected = plain(params, num_blocks, x_t, t, condition)
    np.testing.assert_allclose(eps, expected, atol=2e-6 * np.abs(expected).max())


def test_one_projected_condition_serves_many_poses_and_times():
    module = Denoiser(width=WIDTH)
    params = random_params(module, 3)
    x_t, t, condition = inputs(4, (5,))
    shared = apply(module, params, x_t, t, condition[:1])
    tiled = apply(module, params, x_t, t, jnp.tile(condition[:1], (5, 1)))
    np.testing.assert_allclose(shared, tiled, rtol=1e-5, atol=1e-5)


def test_the_paper_s_sizes():
    params = random_params(Denoiser(), 5)
    shapes = jax.tree.map(np.shape, params)
    assert shapes["input"] == {"kernel": (49, 1024), "bias": (1024,)}
    assert shapes["output"] == {"kernel": (1024, 48), "bias": (48,)}
    assert len(shapes) == 3 + 4


def test_bfloat16_is_near_float32_and_gives_float32():
    params = random_params(Denoiser(width=WIDTH), 6)
    arguments = inputs(7, (50,))
    exact = apply(Denoiser(width=WIDTH), params, *arguments)
    rough = apply(Denoiser(width=WIDTH, dtype=jnp.bfloat16), params, *arguments)
    assert rough.dtype == jnp.float32
    assert 1e-4 < jnp.std(rough - exact) / jnp.std(exact) < 0.05
