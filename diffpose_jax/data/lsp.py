"""Reads the pictures of `lsp_extended` (Johnson and Everingham, CVPR 2011), a user's own copy.

Sports photographs for a look at the model in the wild: there is no 3D truth. The folder holds
`images/im00001.jpg` and on, and `joints.mat` (MATLAB version 5) with `joints` (14, 3, N): x and y
in pixels and whether the joint is visible. Coordinates of joints that are not visible mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffpose_jax.data import cameras, matlab5
from diffpose_jax.io import pictures

JOINTS: tuple[str, ...] = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist",
    "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck",
    "head_top",
)  # fmt: skip
"""The joints of `joints.mat`, in its order."""

_NAMED = 10
_FARTHEST_PX = 1e6


class Picture(NamedTuple):
    """A photograph of one person.

    Attributes:
        name: The file's, without folder and ending, such as "im00001".
        image: (H, W, 3) uint8, RGB.
        crop: One square (a batch of 1) around the visible joints, see `cameras.square_crop`.
    """

    name: str
    image: np.ndarray
    crop: cameras.Crop


def read(folder: str | Path) -> Iterator[Picture]:
    """Reads the pictures in the order of their numbers.

    A picture with fewer than two visible joints is left out: nothing tells where to cut it.

    Args:
        folder: Holds `joints.mat` and `images`.

    Returns:
        The pictures; each image is read when its turn comes.

    Raises:
        FileNotFoundError: If the annotations or an image are missing; before the first picture.
        ValueError: If a file is not what it should be; the message names it and says why.
    """
    folder = Path(folder)
    joints = _read_joints(folder / "joints.mat")
    paths = [folder / "images" / f"im{number:05d}.jpg" for number in range(1, len(joints) + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / 'images'} lacks {len(missing)} of the {len(joints)} images in "
            f"{folder / 'joints.mat'}: {', '.join(missing[:_NAMED])}"
            + (" and more." if len(missing) > _NAMED else ".")
        )
    return _pictures(paths, joints)


def _pictures(paths: list[Path], joints: np.ndarray) -> Iterator[Picture]:
    for path, (*xy, visible) in zip(paths, joints.swapaxes(1, 2), strict=True):
        seen_px = np.stack(xy, axis=-1)[visible > 0]
        if len(seen_px) < 2:
            continue
        yield Picture(path.stem, pictures.read(path), cameras.square_crop(seen_px[None]))


def _read_joints(path: Path) -> np.ndarray:
    """Reads `joints.mat`: (N, 14, 3) float64."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: give the folder of lsp_extended, which holds it and images."
        )
    joints = np.asarray(matlab5.read(path, "joints"), np.float64)
    if joints.ndim != 3 or joints.shape[:2] != (len(JOINTS), 3):
        raise ValueError(
            f"{path}: joints is {joints.shape}; it must be (14, 3, N). The first LSP data set, "
            "(3, 14, 2000), is not read."
        )
    seen = joints.transpose(0, 2, 1)[joints[:, 2] > 0]
    if not (np.abs(seen) < _FARTHEST_PX).all():  # nan is refused, too
        raise ValueError(f"{path}: a visible joint is not finite or far outside of any picture.")
    return joints.transpose(2, 0, 1)
