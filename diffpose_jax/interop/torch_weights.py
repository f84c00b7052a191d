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

from diffpose_jax.io import extras, files
from diffpose_jax.method.channel_embedding import kernel_centres
from diffpose_jax.method.diffusion import Schedule

ParamPath = tuple[str, ...]


class WeightsError(ValueError):
    """A file or a state dict of PyTorch does not hold what it should."""


_INPUT, _CONDITION = ("denoiser", "input", "kernel"), ("denoiser", "condition", "kernel")
_JOINTS = ("encoder", "joint_embedding")

_CENTRES = "condition_emb.pos_encoder.centers"
_BATCH_NORM = r"denoise_fn\.res_pose\d+\.bn\d+"
_CONFIDENCE = r"condition_emb\.conf_out"


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The constants of the noise schedule that the published program keeps with its weights."""
    variance = schedule.posterior_variance
    buffers = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "alphas_cumprod_prev": schedule.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(schedule.alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - schedule.alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - schedule.alphas_cumprod),
        "sqrt_recip_alphas_cumprod": schedule.sqrt_recip_alphas_cumprod,
        "sqrt_recipm1_alphas_cumprod": schedule.sqrt_recipm1_alphas_cumprod,
        "posterior_variance": variance,
        # Without the infinity of t = 0.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": schedule.posterior_mean_coef1,
        "posterior_mean_coef2": schedule.posterior_mean_coef2,
        # A weight of the loss over t that the program leaves at 1.
        "p2_loss_weight": np.ones_like(variance),
    }
    return {name: np.asarray(values, np.float32) for name, values in buffers.items()}


_UNUSED = re.compile(
    # Made by the published program but never called.
    rf"{_BATCH_NORM}\.\w+|{_CONFIDENCE}\.(weight|bias)"
    # Constants that follow from the configuration: kernel centres and noise schedule.
    rf"|{re.escape(_CENTRES)}|{'|'.join(schedule_buffers(Schedule(np.array([0.5]))))}"
)


def unused(names: Iterable[str]) -> list[str]:
    """Those of a released state dict's tensors that have no place in the parameters.

    They are the BatchNorm of the residual blocks and `conf_out`, which the published program
    never calls, and constants that the configuration gives here.
    """
    return [name for name in names if _UNUSED.fullmatch(name)]


def read_file(path: str | Path) -> Any:
    """Reads a PyTorch file: its nested dictionaries, with arrays in place of the tensors.

    Tensors only: an object of any other class is refused, no code of the file runs. What is larger
    in memory than in the file is refused, too.

    Raises:
      MissingExtraError: without PyTorch.
      WeightsError: if there is no such file, or if it cannot be read.
    """
    torch = extras.load("torch", "torch")
    try:
        _check_archive(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist") from error
    except Exception as error:  # of many kinds, for a damaged file also bare ones
        # Not PyTorch's own words: they advise to let the file run code.
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"holds {forbidden[1]}" if forbidden else f"cannot be read ({type(error).__name__})"
        )
        raise WeightsError(f"{path} is not a PyTorch file of tensors alone: {reason}") from error

    def arrays(value: Any, depth: int = 0) -> Any:
        if isinstance(value, Mapping):
            if depth == _DEEPEST:  # it may even hold itself
                raise WeightsError(f"{path} holds dictionaries within dictionaries, too many")
            return {name: arrays(part, depth + 1) for name, part in value.items()}
        if isinstance(value, torch.Tensor):
            if not is_plain(value):
                raise WeightsError(f"{path} holds a tensor that is not plain numbers, one by one")
            # Wider than any released type; numpy has no bfloat16.
            return (value.float() if value.is_floating_point() else value).numpy(force=True)
        return value

    def is_plain(tensor: Any) -> bool:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False
        if tensor.is_quantized or tensor.is_complex():
            return False
        # A few bytes can be told to count as any number of elements.
        return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()

    return arrays(content)


_DEEPEST = 10


def _check_archive(path: Path) -> None:
    """Refuses what unpacks to more than it is; files before PyTorch 1.6 are no archives."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    is_packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it is packed, as PyTorch's files are not")


