"""Weights that a seed and the names and shapes of a state dict define.

The reference cases were computed with such weights, so that nobody needs a checkpoint to check
against them. A tensor's numbers come from a generator of its own, seeded by its name.
"""

import json
import math
import zlib

import numpy as np


def seeded_weights(spec, seed):
    """The state dict of a JSON file of {name: shape}: {name: float32 array}."""
    shapes = json.loads(spec.read_text())
    return {name: seeded_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def seeded_tensor(name, shape, seed):
    """Matrices and kernels N(0, 1 / fan_in); scales and variances about 1, the rest about 0."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    normal = np.float32(generator.standard_normal(shape))
    if name.endswith("running_var"):
        return np.float32(1 + 0.1 * np.abs(normal))
    if len(shape) > 1:
        return np.float32(normal / np.sqrt(math.prod(shape[1:])))
    return np.float32(0.1 * normal + name.endswith("weight"))
