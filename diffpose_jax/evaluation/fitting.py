"""What is fitted before an evaluation: baselines, prediction errors, calibration, ambiguous frames.

All but the last are kept in the run's folder, with what they were fitted on; they are
fitted again when that has changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer, Key
from tqdm import tqdm

from diffpose_jax.config import Config, ConfigError, EvaluationConfig
from diffpose_jax.data import pipeline
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.evaluation import ambiguity, calibration, metrics
from diffpose_jax.evaluation import baselines as baselines_lib
from diffpose_jax.evaluation.baselines import Baselines
from diffpose_jax.evaluation.calibration import Calibration
from diffpose_jax.evaluation.evaluate import regression_inputs
from diffpose_jax.inference import Model
from diffpose_jax.io.trees import check_sum
from diffpose_jax.method import sampling
from diffpose_jax.method.heatmaps import AnyArray
from diffpose_jax.method.network import DiffPose, Params
from diffpose_jax.method.pose_vector import POSE_SIZE, moments, pose_to_vector
from diffpose_jax.method.sampling import PredictionErrors
from diffpose_jax.training import checkpoints

BASELINES = "baselines.npz"
"""The file in a run's folder with the baselines."""

_NOISES = 4  # drawn for each image and t where prediction errors are measured
_HYPOTHESES = 50  # of each image where the solvers' noise is fitted

TrainingSplit = Callable[[], tuple[Examples, Examples | None]]
"""Reads what the model was trained on, and the recordings that were held out for calibration.

These are as recorded, as those that a model is tested on or used for: what is fitted to poses that
a training makes up of several holds for such.
"""


def training_split(config: Config, data_dir: str | Path | None) -> TrainingSplit:
    """The training split of a configuration, read when it is needed and then kept."""

    @functools.cache
    def read() -> tuple[Examples, Examples | None]:
        examples = pipeline.load(config.data, "train", data_dir)
        train, held_out = pipeline.hold_out(examples, config.data.calibration_share)
        plain = pipeline.as_recorded(config.data)
        if held_out is not None and plain != config.data:
            names, held_out = held_out.clips, pipeline.load(plain, "train", data_dir)
            held_out = held_out.select(np.flatnonzero(np.isin(held_out.clips, names)))
        return train, held_out

    return read


def baselines(
    key: Key[Array, ""],
    train: TrainingSplit,
    settings: EvaluationConfig,
    fitted_on: dict[str, Any],
    folders: tuple[Path, ...],
) -> Baselines | None:
    """The baselines from the first folder that has them, or fitted now and written to the first.

    Args:
      key: a random key.
      train: the training split.
      settings: `baselines` says whether any are wanted, `regression_*` how they are fitted.
      fitted_on: what they depend on besides.
      folders: the output's and the checkpoint's.
    """
    if not settings.baselines:
        return None
    how = {
        "steps": settings.regression_steps,
        "batch_size": settings.regression_batch_size,
        "width": settings.regression_width,
        "learning_rate": settings.regression_learning_rate,
    }
    fitted_on = fitted_on | {f"regression_{name}": value for name, value in how.items()}
    for path in (folder / BASELINES for folder in folders):
        if path.is_file():
            found, was_fitted_on = baselines_lib.load(path)
            if calibration.is_as_fitted(path, was_fitted_on, fitted_on):
                return found
    examples = train()[0]
    inputs_of = jax.jit(regression_inputs)
    inputs = [np.asarray(inputs_of(examples.heatmaps(rows))) for rows in examples.batches(256)]
    fitted = baselines_lib.fit_baselines(key, np.concatenate(inputs), examples.pose_mm, **how)
    baselines_lib.save(folders[0] / BASELINES, fitted, fitted_on)
    return fitted


def prediction_errors(
    key: Key[Array, ""], train: TrainingSplit, model: Model, solver: str, folder: Path
) -> PredictionErrors | None:
    """What a solver uses of the model's errors: its own, the folder's, or measured and written now.

    None if no recordings were held out of the training.
    """
    found = checkpoints.find_errors((folder,), model.network, model.params) or model.errors
    is_fitted = found is not None and (solver in found.noise or "+" not in solver)
    if is_fitted or not model.config.data.calibration_share:
        return found
    examples, held_out = train()
    if held_out is None:
        return found
    errors_key, noise_key = jax.random.split(key)
    if found is None:
        mean, deviation = moments(examples.pose_mm, model.network.pose_scale)
        error, cross, residual = measure_errors(errors_key, model, held_out)
        found = PredictionErrors(mean, deviation**2, error, cross, residual)
    if "+" in solver:
        model = dataclasses.replace(model, errors=found)
        factor = fit_noise(noise_key, model, held_out, solver)
        found = dataclasses.replace(found, noise={**found.noise, solver: factor})
    checkpoints.write_errors(folder, found, model.params)
    return found


