"""The data set of Wehrbein et al. (ICCV 2021): poses and Gaussians fitted to a detector's heatmaps.

Two pickles, `trainset_h36m.pickle` and `testset_h36m.pickle`, which their `create_data.py` makes of
what they publish and the user's own copy of Human3.6M: nested dicts [subject][action][subaction]
[camera] of `imgpath` (a list such as "/S9/Directions.54138969/4.jpg", frames counted from 1),
`3d_gt` (F, 51), `2d_hrnet` (F, 32) and `gaussfit` (F, 112): for each of the 16 MPII joints
amplitude, x, y, sigma_x, theta, sigma_y and the error of the fit, in cells of a 64 x 64 heatmap.
The poses are x of all 17 joints, then y, then z, millimetres in camera coordinates.

A pickle can run any code while it is loaded. These are read by an unpickler that knows nothing
but NumPy's arrays.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from diffpose_jax.data import sources
from diffpose_jax.data.human36m import sequences
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.io.files import FileError
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

FILES = {"train": "trainset_h36m.pickle", "test": "testset_h36m.pickle"}
AMBIGUOUS_SIGMA = 5.0
"""A frame belongs to H36MA if a fitted width is larger, in cells (2.5 x the 2 of the targets)."""

_FRAMES = 256
_Arrays = tuple[Int[np.ndarray, " F"], Float[np.ndarray, "F 17 3"], Float[np.ndarray, "F 16 7"]]


class _Dtype:
    """Stands for `numpy.dtype` in a pickle, which may set no more of it than the byte order.

    With another state, NumPy would take the bytes of an array of objects for their addresses.
    """

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose content comes from a pickle."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, of, is_fortran, content = state
        if of.dtype.hasobject and len(content) != math.prod(shape):
            raise pickle.UnpicklingError("an array of objects has another size than its content")
        super().__setstate__((version, shape, of.dtype, is_fortran, content))


def _reconstruct(*_: Any) -> _Array:
    """Stands for NumPy's function that makes the empty array to which a pickle gives content."""
    return _Array((0,), np.int8)


def _frombuffer(content: Any, of: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(content, of.dtype).reshape(shape, order=order)


# `ndarray` is only an argument of `_reconstruct`. Called, the true one would take any bytes for
# addresses of objects.
_STAND_INS = {
    "ndarray": "numpy.ndarray",
    "dtype": _Dtype,
    "_reconstruct": _reconstruct,
    "_frombuffer": _frombuffer,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and NumPy's arrays; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """What the file refers to by name; NumPy 1 and 2 name their modules differently."""
        if name not in _STAND_INS or module.split(".")[0] != "numpy":
            raise pickle.UnpicklingError(
                f"it holds {module[:60]}.{name[:60]}, which arrays and containers do not need. It "
                "was not loaded: loading it could run code. Make the file again by the authors' "
                "create_data.py"
            )
        return _STAND_INS[name]


def load_arrays(path: Path) -> Any:
    """Loads a pickle of NumPy arrays in containers without running code from it.

    Raises:
      FileError: if it is not a pickle, is cut off, or holds anything but arrays, numbers,
        strings, dicts, lists, tuples and sets.
    """
    with path.open("rb") as file, sources.reading(path, "a pickle of arrays"):
        return _ArrayUnpickler(file).load()


def check(folder: Path, split: str) -> None:
    """Finds out whether all recordings of a key of `sequences.SPLITS` are there and can be read."""
    for table in sequences.tables(split):
        if not list(_recordings(folder, table)):
            raise FileError(f"{folder / FILES[table]} holds no frames.")


def read(folder: Path, split: str, subset: str) -> Iterator[dict[str, np.ndarray]]:
    """Reads subject by subject, action by action, as the authors' loader does, 256 at a time."""
    first_row = 0
    for sequence, arrays in _recordings(folder, sequences.table(split, subset)):
        frames, points_mm, fits = arrays
        rows = np.arange(first_row, first_row + len(frames))
        first_row += len(frames)
        if sequence.subject not in sequences.SPLITS[split][subset]:
            continue
        for start in range(0, len(frames), _FRAMES):
            here = slice(start, start + _FRAMES)
            yield {
                "heatmaps": render(fits[here]),
                "ambiguous": np.any(fits[here][..., [3, 5]] > AMBIGUOUS_SIGMA, axis=(1, 2)),
                **sequences.columns(sequence, frames[here], rows[here], points_mm[here]),
            }


def _recordings(folder: Path, table: str) -> Iterator[tuple[Sequence, _Arrays]]:
    """Goes through a pickle in the authors' order."""
    path = folder / FILES[table]
    content = load_arrays(path)
    for subject in sequences.SPLITS["standard"][table]:
        for sequence in sequences.expected(subject, sequences.ACTIONS):
            keys = (subject, sequence.action, str(sequence.subaction), sequence.camera)
            part = content
            for key in keys:
                part = part.get(key) if isinstance(part, dict) else None
            what = f"{path}: {'/'.join(keys)}"
            if not isinstance(part, dict):
                raise FileError(f"{what} is missing.")
            if len(part.get("imgpath", ())):
                yield sequence, _arrays(part, what)


def _arrays(part: dict[str, Any], what: str) -> _Arrays:
    """The frames, from 0, of a recording's images, its poses and its fits."""
    try:
        # An image's name is such as "/S9/Directions.54138969/4.jpg".
        frames = np.array([int(Path(name).stem) - 1 for name in part["imgpath"]])
        points_mm = part["3d_gt"].reshape(len(frames), 3, NUM_JOINTS).swapaxes(1, 2)
        fits = part["gaussfit"].reshape(len(frames), NUM_HEATMAPS, 7)
        if not (np.isfinite(points_mm).all() and np.isfinite(fits).all()):
            raise ValueError("it holds NaN or infinity")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{what} is not as the authors' create_data.py writes it (which adds 3d_gt):"
            f" {type(error).__name__} {str(error)[:300]}"
        ) from error
    return frames, points_mm, fits


def render(fits: Float[np.ndarray, "*N 7"]) -> Float32[np.ndarray, "*N 64 64"]:
    """Renders fitted Gaussians: amplitude, x, y, sigma_x, theta, sigma_y and error each.

    With u = cos(theta) (x - x_0) - sin(theta) (y - y_0) and v = sin(theta) (x - x_0) +
    cos(theta) (y - y_0), a heatmap is amplitude exp(-u^2 / 2 sigma_x^2 - v^2 / 2 sigma_y^2).
    Widths count by their absolute values; below 0.2 they are 0.2, as the authors clip them.
    """
    amplitude, x0, y0, sigma_x, theta, sigma_y = (
        fits[..., i, None, None].astype(np.float32) for i in range(6)
    )
    cells = np.arange(HEATMAP_SIZE, dtype=np.float32)
    dx, dy = cells - x0, cells[:, None] - y0
    u = np.cos(theta) * dx - np.sin(theta) * dy
    v = np.sin(theta) * dx + np.cos(theta) * dy
    sigma_x, sigma_y = (np.maximum(np.abs(sigma), 0.2) for sigma in (sigma_x, sigma_y))
    return amplitude * np.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))
