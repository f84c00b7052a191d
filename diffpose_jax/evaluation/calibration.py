"""The single pose of a frame with its radii, and their calibration by conformal prediction.

The radius of a joint is a quantile of the distances from the single pose to the hypotheses. On
held-out frames `fit_calibration` finds the factor by which it must be multiplied so that the true
joint lies within it with a stated frequency, the level.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct
from jax import Array
from jaxtyping import Float, Real, Shaped

from diffpose_jax.config import check_range, parse
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation.metrics import joint_errors
from diffpose_jax.io.files import read_json, write_json
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import NUM_JOINTS

RADIUS_FLOOR_MM = 1.0
"""Smaller radii count as this in a calibration: no hypotheses agree as well as that."""
CALIBRATIONS = "calibration.json"
"""The file in a model's folder with its calibrations: {method: {field: value, "fitted_on": {}}}."""

_FITTED_ON = "fitted_on"
_IN_FITTED_ON = ("solver", "num_hypotheses")  # fields that the file holds there


@dataclasses.dataclass(frozen=True)
class SinglePose:
    """The one pose that was made of a frame's hypotheses by a method of `aggregation.METHODS`.

    A joint lies within its radius with the frequency `level`; `meaning` says that in words.
    """

    pose_mm: Float[np.ndarray, "17 3"]
    radius_mm: Float[np.ndarray, " 17"]
    level: float
    method: str
    meaning: str

    @property
    def name(self) -> str:
        """The method, for legends and captions."""
        return f"chosen pose ({self.method.replace('_', ' ')})"


@struct.dataclass
class Calibration:
    """Makes of the hypotheses' radii ones that hold on data; see `fit_calibration`.

    It belongs to one model, one method of aggregation, one solver and one number of hypotheses.

    Attributes:
      factor: by joint, what a radius is multiplied by.
      floor_mm: smaller radii count as this.
      level: the frequency in (0, 1) with which a joint lies within its radius.
      num_frames: number of frames that it was fitted on; 0 if it was not.
      num_groups: number of independent groups of frames among them.
      solver: what drew the hypotheses; None, as `num_hypotheses`, if that is not known.
    """

    factor: Float[np.ndarray, " 17"] | Float[Array, " 17"]
    floor_mm: float = struct.field(pytree_node=False)
    level: float = struct.field(pytree_node=False)
    num_frames: int = struct.field(pytree_node=False)
    num_groups: int = struct.field(pytree_node=False)
    solver: str | None = struct.field(pytree_node=False, default=None)
    num_hypotheses: int | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        most = 1e12
        counts = dict.fromkeys(("floor_mm", "num_frames", "num_groups"), (0, most))
        check_range(self, level=(1e-6, 1 - 1e-6), **counts)
        # JAX makes calibrations of other things than arrays, too.
        factor = self.factor if isinstance(self.factor, np.ndarray) else np.ones(1)
        if not np.all((factor >= 0) & (factor < most)):
            raise ValueError("factor must be finite and not negative")

    def fits(self, solver: str, num_hypotheses: int) -> bool:
        """Whether it holds for hypotheses of that solver and number, as far as is known."""
        return self.solver in (None, solver) and self.num_hypotheses in (None, num_hypotheses)

    @property
    def meaning(self) -> str:
        """What its radii mean, in words for a page or a terminal."""
        percent = f"{100 * self.level:g}%"
        if not self.num_frames:
            return f"{percent} of the hypotheses lie within the radius (not calibrated on data)"
        frames = f"{self.num_frames} frames"
        if self.num_groups != self.num_frames:
            frames += f" in {self.num_groups} groups"
        is_guaranteed = _corrected_level(self.level, self.num_groups) is not None
        few = "" if is_guaranteed else ", too few for a guarantee"
        return f"the joint lies within the radius in {percent} of cases (by {frames}{few})"


def uncalibrated(level: float) -> Calibration:
    """The radii as the hypotheses give them: `level` is the share of the hypotheses within."""
    return Calibration(np.ones(NUM_JOINTS, np.float32), 0.0, level, 0, 0)


@functools.partial(jax.jit, static_argnums=0)
def choose(
    method: str,
    poses_mm: Float[Array, "B M 17 3"],
    heatmaps: Real[Array, "B 16 64 64"],
    calibration: Calibration,
) -> tuple[Float[Array, "B 17 3"], Float[Array, "B 17"], Float[Array, "B 17 3 3"]]:
    """The single pose of each frame by a method, its radii and the hypotheses' covariances."""
    pose_mm = aggregation.aggregate(method, poses_mm, heatmaps)
    return pose_mm, radius(poses_mm, pose_mm, calibration), aggregation.covariance(poses_mm)


def radius(
    hypotheses_mm: Float[Array, "B M 17 3"],
    chosen_mm: Float[Array, "B 17 3"],
    calibration: Calibration,
) -> Float[Array, "B 17"]:
    """Radius around the chosen pose within which each joint lies with the calibration's level.

    The quantile at that level (linear interpolation) of the hypotheses' distances from the chosen
    pose, times the joint's factor; 0 for the hip, which is the origin. For M = 1 the distances are
    0: the uncalibrated radii say nothing, the calibrated ones are the same in every frame.
    """
    distances_mm = joint_errors(hypotheses_mm, chosen_mm[:, None])
    quantile_mm = jnp.quantile(distances_mm, calibration.level, axis=1)
    return jnp.maximum(quantile_mm, calibration.floor_mm) * jnp.asarray(calibration.factor)[None]


