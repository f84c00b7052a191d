"""The data set file that DiffPose's published preprocessing writes: poses and heatmaps in HDF5.

PyTables wrote it: `/dataset/trainset` and `/dataset/testset` are tables with one row per image in
the order of subjects, file names and frames. Of a row are read `gt_3d` (3, 17), millimetres in
camera coordinates, `heatmap` (16, 64, 64) float16, `hardsubset` (the frame list of Wehrbein et
al.'s ambiguous subset H36MA) and where the image is from: `subject`, `action`, `subaction`, `cam`,
`frame_orig` (counted from 0). Its `argmax_2d` is (row, column) over 64, all else (x, y).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffpose_jax.data import cameras, hdf5
from diffpose_jax.data.human36m import sequences
from diffpose_jax.io import extras
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

_FIELDS = {
    "action": ("S", ()),
    "cam": ("S", ()),
    "frame_orig": ("iu", ()),
    "gt_3d": ("f", (3, NUM_JOINTS)),
    "hardsubset": ("iub", (1,)),
    "heatmap": ("f", (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)),
    "subaction": ("S", ()),
    "subject": ("S", ()),
}
"""Kinds and shapes of the columns."""

_ROWS = 256
_PIECE_ROWS = 64 * _ROWS
_EXTRA = "human36m"
_FARTHEST_MM = 1e6
_TEXT = {"action", "cam", "subaction", "subject"}


def check(path: Path, division: str) -> None:
    """Finds out whether the file can be read, without reading it whole.

    Args:
        path: The file.
        division: A key of `sequences.SPLITS`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not HDF5, lacks a table or a column, or its rows cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give the released HDF5 file.")
    h5py = extras.load("h5py", "human36m")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file, or only the beginning of one.")
    with hdf5.opened(path, _EXTRA) as file:
        for name in sorted({_table(division, split) for split in ("train", "test")}):
            _check_table(hdf5.dataset(file, name), f"{path}: {name}")


def _check_table(table: Any, what: str) -> None:
    if table is None or table.dtype.names is None or not len(table):
        raise hdf5.Hdf5Error(
            f"{what} is missing, empty or not a table; the file must hold /dataset/trainset and "
            "/dataset/testset as the published preprocessing writes them."
        )
    for field, (kinds, shape) in _FIELDS.items():
        kind = table.dtype.fields.get(field, [None])[0]
        # PyTables writes a single flag as one number or as an array of one.
        if kind is None or (kind.shape != shape and (field, kind.shape) != ("hardsubset", ())):
            found = "is missing" if kind is None else f"has shape {kind.shape}"
            raise hdf5.Hdf5Error(f"{what}: column {field} {found}; it must have shape {shape}.")
        if kind.base.kind not in kinds:
            raise hdf5.Hdf5Error(f"{what}: column {field} has the wrong type, {kind.base}.")
    try:
        # Also shows whether the compression is one that h5py knows, and whether the end is there.
        table.fields(list(_FIELDS))[[0, len(table) - 1] if len(table) > 1 else [0]]
    except OSError as error:
        raise hdf5.Hdf5Error(f"{what} cannot be read: {error}") from error


def pieces(path: Path, division: str, split: str) -> list[range]:
    """Divides the rows of a checked file's table into pieces to read on their own.

    The validation split takes some rows of the table, which stay one piece: which ones cannot be
    told without reading all of them.

    Args:
        path: The file.
        division: A key of `sequences.SPLITS`.
        split: "train" or "test".
    """
    with hdf5.opened(path, _EXTRA) as file:
        size = len(hdf5.dataset(file, _table(division, split)))
    step = size if division == "validation" else _PIECE_ROWS
    return [range(start, min(start + step, size)) for start in range(0, size, step)]


def read(path: Path, division: str, split: str, piece: range) -> Iterator[dict[str, np.ndarray]]:
    """Reads a piece of a split in the order of its table.

    Args:
        path: The file, see `check`.
        division: A key of `sequences.SPLITS`.
        split: "train" or "test".
        piece: One of `pieces`.

    Yields:
        Columns of up to 256 rows: `heatmaps` (n, 16, 64, 64) float16, `pose_mm` (n, 17, 3) float32
        and `subject`, `action`, `camera`, `subaction`, `frame`, `row`, `hard` (n,).

    Raises:
        ValueError: If rows cannot be read, or hold what cannot be.
    """
    name = _table(division, split)
    with hdf5.opened(path, _EXTRA) as file:
        fields = hdf5.dataset(file, name).fields(list(_FIELDS))
        for start in range(piece.start, piece.stop, _ROWS):
            rows = fields[start : min(start + _ROWS, piece.stop)]
            try:
                chunk = _columns(rows, np.arange(start, start + len(rows), dtype=np.int32))
            except ValueError as error:
                raise hdf5.Hdf5Error(
                    f"{path}: {name}, rows from {start}: {str(error)[:200]}"
                ) from error
            used = np.isin(chunk["subject"], sequences.SPLITS[division][split])
            if used.any():
                yield {name: column[used] for name, column in chunk.items()}


def _table(division: str, split: str) -> str:
    return f"/dataset/{sequences.table(division, split)}set"


def _columns(rows: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
    text = {field: np.char.decode(rows[field], "ascii") for field in _TEXT}
    # nan is refused, too
    if not (np.abs(rows["gt_3d"]) < _FARTHEST_MM).all() or not np.isfinite(rows["heatmap"]).all():
        raise ValueError("a pose or a heatmap is not finite, or far away")
    if not ((rows["frame_orig"] >= 0) & (rows["frame_orig"] < 2**31)).all():
        raise ValueError("frame_orig is no number of a frame")
    points_mm = rows["gt_3d"].astype(np.float64).swapaxes(1, 2)
    return {
        "heatmaps": rows["heatmap"],
        "pose_mm": cameras.output_pose(points_mm).astype(np.float32),
        "subject": text["subject"],
        "action": text["action"],
        "subaction": text["subaction"].astype(np.int32),
        "camera": text["cam"],
        "frame": rows["frame_orig"].astype(np.int32),
        "row": places,
        "hard": rows["hardsubset"].reshape(-1).astype(bool),
    }
