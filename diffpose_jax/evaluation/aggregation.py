"""From the hypotheses of a frame to one pose and its uncertainty, without ground truth.

Three parts: `METHODS` that turn M hypotheses into one pose; covariances and ellipsoids of the
joints; and a radius around the chosen pose within which a joint lies with a given frequency, made
to keep that promise by conformal prediction on held-out frames. Poses are (..., 17, 3) in
millimetres, hip-centred, y up, in Human3.6M joint order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct

from diffpose_jax.evaluation.metrics import joint_errors
from diffpose_jax.io.files import read_json, write_json
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.skeleton import HEATMAP_SIZE, MPII_TO_H36M, NUM_HEATMAPS, NUM_JOINTS

KERNEL_VARIANCE = 0.1
"""Squared bandwidth of `mode` over the mean squared distance between two hypotheses."""
HEIGHT_FLOOR = 0.1
"""What `heatmap_agreement` adds to heights, which are relative to their map's highest cell."""
RADIUS_FLOOR_MM = 1.0
"""Radii below this count as this in a calibration: no hypotheses agree as well as that."""

_MEAN_SHIFTS = 20
_HIGHEST = jax.lax.Precision.HIGHEST  # the default lets a GPU round products to TF32


# --- one pose ----------------------------------------------------------------------------


def mean(hypotheses_mm: jax.Array) -> jax.Array:
    """The mean over the hypotheses, which minimises the expected squared error.

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.

    Returns:
        (B, 17, 3) millimetres. Its bones are shorter than those of the hypotheses, and between
        two clusters it is a pose that none of them has.
    """
    _check_hypotheses(hypotheses_mm)
    return jnp.mean(hypotheses_mm, axis=1)


def medoid(hypotheses_mm: jax.Array) -> jax.Array:
    """The hypothesis with the least mean MPJPE to the others.

    Memory is linear in M, time quadratic.

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.

    Returns:
        (B, 17, 3) millimetres, one of the hypotheses.
    """
    _check_hypotheses(hypotheses_mm)
    distances = _sum_over_others(hypotheses_mm, lambda squares: jnp.sum(jnp.sqrt(squares), axis=1))
    return _take(hypotheses_mm, jnp.argmin(distances, axis=1))


def mode(hypotheses_mm: jax.Array) -> jax.Array:
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

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.

    Returns:
        (B, 17, 3) millimetres, a weighted mean of hypotheses that are alike.
    """
    _check_hypotheses(hypotheses_mm)
    M = hypotheses_mm.shape[1]
    centred = hypotheses_mm - jnp.mean(hypotheses_mm, axis=1, keepdims=True)
    pair_variance = 2 * jnp.sum(centred**2, axis=(1, 2, 3)) / max(M - 1, 1)
    # Equal hypotheses have no scale of their own; any bandwidth serves.
    scale = 0.5 / jnp.maximum(KERNEL_VARIANCE * pair_variance, 1e-6)[:, None]

    def kernel(squares: jax.Array) -> jax.Array:
        return jnp.exp(-scale * jnp.sum(squares, axis=1))

    densest = _take(hypotheses_mm, jnp.argmax(_sum_over_others(hypotheses_mm, kernel), axis=1))

    def shift(_: int, pose_mm: jax.Array) -> jax.Array:
        squares = jnp.sum((hypotheses_mm - pose_mm[:, None]) ** 2, axis=(2, 3))
        return _weighted_mean(hypotheses_mm, jax.nn.softmax(-scale * squares, axis=1))

    return jax.lax.fori_loop(0, _MEAN_SHIFTS, shift, densest)


def heatmap_agreement(hypotheses_mm: jax.Array, heatmaps: jax.Array) -> jax.Array:
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

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.
        heatmaps: (B, 16, 64, 64), MPII joint order; only each map's shape counts for its
            heights, their size for the projection.

    Returns:
        (B, 17, 3) millimetres.

    Raises:
        ValueError: if a shape is not as above.
    """
    return _weighted_mean(hypotheses_mm, agreement_weights(hypotheses_mm, heatmaps))


