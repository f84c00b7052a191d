"""Every metric of the evaluation, as sums over frames that can be added up.

Functions of hypotheses and truths give the errors of each hypothesis, `per_frame_metrics` reduces
the hypotheses of a frame, and `MetricSums` makes means of the sums over frames. Poses are
hip-centred, in Human3.6M joint order. "Best" is the best hypothesis of each frame under that
metric, the paper's convention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from diffpose_jax.evaluation.alignment import procrustes_align
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_MIRROR, H36M_RIGHT

PCK_THRESHOLD_MM = 150.0
CPS_MAX_THRESHOLD_MM = 300
ECE_LEVELS: np.ndarray = np.linspace(0, 1, 21)
"""Levels of all calibration (0, 0.05, ..., 1), those of the ECE of Pierzchlewicz et al."""
REGION_PERCENTS: tuple[int, ...] = (50, 80, 90, 95)
"""What the regions of `region_coverage` hold of the hypotheses; levels of `ECE_LEVELS`."""
SHARPNESS_LEVEL = 0.9
"""What the ball of `sharpness_mm` holds of the hypotheses."""
BEST_AT: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""Numbers of hypotheses at which the expected best error is reported."""

_PCK_JOINTS = np.flatnonzero([name not in ("Hip", "Spine", "Nose") for name in H36M_JOINTS])
_CPS_JOINTS = np.flatnonzero([name != "Spine" for name in H36M_JOINTS])
# (parent, joint) of the right limbs and clavicle. The pelvis is left out: the hip is the
# midpoint of the two hips, so its halves are equal whatever was predicted.
_RIGHT_BONES = np.array([(a, b) for a, b in H36M_BONES if b in H36M_RIGHT and a != 0])
_LEFT_BONES = np.array(H36M_MIRROR)[_RIGHT_BONES]
_POSE_SIZE = (len(H36M_JOINTS) - 1) ** 0.5
_HIGHEST = jax.lax.Precision.HIGHEST  # the default lets a GPU round products to TF32
_T = TypeVar("_T")


def joint_errors(
    poses_mm: Float[Array | np.ndarray, "*#B J 3"], truth_mm: Float[Array | np.ndarray, "*#B J 3"]
) -> Float[Array, "*B J"]:
    """Distance of each joint from the truth; the mean over the joints is the MPJPE of a pose."""
    return jnp.sqrt(jnp.sum((poses_mm - truth_mm) ** 2, axis=-1))


def pck(
    errors_mm: Float[Array, "*B 17"], joints: np.ndarray | slice = _PCK_JOINTS
) -> Float[Array, "*B"]:
    """Percentage of correct keypoints: errors strictly below 150 mm.

    By default of 14 joints, without the hip, spine and nose, as in the published program.
    """
    return 100 * jnp.mean(errors_mm[..., joints] < PCK_THRESHOLD_MM, axis=-1)


def scale_corrected(
    poses_mm: Float[Array, "*#B 17 3"], truth_mm: Float[Array, "*#B 17 3"]
) -> Float[Array, "*B 17 3"]:
    """Poses in the truth's size: scaled about the hip to its Frobenius norm.

    What the published DiffPose program does before its scale-corrected PCK on MPI-INF-3DHP; the
    field's N-MPJPE (Rhodin et al. 2018) takes the least-squares scale instead.
    """
    size, wanted = (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (poses_mm, truth_mm))
    return poses_mm * (wanted / jnp.where(size > 0, size, 1.0))


def correct_poses_score(aligned_errors_mm: Float[Array, "*B M 17"]) -> Float[Array, "*B"]:
    """CPS of the best hypothesis of each frame in millimetres (Wandt et al., CanonPose, CVPR 2021).

    A pose is correct at a threshold if every joint but the spine is strictly closer than it
    after Procrustes alignment; a frame, if any hypothesis is. The score is the area under the
    frame's step curve over the thresholds 1, 2, ..., 300 mm by the trapezoid rule, and so
    depends on nothing but the smallest largest joint error e: with n thresholds above e the
    area is n - 1/2, 0 without any, and 299 if all 300 are (no rising edge between thresholds).
    """
    smallest = jnp.min(jnp.max(aligned_errors_mm[..., _CPS_JOINTS], axis=-1), axis=-1)
    above = jnp.maximum(CPS_MAX_THRESHOLD_MM - jnp.floor(smallest), 0)
    return jnp.maximum(above - 0.5, 0) - jnp.where(above == CPS_MAX_THRESHOLD_MM, 0.5, 0)


