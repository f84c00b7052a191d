"""Reads HDF5 files of strangers: only what lies in the file itself, and no more than lies there.

HDF5 can send a reader on to other files (external links, virtual data sets, raw data elsewhere),
and can announce more rows than it holds: those that are missing are read as zeros, in any number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpose_jax import extras

_MOST_CHUNK_BYTES = 256 << 20


class Hdf5Error(ValueError):
    """A file is damaged or holds something else; the message names it."""


@contextlib.contextmanager
def opened(path: Path, extra: str) -> Iterator[Any]:
    """Opens a file for reading; whatever goes wrong within the context is told of the file.

    Args:
      path: the file.
      extra: the package's extra that installs h5py.

    Raises:
      Hdf5Error: if it is no HDF5 file, or cannot be read.
      MissingExtraError: if h5py is not installed.
    """
    h5py = extras.load("h5py", extra)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except Hdf5Error:
        raise
    # h5py has an error of another kind for each damage.
    except Exception as error:
        raise Hdf5Error(f"{path} is damaged, get it anew: {str(error)[:300]}") from error


def dataset(file: Any, name: str) -> Any:
    """Finds a data set that lies whole in the file.

    Args:
      file: from `opened`.
      name: its path in the file.

    Returns:
      The data set, an `h5py.Dataset`; None if there is none of that name.

    Raises:
      Hdf5Error: if it lies in another file, or fewer rows are there than it says.
    """
    h5py = extras.load("h5py", "human36m")
    node = file
    for part in name.strip("/").split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise Hdf5Error(f"{file.filename}: {name} is a link, which is not followed")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        return None
    if node.is_virtual or node.external:
        raise Hdf5Error(f"{file.filename}: {name} lies in another file, which is not read")
    if node.chunks is None:
        is_whole = node.id.get_storage_size() >= node.nbytes
    else:
        in_chunk = math.prod(node.chunks)
        is_whole = (
            in_chunk * node.dtype.itemsize <= _MOST_CHUNK_BYTES
            and node.id.get_num_chunks() * in_chunk >= node.size
        )
    if not is_whole:
        raise Hdf5Error(f"{file.filename}: {name} cannot be read, it is not whole or is damaged")
    return node
