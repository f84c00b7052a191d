"""Gaussians fitted to heatmaps, and the ambiguous subset that they define.

Wehrbein et al. (2021) fit a Gaussian to each joint's heatmap and call a frame ambiguous if one of
them is wide. They fit by `scipy.optimize.curve_fit`, map by map; here Levenberg-Marquardt runs on
many maps at once and ends in the same least-squares solution.

The model is m = A exp(-|U d|^2 / 2) with d = (x - x_0, y - y_0) and the upper triangular
U = [[p, q], [0, r]], so that U^T U is the inverse covariance: a rotated Gaussian without offset,
whatever values its six parameters take. All derivatives of m are m times a quadratic polynomial
in d, hence the normal equations need nothing but the moments of m^2 up to order 4 and those of m
times the residual up to order 2: two small matrix products instead of a 4096 x 6 Jacobian.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_SIGMA_PX = 1000.0
"""Widths are reported up to this; also what a map without a positive cell gets."""

_START_SIGMA_PX = 2.0
_ITERATIONS = (5, 60)
_CHUNK = 32
# Powers (i, j) of the monomials x^i y^j: 1, x, y, x^2, xy, y^2.
_POWERS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
_X_POWERS = np.array([[a[0] + b[0] for b in _POWERS] for a in _POWERS])
_Y_POWERS = np.array([[a[1] + b[1] for b in _POWERS] for a in _POWERS])


class GaussianFit(NamedTuple):
    """Gaussians fitted to heatmaps of shape (..., H, W).

    Attributes:
        amplitude: (...), height.
        centre_xy: (..., 2), column and row, pixels of the heatmap.
        sigma_px: (..., 2), standard deviations along the principal axes, the larger first.
        angle: (...), direction of the larger axis, radians from the x axis in [-pi/2, pi/2],
            positive towards growing y.
    """

    amplitude: jax.Array
    centre_xy: jax.Array
    sigma_px: jax.Array
    angle: jax.Array


class _State(NamedTuple):
    """Levenberg-Marquardt on N maps: what was accepted last and how to go on."""

    parameters: jax.Array  # (N, 6): A, x_0, y_0, p, q, r
    cost: jax.Array  # (N,)
    hessian: jax.Array  # (N, 6, 6), J^T J
    gradient: jax.Array  # (N, 6), J^T residual
    damping: jax.Array  # (N,)
    done: jax.Array  # (N,) bool
    iteration: jax.Array


def _normal_equations(
    parameters: jax.Array, heatmaps: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cost (N,), J^T J (N, 6, 6) and J^T r (N, 6) of parameters (N, 6)."""
    amplitude, x0, y0, p, q, r = (value[:, None] for value in parameters.T)
    height, width = heatmaps.shape[-2:]
    dx = jnp.arange(width, dtype=heatmaps.dtype)[None] - x0
    dy = jnp.arange(height, dtype=heatmaps.dtype)[None] - y0
    u = (p * dx)[:, None, :] + (q * dy)[:, :, None]
    v = (r * dy)[:, :, None]
    shape = jnp.exp(-0.5 * (u * u + v * v))  # m / A
    residual = amplitude[..., None] * shape - heatmaps
    cost = 0.5 * jnp.sum(residual * residual, axis=(1, 2))

    x_powers = jnp.stack([dx**power for power in range(5)], axis=-1)
    y_powers = jnp.stack([dy**power for power in range(5)], axis=-1)
    squares = jnp.einsum("nyi,nyx,nxj->nji", y_powers, shape * shape, x_powers)
    products = jnp.einsum(
        "nyi,nyx,nxj->nji", y_powers[..., :3], shape * residual, x_powers[..., :3]
    )
    moments = squares[:, _X_POWERS, _Y_POWERS]
    projections = products[:, _X_POWERS[0], _Y_POWERS[0]]

    # Rows: derivative of m / shape by each parameter, in the monomials of _POWERS.
    zero, one = jnp.zeros_like(p), jnp.ones_like(p)
    rows = [
        [one, zero, zero, zero, zero, zero],
        [zero, amplitude * p * p, amplitude * p * q, zero, zero, zero],
        [zero, amplitude * p * q, amplitude * (q * q + r * r), zero, zero, zero],
        [zero, zero, zero, -amplitude * p, -amplitude * q, zero],
        [zero, zero, zero, zero, -amplitude * p, -amplitude * q],
        [zero, zero, zero, zero, zero, -amplitude * r],
    ]
    factors = jnp.stack([jnp.concatenate(row, axis=-1) for row in rows], axis=1)
    hessian = jnp.einsum("nai,nij,nbj->nab", factors, moments, factors)
    return cost, hessian, jnp.einsum("nai,ni->na", factors, projections)


