"""HRNet-W32 with the MPII head: 16 joint heatmaps of a person's crop, for inference.

Sun et al., Deep High-Resolution Representation Learning for Human Pose Estimation (CVPR 2019).
A parameter's path is the name of the published PyTorch tensor. `from_torch` folds the published
batch normalisation, with stored statistics a scale and a shift, into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num

from diffpose_jax.io import trees
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

INPUT_PX = 256  # as it was published; it reads crops of 253 to 256 pixels
_LAST = "final_layer"
_WIDTH = 32  # channels of the branch of the highest resolution; each next one has twice as many
_BLOCKS = 4  # residual blocks of the first stage, and of a branch in a module of the others
_MODULES = {2: 1, 3: 4, 4: 3}  # modules of a stage, which has as many branches as its number
_BATCH_NORM_EPSILON = 1e-5  # PyTorch's, with which the published network was trained
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's RGB

Branch = Float[Array, "B H W K"]


class _Convolutions(nn.Module):
    """Parent of the modules below: `dtype` is the type of their convolutions."""

    dtype: DTypeLike = jnp.float32

    def conv(self, features: int, size: int, stride: int = 1, *, name: str) -> nn.Conv:
        """A convolution padded as PyTorch does: alike on both sides, also with a stride."""
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=size // 2,
            dtype=self.dtype,
            # Full products: in float32 a GPU would round their factors to ten bits.
            precision=jax.lax.Precision.HIGHEST,
            name=name,
        )


class Bottleneck(_Convolutions):
    """Residual block of the first stage: 64 channels within, 256 out."""

    @nn.compact
    def __call__(self, x: Branch) -> Float[Array, "B H W 256"]:
        """Gives 256 channels."""
        y = nn.relu(self.conv(64, 1, name="conv1")(x))
        y = nn.relu(self.conv(64, 3, name="conv2")(y))
        y = self.conv(256, 1, name="conv3")(y)
        if x.shape != y.shape:
            x = self.conv(256, 1, name="downsample.0")(x)
        return nn.relu(x + y)


class BasicBlock(_Convolutions):
    """Residual block of a branch."""

    @nn.compact
    def __call__(self, x: Branch) -> Branch:
        """Gives the same shape."""
        y = nn.relu(self.conv(x.shape[-1], 3, name="conv1")(x))
        return nn.relu(x + self.conv(x.shape[-1], 3, name="conv2")(y))


class HighResolutionModule(_Convolutions):
    """Branches of halving resolution, side by side, that exchange what they found at the end."""

    num_outputs: int = 1

    @nn.compact
    def __call__(self, branches: list[Array]) -> list[Array]:
        """Branches (B, 64 / 2^b, 64 / 2^b, 32 * 2^b) to the first `num_outputs` of them."""
        branches = list(branches)
        for b in range(len(branches)):
            for i in range(_BLOCKS):
                branches[b] = BasicBlock(self.dtype, name=f"branches.{b}.{i}")(branches[b])
        return [
            nn.relu(sum(self._resample(x, source, target) for source, x in enumerate(branches)))
            for target in range(self.num_outputs)
        ]

    def _resample(self, x: Array, source: int, target: int) -> Array:
        """Brings a branch to the resolution and the channels of another."""
        name = f"fuse_layers.{target}.{source}"
        if source > target:
            x = self.conv(_WIDTH << target, 1, name=f"{name}.0")(x)
            factor = 1 << (source - target)
            return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
        for i in range(target - source):
            last = i == target - source - 1
            x = self.conv(_WIDTH << (target if last else source), 3, 2, name=f"{name}.{i}.0")(x)
            x = x if last else nn.relu(x)
        return x


class HRNet(_Convolutions):
    """HRNet-W32: crops, RGB of 0 to 255, to heatmaps; float32 or bfloat16 convolutions."""

    @nn.compact
    def __call__(self, crops: Num[Array, "B P P 3"]) -> Float[Array, "B 16 64 64"]:
        """Detects joints, in MPII order."""
        side = crops.shape[1]
        if -(-side // 4) != HEATMAP_SIZE:
            raise ValueError(f"HRNet reads crops of 253 to 256 pixels, not {side} x {side}")
        mean, std = (jnp.asarray([[[values]]]) for values in (_MEAN, _STD))
        x = (crops.astype(jnp.float32) / 255.0 - mean) / std
        x = nn.relu(self.conv(64, 3, 2, name="conv1")(x))
        x = nn.relu(self.conv(64, 3, 2, name="conv2")(x))
        for i in range(_BLOCKS):
            x = Bottleneck(self.dtype, name=f"layer1.{i}")(x)

        branches = [nn.relu(self.conv(_WIDTH, 3, name="transition1.0.0")(x))]
        for stage, modules in _MODULES.items():
            new = stage - 1
            down = self.conv(_WIDTH << new, 3, 2, name=f"transition{new}.{new}.0.0")
            branches = [*branches, nn.relu(down(x))]
            for i in range(modules):
                outputs = 1 if stage == max(_MODULES) and i == modules - 1 else stage
                module = HighResolutionModule(self.dtype, outputs, name=f"stage{stage}.{i}")
                branches = module(branches)
            x = branches[-1]
        heatmaps = self.conv(NUM_HEATMAPS, 1, name=_LAST)(branches[0])
        return jnp.moveaxis(heatmaps, -1, 1).astype(jnp.float32)


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a published state dict to parameters of `HRNet`.

    A training checkpoint may keep it under `net.`, as that fine-tuned on Human3.6M does; what lies
    beside `net` is dropped. A prefix `module.` makes no difference.

    Raises:
      ValueError: names the tensors that are unknown, missing or wrongly shaped.
    """
    of_net = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
    tensors = {
        name.removeprefix("module."): np.asarray(tensor, np.float64)
        for name, tensor in (of_net or tensors).items()
        if not name.endswith(".num_batches_tracked")
    }
    crops = jax.ShapeDtypeStruct((1, INPUT_PX, INPUT_PX, 3), jnp.float32)
    expected = jax.eval_shape(HRNet().init, jax.random.key(0), crops)["params"]
    leaves = traverse_util.flatten_dict(expected)
    kernels = {path[:-1]: leaf.shape for path, leaf in leaves.items() if path[-1] == "kernel"}
    wanted: dict[str, tuple[int, ...]] = {}
    for path, (height, width, inputs, outputs) in kernels.items():
        wanted |= dict.fromkeys(_vectors(".".join(path)), (outputs,))
        wanted[f"{'.'.join(path)}.weight"] = (outputs, inputs, height, width)
    if problems := trees.misfits(tensors, wanted):
        raise ValueError(
            f"the weights do not fit HRNet-W32 with 16 joints: {problems}. It reads"
            " pose_hrnet_w32_256x256.pth, trained on MPII, and what was fine-tuned from it."
        )
    params = {}
    for path in kernels:
        name = ".".join(path)
        kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
        bias, *statistics = (tensors[vector] for vector in _vectors(name))
        if statistics:
            scale, mean, variance = statistics
            scale = scale / np.sqrt(variance + _BATCH_NORM_EPSILON)
            kernel, bias = kernel * scale, bias - mean * scale
        params[*path, "kernel"] = np.ascontiguousarray(kernel, np.float32)
        params[*path, "bias"] = np.asarray(bias, np.float32)
    return traverse_util.unflatten_dict(params)


def _vectors(name: str) -> list[str]:
    """Names of a convolution's tensors with one number a channel: its bias, or its batch norm."""
    if name == _LAST:
        return [f"{name}.bias"]
    norm = f"{name[:-1]}1" if name.endswith(".0") else name.replace("conv", "bn")
    return [f"{norm}.{kind}" for kind in ("bias", "weight", "running_mean", "running_var")]
