"""From one person's heatmaps to poses in files that can be looked at."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Key
from matplotlib.figure import Figure

from diffpose_jax.data import cameras
from diffpose_jax.data.motion import bodies
from diffpose_jax.evaluation import calibration
from diffpose_jax.evaluation.calibration import Calibration, SinglePose
from diffpose_jax.inference import Model, check_heatmaps
from diffpose_jax.io import arrays, files
from diffpose_jax.method.network import Draw
from diffpose_jax.prediction.finder import Detection, PredictionError
from diffpose_jax.report import figures, page
from diffpose_jax.skeleton import H36M_JOINTS, H36M_PARENTS, MPII_JOINTS

LEVEL = 0.9
"""The level of the radii of a model without a calibration."""


def read_heatmaps(path: str | os.PathLike[str]) -> Float[np.ndarray, "B 16 64 64"]:
    """Reads heatmaps that another program made.

    Args:
      path: a .npy file, or a .npz file with `heatmaps`: (16, 64, 64) or (B, 16, 64, 64), MPII
        joint order.

    Raises:
      PredictionError: if it is not such a file; pickled objects are not read.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        content = arrays.read(path)
    except ValueError as error:
        raise PredictionError(str(error)) from error
    if isinstance(content, dict):
        if "heatmaps" not in content:
            names = ", ".join(name[:40] for name in list(content)[:20]) or "nothing"
            raise PredictionError(f"{path} has no array heatmaps, only {names}")
        content = content["heatmaps"]
    try:
        maps = check_heatmaps(content[None] if content.ndim == 3 else content)
    except ValueError as error:
        raise PredictionError(f"{path}: {error}") from error
    if len(maps) == 0:
        raise PredictionError(f"{path} holds the heatmaps of no picture")
    return maps