def _solve(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Solves (N, 6, 6) x = (N, 6) for symmetric positive definite matrices by Cholesky's method.

    Written out over the entries: LAPACK is called once per matrix, this once per entry.
    """
    size = matrix.shape[-1]
    low: list[list[jax.Array]] = [[] for _ in range(size)]
    forward: list[jax.Array] = []
    for i in range(size):
        for j in range(i):
            dot = sum((low[i][k] * low[j][k] for k in range(j)), jnp.zeros_like(vector[:, 0]))
            low[i].append((matrix[:, i, j] - dot) / low[j][j])
        squares = sum((entry * entry for entry in low[i]), jnp.zeros_like(vector[:, 0]))
        low[i].append(jnp.sqrt(jnp.maximum(matrix[:, i, i] - squares, 1e-20)))
        dot = sum((low[i][k] * forward[k] for k in range(i)), jnp.zeros_like(vector[:, 0]))
        forward.append((vector[:, i] - dot) / low[i][i])
    solution: list[jax.Array] = [jnp.zeros_like(vector[:, 0])] * size
    for i in reversed(range(size)):
        dot = sum(
            (low[k][i] * solution[k] for k in range(i + 1, size)), jnp.zeros_like(vector[:, 0])
        )
        solution[i] = (forward[i] - dot) / low[i][i]
    return jnp.stack(solution, axis=-1)


def _step(state: _State, heatmaps: jax.Array) -> _State:
    scale = jnp.diagonal(state.hessian, axis1=1, axis2=2)
    scale = scale + 1e-6 * jnp.max(scale, axis=-1, keepdims=True) + 1e-12
    damped = state.hessian + jnp.eye(6)[None] * (state.damping[:, None] * scale)[:, None, :]
    step = _solve(damped, -state.gradient)
    trial = state.parameters + step
    cost, hessian, gradient = _normal_equations(trial, heatmaps)
    better = (cost < state.cost) & ~state.done
    small = jnp.max(jnp.abs(step) / (jnp.abs(state.parameters) + 1e-2), axis=-1) < 1e-4
    # In float32 the cost stops falling before the steps are that small.
    level = jnp.abs(state.cost - cost) <= 1e-6 * state.cost
    return _State(
        parameters=jnp.where(better[:, None], trial, state.parameters),
        cost=jnp.where(better, cost, state.cost),
        hessian=jnp.where(better[:, None, None], hessian, state.hessian),
        gradient=jnp.where(better[:, None], gradient, state.gradient),
        damping=jnp.where(better, state.damping / 8.0, state.damping * 4.0),
        done=state.done | small | level | (state.damping > 1e6),
        iteration=state.iteration + 1,
    )


def _start(heatmaps: jax.Array) -> jax.Array:
    """Parameters (N, 6) that the search begins with: argmax, 2 px, for maps of height one."""
    height, width = heatmaps.shape[-2:]
    best = jnp.argmax(heatmaps.reshape(-1, height * width), axis=-1)
    one = jnp.ones(len(heatmaps), heatmaps.dtype)
    inverse = one / _START_SIGMA_PX
    x, y = (best % width).astype(one.dtype), (best // width).astype(one.dtype)
    return jnp.stack([one, x, y, inverse, jnp.zeros_like(one), inverse], axis=-1)


def _fit_chunk(
    iterations: jax.Array, parameters: jax.Array, done: jax.Array, heatmaps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Improves parameters (N, 6) where not done (N,), until all are or for some iterations."""
    state = _State(
        parameters,
        *_normal_equations(parameters, heatmaps),
        damping=jnp.full(len(heatmaps), 1e-2),
        done=done,
        iteration=jnp.zeros((), jnp.int32),
    )
    state = jax.lax.while_loop(
        lambda state: (state.iteration < iterations) & ~jnp.all(state.done),
        lambda state: _step(state, heatmaps),
        state,
    )
    return state.parameters, state.done


@jax.jit
def _fit(heatmaps: jax.Array) -> GaussianFit:
    # Heights of any scale: the damping's and the stopping rule's constants assume about one.
    scale = jnp.maximum(jnp.max(heatmaps, axis=(1, 2)), 0.0)
    scaled = heatmaps / jnp.where(scale > 0.0, scale, 1.0)[:, None, None]
    padding = -len(heatmaps) % _CHUNK
    scaled = jnp.pad(scaled, ((0, padding), (0, 0), (0, 0)))
    parameters, done = _start(scaled), jnp.pad(scale <= 0.0, (0, padding), constant_values=True)

    def run(
        carry: tuple[jax.Array, jax.Array], iterations: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        order = jnp.argsort(carry[1])
        chunks = jax.tree.map(
            lambda leaf: leaf[order].reshape(-1, _CHUNK, *leaf.shape[1:]), (*carry, scaled)
        )
        improved = jax.lax.map(lambda chunk: _fit_chunk(iterations, *chunk), chunks)
        back = jnp.argsort(order)
        parameters, done = (leaf.reshape(-1, *leaf.shape[2:])[back] for leaf in improved)
        return (parameters, done), None

    # Most maps need four iterations, a few need many. A chunk runs as long as its slowest map:
    # so stop all early and bring those that are not done together for the rest.
    (parameters, _), _ = jax.lax.scan(run, (parameters, done), jnp.array(_ITERATIONS))
    parameters = parameters[: len(heatmaps)]
    amplitude, x0, y0, p, q, r = parameters.T
    # Eigenvalues of the inverse covariance [[p^2, pq], [pq, q^2 + r^2]].
    mean = 0.5 * (p * p + q * q + r * r)
    gap = 0.5 * jnp.hypot(p * p - q * q - r * r, 2.0 * p * q)
    # The smaller one from the determinant: their difference would cancel.
    large = mean + gap
    small = (p * r) ** 2 / jnp.maximum(large, 1e-30)
    sigma = jax.lax.rsqrt(jnp.maximum(jnp.stack([small, large], axis=-1), MAX_SIGMA_PX**-2))
    sigma = jnp.where((scale > 0.0)[:, None], sigma, MAX_SIGMA_PX)
    angle = 0.5 * jnp.arctan2(-2.0 * p * q, q * q + r * r - p * p)
    return GaussianFit(amplitude * scale, jnp.stack([x0, y0], axis=-1), sigma, angle)


def fit_gaussians(heatmaps: jax.Array) -> GaussianFit:
    """Fits a rotated Gaussian without offset to each heatmap, by least squares over all cells.

    The search starts at the argmax with a width of 2 px and finds the solution of
    `scipy.optimize.curve_fit` from that start (of several peaks usually the highest), or a better
    one: with two widths and an angle as parameters, scipy can stop at a circular Gaussian. A map
    without a positive cell has amplitude 0 and both widths `MAX_SIGMA_PX`; on maps of noise the
    result is finite but means little.

    Args:
        heatmaps: (..., H, W), row = y, column = x, finite.

    Returns:
        The fits, with the leading axes of `heatmaps`.

    Raises:
        ValueError: If there are fewer than two axes.
    """
    if heatmaps.ndim < 2:
        raise ValueError(f"heatmaps have shape {heatmaps.shape}; they must be (..., H, W).")
    leading = heatmaps.shape[:-2]
    maps = jnp.asarray(heatmaps, jnp.float32).reshape(-1, *heatmaps.shape[-2:])
    fit = _fit(maps)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), fit)


def is_ambiguous(heatmaps: jax.Array, threshold_px: float = 5.0) -> jax.Array:
    """Tells which frames belong to the ambiguous subset (H36MA of Wehrbein et al., 2021).

    Args:
        heatmaps: (B, 16, 64, 64).
        threshold_px: Widths above this are ambiguous.

    Returns:
        (B,) bool: whether the larger width of the Gaussian fitted to at least one joint is above
        the threshold. A map without a positive cell counts as wide.
    """
    return jnp.any(fit_gaussians(heatmaps).sigma_px[..., 0] > threshold_px, axis=-1)