def agreement_weights(hypotheses_mm: jax.Array, heatmaps: jax.Array) -> jax.Array:
    """The weights of `heatmap_agreement`.

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.
        heatmaps: (B, 16, 64, 64), MPII joint order.

    Returns:
        (B, M), summing to 1 over the hypotheses.

    Raises:
        ValueError: if a shape is not as above.
    """
    joints_px = project(hypotheses_mm, heatmaps)
    heatmaps = heatmaps.astype(jnp.float32)  # whole numbers would be interpolated to such
    highest = jnp.max(heatmaps, axis=(2, 3))[:, None]
    height = _heights(heatmaps, joints_px) / jnp.where(highest > 0, highest, 1)
    relative = jnp.where(highest > 0, jnp.maximum(height, 0), 0)
    return jax.nn.softmax(jnp.sum(jnp.log(relative + HEIGHT_FLOOR), axis=2), axis=1)


def project(hypotheses_mm: jax.Array, heatmaps: jax.Array) -> jax.Array:
    """Projects each hypothesis onto the heatmaps by the weak perspective that fits it best.

    Hypotheses have neither position nor camera, but their axes are the camera's: what is left
    is a scale and a translation. They minimise the squared distances from the joints to the
    heatmaps' highest cells, weighed by the heights there (Human3.6M's nose has no heatmap).

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres, y up.
        heatmaps: (B, 16, 64, 64), MPII joint order. Where no map has a positive cell, the
            joints are weighed alike.

    Returns:
        (B, M, 16, 2) columns and rows of the MPII joints, heatmap cells. A pose without extent
        or that would fit better upside down ends on one point.

    Raises:
        ValueError: if a shape is not as above.
    """
    B, _ = _check_hypotheses(hypotheses_mm)
    expected = (B, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
    if heatmaps.shape != expected:
        raise ValueError(
            f"heatmaps {heatmaps.shape} must be {expected}, as many as there are frames of"
            f" hypotheses {hypotheses_mm.shape}."
        )
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


METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda hypotheses_mm, _: mean(hypotheses_mm),
    "medoid": lambda hypotheses_mm, _: medoid(hypotheses_mm),
    "mode": lambda hypotheses_mm, _: mode(hypotheses_mm),
    "heatmap_agreement": heatmap_agreement,
}
"""By name: hypotheses (B, M, 17, 3) and heatmaps (B, 16, 64, 64) -> poses (B, 17, 3); jittable."""