def correct_poses_area(aligned_errors_mm: Float[Array, "*B M 17"]) -> Float[Array, "*B"]:
    """CPS as the paper words it: the area under the curve from 1 to 300 mm, over all joints.

    The area under the step curve itself, at most 299; `correct_poses_score` is the published
    program's number, which samples the curve and leaves the spine out.
    """
    smallest = jnp.min(jnp.max(aligned_errors_mm, axis=-1), axis=-1)
    return CPS_MAX_THRESHOLD_MM - jnp.clip(smallest, 1, CPS_MAX_THRESHOLD_MM)


def symmetry_error(poses_mm: Float[Array, "*B 17 3"]) -> Float[Array, "*B"]:
    """Mean absolute difference of the lengths of left and right bones, in millimetres.

    Over the five mirrored pairs that the prediction can get wrong: thigh, shin, clavicle,
    upper arm, forearm.
    """

    def lengths(bones: np.ndarray) -> Array:
        return joint_errors(poses_mm[..., bones[:, 0], :], poses_mm[..., bones[:, 1], :])

    return jnp.mean(jnp.abs(lengths(_LEFT_BONES) - lengths(_RIGHT_BONES)), axis=-1)


def fold_pairs(
    add: Callable[[_T, Array, Array], _T], hypotheses_mm: Float[Array, "B M J 3"], start: _T
) -> _T:
    """Folds `add(total, squares, shift)` over the pairs of hypotheses of each frame.

    `squares` (B, J, M) are squared distances between the joints of hypothesis m and those of
    m + shift (mod M). The shifts 1 to M // 2 visit each pair once, but that by M / 2 visits its
    pairs from both sides. Memory stays linear in M; distances are of differences, so nothing
    cancels as in a Gram matrix.
    """
    M = hypotheses_mm.shape[1]
    # One array a coordinate: with the 3 on an axis, XLA's CPU loop is 50 times slower.
    here = [jnp.swapaxes(hypotheses_mm[..., axis], 1, 2) for axis in range(3)]
    around = [jnp.concatenate([x, x], axis=-1) for x in here]

    def visit(shift: Array, total: _T) -> _T:
        there = [jax.lax.dynamic_slice_in_dim(x, shift, M, axis=-1) for x in around]
        x, y, z = (a - b for a, b in zip(here, there, strict=True))
        return add(total, x**2 + y**2 + z**2, shift)

    return jax.lax.fori_loop(1, M // 2 + 1, visit, start)


def mean_pairwise_distances(
    hypotheses_mm: Float[Array, "B M J 3"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Mean distances between different hypotheses of a frame, in millimetres; 0 for M = 1.

    Returns:
      That of single joints, averaged over them, and that of whole poses, the norm over all joints.
    """
    B, M, J = hypotheses_mm.shape[:3]

    def add(totals: tuple[Array, Array], squares: Array, shift: Array) -> tuple[Array, Array]:
        weight = jnp.where(2 * shift == M, 0.5, 1.0)
        joints, poses = jnp.sum(jnp.sqrt(squares), axis=1) / J, jnp.sqrt(jnp.sum(squares, axis=1))
        return totals[0] + weight * joints, totals[1] + weight * poses

    zeros = jnp.zeros((B, M), hypotheses_mm.dtype)
    of_joints, of_poses = (
        jnp.mean(total, axis=1) * 2 / max(M - 1, 1)
        for total in fold_pairs(add, hypotheses_mm, (zeros, zeros))
    )
    return of_joints, of_poses


def calibration(
    hypotheses_mm: Float[Array, "B M 17 3"], truth_mm: Float[Array, "B 17 3"]
) -> tuple[Float[Array, "B 21 17"], Float[Array, "B 17"], Float[Array, "B 17"]]:
    """Where the truth lies in the balls around the centre of each joint's hypotheses.

    After Pierzchlewicz et al. 2022 (arXiv 2210.11179): the component-wise median of a joint's
    hypotheses is the centre, and the joint's hypotheses and truth are ranked by their
    distance from it.

    Returns:
      within: 1 where the truth is closer to the centre than the quantile of the hypotheses'
        distances (linear interpolation) at each of `ECE_LEVELS`, else 0.
      farther: the share of hypotheses that are farther from the centre than the truth, which the
        published DiffPose program averages and calls ECE.
      radius_mm: the quantile of the hypotheses' distances at `SHARPNESS_LEVEL`.
    """
    M = hypotheses_mm.shape[1]
    centre = _quantile_over_hypotheses(hypotheses_mm, 0.5)
    # One array for both and a barrier: fused separately, the distances of a truth and of a
    # hypothesis equal to it could differ in the last bit, and then it is no longer a tie.
    poses = jnp.concatenate([hypotheses_mm, truth_mm[:, None]], axis=1)
    distances = jax.lax.optimization_barrier(joint_errors(poses, centre[:, None]))
    distance, truth_distance = distances[:, :M], distances[:, M]

    is_farther = distance > truth_distance[:, None]
    num_closer = M - jnp.sum(is_farther, axis=1)
    # The two neighbours of the truth decide the one level that falls between their ranks, so
    # counting stands in for sorting. With no neighbour on a side, no level asks for it.
    below = jnp.max(jnp.where(is_farther, 0, distance), axis=1)
    above = jnp.min(jnp.where(is_farther, distance, jnp.inf), axis=1)
    gap = jnp.where(num_closer < M, above - below, 0)

    position = ECE_LEVELS * (M - 1)
    floor = np.floor(position + 1e-9)
    fraction = jnp.asarray(position - floor, distance.dtype)[None, :, None]
    rank = jnp.asarray(floor, num_closer.dtype)[None, :, None]
    quantile = below[:, None] + fraction * gap[:, None]
    within = (num_closer[:, None] <= rank) | (
        (num_closer[:, None] == rank + 1) & (quantile > truth_distance[:, None])
    )
    radius_mm = _quantile_over_hypotheses(distance, SHARPNESS_LEVEL)
    return within.astype(distance.dtype), jnp.mean(is_farther, axis=1), radius_mm


def pit(
    hypotheses_mm: Float[Array, "B M 17 3"], truth_mm: Float[Array, "B 17 3"]
) -> Float[Array, "B 21 16 3"]:
    """Share of the probability integral transform at most each of `ECE_LEVELS`, without the hip.

    The transform of a coordinate (Gneiting, Balabdaoui and Raftery 2007) is (r + u) / (M + 1), with
    r the number of hypotheses below the truth and u uniform in [0, 1). The mean over u takes the
    place of drawing it. Of t hypotheses equal to the truth any number may count as below it, each
    from 0 to t as likely: then the transform is uniform whenever truth and hypotheses are
    exchangeable, at every M, which it would not be if each of the t counted half.
    """
    M = hypotheses_mm.shape[1]
    hypotheses_mm, truths = hypotheses_mm[:, :, 1:], truth_mm[:, None, 1:]
    below = jnp.sum(hypotheses_mm < truths, axis=1)[:, None]
    equal = jnp.sum(hypotheses_mm == truths, axis=1)[:, None]
    position = jnp.asarray(ECE_LEVELS * (M + 1), truth_mm.dtype)[None, :, None, None]
    return jnp.clip((position - below) / (equal + 1), 0, 1)


def _quantile_over_hypotheses(
    values: Float[Array, "B M *J"], level: float
) -> Float[Array, " B *J"]:
    """Quantile of float32 values over the hypotheses, that of `jnp.quantile` up to rounding.

    Bisects the value by its bits and counts, 31 passes over the data: the median of 64 frames of
    200 hypotheses takes 6 ms on two cores of a CPU; `jnp.median`, which sorts, takes 67 ms.
    """
    M = values.shape[1]
    position = round(level * (M - 1), 9)
    k = int(position)
    fraction = position - k
    keys = _ordered_bits(values.astype(jnp.float32))

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        reached = jnp.sum(keys <= middle[:, None], axis=1) > k
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    lower, _ = jax.lax.fori_loop(0, 32, halve, (jnp.min(keys, axis=1), jnp.max(keys, axis=1)))
    if fraction == 0:
        return _from_ordered_bits(lower)
    beyond = keys > lower[:, None]
    following = jnp.min(jnp.where(beyond, keys, jnp.iinfo(jnp.int32).max), axis=1)
    tied = M - jnp.sum(beyond, axis=1) > k + 1
    upper = jnp.where(tied, lower, following)
    return (1 - fraction) * _from_ordered_bits(lower) + fraction * _from_ordered_bits(upper)


def _ordered_bits(values: Float[Array, "*N"]) -> Int[Array, "*N"]:
    """int32 in the order of the float32 values (their own bits run backwards below zero)."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _from_ordered_bits(keys: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Inverse of `_ordered_bits`."""
    bits = jnp.where(keys < 0, keys ^ jnp.iinfo(jnp.int32).max, keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def best_at_sizes(num_hypotheses: int) -> tuple[int, ...]:
    """The numbers of hypotheses K of `mpjpe_best_at`: those of `BEST_AT` below M, and M."""
    return (*(k for k in BEST_AT if k < num_hypotheses), num_hypotheses)


def _best_at_weights(num_hypotheses: int) -> Float[np.ndarray, "K M"]:
    """Weights of the sorted errors for each of the `best_at_sizes`, each row summing to 1.

    The i-th smallest (from 0) is the least of K drawn without replacement with probability
    C(M - 1 - i, K - 1) / C(M, K).
    """
    M = num_hypotheses
    weights = np.zeros((len(best_at_sizes(M)), M))
    for row, size in zip(weights, best_at_sizes(M), strict=True):
        row[0] = size / M
        for i in range(1, M - size + 1):
            row[i] = row[i - 1] * (M - size - i + 1) / (M - i)
    return weights


def per_frame_metrics(
    hypotheses_mm: Float[Array, "B M 17 3"], truth_mm: Float[Array, "B 17 3"]
) -> dict[str, Float[Array, "B ..."]]:
    """All metrics of each frame; jittable.

    Returns:
      By name, each (B,) unless a shape is given:

      * `mpjpe_best`, `mpjpe_mean`, `mpjpe_median`: MPJPE over 17 joints of the best hypothesis, its
        mean over the hypotheses, and the MPJPE of the median hypothesis (not of the median pose;
        for an even M the mean of the middle two). Millimetres.
      * `pa_mpjpe_best`, `pa_mpjpe_mean`: the same after Procrustes alignment.
      * `pck150_best`: `pck` of the best hypothesis, percent; `pck150_all_best`: over all 17 joints;
        `pck150_scaled_best`: of `scale_corrected` hypotheses.
      * `cps_best`: `correct_poses_score`, millimetres; `cps_area_best`: `correct_poses_area`.
      * `symmetry`: `symmetry_error`, mean over the hypotheses, millimetres.
      * `energy_score`: mean over joints of E|X - y| - E|X - X'| / 2 with Euclidean norms and the
        unbiased mean over pairs (Gneiting and Raftery 2007), millimetres; proper, lower is better,
        and the MPJPE if M = 1. It is `energy_error`, the first mean, less `energy_spread`.
      * `energy_score_pose`: the same of the whole pose, with norms over its 48 coordinates (all but
        the hip's) divided by the root of its 16 joints, so that dependent joints count.

      For M > 1 also:

      * `mpjpe_best_at`: (B, len(best_at_sizes(M))), the expected MPJPE of the best of K hypotheses,
        averaged over all choices of K of the M. Millimetres.
      * `within_quantile`: (B, 21, 17) and `ece_quantile`: (B, 17), see `calibration`.
      * `sharpness_mm`: mean over the joints but the hip of `calibration`'s radius of the ball that
        holds `SHARPNESS_LEVEL` of the hypotheses. The smaller the better among distributions that
        are calibrated alike (Gneiting, Balabdaoui and Raftery 2007).
      * `pit`: (B, 21, 16, 3), see the function.
    """
    M = hypotheses_mm.shape[1]
    truths = truth_mm[:, None]
    errors = joint_errors(hypotheses_mm, truths)
    aligned_errors = joint_errors(procrustes_align(hypotheses_mm, truths), truths)
    scaled_errors = joint_errors(scale_corrected(hypotheses_mm, truths), truths)
    mpjpe = jnp.sort(jnp.mean(errors, axis=-1), axis=1)
    pa_mpjpe = jnp.mean(aligned_errors, axis=-1)
    mpjpe_mean = jnp.mean(mpjpe, axis=1)
    pose_error = jnp.mean(jnp.linalg.norm(errors, axis=-1), axis=1)
    pairs, pose_pairs = mean_pairwise_distances(hypotheses_mm)

    metrics = {
        "mpjpe_best": mpjpe[:, 0],
        "mpjpe_mean": mpjpe_mean,
        "mpjpe_median": (mpjpe[:, (M - 1) // 2] + mpjpe[:, M // 2]) / 2,
        "pa_mpjpe_best": jnp.min(pa_mpjpe, axis=1),
        "pa_mpjpe_mean": jnp.mean(pa_mpjpe, axis=1),
        "pck150_best": jnp.max(pck(errors), axis=1),
        "pck150_all_best": jnp.max(pck(errors, slice(None)), axis=1),
        "pck150_scaled_best": jnp.max(pck(scaled_errors), axis=1),
        "cps_best": correct_poses_score(aligned_errors),
        "cps_area_best": correct_poses_area(aligned_errors),
        "symmetry": jnp.mean(symmetry_error(hypotheses_mm), axis=1),
        "energy_score": mpjpe_mean - pairs / 2,
        "energy_error": mpjpe_mean,
        "energy_spread": pairs / 2,
        "energy_score_pose": (pose_error - pose_pairs / 2) / _POSE_SIZE,
    }
    if M > 1:
        weights = jnp.asarray(_best_at_weights(M), mpjpe.dtype)
        metrics["mpjpe_best_at"] = jnp.einsum("bm,km->bk", mpjpe, weights, precision=_HIGHEST)
        within, farther, radius_mm = calibration(hypotheses_mm, truth_mm)
        metrics |= {"within_quantile": within, "ece_quantile": farther}
        metrics["sharpness_mm"] = jnp.mean(radius_mm[:, 1:], axis=1)
        metrics["pit"] = pit(hypotheses_mm, truth_mm)
    return metrics


@struct.dataclass
class MetricSums:
    """Sums of `per_frame_metrics` over frames; a pytree, to which that of other frames is added."""

    frames: ArrayLike
    sums: dict[str, ArrayLike]
    num_hypotheses: int = struct.field(pytree_node=False)

    def finalize(self) -> dict[str, Any]:
        """Means over the frames, as plain numbers.

        Calibration is measured on frequencies over all frames:

        * `ece`: mean over the levels q of |median over joints of the frequency with which the
          truth lies within the q-quantile - q|, without the hip; ideal 0 as M grows (the
          centre is the hypotheses' own: perfectly calibrated ones measure 0.007 at M = 200,
          0.04 at M = 20). Pierzchlewicz et al. 2022.
        * `ece_quantile`: median over all 17 joints of the mean share of hypotheses farther
          from the centre than the truth; ideal 0.5. The published DiffPose program's "ECE".
        * `region_coverage`: {percent: share of the joints of all frames, without the hip, within
          the ball that holds that percentage of the hypotheses}, for `REGION_PERCENTS`.
        * `reliability`: {axis: {joint: frequencies}}, how often `pit` is at most each level;
          ideally the levels themselves. `pit_error`: mean of |frequency - level| over the 48
          coordinates and 21 levels; no median over the joints, which hides opposite errors.

        `mpjpe_best_at` is a dict from K; what needs several hypotheses is left out if M = 1.
        """
        frames = float(np.asarray(self.frames))
        means = {name: np.asarray(total, np.float64) / frames for name, total in self.sums.items()}
        results: dict[str, Any] = {
            name: float(mean) for name, mean in means.items() if mean.ndim == 0
        }
        if self.num_hypotheses > 1:
            sizes = best_at_sizes(self.num_hypotheses)
            best_at = zip(sizes, means["mpjpe_best_at"].tolist(), strict=True)
            results["mpjpe_best_at"] = dict(best_at)
            # The hip is the origin of hypotheses and truth alike: it has no calibration.
            within = means["within_quantile"][:, 1:]
            frequency = np.median(within, axis=1)
            results["ece"] = float(np.mean(np.abs(frequency - ECE_LEVELS)))
            results["ece_quantile"] = float(np.median(means["ece_quantile"]))
            results["region_coverage"] = {
                str(percent): float(np.mean(within[percent // 5])) for percent in REGION_PERCENTS
            }
            results["reliability"] = {
                axis: dict(zip(H36M_JOINTS[1:], of_joints.tolist(), strict=True))
                for axis, of_joints in zip("xyz", means["pit"].T, strict=True)
            }
            off = np.abs(means["pit"] - ECE_LEVELS[:, None, None])
            results["pit_error"] = float(np.mean(off))
        return results
