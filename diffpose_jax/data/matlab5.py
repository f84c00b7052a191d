"""Reads an array of numbers out of a MATLAB file of version 5 (up to -v7).

SciPy's reader takes the type of an element from the file as an index into a table of its own, in C
and unchecked (1.17): on a damaged file it crashes. Of the format, which The MathWorks describe in
"MAT-File Format", an array of numbers is a small part.

The file is 128 bytes of header and elements: a type, a size, and the content. An element of type 15
is another one, compressed. A variable (type 14) holds elements, too: flags, shape, name, numbers.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MOST_UNPACKED_BYTES = 64 << 20

_MATRIX, _COMPRESSED = 14, 15
_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_NUMBERS = range(6, 16)  # classes of variables: double, single and eight of whole numbers
_IS_COMPLEX = 0x800


class MatlabError(ValueError):
    """A file is damaged or no such file; the message names it."""


def read(path: Path, name: str) -> np.ndarray:
    """Reads a variable.

    Args:
      path: the file.
      name: the variable's.

    Returns:
      The array, real numbers of any type; its axes are those of MATLAB.

    Raises:
      FileNotFoundError: if there is no such file.
      MatlabError: if the file is none of version 5, is damaged, or has no such array of numbers.
    """
    data = path.read_bytes()
    names = []
    try:
        order = _byte_order(data)
        for matrix in _matrices(data, order):
            (_, flags), (_, shape), (_, found), *content = _elements(matrix, order)
            names.append(bytes(found).decode("ascii", "replace"))
            if names[-1] == name:
                return _array(flags, shape, content, order)
    # struct's for what ends too soon; zlib's for what is damaged within.
    except (ValueError, struct.error, zlib.error) as error:
        raise MatlabError(f"{path} is not a MATLAB version 5 file, or damaged: {error}") from error
    listed = ", ".join(found[:40] for found in names[:20]) or "nothing"
    raise MatlabError(f"{path} has no array {name}; it has {listed}.")


def _byte_order(data: bytes) -> str:
    if data[124:128] in (b"\0\2IM", b"\2\0MI"):
        raise ValueError("it is of version 7.3; save it with -v7")
    orders = {b"\0\1IM": "<", b"\1\0MI": ">"}
    if data[124:128] not in orders:
        raise ValueError("its header is another")
    return orders[data[124:128]]


def _matrices(data: bytes, order: str) -> Iterator[memoryview]:
    for kind, content in _elements(memoryview(data)[128:], order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, _MOST_UNPACKED_BYTES)
            if unpacker.unconsumed_tail:
                raise ValueError(f"it unpacks to more than {_MOST_UNPACKED_BYTES:,} bytes")
            kind, content = next(_elements(memoryview(unpacked), order), (0, memoryview(b"")))
        if kind == _MATRIX:
            yield content


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Types and contents."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        at += 8
        if kind >> 16:  # up to four bytes lie where the size would be
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("an element is larger than it can be")
            yield kind, data[at - 4 : at - 4 + size]
            continue
        if size > len(data) - at:
            raise ValueError("it is cut off")
        yield kind, data[at : at + size]
        at += size if kind == _COMPRESSED else -(-size // 8) * 8


def _array(
    flags: memoryview, shape: memoryview, content: list[tuple[int, memoryview]], order: str
) -> np.ndarray:
    (flag,) = struct.unpack_from(f"{order}I", flags)
    if flag & 0xFF not in _NUMBERS or flag & _IS_COMPLEX or len(content) != 1:
        raise ValueError("the variable is no array of real numbers")
    ((kind, numbers),) = content
    sizes = np.frombuffer(shape, f"{order}i4").tolist()
    if kind not in _TYPES:
        raise ValueError(f"its numbers are of the unknown type {kind}")
    array = np.frombuffer(numbers, order + _TYPES[kind])
    if min(sizes, default=0) < 0 or math.prod(sizes) != array.size:
        raise ValueError(f"it holds {array.size:,} numbers for an array of {sizes}"[:200])
    return array.reshape(sizes, order="F")
