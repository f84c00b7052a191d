"""Sampling: the reverse chain of one hypothesis, and how many of them are computed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from diffpose_jax.method import diffusion


def reverse_chain(
    denoise: diffusion.Denoise,
    schedule: diffusion.Schedule,
    noise: Array,
    clip: float,
    steps: diffusion.ReverseSteps | None = None,
) -> Array:
    """Runs the steps of the reverse process for one sample, deterministically.

    Args:
      denoise: eps(x_t, t) of x_t (N,) and a scalar t.
      schedule: the noise schedule.
      noise: (1 + steps, N), standard normal: first the start x_T, then the noise of the steps
        (the last has no effect); (1, N) will do for a solver without noise.
      clip: bound of the predicted x_0.
      steps: the solver's, by default the T steps t = T - 1, .., 0 of the paper.

    Returns:
      x_0, (N,).
    """
    steps = diffusion.reverse_steps(schedule) if steps is None else steps

    def step(
        carry: tuple[Array, Array], inputs: tuple[diffusion.ReverseSteps, Array | None]
    ) -> tuple[tuple[Array, Array], None]:
        x_t, last_x_0 = carry
        row, step_noise = inputs
        return diffusion.reverse_step(denoise, schedule, row, x_t, last_x_0, step_noise, clip), None

    start = noise[0], jnp.zeros_like(noise[0])
    (x_0, _), _ = jax.lax.scan(step, start, (steps, None if steps.is_deterministic else noise[1:]))
    return x_0


def sample_hypothesis(
    key: Array,
    index: Array,
    denoise: diffusion.Denoise,
    schedule: diffusion.Schedule,
    steps: diffusion.ReverseSteps,
    *,
    size: int,
    clip: float,
) -> Array:
    """Draws one hypothesis of one image; `vmap` it over indices, or images and indices.

    Hypothesis m depends on the key, the condition and m alone: to ask for more hypotheses
    keeps the first ones.

    Args:
      key: the image's key.
      index: m, a scalar.
      denoise: eps(x_t, t) of x_t (N,) and a scalar t, under the image's condition.
      schedule: the noise schedule.
      steps: the solver's steps.
      size: N.
      clip: bound of the predicted x_0.

    Returns:
      (N,).
    """
    num_draws = 1 + (0 if steps.is_deterministic else steps.num_steps)
    noise = jax.random.normal(jax.random.fold_in(key, index), (num_draws, size))
    return reverse_chain(denoise, schedule, noise, clip, steps)


def in_passes(
    function: Callable[[Array], Array], size: int, count: Array | int, per_pass: int
) -> Array:
    """A function of many indices in passes of equally many: in bounded memory, without padding.

    Args:
      function: indices (per_pass,) -> rows (per_pass, N), each of its index alone.
      size: R, how many rows there are.
      count: how many are wanted: the first ones. It may be traced, passes beyond it are not run.
      per_pass: indices of a pass.

    Returns:
      (R, N): the rows; what lies beyond the last pass is 0.
    """
    per_pass = jax.core.min_dim(per_pass, size)
    rows = jax.eval_shape(function, jax.ShapeDtypeStruct((per_pass,), jnp.int32))

    def one_pass(i: Array, out: Array) -> Array:
        # The last pass begins early instead of running over: it computes some rows again.
        start = jnp.minimum(i * per_pass, size - per_pass)
        return jax.lax.dynamic_update_slice(
            out, function(start + jnp.arange(per_pass, dtype=jnp.int32)), (start, 0)
        )

    out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    return jax.lax.fori_loop(0, -(-count // per_pass), one_pass, out)


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
