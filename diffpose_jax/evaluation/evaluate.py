"""Evaluation: the model and its baselines on a test split, as the content of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer, Key
from tqdm import tqdm

from diffpose_jax import distributed
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.evaluation import aggregation, calibration
from diffpose_jax.evaluation import baselines as baselines_lib
from diffpose_jax.evaluation.baselines import Baselines
from diffpose_jax.evaluation.calibration import Calibration
from diffpose_jax.evaluation.metrics import MetricSums, joint_errors, per_frame_metrics
from diffpose_jax.inference import Model, check_heatmaps
from diffpose_jax.method import heatmaps, sampling
from diffpose_jax.method.network import DiffPose, Params

SINGLE_POSES = {f"model_{method}": method for method in aggregation.METHODS}
"""One pose from the model's hypotheses: its name in results, to the method of `aggregation`."""
METHODS = ("model", *SINGLE_POSES, "gaussian", "regression", "mean_pose")
"""The model, single poses from its hypotheses, and its baselines, as results list them."""

_RESAMPLES = 500


def hypotheses_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that `evaluate` draws the model's hypotheses with, to draw the same again."""
    return jax.random.split(key)[0]


def regression_inputs(maps: Float[Array, "B J H W"]) -> Float[Array, "B J 3"]:
    """What the regression reads: argmax joints and their likelihoods."""
    best = heatmaps.argmax(maps)
    return jnp.concatenate([best.xy[:, 0], best.likelihood[:, 0, :, None]], axis=-1)


PerFrame = dict[int, dict[str, dict[str, Array]]]
"""{number of hypotheses: {method: {metric: (B, ...)}}}."""


def _per_frame(
    network: DiffPose,
    counts: tuple[int, ...],
    pose: str,
    params: Params,
    baselines: Baselines | None,
    calibrated: Calibration | None,
    steps: sampling.Steps,
    key: Array,
    batch: tuple[Array, Array],
    num_images: Array,
) -> PerFrame:
    """Every metric of each frame, on one device; fewer hypotheses are the first of the most."""
    maps, truth_mm = batch
    gaussian_key = jax.random.split(key)[1]
    most = max(counts)
    hypotheses_mm = network.draw(
        params, hypotheses_key(key), steps, maps, most, num_images
    ).poses_mm
    predictions = {"model": hypotheses_mm}
    if calibrated is not None:
        predictions |= {
            name: aggregation.aggregate(method, hypotheses_mm, maps)[:, None]
            for name, method in SINGLE_POSES.items()
        }
    if baselines is not None:
        regression = baselines_lib.predict(baselines.regression, regression_inputs(maps))
        # A key of each image, as the hypotheses have: whatever the images beside it.
        draw = jax.vmap(
            lambda key, mean_mm: baselines_lib.draw(key, baselines.gaussian, mean_mm[None], most)[0]
        )
        predictions |= {
            "gaussian": draw(sampling.image_keys(gaussian_key, maps), regression),
            "regression": regression[:, None],
            "mean_pose": jnp.broadcast_to(baselines.mean_pose_mm[None], truth_mm.shape)[:, None],
        }
    found = {
        count: {
            method: per_frame_metrics(poses_mm[:, :count], truth_mm)
            for method, poses_mm in predictions.items()
        }
        for count in counts
    }
    if calibrated is not None:
        chosen_mm = predictions[f"model_{pose}"][:, 0]
        radii_mm = calibration.radius(hypotheses_mm, chosen_mm, calibrated)
        # Without the hip, which is the origin of all poses.
        is_within = joint_errors(chosen_mm, truth_mm)[:, 1:] <= radii_mm[:, 1:]
        of_radius = {
            "coverage": jnp.mean(is_within, axis=1),
            "radius_mm": jnp.mean(radii_mm[:, 1:], axis=1),
        }
        for of_methods in found.values():
            of_methods[f"model_{pose}"] |= of_radius
    return found


