"""The sampler as one program for CPU and CUDA, which jax alone runs: no flax, none of this package.

A folder with `sampler.stablehlo`, the program by `jax.export`: (parameters, seed, heatmaps) ->
poses_mm for any number of images, with the number of hypotheses and the solver fixed;
`parameters.npz` (as constants of the program they would take 150 MB more memory at full size);
`sampler.json`, which says what all that is; and `example.py`, which loads and calls it.

`jax.export` promises that a program can be read by a jax that is up to 6 months newer or 3 weeks
older than the one that wrote it (docs.jax.dev, "Exporting and serializing staged-out
computations", compatibility guarantees). A checkpoint is for keeps, this is for use.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array
from jax import export as jax_export

from diffpose_jax.config import ConfigError
from diffpose_jax.inference import Model
from diffpose_jax.io import arrays, extras, files, trees
from diffpose_jax.method.sampling import Steps
from diffpose_jax.skeleton import H36M_JOINTS, HEATMAP_SIZE, MPII_JOINTS, NUM_HEATMAPS

FORMAT = "diffpose_jax sampler 1"
PLATFORMS = ("cpu", "cuda")  # it works in larger passes where that is no CPU


def build(model: Model, num_hypotheses: int, solver: Steps) -> dict[str, bytes]:
    """Traces and lowers the sampler; gives the files of the folder by their names, for `write`."""
    extras.load("flatbuffers", "stablehlo")  # with which `jax.export` writes
    if num_hypotheses < 1:
        raise ConfigError(f"num_hypotheses must be at least 1, not {num_hypotheses}")
    parameters = traverse_util.flatten_dict(jax.device_get(model.params), sep="/")

    def sampler(parameters: dict[str, Array], seed: Array, heatmaps: Array) -> Array:
        params, key = traverse_util.unflatten_dict(parameters, sep="/"), jax.random.key(seed)
        return model.network.draw(params, key, solver, heatmaps, num_hypotheses).poses_mm

    (batch,) = jax_export.symbolic_shape("b", constraints=["b >= 1"])
    heatmaps_shape = (batch, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
    # A program names the source of its operations: not where it lay on the writer's machine.
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r".*[/\\]")
    try:
        exported = jax_export.export(jax.jit(sampler), platforms=PLATFORMS)(
            jax.eval_shape(lambda: parameters),
            jax.ShapeDtypeStruct((), jnp.uint32),
            jax.ShapeDtypeStruct(heatmaps_shape, jnp.float32),
        )
    finally:
        jax.config.update(option, before)
    description = _description(exported, num_hypotheses, solver.name)
    return {
        "sampler.stablehlo": bytes(exported.serialize()),
        "parameters.npz": arrays.npz_bytes(parameters),
        "sampler.json": (json.dumps(description, indent=2) + "\n").encode(),
        "example.py": EXAMPLE.encode(),
    }


def write(directory: str | Path, contents: dict[str, bytes]) -> None:
    """Writes what `build` gave as a new folder: whole or not at all."""
    directory = Path(directory)
    trees.check_new(directory)
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        for name, content in contents.items():
            files.write_atomic(beside / name, content)
        beside.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    files.sync(directory.parent)


def _description(exported: jax_export.Exported, num_hypotheses: int, solver: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "num_hypotheses": num_hypotheses,
        "solver": solver,
        "arguments": {
            "parameters": "the arrays of parameters.npz, a dictionary",
            "seed": "uint32, a scalar: the same seed and heatmaps give the same hypotheses",
            "heatmaps": f"float32 ({', '.join(map(str, ('B', *exported.in_avals[-1].shape[1:])))}),"
            " [image, joint, row = y, column = x], B >= 1, finite (nothing here checks that)",
        },
        "result": {
            "poses_mm": f"float32 (B, {num_hypotheses}, {len(H36M_JOINTS)}, 3),"
            " [image, hypothesis, joint, axis]",
            "unit": "mm",
            "origin": "the hip",
            "axes": "of the camera: x right, y up, z towards the camera",
        },
        "heatmap_joints": list(MPII_JOINTS),
        "pose_joints": list(H36M_JOINTS),
    }


EXAMPLE = '''\
"""Draws 3D poses from joint heatmaps, with jax alone: pip install jax flatbuffers

    python example.py HEATMAPS.npz POSES.npz

The one holds `heatmaps` (B, 16, 64, 64), the other will hold `poses_mm` (B, M, 17, 3); sampler.json
says more. Each B is compiled for, so keep to a few, and to some 64 images a call: memory grows
with them. A jax can read what one up to 6 months older or 3 weeks newer wrote. It runs what is in
the file: take it only from people you trust.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export


def load(folder):
    """Returns sample(seed, heatmaps) -> poses_mm."""
    try:
        exported = export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes()))
        exported.mlir_module()  # which the first call would read, too
    except Exception as error:  # of many kinds, and OSError
        written_by = json.loads((folder / "sampler.json").read_bytes())["jax"]
        raise RuntimeError(
            f"jax {jax.__version__} cannot read {folder / 'sampler.stablehlo'}, written by jax"
            f" {written_by}: install that version, or export the model again ({error})"
        ) from error
    sampler = jax.jit(exported.call)
    parameters = jax.device_put(dict(np.load(folder / "parameters.npz")))
    return lambda seed, heatmaps: sampler(
        parameters, np.uint32(seed), jax.numpy.asarray(heatmaps, np.float32)
    )


if __name__ == "__main__":
    sample = load(Path(__file__).parent)
    np.savez(sys.argv[2], poses_mm=sample(0, np.load(sys.argv[1])["heatmaps"]))
'''
