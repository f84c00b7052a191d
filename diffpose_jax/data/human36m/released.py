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
from jaxtyping import Int32

from diffpose_jax.data import cameras, hdf5
from diffpose_jax.data.human36m import sequences
from diffpose_jax.io.files import FileError
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

_FIELDS: dict[str, tuple[int, ...]] = {
    "action": (),
    "cam": (),
    "frame_orig": (),
    "gt_3d": (3, NUM_JOINTS),
    "hardsubset": (1,),
    "heatmap": (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE),
    "subaction": (),
    "subject": (),
}
"""Shapes of the columns that are read."""

_ROWS = 256
_PIECE_ROWS = 64 * _ROWS
_EXTRA = "human36m"


def check(path: Path, split: str) -> None:
    """Finds out whether the file can be read for a key of `sequences.SPLITS`: its ends are read."""
    with hdf5.opened(path, _EXTRA) as file:
        for name in map(_path, sequences.tables(split)):
            _check_table(hdf5.dataset(file, name), f"{path}: {name}")


def _check_table(table: Any, what: str) -> None:
    if table is None or table.dtype.names is None or not len(table):
        raise FileError(
            f"{what} is missing, empty or not a table, as the published preprocessing writes it"
        )
    for field, shape in _FIELDS.items():
        kind = table.dtype.fields.get(field, [None])[0]
        # PyTables writes a single flag as one number or as an array of one.
        if kind is None or (kind.shape != shape and (field, kind.shape) != ("hardsubset", ())):
            found = "is missing" if kind is None else f"has shape {kind.shape}"
            raise FileError(f"{what}: column {field} {found}; it must have shape {shape}.")
    # Shows whether the compression is one that h5py knows, and whether the end is there.
    table.fields(list(_FIELDS))[[0, len(table) - 1] if len(table) > 1 else [0]]


def pieces(path: Path, split: str, subset: str) -> list[range]:
    """Divides the rows of a checked file's table into pieces to read on their own.

    The validation split takes some rows of the table, which stay one piece: which ones cannot be
    told without reading all of them.
    """
    with hdf5.opened(path, _EXTRA) as file:
        size = len(hdf5.dataset(file, _path(sequences.table(split, subset))))
    step = size if split == "validation" else _PIECE_ROWS
    return [range(start, min(start + step, size)) for start in range(0, size, step)]


def read(path: Path, split: str, subset: str, piece: range) -> Iterator[dict[str, np.ndarray]]:
    """Reads one of `pieces`, in the order of its table: columns of up to 256 rows."""
    with hdf5.opened(path, _EXTRA) as file:
        fields = hdf5.dataset(file, _path(sequences.table(split, subset))).fields(list(_FIELDS))
        for start in range(piece.start, piece.stop, _ROWS):
            stop = min(start + _ROWS, piece.stop)
            chunk = _columns(fields[start:stop], np.arange(start, stop, dtype=np.int32))
            used = np.isin(chunk["subject"], sequences.SPLITS[split][subset])
            if used.any():
                yield {name: column[used] for name, column in chunk.items()}


def _path(table: str) -> str:
    return f"/dataset/{table}set"


def _columns(rows: np.ndarray, table_rows: Int32[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    points_mm = rows["gt_3d"].astype(np.float64).swapaxes(1, 2)
    return {
        "heatmaps": rows["heatmap"],
        "pose_mm": cameras.output_pose(points_mm).astype(np.float32),
        "subject": np.char.decode(rows["subject"], "ascii"),
        "action": np.char.decode(rows["action"], "ascii"),
        "subaction": rows["subaction"].astype(np.int32),
        "camera": np.char.decode(rows["cam"], "ascii"),
        "frame": rows["frame_orig"].astype(np.int32),
        "row": table_rows,
        "ambiguous": rows["hardsubset"].reshape(-1).astype(bool),
    }
