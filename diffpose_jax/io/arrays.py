"""NumPy's files: .npz as bytes, and files of strangers read without Python objects."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_UNPACKED_BYTES = 1 << 30  # what is larger can be given as .npy, which is not packed


def npz_bytes(content: Mapping[str, Any], *, compressed: bool = False) -> bytes:
    """The content of a .npz file, for `files.write_atomic`."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **content)
    return buffer.getvalue()


def read(path: str | os.PathLike[str]) -> np.ndarray | dict[str, np.ndarray]:
    """Reads a .npy file, or all arrays of a .npz file by their names; its content tells which.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a file, is damaged, holds Python objects, or unpacks to more
        than `MAX_UNPACKED_BYTES`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            size = sum(member.file_size for member in content.zip.infolist())
            if size > MAX_UNPACKED_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
            # `asarray`, as what is no array comes as bytes.
            return {name: np.asarray(array) for name, array in content.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, for what is damaged
        reason = str(error) or type(error).__name__
        if "pickle" in reason:  # NumPy advises to let the file run code
            reason = "Python objects are not loaded, as they could run code"
        raise ValueError(
            f"{path} is not a .npy or .npz file of numbers, or is damaged: {reason[:200]}"
        ) from error
