"""The pictures of `lsp_extended` (Johnson and Everingham, CVPR 2011), from a user's own copy.

Sports photographs for a look at the model in the wild: there is no 3D truth. The folder holds
`images/im00001.jpg` and on, and `joints.mat` (MATLAB version 5) with `joints` (14, 3, N): x and y
in pixels and whether the joint is visible. Coordinates of joints that are not visible mean nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from jaxtyping import Float64

from diffpose_jax.data import sources
from diffpose_jax.data.photographs import Photographs, PhotographsBuilder
from diffpose_jax.detectors import crops
from diffpose_jax.io.files import FileError

JOINTS: tuple[str, ...] = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist",
    "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck",
    "head_top",
)  # fmt: skip
"""The joints of `joints.mat`, in its order."""


class Lsp(PhotographsBuilder):
    """LSP extended: sports photographs of one person each, without 3D truth.

    `source` is the folder of lsp_extended. Pictures with fewer than two visible joints are left
    out: nothing tells where to cut them.
    """

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps."""
        tensor = functools.partial(tfds.features.Tensor, encoding="bytes")
        return {
            "name": tfds.features.Text(doc="of the picture, such as im00001"),
            "corner_px": tensor(shape=(2,), dtype=np.float32, doc="left upper corner of the crop"),
            "side_px": tfds.features.Scalar(np.float32, doc="side of the crop"),
            "visible": tensor(shape=(len(JOINTS),), dtype=np.bool_, doc="which of lsp.JOINTS"),
        }

    def photographs(self) -> list[Photographs]:
        """All pictures, which must be there."""
        folder = self.source / "images"
        joints = _read_joints(self.source / "joints.mat")
        paths = [folder / f"im{number:05d}.jpg" for number in range(1, len(joints) + 1)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(joints)} images in joints.mat: "
                f"{sources.listed(missing)}"
            )
        visible = joints[..., 2] > 0
        kept = np.flatnonzero(visible.sum(1) >= 2)
        each = [crops.square_crop(joints[row, visible[row], :2][None]) for row in kept]
        squares = crops.Crop(*map(np.concatenate, zip(*each, strict=True)))
        kept_paths = [paths[row] for row in kept]
        names = np.array([path.stem for path in kept_paths])
        columns = {"name": names, "visible": visible[kept], **squares._asdict()}
        return [Photographs("lsp", kept_paths, squares, columns)]


def _read_joints(path: Path) -> Float64[np.ndarray, "N 14 3"]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: give the folder of lsp_extended, which holds it and images."
        )
    with sources.reading(path, "a MATLAB file up to -v7"):
        content = scipy.io.loadmat(path)
    joints = content.get("joints")
    if joints is None or joints.dtype.kind not in "fiu":
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise FileError(f"{path} has no array of numbers joints; it has {names}")
    if joints.ndim != 3 or joints.shape[:2] != (len(JOINTS), 3):
        raise FileError(
            f"{path}: joints is {joints.shape}; it must be (14, 3, N). The first LSP data set, "
            "(3, 14, 2000), is not read."
        )
    joints = joints.astype(np.float64).transpose(2, 0, 1)
    if not np.isfinite(joints[joints[..., 2] > 0]).all():
        raise FileError(f"{path}: a visible joint is not finite")
    return joints
