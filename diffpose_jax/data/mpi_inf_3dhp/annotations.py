"""Reads the annotations of MPI-INF-3DHP's test set (Mehta et al., 3DV 2017), a user's own copy.

`TS1` to `TS6` hold `annot_data.mat` (MATLAB version 7.3, that is HDF5) and
`imageSequence/img_000001.jpg` and on, one image for each of the F annotated frames. MATLAB's
3 x 17 x 1 x F arrays are (F, 1, 17, 3) in HDF5. Coordinates are the camera's (x right, y down,
z forward, millimetres) and pixels of the image; there is one person.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from diffpose_jax.data import cameras, hdf5
from diffpose_jax.io import extras

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

ANNOTATIONS: tuple[str, ...] = ("univ_annot3", "annot3")
"""The 3D annotations: bodies scaled to one height (published), or as they are."""

_SHAPES = {
    "annot2": (1, len(JOINTS), 2),
    "annot3": (1, len(JOINTS), 3),
    "univ_annot3": (1, len(JOINTS), 3),
    "valid_frame": (1,),
    "activity_annotation": (1,),
}
_NAMED = 10
_FARTHEST = 1e6  # millimetres, and pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """The n valid frames of one recording.

    Attributes:
        subject: "TS1" to "TS6".
        scene: "green_screen", "no_green_screen" or "outdoor".
        images: n paths.
        frame: (n,) int32, the images' numbers, from 1.
        activity: (n,) int32: 1 standing or walking, 2 exercising, 3 sitting, 4 reaching or
            crouching, 5 on the floor, 6 sports, 7 miscellaneous.
        keypoints_px: (n, 17, 2) float64, pixels of the image, Human3.6M's joints.
        pose_mm: (n, 17, 3) float32, hip-centred camera axes with y up, Human3.6M's joints.
    """

    subject: str
    scene: str
    images: tuple[Path, ...]
    frame: np.ndarray
    activity: np.ndarray
    keypoints_px: np.ndarray
    pose_mm: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def read_all(source: str | Path, annotation: str = "univ_annot3") -> list[Recording]:
    """Reads the annotations of all six recordings.

    Args:
        source: The folder that holds `TS1` to `TS6`.
        annotation: One of `ANNOTATIONS`.

    Returns:
        The recordings in order, without a look into the images.

    Raises:
        FileNotFoundError: If a folder, an annotation file or the image of a valid frame is missing.
        ValueError: If a file is not what it should be; the message names it and says why.
        MissingExtraError: If h5py is not installed.
    """
    if annotation not in ANNOTATIONS:
        raise ValueError(f"annotation is {annotation!r}; it must be one of {ANNOTATIONS}.")
    source = Path(source)
    missing = [subject for subject in SCENES if not (source / subject).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{source} has no folder {', '.join(missing)}: give the folder of MPI-INF-3DHP's test "
            "set (mpi_inf_3dhp_test_set), which holds TS1 to TS6."
        )
    return [_read(source / subject, annotation) for subject in SCENES]


def _read(folder: Path, annotation: str) -> Recording:
    path = folder / "annot_data.mat"
    columns = _read_mat(path)
    images = _find_images(folder / "imageSequence")
    valid = np.flatnonzero(columns["valid_frame"][:, 0])
    missing = sorted({int(number) for number in valid + 1} - set(images))
    if missing:
        raise FileNotFoundError(
            f"{folder / 'imageSequence'} lacks images of valid frames in {path}: "
            f"img_*.jpg number {_shortened(missing)}."
        )
    frames = len(columns["valid_frame"])
    surplus = sorted(number for number in images if not 1 <= number <= frames)
    if surplus:
        raise ValueError(
            f"{folder / 'imageSequence'} and {path} do not belong together: there are {frames} "
            f"annotated frames, numbered from 1, and images of number {_shortened(surplus)}."
        )
    keypoints, points = (
        columns[name][valid][:, 0, list(TO_H36M)].astype(np.float64)
        for name in ("annot2", annotation)
    )
    activity = columns["activity_annotation"][valid, 0]
    is_good = (activity >= 0) & (activity < 256)
    for values in (keypoints, points):
        is_good &= (np.abs(values) < _FARTHEST).all((1, 2))  # nan is refused, too
    if not is_good.all():
        raise ValueError(
            f"{path}: annot2, {annotation} or activity_annotation is not finite in valid frames,"
            f" or far too large, images of number {_shortened(list(valid[~is_good] + 1))}."
        )
    return Recording(
        subject=folder.name,
        scene=SCENES[folder.name],
        images=tuple(images[number] for number in (valid + 1).tolist()),
        frame=(valid + 1).astype(np.int32),
        activity=activity.astype(np.int32),
        keypoints_px=keypoints,
        pose_mm=cameras.output_pose(points).astype(np.float32),
    )


def _read_mat(path: Path) -> dict[str, np.ndarray]:
    """Reads `annot_data.mat`: (F, 1, 17, 2 or 3) and (F, 1) by name."""
    h5py = extras.load("h5py", "mpi_inf_3dhp")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the annotations of the recording.")
    if not h5py.is_hdf5(path):
        with path.open("rb") as file:
            old = file.read(10) == b"MATLAB 5.0"
        hint = " but a MATLAB version 5 file; save it with -v7.3" if old else ""
        raise ValueError(f"{path} is not HDF5 (MATLAB version 7.3), as the data set has it{hint}.")
    with hdf5.opened(path, "mpi_inf_3dhp") as file:
        found = {name: hdf5.dataset(file, name) for name in _SHAPES}
        for name, array in found.items():
            if array is None or array.dtype.kind not in "fiu":
                raise hdf5.Hdf5Error(
                    f"{path} has no array {name}; it has {', '.join(itertools.islice(file, 20))}."
                )
        # A frame without an axis: the comparison of the shapes tells.
        frames = found["valid_frame"].shape[:1]
        for name, shape in _SHAPES.items():
            if found[name].shape != (*frames, *shape):
                raise hdf5.Hdf5Error(
                    f"{path}: {name} is {found[name].shape}; {len(JOINTS)} joints in"
                    f" {', '.join(map(str, frames))} frames (as in valid_frame) are"
                    f" {(*frames, *shape)}."
                )
        return {name: array[()] for name, array in found.items()}


def _find_images(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: it holds the images of the recording.")
    names = ((re.fullmatch(r"img_(\d+)\.jpg", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in names if match}


def _shortened(numbers: list[int]) -> str:
    """Names the first numbers and counts the others."""
    named = ", ".join(map(str, numbers[:_NAMED]))
    return named + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
