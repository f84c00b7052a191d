"""The diffusion process: noise schedule, forward process and training loss (Sec. 3.3).

Names follow Ho et al. (2020): beta_t, alpha-bar_t = prod(1 - beta), x_0 the data, x_T noise. The
noise prediction eps(x_t, t) is an argument; nothing here knows of networks or poses. Times are
integers 0..T-1, as in the published program: x at t = 0 has been noised once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule and what derives from it, each (T,) float64.

    Schedules of the same numbers are equal: what JAX compiled for one serves the other.

    Attributes:
      betas: variance of the noise added at step t.
    """

    betas: Float[np.ndarray, " T"]

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
        kept = np.sqrt(1.0 - self.betas)
        return (1.0 - self.alphas_cumprod_prev) * kept / (1.0 - self.alphas_cumprod)

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)


def cosine_schedule(
    num_steps: int = 25, offset: float = 0.008, max_beta: float = 0.999
) -> Schedule:
    """The cosine schedule of Nichol and Dhariwal (2021), Eq. 17.

    Args:
      num_steps: T, at least 2.
      offset: s, keeps beta_0 away from 0.
      max_beta: upper bound of each beta; only the last one reaches it.
    """
    time = np.linspace(0.0, 1.0, num_steps + 1)
    alphas_cumprod = np.cos((time + offset) / (1.0 + offset) * np.pi / 2) ** 2
    return Schedule(np.clip(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.0, max_beta))


def _at(values: np.ndarray, t: Integer[Array, "*batch"], x: Array) -> Float[Array, "*batch 1"]:
    """Values (T,) at times t, shaped to scale x (..., N)."""
    return jnp.asarray(values, x.dtype)[t][..., None]


def q_sample(
    schedule: Schedule,
    x_0: Float[Array, "*batch N"],
    t: Integer[Array, "*batch"],
    noise: Float[Array, "*batch N"],
) -> Float[Array, "*batch N"]:
    """Noises x_0 to time t (Ho et al. Eq. 4): x_t."""
    return (
        _at(np.sqrt(schedule.alphas_cumprod), t, x_0) * x_0
        + _at(np.sqrt(1.0 - schedule.alphas_cumprod), t, x_0) * noise
    )


def predict_x_0(
    schedule: Schedule,
    x_t: Float[Array, "*batch N"],
    t: Integer[Array, "*batch"],
    eps: Float[Array, "*batch N"],
    clip: float,
) -> Float[Array, "*batch N"]:
    """The x_0 that noise eps implies, clipped to +-clip.

    At t = T - 1 alpha-bar is 4e-6: an error of eps is multiplied by some 500, and without
    the clip the chain starts far outside the data.
    """
    x_0 = (
        _at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        - _at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
    )
    return jnp.clip(x_0, -clip, clip)


def draw_time_and_noise(
    key: Array, schedule: Schedule, shape: tuple[int, ...]
) -> tuple[Integer[Array, "*batch"], Float[Array, "*batch N"]]:
    """Times uniform on 0..T-1 with shape[:-1] and standard normal noise with shape."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, shape[:-1], 0, schedule.num_steps)
    return t, jax.random.normal(noise_key, shape)


def noise_prediction_loss(
    predict_noise: Callable[[Array, Array], Array],
    schedule: Schedule,
    x_0: Float[Array, "*batch N"],
    t: Integer[Array, "*batch"],
    noise: Float[Array, "*batch N"],
) -> Float[Array, ""]:
    """Mean squared error of the predicted noise eps(x_t, t), over all axes (Ho et al. Eq. 14)."""
    return jnp.mean(jnp.square(predict_noise(q_sample(schedule, x_0, t, noise), t) - noise))
