"""The diffusion process: noise schedule, forward process, loss, and the steps of the way back.

Names follow Ho et al. (2020): beta_t, alpha-bar_t = prod(1 - beta), x_0 the data, x_T noise.
The denoiser eps(x_t, t) is an argument everywhere; nothing here knows of networks or poses.
Times are integers 0..T-1, as in the published program: x at t = 0 has been noised once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Denoise = Callable[[Array, Array], Array]
"""eps(x_t, t): the noise in x_t, of the shape of x_t."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule and what derives from it, each (T,) float64.

    Schedules of the same numbers are equal: what JAX compiled for one serves the other.

    Attributes:
      betas: variance of the noise added at step t.
    """

    betas: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Alpha-bar_t, the share of the data's variance left at t."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """Alpha-bar_{t-1}, 1 at t = 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        """In x_0 = this * x_t - `sqrt_recipm1_alphas_cumprod` * eps, the weight of x_t."""
        return np.sqrt(1.0 / self.alphas_cumprod)

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        """Weight of the noise in that formula: sqrt(1 / alpha-bar_t - 1)."""
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0), Ho et al. Eq. 7."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in that mean."""
        return (
            (1.0 - self.alphas_cumprod_prev)
            * np.sqrt(1.0 - self.betas)
            / (1.0 - self.alphas_cumprod)
        )

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)


def cosine_schedule(
    num_steps: int = 25, offset: float = 0.008, max_beta: float = 0.999
) -> Schedule:
    """The cosine schedule of Nichol and Dhariwal (2021), Eq. 17.

    Args:
      num_steps: T.
      offset: s, keeps beta_0 away from 0.
      max_beta: upper bound of each beta; only the last one reaches it.

    Raises:
      ValueError: for fewer than two steps.
    """
    if num_steps < 2:
        raise ValueError(f"a schedule needs at least 2 diffusion steps, not {num_steps}")
    time = np.linspace(0.0, 1.0, num_steps + 1)
    alphas_cumprod = np.cos((time + offset) / (1.0 + offset) * np.pi / 2) ** 2
    return Schedule(np.clip(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.0, max_beta))


def _at(values: np.ndarray, t: Array, x: Array) -> Array:
    """Values (T,) at times t (...), shaped to scale x (..., N)."""
    return jnp.asarray(values, x.dtype)[t][..., None]


def q_sample(schedule: Schedule, x_0: Array, t: Array, noise: Array) -> Array:
    """Noises x_0 to time t (Ho et al. Eq. 4).

    Args:
      schedule: the noise schedule.
      x_0: (..., N), data.
      t: (...), integers in 0..T-1.
      noise: (..., N), standard normal.

    Returns:
      x_t, (..., N).
    """
    return (
        _at(np.sqrt(schedule.alphas_cumprod), t, x_0) * x_0
        + _at(np.sqrt(1.0 - schedule.alphas_cumprod), t, x_0) * noise
    )


def noise_prediction_loss(
    denoise: Denoise, schedule: Schedule, x_0: Array, t: Array, noise: Array
) -> Array:
    """Mean squared error of the predicted noise (Ho et al. Eq. 14), a mean over all axes.

    Args:
      denoise: eps(x_t, t).
      schedule: the noise schedule.
      x_0: (..., N), data.
      t: (...), integers in 0..T-1.
      noise: (..., N), standard normal.
    """
    x_t = q_sample(schedule, x_0, t, noise)
    return jnp.mean(jnp.square(denoise(x_t, t) - noise))


def draw_time_and_noise(
    key: Array, schedule: Schedule, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Times uniform on 0..T-1 with shape[:-1] and standard normal noise with shape."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, shape[:-1], 0, schedule.num_steps)
    return t, jax.random.normal(noise_key, shape)


def predict_x_0(schedule: Schedule, x_t: Array, t: Array, eps: Array, clip: float) -> Array:
    """The x_0 that noise eps implies, clipped to +-clip.

    At t = T - 1 alpha-bar is 4e-6: an error of eps is multiplied by some 500, and without
    the clip the chain starts far outside the data.
    """
    x_0 = (
        _at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        - _at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
    )
    return jnp.clip(x_0, -clip, clip)


@flax.struct.dataclass
class ReverseSteps:
    """A way back from noise to data: what every solver here does, as a table.

    A step leads from x_t, by the x_0 that the denoiser implies, to
    x = `x_t` x_t + `x_0` x_0 + `last_x_0` (the step before's x_0) + `noise` z, z standard normal.

    Attributes:
      times: (N,) integers, the t of each step, falling.
      x_t: (N,) float64, and so the other weights.
      x_0: likewise.
      last_x_0: likewise; 0 in the first step.
      noise: likewise; all 0 if the way is deterministic, always 0 in the last step.
    """

    times: Array | np.ndarray
    x_t: Array | np.ndarray
    x_0: Array | np.ndarray
    last_x_0: Array | np.ndarray
    noise: Array | np.ndarray

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.times)

    @property
    def is_deterministic(self) -> bool:
        """Whether no step adds noise."""
        return not self.noise.any()


