"""From the hypotheses of a frame to one pose, without ground truth.

Poses are hip-centred, with y up, in Human3.6M joint order; heatmaps are in MPII joint order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Real

from diffpose_jax.evaluation.metrics import fold_pairs
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.skeleton import HEATMAP_SIZE, MPII_TO_H36M, NUM_HEATMAPS

KERNEL_VARIANCE = 0.1
"""Squared bandwidth of `mode` over the mean squared distance between two hypotheses."""
HEIGHT_FLOOR = 0.1
"""What `heatmap_agreement` adds to heights, which are relative to their map's highest cell."""

_MEAN_SHIFTS = 20
_HIGHEST = jax.lax.Precision.HIGHEST  # the default lets a GPU round products to TF32


def mean(hypotheses_mm: Float[Array, "B M 17 3"]) -> Float[Array, "B 17 3"]:
    """The mean over the hypotheses, which minimises the expected squared error.

    Its bones are shorter than those of the hypotheses, and between two clusters it is a pose that
    none of them has.
    """
    return jnp.mean(hypotheses_mm, axis=1)


def medoid(hypotheses_mm: Float[Array, "B M 17 3"]) -> Float[Array, "B 17 3"]:
    """The hypothesis with the least mean MPJPE to the others."""
    distances = _sum_over_others(hypotheses_mm, lambda squares: jnp.sum(jnp.sqrt(squares), axis=1))
    return _take(hypotheses_mm, jnp.argmin(distances, axis=1))


def mode(hypotheses_mm: Float[Array, "B M 17 3"]) -> Float[Array, "B 17 3"]:
    """The peak of the hypotheses' density: the densest of them, moved uphill by mean shift.

    The density is that of whole poses under an isotropic Gaussian kernel, so that all joints
    of the result come from the same cluster; the modes of single joints need not fit together.
    Its squared bandwidth is `KERNEL_VARIANCE` times the mean squared distance between two
    hypotheses (summed over the joints). Rules that ask for the fastest convergence as M grows,
    like Silverman's, are of no use in 48 dimensions: with their bandwidths a hypothesis sees no
    other. With this one the densest sees about a seventh of them on the quickstart's test
    frames, and two narrow clusters of 70 and 30 percent are five bandwidths apart. Twenty steps
    of mean shift (Comaniciu and Meer, PAMI 2002) from the densest hypothesis average its
    neighbours and take most of the sampling noise away.
    """
    M = hypotheses_mm.shape[1]
    centred = hypotheses_mm - jnp.mean(hypotheses_mm, axis=1, keepdims=True)
    pair_variance = 2 * jnp.sum(centred**2, axis=(1, 2, 3)) / max(M - 1, 1)
    # Equal hypotheses have no scale of their own; any bandwidth serves.
    scale = 0.5 / jnp.maximum(KERNEL_VARIANCE * pair_variance, 1e-6)[:, None]

    def kernel(squares: Array) -> Array:
        return jnp.exp(-scale * jnp.sum(squares, axis=1))

    densest = _take(hypotheses_mm, jnp.argmax(_sum_over_others(hypotheses_mm, kernel), axis=1))

    def shift(_: Array, pose_mm: Array) -> Array:
        squares = jnp.sum((hypotheses_mm - pose_mm[:, None]) ** 2, axis=(2, 3))
        return _weighted_mean(hypotheses_mm, jax.nn.softmax(-scale * squares, axis=1))

    return jax.lax.fori_loop(0, _MEAN_SHIFTS, shift, densest)


def heatmap_agreement(
    hypotheses_mm: Float[Array, "B M 17 3"], heatmaps: Real[Array, "B 16 64 64"]
) -> Float[Array, "B 17 3"]:
    """The mean of the hypotheses, each weighed by how well the heatmaps agree with it.

    A hypothesis is projected as `project` does; its weight is the product over the 16 joints
    of h + `HEIGHT_FLOOR`, where h is the height of the joint's heatmap (bilinear, 0 outside)
    over that of its highest cell. So a flat map is indifferent, and a map that is sure and
    wrong costs a hypothesis a factor of 11 at most. Where no map has a positive cell, all
    weights are equal and the result is `mean`.

    Heatmaps say nothing about depth, so hypotheses are weighed rather than one taken: on half
    of the quickstart's test frames the MPJPE was 92 mm, that of `mean` 96 mm, and that of the
    hypothesis of the largest weight 114 mm. Taking each joint from the hypothesis where its own
    height is largest (as JPMA of Shan et al., ICCV 2023, does with pixel distances) gave 123 mm.
    """
    return _weighted_mean(hypotheses_mm, agreement_weights(hypotheses_mm, heatmaps))


