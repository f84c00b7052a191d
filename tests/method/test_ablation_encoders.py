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


@pytest.mark.parametrize("dtypes", [(np.int32, np.float32), (np.uint16, np.float16)])
@pytest.mark.parametrize("likelihood_scaling", [True, False])
def test_candidates_of_a_joint_stand_in_order_of_likelihood(likelihood_scaling, dtypes):
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 64 * 64, (B, S, J))
    likelihood = rng.normal(0.4, 0.3, (B, S, J)).astype(dtypes[1])
    samples = Candidates(jnp.asarray(cells.astype(dtypes[0])), jnp.asarray(likelihood))
    expected = []
    for b in range(B):
        ranked = [np.argsort(-likelihood[b, :, j], kind="stable") for j in range(J)]
        for rank in range(S):
            for joint in range(J):
                chosen = ranked[joint][rank]
                row, column = divmod(cells[b, chosen, joint], 64)
                expected += [column / 32 - 1, row / 32 - 1]
                if likelihood_scaling:
                    expected += [np.float32(likelihood[b, chosen, joint])]
    vector = CandidateVector(likelihood_scaling=likelihood_scaling).apply({}, samples)
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, np.reshape(np.float32(expected), vector.shape))


# A ResNet-18 over heatmaps.

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


def test_an_image_does_not_depend_on_its_batch():
    maps, params = random_maps(2, 3), resnet_params()
    batch = np.asarray(resnet(params, maps))
    assert np.abs(batch[0] - batch[1]).max() > 0.1 * batch.std()
    np.testing.assert_allclose(resnet(params, maps[1]), batch[1], rtol=0, atol=1e-5)
    others = maps.copy()
    others[[0, 2]] *= 3
    np.testing.assert_allclose(resnet(params, others)[1], batch[1], rtol=0, atol=1e-5)


def test_joints_and_places_are_told_apart():
    maps, params = random_maps(3, 1), resnet_params()
    condition = np.asarray(resnet(params, maps))
    for other in (maps[:, ::-1], maps.swapaxes(2, 3), maps[..., ::-1], maps[..., ::-1, :]):
        assert np.abs(resnet(params, other) - condition).max() > 0.05 * condition.std()


def test_every_joint_and_cell_is_seen():
    gradient = jax.jit(jax.grad(lambda maps: jnp.sum(resnet(resnet_params(), maps) ** 2)))
    seen = np.asarray(gradient(random_maps(5, 2))) != 0
    assert seen.mean(axis=(0, 2, 3)).min() > 0.9
    assert seen.any(axis=(0, 1)).all()
