"""HRNet-W32 with the MPII head: 16 joint heatmaps of a person's crop, for inference.

Sun et al., Deep High-Resolution Representation Learning for Human Pose Estimation (CVPR 2019).
Submodules carry the names of the published PyTorch files, so that a parameter's path is a
tensor's name. The published network follows each convolution with batch normalisation; with
stored statistics that is a scale and a shift of each channel, which `from_torch` folds into the
convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.typing import DTypeLike

from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

Path = tuple[str, ...]

_LAST: Path = ("final_layer",)
_WIDTH = 32  # channels of the branch of the highest resolution; each next one has twice as many
_BLOCKS = 4  # residual blocks of the first stage, and of a branch in a module of the others
_MODULES = {2: 1, 3: 4, 4: 3}  # modules of a stage, which has as many branches as its number
_BATCH_NORM_EPSILON = 1e-5  # PyTorch's, with which the published network was trained
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's RGB


def _convolution(
    features: int, size: int, stride: int = 1, *, dtype: DTypeLike, name: str
) -> nn.Conv:
    """A convolution padded as PyTorch does: alike on both sides, also with a stride."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        dtype=dtype,
        # Full products: in float32 a GPU would round their factors to ten bits.
        precision=jax.lax.Precision.HIGHEST,
        name=name,
    )


class Bottleneck(nn.Module):
    """Residual block of the first stage: 64 channels within, 256 out.

    Attributes:
      dtype: type of the convolutions.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, H, W, 256)."""
        conv = functools.partial(_convolution, dtype=self.dtype)
        y = nn.relu(conv(64, 1, name="conv1")(x))
        y = nn.relu(conv(64, 3, name="conv2")(y))
        y = conv(256, 1, name="conv3")(y)
        if x.shape != y.shape:
            x = conv(256, 1, name="downsample.0")(x)
        return nn.relu(x + y)


class BasicBlock(nn.Module):
    """Residual block of a branch.

    Attributes:
      dtype: type of the convolutions.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) to the same shape."""
        conv = functools.partial(_convolution, x.shape[-1], 3, dtype=self.dtype)
        return nn.relu(x + conv(name="conv2")(nn.relu(conv(name="conv1")(x))))


class HighResolutionModule(nn.Module):
    """Branches of halving resolution, side by side, that exchange what they found at the end.

    Attributes:
      num_outputs: how many of the branches go on.
      dtype: type of the convolutions.
    """

    num_outputs: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, branches: list[Array]) -> list[Array]:
        """Branches (B, 64 / 2^b, 64 / 2^b, 32 * 2^b) to the first `num_outputs` of them."""
        branches = list(branches)
        for b in range(len(branches)):
            for i in range(_BLOCKS):
                block = BasicBlock(self.dtype, name=f"branches.{b}.{i}")
                branches[b] = block(branches[b])
        return [
            nn.relu(sum(self._resample(x, source, target) for source, x in enumerate(branches)))
            for target in range(self.num_outputs)
        ]

    def _resample(self, x: Array, source: int, target: int) -> Array:
        """Brings a branch to the resolution and the channels of another."""
        conv = functools.partial(_convolution, dtype=self.dtype)
        name = f"fuse_layers.{target}.{source}"
        if source > target:
            x = conv(_WIDTH << target, 1, name=f"{name}.0")(x)
            factor = 1 << (source - target)
            return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
        for i in range(target - source):
            last = i == target - source - 1
            x = conv(_WIDTH << (target if last else source), 3, 2, name=f"{name}.{i}.0")(x)
            x = x if last else nn.relu(x)
        return x


