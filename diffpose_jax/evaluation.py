"""Evaluation: the model and its controls on a test split, as the content of results.json."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from tqdm import tqdm

from diffpose_jax import aggregation, gaussian_fit, heatmaps
from diffpose_jax import controls as controls_lib
from diffpose_jax.aggregation import Calibration
from diffpose_jax.controls import Controls
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.metrics import MetricSums, joint_errors
from diffpose_jax.model import Model

SINGLE_POSES = {f"model_{method}": method for method in aggregation.METHODS}
"""One pose from the model's hypotheses: its name in results, to the method of `aggregation`."""
METHODS = ("model", *SINGLE_POSES, "gaussian", "regression", "mean_pose")
"""The model, single poses from its hypotheses, and its controls, as results list them."""


def regression_inputs(maps: Array) -> Array:
    """Argmax joints and their likelihoods: (B, 16, 64, 64) -> (B, 16, 3)."""
    best = heatmaps.argmax(maps)
    return jnp.concatenate([best.xy[:, 0], best.likelihood[:, 0, :, None]], axis=-1)


def fit_controls(key: Array, examples: Examples, config: ml_collections.ConfigDict) -> Controls:
    """Fits the controls on a training split.

    Args:
      key: a random key.
      examples: the training split.
      config: `config.evaluation`.
    """
    inputs_of = jax.jit(regression_inputs)
    inputs = [np.asarray(inputs_of(examples.heatmaps(rows))) for rows in examples.batches(256)]
    return controls_lib.fit_controls(
        key,
        np.concatenate(inputs),
        examples.pose_mm,
        steps=config.regression_steps,
        batch_size=config.regression_batch_size,
        width=config.regression_width,
        learning_rate=config.regression_learning_rate,
    )


def ambiguous_frames(examples: Examples, threshold_px: float, batch_size: int) -> np.ndarray:
    """Marks the frames with a joint whose fitted Gaussian is wider than a threshold.

    Args:
      examples: the test split.
      threshold_px: bound of the larger sigma, in heatmap cells; 5 is the published one.
      batch_size: images at a time.

    Returns:
      (N,) bool.
    """
    is_ambiguous = jax.jit(gaussian_fit.is_ambiguous)
    marks = [
        np.asarray(is_ambiguous(examples.heatmaps(np.resize(rows, batch_size)), threshold_px))
        for rows in examples.batches(batch_size)
    ]
    return np.concatenate(marks)[: len(examples)]


Sums = dict[str, dict[str, MetricSums]]
"""{set of frames: {method: sums}}."""


@functools.partial(jax.jit, static_argnames=("counts", "pose"))
def _batch_sums(
    hypotheses_mm: Array,
    maps: Array,
    truth_mm: Array,
    weights: dict[str, Array],
    key: Array,
    controls: Controls | None,
    calibration: Calibration | None,
    counts: tuple[int, ...],
    pose: str,
) -> dict[int, Sums]:
    """Sums of one batch for each number of hypotheses.

    `weights` (B,) say which frames each set counts; fewer hypotheses are the first of them.
    """
    predictions = {"model": hypotheses_mm}
    if calibration is not None:
        predictions |= {
            name: aggregation.aggregate(method, hypotheses_mm, maps)[:, None]
            for name, method in SINGLE_POSES.items()
        }
    if controls is not None:
        regression = controls_lib.predict(controls.regression, regression_inputs(maps))
        predictions |= {
            "gaussian": controls_lib.draw(key, controls.gaussian, regression, max(counts)),
            "regression": regression[:, None],
            "mean_pose": jnp.broadcast_to(controls.mean_pose_mm[None], truth_mm.shape)[:, None],
        }
    # Over the sets by vmap, so that what does not depend on the weights is computed once.
    compute = jax.vmap(MetricSums.compute, in_axes=(None, None, 0))
    stacked = jnp.stack(list(weights.values()))
    sums = {
        count: {
            method: compute(poses_mm[:, :count], truth_mm, stacked)
            for method, poses_mm in predictions.items()
        }
        for count in counts
    }
    if calibration is not None:
        chosen_mm = predictions[f"model_{pose}"][:, 0]
        radii_mm = aggregation.radius(hypotheses_mm, chosen_mm, calibration)
        # Without the hip, which is the origin of all poses.
        is_within = joint_errors(chosen_mm, truth_mm)[:, 1:] <= radii_mm[:, 1:]
        of_frames = {
            "coverage": jnp.mean(is_within, axis=1),
            "radius_mm": jnp.mean(radii_mm[:, 1:], axis=1),
        }
        of_sets = jax.tree.map(lambda x: jnp.where(stacked, x[None], 0).sum(1), of_frames)
        for of_methods in sums.values():
            of_methods[f"model_{pose}"].sums.update(of_sets)
    return {
        count: {
            name: jax.tree.map(lambda x, i=i: x[i], of_methods) for i, name in enumerate(weights)
        }
        for count, of_methods in sums.items()
    }