def check_not_flat(detection: Detection) -> Detection:
    """Gives heatmaps back that show somebody, in whatever unit they are.

    Raises:
      PredictionError: if every map is flat, or without a positive cell.
    """
    maps = detection.heatmaps
    if not np.any((maps.max(axis=(1, 2)) > 0) & (np.ptp(maps, axis=(1, 2)) > 0)):
        raise PredictionError("nobody is in these heatmaps: all are flat or not positive")
    return detection


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Poses of one person.

    Attributes:
      draw: the hypotheses (M, 17, 3), and the candidates that they were drawn under, (S, 16) or
        (M, S, 16).
      covariance_mm2: of each joint's hypotheses.
      chosen: the one pose made of them, and its radii.
      is_calibrated: whether the radii were fitted to data.
      axes: "camera", or "crop" for those of a camera that looks at the crop's centre.
    """

    draw: Draw
    covariance_mm2: Float[np.ndarray, "17 3 3"]
    chosen: SinglePose
    is_calibrated: bool
    axes: str

    def in_camera_axes(self, ray: Float[np.ndarray, " 3"]) -> Prediction:
        """Turned from the crop's axes to the camera's, to which the ray is that to the crop."""
        turn = cameras.turns_to(ray[None])[0].T
        return dataclasses.replace(
            self,
            axes="camera",
            draw=dataclasses.replace(self.draw, poses_mm=self.draw.poses_mm @ np.float32(turn.T)),
            covariance_mm2=(turn @ self.covariance_mm2 @ turn.T).astype(np.float32),
            chosen=dataclasses.replace(
                self.chosen, pose_mm=self.chosen.pose_mm @ np.float32(turn.T)
            ),
        )

    def of_height(self, height_mm: float) -> Prediction:
        """Scaled, with its radii, so that the chosen pose has the known stature."""
        pose_mm = self.chosen.pose_mm
        bones_mm = pose_mm - pose_mm[np.maximum(H36M_PARENTS, 0)]
        scale = np.float32(height_mm / bodies.stature(bones_mm[None])[0])
        return dataclasses.replace(
            self,
            draw=dataclasses.replace(self.draw, poses_mm=self.draw.poses_mm * scale),
            covariance_mm2=self.covariance_mm2 * scale**2,
            chosen=dataclasses.replace(
                self.chosen, pose_mm=pose_mm * scale, radius_mm=self.chosen.radius_mm * scale
            ),
        )


def predict(
    model: Model,
    key: Key[Array, ""],
    heatmaps: Float[np.ndarray, "16 64 64"],
    num_hypotheses: int,
    method: str,
    calibrated: Calibration | None = None,
) -> Prediction:
    """Draws hypotheses and makes one pose of them.

    Args:
      model: the model.
      key: a random key.
      heatmaps: MPII joint order.
      num_hypotheses: M.
      method: one of `aggregation.METHODS`.
      calibrated: the calibration of the model and the method. None, or one for another solver or
        number of hypotheses, gives the hypotheses' own radii.

    Raises:
      ValueError: as `Model.draw`.
    """
    drawn = model.draw(key, heatmaps[None], num_hypotheses)
    used = calibration.uncalibrated(LEVEL)
    if calibrated is not None and calibrated.fits(model.solver.name, num_hypotheses):
        used = calibrated
    chosen = calibration.choose(method, drawn.poses_mm, jax.numpy.asarray(heatmaps)[None], used)
    draw, (pose_mm, radius_mm, covariance_mm2) = jax.tree.map(
        lambda x: np.asarray(x)[0], (drawn, chosen)
    )
    return Prediction(
        draw=draw,
        covariance_mm2=covariance_mm2,
        chosen=SinglePose(pose_mm, radius_mm, used.level, method, used.meaning),
        is_calibrated=used is calibrated,
        axes=model.config.data.axes,
    )


def plot(title: str, detection: Detection, prediction: Prediction) -> Figure:
    """The figure of a person: what was found, the hypotheses and the chosen pose."""
    return figures.plot_example(
        detection.heatmaps,
        prediction.draw.candidates,
        prediction.draw.poses_mm,
        title=title,
        chosen=prediction.chosen,
        crop=detection.image,
    )


def write(
    folder: str | os.PathLike[str], title: str, detection: Detection, prediction: Prediction
) -> None:
    """Writes hypotheses.npz, poses.png and pose.html; what is there already is replaced.

    Args:
      folder: where to; it is made.
      title: heading of the figure and the page, such as the picture's name.
      detection: what was found.
      prediction: what was made of it.

    Raises:
      PredictionError: if the files cannot be written.
    """
    folder, poses_mm = Path(folder), prediction.draw.poses_mm
    try:
        png = figures.save(plot(title, detection, prediction), folder / "poses.png")
        example = page.ReportExample(title, poses_mm, figure=png, chosen=prediction.chosen)
        page.write_report(
            folder / "pose.html",
            title=title,
            results={"num_hypotheses": len(poses_mm)},
            examples=[example],
        )
        packed = arrays.npz_bytes(contents(detection, prediction), compressed=True)
        files.write_atomic(folder / "hypotheses.npz", packed)
    except OSError as error:
        raise PredictionError(f"{folder} cannot be written: {error}") from error


def contents(detection: Detection, prediction: Prediction) -> dict[str, np.ndarray]:
    """What hypotheses.npz holds; lengths are millimetres, or pixels of the upright picture.

    Returns:
      * `poses_mm` (M, 17, 3) and `joint_names` (17,).
      * `pose_mm` (17, 3), the chosen pose, and `pose_method`.
      * `covariance_mm2` (17, 3, 3).
      * `axes`: those of the poses, "camera", or "crop" of one that looks at the crop's centre.
      * `radius_mm` (17,), `radius_level`, and `radius_calibrated`: whether the level holds on
        data, or is the share of the hypotheses within the radius.
      * `heatmaps` (16, 64, 64) float16, `joints_2d_names` (16,) and `joints_2d_height` (16,),
        that of the highest cells.
      * Of a picture: `crop_corner_px` (2,) and `crop_side_px`, what the heatmaps cover, and
        `joints_2d_px` (16, 2), the highest cells.
    """
    chosen = prediction.chosen
    largest = np.finfo(np.float16).max
    content = {
        "poses_mm": np.float32(prediction.draw.poses_mm),
        "joint_names": np.array(H36M_JOINTS),
        "pose_mm": np.float32(chosen.pose_mm),
        "pose_method": np.array(chosen.method),
        "covariance_mm2": np.float32(prediction.covariance_mm2),
        "axes": np.array(prediction.axes),
        "radius_mm": np.float32(chosen.radius_mm),
        "radius_level": np.array(chosen.level),
        "radius_calibrated": np.array(prediction.is_calibrated),
        "heatmaps": np.clip(detection.heatmaps, -largest, largest).astype(np.float16),
        "joints_2d_names": np.array(MPII_JOINTS),
        "joints_2d_height": np.float32(detection.heights),
    }
    if detection.crop is not None:
        content |= {
            "crop_corner_px": detection.crop.corner_px[0].astype(np.int32),
            "crop_side_px": detection.crop.side_px[0].astype(np.int32),
            "joints_2d_px": np.float32(detection.joints_px),
        }
    return content
