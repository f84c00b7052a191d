"""Weights of TensorFlow.js graph models: a JSON file with a manifest, and files of raw numbers.

The manifest lists groups; each has `paths`, files beside the JSON file, and `weights`, the name,
shape and type of the tensors that lie one after the other in those files, little-endian.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from diffpose_jax.io.files import read_json

_DTYPES = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4")}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a graph model's weights: its tensors by name, read-only.

    Args:
      path: the JSON file.

    Raises:
      FileNotFoundError: if the JSON file, or a file that it names, is not there.
      ValueError: if it is not such a model, or the files do not fit the manifest; the message
        names the file or the tensor.
    """
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    try:
        for group in read_json(path)["weightsManifest"]:
            # By their last part: nothing that lies in another folder.
            files = [path.with_name(Path(name).name) for name in group["paths"]]
            content, start = b"".join(file.read_bytes() for file in files), 0
            for entry in group["weights"]:
                name, shape = str(entry["name"]), tuple(entry["shape"])
                if "quantization" in entry or entry["dtype"] not in _DTYPES:
                    raise ValueError(f"{name} is quantised or {entry['dtype']}, which is not read")
                if start + 4 * math.prod(shape) > len(content):
                    raise ValueError(f"{files[0].name} ends before the tensor {name}: truncated?")
                flat = np.frombuffer(content, _DTYPES[entry["dtype"]], math.prod(shape), start)
                tensors[name] = flat.reshape(shape)
                start += flat.nbytes
            if start != len(content):
                raise ValueError(f"{len(content):,} bytes lie there for tensors of {start:,}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no TensorFlow.js graph model, or damaged: {error}") from error
    return tensors
