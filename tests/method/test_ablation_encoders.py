"""The encoders that the paper compares with: candidates as a vector, a ResNet-18 over heatmaps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpose_jax.method.ablation_encoders import CandidateVector, HeatmapResNet
from diffpose_jax.method.heatmaps import Candidates

B, S, J = 3, 5, 16


pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_samples(seed, dtypes=(np.int32, np.float32)):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 64 * 64, (B, S, J)).astype(dtypes[0])
    likelihood = rng.normal(0.4, 0.3, (B, S, J)).astype(dtypes[1])
    return Candidates(jnp.asarray(cells), jnp.asarray(likelihood))


def vector_of(samples, **fields):
    module = CandidateVector(**fields)
    assert not jax.eval_shape(module.init, jax.random.key(0), samples)  # no parameters
    return np.asarray(module.apply({}, samples))


# --- candidates as a vector --------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(np.int32, np.float32), (np.uint16, np.float16)])
@pytest.mark.parametrize("likelihood_scaling", [True, False])
def test_candidates_of_a_joint_stand_in_order_of_likelihood(likelihood_scaling, dtypes):
    samples = random_samples(0, dtypes)
    cells, likelihood = np.int64(samples.cells), np.float32(samples.likelihood)
    expected = []
    for b in range(B):
        ranked = [np.argsort(-likelihood[b, :, j], kind="stable") for j in range(J)]
        for rank in range(S):
            for joint in range(J):
                chosen = ranked[joint][rank]
                row, column = divmod(cells[b, chosen, joint], 64)
                expected += [column / 32 - 1, row / 32 - 1]
                if likelihood_scaling:
                    expected += [likelihood[b, chosen, joint]]
    vector = vector_of(samples, likelihood_scaling=likelihood_scaling)
    assert vector.shape == (B, (3 if likelihood_scaling else 2) * S * J)
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, np.reshape(np.float32(expected), vector.shape))


def test_the_order_of_the_candidates_does_not_matter():
    samples = random_samples(1)
    order = np.random.default_rng(2).permuted(np.tile(np.arange(S)[:, None], (B, 1, J)), axis=1)
    permuted = jax.tree.map(lambda x: jnp.take_along_axis(x, jnp.asarray(order), 1), samples)
    np.testing.assert_array_equal(vector_of(permuted), vector_of(samples))
    swapped = jax.tree.map(lambda x: x[..., ::-1], samples)  # but that of the joints
    assert (vector_of(swapped) != vector_of(samples)).any()


def test_the_argmax_alone():
    """Sample-free: x, y and height of the 16 joints."""
    samples = jax.tree.map(lambda x: x[:, :1], random_samples(3))
    vector = vector_of(samples).reshape(B, J, 3)
    np.testing.assert_array_equal(vector[..., :2], samples.xy[:, 0])
    np.testing.assert_array_equal(vector[..., 2], samples.likelihood[:, 0])
    assert vector_of(samples, likelihood_scaling=False).shape == (B, 2 * J)


def test_any_leading_axes():
    samples = random_samples(4)
    batch = vector_of(samples)
    np.testing.assert_array_equal(vector_of(jax.tree.map(lambda x: x[1], samples)), batch[1])
    np.testing.assert_array_equal(vector_of(jax.tree.map(lambda x: x[None], samples)), batch[None])


# --- a ResNet-18 over heatmaps -----------------------------------------------------------

WIDTH = 4


def random_maps(seed, number):
    return np.float32(np.random.default_rng(seed).normal(size=(number, 16, 64, 64)))


@functools.cache
def resnet_params():
    """All parameters random: initial shifts of 0 and scales of 1 would hide mistakes."""
    shapes = jax.eval_shape(HeatmapResNet(WIDTH).init, jax.random.key(0), random_maps(0, 1))
    rng = np.random.default_rng(1)

    def draw(p):
        fan_in = int(np.prod(p.shape[:-1])) if len(p.shape) > 1 else 4
        return np.float32(rng.normal(0, fan_in**-0.5, p.shape))

    return jax.tree.map(draw, shapes["params"])


@jax.jit
def resnet(params, maps):
    return HeatmapResNet(WIDTH).apply({"params": params}, maps)


def test_parameters_are_those_of_a_resnet_18():
    """The published 11,689,512, with 16 channels in, without the classifier."""
    maps = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)
    condition, variables = jax.eval_shape(HeatmapResNet().init_with_output, jax.random.key(0), maps)
    assert condition.shape == (512,)
    leaves = jax.tree.leaves(variables["params"])
    published = 11_689_512 - (512 * 1000 + 1000) + (16 - 3) * 64 * 7 * 7
    assert sum(p.size for p in leaves) == published
    # 17 convolutions and 3 of the shortcuts, each with a scale and a shift of its channels.
    assert sorted(p.ndim for p in leaves) == [1] * 40 + [4] * 20
    assert {p.dtype for p in leaves} == {np.dtype(np.float32)}


def test_an_image_does_not_depend_on_its_batch():
    maps, params = random_maps(2, 3), resnet_params()
    batch = np.asarray(resnet(params, maps))
    assert batch.shape == (3, 8 * WIDTH)
    assert batch.dtype == np.float32
    assert np.abs(batch[0] - batch[1]).max() > 0.1 * batch.std()
    np.testing.assert_allclose(resnet(params, maps[1]), batch[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(resnet(params, maps[None]), batch[None], rtol=0, atol=1e-5)
    others = maps.copy()
    others[[0, 2]] *= 3
    np.testing.assert_allclose(resnet(params, others)[1], batch[1], rtol=0, atol=1e-5)


def test_joints_and_places_are_told_apart():
    maps, params = random_maps(3, 1), resnet_params()
    condition = np.asarray(resnet(params, maps))
    for other in (maps[:, ::-1], maps.swapaxes(2, 3), maps[..., ::-1], maps[..., ::-1, :]):
        assert np.abs(resnet(params, other) - condition).max() > 0.05 * condition.std()


TARGET = np.float32(np.random.default_rng(4).normal(size=(2, 8 * WIDTH)))


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def loss(params, maps):
    return jnp.mean((resnet(params, maps) - TARGET) ** 2)


def test_every_joint_and_cell_is_seen():
    _, (_, gradient) = loss(resnet_params(), random_maps(5, 2))
    seen = np.asarray(gradient) != 0
    assert seen.mean(axis=(0, 2, 3)).min() > 0.9
    assert seen.any(axis=(0, 1)).all()


def test_training_lowers_a_loss():
    maps, params, losses = random_maps(5, 2), resnet_params(), []
    for _ in range(10):
        value, (gradient, _) = loss(params, maps)
        params = jax.tree.map(lambda p, g: p - np.float32(0.02) * g, params, gradient)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
