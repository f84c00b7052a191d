"""The diffusion process: noise schedule, noise levels and what a network predicts (Sec. 3.3).

Names follow Ho et al. (2020): beta_t, alpha-bar_t = prod(1 - beta), x_0 the data, x_T noise, eps
the noise. Nothing here knows of networks or poses. Times are integers 0..T-1, as in the published
program: x at t = 0 has been noised once.
"""

from __future__ import annotations

import dataclasses

import flax.struct
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

    def level(self, t: Integer[Array, "*batch"]) -> NoiseLevel:
        """The noise level at times t, (*batch, 1)."""
        values = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        return NoiseLevel(*(jnp.asarray(x, jnp.float32)[t][..., None] for x in values))


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


def posterior(
    alpha_bar: Float[np.ndarray, " S"], alpha_bar_s: Float[np.ndarray, " S"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x_t and x_0 in the mean of q(x_s | x_t, x_0), and its variance (Ho et al. Eq. 7).

    Args:
      alpha_bar: that of t.
      alpha_bar_s: that of the earlier s; 1 if x_s is the data.
    """
    share = alpha_bar / alpha_bar_s
    x_t = np.sqrt(share) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar)
    x_0 = np.sqrt(alpha_bar_s) * (1.0 - share) / (1.0 - alpha_bar)
    return x_t, x_0, (1.0 - share) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar)


@flax.struct.dataclass
class NoiseLevel:
    """How much of the data and of noise is in x_t = `signal` x_0 + `noise` eps.

    Attributes:
      signal: sqrt(alpha-bar).
      noise: sqrt(1 - alpha-bar).
    """

    signal: Float[Array, "*level"]
    noise: Float[Array, "*level"]

    def noised(self, x_0: Float[Array, "*#batch N"], eps: Float[Array, "*#batch N"]) -> Array:
        """x_t (Ho et al. Eq. 4)."""
        return self.signal * x_0 + self.noise * eps


@flax.struct.dataclass
class Target:
    """What a network F(x_t, t) predicts at a noise level, and the x_0 that follows from it.

    F = `of_x_0` x_0 + `of_noise` eps, and x_0 = `skip` x_t + `out` F.
    """

    of_x_0: Float[Array, "*level"]
    of_noise: Float[Array, "*level"]
    skip: Float[Array, "*level"]
    out: Float[Array, "*level"]


def noise_target(level: NoiseLevel) -> Target:
    """The noise eps: the paper's target (Ho et al. Eq. 12).

    At t = T - 1 alpha-bar is 4e-6: an error of eps is multiplied by some 500 in x_0.
    """
    zero, one = jnp.zeros_like(level.noise), jnp.ones_like(level.noise)
    return Target(zero, one, one / level.signal, -level.noise / level.signal)


def edm_target(level: NoiseLevel, data_std: Float[Array, "*#level"]) -> Target:
    """The target of unit variance at every noise level (Karras et al. 2022, Table 1, "EDM").

    Their c_skip and c_out for the variance preserving process. In pure noise F is the data over
    their deviation, close to the data it is the noise: an error of F is never multiplied by more
    than `data_std`.

    Args:
      level: the noise level.
      data_std: sigma_data, the deviation of x_0, whose mean is 0.
    """
    spread = jnp.sqrt((level.signal * data_std) ** 2 + level.noise**2)
    return Target(
        of_x_0=level.noise / (data_std * spread),
        of_noise=-level.signal * data_std / spread,
        skip=level.signal * data_std**2 / spread**2,
        out=data_std * level.noise / spread,
    )


def draw_time_and_noise(
    key: Array, schedule: Schedule, shape: tuple[int, ...]
) -> tuple[Integer[Array, "*batch"], Float[Array, "*batch N"]]:
    """Times uniform on 0..T-1 with shape[:-1] and standard normal noise with shape."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, shape[:-1], 0, schedule.num_steps)
    return t, jax.random.normal(noise_key, shape)