MAX_GAIN = 20.0
"""Fewer steps than T begin at the largest t with 1 / sqrt(alpha-bar_t) at most this.

From the last time of the trained schedule (507 with T = 25) an error of the denoiser leads to an
x_0 far outside of the data, where the clip decides. The noise of the paper's 25 steps makes the
chain forget that; a deterministic solver, or a few large steps, do not.
"""

_SOLVERS = ("ddpm", "ddim", "dpm++")


def reverse_steps(schedule: Schedule, solver: str = "ddpm") -> ReverseSteps:
    """The steps of a solver on the trained schedule.

    "ddpm" draws from the posterior q(x_s | x_t, x_0) (Ho et al. 2020, Alg. 2, Eq. 7): the
    published sampler. "ddim" is its deterministic sibling (Song et al. 2021, Eq. 12 with sigma =
    0), "dpm++" DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2; first order in the
    first and the last step). All land on x_0 in the last step.

    Args:
      schedule: the noise schedule.
      solver: "ddpm" for the paper's T steps; "ddpm:8", "ddim:8" or "dpm++:8" for fewer, evenly
        spread from where `MAX_GAIN` says, the last leading to x_0.

    Raises:
      ValueError: for an unknown solver, or a number of steps that the schedule has not.
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
        raise ValueError(
            f"the solver must be 'ddpm', or {' or '.join(_SOLVERS)} with 1 to {len(few)} steps,"
            f" such as 'ddpm:8', not {solver!r}"
        )
    num_steps = len(times)
    alpha_bar = schedule.alphas_cumprod[times]
    alpha_bar_next = np.append(schedule.alphas_cumprod[times[1:]], 1.0)
    zeros = np.zeros(num_steps)
    if name == "ddpm":
        share = alpha_bar / alpha_bar_next
        return ReverseSteps(
            times=times,
            x_t=np.sqrt(share) * (1.0 - alpha_bar_next) / (1.0 - alpha_bar),
            x_0=np.sqrt(alpha_bar_next) * (1.0 - share) / (1.0 - alpha_bar),
            last_x_0=zeros,
            noise=np.sqrt((1.0 - share) * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)),
        )
    ratio = np.sqrt((1.0 - alpha_bar_next) / (1.0 - alpha_bar))
    x_0 = np.sqrt(alpha_bar_next) - ratio * np.sqrt(alpha_bar)
    last_x_0 = zeros
    if name == "dpm++":
        half_log_snr = 0.5 * np.log(alpha_bar / (1.0 - alpha_bar))
        step = np.diff(half_log_snr)
        extrapolated = np.zeros(num_steps)
        # Steps 1 .. N - 2 lead from times[1:-1]; of `step`, that before is one back.
        extrapolated[1:-1] = 0.5 * step[1:] / step[:-1]
        x_0, last_x_0 = x_0 * (1.0 + extrapolated), -x_0 * extrapolated
    return ReverseSteps(times=times, x_t=ratio, x_0=x_0, last_x_0=last_x_0, noise=zeros)


def reverse_step(
    denoise: Denoise,
    schedule: Schedule,
    row: ReverseSteps,
    x_t: Array,
    last_x_0: Array,
    noise: Array | None,
    clip: float,
) -> tuple[Array, Array]:
    """One step of the way back.

    Args:
      denoise: eps(x_t, t).
      schedule: the noise schedule.
      row: one row of the table: scalars.
      x_t: (..., N).
      last_x_0: (..., N), the x_0 of the step before.
      noise: (..., N), standard normal; None for none.
      clip: bound of the predicted x_0.

    Returns:
      The next x and this step's x_0.
    """
    t = jnp.broadcast_to(row.times, x_t.shape[:-1])
    x_0 = predict_x_0(schedule, x_t, t, denoise(x_t, t), clip)
    x = x_t * row.x_t + x_0 * row.x_0 + last_x_0 * row.last_x_0
    if noise is not None:
        x = x + noise * row.noise
    return x, x_0
