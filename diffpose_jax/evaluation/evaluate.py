"""Evaluation: the model and its controls on a test split, as the content of results.json."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from tqdm import tqdm

from diffpose_jax import distributed as devices_lib
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation import ambiguity as gaussian_fit
from diffpose_jax.evaluation import baselines as controls_lib
from diffpose_jax.evaluation.aggregation import Calibration
from diffpose_jax.evaluation.baselines import Controls
from diffpose_jax.evaluation.metrics import MetricSums, joint_errors, per_frame_metrics
from diffpose_jax.method import heatmaps, sampling
from diffpose_jax.method.network import DiffPose, Model, Params
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

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


PerFrame = dict[int, dict[str, dict[str, Array]]]
"""{number of hypotheses: {method: {metric: (B, ...)}}}."""


def _per_frame(
    key: Array,
    params: Params,
    controls: Controls | None,
    calibration: Calibration | None,
    maps: Array,
    truth_mm: Array,
    num_frames: Array,
    network: DiffPose,
    solver: str,
    counts: tuple[int, ...],
    pose: str,
) -> PerFrame:
    """Every metric of each frame, on one device; fewer hypotheses are the first of the most.

    Of the B frames the first `num_frames` count, the rest is padding.
    """
    sample_key, gaussian_key = jax.random.split(key)
    hypotheses_mm = network.sample(params, sample_key, maps, max(counts), num_frames, solver)
    predictions = {"model": hypotheses_mm}
    if calibration is not None:
        predictions |= {
            name: aggregation.aggregate(method, hypotheses_mm, maps)[:, None]
            for name, method in SINGLE_POSES.items()
        }
    if controls is not None:
        regression = controls_lib.predict(controls.regression, regression_inputs(maps))
        # Of each image, as the hypotheses: whatever the images beside it, on whatever device.
        keys = sampling.image_keys(gaussian_key, maps)
        draw = jax.vmap(
            lambda key, mean_mm: controls_lib.draw(
                key, controls.gaussian, mean_mm[None], max(counts)
            )[0]
        )
        predictions |= {
            "gaussian": draw(keys, regression),
            "regression": regression[:, None],
            "mean_pose": jnp.broadcast_to(controls.mean_pose_mm[None], truth_mm.shape)[:, None],
        }
    found = {
        count: {
            method: per_frame_metrics(poses_mm[:, :count], truth_mm)
            for method, poses_mm in predictions.items()
        }
        for count in counts
    }
    if calibration is not None:
        chosen_mm = predictions[f"model_{pose}"][:, 0]
        radii_mm = aggregation.radius(hypotheses_mm, chosen_mm, calibration)
        # Without the hip, which is the origin of all poses.
        is_within = joint_errors(chosen_mm, truth_mm)[:, 1:] <= radii_mm[:, 1:]
        of_radius = {
            "coverage": jnp.mean(is_within, axis=1),
            "radius_mm": jnp.mean(radii_mm[:, 1:], axis=1),
        }
        for of_methods in found.values():
            of_methods[f"model_{pose}"] |= of_radius
    return found


@functools.cache
def _on_devices(devices: tuple[jax.Device, ...]) -> Callable[..., PerFrame]:
    """`_per_frame` of (D, B) frames: of the devices of this process alone, that wait for none."""
    return jax.pmap(
        _per_frame,
        axis_name=devices_lib.AXIS,
        in_axes=(None, None, None, None, 0, 0, 0, None, None, None, None),
        static_broadcasted_argnums=(7, 8, 9, 10),
        devices=devices,
    )


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
    number = min(len(held_out), max_frames)
    rows = np.linspace(0, len(held_out) - 1, number).astype(int)
    parts = []
    for start in tqdm(range(0, number, batch_size), desc="calibrating", unit=" batches"):
        padded = np.resize(rows[start : start + batch_size], batch_size)
        maps = jnp.asarray(held_out.heatmaps(padded))
        hypotheses_mm = model.sample(key, maps, num_hypotheses)
        found = _chosen_and_radius(hypotheses_mm, maps, uncalibrated, pose)
        parts.append(jax.device_get(found))
    chosen_mm, radii_mm = (np.concatenate(part)[:number] for part in zip(*parts, strict=True))
    distances_mm = np.linalg.norm(chosen_mm - held_out.pose_mm[rows], axis=-1)
    return aggregation.fit_calibration(distances_mm, radii_mm, level, held_out.clips[rows])


@functools.partial(jax.jit, static_argnames="pose")
def _chosen_and_radius(
    hypotheses_mm: Array, maps: Array, calibration: Calibration, pose: str
) -> tuple[Array, Array]:
    chosen_mm = aggregation.aggregate(pose, hypotheses_mm, maps)
    return chosen_mm, aggregation.radius(hypotheses_mm, chosen_mm, calibration)


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
    devices: Sequence[jax.Device] | None = None,
) -> dict[int, dict[str, Any]]:
    """Every metric of the model and the controls, on subsets and groups of the frames.

    The frames are spread over all devices of all processes. What comes out does not depend on
    how many there are, but for the rounding of sums in float64: each device has the same number
    of frames at a time, and no frame's metrics depend on the frames beside it.

    Args:
      key: a random key.
      model: the model.
      controls: the controls, fitted on the training split; None to measure the model alone.
      examples: the test split.
      subsets: {name: (N,) bool}, which frames count; "all" must be there.
      num_hypotheses: one or several M; fewer hypotheses are the first of the most.
      batch_size: images at a time, on each device.
      group_by: keys of `examples.groups`, such as "action": the frames of "all" by their values.
      calibration: of the single pose; None to leave single poses out. They are made from the most
        hypotheses.
      pose: the method of the single pose that the calibration belongs to.
      devices: those of this process, all by default; as many in each process.

    Returns:
      The content of results.json for each M: `{"num_hypotheses": M, "subsets": {subset:
      {"frames": n, method: {metric: value}}}}`, means over the frames; a subset without frames is
      left out. With `group_by` also `"groups": {key: {value: the same}}` and `"averages": {key:
      {method: {metric: value}}}`, the unweighted means over the groups.
    """
    groups = {
        f"{name}/{value}": subsets["all"] & (examples.groups[name] == value)
        for name in group_by
        for value in np.unique(examples.groups[name][subsets["all"]])
    }
    masks = subsets | groups
    counted = np.flatnonzero(np.any(list(subsets.values()), axis=0))
    if len(counted) == 0:
        raise ValueError("no frame is counted")
    devices = tuple(devices or jax.local_devices())
    held = devices_lib.replicate((key, model.params, controls, calibration), devices)
    compute = _on_devices(devices)
    num_devices, first = len(devices), len(devices) * jax.process_index()
    at_a_time = batch_size * num_devices * jax.process_count()
    total: Any = None
    progress = tqdm(
        total=len(counted), desc="evaluating", unit=" images", disable=not devices_lib.is_first()
    )
    for start in range(0, len(counted), at_a_time):
        frames = counted[start : start + at_a_time]
        of_devices = np.array_split(frames, num_devices * jax.process_count())
        of_devices = of_devices[first : first + num_devices]
        num_frames = np.array([len(rows) for rows in of_devices])
        is_frame = np.arange(batch_size)[None] < num_frames[:, None]
        rows = np.concatenate(of_devices)
        maps = np.zeros((*is_frame.shape, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE), np.float32)
        truth_mm = np.zeros((*is_frame.shape, NUM_JOINTS, 3), np.float32)
        if len(rows):
            maps[is_frame] = heatmaps.check(examples.heatmaps(rows))
            truth_mm[is_frame] = examples.pose_mm[rows]
        statics = model.network, model.solver, tuple(num_hypotheses), pose
        found = compute(*held, maps, truth_mm, num_frames, *statics)
        weights = np.array([mask[rows] for mask in masks.values()], np.float64)
        sums = jax.tree.map(
            lambda x, w=weights, i=is_frame: np.tensordot(w, np.asarray(x, np.float64)[i], 1), found
        )
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        progress.update(len(frames))
    progress.close()
    total = devices_lib.added(total)
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    return {
        count: _content(count, _sums(total[count], count, sizes), subsets, group_by)
        for count in num_hypotheses
    }


def _sums(
    of_methods: dict[str, dict[str, np.ndarray]], count: int, sizes: dict[str, int]
) -> dict[str, dict[str, MetricSums]]:
    """{set: {method: sums}} of the sets that have frames, from {method: {metric: (sets, ...)}}."""
    return {
        name: {
            method: MetricSums(
                frames=size,
                sums={metric: of_sets[i] for metric, of_sets in of_metrics.items()},
                num_hypotheses=count if "mpjpe_best_at" in of_metrics else 1,
            )
            for method, of_metrics in of_methods.items()
        }
        for i, (name, size) in enumerate(sizes.items())
        if size
    }


def _content(
    count: int,
    sums: dict[str, dict[str, MetricSums]],
    subsets: Iterable[str],
    group_by: Sequence[str],
) -> dict[str, Any]:
    """The content of results.json."""
    values = {
        name: {"frames": of_set["model"].frames}
        | {method: of_set[method].finalize() for method in METHODS if method in of_set}
        for name, of_set in sums.items()
    }
    content: dict[str, Any] = {
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