def fit_calibration(
    distances_mm: Float[np.ndarray, "N 17"],
    radii_mm: Float[np.ndarray, "N 17"],
    level: float,
    groups: Shaped[np.ndarray, " N"],
    solver: str | None = None,
    num_hypotheses: int | None = None,
) -> Calibration:
    """Fits a joint's factor on held-out frames: normalised split conformal prediction.

    A frame's score is the distance of the truth from the chosen pose over the hypotheses' radius,
    at least `RADIUS_FLOOR_MM` (Papadopoulos et al., 2002 and 2011; Angelopoulos and Bates, arXiv
    2107.07511, Sec. 2.3.2). Of n exchangeable frames the score of rank ceil((n + 1) level) is the
    factor with which a new frame's joint lies within its radius with at least that probability,
    whatever the hypotheses are worth.

    Frames of one clip are not exchangeable with those of another, and their number overstates
    what they show. So all groups weigh alike and the rank is that of groups: the weighted quantile
    at level (K + 1) / K of K groups holds for a new frame of a new group (Lee, Barber and Willett,
    arXiv 2306.06342). With fewer than level / (1 - level) groups, 9 for 90 percent, no finite
    factor has that guarantee: then it is the quantile at the level itself (the CDF pooling of Dunn,
    Wasserman and Ramdas, arXiv 1809.07441), which holds as K grows.

    Args:
      distances_mm: from the chosen pose to the truth.
      radii_mm: `radius` with `uncalibrated(level)`.
      level: in (0, 1).
      groups: labels, such as the clip of each frame.
      solver: what drew the hypotheses.
      num_hypotheses: their number.

    Raises:
      ValueError: if there are no frames, or a distance or radius is negative or not finite.
    """
    for name, values in (("distances", distances_mm), ("radii", radii_mm)):
        if not values.size or not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(f"fit_calibration: {name} must be numbers that are not negative")
    num_frames = len(distances_mm)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    scores = np.float64(distances_mm) / np.maximum(radii_mm, RADIUS_FLOOR_MM)
    order = np.argsort(scores, axis=0)
    mass = np.cumsum((1 / (len(sizes) * sizes))[group][order], axis=0)
    corrected = _corrected_level(level, len(sizes)) or level
    # Sums of such shares reach a level that they ought to reach but for rounding.
    rank = np.minimum(np.sum(mass < corrected - 1e-9, axis=0), num_frames - 1)
    factor = np.take_along_axis(np.sort(scores, axis=0), rank[None], 0)[0].astype(np.float32)
    counts = num_frames, len(sizes)
    return Calibration(factor, RADIUS_FLOOR_MM, level, *counts, solver, num_hypotheses)


def _corrected_level(level: float, num_groups: int) -> float | None:
    """The level that K groups must reach for a new one; None where they are too few."""
    if num_groups < level / (1 - level) - 1e-9:
        return None
    return level * (num_groups + 1) / num_groups


def is_as_fitted(path: Path, found: dict[str, Any], wanted: dict[str, Any] | None) -> bool:
    """Whether what a file says that it was fitted on is what is wanted; warns of what differs.

    A file that does not say is taken as it is.
    """
    if not found or wanted is None or found == wanted:
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
    """Writes a calibration to a model's folder, in place of an earlier one of the same method.

    `fitted_on` is what it depends on, with its solver and number of hypotheses.
    """
    path = Path(folder) / CALIBRATIONS
    fields = dataclasses.asdict(calibration) | {"factor": np.asarray(calibration.factor).tolist()}
    for name in _IN_FITTED_ON:
        del fields[name]
    write_json(path, _read(path) | {method: fields | {_FITTED_ON: fitted_on}})


def read_calibration(
    checkpoint: str | Path, method: str, fitted_on: dict[str, Any] | None = None
) -> Calibration | None:
    """Reads a model's calibration of a method, None if it has none.

    Args:
      checkpoint: the model's folder: a run, a step of one, or an export.
      method: one of `aggregation.METHODS`.
      fitted_on: what it must have been fitted on, or it counts as none, with a warning.

    Raises:
      CheckpointError: if the file is damaged.
    """
    checkpoint = Path(checkpoint).absolute()
    for path in (folder / CALIBRATIONS for folder in (checkpoint, *checkpoint.parents[:2])):
        content = _read(path)
        if method not in content:
            continue
        try:
            fields = dict(content[method])
            found = dict(fields.pop(_FITTED_ON, {}))
            fields |= {name: found.get(name) for name in _IN_FITTED_ON}
            fields["factor"] = np.asarray(fields.get("factor", ()), np.float64)
            calibration = parse(Calibration, fields, method)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
        if is_as_fitted(path, found, fitted_on):
            factor = np.asarray(calibration.factor, np.float32)
            return dataclasses.replace(calibration, factor=factor)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
