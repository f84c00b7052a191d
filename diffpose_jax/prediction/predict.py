"""From one person's picture, or heatmaps, to poses in files that can be looked at."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from diffpose_jax.data import cameras
from diffpose_jax.data.cameras import Crop
from diffpose_jax.detectors import Detector, crops
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation.aggregation import Calibration
from diffpose_jax.io import arrays as numpy_files
from diffpose_jax.io import files
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.method.network import DiffPose, Model
from diffpose_jax.report import figures as plotting
from diffpose_jax.report import page as report
from diffpose_jax.report.figures import ChosenPose
from diffpose_jax.skeleton import H36M_JOINTS, HEATMAP_SIZE, MPII_JOINTS

LEVEL = 0.9
"""The level of the radii of a model without a calibration."""

# Heatmaps are about as high as sure: 0.9 is usual for a joint in view. Measured with
# EfficientPose on 14 pictures without a person and one of a man cut off at the hips: in the last
# crop, at most 2 maps were higher than 0.3, and 8.
_FOUND = 0.3
_FEWEST_JOINTS = 6
# Of fewer pixels than the heatmap has cells a detector imagines people.
_SMALLEST_CROP_PX = HEATMAP_SIZE
# The first crop around what was found is wider than the last: a joint may have been missed.
_WIDE_SCALE = 1.5


class PredictionError(ValueError):
    """There is nothing to make poses of; the message says why."""


class Box(NamedTuple):
    """A rectangle in a picture, in pixels: left, upper, width, height."""

    x: float
    y: float
    width: float
    height: float

    @classmethod
    def parse(cls, text: str) -> Box:
        """Reads "x,y,w,h".

        Raises:
            PredictionError: If the text is not four numbers, or the box has no area.
        """
        try:
            box = cls(*map(float, text.split(",")))
        except (TypeError, ValueError) as error:
            raise PredictionError(f"a box is x,y,w,h in pixels, not {text!r}") from error
        if not all(map(math.isfinite, box)) or box.width <= 0 or box.height <= 0:
            raise PredictionError(f"the box {text!r} has no area: it is x,y,w,h in pixels")
        return box

    def crop(self, image: np.ndarray) -> Crop:
        """The square around the part of the box that lies in a picture (H, W, 3).

        Raises:
            PredictionError: If no part of it does.
        """
        height, width = image.shape[:2]
        left, top = max(self.x, 0.0), max(self.y, 0.0)
        right, bottom = min(self.x + self.width, width), min(self.y + self.height, height)
        if right - left < 1 or bottom - top < 1:
            raise PredictionError(
                f"the box {','.join(f'{value:g}' for value in self)} lies outside of the picture,"
                f" which has {width} x {height} px"
            )
        return cameras.square_crop(np.array([[[left, top], [right, bottom]]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """What was found of one person.

    Attributes:
        heatmaps: (16, 64, 64) float32, MPII joint order.
        crop: A batch of one, the square of the picture that they cover; None without a picture.
        image: (P, P, 3) uint8, that square; None without a picture.
    """

    heatmaps: np.ndarray
    crop: Crop | None = None
    image: np.ndarray | None = None

    @property
    def heights(self) -> np.ndarray:
        """(16,), the height of each map's highest cell."""
        return self.heatmaps.max(axis=(1, 2))

    @property
    def joints_px(self) -> np.ndarray:
        """(16, 2), x and y of the highest cells in the picture, pixels."""
        if self.crop is None:
            raise ValueError("these heatmaps are of no picture")
        cells = self.heatmaps.reshape(len(self.heatmaps), -1).argmax(axis=-1)
        column_row = np.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1)
        return crops.cells_to_pixels(column_row[None], *self.crop)[0]

    @property
    def is_found(self) -> np.ndarray:
        """(16,) bool, which joints the detector is fairly sure of."""
        return self.heights >= _FOUND


def detect(detector: Detector, image: np.ndarray, box: Box | None = None) -> Detection:
    """Finds one person's joints.

    With a box, the crop is the square around it, `cameras.CROP_SCALE` times as wide as what models
    are trained on. Without, the whole picture, padded to a square, is looked at first, and, if
    nobody is seen there, nine overlapping parts of half its side; then a wide crop around the
    joints that were found, at last one of that scale.

    Args:
        detector: The detector.
        image: (H, W, 3) uint8, RGB.
        box: Where the person is; only the part within the picture counts.

    Returns:
        The person's heatmaps.

    Raises:
        PredictionError: If the box lies outside of the picture, or nobody is there.
    """
    look = functools.partial(_look, detector, image)
    if box is not None:
        found = look(box.crop(image))
    else:
        found = _search(look, image)
        for scale in (_WIDE_SCALE, cameras.CROP_SCALE):
            seen_px = found.joints_px[found.is_found]
            if not len(seen_px) or scale * np.ptp(seen_px, axis=0).max() < _SMALLEST_CROP_PX:
                raise PredictionError(_nobody(found, box))
            found = look(cameras.square_crop(seen_px[None], scale))
    if found.is_found.sum() < _FEWEST_JOINTS:
        raise PredictionError(_nobody(found, box))
    return found


