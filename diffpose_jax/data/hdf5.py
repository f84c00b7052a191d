"""Reads HDF5 files: only what lies in the file itself, and no more than lies there.

HDF5 can send a reader on to other files of the user (external links, virtual data sets, raw data
elsewhere), and reads rows that are announced but missing as zeros.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpose_jax.data import sources
from diffpose_jax.io import extras
from diffpose_jax.io.files import FileError


@contextlib.contextmanager
def opened(path: Path, extra: str) -> Iterator[Any]:
    """Opens a file with h5py, of an extra; whatever goes wrong in the context is told of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      FileError: if it is no HDF5 file, or cannot be read.
      MissingExtraError: if h5py is not installed.
    """
    h5py = extras.load("h5py", extra)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not h5py.is_hdf5(path):
        raise FileError(f"{path} is not an HDF5 file (in MATLAB: save with -v7.3), or cut off")
    with sources.reading(path, "an HDF5 file"), h5py.File(path, "r") as file:
        yield file


def dataset(file: Any, name: str) -> Any:
    """Finds a data set (`h5py.Dataset`) by its path in an opened file; None if there is none.

    Raises:
      FileError: if it lies in another file, or fewer rows are there than it says.
    """
    node = file.get(name)
    if node is None or not hasattr(node, "dtype"):
        return None
    if node.file != file or node.is_virtual or node.external:
        raise FileError(f"{file.filename}: {name} lies in another file, which is not read")
    if node.chunks is None:
        stored = node.id.get_storage_size() // node.dtype.itemsize
    else:
        stored = node.id.get_num_chunks() * math.prod(node.chunks)
    if stored < node.size:
        raise FileError(f"{file.filename}: {name} holds fewer rows than it announces; get it anew")
    return node
