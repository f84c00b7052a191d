"""Weights of TensorFlow.js graph models: a JSON file with a manifest, and files of raw numbers.

The manifest lists groups; each has `paths`, files beside the JSON file, and `weights`, the name,
shape and type of the tensors that lie one after the other in those files, little-endian.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from diffpose_jax.io.files import read_json

_DTYPES = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4")}
_MAX_BYTES = 256 << 20


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a graph model's weights.

    Args:
      path: the JSON file.

    Returns:
      The tensors by name, read-only.

    Raises:
      FileNotFoundError: if the JSON file, or a file that it names, is not there.
      ValueError: if it is not such a model, or the files do not fit the manifest; the message
        names the file or the tensor.
    """
    path = Path(path)
    try:
        manifest = read_json(path)["weightsManifest"]
        groups = [(list(group["paths"]), list(group["weights"])) for group in manifest]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not a TensorFlow.js graph model: it holds no readable weightsManifest"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    # All of them first, as one may be named many times.
    files = [[_beside(path, name) for name in names] for names, _ in groups]
    if sum(file.stat().st_size for of_group in files for file in of_group) > _MAX_BYTES:
        raise ValueError(f"{path}: its files hold more than {_MAX_BYTES:,} bytes")
    for of_group, (_, entries) in zip(files, groups, strict=True):
        content = b"".join(file.read_bytes() for file in of_group)
        names = ", ".join(file.name for file in of_group[:5])
        start = 0
        for entry in entries:
            name, shape, dtype = _described(path, entry)
            if name in tensors:
                raise ValueError(f"{path}: the tensor {name} is there twice")
            size = math.prod(shape)
            end = start + size * dtype.itemsize
            if end > len(content):
                raise ValueError(
                    f"{path}: {names} should hold {end:,} bytes up to the tensor"
                    f" {name}, but holds {len(content):,}: truncated?"
                )
            tensors[name] = np.frombuffer(content, dtype, size, start).reshape(shape)
            start = end
        if start != len(content):
            raise ValueError(
                f"{path}: {names} holds {len(content):,} bytes, its tensors have {start:,}"
            )
    return tensors


def _beside(path: Path, name: Any) -> Path:
    """A file that the manifest names; nothing that lies in another folder."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
        raise ValueError(f"{path}: its manifest names a file {name!r:.100}, which is not beside it")
    beside = path.with_name(name)
    try:
        beside.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # too long, or not of letters
        raise ValueError(f"{path}: no file can have the name {name!r:.100}") from error
    return beside


def _described(path: Path, entry: Any) -> tuple[str, tuple[int, ...], np.dtype]:
    """Name, shape and type of a tensor in the manifest."""
    try:
        name, shape, dtype = entry["name"], tuple(entry["shape"]), str(entry["dtype"])
        known = isinstance(name, str) and all(type(side) is int and side >= 0 for side in shape)
    except (LookupError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path}: its manifest describes no tensor with {str(entry)[:200]}")
    if dtype not in _DTYPES or "quantization" in entry:
        packed = ", quantised" * ("quantization" in entry)
        raise ValueError(
            f"{path}: the tensor {name} is {dtype}{packed}; only plain"
            f" {' and '.join(_DTYPES)} can be read"
        )
    return name, shape, _DTYPES[dtype]