def _nobody(found: Detection, box: Box | None) -> str:
    where, hint = "in the box", ""
    if box is None:
        where, hint = "in the picture", ". Is the person small? Say where: --box x,y,w,h"
    return (
        f"nobody was found {where}: {found.is_found.sum()} of 16 joints were seen (a height of"
        f" {_FOUND}), too few or too close together{hint}"
    )


def _look(detector: Detector, image: np.ndarray, crop: Crop) -> Detection:
    square = crops.square_crop_image(image, crop.corner_px[0], crop.side_px[0], detector.input_px)
    return Detection(detector.heatmaps(square[None])[0], crop, square)


def _search(look: Callable[[Crop], Detection], image: np.ndarray) -> Detection:
    """The whole picture, or the part of it where most is seen."""
    height, width = image.shape[:2]
    whole = cameras.square_crop(np.array([[[0, 0], [width, height]]]), scale=1.0)
    found = look(whole)
    if found.is_found.sum() >= _FEWEST_JOINTS:
        return found
    side = max(height, width) / 2
    centres = np.array([[x, y] for x in (1, 2, 3) for y in (1, 2, 3)]) * side / 2
    centres += whole.corner_px[0]
    inside = np.all((centres > 0) & (centres < [width, height]), axis=1)
    parts = [
        look(cameras.square_crop(np.array([[centre - side / 2, centre + side / 2]]), scale=1.0))
        for centre in centres[inside]
    ]
    return max([found, *parts], key=lambda part: part.heights.sum())


