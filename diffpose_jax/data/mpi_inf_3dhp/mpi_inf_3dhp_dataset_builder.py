"""TFDS builder of MPI-INF-3DHP's test set: a detector's heatmaps and poses of all valid frames."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from diffpose_jax.data import cameras
from diffpose_jax.data import prepared as detections
from diffpose_jax.data.mpi_inf_3dhp import annotations as annotations_lib
from diffpose_jax.data.mpi_inf_3dhp.annotations import Recording
from diffpose_jax.detectors import crops
from diffpose_jax.io import pictures

_FRAMES = 64


@dataclasses.dataclass(eq=False)
class MpiInf3dhpConfig(detections.DetectionsConfig):
    """What the examples depend on; make it with `builder_config`.

    Attributes:
        annotation: Which poses are the truth: "univ_annot3", bodies scaled to one height, as the
            published program takes, or "annot3", as they are.
        input_px: Side of the crops that the detector reads.
    """

    annotation: str = annotations_lib.ANNOTATIONS[0]
    input_px: int = 256


def default_config() -> ml_collections.ConfigDict:
    """Gives the fields that `builder_config` takes, with their defaults."""
    default = MpiInf3dhpConfig(name="")
    return ml_collections.ConfigDict({"annotation": default.annotation, "loss": default.loss})


def builder_config(
    config: ml_collections.ConfigDict, detector: detections.Detector
) -> MpiInf3dhpConfig:
    """Checks a configuration and names it after its content.

    The images are not a part of it: there is one MPI-INF-3DHP. To prepare it again from a changed
    copy, delete the prepared data set first.

    Args:
        config: Fields of `default_config`; what is missing keeps its default.
        detector: Gives the heatmaps.

    Returns:
        The builder's configuration.

    Raises:
        ValueError: If a field is unknown or out of range.
    """
    fields = default_config().to_dict()
    if unknown := sorted(set(config) - set(fields)):
        raise ValueError(f"data.{unknown[0]} is unknown; data has {', '.join(fields)}.")
    fields |= config.to_dict()
    if fields["annotation"] not in annotations_lib.ANNOTATIONS:
        raise ValueError(
            f"data.annotation is {fields['annotation']!r}; it must be one of "
            f"{', '.join(annotations_lib.ANNOTATIONS)}."
        )
    made = MpiInf3dhpConfig(
        name="", detector=detector.fingerprint, input_px=detector.input_px, **fields
    )
    return detections.named(made, made.annotation)


class MpiInf3dhp(detections.DetectionsBuilder):
    """MPI-INF-3DHP's test set: six people in two studios and outdoors.

    Args:
        config: See `builder_config`.
        source: The folder that holds `TS1` to `TS6`; needed to prepare the data set.
        detector: The configuration's; needed to prepare the data set.
        data_dir: Folder of all data sets; by default where TFDS keeps them.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        config: MpiInf3dhpConfig,
        source: str | Path,
        detector: detections.Detector | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        self._source = source
        super().__init__(config=config, detector=detector, data_dir=data_dir)

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps and poses."""
        return {
            "subject": tfds.features.Text(doc="TS1 to TS6"),
            "scene": tfds.features.Text(doc="green_screen, no_green_screen or outdoor"),
            "activity": tfds.features.Scalar(np.int32, doc="1 to 7, see annotations.Recording"),
            "frame": tfds.features.Scalar(np.int32, doc="number of the image, from 1"),
        }

    def check(self) -> None:
        """Reads all annotations and the headers of all images.

        Raises:
            ValueError, FileNotFoundError: See `annotations.read_all`; or if an image cannot be
                opened, or has no part of its crop.
        """
        for recording in tqdm(self._recordings(), desc="checking", unit=" recordings"):
            corners_px, sides_px = cameras.square_crop(recording.keypoints_px)
            parts = zip(recording.images, corners_px, corners_px + sides_px[:, None], strict=True)
            for path, low, high in parts:
                size = np.array(pictures.size(path))
                if (high <= 0).any() or (low >= size).any():
                    raise ValueError(
                        f"{path} is {size[0]} x {size[1]} px, and its annotated person lies outside"
                        f" (x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}): are"
                        " the images of another size than those of the data set?"
                    )

    def parts(self) -> list[detections.Part]:
        """One part for each recording."""
        size = self.builder_config.input_px
        return [
            detections.Part(recording.subject, "test", functools.partial(_read, recording, size))
            for recording in self._recordings()
        ]

    def _recordings(self) -> list[Recording]:
        return annotations_lib.read_all(self._source, self.builder_config.annotation)


def _read(recording: Recording, input_px: int) -> Iterator[dict[str, np.ndarray]]:
    squares = cameras.square_crop(recording.keypoints_px)
    for start in range(0, len(recording), _FRAMES):
        here = slice(start, start + _FRAMES)
        parts = zip(recording.images[here], *(column[here] for column in squares), strict=True)
        images = np.stack([_cut(input_px, *part) for part in parts])
        yield {
            "crops": images,
            "pose_mm": recording.pose_mm[here],
            "subject": np.full(len(images), recording.subject),
            "scene": np.full(len(images), recording.scene),
            "activity": recording.activity[here],
            "frame": recording.frame[here],
        }


def _cut(input_px: int, path: Path, corner_px: np.ndarray, side_px: float) -> np.ndarray:
    return crops.square_crop_image(pictures.read(path), corner_px, side_px, input_px)


def prepare(
    config: ml_collections.ConfigDict,
    source: str | Path,
    data_dir: str | Path | None,
    detector: detections.Detector,
) -> MpiInf3dhp:
    """Gives the builder of a configuration, after writing its data set if that is not there yet.

    Args:
        config: See `builder_config`.
        source: The folder that holds `TS1` to `TS6`; not looked at if the data set is prepared.
        data_dir: Folder of all data sets; by default where TFDS keeps them.
        detector: Finds the joints in the crops.

    Returns:
        The prepared builder, for `detections.read` with the split "test".

    Raises:
        ValueError, FileNotFoundError: See `builder_config` and `MpiInf3dhp.check`.
    """
    builder = MpiInf3dhp(
        config=builder_config(config, detector),
        source=source,
        detector=detector,
        data_dir=data_dir,
    )
    builder.prepare()
    return builder
