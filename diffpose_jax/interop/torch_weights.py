"""Released PyTorch weights <-> parameters: names, layouts and files.

The published program keeps a linear layer's weight as (out, in), ours is a kernel (in, out); its
attention has one matrix for query, key and value, ours an axis for them and one for the heads; its
denoiser's first weight sees (x_t, t, condition), ours is split in front of the condition.

A released file is a dictionary with `step`, `model` (a state dict), `ema` (the state dict of an
`ema_pytorch.EMA`, which has the model twice, as `online_model.` and `ema_model.`) and `scaler`.
PyTorch is imported only to read and write such files.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from diffpose_jax.io import extras, files, trees
from diffpose_jax.method.channel_embedding import kernel_centres
from diffpose_jax.method.diffusion import Schedule, posterior

ParamPath = tuple[str, ...]


class WeightsError(ValueError):
    """A file or a state dict of PyTorch does not hold what it should."""


_INPUT, _CONDITION = ("denoiser", "input", "kernel"), ("denoiser", "condition", "kernel")
_JOINTS = ("encoder", "joint_embedding")
_CENTRES = "condition_emb.pos_encoder.centers"
_BATCH_NORM = r"denoise_fn\.res_pose\d+\.bn\d+"


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The constants of the noise schedule that the published program keeps with its weights."""
    alpha_bar = schedule.alphas_cumprod
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    of_x_t, of_x_0, variance = posterior(alpha_bar, alpha_bar_prev)
    buffers = {
        "betas": schedule.betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alpha_bar),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alpha_bar - 1.0),
        "posterior_mean_coef1": of_x_0,
        "posterior_mean_coef2": of_x_t,
        "posterior_variance": variance,
        # Without the infinity of t = 0.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "p2_loss_weight": np.ones(schedule.num_steps),  # of the loss over t; never another
    }
    return {name: np.asarray(values, np.float32) for name, values in buffers.items()}


_UNUSED = re.compile(
    # Made by the published program but never called.
    rf"{_BATCH_NORM}\.\w+|condition_emb\.conf_out\.(weight|bias)"
    # Constants that follow from the configuration: kernel centres and noise schedule.
    rf"|{re.escape(_CENTRES)}|{'|'.join(schedule_buffers(Schedule(np.array([0.5]))))}"
)


def unused(names: Iterable[str]) -> list[str]:
    """Those of a released state dict's tensors that have no place in the parameters.

    The published program never calls them, or the configuration gives them here.
    """
    return [name for name in names if _UNUSED.fullmatch(name)]


