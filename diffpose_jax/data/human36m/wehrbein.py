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
import mmap
import pickle
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffpose_jax.data.human36m import sequences
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

FILES = {"train": "trainset_h36m.pickle", "test": "testset_h36m.pickle"}
HARD_SIGMA = 5.0
"""A frame belongs to H36MA if a fitted width is larger, in cells (2.5 x the 2 of the targets)."""

_WIDTHS = {"3d_gt": 3 * NUM_JOINTS, "gaussfit": 7 * NUM_HEATMAPS}
_FRAMES = 256
_MOST_FRAMES = 1_000_000

_FARTHEST = 1e6  # millimetres, and numbers of a fit

_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


class _Dtype:
    """Stands for `numpy.dtype` in a pickle: a plain type, whose byte order is set later."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[biuf][1248]|[OSU]\d{0,6}", name):
            raise pickle.UnpicklingError(f"it holds arrays of {name[:40]!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its content from a pickle only if there is as much as its shape says."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, of, is_fortran, content = state
        is_list = of.dtype.hasobject
        if not isinstance(content, list if is_list else (bytes, bytearray)):
            raise pickle.UnpicklingError("an array has no content")
        size = len(content) if is_list else len(content) // max(of.dtype.itemsize, 1)
        if math.prod(shape) != size:
            raise pickle.UnpicklingError(f"an array of {size} numbers cannot be {shape}")
        # A bool, whatever NumPy's stub says: its np.bool cannot be made an int, as C needs it.
        super().__setstate__((1, shape, of.dtype, bool(is_fortran), content))  # type: ignore[arg-type]


_NDARRAY = "numpy.ndarray"  # only the name: calling it would make an array of any size


def _reconstruct(kind: str, shape: tuple[int, ...], _: Any) -> _Array:
    """Makes the empty array that its content is given to."""
    if kind != _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it makes an array in another way than NumPy's")
    return _Array((0,), np.int8)


def _frombuffer(content: Any, of: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(content, of.dtype).reshape(shape, order=order)


# NumPy 1 and 2 name the modules of these differently. None of its own functions is called with
# what a file says.
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.{module}", name): part
    for core in ("core", "_core")
    for module, name, part in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("numeric", "_frombuffer", _frombuffer),
    )
} | {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Dtype}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and NumPy's arrays; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Gives what the file refers to by name.

        Raises:
            UnpicklingError: If that is not a part of an array.
        """
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(
                f"it holds {module[:60]}.{name[:60]}, which arrays and containers do not need. It "
                "was not loaded: loading it could run code. Make the file again by the authors' "
                "create_data.py"
            )
        return _ARRAY_PARTS[module, name]


def _check_numbering(content: mmap.mmap) -> None:
    """Goes through a pickle without running it.

    Python reserves memory for every number under which a pickle may keep an object, up to the
    highest that it names. A pickler counts them from 0.
    """
    kept = 0
    # A map has what it needs of a file.
    for opcode, number, _ in pickletools.genops(content):  # type: ignore[arg-type]
        if opcode.name in _PUTS:
            if number is None or number > kept:
                raise pickle.UnpicklingError("its objects are not numbered in turn")
            kept += 1


