"""Heatmaps to joint candidates: argmax and sampling by inverse transform (Sec. 3.1).

Heatmaps are (..., J, H, W), row-major: `heatmaps[..., y, x]`. A cell is addressed by its flat
index `y * W + x`. Coordinates run over [-1, 1): x = 2 (column - W / 2) / W, without a half-cell
shift, as in the published program.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

_BLOCK = 8
"""Cells of a row whose weights are summed beforehand, see `sample_cells`."""


@flax.struct.dataclass
class Candidates:
    """Joint candidates with their likelihoods.

    Candidates are cells of the heatmap, so 16 bits each hold them exactly; data sets store
    `uint16` and `float16`, a third of the bytes of coordinates.

    Attributes:
      cells: (..., S, J) integers, flat cell indices.
      likelihood: (..., S, J), the raw heatmap height at the candidate's cell.
    """

    cells: Array
    likelihood: Array

    @property
    def xy(self) -> Array:
        """Coordinates, (..., S, J, 2) float32 in [-1, 1)."""
        return cell_coordinates(self.cells)


def cell_coordinates(cells: Array) -> Array:
    """Flat cell indices (...) to coordinates (..., 2) = (x, y) in [-1, 1)."""
    column_row = jnp.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1)
    return (2.0 / HEATMAP_SIZE) * column_row.astype(jnp.float32) - 1.0


def coordinate_cells(xy: Array) -> Array:
    """The inverse of `cell_coordinates`, to the nearest cell: (..., 2) -> (...) int32."""
    column_row = jnp.round((xy + 1.0) * (HEATMAP_SIZE / 2)).astype(jnp.int32)
    column_row = jnp.clip(column_row, 0, HEATMAP_SIZE - 1)
    return column_row[..., 1] * HEATMAP_SIZE + column_row[..., 0]


def check(heatmaps: Array | np.ndarray) -> np.ndarray:
    """Heatmaps from outside, as float32 on the host.

    Args:
      heatmaps: (B, 16, 64, 64), MPII joint order.

    Raises:
      ValueError: for another shape, a type that is not a real number's, or NaN and infinity;
        the message names the first bad image and joint.
    """
    heatmaps = np.asarray(heatmaps)
    expected = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
    if heatmaps.ndim != 4 or heatmaps.shape[1:] != expected:
        hint = " (one image? add a leading axis: heatmaps[None])" * (heatmaps.shape == expected)
        raise ValueError(f"heatmaps must be (B, 16, 64, 64), not {heatmaps.shape}{hint}")
    # jnp.issubdtype knows bfloat16 and its like, np.issubdtype does not.
    if not any(jnp.issubdtype(heatmaps.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"heatmaps must be real numbers, not {heatmaps.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        heatmaps = heatmaps.astype(np.float32)
    finite = np.isfinite(heatmaps).all(axis=(2, 3))
    if not finite.all():
        image, joint = np.argwhere(~finite)[0]
        raise ValueError(
            f"heatmaps must be finite: image {image}, joint {joint} holds NaN or infinity"
        )
    return heatmaps


def argmax_cells(heatmaps: Array) -> Array:
    """Flat index of each map's highest cell, the first of equals: (..., J) int32."""
    # By rows first: a maximum is ten times faster to find on a CPU than its place.
    row = jnp.argmax(jnp.max(heatmaps, axis=-1), axis=-1)
    best_row = jnp.take_along_axis(heatmaps, row[..., None, None], axis=-2)[..., 0, :]
    return (row * heatmaps.shape[-1] + jnp.argmax(best_row, axis=-1)).astype(jnp.int32)


def argmax(heatmaps: Array) -> Candidates:
    """Each map's highest cell as the only candidate (S = 1); its height is not clamped."""
    cells = argmax_cells(heatmaps)
    height = jnp.max(heatmaps, axis=(-2, -1))
    return Candidates(
        cells=cells[..., None, :],
        likelihood=height[..., None, :].astype(jnp.float32),
    )


