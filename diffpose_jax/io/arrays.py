"""Reads NumPy's files: arrays of plain numbers and text, without trust in what a file says.

`numpy.load` makes an array as large as a header says before it looks for the numbers, and unpacks
whatever an archive holds. Here a header has to fit the bytes that are there, and an archive's sizes
are added up before anything is unpacked. Python objects, which can run code, are never loaded.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np

MAX_UNPACKED_BYTES = 1 << 30
"""The most that an archive may hold; what is larger can be given as .npy, which is not packed."""

_ZIP_MAGIC = b"PK"


def read(path: str | os.PathLike[str]) -> np.ndarray | dict[str, np.ndarray]:
    """Reads a .npy file, or all of a .npz file; its content tells which it is.

    Args:
      path: the file.

    Returns:
      The array, or the arrays by name; they may be read-only.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a file, is damaged, holds Python objects, or unpacks to more
        than `MAX_UNPACKED_BYTES`; the message names it and says why.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        return _unpack(data) if data.startswith(_ZIP_MAGIC) else _parse(data)
    # zipfile raises errors of many kinds for what is damaged. NumPy takes headers for Python, for
    # which its errors are those of a compiler.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a .npy or .npz file of numbers, or is damaged: {reason[:200]}"
        ) from error


def _unpack(data: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
        for member in members:
            # What NumPy writes. The other methods can ask for much memory before any output.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename!r} is packed in a way that NumPy does not")
            with archive.open(member) as file:
                # Without the number it would first unpack what is more than the file says.
                content = file.read(member.file_size)
            arrays[member.filename.removesuffix(".npy")] = _parse(content)
    return arrays


def _parse(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"its version is {version}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded: they could run code")
    found = len(data) - file.tell()
    if math.prod(shape) * dtype.itemsize != found:
        raise ValueError(f"{found:,} bytes follow its header, which says {shape} of {dtype}")
    if not found:
        return np.zeros(shape, dtype)
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if is_fortran else "C")
