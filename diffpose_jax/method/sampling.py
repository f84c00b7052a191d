"""Sampling: solvers as tables of steps, and the reverse chain of one hypothesis (Sec. 3.3).

Nothing here knows of networks: `denoise(x_t, t)` predicts x_0. A solver's step leads from x_t to
x = `x_t` x_t + `x_0` x_0 + `last_x_0` (the step before's x_0) + `noise` z, z standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, Key

from diffpose_jax.config import ConfigError
from diffpose_jax.method.diffusion import Schedule
from diffpose_jax.method.pose_vector import POSE_SIZE

Denoise = Callable[[Array, Array], Array]
"""The prediction of x_0 from (x_t, t), of the shape of x_t."""


@flax.struct.dataclass
class Steps:
    """A solver: the weights of each of its N steps.

    Attributes:
      name: what it was parsed from, such as "ddpm:8".
      times: the t of each step, falling.
      x_t: float64, as are the other weights.
      x_0: likewise.
      last_x_0: likewise; 0 in the first step.
      noise: likewise, 0 in the last step; None if the solver is deterministic.
    """

    name: str = flax.struct.field(pytree_node=False)
    times: Integer[Array | np.ndarray, "*N"]
    x_t: Float[Array | np.ndarray, "*N"]
    x_0: Float[Array | np.ndarray, "*N"]
    last_x_0: Float[Array | np.ndarray, "*N"]
    noise: Float[Array | np.ndarray, "*N"] | None

    def __len__(self) -> int:
        return len(self.times)


MAX_GAIN = 20.0
"""Fewer steps than T begin at the largest t with 1 / sqrt(alpha-bar_t) at most this.

