"""The log-density of pose vectors, by the probability-flow ODE (Song et al. 2021, Sec. 4.3).

The deterministic process with the marginals of the diffusion carries a vector to t = T - 1, where
its density is that of noise; on the way the density changes by the divergence (their Eq. 39). So
this is the density at t = 0, where vectors have been noised once (7 mm with the paper's schedule),
and that of the ODE, not of a stochastic solver's draws.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jaxtyping import Float

from diffpose_jax.method.diffusion import NoiseLevel, Schedule

NUM_STEPS = 512
"""Steps of the ODE. The divergence of a network with LeakyReLU is piecewise constant in x and its
integral converges slowly: twice as many change the quickstart's densities by 0.02 nat at most."""

Predict = Callable[[Array, Array, NoiseLevel], Array]
"""The prediction of x_0 from (x_t, t, its noise level), t any number in 0..T-1."""


def centred_basis(num_joints: int) -> Float[np.ndarray, "N D"]:
    """An orthonormal basis of the vectors [x.., y.., z..] whose joints have the mean 0."""
    return np.kron(np.eye(3), scipy.linalg.helmert(num_joints).T)


def log_density(
    predict: Predict,
    schedule: Schedule,
    y: Float[Array, " D"],
    basis: Float[np.ndarray, "N D"],
    num_steps: int = NUM_STEPS,
) -> Float[Array, ""]:
    """Log-density of one vector, in nats; `vmap` it.

    With l = log(alpha-bar / (1 - alpha-bar)) as the time, dx / dl = (a x_0 - a^2 x) / 2, where a =
    sqrt(alpha-bar) and x_0 is predicted. Heun's method with steps uniform in l; the divergence, the
    exact trace of the Jacobian, is integrated by the trapezoid rule. The t that the network sees is
    linear in l between the integers.

    Args:
      predict: the prediction of x_0, without the clip.
      schedule: the noise schedule.
      y: coordinates in the basis.
      basis: an orthonormal basis of the subspace that vectors lie in.
      num_steps: number of steps.
    """
    log_snr = np.log(schedule.alphas_cumprod) - np.log1p(-schedule.alphas_cumprod)
    columns, identity = jnp.asarray(basis, y.dtype), jnp.eye(len(y), dtype=y.dtype)

    def slope_at(at: Array) -> Callable[[Array], Array]:
        level = NoiseLevel(*(jnp.sqrt(jax.nn.sigmoid(x))[None] for x in (at, -at)))
        t = jnp.interp(-at, -log_snr, np.arange(schedule.num_steps, dtype=np.float64))

        def slope(y: Array) -> Array:
            x_0 = columns.T @ predict(columns @ y, t.astype(y.dtype), level)
            return 0.5 * level.signal * (x_0 - level.signal * y)

        return slope

    def step(y: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        here, there = ends
        slope, derivative = jax.linearize(slope_at(here), y)
        divergence = jnp.trace(jax.vmap(derivative)(identity))
        predicted = slope_at(there)(y + (there - here) * slope)
        return y + 0.5 * (there - here) * (slope + predicted), divergence

    grid = jnp.linspace(log_snr[0], log_snr[-1], num_steps + 1, dtype=y.dtype)
    # The step from the last point is not taken; its divergence counts.
    ends = grid, jnp.append(grid[1:], grid[-1])
    y, divergences = jax.lax.scan(step, y, ends)
    change = jnp.trapezoid(divergences, grid)
    return change + jnp.sum(jax.scipy.stats.norm.logpdf(y))