def agreement_weights(
    hypotheses_mm: Float[Array, "B M 17 3"], heatmaps: Real[Array, "B 16 64 64"]
) -> Float[Array, "B M"]:
    """The weights of `heatmap_agreement`, which sum to 1 over the hypotheses."""
    joints_px = project(hypotheses_mm, heatmaps)
    heatmaps = heatmaps.astype(jnp.float32)  # whole numbers would be interpolated to such
    highest = jnp.max(heatmaps, axis=(2, 3))[:, None]

    def height_at(heatmap: Array, joint_px: Array) -> Array:
        row_column = [joint_px[:, 1], joint_px[:, 0]]
        return jax.scipy.ndimage.map_coordinates(heatmap, row_column, order=1, mode="constant")

    heights = jax.vmap(jax.vmap(height_at, in_axes=(0, 1), out_axes=1))(heatmaps, joints_px)
    heights = heights / jnp.where(highest > 0, highest, 1)
    relative = jnp.where(highest > 0, jnp.maximum(heights, 0), 0)
    return jax.nn.softmax(jnp.sum(jnp.log(relative + HEIGHT_FLOOR), axis=2), axis=1)


def project(
    hypotheses_mm: Float[Array, "B M 17 3"], heatmaps: Real[Array, "B 16 64 64"]
) -> Float[Array, "B M 16 2"]:
    """Projects each hypothesis onto the heatmaps by the weak perspective that fits it best.

    Hypotheses have neither position nor camera, but their axes are the camera's: what is left
    is a scale and a translation. They minimise the squared distances from the joints to the
    heatmaps' highest cells, weighed by the heights there (Human3.6M's nose has no heatmap); alike
    where no map has a positive cell.

    Returns:
      Columns and rows of the MPII joints in heatmap cells. A pose without extent or that would fit
      better upside down ends on one point.
    """
    best = heatmaps_lib.argmax(heatmaps)
    target = (best.xy[:, 0] + 1) * (HEATMAP_SIZE / 2)
    weight = jnp.maximum(best.likelihood[:, 0], 0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    weight = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 1 / NUM_HEATMAPS)
    weight = weight[:, None, :, None]

    target = target[:, None]
    target_mean = jnp.sum(weight * target, axis=2, keepdims=True)
    joints = hypotheses_mm[:, :, np.array(MPII_TO_H36M), :2]
    joints = joints * jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)  # rows run down
    joints = joints - jnp.sum(weight * joints, axis=2, keepdims=True)
    extent = jnp.sum(weight * joints**2, axis=(2, 3), keepdims=True)
    common = jnp.sum(weight * joints * (target - target_mean), axis=(2, 3), keepdims=True)
    scale = jnp.maximum(common, 0) / jnp.where(extent > 0, extent, 1)
    return scale * joints + target_mean


METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "mean": lambda hypotheses_mm, _: mean(hypotheses_mm),
    "medoid": lambda hypotheses_mm, _: medoid(hypotheses_mm),
    "mode": lambda hypotheses_mm, _: mode(hypotheses_mm),
    "heatmap_agreement": heatmap_agreement,
}
"""By name: hypotheses (B, M, 17, 3) and heatmaps (B, 16, 64, 64) -> poses (B, 17, 3); jittable."""


def aggregate(
    method: str, hypotheses_mm: Float[Array, "B M 17 3"], heatmaps: Real[Array, "B 16 64 64"]
) -> Float[Array, "B 17 3"]:
    """One pose of each frame by one of `METHODS`; jittable with its name static.

    Raises:
      ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"no aggregation is called {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method](hypotheses_mm, heatmaps)


def covariance(hypotheses_mm: Float[Array, "B M 17 3"]) -> Float[Array, "B 17 3 3"]:
    """Covariance of each joint's hypotheses in mm^2, the unbiased estimate; 0 for M = 1."""
    centred = hypotheses_mm - jnp.mean(hypotheses_mm, axis=1, keepdims=True)
    products = jnp.einsum("bmjk,bmjl->bjkl", centred, centred, precision=_HIGHEST)
    return products / max(hypotheses_mm.shape[1] - 1, 1)


def _take(hypotheses_mm: Array, index: Int[Array, " B"]) -> Float[Array, "B 17 3"]:
    """One hypothesis of each frame."""
    return jnp.take_along_axis(hypotheses_mm, index[:, None, None, None], axis=1)[:, 0]


def _weighted_mean(hypotheses_mm: Array, weights: Float[Array, "B M"]) -> Float[Array, "B 17 3"]:
    """The mean with weights that sum to 1."""
    return jnp.einsum("bm,bmjk->bjk", weights, hypotheses_mm, precision=_HIGHEST)


def _sum_over_others(
    hypotheses_mm: Float[Array, "B M 17 3"], of_squares: Callable[[Array], Array]
) -> Float[Array, "B M"]:
    """For each hypothesis the sum over the others of a symmetric function of two.

    `of_squares` makes (B, M) of squared distances of the joints (B, 17, M).
    """
    M = hypotheses_mm.shape[1]

    def add(total: Array, squares: Array, shift: Array) -> Array:
        pairs = of_squares(squares)
        # Half-way around, the shift meets every pair from both sides.
        return total + pairs + jnp.where(2 * shift == M, 0, jnp.roll(pairs, shift, axis=1))

    return fold_pairs(add, hypotheses_mm, jnp.zeros(hypotheses_mm.shape[:2], jnp.float32))