From the last time of the trained schedule (507 with T = 25) an error of the denoiser leads to an
x_0 far outside of the data, where the clip decides. The noise of the paper's 25 steps makes the
chain forget that; a deterministic solver, or a few large steps, do not.
"""

_SOLVERS = ("ddpm", "ddim", "dpm++")


def parse_solver(schedule: Schedule, solver: str = "ddpm") -> Steps:
    """The steps of a solver on the trained schedule.

    "ddpm" draws from the posterior q(x_s | x_t, x_0) (Ho et al. 2020, Alg. 2, Eq. 7): the
    published sampler. "ddim" is its deterministic variant (Song et al. 2021, Eq. 12 with sigma =
    0), "dpm++" DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2; first order in the
    first and the last step). All end at x_0.

    Args:
      schedule: the noise schedule.
      solver: "ddpm" for the paper's T steps; "ddpm:8", "ddim:8" or "dpm++:8" for fewer, evenly
        spread from where `MAX_GAIN` says, the last leading to x_0.

    Raises:
      ConfigError: for an unknown solver, or a number of steps that the schedule does not have.
    """
    name, _, number = solver.partition(":")
    few = np.flatnonzero(schedule.sqrt_recip_alphas_cumprod <= MAX_GAIN)
    if solver == "ddpm":
        times = np.arange(schedule.num_steps)[::-1]
    elif name in _SOLVERS and number.isdecimal() and 1 <= int(number) <= len(few):
        # To end with t = 0 would spend a step where next to nothing is left to do.
        left = np.arange(int(number), 0, -1)
        times = -(-len(few) * left // int(number)) - 1
    else:
        raise ConfigError(
            f"the solver must be 'ddpm', or {' or '.join(_SOLVERS)} with 1 to {len(few)} steps,"
            f" such as 'ddpm:8', not {solver!r}"
        )
    alpha_bar = schedule.alphas_cumprod[times]
    alpha_bar_next = np.append(schedule.alphas_cumprod[times[1:]], 1.0)
    zeros = np.zeros(len(times))
    if name == "ddpm":
        share = alpha_bar / alpha_bar_next
        return Steps(
            name=solver,
            times=times,
            x_t=np.sqrt(share) * (1.0 - alpha_bar_next) / (1.0 - alpha_bar),
            x_0=np.sqrt(alpha_bar_next) * (1.0 - share) / (1.0 - alpha_bar),
            last_x_0=zeros,
            noise=np.sqrt((1.0 - share) * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)),
        )
    ratio = np.sqrt((1.0 - alpha_bar_next) / (1.0 - alpha_bar))
    x_0 = np.sqrt(alpha_bar_next) - ratio * np.sqrt(alpha_bar)
    extrapolated = zeros
    if name == "dpm++":
        step = np.diff(0.5 * np.log(alpha_bar / (1.0 - alpha_bar)))
        extrapolated = np.zeros(len(times))
        # Steps 1 .. N - 2 lead from times[1:-1]; of `step`, that before is one back.
        extrapolated[1:-1] = 0.5 * step[1:] / step[:-1]
    return Steps(solver, times, ratio, x_0 * (1.0 + extrapolated), -x_0 * extrapolated, None)


def reverse_chain(denoise: Denoise, steps: Steps, noise: Float[Array, "_ N"]) -> Float[Array, " N"]:
    """Runs the steps of the reverse process on given noise.

    Args:
      denoise: x_0 of (x_t, t), t a scalar.
      steps: the solver.
      noise: standard normal: first the start x_T, then that of each step (the last has no effect;
        a deterministic solver needs none).

    Returns:
      x_0.
    """

    def step(carry: tuple[Array, Array], inputs: tuple[Steps, Any]) -> Any:
        x_t, last_x_0 = carry
        row, step_noise = inputs
        x_0 = denoise(x_t, jnp.asarray(row.times))
        x = x_t * row.x_t + x_0 * row.x_0 + last_x_0 * row.last_x_0
        if row.noise is not None:
            x = x + step_noise * row.noise
        return (x, x_0), None

    start = noise[0], jnp.zeros_like(noise[0])
    (x_0, _), _ = jax.lax.scan(step, start, (steps, None if steps.noise is None else noise[1:]))
    return x_0


def sample(
    denoise: Denoise, steps: Steps, key: Key[Array, ""], size: int = POSE_SIZE
) -> Float[Array, " N"]:
    """Draws one vector; `vmap` it over keys.

    Args:
      denoise: x_0 of (x_t, t) under one condition, t a scalar.
      steps: the solver.
      key: a random key.
      size: N.
    """
    num_draws = 1 + (0 if steps.noise is None else len(steps))
    return reverse_chain(denoise, steps, jax.random.normal(key, (num_draws, size)))


def in_passes(
    function: Callable[[Integer[Array, " P"]], Any], size: Any, count: Any, per_pass: int
) -> Any:
    """Computes a function of many indices in passes of equally many, in bounded memory.

    Args:
      function: indices (P,) -> pytree of rows (P, ...), each a function of its index alone.
      size: R, how many rows there are; in an export it may be a symbol.
      count: how many are wanted: the first ones. It may be traced, passes beyond it are not run.
      per_pass: P.

    Returns:
      The rows (R, ...); what lies beyond the last pass is 0.
    """
    per_pass = jax.core.min_dim(per_pass, size)
    rows = jax.eval_shape(function, jax.ShapeDtypeStruct((per_pass,), jnp.int32))

    def one_pass(i: Array, out: Any) -> Any:
        # The last pass begins early instead of running over: it computes some rows again.
        start = jnp.minimum(i * per_pass, size - per_pass)
        made = function(start + jnp.arange(per_pass, dtype=jnp.int32))
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice(x, new, (start, *[0] * (x.ndim - 1))),
            out,
            made,
        )

    out = jax.tree.map(lambda row: jnp.zeros((size, *row.shape[1:]), row.dtype), rows)
    return jax.lax.fori_loop(0, -(-count // per_pass), one_pass, out)


def image_keys(key: Key[Array, ""], heatmaps: Float[Array, "B ..."]) -> Key[Array, " B"]:
    """One key per image, from the key and the bits of the image's heatmaps.

    So an image's hypotheses do not depend on where in which batch it stands, and those of
    different images are independent.
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
