"""Heatmaps to joint candidates: the argmax and draws by inverse transform sampling (Sec. 3.1).

Heatmaps are (..., J, H, W), row-major: `heatmaps[..., y, x]`. A cell is addressed by its flat
index `y * W + x`. Coordinates run over [-1, 1): x = 2 (column - W / 2) / W, without a half-cell
shift, as in the published program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, Num

from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

MAPS_SHAPE = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
AnyArray = Any
"""What a field of a pytree holds: a JAX or NumPy array, or its shape under `jax.eval_shape`."""
_BLOCK = 8
"""Cells of a row whose weights are summed beforehand, see `sample_cells`."""


@flax.struct.dataclass
class Candidates:
    """Joint candidates with their likelihoods.

    Candidates are cells of the heatmap, so that 16 bits hold them exactly; data sets store `uint16`
    and `float16`, a third of the bytes of coordinates.

    Attributes:
      cells: flat cell indices.
      likelihood: the heatmap's height at the candidate's cell, or its probability.
    """

    cells: Integer[AnyArray, "*batch S J"]
    likelihood: Float[AnyArray, "*batch S J"]

    @property
    def xy(self) -> Float[Array, "*batch S J 2"]:
        """Coordinates in [-1, 1)."""
        return cell_coordinates(jnp.asarray(self.cells))


def cell_coordinates(cells: Integer[Array, "*shape"]) -> Float[Array, "*shape 2"]:
    """Flat cell indices to coordinates (x, y) in [-1, 1)."""
    column_row = jnp.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1)
    return (2.0 / HEATMAP_SIZE) * column_row.astype(jnp.float32) - 1.0


def coordinate_cells(xy: Float[Array, "*shape 2"]) -> Integer[Array, "*shape"]:
    """The inverse of `cell_coordinates`, to the nearest cell."""
    column_row = jnp.round((xy + 1.0) * (HEATMAP_SIZE / 2)).astype(jnp.int32)
    column_row = jnp.clip(column_row, 0, HEATMAP_SIZE - 1)
    return column_row[..., 1] * HEATMAP_SIZE + column_row[..., 0]


def argmax_cells(heatmaps: Num[Array, "*maps H W"]) -> Integer[Array, "*maps"]:
    """Flat index of each map's highest cell, the first of equals."""
    # By rows first: a maximum is ten times faster to find on a CPU than its place.
    row = jnp.argmax(jnp.max(heatmaps, axis=-1), axis=-1)
    best_row = jnp.take_along_axis(heatmaps, row[..., None, None], axis=-2)[..., 0, :]
    return (row * heatmaps.shape[-1] + jnp.argmax(best_row, axis=-1)).astype(jnp.int32)


def argmax(heatmaps: Num[Array, "*batch J H W"]) -> Candidates:
    """Each map's highest cell as the only candidate (S = 1); its height is not clamped."""
    height = jnp.max(heatmaps, axis=(-2, -1)).astype(jnp.float32)
    return Candidates(argmax_cells(heatmaps)[..., None, :], height[..., None, :])


def normalise(heatmaps: Num[Array, "*maps H W"]) -> Float[Array, "*maps H W"]:
    """Divides each map by the sum of its positive cells: heights become probabilities.

    Negative cells stay negative, and a map without a positive cell stays as it is.
    """
    heatmaps = heatmaps.astype(jnp.float32)
    total = jnp.sum(jnp.maximum(heatmaps, 0.0), axis=(-2, -1), keepdims=True)
    return heatmaps / jnp.where(total > 0, total, 1.0)


