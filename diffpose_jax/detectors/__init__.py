"""Detectors: crops of people to the heatmaps of their joints.

A detector is a network with converted weights; `experiments.convert` writes the folder that
`load` reads. Cutting crops out of pictures is `detectors.crops`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jaxtyping import Float

from diffpose_jax.detectors import efficientpose, hrnet
from diffpose_jax.io import files, trees
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

FORMAT = "diffpose_jax detector 1"

_NETWORKS = {
    "hrnet_w32": (hrnet, hrnet.HRNet),
    "efficientpose_ii_lite": (efficientpose, efficientpose.EfficientPose),
}
_DTYPES = ("float32", "bfloat16")
_METADATA, _WEIGHTS = "detector.json", "weights"


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A network that finds joints, with its weights: what `load` returns.

    Attributes:
      network: linen module, preprocessed crops (B, P, P, 3) -> heatmaps (B, 16, 64, 64).
      preprocess: crops (B, P, P, 3) uint8 -> what the network reads.
      params: of the network.
      input_px: P, the side of the crops that it reads.
      fingerprint: the network's name and a hash of all that its heatmaps depend on: another one
        finds other heatmaps.
    """

    network: nn.Module
    preprocess: Callable[[Array], Array]
    params: Mapping[str, Any]
    input_px: int
    fingerprint: str

    def heatmaps(self, crops: np.ndarray) -> Float[np.ndarray, "B 16 64 64"]:
        """Detects the joints of the person in the middle of each crop.

        The heatmaps are as the network gives them, neither normalised nor clamped, in MPII order.

        Args:
          crops: (B, P, P, 3) uint8, RGB, as `crops.square_crop_image` cuts them.

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
        # Chunks of one shape: bounded memory and a single compilation. A CPU is busy with two
        # images, and more do not speed it up.
        chunk = 2 if jax.default_backend() == "cpu" else 64
        heatmaps = np.empty((len(crops), NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE), np.float32)
        for start in range(0, len(crops), chunk):
            part = crops[start : start + chunk]
            filled = jnp.asarray(np.resize(part, (chunk, *shape)))
            found = _detect(self.network, self.preprocess, self.params, filled)
            heatmaps[start : start + chunk] = np.asarray(found)[: len(part)]
        return heatmaps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _detect(network: nn.Module, preprocess: Any, params: Any, crops: Array) -> Array:
    return cast(Array, network.apply({"params": params}, preprocess(crops)))


def save(folder: str | Path, network: str, params: Mapping[str, Any]) -> None:
    """Writes a network's converted weights as a new folder that `load` reads.

    Args:
      folder: the folder; a CheckpointError if it is there already.
      network: "hrnet_w32" or "efficientpose_ii_lite".
      params: the network's parameters, such as `hrnet.from_torch` and `efficientpose.convert` give.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is there already: choose another or remove it")
    trees.save_tree(folder / _WEIGHTS, dict(params))
    # Last: where this file is, the weights are whole.
    files.write_json(folder / _METADATA, {"format": FORMAT, "network": network})


def load(folder: str | Path, input_px: int | None = None, dtype: str = "float32") -> Detector:
    """Reads a detector.

    Args:
      folder: what `save` wrote.
      input_px: side of the crops that it shall read; by default 256 for HRNet, as it was published
        (the published DiffPose program has 255), and 276 for EfficientPose.
      dtype: type of the network's products, "float32" or "bfloat16".

    Raises:
      CheckpointError: if the folder is not such a folder, or of another version.
      ValueError: if the network cannot read crops of that size, or for another `dtype`.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    try:
        metadata = files.read_json(folder / _METADATA)
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        name = metadata["network"]
        module, network_class = _NETWORKS[name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a converted detector ({_METADATA}: {str(error)[:300]});"
            " experiments.convert makes one from published weights"
        ) from error
    input_px = input_px or module.INPUT_PX
    network = network_class(dtype=jnp.dtype(dtype))
    crops = jax.ShapeDtypeStruct((1, input_px, input_px, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), crops)["params"]
    params = trees.load_tree(folder / _WEIGHTS, expected)
    fingerprint = f"{name}-{_hash(params, f'{input_px} {dtype}')}"
    return Detector(network, module.preprocess, jax.device_put(params), input_px, fingerprint)


def _hash(params: Mapping[str, Any], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:12]
