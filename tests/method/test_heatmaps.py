"""From heatmaps to joint candidates: cells, argmax, sampling by inverse transform, checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffpose_jax.method import heatmaps
from diffpose_jax.method.heatmaps import Candidates

sample_cells = jax.jit(heatmaps.sample_cells, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2, static_argnames="include_argmax")
def sample(key, maps, num_candidates, include_argmax=True):
    return heatmaps.sample(key, maps, num_candidates, include_argmax)


def cell(x, y):
    return 64 * y + x


def test_coordinates_run_over_columns_then_rows_without_half_a_cell():
    cells = jnp.asarray([cell(0, 0), cell(63, 0), cell(0, 63), cell(32, 16)])
    expected = [[-1, -1], [0.96875, -1], [-1, 0.96875], [0, -0.5]]
    np.testing.assert_array_equal(heatmaps.cell_coordinates(cells), expected)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint16])
def test_cells_to_coordinates_and_back(dtype):
    cells = jnp.arange(64 * 64, dtype=dtype).reshape(8, 32, 16)
    back = heatmaps.coordinate_cells(Candidates(cells, jnp.zeros(cells.shape)).xy)
    np.testing.assert_array_equal(back, cells)
    # Between cells and outside, to the nearest one of the map.
    xy = jnp.asarray([[0.015, -0.49], [0.017, -0.51], [-3.0, 1.2]])
    expected = [cell(32, 16), cell(33, 16), cell(0, 63)]
    np.testing.assert_array_equal(heatmaps.coordinate_cells(xy), expected)


@pytest.mark.parametrize("shift", [0, -9])
def test_argmax_is_the_first_of_the_largest_in_row_major_order(shift):
    """Whole numbers, so that ties abound; heights below 0 are not clamped."""
    maps = np.random.default_rng(1).integers(0, 3, (5, 16, 64, 64)).astype(np.float32) + shift
    maps[0, 0] = shift
    maps[1, :, 40, 2] = 5.5 + shift
    best = heatmaps.argmax(jnp.asarray(maps))
    flat = maps.reshape(5, 16, -1)
    np.testing.assert_array_equal(best.cells[:, 0], flat.argmax(-1))
    np.testing.assert_array_equal(best.likelihood[:, 0], flat.max(-1))


def assert_distribution(cells, weight):
    """Chi-square test of the counts of all cells of positive weight; no other may occur."""
    counts = np.bincount(np.asarray(cells).reshape(-1), minlength=64 * 64)
    probability = weight.reshape(-1) / weight.sum()
    assert counts[probability == 0].sum() == 0
    counts, probability = counts[probability > 0], probability[probability > 0]
    assert stats.chisquare(counts, counts.sum() * probability).pvalue > 1e-3


def test_cells_are_drawn_in_proportion_to_their_positive_height():
    heatmap = np.random.default_rng(2).uniform(-0.5, 1, (64, 64))
    heatmap[:3], heatmap[:, 40:44] = -1, -1  # no weight at all in some rows and columns
    heatmap[heatmap < 0.2] -= 0.2  # so that every positive cell is expected often enough
    cells, likelihood = sample_cells(jax.random.key(3), jnp.asarray(heatmap, jnp.float32), 200_000)
    assert_distribution(cells, np.maximum(heatmap, 0))
    np.testing.assert_allclose(likelihood, heatmap.reshape(-1)[cells], rtol=1e-6)


@pytest.mark.parametrize("height", [0.0, -0.3])
def test_a_map_without_a_positive_cell_is_uniform_with_likelihood_0(height):
    heatmap = jnp.full((64, 64), height).at[9, 9].add(-1.0)
    cells, likelihood = sample_cells(jax.random.key(4), heatmap, 200_000)
    assert_distribution(cells, np.ones((64, 64)))
    assert not likelihood.any()


def test_never_a_cell_without_weight():
    """Heights over eight orders of magnitude, where rounding could lead beside them.

    Then a single cell, in a corner and inside.
    """
    rng = np.random.default_rng(5)
    choices = [(scale, rng.choice(64 * 64, 30, replace=False)) for scale in (1e-6, 1.0, 300.0)]
    choices += [(1e-3, np.array([place])) for place in (0, 64 * 64 - 1, cell(0, 63), cell(17, 40))]
    for scale, chosen in choices:
        heatmap = np.full((64, 64), -0.01, np.float32)
        heatmap.reshape(-1)[chosen] = scale * 10.0 ** rng.uniform(-8, 0, len(chosen))
        cells, likelihood = sample_cells(jax.random.key(6), jnp.asarray(heatmap), 200_000)
        assert set(np.unique(cells)) <= set(chosen)
        assert likelihood.min() > 0


def test_draws_are_independent():
    """Of each other, and between joints of equal maps: all pairs occur equally often."""
    maps = jnp.zeros((2, 64, 64)).at[:, 3, 5].set(1.0).at[:, 50, 9].set(1.0)
    samples = sample(jax.random.key(8), maps, 20_000, include_argmax=False)
    lower = np.asarray(samples.cells) == cell(9, 50)
    for first, second in ((lower[:-1, 0], lower[1:, 0]), (lower[:, 0], lower[:, 1])):
        pairs = np.bincount(2 * first + second, minlength=4)
        assert stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("number", [1, 32])
def test_the_first_candidate_is_the_argmax_if_wanted(number):
    maps = jnp.asarray(np.random.default_rng(9).normal(size=(16, 64, 64)), jnp.float32)
    best = heatmaps.argmax(maps)
    samples = sample(jax.random.key(10), maps, number)
    assert samples.cells.shape == samples.likelihood.shape == (number, 16)
    np.testing.assert_array_equal(samples.cells[:1], best.cells)
    np.testing.assert_array_equal(samples.likelihood[:1], best.likelihood)
    drawn = sample(jax.random.key(10), maps, number, include_argmax=False)
    assert drawn.cells.shape == (number, 16)
    assert (drawn.cells[:1] != best.cells).all()


def test_no_candidate_of_a_map_without_a_positive_cell_counts():
    """The argmax neither: it would be a negative weight at a meaningless place."""
    maps = jnp.full((16, 64, 64), -0.1).at[3].set(0.0).at[5, 1, 1].set(0.7)
    samples = sample(jax.random.key(15), maps, 32)
    expected = np.where(np.arange(16) == 5, np.float32(0.7), 0)
    np.testing.assert_array_equal(samples.likelihood, np.tile(expected, (32, 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_heights_become_probabilities(dtype):
    maps = np.random.default_rng(19).normal(size=(2, 3, 64, 64)).astype(dtype)
    maps[0, 1] = -np.abs(maps[0, 1])  # no positive cell: it stays as it is
    maps[1, 2] = 0
    total = np.maximum(np.float64(maps), 0).sum((2, 3), keepdims=True)
    expected = np.float64(maps) / np.where(total > 0, total, 1)
    normalised = heatmaps.normalise(jnp.asarray(maps))
    np.testing.assert_allclose(normalised, expected, rtol=1e-5)