def evaluate(
    key: Key[Array, ""],
    model: Model,
    baselines: Baselines | None,
    examples: Examples,
    subsets: dict[str, Bool[np.ndarray, " N"]],
    *,
    num_hypotheses: Sequence[int],
    batch_size: int,
    group_by: Sequence[str] = (),
    calibration: Calibration | None = None,
    pose: str = "heatmap_agreement",
    devices: Sequence[jax.Device] | None = None,
) -> dict[int, dict[str, Any]]:
    """Every metric of the model and the baselines, on subsets and groups of the frames.

    The frames are spread over all devices of all processes. What comes out does not depend on
    how many there are, but for the rounding of sums in float64.

    Args:
      key: a random key.
      model: the model, which draws with its default solver.
      baselines: fitted on the training split; None to measure the model alone.
      examples: the test split.
      subsets: {name: which frames count}; "all" must be there.
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
      left out. The model's and the Gaussian's metrics hold "intervals", see `_intervals`. With
      `group_by` also `"groups": {key: {value: the same}}` and `"averages": {key:
      {method: {metric: value}}}`, the unweighted means over the groups.
    """
    groups = {
        f"{name}/{value}": subsets["all"] & (examples.groups[name] == value)
        for name in group_by
        for value in np.unique(examples.groups[name][subsets["all"]])
    }
    masks = subsets | groups
    clips, clip_of = np.unique(examples.clips, return_inverse=True)
    # By subset and recording, for the intervals.
    of_clips = np.array(
        [[mask & (clip_of == i) for i in range(len(clips))] for mask in subsets.values()]
    )
    sets = np.concatenate([list(masks.values()), of_clips.reshape(-1, len(clip_of))])
    counted = np.flatnonzero(np.any(list(subsets.values()), axis=0))
    if len(counted) == 0:
        raise ValueError("no frame is counted")
    devices = tuple(devices or jax.local_devices())
    shared = distributed.replicate(
        (model.params, baselines, calibration, model.solver, key), devices
    )
    static = model.network, tuple(num_hypotheses), pose
    at_a_time = batch_size * len(devices) * jax.process_count()
    total: Any = None
    progress = tqdm(
        total=len(counted), desc="evaluating", unit=" images", disable=not distributed.is_first()
    )
    for start in range(0, len(counted), at_a_time):
        frames = counted[start : start + at_a_time]
        rows = np.array_split(frames, jax.process_count())[jax.process_index()]
        is_counted = np.float64(len(rows) > 0)
        rows = rows if len(rows) else frames[:1]
        batch = check_heatmaps(examples.heatmaps(rows)), np.float32(examples.pose_mm[rows])
        found = distributed.spread(
            _per_frame,
            static,
            shared,
            batch,
            most=batch_size,
            padded=batch_size,
            to_host=True,
            devices=devices,
        )
        weights = sets[:, rows] * is_counted
        sums = jax.tree.map(lambda x, w=weights: np.tensordot(w, np.float64(x), 1), found)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        progress.update(len(frames))
    progress.close()
    total = distributed.sum_over_processes(total)
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    contents = {
        count: _content(count, total[count], sizes, list(subsets), group_by)
        for count in num_hypotheses
    }
    frames = of_clips.sum(-1)
    for count, content in contents.items():
        for i, subset in enumerate(subsets):
            first = len(masks) + i * len(clips)
            for method in {"model", f"model_{pose}", "gaussian"} & set(total[count]):
                sums = {
                    name: x[first : first + len(clips)] for name, x in total[count][method].items()
                }
                found = _intervals(count, sums, frames[i])
                if found:
                    content["subsets"][subset][method]["intervals"] = found
    return contents


def _intervals(
    count: int, sums: dict[str, Float[np.ndarray, "C ..."]], frames: Integer[np.ndarray, " C"]
) -> dict[str, Any]:
    """95 % intervals of the metrics by a bootstrap over recordings (Efron and Tibshirani 1993).

    Frames of one recording are alike, so recordings are drawn with replacement, all frames of each.
    With few of them, under some twenty, the intervals are too narrow. None with only one.

    Args:
      count: M.
      sums: metrics summed over the frames of each of C recordings.
      frames: their numbers of frames; those without are left out.
    """
    has_frames = frames > 0
    number = int(has_frames.sum())
    if number < 2:
        return {}
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), _RESAMPLES)
    drawn = {name: np.tensordot(draws, x[has_frames], 1) for name, x in sums.items()}
    count = count if "mpjpe_best_at" in drawn else 1
    found = [
        MetricSums(size, {name: x[i] for name, x in drawn.items()}, count).finalize()
        for i, size in enumerate(draws @ frames[has_frames])
    ]
    names = [name for name, value in found[0].items() if isinstance(value, float)]
    values = {name: [one[name] for one in found] for name in names}
    if "region_coverage" in found[0]:
        values |= {
            f"region_coverage_{percent}": [one["region_coverage"][percent] for one in found]
            for percent in found[0]["region_coverage"]
        }
    return {name: np.quantile(x, (0.025, 0.975)).tolist() for name, x in values.items()}


def _content(
    count: int,
    sums: dict[str, dict[str, np.ndarray]],
    sizes: dict[str, int],
    subsets: Sequence[str],
    group_by: Sequence[str],
) -> dict[str, Any]:
    """The content of results.json, from {method: {metric: (sets, ...)}}, the sets as in `sizes`."""
    values: dict[str, dict[str, Any]] = {}
    for i, (name, size) in enumerate(sizes.items()):
        if size:
            values[name] = {"frames": size}
            for method in (method for method in METHODS if method in sums):
                of_set = {metric: of_sets[i] for metric, of_sets in sums[method].items()}
                number = count if "mpjpe_best_at" in of_set else 1
                values[name][method] = MetricSums(size, of_set, number).finalize()
    content: dict[str, Any] = {
        "num_hypotheses": count,
        "subsets": {name: values[name] for name in subsets if name in values},
    }
    for key in group_by:
        of_key = {
            name.removeprefix(f"{key}/"): of_group
            for name, of_group in values.items()
            if name.startswith(f"{key}/")
        }
        content.setdefault("groups", {})[key] = of_key
        content.setdefault("averages", {})[key] = {
            method: jax.tree.map(
                lambda *x: float(np.mean(x)), *(group[method] for group in of_key.values())
            )
            for method in METHODS
            if all(method in group for group in of_key.values())
        }
    return content
