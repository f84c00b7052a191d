"""MPI-INF-3DHP's test set (Mehta et al., 3DV 2017), from a user's own copy.

`TS1` to `TS6` hold `annot_data.mat` (MATLAB version 7.3, that is HDF5) and
`imageSequence/img_000001.jpg` and on, one image for each of the F annotated frames. MATLAB's
3 x 17 x 1 x F arrays are (F, 1, 17, 3) in HDF5. Coordinates are the camera's (x right, y down,
z forward, millimetres) and pixels of the image; there is one person.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from diffpose_jax.config import check_choice
from diffpose_jax.data import cameras, hdf5, prepared, sources
from diffpose_jax.data.photographs import Photographs, PhotographsBuilder
from diffpose_jax.detectors import crops
from diffpose_jax.io.files import FileError

SCENES: dict[str, str] = {
    "TS1": "green_screen",
    "TS2": "green_screen",
    "TS3": "no_green_screen",
    "TS4": "no_green_screen",
    "TS5": "outdoor",
    "TS6": "outdoor",
}
"""Where each recording was made, as the data set groups its results."""

JOINTS: tuple[str, ...] = (
    "head_top", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder",
    "left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee",
    "left_ankle", "pelvis", "spine", "head",
)  # fmt: skip
"""The test set's joints in its own order and words (`mpii_get_joint_set('relevant')`)."""

TO_H36M: tuple[int, ...] = (14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4)
"""`JOINTS[TO_H36M[i]]` is Human3.6M's joint i, as the published program orders them."""

_SHAPES = {
    "valid_frame": (1,),
    "annot2": (1, len(JOINTS), 2),
    "annot3": (1, len(JOINTS), 3),
    "univ_annot3": (1, len(JOINTS), 3),
    "activity_annotation": (1,),
}


@dataclasses.dataclass(frozen=True)
class MpiInf3dhpConfig(prepared.DetectionsConfig):
    """What a user chooses.

    The images are no part of it: there is one MPI-INF-3DHP. To prepare it again from a changed
    copy, delete the prepared data set first.

    Attributes:
      annotation: which poses are the truth: "univ_annot3", bodies scaled to one height, as the
        published program takes, or "annot3", as they are.
    """

    annotation: str = "univ_annot3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, annotation=("univ_annot3", "annot3"))


class MpiInf3dhp(PhotographsBuilder):
    """MPI-INF-3DHP's test set: six people in two studios and outdoors.

    `source` is the folder that holds `TS1` to `TS6`.
    """

    name = "mpi_inf_3dhp"
    CONFIG = MpiInf3dhpConfig
    LABEL = ("annotation",)

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps."""
        return {
            "pose_mm": prepared.POSE,
            "subject": tfds.features.Text(doc="TS1 to TS6"),
            "scene": tfds.features.Text(doc="green_screen, no_green_screen or outdoor"),
            "activity": tfds.features.Scalar(
                np.int32,
                doc="1 standing or walking, 2 exercising, 3 sitting, 4 reaching or crouching, 5 on"
                " the floor, 6 sports, 7 miscellaneous",
            ),
            "frame": tfds.features.Scalar(np.int32, doc="number of the image, from 1"),
        }

    def photographs(self) -> list[Photographs]:
        """The valid frames of all recordings."""
        return [_read(self.source / subject, self.config.annotation) for subject in SCENES]


def _read(folder: Path, annotation: str) -> Photographs:
    path = folder / "annot_data.mat"
    arrays = _read_mat(path)
    images = {int(path.stem[4:]): path for path in folder.glob("imageSequence/img_[0-9]*.jpg")}
    valid = np.flatnonzero(arrays["valid_frame"][:, 0])
    numbers = valid + 1
    if missing := sorted(set(numbers.tolist()) - set(images)):
        raise FileNotFoundError(
            f"{folder / 'imageSequence'} lacks images of valid frames in {path}: "
            f"img_*.jpg number {sources.listed(missing)}."
        )
    frames = len(arrays["valid_frame"])
    if surplus := sorted(number for number in images if not 1 <= number <= frames):
        raise FileError(
            f"{folder / 'imageSequence'} and {path} do not belong together: there are {frames} "
            f"annotated frames, numbered from 1, and images of number {sources.listed(surplus)}."
        )
    joints_px, points_mm = (
        arrays[name][valid, 0].astype(np.float64) for name in ("annot2", annotation)
    )
    is_good = np.isfinite(joints_px).all((1, 2)) & np.isfinite(points_mm).all((1, 2))
    if not is_good.all():
        raise FileError(
            f"{path}: annot2 or {annotation} is not finite in valid frames, images of number"
            f" {sources.listed(numbers[~is_good].tolist())}."
        )
    columns = {
        "pose_mm": cameras.output_pose(points_mm[:, TO_H36M]),
        "subject": np.full(len(valid), folder.name),
        "scene": np.full(len(valid), SCENES[folder.name]),
        "activity": arrays["activity_annotation"][valid, 0].astype(np.int32),
        "frame": numbers,
    }
    paths = [images[number] for number in numbers.tolist()]
    return Photographs(folder.name, paths, crops.square_crop(joints_px), columns)


def _read_mat(path: Path) -> dict[str, np.ndarray]:
    """Reads `annot_data.mat`: (F, 1, 17, 2 or 3) and (F, 1) by name."""
    arrays: dict[str, np.ndarray] = {}
    with hdf5.opened(path, "mpi_inf_3dhp") as file:
        for name, shape in _SHAPES.items():
            array = hdf5.dataset(file, name)
            if array is None or array.dtype.kind not in "fiu":
                raise FileError(f"{path} has no array {name}; it has {sources.listed([*file])}.")
            # Frames as in the first array.
            expected = (*next(iter(arrays.values()), array).shape[:1], *shape)
            if array.shape != expected:
                raise FileError(f"{path}: {name} is {array.shape}; it must be {expected}.")
            arrays[name] = array[()]
    return arrays
