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
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from diffpose_jax.detectors import efficientpose, hrnet
from diffpose_jax.io import files, trees
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

FORMAT = "diffpose_jax detector 1"


class _Network(NamedTuple):
    module: Callable[..., nn.Module]
    preprocess: Callable[[Array], Array]
    input_px: int


_NETWORKS = {
    "hrnet_w32": _Network(hrnet.HRNet, hrnet.preprocess, 256),
    "efficientpose_ii_lite": _Network(
        efficientpose.EfficientPose, efficientpose.preprocess, efficientpose.INPUT_PX
    ),
}
_DTYPES = ("float32", "bfloat16")
_METADATA, _WEIGHTS = "detector.json", "weights"


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A network that finds joints, with its weights: what `load` returns.

    Attributes:
      network: preprocessed crops (B, P, P, 3) -> heatmaps (B, 16, 64, 64), a linen module.
      preprocess: crops (B, P, P, 3) uint8 -> what the network reads.
      params: the network's parameters.
      input_px: P, the side of the crops that it reads.
      fingerprint: the network's name and a hash of all that its heatmaps depend on: another one
        finds other heatmaps.
    """

    network: nn.Module
    preprocess: Callable[[Array], Array]
    params: Mapping[str, Any]
    input_px: int
    fingerprint: str

    def heatmaps(self, crops: np.ndarray) -> np.ndarray:
        """Detects the joints of the person in the middle of each crop.

        Args:
          crops: (B, P, P, 3) uint8, RGB, as `crops.square_crop_image` cuts them.

        Returns:
          (B, 16, 64, 64) float32, MPII joint order, as the network gives them: neither
          normalised nor clamped.

        Raises:
          ValueError: for crops of another shape or type.
        """
        shape = (self.input_px, self.input_px, 3)
        if crops.ndim != 4 or crops.shape[1:] != shape or crops.dtype != np.uint8:
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
def _detect(
    network: nn.Module,
    preprocess: Callable[[Array], Array],
    params: Mapping[str, Any],
    crops: Array,
) -> Array:
    return cast(Array, network.apply({"params": params}, preprocess(crops)))


def save(folder: str | Path, network: str, params: Mapping[str, Any]) -> None:
    """Writes a network's converted weights as a folder that `load` reads.

    Args:
      folder: where to; it must not be there yet.
      network: "hrnet_w32" or "efficientpose_ii_lite".
      params: the network's parameters, such as `hrnet.from_torch` and `efficientpose.convert` give.

    Raises:
      ValueError: if there is no such network.
      CheckpointError: if the folder is there already.
    """
    folder = Path(folder)
    if network not in _NETWORKS:
        raise ValueError(f"the network must be one of {', '.join(_NETWORKS)}, not {network!r}")
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
    name = _read_network_name(folder)
    module, preprocess, usual_px = _NETWORKS[name]
    input_px = usual_px if input_px is None else input_px
    network = module(dtype=jnp.dtype(dtype))
    crops = jax.ShapeDtypeStruct((1, input_px, input_px, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), crops)["params"]
    params = trees.load_tree(folder / _WEIGHTS, expected)
    fingerprint = f"{name}-{_hash(params, f'{input_px} {dtype}')}"
    return Detector(network, preprocess, jax.device_put(params), input_px, fingerprint)


def _hash(params: Mapping[str, Any], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:12]


def _read_network_name(folder: Path) -> str:
    try:
        metadata = files.read_json(folder / _METADATA)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a converted detector ({_METADATA}: {error}); experiments.convert"
            " makes one from published weights"
        ) from error
    found = metadata if isinstance(metadata, dict) else {}
    network = str(found.get("network"))
    if found.get("format") != FORMAT or network not in _NETWORKS:
        raise CheckpointError(
            f"{folder} is not a '{FORMAT}' of {' or '.join(_NETWORKS)}: {_METADATA} says"
            f" {str(metadata)[:300]}"
        )
    return network
