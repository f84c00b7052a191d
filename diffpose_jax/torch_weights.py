"""Released PyTorch weights <-> parameters: names and layouts, without PyTorch.

The published program keeps a linear layer's weight as (out, in), ours is a kernel (in, out); its
attention has one matrix for query, key and value, ours an axis for them and one for the heads; its
denoiser's first weight sees (x_t, t, condition), ours is split in front of the condition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

Path = tuple[str, ...]

_INPUT, _CONDITION = ("denoiser", "input", "kernel"), ("denoiser", "condition", "kernel")

_SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "p2_loss_weight",
)  # fmt: skip

_UNUSED = re.compile(
    # Made by the published program but never called: BatchNorm and a confidence output.
    r"denoise_fn\.res_pose\d+\.bn\d+\.\w+|condition_emb\.conf_out\.(weight|bias)"
    # Constants that follow from the configuration: kernel centres and noise schedule.
    rf"|condition_emb\.pos_encoder\.centers|{'|'.join(_SCHEDULE)}"
)


def unused(names: Iterable[str]) -> list[str]:
    """Those of a released state dict's tensors that have no place in the parameters.

    They are the BatchNorm of the residual blocks and `conf_out`, which the published program
    never calls, and constants that the configuration gives here.
    """
    return [name for name in names if _UNUSED.fullmatch(name)]


def from_torch(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a released state dict to parameters.

    Args:
      tensors: the state dict's arrays by name; those that `unused` names are dropped.
      expected: the network's parameters or their shapes,
        `jax.eval_shape(network.init, jax.random.key(0))`. They say how many layers, blocks and
        heads there are.

    Returns:
      Parameters shaped as `expected`, float32.

    Raises:
      ValueError: names every tensor that is unknown, missing or wrongly shaped.
    """
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(expected).items()}
    num_inputs, (condition_size, width) = shapes[_INPUT][0], shapes.pop(_CONDITION)
    shapes[_INPUT] = (num_inputs + condition_size, width)
    paths = {_torch_name(path): path for path in shapes}

    dropped = set(unused(tensors))
    problems = [f"unknown tensor {name}" for name in tensors if name not in {*paths, *dropped}]
    params = {}
    for name, path in paths.items():
        wanted = _torch_shape(path, shapes[path])
        if name not in tensors:
            problems.append(f"missing tensor {name}")
        elif np.shape(tensors[name]) != wanted:
            problems.append(f"tensor {name} is {np.shape(tensors[name])}, not {wanted}")
        else:
            tensor = np.asarray(tensors[name], np.float32)
            tensor = tensor.T if path[-1] == "kernel" else tensor
            params[path] = np.ascontiguousarray(tensor).reshape(shapes[path])
    if problems:
        raise ValueError(
            f"the weights do not fit the network: {'; '.join(problems)}. Is this the"
            " configuration that they were trained with?"
        )
    params[_INPUT], params[_CONDITION] = np.split(params[_INPUT], [num_inputs])
    return traverse_util.unflatten_dict(params)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts parameters to the parameter tensors of the published program.

    What the program has but never calls gets neutral values: scale 1 and bias 0 for the
    BatchNorm of the residual blocks, 0 for `conf_out`.

    Args:
      params: parameters, as `DiffPose.init` draws them.

    Returns:
      Float32 arrays by name, as `from_torch` reads them.
    """
    flat = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    flat[_INPUT] = np.concatenate([flat[_INPUT], flat.pop(_CONDITION)])
    tensors = {}
    for path, param in flat.items():
        shape = _torch_shape(path, param.shape)
        tensor = param.reshape(shape[::-1]).T if path[-1] == "kernel" else param.reshape(shape)
        tensors[_torch_name(path)] = np.ascontiguousarray(tensor)
    return tensors | _neutral(tensors)


def _neutral(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values for the parameters that the published program has but never calls."""
    width = tensors["condition_emb.joint_embedding.weight"].shape[1]
    neutral = {
        "condition_emb.conf_out.weight": np.zeros((1, width), np.float32),
        "condition_emb.conf_out.bias": np.zeros(1, np.float32),
    }
    for name, tensor in tensors.items():
        if layer := re.fullmatch(r"(denoise_fn\.res_pose\d+)\.l(\d+)\.bias", name):
            norm = f"{layer[1]}.bn{layer[2]}"
            neutral[f"{norm}.weight"] = np.ones_like(tensor)
            neutral[f"{norm}.bias"] = np.zeros_like(tensor)
    return neutral


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter: axes of heads are flattened."""
    if path == ("encoder", "joint_embedding"):
        return shape
    if path[-1] != "kernel":
        return (math.prod(shape),)
    inputs = 2 if path[-2] == "out" else 1  # the attention's output layer sees (heads, width)
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _torch_name(path: Path) -> str:
    """Name of the tensor that holds a parameter."""
    kind = "bias" if path[-1].endswith("bias") else "weight"
    match path:
        case ("encoder", "cross_spatial", _) | ("encoder", "cross_spatial_bias"):
            return f"condition_emb.pos_proj.{kind}"
        case ("encoder", "joint_embedding"):
            return "condition_emb.joint_embedding.weight"
        case ("encoder", "condition", _):
            return f"condition_emb.pos_out.{kind}"
        case ("encoder", layer, module, _):
            name = {"qkv": "self_attn.in_proj_", "out": "self_attn.out_proj."}.get(
                module, f"{module}."
            )
            index = layer.removeprefix("layer")
            return f"condition_emb.transformer.layers.{index}.{name}{kind}"
        case ("denoiser", "input", _):
            return f"denoise_fn.upscale.{kind}"
        case ("denoiser", "output", _):
            return f"denoise_fn.pose.{kind}"
        case ("denoiser", layer, _):
            block, index = (int(number) + 1 for number in layer.removeprefix("blocks_").split("_"))
            return f"denoise_fn.res_pose{block}.l{index}.{kind}"
    raise ValueError(f"no tensor of the published program holds the parameter {'/'.join(path)}")
