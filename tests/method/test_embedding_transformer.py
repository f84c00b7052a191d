"""Eq. 6 and the transformer against float64, one candidate at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.method import embedding_transformer
from diffpose_jax.method.embedding_transformer import EmbeddingTransformer, axis_histograms
from diffpose_jax.method.heatmaps import Candidates

SMALL = {"num_kernels": 8, "condition_size": 20, "num_layers": 1, "feed_forward": 24}
B, S, J, WIDTH = 3, 6, 16, 16


def random_samples(seed, dtypes=(np.int32, np.float32)):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 64 * 64, (B, S, J)).astype(dtypes[0])
    likelihood = rng.normal(0.4, 0.3, (B, S, J)).astype(dtypes[1])
    return Candidates(jnp.asarray(cells), jnp.asarray(likelihood))


def random_params(module, seed):
    """All parameters random: initial biases of 0 and scales of 1 would hide mistakes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), random_samples(0))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, 0.3, p.shape)), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, samples, key=None):
    """As in training with a key, else deterministic."""
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, samples, deterministic=key is None, rngs=rngs)


def encode(params, samples, *, scaling=True, standardise=False, num_heads=4, dropped=False):
    """The condition in float64 by the definitions."""
    params = jax.tree.map(np.float64, params)
    cells, weight = np.int64(samples.cells), np.float64(samples.likelihood)
    xy = np.stack([cells % 64, cells // 64], axis=-1) / 32 - 1
    if standardise:
        over = (-3, -2)  # candidates and joints of an image, each axis by itself
        xy = (xy - xy.mean(over, keepdims=True)) / xy.std(over, keepdims=True)
    width = 8 / 8  # h = 8 / K
    distance = np.abs(xy[..., None] - np.linspace(-1, 1, 8))
    channels = np.where(distance < width / 2, np.cos(np.pi * distance / width) ** 2, 0)
    embedding = channels.reshape(*cells.shape, WIDTH)  # (.., S, J, x then y channels)
    if dropped:  # all joints
        embedding = np.zeros_like(embedding)
    if scaling:
        embedding = embedding * weight[..., None]
    if "cross_spatial" in params:
        embedding = embedding @ params["cross_spatial"]["kernel"] + params["cross_spatial_bias"]
    tokens = embedding.sum(-3) + params["joint_embedding"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    for name in sorted(key for key in params if key.startswith("layer")):
        layer = params[name]
        attended = np.zeros_like(tokens)
        for head in range(num_heads):
            query, key, value = (
                tokens @ layer["qkv"]["kernel"][:, i, head] + layer["qkv"]["bias"][i, head]
                for i in range(3)
            )
            scores = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(WIDTH / num_heads))
            scores /= scores.sum(-1, keepdims=True)
            attended += scores @ value @ layer["out"]["kernel"][head]
        tokens = norm(tokens + attended + layer["out"]["bias"], layer["norm1"])
        hidden = np.maximum(linear(tokens, layer["linear1"]), 0)
        tokens = norm(tokens + linear(hidden, layer["linear2"]), layer["norm2"])
    return linear(tokens.reshape(*tokens.shape[:-2], -1), params["condition"])


@pytest.mark.parametrize("dtypes", [(np.int32, np.float32), (np.uint16, np.float16)])
@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({}, {}),
        ({"num_heads": 1}, {"num_heads": 1}),
        ({"num_layers": 0}, {}),
        ({"num_layers": 2}, {}),
        ({"likelihood_scaling": False}, {"scaling": False}),
        ({"cross_spatial": False}, {}),
        ({"standardise": True}, {"standardise": True}),
    ],
    ids=str,
)
def test_condition_in_float64(fields, reference, dtypes):
    module = EmbeddingTransformer(**SMALL | fields)
    params, samples = random_params(module, 1), random_samples(2, dtypes)
    assert ("cross_spatial" in params) == module.cross_spatial
    assert sum(name.startswith("layer") for name in params) == module.num_layers
    expected = encode(params, samples, **reference)
    np.testing.assert_allclose(apply(module, params, samples), expected, atol=5e-5)