def sample_cells(
    key: Array, heatmap: Num[Array, "H W"], num_drawn: int
) -> tuple[Integer[Array, " S"], Float[Array, " S"]]:
    """Draws cells of one map with replacement, p proportional to max(height, 0).

    The inverse transform in three stages, each with a uniform number of its own: the row, a block
    of eight cells in it, the cell. So a draw reads 80 numbers, not the cumulative sums of 4,096.
    A map without a positive cell is drawn from uniformly, with likelihood 0.

    Returns:
      The cells, and the heights there.
    """
    heatmap = heatmap.astype(jnp.float32)
    width = heatmap.shape[1]
    positive = jnp.maximum(heatmap, 0.0)
    # A sum of strided parts is twice as fast on a CPU as one over a short axis.
    blocks = sum((positive[:, i::_BLOCK] for i in range(_BLOCK)), jnp.zeros(()))
    rows = jnp.sum(blocks, axis=1, keepdims=True).T
    flat = jnp.all(rows <= 0)

    def pick(weight: Float[Array, "_ N"], uniform: Float[Array, " S"]) -> Integer[Array, " S"]:
        """Indices by the inverse transform of weights: one row for all draws, or one for each."""
        size = weight.shape[1]
        # Cumulative sums as a product: ten times faster than a scan.
        upper = jnp.triu(jnp.ones((size, size)))
        cumulative = jnp.matmul(jnp.where(flat, 1.0, weight), upper, precision="highest")
        target = uniform[:, None] * cumulative[:, -1:]
        below = jnp.sum(cumulative <= target, axis=1, dtype=jnp.int32)
        return jnp.minimum(below, size - 1)

    uniform = jax.random.uniform(key, (3, num_drawn))
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
    key: Array, heatmaps: Num[Array, "J H W"], num_candidates: int, include_argmax: bool
) -> Candidates:
    """Draws the candidates of one image: (S, J); the argmax is the first of them."""
    num_joints = heatmaps.shape[0]
    keys = jax.vmap(lambda joint: jax.random.fold_in(key, joint))(jnp.arange(num_joints))
    drawn = Candidates(
        *jax.vmap(sample_cells, in_axes=(0, 0, None), out_axes=1)(
            keys, heatmaps, num_candidates - include_argmax
        )
    )
    if not include_argmax:
        return drawn
    best = argmax(heatmaps)
    # A map without a positive cell says nothing: its argmax must not count either.
    best = dataclasses.replace(best, likelihood=jnp.maximum(best.likelihood, 0.0))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=0), best, drawn)


@dataclasses.dataclass(frozen=True)
class CandidateSampler:
    """How a model makes candidates of heatmaps: now, or ahead of a training.

    Attributes:
      num_candidates: S, the argmax counted in.
      include_argmax: whether the first candidate is the argmax (False: "w/o argmax", Table 4).
      normalised: whether likelihoods are probabilities, and not the heatmap's raw heights.
    """

    num_candidates: int
    include_argmax: bool
    normalised: bool

    def draw(self, key: Array, heatmaps: Num[Array, "J H W"]) -> Candidates:
        """Draws the candidates of one image: (S, J)."""
        maps = normalise(heatmaps) if self.normalised else heatmaps
        return sample(key, maps, self.num_candidates, self.include_argmax)

    @functools.partial(jax.jit, static_argnames=("self", "num_drawn"))
    def draw_ahead(
        self,
        key: Array,
        rows: Integer[Array, " N"],
        heatmaps: Num[Array, "N J H W"],
        num_drawn: int,
    ) -> PredrawnCandidates:
        """Draws candidates that the steps of a training take parts of.

        Args:
          key: a random key.
          rows: the images' rows in the data set: an image's draws depend on its own row alone.
          heatmaps: the images'.
          num_drawn: P, how many are drawn for each joint.
        """

        def draw(row: Array, maps: Array) -> Candidates:
            return sample(jax.random.fold_in(key, row), maps, num_drawn + 1, include_argmax=True)

        drawn = jax.vmap(draw)(rows, normalise(heatmaps) if self.normalised else heatmaps)
        stored = Candidates(drawn.cells.astype(jnp.uint16), drawn.likelihood.astype(jnp.float16))
        return PredrawnCandidates(
            best=jax.tree.map(lambda x: x[:, :1], stored),
            drawn=jax.tree.map(lambda x: x[:, 1:], stored),
            num_taken=self.num_candidates - self.include_argmax,
            include_argmax=self.include_argmax,
        )


@flax.struct.dataclass
class PredrawnCandidates:
    """Candidates of a data set that were drawn ahead of training.

    Drawing costs more than a small model's whole step. Of P candidates drawn once for each joint, a
    step takes a contiguous part from a random offset on: 31 of P draws with replacement are 31
    draws with replacement.

    Attributes:
      best: the argmax, (N, 1, J).
      drawn: (N, P, J).
      num_taken: how many of the drawn ones a step takes.
      include_argmax: whether the argmax stands before them.
    """

    best: Candidates
    drawn: Candidates
    num_taken: int = flax.struct.field(pytree_node=False)
    include_argmax: bool = flax.struct.field(pytree_node=False)

    def take(
        self,
        rows: Integer[Array | np.ndarray, "*shape"],
        offsets: Integer[Array | np.ndarray, "*shape"],
    ) -> Candidates:
        """Candidates (..., S, J) of rows of the data set; offsets may be of any size."""
        positions = offsets[..., None] + np.arange(self.num_taken).reshape((1,) * rows.ndim + (-1,))
        positions = positions % self.drawn.cells.shape[1]
        taken = jax.tree.map(lambda x: x[rows[..., None], positions], self.drawn)
        if not self.include_argmax:
            return taken
        best = jax.tree.map(lambda x: x[rows], self.best)
        concatenate = np.concatenate if isinstance(rows, np.ndarray) else jnp.concatenate
        return jax.tree.map(lambda *x: concatenate(x, axis=-2), best, taken)
