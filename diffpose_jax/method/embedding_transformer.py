"""Joint candidates to the condition: joint embedding (Eq. 6) and transformer (Sec. 3.2)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Integer

from diffpose_jax.method.channel_embedding import channel_embedding
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.skeleton import HEATMAP_SIZE


class EncoderLayer(nn.Module):
    """A post-norm transformer encoder layer with ReLU (Vaswani et al. 2017).

    Attributes:
      num_heads: attention heads.
      feed_forward: hidden width of the feed-forward network.
      dropout: rate on the attention weights, the hidden layer and both branches.
      dtype: type of the matrix products.
    """

    num_heads: int = 4
    feed_forward: int = 512
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch J W"], *, deterministic: bool
    ) -> Float[Array, "*batch J W"]:
        """Lets the tokens exchange what they hold."""
        (*_, num_tokens, width) = x.shape
        heads = (self.num_heads, width // self.num_heads)
        drop = self._dropout(
            {
                "weights": (*x.shape[:-2], self.num_heads, num_tokens, num_tokens),
                "attended": x.shape,
                "hidden": (*x.shape[:-1], self.feed_forward),
                "fed": x.shape,
            },
            deterministic=deterministic,
        )

        qkv = nn.DenseGeneral((3, *heads), dtype=self.dtype, name="qkv")(x)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key) * heads[1] ** -0.5
        weights = drop("weights", nn.softmax(scores.astype(jnp.float32)).astype(self.dtype))
        mixed = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        attended = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)
        x = nn.LayerNorm(epsilon=1e-5, name="norm1")(x + drop("attended", attended))

        hidden = nn.relu(nn.Dense(self.feed_forward, dtype=self.dtype, name="linear1")(x))
        fed = nn.Dense(width, dtype=self.dtype, name="linear2")(drop("hidden", hidden))
        return nn.LayerNorm(epsilon=1e-5, name="norm2")(x + drop("fed", fed))

    def _dropout(
        self, shapes: dict[str, tuple[int, ...]], *, deterministic: bool
    ) -> Callable[[str, Array], Array]:
        """Makes `drop(name, x)`, which zeroes elements of x and scales the others up.

        All masks of the layer come from one draw of 16 bits an element: one for each mask, of 32
        bits, takes three times as long, a tenth of a training step.
        """
        if deterministic or self.dropout == 0:
            return lambda name, x: x
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        bits = jax.random.bits(self.make_rng("dropout"), ((sum(sizes.values()) + 1) // 2,))
        draws = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)
        threshold = round((1.0 - self.dropout) * 2**16)
        ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
        masks = {
            name: (draws[ends[name] - sizes[name] : ends[name]] < threshold).reshape(shape)
            for name, shape in shapes.items()
        }
        return lambda name, x: jnp.where(masks[name], x * (2**16 / threshold), 0.0)


class EmbeddingTransformer(nn.Module):
    """Condition of the denoiser from the candidates of all joints.

    A candidate's channel embedding is weighed by its likelihood, passed through a linear
    layer and summed over the candidates (Eq. 6); a learned vector for each joint is added; the
    transformer works on the 16 joints; its outputs, flattened, pass a last linear layer.

    Attributes:
      num_kernels: K, channels per axis; a token is 2 K wide.
      condition_size: C.
      num_layers: encoder layers; 0 is the ablation "w/o transformer".
      num_heads: attention heads.
      feed_forward: hidden width of the encoder layers.
      dropout: rate within the encoder layers.
      joint_dropout: probability that a joint's embedding is zeroed in training.
      likelihood_scaling: whether candidates are weighed by their likelihood.
      cross_spatial: whether the linear layer that mixes the x and y channels is there.
      standardise: whether coordinates are centred and divided by their standard deviation
        over all candidates and joints (as the paper says) and not taken as they are.
      dtype: type of the matrix products.
    """

    num_kernels: int = 64
    condition_size: int = 2048
    num_layers: int = 4
    num_heads: int = 4
    feed_forward: int = 512
    dropout: float = 0.1
    joint_dropout: float = 0.01
    likelihood_scaling: bool = True
    cross_spatial: bool = True
    standardise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, candidates: Candidates, *, deterministic: bool = True
    ) -> Float[Array, "*batch C"]:
        """Candidates (..., S, J) to the condition; in training with the rng "dropout"."""
        cells, weight = jnp.asarray(candidates.cells), jnp.asarray(candidates.likelihood)
        if not self.likelihood_scaling:
            weight = jnp.ones_like(weight)
        histograms = axis_histograms(cells, weight.astype(jnp.float32))
        grid = jnp.asarray(np.arange(HEATMAP_SIZE) * (2.0 / HEATMAP_SIZE) - 1.0, jnp.float32)
        if self.standardise:
            counts = axis_histograms(cells, jnp.ones_like(weight, jnp.float32))
            table = channel_embedding(_standardised(grid, counts), self.num_kernels)
            embedding = jnp.einsum("...jai,...aik->...jak", histograms, table)
        else:
            embedding = histograms @ channel_embedding(grid, self.num_kernels)
        embedding = embedding.reshape(*embedding.shape[:-2], -1)

        if not deterministic and self.joint_dropout > 0:
            kept = jax.random.bernoulli(
                self.make_rng("dropout"), 1.0 - self.joint_dropout, embedding.shape[:-1]
            )
            embedding = jnp.where(kept[..., None], embedding, 0.0)
        width = embedding.shape[-1]
        if self.cross_spatial:
            # The layer is linear: applied to the sum, with the bias counted once a candidate.
            linear = nn.Dense(width, use_bias=False, dtype=self.dtype, name="cross_spatial")
            bias = self.param("cross_spatial_bias", nn.initializers.zeros, (width,))
            bias = jnp.broadcast_to(cells.shape[-2] * bias, embedding.shape)
            embedding = linear(embedding) + bias
        joints = self.param(
            "joint_embedding", nn.initializers.normal(1.0), (embedding.shape[-2], width)
        )
        tokens = embedding + jnp.broadcast_to(joints, embedding.shape)

        for layer in range(self.num_layers):
            tokens = EncoderLayer(
                num_heads=self.num_heads,
                feed_forward=self.feed_forward,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f"layer{layer}",
            )(tokens, deterministic=deterministic)
        flat = tokens.reshape(*tokens.shape[:-2], -1)
        return nn.Dense(self.condition_size, dtype=self.dtype, name="condition")(flat)


@functools.partial(jnp.vectorize, signature="(s,j),(s,j)->(j,a,i)")
def axis_histograms(
    cells: Integer[Array, "*batch S J"], weight: Float[Array, "*batch S J"]
) -> Float[Array, "*batch J 2 64"]:
    """Sums the candidates' weights over the columns, and over the rows, of the heatmap.

    A sum of channel embeddings is such a histogram times the embeddings of the 64 possible
    coordinates, exactly, at a sixtieth of the cost.
    """
    cells = cells.astype(jnp.int32)
    column, row = cells % HEATMAP_SIZE, cells // HEATMAP_SIZE
    # Other devices add to the same cell in an order that changes from run to run.
    return jax.lax.platform_dependent(
        column, row, weight, cpu=_histograms_by_adding, default=_histograms_by_comparing
    )


def _histograms_by_adding(column: Array, row: Array, weight: Array) -> Array:
    num_joints = column.shape[1]
    joint = jnp.arange(num_joints)[None, :]
    empty = jnp.zeros((num_joints, 2, HEATMAP_SIZE), weight.dtype)
    return empty.at[joint, 0, column].add(weight).at[joint, 1, row].add(weight)


def _histograms_by_comparing(column: Array, row: Array, weight: Array) -> Array:
    cell = jnp.arange(HEATMAP_SIZE)[None, None]
    return jnp.stack(
        [
            jnp.sum(jnp.where(place[..., None] == cell, weight[..., None], 0), axis=0)
            for place in (column, row)
        ],
        axis=1,
    )


def _standardised(
    grid: Float[Array, 64], counts: Float[Array, "*batch J 2 64"]
) -> Float[Array, "*batch 2 64"]:
    """The possible coordinates, standardised by an image's candidates.

    Less their mean, over their standard deviation; `counts` says how many candidates have each.
    """
    share = jnp.sum(counts, axis=-3)
    share = share / jnp.sum(share, axis=-1, keepdims=True)
    grid = jnp.broadcast_to(grid, share.shape)
    centred = grid - jnp.sum(share * grid, axis=-1, keepdims=True)
    variance = jnp.sum(share * jnp.square(centred), axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.maximum(variance, 1e-12))
