"""Sampling: the reverse chain of one hypothesis, and many hypotheses of one image."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from diffpose_jax import diffusion


def reverse_chain(
    denoise: diffusion.Denoise, schedule: diffusion.Schedule, noise: Array, clip: float
) -> Array:
    """Runs the T steps of the reverse process for one sample, deterministically.

    Args:
      denoise: eps(x_t, t) of x_t (N,) and a scalar t.
      schedule: the noise schedule.
      noise: (T + 1, N), standard normal: first the start x_T, then the noise of the steps
        t = T - 1, .., 0 (the last has no effect).
      clip: bound of the predicted x_0.

    Returns:
      x_0, (N,).
    """

    def step(x_t: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        t, step_noise = inputs
        return diffusion.reverse_step(denoise, schedule, x_t, t, step_noise, clip), None

    times = jnp.arange(schedule.num_steps - 1, -1, -1)
    x_0, _ = jax.lax.scan(step, noise[0], (times, noise[1:]))
    return x_0


def sample_hypotheses(
    key: Array,
    denoise: Callable[[Array, Array, Array], Array],
    projected: Array,
    schedule: diffusion.Schedule,
    *,
    size: int,
    num_hypotheses: int,
    clip: float,
) -> Array:
    """Draws the hypotheses of one image.

    Hypothesis m depends on the key, the condition and m alone: to ask for more hypotheses
    keeps the first ones.

    Args:
      key: a random key.
      denoise: eps(x_t, t, projected) of x_t (N,), a scalar t and one projected condition.
      projected: the denoiser's projected condition, (W,) if the hypotheses share one or
        (M, W) if each has its own.
      schedule: the noise schedule.
      size: N.
      num_hypotheses: M.
      clip: bound of the predicted x_0.

    Returns:
      (M, N).
    """

    def hypothesis(index: Array, projected: Array) -> Array:
        noise = jax.random.normal(jax.random.fold_in(key, index), (schedule.num_steps + 1, size))
        return reverse_chain(lambda x_t, t: denoise(x_t, t, projected), schedule, noise, clip)

    over = 0 if projected.ndim == 2 else None
    return jax.vmap(hypothesis, in_axes=(0, over))(jnp.arange(num_hypotheses), projected)


def image_keys(key: Array, heatmaps: Array) -> Array:
    """One key per image, from the key and the image's own bits.

    So an image's hypotheses do not depend on where in which batch it stands, and those of
    different images are independent.

    Args:
      key: a random key.
      heatmaps: (B, ...), float32.

    Returns:
      (B,) keys.
    """
    bits = jax.lax.bitcast_convert_type(heatmaps.reshape(heatmaps.shape[0], -1), jnp.uint32)
    # Each cell's bits and place go through the finaliser of MurmurHash3 (Appleby), so that round
    # numbers, whose low bits are all 0, hash as well as others. The sum is mod 2^32: it does not
    # depend on the order in which a device adds.
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    mixed = bits + place[None]
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    hashes = jnp.sum(mixed ^ (mixed >> 16), axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes)