def fit_calibration(
    key: Array,
    model: Model,
    held_out: Examples,
    *,
    pose: str,
    level: float,
    num_hypotheses: int,
    batch_size: int,
    max_frames: int = 1024,
) -> Calibration:
    """Fits the radius of the single pose on frames that the model was not trained on.

    Args:
      key: a random key.
      model: the model.
      held_out: frames of recordings kept out of its training.
      pose: how the single pose is made, one of `aggregation.METHODS`.
      level: frequency with which a joint shall lie within its radius.
      num_hypotheses: M.
      batch_size: images at a time.
      max_frames: at most so many frames are taken, evenly spread.
    """
    uncalibrated = aggregation.uncalibrated(level)

    @jax.jit
    def chosen_and_radius(hypotheses_mm: Array, maps: Array) -> tuple[Array, Array]:
        chosen_mm = aggregation.aggregate(pose, hypotheses_mm, maps)
        return chosen_mm, aggregation.radius(hypotheses_mm, chosen_mm, uncalibrated)

    number = min(len(held_out), max_frames)
    rows = np.linspace(0, len(held_out) - 1, number).astype(int)
    parts = []
    for start in tqdm(range(0, number, batch_size), desc="calibrating", unit=" batches"):
        padded = np.resize(rows[start : start + batch_size], batch_size)
        maps = jnp.asarray(held_out.heatmaps(padded))
        found = chosen_and_radius(model.sample(key, maps, num_hypotheses), maps)
        parts.append(jax.device_get(found))
    chosen_mm, radii_mm = (np.concatenate(part)[:number] for part in zip(*parts, strict=True))
    distances_mm = np.linalg.norm(chosen_mm - held_out.pose_mm[rows], axis=-1)
    return aggregation.fit_calibration(distances_mm, radii_mm, level, held_out.clips[rows])


def evaluate(
    key: Array,
    model: Model,
    controls: Controls | None,
    examples: Examples,
    subsets: dict[str, np.ndarray],
    *,
    num_hypotheses: Sequence[int],
    batch_size: int,
    group_by: Sequence[str] = (),
    calibration: Calibration | None = None,
    pose: str = "heatmap_agreement",
) -> dict[int, dict[str, Any]]:
    """Every metric of the model and the controls, on subsets and groups of the frames.

    Args:
      key: a random key.
      model: the model.
      controls: the controls, fitted on the training split; None to measure the model alone.
      examples: the test split.
      subsets: {name: (N,) bool}, which frames count; "all" must be there.
      num_hypotheses: one or several M; fewer hypotheses are the first of the most.
      batch_size: images at a time.
      group_by: keys of `examples.groups`, such as "action": the frames of "all" by their values.
      calibration: of the single pose; None to leave single poses out. They are made from the most
        hypotheses.
      pose: the method of the single pose that the calibration belongs to.

    Returns:
      The content of results.json for each M: `{"num_hypotheses": M, "subsets": {subset:
      {"frames": n, method: {metric: value}}}}`, means over the frames; a subset without frames is
      left out. With `group_by` also `"groups": {key: {value: the same}}` and `"averages": {key:
      {method: {metric: value}}}`, the unweighted means over the groups.
    """
    sample_key, gaussian_key = jax.random.split(key)
    groups = {
        f"{name}/{value}": subsets["all"] & (examples.groups[name] == value)
        for name in group_by
        for value in np.unique(examples.groups[name][subsets["all"]])
    }
    masks = subsets | groups
    counted = np.flatnonzero(np.any(list(subsets.values()), axis=0))
    total: dict[int, Sums] | None = None
    progress = tqdm(total=len(counted), desc="evaluating", unit=" images")
    for batch, start in enumerate(range(0, len(counted), batch_size)):
        rows = counted[start : start + batch_size]
        padded, is_row = np.resize(rows, batch_size), np.arange(batch_size) < len(rows)
        maps = jnp.asarray(examples.heatmaps(padded))
        sums = _batch_sums(
            model.sample(sample_key, maps, max(num_hypotheses)),
            maps,
            jnp.asarray(examples.pose_mm[padded]),
            {name: is_row & mask[padded] for name, mask in masks.items()},
            jax.random.fold_in(gaussian_key, batch),
            controls,
            calibration,
            tuple(num_hypotheses),
            pose,
        )
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        progress.update(len(rows))
    progress.close()
    frames = {name: int(mask.sum()) for name, mask in masks.items()}
    return {
        count: _content(count, total[count], frames, subsets, group_by) for count in num_hypotheses
    }


def _content(
    count: int, sums: Sums, frames: dict[str, int], subsets: Iterable[str], group_by: Sequence[str]
) -> dict[str, Any]:
    """The content of results.json."""
    values = {
        name: {"frames": frames[name]}
        | {method: of_sets[method].finalize() for method in METHODS if method in of_sets}
        for name, of_sets in sums.items()
        if frames[name]
    }
    content = {
        "num_hypotheses": count,
        "subsets": {name: values[name] for name in subsets if name in values},
    }
    if group_by:
        content["groups"] = {
            key: {
                name.removeprefix(f"{key}/"): of_group
                for name, of_group in values.items()
                if name.startswith(f"{key}/")
            }
            for key in group_by
        }
        content["averages"] = {
            key: {
                method: _mean([group[method] for group in of_key.values()])
                for method in METHODS
                if all(method in group for group in of_key.values())
            }
            for key, of_key in content["groups"].items()
        }
    return content


def _mean(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The unweighted mean of metrics over groups."""
    return jax.tree.map(lambda *values: float(np.mean(values)), *metrics)