def fit_noise(
    key: Key[Array, ""], model: Model, held_out: Examples, solver: str, max_frames: int = 384
) -> float:
    """The factor of the errors' variance in a solver's steps with the lowest energy score.

    A proper score: it cannot be lowered by hypotheses that are too wide, nor too narrow. The lowest
    of five, moved by the parabola through it and its neighbours.

    Args:
      key: a random key; all factors have the same noise.
      model: the model, with its errors.
      held_out: frames that it was not trained on.
      solver: the solver.
      max_frames: at most so many frames are taken, evenly spread.
    """
    rows, size, exponents = _evenly_spread(held_out, max_frames), 64, np.arange(-3.0, 2.0)
    solvers = []
    for factor in 2.0**exponents:
        errors = model.errors and dataclasses.replace(model.errors, noise={solver: float(factor)})
        solvers.append(sampling.parse_solver(model.network.schedule, solver, errors))
    totals = np.zeros(len(solvers))
    for i, chosen in enumerate(_batches(rows, size, "fitting the noise")):
        maps, counted = held_out.heatmaps(chosen), len(rows) - i * size
        truth_mm = jnp.asarray(np.float32(held_out.pose_mm[chosen]))
        for j, steps in enumerate(solvers):
            poses_mm = model.sample(key, maps, _HYPOTHESES, steps)
            totals[j] += float(np.sum(_energy_scores(poses_mm, truth_mm)[:counted]))
    scores = totals / len(rows)
    best = int(np.clip(np.argmin(scores), 1, len(scores) - 2))
    before, here, after = scores[best - 1 : best + 2]
    curvature = before - 2 * here + after
    shift = 0.5 * (before - after) / curvature if curvature > 0 else 0.0
    return round(float(2.0 ** (exponents[best] + np.clip(shift, -1.0, 1.0))), 3)


@jax.jit
def _energy_scores(
    poses_mm: Float[Array, "B M 17 3"], truth_mm: Float[Array, "B 17 3"]
) -> Float[Array, " B"]:
    """Each frame's energy score, the mean over the joints."""
    errors_mm = metrics.joint_errors(poses_mm, truth_mm[:, None])
    pairs_mm, _ = metrics.mean_pairwise_distances(poses_mm)
    return jnp.mean(errors_mm, axis=(1, 2)) - pairs_mm / 2