def read_heatmaps(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads heatmaps that another program made.

    Args:
        path: A .npy file, or a .npz file with `heatmaps`: (16, 64, 64) or (B, 16, 64, 64), MPII
            joint order.

    Returns:
        (B, 16, 64, 64) float32.

    Raises:
        PredictionError: If it is not such a file; pickled objects are not read.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        content = numpy_files.read(path)
    except ValueError as error:
        raise PredictionError(str(error)) from error
    if isinstance(content, dict):
        if "heatmaps" not in content:
            names = ", ".join(name[:40] for name in list(content)[:20]) or "nothing"
            raise PredictionError(f"{path} has no array heatmaps, only {names}")
        content = content["heatmaps"]
    try:
        maps = heatmaps_lib.check(content[None] if content.ndim == 3 else content)
    except ValueError as error:
        raise PredictionError(f"{path}: {error}") from error
    if len(maps) == 0:
        raise PredictionError(f"{path} holds the heatmaps of no picture")
    return maps


def check_not_flat(detection: Detection) -> Detection:
    """Gives heatmaps back that show somebody, in whatever unit they are.

    Raises:
        PredictionError: If every map is flat, or without a positive cell.
    """
    maps = detection.heatmaps
    if not np.any((maps.max(axis=(1, 2)) > 0) & (np.ptp(maps, axis=(1, 2)) > 0)):
        raise PredictionError("nobody is in these heatmaps: all are flat or not positive")
    return detection


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Poses of one person.

    Attributes:
        poses_mm: (M, 17, 3) float32, the hypotheses, millimetres.
        covariance_mm2: (17, 3, 3), of each joint's hypotheses.
        chosen: The one pose made of them, and its radii.
        is_calibrated: Whether the radii were fitted to data.
    """

    poses_mm: np.ndarray
    covariance_mm2: np.ndarray
    chosen: ChosenPose
    is_calibrated: bool


def predict(
    model: Model,
    key: Array,
    heatmaps: np.ndarray,
    num_hypotheses: int,
    method: str,
    calibration: Calibration | None = None,
) -> Prediction:
    """Draws hypotheses and makes one pose of them.

    Args:
        model: The model.
        key: A random key.
        heatmaps: (16, 64, 64), MPII joint order.
        num_hypotheses: M.
        method: One of `aggregation.METHODS`.
        calibration: That of the model and the method; None for the hypotheses' own radii.

    Returns:
        The prediction.

    Raises:
        ValueError: As `Model.sample` and `aggregation.aggregate`.
    """
    maps = jnp.asarray(heatmaps)[None]
    poses_mm = model.sample(key, maps, num_hypotheses)
    used = aggregation.uncalibrated(LEVEL) if calibration is None else calibration
    pose_mm, radius_mm, covariance_mm2 = _choose(method, poses_mm, maps, used)
    return Prediction(
        poses_mm=np.asarray(poses_mm)[0],
        covariance_mm2=np.asarray(covariance_mm2)[0],
        chosen=ChosenPose(
            pose_mm=np.asarray(pose_mm)[0],
            radius_mm=np.asarray(radius_mm)[0],
            level=used.level,
            method=method,
            meaning=used.meaning,
        ),
        is_calibrated=calibration is not None,
    )


@functools.partial(jax.jit, static_argnums=0)
def _choose(
    method: str, poses_mm: Array, maps: Array, calibration: Calibration
) -> tuple[Array, Array, Array]:
    """The chosen poses (B, 17, 3), their radii (B, 17) and the covariances (B, 17, 3, 3)."""
    pose_mm = aggregation.aggregate(method, poses_mm, maps)
    radius_mm = aggregation.radius(poses_mm, pose_mm, calibration)
    return pose_mm, radius_mm, aggregation.covariance(poses_mm)


@functools.partial(jax.jit, static_argnums=0)
def _candidates(network: DiffPose, heatmaps: Array) -> tuple[Array, Array]:
    """Coordinates (S, 16, 2) and likelihoods (S, 16) of candidates as the model draws them."""
    candidates = network.draw_candidates(jax.random.key(0), heatmaps)
    return candidates.xy, candidates.likelihood


def draw(title: str, model: Model, detection: Detection, prediction: Prediction) -> Figure:
    """The figure of a person: what was found, the hypotheses and the chosen pose.

    Args:
        title: Its heading, such as the picture's name.
        model: Draws the candidates that the figure shows.
        detection: What was found.
        prediction: What was made of it.
    """
    xy, likelihood = _candidates(model.network, jnp.asarray(detection.heatmaps))
    return plotting.plot_example(
        detection.heatmaps,
        xy,
        likelihood,
        prediction.poses_mm,
        title=title,
        chosen=prediction.chosen,
        crop=detection.image,
    )


def write(
    folder: str | os.PathLike[str],
    title: str,
    model: Model,
    detection: Detection,
    prediction: Prediction,
) -> None:
    """Writes hypotheses.npz, poses.png and pose.html; what is there already is replaced.

    Args:
        folder: Where to; it is made.
        title: Heading of the figure and the page, such as the picture's name.
        model: Draws the candidates that the figure shows.
        detection: What was found.
        prediction: What was made of it.

    Raises:
        PredictionError: If the files cannot be written.
    """
    folder = Path(folder)
    try:
        png = plotting.save(draw(title, model, detection, prediction), folder / "poses.png")
        example = report.ReportExample(
            title, prediction.poses_mm, figure=png, chosen=prediction.chosen
        )
        report.write_report(
            folder / "pose.html",
            title=title,
            results={"num_hypotheses": len(prediction.poses_mm)},
            examples=[example],
        )
        buffer = io.BytesIO()
        arrays: dict[str, Any] = contents(detection, prediction)
        np.savez_compressed(buffer, **arrays)
        files.write_atomic(folder / "hypotheses.npz", buffer.getvalue())
    except OSError as error:
        raise PredictionError(f"{folder} cannot be written: {error}") from error


def contents(detection: Detection, prediction: Prediction) -> dict[str, np.ndarray]:
    """What hypotheses.npz holds; lengths are millimetres, or pixels of the upright picture.

    Returns:
        * `poses_mm` (M, 17, 3) and `joint_names` (17,).
        * `pose_mm` (17, 3), the chosen pose, and `pose_method`.
        * `covariance_mm2` (17, 3, 3).
        * `radius_mm` (17,), `radius_level`, and `radius_calibrated`: whether the level holds on
          data, or is the share of the hypotheses within the radius.
        * `heatmaps` (16, 64, 64) float16, `joints_2d_names` (16,) and `joints_2d_height` (16,),
          that of the highest cells.
        * Of a picture: `crop_corner_px` (2,) and `crop_side_px`, what the heatmaps cover, and
          `joints_2d_px` (16, 2), the highest cells.
    """
    chosen = prediction.chosen
    largest = np.finfo(np.float16).max
    arrays = {
        "poses_mm": prediction.poses_mm.astype(np.float32),
        "joint_names": np.array(H36M_JOINTS),
        "pose_mm": chosen.pose_mm.astype(np.float32),
        "pose_method": np.array(chosen.method),
        "covariance_mm2": prediction.covariance_mm2.astype(np.float32),
        "radius_mm": chosen.radius_mm.astype(np.float32),
        "radius_level": np.array(chosen.level),
        "radius_calibrated": np.array(prediction.is_calibrated),
        "heatmaps": np.clip(detection.heatmaps, -largest, largest).astype(np.float16),
        "joints_2d_names": np.array(MPII_JOINTS),
        "joints_2d_height": detection.heights.astype(np.float32),
    }
    if detection.crop is not None:
        arrays |= {
            "crop_corner_px": detection.crop.corner_px[0].astype(np.int32),
            "crop_side_px": detection.crop.side_px[0].astype(np.int32),
            "joints_2d_px": detection.joints_px.astype(np.float32),
        }
    return arrays