def load_arrays(path: Path) -> Any:
    """Loads a pickle of NumPy arrays in containers without running code from it.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a pickle, is cut off, or holds anything but arrays, numbers,
            strings, dicts, lists, tuples and sets.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; the folder must hold {FILES['train']} and "
            f"{FILES['test']} as the authors' create_data.py writes them."
        )
    with path.open("rb") as file:
        try:
            # In pages of the file: none of what it claims to hold is given memory beforehand.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _check_numbering(content)
                content.seek(0)
                return _ArrayUnpickler(content).load()
        # A damaged pickle can ask for anything, so anything can go wrong.
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {str(error)[:500]}") from error


def check(folder: Path, division: str) -> None:
    """Finds out whether all recordings of both splits are there and can be read.

    Args:
        folder: The folder of the pickles.
        division: A key of `sequences.SPLITS`.

    Raises:
        FileNotFoundError: If a pickle is missing.
        ValueError: If one holds anything but arrays, or not what it should hold.
    """
    for table in sorted({sequences.table(division, split) for split in ("train", "test")}):
        if not list(_recordings(folder, table)):
            raise ValueError(f"{folder / FILES[table]} holds no frames.")


def read(folder: Path, division: str, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Reads a split: subject by subject, action by action, as the authors' loader does.

    Args:
        folder: The folder of the pickles, see `check`.
        division: A key of `sequences.SPLITS`.
        split: "train" or "test".

    Yields:
        Columns of up to 256 frames: `heatmaps` (n, 16, 64, 64) float32, rendered from the fits,
        `hard` (n,) bool, and those of `sequences.columns`.
    """
    first_row = 0
    for sequence, part in _recordings(folder, sequences.table(division, split)):
        count = len(part["imgpath"])
        rows = np.arange(first_row, first_row + count)
        first_row += count
        if sequence.subject not in sequences.SPLITS[division][split]:
            continue
        frames = part["imgpath"]
        points_mm = part["3d_gt"].reshape(-1, 3, NUM_JOINTS).swapaxes(1, 2)
        for start in range(0, count, _FRAMES):
            here = slice(start, start + _FRAMES)
            fits = part["gaussfit"][here].reshape(-1, NUM_HEATMAPS, 7)
            yield {
                "heatmaps": render(fits),
                "hard": np.any(fits[..., [3, 5]] > HARD_SIGMA, axis=(1, 2)),
                **sequences.columns(sequence, frames[here], rows[here], points_mm[here]),
            }


def _recordings(folder: Path, table: str) -> Iterator[tuple[Sequence, dict[str, np.ndarray]]]:
    """Goes through a pickle in the authors' order; `imgpath` comes as frames (F,) from 0."""
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
                raise ValueError(f"{what} is missing.")
            names = part.get("imgpath", ())
            if not isinstance(names, (list, tuple, np.ndarray)):
                raise ValueError(f"{what}: imgpath is no list.")
            if len(names):
                yield sequence, _check_part(part, what)


def _check_part(part: dict[str, Any], what: str) -> dict[str, np.ndarray]:
    names = part["imgpath"]
    arrays = {"imgpath": np.array([_frame(str(name)[:200], what) for name in names], np.int64)}
    for key, width in _WIDTHS.items():
        if key not in part:
            hint = "; run the authors' create_data.py, which adds the poses" * (key == "3d_gt")
            raise ValueError(f"{what} has no {key}{hint}.")
        expected = (len(names), width)
        array = part[key]
        # Not made of lists: they may hold each other many times over.
        if not isinstance(array, np.ndarray) or array.shape != expected or array.dtype.kind != "f":
            found = f"{np.shape(array)} {array.dtype}" if isinstance(array, np.ndarray) else "none"
            raise ValueError(
                f"{what}: {key} is {found}; it must be {expected} of floating-point numbers, a row"
                " for each of imgpath."
            )
        if not (np.abs(array) < _FARTHEST).all():  # nan is refused, too
            raise ValueError(f"{what}: {key} holds NaN, infinity or what is far too large.")
        arrays[key] = array.view(np.ndarray)
    return arrays


def _frame(name: str, what: str) -> int:
    """Tells the frame, from 0, of an image's name such as "/S9/Directions.54138969/4.jpg"."""
    number = Path(name).stem
    if not (number.isdecimal() and 0 < int(number[:10]) <= _MOST_FRAMES and len(number) <= 10):
        raise ValueError(f"{what}: imgpath holds {name!r}; it must end in the frame's number.")
    return int(number) - 1


def render(fits: np.ndarray) -> np.ndarray:
    """Renders fitted Gaussians.

    With u = cos(theta) (x - x_0) - sin(theta) (y - y_0) and v = sin(theta) (x - x_0) +
    cos(theta) (y - y_0), a heatmap is amplitude exp(-u^2 / 2 sigma_x^2 - v^2 / 2 sigma_y^2).
    Widths count by their absolute values; below 0.2 they are 0.2, as the authors clip them.

    Args:
        fits: (..., 7) numbers a joint, in the order that the module's docstring gives.

    Returns:
        (..., 64, 64) float32, row = y, column = x.
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
