"""The denoiser eps(x_t, t, c): the noise in a pose vector under a condition (Sec. 3.3)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Real

from diffpose_jax.method.pose_vector import POSE_SIZE


class Denoiser(nn.Module):
    """Residual network over the concatenation of pose vector, time and condition.

    linear -> blocks of two linear layers, each followed by LeakyReLU(0.01), plus the block's
    input -> linear. The first layer is split by its inputs: what it makes of the condition is
    the same at all diffusion steps, so `project_condition` computes it once.

    Attributes:
      pose_size: length N of the vectors, 48.
      width: hidden width, 1024.
      num_blocks: residual blocks, 2.
      dtype: type of the matrix products; parameters are float32.
    """

    pose_size: int = POSE_SIZE
    width: int = 1024
    num_blocks: int = 2
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the layers."""

        def linear(features: int, use_bias: bool = True) -> nn.Dense:
            return nn.Dense(features, use_bias=use_bias, dtype=self.dtype)

        self.input = linear(self.width)
        self.condition = linear(self.width, use_bias=False)
        self.blocks = [(linear(self.width), linear(self.width)) for _ in range(self.num_blocks)]
        self.output = linear(self.pose_size)

    def project_condition(self, condition: Float[Array, "*batch C"]) -> Float[Array, "*batch W"]:
        """The condition's part of the first layer."""
        return self.condition(condition)

    def __call__(
        self,
        x_t: Float[Array, "*batch N"],
        t: Real[Array, "*batch"],
        projected: Float[Array, "*#batch W"],
    ) -> Float[Array, "*batch N"]:
        """Predicts the noise in x_t, or another target; the network sees the number t as it is."""
        time = t.astype(x_t.dtype)[..., None]
        h = self.input(jnp.concatenate([x_t, time], axis=-1)) + projected
        for first, second in self.blocks:
            h = h + nn.leaky_relu(second(nn.leaky_relu(first(h))))
        return self.output(h).astype(jnp.float32)