class HRNet(nn.Module):
    """HRNet-W32: normalised crops to heatmaps.

    Attributes:
      dtype: type of the convolutions, float32 or bfloat16; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Detects joints.

        Args:
          images: (B, P, P, 3), as `preprocess` gives them; P is 256, or one to three less.

        Returns:
          Heatmaps, (B, 16, 64, 64) float32, MPII joint order.

        Raises:
          ValueError: if images of that shape do not give 64 x 64 heatmaps.
        """
        _, height, width, _ = images.shape
        if -(-height // 4) != HEATMAP_SIZE or -(-width // 4) != HEATMAP_SIZE:
            raise ValueError(f"HRNet reads crops of 253 to 256 pixels, not {height} x {width}")
        conv = functools.partial(_convolution, dtype=self.dtype)
        x = nn.relu(conv(64, 3, 2, name="conv1")(images))
        x = nn.relu(conv(64, 3, 2, name="conv2")(x))
        for i in range(_BLOCKS):
            x = Bottleneck(self.dtype, name=f"layer1.{i}")(x)

        branches = [nn.relu(conv(_WIDTH, 3, name="transition1.0.0")(x))]
        for stage, modules in _MODULES.items():
            new = stage - 1
            down = conv(_WIDTH << new, 3, 2, name=f"transition{new}.{new}.0.0")
            branches = [*branches, nn.relu(down(x))]
            for i in range(modules):
                last = stage == max(_MODULES) and i == modules - 1
                module = HighResolutionModule(
                    num_outputs=1 if last else stage, dtype=self.dtype, name=f"stage{stage}.{i}"
                )
                branches = module(branches)
            x = branches[-1]
        heatmaps = conv(NUM_HEATMAPS, 1, name=_LAST[0])(branches[0])
        return jnp.moveaxis(heatmaps, -1, 1).astype(jnp.float32)


def preprocess(crops: Array) -> Array:
    """Normalises crops as the published network was trained: (B, P, P, 3) uint8 RGB -> float32."""
    mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (_MEAN, _STD))
    return (crops.astype(jnp.float32) / 255.0 - mean) / std


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a published state dict to parameters.

    Args:
      tensors: the state dict's arrays by name: those of the published MPII file, or those of a
        training checkpoint that keeps them under `net`, as the file fine-tuned on Human3.6M does
        (`net.conv1.weight`; what lies beside `net` is dropped). A prefix `module.` makes no
        difference.

    Returns:
      Parameters of `HRNet`, float32.

    Raises:
      ValueError: names every tensor that is unknown, missing or wrongly shaped.
    """
    tensors = _plain_names(tensors)
    crops = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    expected = jax.eval_shape(HRNet().init, jax.random.key(0), crops)["params"]
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in traverse_util.flatten_dict(expected).items()
        if path[-1] == "kernel"
    }
    _check(tensors, kernels)

    params = {}
    for path in kernels:
        kernel = np.asarray(tensors[_weight(path)], np.float64).transpose(2, 3, 1, 0)
        vectors = [np.asarray(tensors[name], np.float64) for name in _vectors(path)]
        if path == _LAST:
            (bias,) = vectors
        else:
            scale, shift, mean, variance = vectors
            scale = scale / np.sqrt(variance + _BATCH_NORM_EPSILON)
            kernel, bias = kernel * scale, shift - mean * scale
        params[*path, "kernel"] = np.ascontiguousarray(kernel, np.float32)
        params[*path, "bias"] = np.asarray(bias, np.float32)
    return traverse_util.unflatten_dict(params)


def _plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's tensors of a state dict or a training checkpoint, by their published names."""
    of_net = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
    plain = {n.removeprefix("module."): t for n, t in (of_net or tensors).items()}
    return {n: t for n, t in plain.items() if not n.endswith(".num_batches_tracked")}


def _check(tensors: Mapping[str, np.ndarray], kernels: Mapping[Path, tuple[int, ...]]) -> None:
    """Compares names and shapes of tensors with those of the network's convolutions."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, (height, width, inputs, outputs) in kernels.items():
        wanted[_weight(path)] = (outputs, inputs, height, width)
        wanted |= dict.fromkeys(_vectors(path), (outputs,))
    problems = [f"unknown tensor {name}" for name in tensors if name not in wanted]
    problems += [f"missing tensor {name}" for name in wanted if name not in tensors]
    problems += [
        f"tensor {name} is {np.shape(tensors[name])}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and np.shape(tensors[name]) != shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit HRNet-W32 with 16 joints: {'; '.join(problems)}. It reads"
            " pose_hrnet_w32_256x256.pth, trained on MPII, and what was fine-tuned from it."
        )


def _weight(path: Path) -> str:
    """Name of the tensor that holds a convolution's kernel, (out, in, height, width)."""
    return f"{'.'.join(path)}.weight"


def _vectors(path: Path) -> list[str]:
    """Names of a convolution's tensors with one number a channel: its bias, or its batch norm."""
    name = ".".join(path)
    if path == _LAST:
        return [f"{name}.bias"]
    norm = f"{name[:-1]}1" if name.endswith(".0") else name.replace("conv", "bn")
    return [f"{norm}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
