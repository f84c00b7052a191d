"""Detectors: crops of people to the heatmaps of their joints.

A detector is a network with converted weights; `experiments.convert` writes the folder that
`load` reads. Cutting crops out of pictures is `detectors.crops`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jaxtyping import Float

from diffpose_jax.detectors import efficientpose, hrnet, movenet
from diffpose_jax.io import files, trees
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

FORMAT = "diffpose_jax detector 1"

_NETWORKS = {  # with the usual side of the crops
    "hrnet_w32": (hrnet.HRNet, hrnet.INPUT_PX),
    "efficientpose_ii_lite": (efficientpose.EfficientPose, efficientpose.INPUT_PX),
    "movenet_thunder": (movenet.MoveNet, movenet.INPUT_PX),
}
_METADATA, _WEIGHTS = "detector.json", "weights"


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A network that finds joints, with its weights: what `load` returns.

    Attributes:
      network: linen module, crops (B, P, P, 3) -> heatmaps (B, 16, 64, 64).
      params: of the network.
      input_px: P, the side of the crops that it reads.
      fingerprint: the network's name and a hash of all that its heatmaps depend on.
    """

    network: nn.Module
    params: Mapping[str, Any]
    input_px: int
    fingerprint: str

    def heatmaps(self, crops: np.ndarray) -> Float[np.ndarray, "B 16 64 64"]:
        """Detects the joints of the person in the middle of each crop (B, P, P, 3) uint8, RGB.

        The heatmaps are as the network gives them, neither normalised nor clamped, in MPII order.

        Raises:
          ValueError: for crops of another shape or type.
        """
        shape = (self.input_px, self.input_px, 3)
        if crops.shape[1:] != shape or crops.dtype != np.uint8:
            hint = " (one crop? add a leading axis: crops[None])" * (crops.shape == shape)
            raise ValueError(
                f"crops must be (B, {self.input_px}, {self.input_px}, 3) uint8, not"
                f" {crops.shape} {crops.dtype}{hint}"
            )
        # Chunks of one shape: bounded memory, one compilation. Two images keep a CPU busy.
        chunk = 2 if jax.default_backend() == "cpu" else 64
        heatmaps = np.empty((len(crops), NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE), np.float32)
        for start in range(0, len(crops), chunk):
            part = crops[start : start + chunk]
            filled = jnp.asarray(np.resize(part, (chunk, *shape)))
            found = _detect(self.network, self.params, filled)
            heatmaps[start : start + chunk] = np.asarray(found)[: len(part)]
        return heatmaps


@functools.partial(jax.jit, static_argnums=0)
def _detect(network: nn.Module, params: Any, crops: Array) -> Array:
    return cast(Array, network.apply({"params": params}, crops))


def save(folder: str | Path, network: str, params: Mapping[str, Any]) -> None:
    """Writes the parameters of a network as a new folder to `load`.

    Args:
      folder: to be made.
      network: "hrnet_w32", "efficientpose_ii_lite" or "movenet_thunder".
      params: its parameters.

    Raises:
      CheckpointError: if the folder is there already.
    """
    folder = Path(folder)
    trees.check_new(folder)
    trees.save_tree(folder / _WEIGHTS, dict(params))
    # Last: where this file is, the weights are whole.
    files.write_json(folder / _METADATA, {"format": FORMAT, "network": network})


def load(folder: str | Path, input_px: int | None = None, dtype: str = "float32") -> Detector:
    """Reads a detector.

    Args:
      folder: what `save` wrote.
      input_px: side of the crops that it shall read; by default 256 for HRNet, as it was published
        (the published DiffPose program has 255), 276 for EfficientPose, and 256 for MoveNet.
      dtype: of the network's products, "float32" or "bfloat16".

    Raises:
      CheckpointError: if the folder is not such a folder, or of another version.
      ValueError: if the network cannot read crops of that size, or for another `dtype`.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"the dtype must be one of float32, bfloat16, not {dtype!r}")
    try:
        metadata = files.read_json(folder / _METADATA)
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        name = metadata["network"]
        network_class, usual_px = _NETWORKS[name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a converted detector ({_METADATA}: {str(error)[:300]});"
            " experiments.convert makes one from published weights"
        ) from error
    input_px = input_px or usual_px
    network = network_class(dtype=jnp.dtype(dtype))
    crops = jax.ShapeDtypeStruct((1, input_px, input_px, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), crops)["params"]
    params = trees.load_tree(folder / _WEIGHTS, expected)
    fingerprint = f"{name}-{_hash(params, f'{input_px} {dtype}')}"
    return Detector(network, jax.device_put(params), input_px, fingerprint)


def _hash(params: Mapping[str, Any], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:12]
