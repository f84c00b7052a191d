"""Reads HDF5 files of strangers: only what lies in the file itself, and no more than lies there.

HDF5 can send a reader on to other files (external links, virtual data sets, raw data elsewhere),
can announce more rows than it holds: those that are missing are read as zeros, in any number; and
unpacks a chunk to whatever its bytes say, not to the size that chunks have.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpose_jax.io import extras

_MOST_CHUNK_BYTES = 256 << 20
_MOST_PACKED_BYTES = 512 << 10
"""Of a chunk that is taken without a look: deflate makes at most 1,032 times as many of them."""
_MOST_PACKED_LZF_BYTES = 6 << 20
"""The same for LZF, which makes at most 88 times as many, and for which a look is not possible."""


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
      Hdf5Error: if it lies in another file, fewer rows are there than it says, or more.
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
    if not _unpacks_to_chunks(file.filename, Path(file.filename).stat().st_mtime_ns, name):
        raise Hdf5Error(f"{file.filename}: {name} is not read, it unpacks to more than it says")
    return node


@functools.lru_cache
def _unpacks_to_chunks(path: str, _written_ns: int, name: str) -> bool:
    """Whether no chunk unpacks to so much more than a chunk's size that it fills the memory."""
    h5py = extras.load("h5py", "human36m")
    z = h5py.h5z
    with h5py.File(path, "r") as file:
        node = file[name]
        properties = node.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        packing = [each for each in filters if each not in (z.FILTER_SHUFFLE, z.FILTER_FLETCHER32)]
        if packing not in ([z.FILTER_DEFLATE], [z.FILTER_LZF]):
            return len(packing) < 2  # of two, one would unpack what the other has made
        is_deflate = packing == [z.FILTER_DEFLATE]
        most = _MOST_PACKED_BYTES if is_deflate else _MOST_PACKED_LZF_BYTES
        large = []

        def collect(chunk: Any) -> None:
            if chunk.size > most:
                large.append(chunk)

        node.id.chunk_iter(collect)
        size = math.prod(node.chunks) * node.dtype.itemsize
        return all(
            is_deflate
            and chunk.size <= 2 * size  # what does not become smaller is stored as it is
            and _unpacked_bytes(node.id.read_direct_chunk(chunk.chunk_offset)[1], size + 1) <= size
            for chunk in large
        )


def _unpacked_bytes(packed: bytes, most: int) -> int:
    """To how many bytes, at most, deflate unpacks these."""
    try:
        return len(zlib.decompressobj().decompress(packed, most))
    except zlib.error:  # stored as it is, or damaged, which reading it will tell
        return 0