def measure_errors(
    key: Key[Array, ""], model: Model, held_out: Examples, max_frames: int = 2048
) -> list[Float[np.ndarray, "T 48 48"]]:
    """The second moments of `PredictionErrors`, on recordings that the model was not trained on.

    Args:
      key: a random key.
      model: the model.
      held_out: the frames.
      max_frames: at most so many frames are taken, evenly spread.
    """
    network, size, rows = model.network, 64, _evenly_spread(held_out, max_frames)
    totals = np.zeros((3, network.schedule.num_steps, POSE_SIZE, POSE_SIZE))
    for i, chosen in enumerate(_batches(rows, size, "measuring errors")):
        is_counted = np.arange(size) < len(rows) - i * size
        maps, poses_mm = held_out.heatmaps(chosen), np.float32(held_out.pose_mm[chosen])
        key, batch_key = jax.random.split(key)
        found = _error_products(network, model.params, batch_key, maps, poses_mm, is_counted)
        totals += np.stack([np.asarray(products) for products in found])
    return list((totals / len(rows)).astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _error_products(
    network: DiffPose,
    params: Params,
    key: Key[Array, ""],
    heatmaps: Float[AnyArray, "B J H W"],
    poses_mm: Float[AnyArray, "B 17 3"],
    is_counted: Bool[AnyArray, " B"],
) -> tuple[Float[Array, "T 48 48"], Float[Array, "T 48 48"], Float[Array, "T 48 48"]]:
    """Sums of e e^T, e r^T and r r^T over the images that count, each the mean of some noises."""
    times = jnp.tile(jnp.arange(network.schedule.num_steps), (_NOISES, 1))
    level = network.schedule.level(times)

    def errors(key: Array, heatmaps: Array, pose_mm: Array) -> tuple[Array, Array]:
        candidate_key, noise_key = jax.random.split(key)
        condition = network.condition(params, network.encoder_input(candidate_key, heatmaps))
        denoise = network.denoise(params, network.project_condition(params, condition))
        x_0 = pose_to_vector(pose_mm, network.pose_scale)[None, None]
        x_t = level.noised(x_0, jax.random.normal(noise_key, (*times.shape, POSE_SIZE)))
        predicted = jax.vmap(jax.vmap(denoise))(x_t, times)
        return x_0 - predicted, x_t - level.signal * predicted

    keys = jax.random.split(key, len(poses_mm))
    e, r = jax.vmap(errors)(keys, jnp.asarray(heatmaps), jnp.asarray(poses_mm))
    share = jnp.asarray(is_counted) / _NOISES
    products = functools.partial(
        jnp.einsum, "b,bdti,bdtj->tij", share, precision="highest", optimize="optimal"
    )
    return products(e, e), products(e, r), products(r, r)


def radius_calibration(
    key: Key[Array, ""],
    train: TrainingSplit,
    model: Model,
    settings: EvaluationConfig,
    fitted_on: dict[str, Any],
    folders: tuple[Path, ...],
) -> Calibration:
    """The calibration, likewise; an uncalibrated one if no recordings were held out for it."""
    fitted_on = fitted_on | {
        "parameters": check_sum(model.params),
        "num_hypotheses": settings.num_hypotheses,
        "level": settings.radius_level,
        "solver": model.solver.name,
    }
    for folder in folders:
        found = calibration.read_calibration(folder, settings.pose, fitted_on)
        if found is not None:
            return found
    held_out = train()[1] if model.config.data.calibration_share else None
    if held_out is None:
        return calibration.uncalibrated(settings.radius_level)
    fitted = fit_calibration(key, model, held_out, settings)
    calibration.write_calibration(folders[0], settings.pose, fitted, fitted_on)
    return fitted


def fit_calibration(
    key: Key[Array, ""],
    model: Model,
    held_out: Examples,
    settings: EvaluationConfig,
    max_frames: int = 1024,
) -> Calibration:
    """Fits the radius of the single pose on recordings that the model was not trained on.

    Args:
      key: a random key.
      model: the model, which draws with its default solver.
      held_out: the frames.
      settings: the single pose, the level, the number of hypotheses and the batch size.
      max_frames: at most so many frames are taken, evenly spread.
    """
    uncalibrated = calibration.uncalibrated(settings.radius_level)
    rows, parts = _evenly_spread(held_out, max_frames), []
    for chosen in _batches(rows, settings.batch_size, "calibrating"):
        maps = jnp.asarray(held_out.heatmaps(chosen))
        poses_mm = model.sample(key, maps, settings.num_hypotheses)
        parts.append(
            jax.device_get(calibration.choose(settings.pose, poses_mm, maps, uncalibrated)[:2])
        )
    chosen_mm, radii_mm = (np.concatenate(part)[: len(rows)] for part in zip(*parts, strict=True))
    distances_mm = np.linalg.norm(chosen_mm - held_out.pose_mm[rows], axis=-1)
    return calibration.fit_calibration(
        distances_mm,
        radii_mm,
        settings.radius_level,
        held_out.clips[rows],
        solver=model.solver.name,
        num_hypotheses=settings.num_hypotheses,
    )


def _evenly_spread(examples: Examples, most: int) -> Integer[np.ndarray, " n"]:
    """Rows of at most so many examples."""
    return np.linspace(0, len(examples) - 1, min(len(examples), most)).astype(int)


def _batches(
    rows: Integer[np.ndarray, " n"], size: int, what: str
) -> Iterator[Integer[np.ndarray, " B"]]:
    """Rows in batches of one size, so that one program is compiled: the last repeats some."""
    for start in tqdm(range(0, len(rows), size), desc=what, unit=" batches"):
        yield np.resize(rows[start : start + size], size)


def ambiguous_frames(test: Examples, settings: EvaluationConfig) -> Bool[np.ndarray, " N"]:
    """Marks the ambiguous frames, as `config.evaluation.ambiguous` says.

    By the "rule", those with a joint whose fitted Gaussian is wider than a threshold; those
    "stored" in the data set; or those that a file names.

    Raises:
      ConfigError: if the data set has no list of its own, or the file of names does not fit.
    """
    if settings.ambiguous == "rule":
        is_ambiguous = jax.jit(ambiguity.is_ambiguous, static_argnums=1)
        size = settings.batch_size
        marks = [
            is_ambiguous(test.heatmaps(np.resize(rows, size)), settings.ambiguous_sigma_px)
            for rows in test.batches(size)
        ]
        return np.concatenate([np.asarray(mark) for mark in marks])[: len(test)]
    if settings.ambiguous == "stored":
        if test.ambiguous is None:
            raise ConfigError(
                "config.evaluation.ambiguous: the data set marks no frames; take 'rule' or a file"
            )
        return test.ambiguous
    path = Path(settings.ambiguous)
    if not path.is_file():
        raise ConfigError(
            f"config.evaluation.ambiguous: must be rule, stored, or a file; there is no {path}"
        )
    listed = {line.strip() for line in path.read_text(errors="replace").splitlines()} - {""}
    if unknown := sorted(listed - set(test.names.tolist())):
        raise ConfigError(
            f"{path}: no frame of the test split is named {unknown[0]!r:.200} ({len(unknown)} names"
            f" are unknown); names are like {str(test.names[0])!r}"
        )
    return np.isin(test.names, sorted(listed))