def aggregate(method: str, hypotheses_mm: jax.Array, heatmaps: jax.Array) -> jax.Array:
    """One pose of each frame by the method of a name; jittable with that static.

    Args:
        method: one of `METHODS`.
        hypotheses_mm: (B, M, 17, 3), millimetres.
        heatmaps: (B, 16, 64, 64), MPII joint order, from which the hypotheses were drawn.

    Returns:
        (B, 17, 3) millimetres.

    Raises:
        ValueError: for an unknown method or a shape that is not as above.
    """
    if method not in METHODS:
        raise ValueError(f"no aggregation is called {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method](hypotheses_mm, heatmaps)


def _check_hypotheses(hypotheses_mm: jax.Array) -> tuple[int, int]:
    """(B, M) of hypotheses (B, M, 17, 3)."""
    shape = hypotheses_mm.shape
    if len(shape) != 4 or shape[1] == 0 or shape[2:] != (NUM_JOINTS, 3):
        raise ValueError(
            f"hypotheses {shape} must be (B, M, {NUM_JOINTS}, 3) with M at least 1"
            + (" (one frame? add a leading axis)." if len(shape) == 3 else ".")
        )
    return shape[:2]


def _take(hypotheses_mm: jax.Array, index: jax.Array) -> jax.Array:
    """Hypothesis `index` (B,) of each frame: (B, M, 17, 3) -> (B, 17, 3)."""
    return jnp.take_along_axis(hypotheses_mm, index[:, None, None, None], axis=1)[:, 0]


def _weighted_mean(hypotheses_mm: jax.Array, weights: jax.Array) -> jax.Array:
    """(B, M, 17, 3) and weights (B, M) that sum to 1 -> (B, 17, 3)."""
    return jnp.einsum("bm,bmjk->bjk", weights, hypotheses_mm, precision=_HIGHEST)


def _sum_over_others(
    hypotheses_mm: jax.Array, of_squares: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Sums a symmetric function of two hypotheses over all others of the frame.

    By cyclic shifts, as `metrics.mean_pairwise_distance`: each pair once, memory linear in M.

    Args:
        hypotheses_mm: (B, M, 17, 3).
        of_squares: squared distances of joints (B, 17, M) -> (B, M).

    Returns:
        (B, M), for each hypothesis the sum over the M - 1 others.
    """
    B, M = hypotheses_mm.shape[:2]
    # One array a coordinate: with the 3 on an axis, XLA's CPU loop is 50 times slower.
    here = [jnp.swapaxes(hypotheses_mm[..., axis], 1, 2) for axis in range(3)]
    around = [jnp.concatenate([x, x], axis=-1) for x in here]

    def add_shift(shift: jax.Array, total: jax.Array) -> jax.Array:
        there = [jax.lax.dynamic_slice_in_dim(x, shift, M, axis=-1) for x in around]
        squares = ((a - b) ** 2 for a, b in zip(here, there, strict=True))
        pairs = of_squares(sum(squares, jnp.zeros(())))
        twice = jnp.concatenate([pairs, pairs], axis=-1)
        from_there = jax.lax.dynamic_slice_in_dim(twice, M - shift, M, axis=-1)
        # Half-way around, the shift meets every pair from both sides.
        return total + pairs + jnp.where(2 * shift == M, 0, from_there)

    return jax.lax.fori_loop(1, M // 2 + 1, add_shift, jnp.zeros((B, M), hypotheses_mm.dtype))


def _heights(heatmaps: jax.Array, joints_px: jax.Array) -> jax.Array:
    """Heights of maps (B, J, H, W) at columns and rows (B, M, J, 2), bilinear, 0 outside."""

    def of_joint(heatmap: jax.Array, joint_px: jax.Array) -> jax.Array:
        row_column = [joint_px[:, 1], joint_px[:, 0]]
        return jax.scipy.ndimage.map_coordinates(heatmap, row_column, order=1, mode="constant")

    return jax.vmap(jax.vmap(of_joint, in_axes=(0, 1), out_axes=1))(heatmaps, joints_px)


# --- its uncertainty ---------------------------------------------------------------------


def covariance(hypotheses_mm: jax.Array) -> jax.Array:
    """Covariance of each joint's hypotheses about their mean.

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.

    Returns:
        (B, 17, 3, 3) square millimetres, the unbiased estimate; 0 for M = 1.
    """
    _, M = _check_hypotheses(hypotheses_mm)
    centred = hypotheses_mm - jnp.mean(hypotheses_mm, axis=1, keepdims=True)
    products = jnp.einsum("bmjk,bmjl->bjkl", centred, centred, precision=_HIGHEST)
    return products / max(M - 1, 1)


def ellipsoid(covariance_mm2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Semi-axes of the ellipsoids of one standard deviation.

    For a Gaussian, an ellipsoid 2.5 times as large holds 90 percent (a chi of three degrees of
    freedom); for hypotheses of any distribution, `radius` says how far a joint may be.

    Args:
        covariance_mm2: (..., 3, 3), square millimetres.

    Returns:
        lengths_mm: (..., 3), the standard deviations along the axes, the largest first.
        axes: (..., 3, 3), row k the unit vector of the k-th; its sign is arbitrary.
    """
    values, vectors = jnp.linalg.eigh(covariance_mm2)
    lengths_mm = jnp.sqrt(jnp.maximum(values[..., ::-1], 0))
    return lengths_mm, jnp.swapaxes(vectors, -1, -2)[..., ::-1, :]


@struct.dataclass
class Calibration:
    """Turns the hypotheses' radii into ones that hold on data; see `fit_calibration`.

    It belongs to one model and one method of aggregation.

    Attributes:
        factor: (17,), by joint, what a radius is multiplied by.
        floor_mm: Radii below this count as this, millimetres.
        level: The frequency in (0, 1) with which a joint lies within the calibrated radius.
        num_frames: Number of frames that it was fitted on; 0 if it was not.
        num_groups: Number of independent groups of frames among them.
    """

    factor: jax.Array | np.ndarray
    floor_mm: float = struct.field(pytree_node=False)
    level: float = struct.field(pytree_node=False)
    num_frames: int = struct.field(pytree_node=False)
    num_groups: int = struct.field(pytree_node=False)

    def apply(self, radii_mm: jax.Array) -> jax.Array:
        """Calibrates radii: (N, 17) of `radius` with `uncalibrated(level)` -> (N, 17)."""
        return jnp.maximum(radii_mm, self.floor_mm) * jnp.asarray(self.factor)[None]

    @property
    def is_guaranteed(self) -> bool:
        """Whether there were enough groups for the level to hold in a finite sample."""
        return _corrected_level(self.level, self.num_groups) is not None

    @property
    def meaning(self) -> str:
        """What its radii mean, in words for a page or a terminal."""
        percent = f"{100 * self.level:g}%"
        if not self.num_frames:
            return f"{percent} of the hypotheses lie within the radius (not calibrated on data)"
        frames = f"{self.num_frames} frames in {self.num_groups} groups"
        if self.num_groups == self.num_frames:
            frames = f"{self.num_frames} frames"
        few = "" if self.is_guaranteed else ", too few for a guarantee"
        return f"the joint lies within the radius in {percent} of cases (by {frames}{few})"


def uncalibrated(level: float) -> Calibration:
    """The calibration of a model that has none: radii as the hypotheses give them.

    Args:
        level: in (0, 1), the share of the hypotheses within the radius.

    Raises:
        ValueError: for another level.
    """
    _check_level(level)
    return Calibration(np.ones(NUM_JOINTS, np.float32), 0.0, level, 0, 0)


def radius(hypotheses_mm: jax.Array, chosen_mm: jax.Array, calibration: Calibration) -> jax.Array:
    """Radius around the chosen pose within which each joint lies with the calibration's level.

    The quantile at that level (linear interpolation) of the hypotheses' distances from the
    chosen pose, times the joint's factor. Jittable.

    Args:
        hypotheses_mm: (B, M, 17, 3), millimetres.
        chosen_mm: (B, 17, 3), millimetres, from the method that the calibration belongs to.
        calibration: a fitted one or `uncalibrated(level)`; its `meaning` says what was computed.

    Returns:
        (B, 17) millimetres; 0 for the hip, which is the origin. For M = 1 the distances are 0:
        the uncalibrated radii say nothing, the calibrated ones are the same in every frame.

    Raises:
        ValueError: if a shape is not as above.
    """
    B, _ = _check_hypotheses(hypotheses_mm)
    if chosen_mm.shape != (B, NUM_JOINTS, 3):
        raise ValueError(f"chosen poses {chosen_mm.shape} must be {(B, NUM_JOINTS, 3)}.")
    distances = joint_errors(hypotheses_mm, chosen_mm[:, None])
    quantile = jnp.quantile(distances, calibration.level, axis=1)
    return calibration.apply(quantile)


def fit_calibration(
    distances_mm: np.ndarray,
    radii_mm: np.ndarray,
    level: float,
    groups: np.ndarray | None = None,
) -> Calibration:
    """Fits a joint's factor on held-out frames: normalised split conformal prediction.

    A frame's score is the distance of the truth from the chosen pose over the hypotheses'
    radius, at least `RADIUS_FLOOR_MM` (Papadopoulos et al., 2002 and 2011; Angelopoulos and
    Bates, arXiv 2107.07511, Sec. 2.3.2). Of n exchangeable frames the score of rank
    ceil((n + 1) level) is the factor with which a new frame's joint lies within its radius
    with at least that probability, whatever the hypotheses are worth.

    Frames of one clip are not exchangeable with those of another, and their number overstates
    what they show. With `groups`, all groups weigh alike and the rank is that of groups: the
    weighted quantile at level (K + 1) / K of K groups holds for a new frame of a new group
    (Lee, Barber and Willett, arXiv 2306.06342). With fewer than level / (1 - level) groups, 9
    for 90 percent, no finite factor has that guarantee: then it is the quantile at the level
    itself (the CDF pooling of Dunn, Wasserman and Ramdas, arXiv 1809.07441), which holds as K
    grows, and `Calibration.is_guaranteed` is False.

    Args:
        distances_mm: (N, 17) distances of the truth from the chosen pose, millimetres.
        radii_mm: (N, 17), `radius` with `uncalibrated(level)`, millimetres.
        level: in (0, 1).
        groups: (N,) labels, such as the clip of each frame; without it each frame is a group.

    Returns:
        The calibration.

    Raises:
        ValueError: if a shape is not as above, there are no frames, a number is negative or not
            finite, or for another level.
    """
    _check_level(level)
    distances_mm, radii_mm = np.asarray(distances_mm, float), np.asarray(radii_mm, float)
    N = len(distances_mm)
    groups = np.arange(N) if groups is None else np.asarray(groups)
    shape = (N, NUM_JOINTS)
    if N == 0 or distances_mm.shape != shape or radii_mm.shape != shape or groups.shape != (N,):
        raise ValueError(
            f"fit_calibration: distances {distances_mm.shape} and radii {radii_mm.shape} must be"
            f" (N, {NUM_JOINTS}) and groups {groups.shape} (N,) with N at least 1."
        )
    for name, values in (("distances", distances_mm), ("radii", radii_mm)):
        if not np.all(np.isfinite(values) & (values >= 0)):
            frame, joint = np.argwhere(~(np.isfinite(values) & (values >= 0)))[0]
            raise ValueError(
                f"fit_calibration: {name} must be finite and not negative; frame {frame}, joint"
                f" {joint} holds {values[frame, joint]}."
            )
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    scores = distances_mm / np.maximum(radii_mm, RADIUS_FLOOR_MM)
    order = np.argsort(scores, axis=0)
    mass = np.cumsum((1 / (len(sizes) * sizes))[group][order], axis=0)
    corrected = _corrected_level(level, len(sizes)) or level
    # Sums of such shares reach a level that they ought to reach but for rounding.
    rank = np.minimum(np.sum(mass < corrected - 1e-9, axis=0), N - 1)
    factor = np.take_along_axis(scores, np.take_along_axis(order, rank[None], 0), 0)[0]
    return Calibration(factor.astype(np.float32), RADIUS_FLOOR_MM, level, N, len(sizes))


def coverage(distances_mm: np.ndarray, radii_mm: np.ndarray) -> np.ndarray:
    """How often each joint lies within its radius.

    Args:
        distances_mm: (N, 17) distances of the truth from the chosen pose, millimetres.
        radii_mm: (N, 17), from `radius`, millimetres.

    Returns:
        (17,) frequencies in [0, 1].
    """
    return np.mean(np.asarray(distances_mm) <= np.asarray(radii_mm), axis=0)


def held_out_coverage(
    distances_mm: np.ndarray, radii_mm: np.ndarray, level: float, groups: np.ndarray
) -> np.ndarray:
    """What calibrated radii cover in groups that they were not calibrated on.

    Each group in turn is left out, the others give the calibration: an honest figure where one
    split has to serve both for calibration and for its test.

    Args:
        distances_mm: (N, 17), as for `fit_calibration`.
        radii_mm: (N, 17), as for `fit_calibration`.
        level: in (0, 1).
        groups: (N,) labels of at least two groups.

    Returns:
        (K, 17) frequencies, one row for each group in the order of `np.unique`.

    Raises:
        ValueError: for fewer than two groups, and as `fit_calibration`.
    """
    distances_mm, radii_mm, groups = map(np.asarray, (distances_mm, radii_mm, groups))
    labels = np.unique(groups)
    if len(labels) < 2:
        raise ValueError(f"held_out_coverage: needs two groups to leave one out, got {labels}.")
    rows = []
    for label in labels:
        out = groups == label
        fitted = fit_calibration(distances_mm[~out], radii_mm[~out], level, groups[~out])
        rows.append(coverage(distances_mm[out], np.asarray(fitted.apply(radii_mm[out]))))
    return np.stack(rows)


def to_json(calibration: Calibration) -> dict[str, Any]:
    """A calibration as the content of a JSON file."""
    return {
        "level": calibration.level,
        "factor": [float(factor) for factor in calibration.factor],
        "floor_mm": calibration.floor_mm,
        "num_frames": calibration.num_frames,
        "num_groups": calibration.num_groups,
    }


def from_json(content: dict[str, Any]) -> Calibration:
    """The inverse of `to_json`.

    Raises:
        ValueError: if the content is not that of a calibration.
    """
    if not isinstance(content, dict) or set(content) != {*_NUMBERS, "factor"}:
        raise ValueError(
            f"this is no calibration: it must hold factor, {', '.join(_NUMBERS)}, not"
            f" {', '.join(map(str, content))[:300] if isinstance(content, dict) else 'no fields'}"
        )
    for name, kinds in _NUMBERS.items():
        if not _is_number(content[name], kinds):
            raise ValueError(
                f"this is no calibration: {name} must be a finite number of at least 0, not"
                f" {str(content[name])[:100]}"
            )
    factor = content["factor"]
    is_list = isinstance(factor, list) and len(factor) == NUM_JOINTS
    if not is_list or not all(_is_number(value, (int, float)) for value in factor):
        raise ValueError(
            f"this is no calibration: it needs {NUM_JOINTS} finite factors of at least 0, not"
            f" {str(factor)[:500]}"
        )
    try:
        _check_level(content["level"])
    except ValueError as error:
        raise ValueError(f"this is no calibration: {error}") from error
    return Calibration(**content | {"factor": np.float32(factor)})


_NUMBERS = {
    "level": (int, float),
    "floor_mm": (int, float),
    "num_frames": (int,),
    "num_groups": (int,),
}


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and 0 <= value < 1e12  # nan is none, too


CALIBRATIONS = "calibration.json"
"""The file in a model's folder with its calibrations, by the method that they belong to."""


_FITTED_ON = "fitted_on"


def is_as_fitted(path: Path, found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> bool:
    """Whether what a file was fitted on is what is wanted; warns of what differs.

    Args:
        path: the file, for the warning.
        found: what the file says, None if it does not.
        wanted: what it must be, None for anything.
    """
    if found is None or wanted is None or found == wanted:
        return True
    differing = ", ".join(
        f"{name} is {wanted.get(name)}, was {found.get(name)}"
        for name in found | wanted
        if found.get(name) != wanted.get(name)
    )
    logging.warning("%s was fitted under other conditions (%s): it is fitted anew", path, differing)
    return False


def write_calibration(
    folder: str | Path, method: str, calibration: Calibration, fitted_on: dict[str, Any]
) -> None:
    """Writes a calibration beside a model, in place of an earlier one of the same method.

    Args:
        folder: the model's.
        method: one of `METHODS`.
        calibration: the calibration.
        fitted_on: what it depends on, for `read_calibration`.
    """
    content = _read_calibrations(Path(folder) / CALIBRATIONS)
    written = to_json(calibration) | {_FITTED_ON: fitted_on}
    write_json(Path(folder) / CALIBRATIONS, content | {method: written})


def read_calibration(
    checkpoint: str | Path, method: str, fitted_on: dict[str, Any] | None = None
) -> Calibration | None:
    """Reads a model's calibration of a method, None if it has none.

    Args:
        checkpoint: the model's folder: a run, a step of one, or an export.
        method: one of `METHODS`.
        fitted_on: what it must have been fitted on, or it counts as none, with a warning; None
            for anything, as does a calibration that does not say.

    Raises:
        CheckpointError: if the file is damaged.
    """
    checkpoint = Path(checkpoint).absolute()
    for folder in (checkpoint, *list(checkpoint.parents)[:2]):
        path = folder / CALIBRATIONS
        content = _read_calibrations(path)
        if method in content:
            try:
                found = dict(content[method])
                was_fitted_on = found.pop(_FITTED_ON, None)
                if not isinstance(was_fitted_on, dict | None):
                    raise TypeError(f"{_FITTED_ON} holds no fields")
                calibration = from_json(found)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
            if is_as_fitted(path, was_fitted_on, fitted_on):
                return calibration
    return None


def _read_calibrations(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object); remove it")
    return content


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, exclusively; got {level}.")


def _corrected_level(level: float, num_groups: int) -> float | None:
    """The level that K groups must reach for a new one; None where they are too few."""
    if num_groups < level / (1 - level) - 1e-9:
        return None
    return level * (num_groups + 1) / num_groups
