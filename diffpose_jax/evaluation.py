"""Evaluation: the model and its controls on a test split, as the content of results.json."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from tqdm import tqdm

from diffpose_jax import controls as controls_lib
from diffpose_jax import gaussian_fit, heatmaps
from diffpose_jax.controls import Controls
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.metrics import MetricSums
from diffpose_jax.model import Model

METHODS = ("model", "gaussian", "regression", "mean_pose")
"""The model and its controls, as results list them."""


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


@functools.partial(jax.jit, static_argnames="num_hypotheses")
def _batch_sums(
    hypotheses_mm: Array,
    maps: Array,
    truth_mm: Array,
    weights: dict[str, Array],
    key: Array,
    controls: Controls,
    num_hypotheses: int,
) -> dict[str, dict[str, MetricSums]]:
    """{subset: {method: sums}} of one batch; `weights` (B,) say which frames each counts."""
    regression = controls_lib.predict(controls.regression, regression_inputs(maps))
    predictions = {
        "model": hypotheses_mm,
        "mean_pose": jnp.broadcast_to(controls.mean_pose_mm[None], truth_mm.shape)[:, None],
        "regression": regression[:, None],
        "gaussian": controls_lib.draw(key, controls.gaussian, regression, num_hypotheses),
    }
    # Over the subsets by vmap, so that what does not depend on the weights is computed once.
    compute = jax.vmap(MetricSums.compute, in_axes=(None, None, 0))
    stacked = jnp.stack(list(weights.values()))
    sums = {
        method: compute(poses_mm, truth_mm, stacked) for method, poses_mm in predictions.items()
    }
    return {subset: jax.tree.map(lambda x, i=i: x[i], sums) for i, subset in enumerate(weights)}


def evaluate(
    key: Array,
    model: Model,
    controls: Controls,
    examples: Examples,
    subsets: dict[str, np.ndarray],
    *,
    num_hypotheses: int,
    batch_size: int,
) -> dict[str, Any]:
    """Every metric of the model and the controls, on all frames and on subsets of them.

    Args:
      key: a random key.
      model: the model.
      controls: the controls, fitted on the training split.
      examples: the test split.
      subsets: {name: (N,) bool}, which frames count; "all" is always there.
      num_hypotheses: M.
      batch_size: images at a time.

    Returns:
      The content of results.json: `{"num_hypotheses": M, "subsets": {subset: {"frames": n,
      method: {metric: value}}}}`; a subset without frames is left out.
    """
    sample_key, gaussian_key = jax.random.split(key)
    masks = {"all": np.ones(len(examples), bool), **subsets}
    total = None
    progress = tqdm(total=len(examples), desc="evaluating", unit=" images")
    for batch, rows in enumerate(examples.batches(batch_size)):
        padded, counted = np.resize(rows, batch_size), np.arange(batch_size) < len(rows)
        maps = jnp.asarray(examples.heatmaps(padded))
        sums = _batch_sums(
            model.sample(sample_key, maps, num_hypotheses),
            maps,
            jnp.asarray(examples.pose_mm[padded]),
            {name: counted & mask[padded] for name, mask in masks.items()},
            jax.random.fold_in(gaussian_key, batch),
            controls,
            num_hypotheses,
        )
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        progress.update(len(rows))
    progress.close()
    return {
        "num_hypotheses": num_hypotheses,
        "subsets": {
            name: {
                "frames": int(masks[name].sum()),
                **{method: methods[method].finalize() for method in METHODS},
            }
            for name, methods in total.items()
            if masks[name].any()
        },
    }
