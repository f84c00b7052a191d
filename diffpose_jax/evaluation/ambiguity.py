"""Gaussians fitted to heatmaps, and the ambiguous subset that they define.

Wehrbein et al. (2021) fit a Gaussian to each joint's heatmap and call a frame ambiguous if one of
them is wide. They fit by `scipy.optimize.curve_fit`; here Levenberg-Marquardt runs on some maps at
once and ends in the same least-squares solution.

The model is m = A exp(-|U d|^2 / 2) with d = (x - x_0, y - y_0) and the upper triangular
U = [[p, q], [0, r]], so that U^T U is the inverse covariance: a rotated Gaussian without offset,
whatever values its six parameters take. All derivatives of m are m times a quadratic polynomial
in d, hence the normal equations need nothing but the moments of m^2 up to order 4 and those of m
times the residual up to order 2: two small matrix products instead of a 4096 x 6 Jacobian.

64 x 16 simulated heatmaps take 140 ms on two cores of a CPU, with the same solutions by
`optimistix.LevenbergMarquardt`, which needs the Jacobian, 1,060 to 1,720.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

MAX_SIGMA_PX = 1000.0
"""Widths are reported up to this; also what a map without a positive cell gets."""

_START_SIGMA_PX = 2.0
_MAX_ITERATIONS = 60
# Maps that are fitted together: as long as the slowest of them takes. Most need four iterations, a
# few need many: 32 together take a third longer, 1,024 six times as long.
_AT_ONCE = 8
# Powers (i, j) of the monomials x^i y^j: 1, x, y, x^2, xy, y^2.
_POWERS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
_X_POWERS = np.array([[a[0] + b[0] for b in _POWERS] for a in _POWERS])
_Y_POWERS = np.array([[a[1] + b[1] for b in _POWERS] for a in _POWERS])


class GaussianFit(NamedTuple):
    """Gaussians fitted to heatmaps.

    Attributes:
      amplitude: the height.
      centre_xy: column and row.
      sigma_px: standard deviations along the principal axes, the larger first.
      angle: direction of the larger axis, radians from the x axis in [-pi/2, pi/2], positive
        towards growing y.
    """

    amplitude: Float[Array, "*B"]
    centre_xy: Float[Array, "*B 2"]
    sigma_px: Float[Array, "*B 2"]
    angle: Float[Array, "*B"]


class _Point(NamedTuple):
    """Parameters (A, x_0, y_0, p, q, r) with the normal equations there."""

    parameters: Float[Array, " 6"]
    cost: Float[Array, ""]
    hessian: Float[Array, "6 6"]  # J^T J
    gradient: Float[Array, " 6"]  # J^T residual


class _State(NamedTuple):
    """Levenberg-Marquardt: the point that was accepted last and how to go on."""

    point: _Point
    damping: Float[Array, ""]
    is_done: Bool[Array, ""]
    iteration: Array


def _normal_equations(parameters: Float[Array, " 6"], heatmap: Float[Array, "H W"]) -> _Point:
    amplitude, x0, y0, p, q, r = parameters
    height, width = heatmap.shape
    dx = jnp.arange(width, dtype=heatmap.dtype) - x0
    dy = jnp.arange(height, dtype=heatmap.dtype) - y0
    u = (p * dx)[None, :] + (q * dy)[:, None]
    v = (r * dy)[:, None]
    shape = jnp.exp(-0.5 * (u * u + v * v))  # m / A
    residual = amplitude * shape - heatmap

    x_powers = jnp.stack([dx**power for power in range(5)], axis=-1)
    y_powers = jnp.stack([dy**power for power in range(5)], axis=-1)
    squares = jnp.einsum("yi,yx,xj->ji", y_powers, shape * shape, x_powers)
    products = jnp.einsum("yi,yx,xj->ji", y_powers[:, :3], shape * residual, x_powers[:, :3])
    moments = squares[_X_POWERS, _Y_POWERS]
    projections = products[_X_POWERS[0], _Y_POWERS[0]]

    # Rows: derivative of m / shape by each parameter, in the monomials of _POWERS.
    factors = jnp.array(
        [
            [1, 0, 0, 0, 0, 0],
            [0, amplitude * p * p, amplitude * p * q, 0, 0, 0],
            [0, amplitude * p * q, amplitude * (q * q + r * r), 0, 0, 0],
            [0, 0, 0, -amplitude * p, -amplitude * q, 0],
            [0, 0, 0, 0, -amplitude * p, -amplitude * q],
            [0, 0, 0, 0, 0, -amplitude * r],
        ]
    )
    return _Point(
        parameters=parameters,
        cost=0.5 * jnp.sum(residual * residual),
        hessian=factors @ moments @ factors.T,
        gradient=factors @ projections,
    )


def _step(state: _State, heatmap: Float[Array, "H W"]) -> _State:
    point, damping = state.point, state.damping
    scale = jnp.diagonal(point.hessian)
    scale = scale + 1e-6 * jnp.max(scale) + 1e-12
    factor = jax.scipy.linalg.cho_factor(point.hessian + jnp.diag(damping * scale))
    step = jax.scipy.linalg.cho_solve(factor, -point.gradient)
    trial = _normal_equations(point.parameters + step, heatmap)
    is_better = trial.cost < point.cost
    is_small = jnp.max(jnp.abs(step) / (jnp.abs(point.parameters) + 1e-2)) < 1e-4
    # In float32 the cost stops falling before the steps are that small.
    is_level = jnp.abs(point.cost - trial.cost) <= 1e-6 * point.cost
    return _State(
        point=jax.tree.map(lambda new, old: jnp.where(is_better, new, old), trial, point),
        damping=jnp.where(is_better, damping / 8.0, damping * 4.0),
        is_done=is_small | is_level | (damping > 1e6),
        iteration=state.iteration + 1,
    )


def _fit(heatmap: Float[Array, "H W"]) -> GaussianFit:
    # Heights of any scale: the damping's and the stopping rule's constants assume about one.
    scale = jnp.maximum(jnp.max(heatmap), 0.0)
    heatmap = heatmap / jnp.where(scale > 0.0, scale, 1.0)
    row, column = jnp.unravel_index(jnp.argmax(heatmap), heatmap.shape)
    start = jnp.array([1.0, column, row, 1 / _START_SIGMA_PX, 0.0, 1 / _START_SIGMA_PX])
    state = jax.lax.while_loop(
        lambda state: (state.iteration < _MAX_ITERATIONS) & ~state.is_done,
        lambda state: _step(state, heatmap),
        _State(_normal_equations(start, heatmap), jnp.array(1e-2), scale <= 0.0, jnp.array(0)),
    )
    amplitude, x0, y0, p, q, r = state.point.parameters
    # Eigenvalues of the inverse covariance [[p^2, pq], [pq, q^2 + r^2]].
    mean = 0.5 * (p * p + q * q + r * r)
    gap = 0.5 * jnp.hypot(p * p - q * q - r * r, 2.0 * p * q)
    # The smaller one from the determinant: their difference would cancel.
    large = mean + gap
    small = (p * r) ** 2 / jnp.maximum(large, 1e-30)
    sigma = jax.lax.rsqrt(jnp.maximum(jnp.stack([small, large]), MAX_SIGMA_PX**-2))
    sigma = jnp.where(scale > 0.0, sigma, MAX_SIGMA_PX)
    angle = 0.5 * jnp.arctan2(-2.0 * p * q, q * q + r * r - p * p)
    return GaussianFit(amplitude * scale, jnp.stack([x0, y0]), sigma, angle)


@jax.jit
def fit_gaussians(heatmaps: Float[Array | np.ndarray, "*B H W"]) -> GaussianFit:
    """Fits a rotated Gaussian without offset to each heatmap, by least squares over all cells.

    The search starts at the argmax with a width of 2 px and finds the solution of
    `scipy.optimize.curve_fit` from that start (of several peaks usually the highest), or a better
    one: with two widths and an angle as parameters, scipy can stop at a circular Gaussian. A map
    without a positive cell has amplitude 0 and both widths `MAX_SIGMA_PX`; on maps of noise the
    result is finite but means little.
    """
    maps = jnp.asarray(heatmaps, jnp.float32).reshape(-1, *heatmaps.shape[-2:])
    fit = jax.lax.map(_fit, maps, batch_size=_AT_ONCE)
    return jax.tree.map(lambda leaf: leaf.reshape(*heatmaps.shape[:-2], *leaf.shape[1:]), fit)


def is_ambiguous(
    heatmaps: Float[Array | np.ndarray, "B J H W"], threshold_px: float = 5.0
) -> Bool[Array, " B"]:
    """Whether a joint's Gaussian is wider than the threshold (H36MA of Wehrbein et al., 2021).

    A map without a positive cell counts as wide.
    """
    return jnp.any(fit_gaussians(heatmaps).sigma_px[..., 0] > threshold_px, axis=-1)
