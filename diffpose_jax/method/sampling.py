"""Sampling: solvers as tables of steps, and the reverse chain of one hypothesis (Sec. 3.3).

Nothing here knows of networks: `denoise(x_t, t)` predicts x_0. A solver's step leads from x_t to
x = `x_t` x_t + `x_0` x_0 + `last_x_0` (the step before's x_0) + `noise` z, z standard normal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, Key

from diffpose_jax.config import ConfigError
from diffpose_jax.method.diffusion import Schedule, posterior
from diffpose_jax.method.pose_vector import POSE_SIZE

Denoise = Callable[[Array, Array], Array]
"""The prediction of x_0 from (x_t, t), of the shape of x_t."""


@flax.struct.dataclass
class PredictionErrors:
    """Moments of the training data, and of a network's errors on data held out of the training.

    Attributes:
      mean: of the data, by coordinate.
      variance: likewise.
      error: E[e e^T] of e = x_0 - prediction, at each t.
      cross: E[e r^T] with the residual r = x_t - sqrt(alpha-bar) prediction; 0 for the best
        prediction.
      residual: E[r r^T].
      noise: by solver, the factor of the variance that the errors add to its steps; 1 if a solver
        is not in it. A mean square is that of the hard images, and too much for most.
    """

    mean: Float[np.ndarray, " N"]
    variance: Float[np.ndarray, " N"]
    error: Float[np.ndarray, "T N N"]
    cross: Float[np.ndarray, "T N N"]
    residual: Float[np.ndarray, "T N N"]
    noise: Mapping[str, float] = flax.struct.field(pytree_node=False, default_factory=dict)


Weights = Float[Array | np.ndarray, "*S"] | Float[Array | np.ndarray, "*S_and_N"]
"""Of each of S steps a number, or a matrix (S, N, N)."""


@flax.struct.dataclass
class Steps:
    """A solver: where it begins and the weights of each of its S steps, all float64.

    Attributes:
      name: what it was parsed from, such as "ddpm:8".
      times: the t of each step, falling.
      x_t: weights of x_t.
      x_0: those of the predicted x_0.
      last_x_0: those of the step before's; 0 in the first step.
      noise: those of standard normal noise; None if the solver is deterministic.
      start: mean and deviation of x at the first t; None if it is standard normal.
    """

    name: str = flax.struct.field(pytree_node=False)
    times: Integer[Array | np.ndarray, "*S"]
    x_t: Weights
    x_0: Weights
    last_x_0: Float[Array | np.ndarray, "*S"]
    noise: Weights | None
    start: tuple[Float[Array | np.ndarray, " N"], Float[Array | np.ndarray, " N"]] | None = None

    def __len__(self) -> int:
        return len(self.times)


MAX_GAIN = 20.0
"""Fewer steps than T begin at the largest t with 1 / sqrt(alpha-bar_t) at most this.

From the last time of the trained schedule (507 with T = 25) an error of the predicted noise leads
to an x_0 far outside of the data, where the clip decides. The noise of the paper's 25 steps makes
the chain forget that; a deterministic solver, or a few large steps, do not.
"""

_SOLVER = re.compile(r"(ddpm|ddim|dpm\+\+)(?::([0-9]{1,5}))?(?:@([0-9]{1,5}))?(?:\+(var|cov))?")
ERRORS = "prediction_errors.npz"
"""The file in a model's folder with its `PredictionErrors`."""

_RIDGE, _SHRINKAGE = 0.02, 0.02  # of what is measured on some thousand frames of a few recordings