def write_file(path: str | Path, params: Mapping[str, Any], schedule: Schedule) -> None:
    """Writes a file in the released layout, which the published program loads.

    Args:
      path: the file.
      params: parameters, written as the raw weights and as their moving average.
      schedule: the noise schedule that they were trained with.
    """
    torch = extras.load("torch", "torch")
    model = {
        name: torch.from_numpy(np.array(value))
        for name, value in state_dict(params, schedule).items()
    }
    content = {
        "step": 0,
        "model": model,
        "ema": {"initted": torch.tensor([True]), "step": torch.tensor([0])}
        | {
            f"{copy}.{name}": t
            for copy in ("online_model", "ema_model")
            for name, t in model.items()
        },
        "scaler": None,
    }
    whole = io.BytesIO()
    torch.save(content, whole)
    files.write_atomic(path, whole.getvalue())


def released_tensors(content: Any, weights: str = "raw") -> dict[str, np.ndarray]:
    """The state dict in a released file, or in a file that is nothing but a state dict.

    Args:
      content: what `read_file` gave.
      weights: "raw" or "ema".

    Raises:
      WeightsError: if it holds no such weights.
    """
    if not isinstance(content, dict):
        raise WeightsError(f"holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = content
    if "model" in content or "ema" in content:
        item, prefix = {"raw": ("model", ""), "ema": ("ema", "ema_model.")}[weights]
        if not isinstance(content.get(item), dict):
            raise WeightsError(f"holds no {weights} weights: {item!r} is missing")
        tensors = {
            str(name).removeprefix(prefix): tensor
            for name, tensor in content[item].items()
            if str(name).startswith(prefix)
        }
    elif weights != "raw":
        raise WeightsError(f"is a plain state dict, it holds no {weights} weights")
    others = [
        name
        for name, tensor in tensors.items()
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray)
    ]
    if others or not tensors:
        raise WeightsError(
            f"is no state dict: {', '.join(str(n)[:60] for n in others[:5]) or 'it is empty'}"
            + " are no tensors" * bool(others)
        )
    return tensors


def check_schedule(tensors: Mapping[str, np.ndarray], schedule: Schedule) -> None:
    """Checks the noise schedule that lies beside released weights, if it does.

    Raises:
      WeightsError: if the configuration gives another.
    """
    betas = tensors.get("betas")
    if betas is not None and not (
        betas.shape == schedule.betas.shape
        and np.allclose(betas, schedule.betas, rtol=1e-5, atol=0)
    ):
        raise WeightsError(
            f"was trained with another noise schedule, of {betas.size} steps, than the"
            f" configuration's {schedule.num_steps}; see diffusion_steps and schedule_offset"
        )


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
      WeightsError: names every tensor that is unknown, missing or wrongly shaped.
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
        raise WeightsError(
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

    Raises:
      WeightsError: if they are of an encoder that the published program does not have.
    """
    flat = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    if _JOINTS not in flat:
        raise WeightsError('the published program has no other encoder than the "embedding"')
    flat[_INPUT] = np.concatenate([flat[_INPUT], flat.pop(_CONDITION)])
    tensors = {}
    for path, param in flat.items():
        shape = _torch_shape(path, param.shape)
        tensor = param.reshape(shape[::-1]).T if path[-1] == "kernel" else param.reshape(shape)
        tensors[_torch_name(path)] = np.ascontiguousarray(tensor)
    return tensors | _neutral(tensors)


def state_dict(params: Mapping[str, Any], schedule: Schedule) -> dict[str, np.ndarray]:
    """Everything that the published program keeps: its parameters and its constants.

    Its loading is strict, so nothing may be missing, not even what it never uses.
    """
    tensors = to_torch(params)
    width = tensors["condition_emb.joint_embedding.weight"].shape[1]
    tensors[_CENTRES] = kernel_centres(width // 2)
    for name, scale in list(tensors.items()):
        if norm := re.fullmatch(rf"({_BATCH_NORM})\.weight", name):
            tensors[f"{norm[1]}.running_mean"] = np.zeros_like(scale)
            tensors[f"{norm[1]}.running_var"] = np.ones_like(scale)
            tensors[f"{norm[1]}.num_batches_tracked"] = np.array(0, np.int64)
    return tensors | schedule_buffers(schedule)


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


def _torch_shape(path: ParamPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter: axes of heads are flattened."""
    if path == _JOINTS:
        return shape
    if path[-1] != "kernel":
        return (math.prod(shape),)
    inputs = 2 if path[-2] == "out" else 1  # the attention's output layer sees (heads, width)
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _torch_name(path: ParamPath) -> str:
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
            block, inner = (int(number) + 1 for number in layer.removeprefix("blocks_").split("_"))
            return f"denoise_fn.res_pose{block}.l{inner}.{kind}"
    raise WeightsError(f"no tensor of the published program holds the parameter {'/'.join(path)}")