def normalise(heatmaps: Array) -> Array:
    """Divides each map by the sum of its positive cells: heights become probabilities.

    Negative cells stay negative, and a map without a positive cell stays as it is.

    Args:
      heatmaps: (..., H, W).
    """
    heatmaps = heatmaps.astype(jnp.float32)
    total = jnp.sum(jnp.maximum(heatmaps, 0.0), axis=(-2, -1), keepdims=True)
    return heatmaps / jnp.where(total > 0, total, 1.0)


def sample_cells(key: Array, heatmap: Array, num_candidates: int) -> tuple[Array, Array]:
    """Draws cells of one map with replacement, p proportional to max(height, 0).

    The inverse transform in three stages, each with a uniform number of its own: the row, a block
    of eight cells in it, the cell. So a sample reads 80 numbers, not the cumulative sums of 4,096.

    Args:
      key: a random key.
      heatmap: (H, W), W a multiple of 8. An all-non-positive map is uniform with likelihood 0.
      num_candidates: S.

    Returns:
      cells (S,) int32 and likelihoods (S,) float32.
    """
    heatmap = heatmap.astype(jnp.float32)
    width = heatmap.shape[1]
    positive = jnp.maximum(heatmap, 0.0)
    # A sum of strided parts is twice as fast on a CPU as one over a short axis.
    blocks = sum((positive[:, i::_BLOCK] for i in range(_BLOCK)), jnp.zeros(()))
    rows = jnp.sum(blocks, axis=1, keepdims=True).T
    flat = jnp.all(rows <= 0)

    def pick(weight: Array, uniform: Array) -> Array:
        """Indices (S,) by the inverse transform of weights (S or 1, N), numbers (S,)."""
        size = weight.shape[1]
        # Cumulative sums as a product: ten times faster than a scan.
        upper = jnp.triu(jnp.ones((size, size)))
        cumulative = jnp.matmul(jnp.where(flat, 1.0, weight), upper, precision="highest")
        target = uniform[:, None] * cumulative[:, -1:]
        below = jnp.sum(cumulative <= target, axis=1, dtype=jnp.int32)
        return jnp.minimum(below, size - 1)

    uniform = jax.random.uniform(key, (3, num_candidates))
    row = pick(rows, uniform[0])
    block = pick(blocks[row], uniform[1])
    heights = heatmap.reshape(-1, _BLOCK)[row * (width // _BLOCK) + block]
    place = pick(jnp.maximum(heights, 0.0), uniform[2])
    likelihood = jnp.sum(jnp.where(jnp.arange(_BLOCK)[None] == place[:, None], heights, 0.0), 1)

    # Rounding of the sums leads to a cell of weight 0 once in ten million draws.
    is_cell = flat | (likelihood > 0)
    cells = jnp.where(is_cell, row * width + block * _BLOCK + place, argmax_cells(heatmap))
    likelihood = jnp.where(flat, 0.0, jnp.where(is_cell, likelihood, jnp.max(heatmap)))
    return cells.astype(jnp.int32), likelihood


def sample(
    key: Array, heatmaps: Array, num_candidates: int = 32, *, include_argmax: bool = True
) -> Candidates:
    """Draws the joint candidates of one image.

    Args:
      key: a random key.
      heatmaps: (J, H, W).
      num_candidates: S, the argmax counted in.
      include_argmax: whether the first candidate is the argmax (False: "w/o argmax", Table 4).

    Returns:
      `Candidates`, (S, J).
    """
    num_joints = heatmaps.shape[0]
    num_drawn = num_candidates - include_argmax
    keys = jax.vmap(lambda joint: jax.random.fold_in(key, joint))(jnp.arange(num_joints))
    cells, likelihood = jax.vmap(sample_cells, in_axes=(0, 0, None), out_axes=1)(
        keys, heatmaps, num_drawn
    )
    drawn = Candidates(cells=cells, likelihood=likelihood)
    if not include_argmax:
        return drawn
    best = argmax(heatmaps)
    # A map without a positive cell says nothing: its argmax must not count either.
    likelihood = jnp.where(best.likelihood > 0, best.likelihood, 0.0)
    best = dataclasses.replace(best, likelihood=likelihood)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=0), best, drawn)