def read_file(path: str | Path) -> Any:
    """Reads a PyTorch file: its nested dictionaries, with arrays in place of the tensors.

    Raises:
      WeightsError: if there is no such file, if it cannot be read, holds an object of any other
        class (no code of the file runs), or is larger in memory than on the disk.
    """
    torch = extras.load("torch", "torch")

    def arrays(value: Any, depth: int = 0) -> Any:
        if isinstance(value, Mapping) and depth < 3:  # deeper ones, of optimizers, are not read
            return {name: arrays(part, depth + 1) for name, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        # A few bytes can be told to count as any number of elements.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor is larger than what is stored of it")
        # Wider than any released type; numpy has no bfloat16.
        return (value.float() if value.is_floating_point() else value).numpy(force=True)

    try:
        if zipfile.is_zipfile(path):  # files before PyTorch 1.6 are no archives
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > Path(path).stat().st_size:
                raise ValueError("it is packed, as PyTorch's files are not")
        return arrays(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist") from error
    except Exception as error:  # of many kinds, for a damaged file also bare ones
        # Not PyTorch's own words: they advise to let the file run code.
        held = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {held[1]}" if held else f"cannot be read ({type(error).__name__})"
        raise WeightsError(f"{path} is not a PyTorch file of tensors alone: {reason}") from error


def write_file(path: str | Path, params: Mapping[str, Any], schedule: Schedule) -> None:
    """Writes parameters, as raw and as averaged weights, in the layout that was released."""
    torch = extras.load("torch", "torch")
    arrays = to_torch(params, schedule)
    model = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    ema = {"initted": torch.tensor([True]), "step": torch.tensor([0])}
    for name, tensor in model.items():
        ema |= {f"online_model.{name}": tensor, f"ema_model.{name}": tensor}
    whole = io.BytesIO()
    torch.save({"step": 0, "model": model, "ema": ema, "scaler": None}, whole)
    files.write_atomic(path, whole.getvalue())


def released_tensors(content: Any, weights: str = "raw") -> dict[str, np.ndarray]:
    """The "raw" or "ema" state dict in what `read_file` gave; a plain one counts as raw."""
    if not isinstance(content, dict):
        raise WeightsError(f"holds a {type(content).__name__}, not a dictionary of tensors")
    prefix = ""
    if "model" in content or "ema" in content:
        item, prefix = {"raw": ("model", ""), "ema": ("ema", "ema_model.")}[weights]
        content = content.get(item)
        if not isinstance(content, dict):
            raise WeightsError(f"holds no {weights} weights: {item!r} is missing")
    elif weights != "raw":
        raise WeightsError(f"is a plain state dict, it holds no {weights} weights")
    tensors = {
        str(name).removeprefix(prefix): tensor
        for name, tensor in content.items()
        if str(name).startswith(prefix)
    }
    others = [name[:60] for name, tensor in tensors.items() if not isinstance(tensor, np.ndarray)]
    if others or not tensors:
        what = f"{', '.join(others[:5])} are no tensors" if others else "it is empty"
        raise WeightsError(f"is no state dict: {what}")
    return tensors


def check_schedule(tensors: Mapping[str, np.ndarray], schedule: Schedule) -> None:
    """Raises WeightsError if a noise schedule beside released weights is another than this."""
    betas = tensors.get("betas", schedule.betas)
    if np.shape(betas) != schedule.betas.shape or not np.allclose(betas, schedule.betas, 1e-5, 0):
        raise WeightsError(
            f"was trained with another noise schedule, of {np.size(betas)} steps, than the"
            f" configuration's {schedule.num_steps}; see diffusion_steps and schedule_offset"
        )


def from_torch(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a released state dict to parameters of the shapes of `expected`, float32.

    What `unused` names is dropped.

    Raises:
      WeightsError: names the tensors that are unknown, missing or wrongly shaped.
    """
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(expected).items()}
    num_inputs, (condition_size, width) = shapes[_INPUT][0], shapes.pop(_CONDITION)
    shapes[_INPUT] = (num_inputs + condition_size, width)
    found = {name: tensor for name, tensor in tensors.items() if not _UNUSED.fullmatch(name)}
    wanted = {_torch_name(path): _torch_shape(path, shape) for path, shape in shapes.items()}
    if problems := trees.misfits(found, wanted):
        raise WeightsError(
            f"the weights do not fit the network: {problems}. Is this the configuration that they"
            " were trained with?"
        )
    params = {}
    for path, shape in shapes.items():
        tensor = np.asarray(found[_torch_name(path)], np.float32)
        tensor = tensor.T if path[-1] == "kernel" else tensor
        params[path] = np.ascontiguousarray(tensor).reshape(shape)
    params[_INPUT], params[_CONDITION] = np.split(params[_INPUT], [num_inputs])
    return traverse_util.unflatten_dict(params)


def to_torch(params: Mapping[str, Any], schedule: Schedule) -> dict[str, np.ndarray]:
    """Converts parameters to the whole state dict of the published program, float32 arrays.

    Its loading is strict: what it has but never calls, BatchNorm and `conf_out`, is made neutral.

    Raises:
      WeightsError: if they are of an encoder or a target that the published program lacks.
    """
    leaves = traverse_util.flatten_dict(params)
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    if "moments" in params:
        raise WeightsError('the published program predicts the noise: not the target "edm"')
    if _JOINTS not in flat:
        raise WeightsError('the published program has no other encoder than the "embedding"')
    flat[_INPUT] = np.concatenate([flat[_INPUT], flat.pop(_CONDITION)])
    tensors = {}
    for path, param in flat.items():
        name, shape = _torch_name(path), _torch_shape(path, param.shape)
        tensor = param.reshape(shape[::-1]).T if path[-1] == "kernel" else param.reshape(shape)
        tensors[name] = np.ascontiguousarray(tensor)
        if layer := re.fullmatch(r"(denoise_fn\.res_pose\d+)\.l(\d+)\.bias", name):
            norm = f"{layer[1]}.bn{layer[2]}"
            for kind, value in (
                ("weight", 1),
                ("bias", 0),
                ("running_mean", 0),
                ("running_var", 1),
            ):
                tensors[f"{norm}.{kind}"] = np.full(shape, value, np.float32)
            tensors[f"{norm}.num_batches_tracked"] = np.array(0, np.int64)
    width = flat[_JOINTS].shape[1]
    tensors |= {
        "condition_emb.conf_out.weight": np.zeros((1, width), np.float32),
        "condition_emb.conf_out.bias": np.zeros(1, np.float32),
        _CENTRES: kernel_centres(width // 2),
    }
    return tensors | schedule_buffers(schedule)


def _torch_shape(path: ParamPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter: axes of heads are flattened."""
    if path == _JOINTS:
        return shape
    if path[-1] != "kernel":
        return (math.prod(shape),)
    inputs = 2 if path[-2] == "out" else 1  # the attention's output layer sees (heads, width)
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


_NAMES: dict[ParamPath, str] = {
    ("encoder", "cross_spatial"): "condition_emb.pos_proj",
    ("encoder", "cross_spatial_bias"): "condition_emb.pos_proj",
    ("encoder", "joint_embedding"): "condition_emb.joint_embedding",
    ("encoder", "condition"): "condition_emb.pos_out",
    ("denoiser", "input"): "denoise_fn.upscale",
    ("denoiser", "output"): "denoise_fn.pose",
}


def _torch_name(path: ParamPath) -> str:
    """Name of the tensor that holds a parameter."""
    kind = "bias" if path[-1].endswith("bias") else "weight"
    if name := _NAMES.get(path[:2]):
        return f"{name}.{kind}"
    match path:
        case ("encoder", layer, module, _):
            of_attention = {"qkv": "self_attn.in_proj_", "out": "self_attn.out_proj."}
            index, name = layer.removeprefix("layer"), of_attention.get(module, f"{module}.")
            return f"condition_emb.transformer.layers.{index}.{name}{kind}"
        case ("denoiser", layer, _):
            block, inner = (int(number) + 1 for number in layer.removeprefix("blocks_").split("_"))
            return f"denoise_fn.res_pose{block}.l{inner}.{kind}"
    raise WeightsError(f"no tensor of the published program holds the parameter {'/'.join(path)}")
