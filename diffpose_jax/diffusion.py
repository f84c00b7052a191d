"""The diffusion process: noise schedule, forward process, loss and one reverse step.

Names follow Ho et al. (2020): beta_t, alpha-bar_t = prod(1 - beta), x_0 the data, x_T noise.
The denoiser eps(x_t, t) is an argument everywhere; nothing here knows of networks or poses.
Times are integers 0..T-1, as in the published program: x at t = 0 has been noised once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Denoise = Callable[[Array, Array], Array]
"""eps(x_t, t): the noise in x_t, of the shape of x_t."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule and what derives from it, each (T,) float64.

    Attributes:
      betas: variance of the noise added at step t.
    """

    betas: np.ndarray

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


def reverse_step(
    denoise: Denoise, schedule: Schedule, x_t: Array, t: Array, noise: Array, clip: float
) -> Array:
    """One step of the reverse process: a draw of x_{t-1} given x_t (Ho et al. Alg. 2).

    Args:
      denoise: eps(x_t, t).
      schedule: the noise schedule.
      x_t: (..., N).
      t: (...), integers.
      noise: (..., N), standard normal; without effect at t = 0, where the variance is 0.
      clip: bound of the predicted x_0.
    """
    x_0 = predict_x_0(schedule, x_t, t, denoise(x_t, t), clip)
    mean = (
        _at(schedule.posterior_mean_coef1, t, x_t) * x_0
        + _at(schedule.posterior_mean_coef2, t, x_t) * x_t
    )
    return mean + _at(np.sqrt(schedule.posterior_variance), t, x_t) * noise
