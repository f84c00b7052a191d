"""From heatmaps to joint candidates: cells, argmax, sampling by inverse transform, checks."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
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


# --- cells and coordinates ---------------------------------------------------------------


def test_coordinates_run_over_columns_then_rows_without_half_a_cell():
    cells = jnp.asarray([cell(0, 0), cell(63, 0), cell(0, 63), cell(32, 16)])
    expected = [[-1, -1], [0.96875, -1], [-1, 0.96875], [0, -0.5]]
    np.testing.assert_array_equal(heatmaps.cell_coordinates(cells), expected)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint16])
def test_cells_to_coordinates_and_back(dtype):
    cells = jnp.arange(64 * 64, dtype=dtype).reshape(8, 32, 16)
    back = heatmaps.coordinate_cells(Candidates(cells, jnp.zeros(cells.shape)).xy)
    np.testing.assert_array_equal(back, cells)


def test_coordinates_go_to_the_nearest_cell_of_the_map():
    xy = jnp.asarray([[0.015, -0.49], [0.017, -0.51], [-3.0, 1.2]])
    expected = [cell(32, 16), cell(33, 16), cell(0, 63)]
    np.testing.assert_array_equal(heatmaps.coordinate_cells(xy), expected)


# --- argmax ------------------------------------------------------------------------------


def test_argmax_is_numpys():
    maps = np.float32(np.random.default_rng(0).normal(size=(3, 16, 64, 64)))
    best = heatmaps.argmax(jnp.asarray(maps))
    flat = maps.reshape(3, 16, -1)
    np.testing.assert_array_equal(best.cells[:, 0], flat.argmax(-1))
    np.testing.assert_array_equal(best.likelihood[:, 0], flat.max(-1))
    assert best.cells.shape == best.likelihood.shape == (3, 1, 16)


def test_argmax_takes_the_first_of_equals():
    """In row-major order, over rows and within one; whole numbers, so that ties abound."""
    maps = np.random.default_rng(1).integers(0, 3, (200, 64, 64)).astype(np.float32)
    maps[0] = 0
    expected = maps.reshape(200, -1).argmax(-1)
    np.testing.assert_array_equal(heatmaps.argmax_cells(jnp.asarray(maps)), expected)


def test_argmax_is_not_clamped():
    best = heatmaps.argmax(jnp.full((1, 64, 64), -2.0).at[0, 5, 7].set(-0.5))
    assert best.cells.item() == cell(7, 5)
    assert best.likelihood.item() == -0.5


# --- sampling ----------------------------------------------------------------------------


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
    """Heights over eight orders of magnitude, where rounding could lead beside them."""
    rng = np.random.default_rng(5)
    for scale in (1e-6, 1.0, 300.0):
        heatmap = np.full((64, 64), -0.01, np.float32)
        chosen = rng.choice(64 * 64, 30, replace=False)
        heatmap.reshape(-1)[chosen] = scale * 10.0 ** rng.uniform(-8, 0, 30)
        cells, likelihood = sample_cells(jax.random.key(6), jnp.asarray(heatmap), 200_000)
        assert set(np.unique(cells)) <= set(chosen)
        assert likelihood.min() > 0


@pytest.mark.parametrize("place", [(0, 0), (63, 63), (0, 63), (17, 40)])
def test_a_single_positive_cell_is_always_drawn(place):
    heatmap = jnp.zeros((64, 64)).at[place[1], place[0]].set(1e-3)
    cells, likelihood = sample_cells(jax.random.key(7), heatmap, 200_000)
    assert set(np.unique(cells)) == {cell(*place)}
    np.testing.assert_array_equal(likelihood, np.float32(1e-3))


def test_draws_are_independent():
    """Of each other, and between joints of equal maps: all pairs occur equally often."""
    maps = jnp.zeros((2, 64, 64)).at[:, 3, 5].set(1.0).at[:, 50, 9].set(1.0)
    samples = sample(jax.random.key(8), maps, 20_000, include_argmax=False)
    lower = np.asarray(samples.cells) == cell(9, 50)
    for first, second in ((lower[:-1, 0], lower[1:, 0]), (lower[:, 0], lower[:, 1])):
        pairs = np.bincount(2 * first + second, minlength=4)
        assert stats.chisquare(pairs).pvalue > 1e-3


def test_the_first_candidate_is_the_argmax():
    maps = jnp.asarray(np.random.default_rng(9).normal(size=(16, 64, 64)), jnp.float32)
    samples = sample(jax.random.key(10), maps, 32)
    assert samples.cells.shape == samples.likelihood.shape == (32, 16)
    best = heatmaps.argmax(maps)
    np.testing.assert_array_equal(samples.cells[:1], best.cells)
    np.testing.assert_array_equal(samples.likelihood[:1], best.likelihood)
    assert (samples.cells[1:] != best.cells).any(axis=0).all()


def test_without_argmax_all_candidates_are_drawn():
    maps = jnp.asarray(np.random.default_rng(11).uniform(size=(16, 64, 64)), jnp.float32)
    samples = sample(jax.random.key(12), maps, 32, include_argmax=False)
    assert samples.cells.shape == (32, 16)
    assert (samples.cells[:1] != heatmaps.argmax(maps).cells).all()


def test_the_argmax_alone():
    maps = jnp.asarray(np.random.default_rng(13).normal(size=(16, 64, 64)), jnp.float32)
    samples = sample(jax.random.key(14), maps, 1)
    np.testing.assert_array_equal(samples.cells, heatmaps.argmax(maps).cells)


def test_no_candidate_of_a_map_without_a_positive_cell_counts():
    """The argmax neither: it would be a negative weight at a meaningless place."""
    maps = jnp.full((16, 64, 64), -0.1).at[3].set(0.0).at[5, 1, 1].set(0.7)
    samples = sample(jax.random.key(15), maps, 32)
    expected = np.where(np.arange(16) == 5, np.float32(0.7), 0)
    np.testing.assert_array_equal(samples.likelihood, np.tile(expected, (32, 1)))


def test_the_key_decides():
    maps = jnp.asarray(np.random.default_rng(16).uniform(size=(16, 64, 64)), jnp.float32)
    first, again, other = (sample(jax.random.key(seed), maps, 32).cells for seed in (17, 17, 18))
    np.testing.assert_array_equal(first, again)
    assert (first[1:] != other[1:]).mean() > 0.99


# --- probabilities -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_heights_become_probabilities(dtype):
    maps = np.random.default_rng(19).normal(size=(2, 3, 64, 64)).astype(dtype)
    maps[0, 1] = -np.abs(maps[0, 1])  # no positive cell: it stays as it is
    maps[1, 2] = 0
    total = np.maximum(np.float64(maps), 0).sum((2, 3), keepdims=True)
    expected = np.float64(maps) / np.where(total > 0, total, 1)
    normalised = heatmaps.normalise(jnp.asarray(maps))
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-5)
    sums = np.maximum(np.float64(normalised), 0).sum((2, 3))
    np.testing.assert_allclose(sums, total[..., 0, 0] > 0, atol=1e-5)


def test_probabilities_are_drawn_as_heights_are():
    maps = jnp.asarray(np.random.default_rng(20).normal(size=(16, 64, 64)), jnp.float32)
    maps = maps.at[3].set(-0.2)
    total = np.maximum(np.float64(maps), 0).sum((1, 2))
    heights = sample(jax.random.key(21), maps, 32)
    shares = sample(jax.random.key(21), heatmaps.normalise(maps), 32)
    # Rounding may move a draw to the neighbouring cell.
    same = np.asarray(heights.cells) == np.asarray(shares.cells)
    assert same.mean() > 0.99
    expected = np.asarray(heights.likelihood) / np.where(total > 0, total, 1)
    np.testing.assert_allclose(shares.likelihood[same], expected[same], rtol=1e-5)
    assert not np.asarray(shares.likelihood)[:, 3].any()


# --- heatmaps from outside ---------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64]
)
def test_real_numbers_are_accepted(dtype):
    maps = np.arange(2 * 16 * 64 * 64).reshape(2, 16, 64, 64) % 100
    checked = heatmaps.check(maps.astype(dtype))
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, maps)


def test_lists_and_device_arrays_are_accepted():
    assert heatmaps.check(jnp.zeros((1, 16, 64, 64), jnp.bfloat16)).dtype == np.float32


@pytest.mark.parametrize(
    "shape", [(2, 17, 64, 64), (2, 16, 64, 48), (64, 64), (1, 2, 16, 64, 64), (2, 64, 64, 16)]
)
def test_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"\(B, 16, 64, 64\), not \(") as error:
        heatmaps.check(np.zeros(shape))
    assert str(shape) in str(error.value)
    assert "one image" not in str(error.value)


def test_one_image_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"one image\? add a leading axis: heatmaps\[None\]"):
        heatmaps.check(np.zeros((16, 64, 64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_located(bad):
    maps = np.zeros((3, 16, 64, 64))
    maps[1, 4, 63, 0] = maps[2, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"image 1, joint 4"):
        heatmaps.check(maps)


@pytest.mark.parametrize("dtype", [np.complex64, object, np.bool_])
def test_other_types_are_errors(dtype):
    with pytest.raises(ValueError, match=f"real numbers, not {np.dtype(dtype)}"):
        heatmaps.check(np.zeros((1, 16, 64, 64), dtype))
