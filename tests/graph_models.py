"""Graph models of TensorFlow.js with seeded weights, as files like those that are published."""

import hashlib
import json
import math
import zlib

import numpy as np
from paths import GOLDEN


def seeded(name, shape, seed=5):
    """Kernels N(0, 2 / fan_in), biases N(0, 0.01), from a generator seeded by the name."""
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 1:
        return np.float32(0.1 * normal)
    fan_in = shape[0] * shape[1] * (1 if shape[3] == 1 else shape[2])  # 1: of each channel alone
    return np.float32(normal * math.sqrt(2 / fan_in))


def tensors_of(shapes_name):
    """Seeded tensors of the names and shapes in a golden file."""
    shapes = json.loads((GOLDEN / shapes_name).read_text())
    return {name: seeded(name, shape) for name, shape in shapes.items()}


def publish(module, tensors, monkeypatch, **more):
    """The two files of tensors, as if they were those that a module expects.

    What is in `more` stands in the manifest's entry of each tensor.
    """
    names = list(module._SHA256)
    weights = [
        {"name": n, "shape": t.shape, "dtype": "float32", **more} for n, t in tensors.items()
    ]
    manifest = [{"paths": names[1:], "weights": weights}]
    contents = {
        names[0]: json.dumps({"weightsManifest": manifest}).encode(),
        names[1]: b"".join(tensor.tobytes() for tensor in tensors.values()),
    }
    for name, content in contents.items():
        monkeypatch.setitem(module._SHA256, name, hashlib.sha256(content).hexdigest())
    return contents
