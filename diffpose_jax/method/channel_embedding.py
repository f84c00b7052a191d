"""The channel embedding of a coordinate (Eq. 5)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def channel_embedding(x: Float[Array, "*shape"], num_kernels: int = 64) -> Float[Array, "*shape K"]:
    """Encodes coordinates in [-1, 1] as the responses of overlapping cos^2 kernels.

    Kernel k has its centre at `linspace(-1, 1, K)[k]` and the width h = 8 / K:
    b_k(d) = cos^2(pi d / h) for |d| < h / 2 and 0 beyond, d being the distance to the
    centre. About four kernels respond to a coordinate, so that a sum of embeddings keeps
    apart what an average of coordinates would mix.
    """
    width = 8.0 / num_kernels
    centres = jnp.asarray(kernel_centres(num_kernels), x.dtype)
    distance = x[..., None] - centres.reshape((1,) * x.ndim + (-1,))
    return jnp.where(
        jnp.abs(distance) < width / 2, jnp.square(jnp.cos(jnp.pi / width * distance)), 0.0
    )


def kernel_centres(num_kernels: int) -> Float[np.ndarray, " K"]:
    """Linspace(-1, 1, K) as the published program's framework rounds it, float32.

    It multiplies the float32 step from both ends. Against numpy's linspace a centre moves by up
    to 1e-7, which the steep kernels turn into 1e-6.
    """
    step = np.float64(np.float32(2.0 / (num_kernels - 1)))
    steps = np.arange(num_kernels)
    from_left, from_right = -1.0 + step * steps, 1.0 - step * steps[::-1]
    return np.where(steps < num_kernels // 2, from_left, from_right).astype(np.float32)