def _split(schedule: Schedule, solver: str) -> tuple[str, np.ndarray, bool, str | None]:
    """The family of a solver, its times, whether it names its first one, and "var" or "cov"."""
    matched = _SOLVER.fullmatch(solver)
    name, number, first, measured = matched.groups() if matched else ("", None, None, None)
    few = int(np.sum(schedule.alphas_cumprod >= MAX_GAIN**-2))
    last = schedule.num_steps - 1
    if first is not None:
        last = min(int(first), schedule.num_steps)
    elif number is not None:
        last = few - 1
    count = last + 1 if number is None else int(number)
    is_known = matched and (name == "ddpm" or (number is not None and measured is None))
    if not is_known or last == schedule.num_steps or not 1 <= count <= last + 1:
        raise ConfigError(
            f"the solver must be ddpm, or ddpm, ddim or dpm++ with 1 to {few} steps, such as"
            f" ddpm:8, not {solver!r}. @T begins at t = T, 0 to {schedule.num_steps - 1}, and takes"
            " at most T + 1 steps; +var or +cov, of ddpm alone, makes use of the measured errors of"
            " the prediction: ddpm:4@24+cov"
        )
    # To end with t = 0 would spend a step where next to nothing is left to do.
    times = -(-(last + 1) * np.arange(count, 0, -1) // count) - 1
    return name, times, first is not None, measured


def needs_errors(schedule: Schedule, solver: str) -> bool:
    """Whether `parse_solver` needs `PredictionErrors` for it.

    Raises:
      ConfigError: for an unknown solver.
    """
    _, _, has_start, measured = _split(schedule, solver)
    return has_start or measured is not None


def parse_solver(
    schedule: Schedule, solver: str = "ddpm", errors: PredictionErrors | None = None
) -> Steps:
    """The steps of a solver on the trained schedule.

    "ddpm" draws from the posterior q(x_s | x_t, x_0) (Ho et al. 2020, Alg. 2, Eq. 7): the
    published sampler. "ddim" is its deterministic variant (Song et al. 2021, Eq. 12 with sigma =
    0), "dpm++" DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2; first order in the
    first and the last step). All end at x_0.

    The posterior is that of a known x_0, and too narrow for a predicted one. "+cov" makes use of
    the measured errors of the prediction: it is moved by the best linear estimate of its error from
    the residual, and what error is left adds to each step's noise its covariance times the square
    of x_0's weight, also in the last step, times `PredictionErrors.noise`. For Gaussian data any
    number of such steps is exact (with a factor of 1).
    (Bao et al., Analytic-DPM, ICLR 2022, Theorem 1, has this variance, isotropic, for the best
    prediction.) "+var" does so by coordinate, without correlations.

    Args:
      schedule: the noise schedule.
      solver: `ddpm[:N][@T][+var|+cov]`: "ddpm" for the paper's T steps; "ddpm:8", "ddim:8" or
        "dpm++:8" for fewer, evenly spread from where `MAX_GAIN` says, the last leading to x_0;
        "ddpm:8@24" for steps from t = 24, where x is drawn with the data's mean and variance.
      errors: what was measured of the model; solvers with @ or + need it.

    Raises:
      ConfigError: for an unknown solver, a number of steps that the schedule does not have, or
        errors that are needed and not there.
    """
    name, times, has_start, measured = _split(schedule, solver)
    if errors is None and (has_start or measured):
        raise ConfigError(
            f"the solver {solver} needs the model's {ERRORS}, which it does not have:"
            f" `python -m experiments.evaluate --solver {solver}` measures it, on recordings held"
            " out of the training (config.data.calibration_share); or take another, such as ddpm"
        )
    alpha_bar = schedule.alphas_cumprod[times]
    alpha_bar_next = np.append(schedule.alphas_cumprod[times[1:]], 1.0)
    start = None
    if has_start and errors is not None:
        share = alpha_bar[0]
        start = np.sqrt(share) * errors.mean, np.sqrt(share * errors.variance + 1.0 - share)
    zeros = np.zeros(len(times))
    if name == "ddpm":
        x_t, x_0, variance = posterior(alpha_bar, alpha_bar_next)
        noise = np.sqrt(variance)
        if measured and errors is not None:
            signal = np.sqrt(alpha_bar)
            factor = errors.noise.get(solver, 1.0)
            x_t, x_0, noise = _corrected(
                measured, signal, times, x_t, x_0, variance, errors, factor
            )
        return Steps(solver, times, x_t, x_0, zeros, noise, start)
    ratio = np.sqrt((1.0 - alpha_bar_next) / (1.0 - alpha_bar))
    x_0 = np.sqrt(alpha_bar_next) - ratio * np.sqrt(alpha_bar)
    extrapolated = zeros
    if name == "dpm++":
        step = np.diff(0.5 * np.log(alpha_bar / (1.0 - alpha_bar)))
        extrapolated = np.zeros(len(times))
        # Steps 1 .. S - 2 lead from times[1:-1]; of `step`, that before is one back.
        extrapolated[1:-1] = 0.5 * step[1:] / step[:-1]
    return Steps(solver, times, ratio, x_0 * (1.0 + extrapolated), -x_0 * extrapolated, None, start)


def _corrected(
    measured: str,
    signal: Float[np.ndarray, " S"],
    times: Integer[np.ndarray, " S"],
    x_t: Float[np.ndarray, " S"],
    x_0: Float[np.ndarray, " S"],
    variance: Float[np.ndarray, " S"],
    errors: PredictionErrors,
    factor: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (S, N, N) of x_t, x_0 and noise that make use of the errors."""
    moments = (errors.error, errors.cross, errors.residual)
    error, cross, residual = (moment[times].astype(np.float64) for moment in moments)
    if measured == "var":
        error, cross, residual = (x * np.eye(x.shape[1]) for x in (error, cross, residual))
    signal, x_t, x_0, variance = (w[:, None, None] for w in (signal, x_t, x_0, variance))
    identity = np.eye(error.shape[1])
    ridge = _RIDGE * np.mean(np.diagonal(residual, axis1=1, axis2=2), axis=1)[:, None, None]
    gain = cross @ np.linalg.inv(residual + ridge * identity)
    moved = gain @ np.swapaxes(cross, 1, 2)
    left = error - moved - np.swapaxes(moved, 1, 2) + gain @ residual @ np.swapaxes(gain, 1, 2)
    left = (1.0 - _SHRINKAGE) * left + _SHRINKAGE * left * identity
    values, vectors = np.linalg.eigh(variance * identity + factor * x_0**2 * left)
    # The symmetric root: it does not turn with the eigenvectors of close eigenvalues.
    noise = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None]) @ np.swapaxes(vectors, 1, 2)
    return x_t * identity + x_0 * gain, x_0 * (identity - signal * gain), noise


def _times(weight: Weights, x: Float[Array, " N"]) -> Float[Array, " N"]:
    weight = jnp.asarray(weight)
    return weight @ x if weight.ndim == 2 else weight * x


def reverse_chain(denoise: Denoise, steps: Steps, noise: Float[Array, "_ N"]) -> Float[Array, " N"]:
    """Runs the steps of the reverse process on given noise.

    Args:
      denoise: x_0 of (x_t, t), t a scalar.
      steps: the solver.
      noise: standard normal: first that of the start, then that of each step (in the last it has
        no effect without measured errors; a deterministic solver needs none).

    Returns:
      x_0.
    """

    def step(carry: tuple[Array, Array], inputs: tuple[Steps, Any]) -> Any:
        x_t, last_x_0 = carry
        row, step_noise = inputs
        x_0 = denoise(x_t, jnp.asarray(row.times))
        x = _times(row.x_t, x_t) + _times(row.x_0, x_0) + last_x_0 * row.last_x_0
        if row.noise is not None:
            x = x + _times(row.noise, step_noise)
        return (x, x_0), None

    x = noise[0]
    if steps.start is not None:
        mean, deviation = map(jnp.asarray, steps.start)
        x = mean + deviation * x
    rows = dataclasses.replace(steps, start=None)
    (x_0, _), _ = jax.lax.scan(
        step, (x, jnp.zeros_like(x)), (rows, None if steps.noise is None else noise[1:])
    )
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
