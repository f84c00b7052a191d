"""Encoders without the channel embedding, which the paper compares with (Table 3).

They take the place of the embedding transformer. The denoiser's first layer, which is linear,
projects what they give: a linear layer of their own would add nothing.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from diffpose_jax.method.heatmaps import Candidates


class CandidateVector(nn.Module):
    """The candidates themselves: "sample-free" with the argmax alone, "sample-based" with many.

    A set has no order but a vector has one, so the candidates of a joint are sorted by
    likelihood, the likeliest first.

    Attributes:
      likelihood_scaling: whether the likelihoods stand in the vector beside the coordinates.
    """

    likelihood_scaling: bool = True

    @nn.compact
    def __call__(
        self, candidates: Candidates, *, deterministic: bool = True
    ) -> Float[Array, "*batch C"]:
        """Candidates (..., S, J) to vectors: x, y and likelihood (C = 3 S J, or 2 S J without)."""
        del deterministic
        likelihood = jnp.asarray(candidates.likelihood).astype(jnp.float32)
        order = jnp.argsort(-likelihood, axis=-2)
        columns = [jnp.take_along_axis(candidates.xy, order[..., None], axis=-3)]
        if self.likelihood_scaling:
            columns.append(jnp.take_along_axis(likelihood, order, axis=-2)[..., None])
        vector = jnp.concatenate(columns, axis=-1)
        return vector.reshape(*vector.shape[:-3], -1)


class HeatmapResNet(nn.Module):
    """A ResNet-18 over the heatmaps themselves: "full heatmap" (He et al., CVPR 2016).

    Groups are normalised instead of batches (Wu and He, ECCV 2018), so that the condition is a
    function of the one image.

    Attributes:
      width: channels of the first stage, 64; they double with each of the four stages.
      dtype: type of the matrix products.
    """

    width: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, heatmaps: Float[Array, "*batch J H W"], *, deterministic: bool = True
    ) -> Float[Array, "*batch C"]:
        """Heatmaps to vectors of 8 times the width."""
        del deterministic
        leading = heatmaps.shape[:-3]
        x = jnp.moveaxis(heatmaps.reshape(-1, *heatmaps.shape[-3:]), 1, -1).astype(jnp.float32)
        x = nn.relu(self._norm(self._conv(self.width, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                x = self._block(x, self.width * 2**stage, 2 if stage and not block else 1)
        return jnp.mean(x, axis=(1, 2)).reshape(*leading, -1)

    def _conv(self, features: int, size: int, stride: int) -> nn.Conv:
        padding = ((size // 2, size // 2),) * 2
        return nn.Conv(
            features, (size, size), stride, padding=padding, use_bias=False, dtype=self.dtype
        )

    def _norm(self, x: Array) -> Array:
        return nn.GroupNorm(num_groups=min(32, self.width // 4))(x)

    def _block(self, x: Array, features: int, stride: int) -> Array:
        y = nn.relu(self._norm(self._conv(features, 3, stride)(x)))
        y = self._norm(self._conv(features, 3, 1)(y))
        if y.shape != x.shape:
            x = self._norm(self._conv(features, 1, stride)(x))
        return nn.relu(x + y)
