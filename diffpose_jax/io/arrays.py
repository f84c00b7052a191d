"""NumPy's files: .npz as bytes, and files of strangers read without Python objects."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from diffpose_jax.io.files import write_atomic

_ABOUT = "fitted_on"
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


def write_tree(path: str | os.PathLike[str], tree: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes a nested dictionary of arrays as .npz, with plain values that say what it is of."""
    contents = {_ABOUT: json.dumps(about), **traverse_util.flatten_dict(tree, sep="/")}
    write_atomic(path, npz_bytes(contents))


def read_tree(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `write_tree` wrote: the arrays, and the plain values.

    Raises:
      ValueError: if the file is damaged.
      FileNotFoundError: if there is no such file.
    """
    try:
        arrays = dict(read(path))
        about = dict(json.loads(str(arrays.pop(_ABOUT))))
        return traverse_util.unflatten_dict(arrays, sep="/"), about
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