def test_histograms_sum_the_weights_of_each_column_and_row():
    samples = random_samples(7)
    histograms = axis_histograms(samples.cells, samples.likelihood)
    cells = np.int32(samples.cells)
    other = embedding_transformer._histograms_by_comparing
    for image in np.ndindex(cells.shape[:-2]):
        of_image = jnp.asarray(cells[image])
        found = other(of_image % 64, of_image // 64, jnp.asarray(samples.likelihood[image]))
        np.testing.assert_allclose(found, histograms[image], rtol=1e-6)
    expected = np.zeros((B, J, 2, 64))
    for b, s, j in np.ndindex(B, S, J):
        row, column = divmod(int(samples.cells[b, s, j]), 64)
        expected[b, j, 0, column] += samples.likelihood[b, s, j]
        expected[b, j, 1, row] += samples.likelihood[b, s, j]
    np.testing.assert_allclose(histograms, expected, atol=1e-6)


def test_standardising_candidates_that_all_agree_is_finite():
    module = EmbeddingTransformer(**SMALL, standardise=True)
    samples = Candidates(jnp.full((B, S, J), 99), jnp.ones((B, S, J)))
    assert jnp.isfinite(apply(module, random_params(module, 15), samples)).all()


@pytest.mark.parametrize(
    "rates", [{"dropout": 0.1, "joint_dropout": 0.0}, {"dropout": 0.0, "joint_dropout": 0.3}]
)
def test_dropout_acts_in_training_alone_and_follows_its_key(rates):
    module = EmbeddingTransformer(**SMALL, **rates)
    params, samples = random_params(module, 18), random_samples(19)
    result = apply(module, params, samples, jax.random.key(1))
    np.testing.assert_array_equal(result, apply(module, params, samples, jax.random.key(1)))
    for other in (
        apply(module, params, samples, jax.random.key(2)),
        apply(module, params, samples),
    ):
        assert jnp.abs(result - other).max() > 1e-2
    np.testing.assert_allclose(apply(module, params, samples), encode(params, samples), atol=5e-5)


def test_a_dropped_joint_keeps_the_bias_of_the_linear_layer():
    """Its embedding is zeroed in front of the layer, which every candidate then passes."""
    module = EmbeddingTransformer(**SMALL, dropout=0.0, joint_dropout=1.0)
    params, samples = random_params(module, 20), random_samples(21)
    expected = encode(params, samples, dropped=True)
    np.testing.assert_allclose(
        apply(module, params, samples, jax.random.key(3)), expected, atol=5e-5
    )


def test_joints_are_dropped_whole_one_by_one_and_at_the_rate():
    """The last layer is made the identity, so that the condition shows the tokens."""
    module = EmbeddingTransformer(
        **SMALL | {"num_layers": 0, "condition_size": J * WIDTH}, joint_dropout=0.25
    )
    params = random_params(module, 22)
    params["condition"] = {
        "kernel": np.eye(J * WIDTH, dtype=np.float32), "bias": np.zeros(J * WIDTH, np.float32)
    }  # fmt: skip
    samples = jax.tree.map(lambda x: jnp.tile(x, (50, 1, 1)), random_samples(23))
    tokens = np.asarray(apply(module, params, samples, jax.random.key(4))).reshape(-1, J, WIDTH)
    kept, dropped = (
        encode(params, samples, dropped=value).reshape(-1, J, WIDTH) for value in (False, True)
    )
    is_kept = np.isclose(tokens, kept, atol=1e-4).all(-1)
    is_dropped = np.isclose(tokens, dropped, atol=1e-4).all(-1)
    assert (is_kept ^ is_dropped).all()
    assert abs(is_dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / is_dropped.size)
    assert is_dropped.any(1).mean() > 0.9  # not all joints of an image or none
    assert not is_dropped.all(1).any()
