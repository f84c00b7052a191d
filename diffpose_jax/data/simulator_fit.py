"""Fits the simulated detector to a real one, from its heatmaps of people whose joints are known.

The same measurements are taken of the real heatmaps and of simulated ones of the same people, and
the simulator's parameters are moved until they agree.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from diffpose_jax.data import simulator
from diffpose_jax.data.simulator import SimulatorConfig
from diffpose_jax.skeleton import HEATMAP_SIZE, MPII_JOINTS, MPII_MIRROR, MPII_TO_H36M

_FAR = 8.0  # cells; the mode of a joint does not reach so far
_FOUND = 0.1  # of the height, below which a map shows nothing
_SIDES = np.array([joint != mirror for joint, mirror in enumerate(MPII_MIRROR)])
_LEGS = np.array([name[1:] in ("Ankle", "Knee", "Hip") for name in MPII_JOINTS])
# Chances are measured on few images: the simulator's own count as so many more.
_PRIOR_IMAGES = 20
_COPIES = 12  # simulated images for each real one
_ROUNDS = 12


class Labelled(NamedTuple):
    """A detector's heatmaps of people whose joints are known.

    Attributes:
      heatmaps: MPII joint order.
      points_mm: the joints in camera coordinates, Human3.6M order.
      keypoints_xy: the same in cells of the heatmaps.
      is_valid: whether a joint counts, in the order of the heatmaps.
    """

    heatmaps: Float[np.ndarray, "N 16 64 64"]
    points_mm: Float[np.ndarray, "N 17 3"]
    keypoints_xy: Float[np.ndarray, "N 17 2"]
    is_valid: Bool[np.ndarray, "N 16"]


class Measured(NamedTuple):
    """What is measured of each map, and of each image; NaN where it does not count."""

    height: Float[np.ndarray, "N 16"]
    width: Float[np.ndarray, "N 16"]  # cells, of a Gaussian with the mass and height of the mode
    error: Float[np.ndarray, "N 16"]  # cells, of the highest one
    second: Float[np.ndarray, "N 16"]  # highest far from the highest, relative to it
    floor: Float[np.ndarray, "N 16"]  # standard deviation far from the highest
    hidden: Bool[np.ndarray, "N 16"]
    exchanged: Float[np.ndarray, "N 2"]  # share of the arms' and of the legs' pairs
    behind: Float[np.ndarray, " N"]  # see `simulator.seen_from_behind`


def measure(labelled: Labelled, margin_mm: float) -> Measured:
    """Measures heatmaps; joints outside of them do not count.

    Args:
      labelled: the heatmaps.
      margin_mm: `SimulatorConfig.occlusion_margin_mm`.
    """
    maps, truth = labelled.heatmaps, labelled.keypoints_xy[:, MPII_TO_H36M]
    joints_mm = labelled.points_mm[:, MPII_TO_H36M]
    inside = np.all((truth >= -0.5) & (truth < HEATMAP_SIZE - 0.5), axis=-1)
    counts = labelled.is_valid & inside
    flat = maps.reshape(*maps.shape[:2], -1)
    height, cells = flat.max(-1), flat.argmax(-1)
    peak = np.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1).astype(float)
    grid = np.arange(HEATMAP_SIZE)
    squares = (grid - peak[..., :1]) ** 2, (grid - peak[..., 1:]) ** 2
    far = squares[0][..., None, :] + squares[1][..., :, None] > _FAR**2
    mass = np.where(far, 0.0, np.maximum(maps, 0.0)).sum((-2, -1))
    shows = counts & (height >= _FOUND)

    def where(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(mask, values, np.nan)

    distance = np.linalg.norm(peak[:, :, None] - truth[:, None], axis=-1)
    own = np.diagonal(distance, axis1=1, axis2=2)
    crossed = np.take_along_axis(distance, np.array(MPII_MIRROR)[None, :, None], 2)[..., 0]
    pairs = _SIDES & counts & counts[:, MPII_MIRROR]
    is_crossed = crossed + crossed[:, MPII_MIRROR] < own + own[:, MPII_MIRROR]
    limbs = [
        np.sum(is_crossed & pairs & limb, 1) / np.maximum(np.sum(pairs & limb, 1), 1)
        for limb in (~_LEGS, _LEGS)
    ]
    floor = np.sqrt(np.where(far, maps**2, 0.0).sum((-2, -1)) / far.sum((-2, -1)))
    second = np.where(far, maps, 0.0).max((-2, -1)) / np.maximum(height, 1e-6)
    return Measured(
        height=where(counts, height),
        width=where(shows, np.sqrt(mass / (2 * np.pi * np.maximum(height, 1e-6)))),
        error=where(shows, own),
        second=where(shows, second),
        floor=where(counts, floor),
        hidden=simulator.hidden_joints(joints_mm, margin_mm),
        exchanged=np.stack(limbs, axis=-1),
        behind=simulator.seen_from_behind(joints_mm),
    )


def summary(measured: Measured) -> dict[str, float]:
    """One number for each parameter of `SimulatorConfig` that is fitted, by the parameter's name.

    A number grows with its parameter, and is about proportional to it.
    """
    seen = ~measured.hidden
    height, width, error = (
        np.where(seen, x, np.nan) for x in (measured.height, measured.width, measured.error)
    )
    hidden_error = np.where(measured.hidden, measured.error, np.nan)
    hidden_width = np.where(measured.hidden, measured.width, np.nan)
    is_front, crossed = measured.behind < 0.5, measured.exchanged > 0.5
    one, both = crossed[:, 0] != crossed[:, 1], crossed.all(axis=1)
    return {
        "amplitude": _quantile(height, 0.5),
        "amplitude_std": _spread(height),
        "sigma": _quantile(width, 0.5),
        "sigma_std": _spread(np.log(width)),
        "error": _quantile(error, 0.5),
        "quality_std": _spread_of_images(np.log(np.maximum(error, 0.3))),
        "hidden_error": _quantile(hidden_error, 0.7),
        "hidden_spread": max(_quantile(hidden_width, 0.8) - _quantile(width, 0.5), 1e-3),
        "confusion": _share(one[is_front]),
        "confusion_behind": _share(one[~is_front]),
        "confusion_together": _share(both),
        "missed": _share(np.where(seen, measured.height, np.inf) < _FOUND),
        "missed_hidden": _share(np.where(measured.hidden, measured.height, np.inf) < _FOUND),
        "clutter": _share(np.where(seen, measured.second, 0.0) > 0.3),
        "clutter_hidden": _share(np.where(measured.hidden, measured.second, 0.0) > 0.3),
        "background": _quantile(measured.floor, 0.5),
    }


CHANCES = (
    "confusion", "confusion_behind", "confusion_together", "missed", "missed_hidden", "clutter",
    "clutter_hidden",
)  # fmt: skip
"""The parameters whose numbers are shares of cases, counted on few images."""


def fit(
    rng: np.random.Generator, labelled: Labelled, config: SimulatorConfig
) -> tuple[SimulatorConfig, Measured, Measured]:
    """Moves the simulator's parameters until its heatmaps measure as the detector's do.

    Each is multiplied by the ratio of the two numbers of `summary`, several times, since they
    depend on each other. A chance is a count of few: as many images as `_PRIOR_IMAGES` that fail
    as often as those of the given parameters are counted with the real ones.

    Args:
      rng: for the simulated images.
      labelled: the detector's heatmaps.
      config: where to begin.

    Returns:
      The fitted parameters, and what was measured of the real and of the simulated heatmaps.
    """
    # A chance of 0 would stay one.
    config = dataclasses.replace(config, **{n: max(getattr(config, n), 1e-3) for n in CHANCES})
    real = measure(labelled, config.occlusion_margin_mm)
    wanted = summary(real)
    start = summary(_simulated(rng, labelled, config))
    weight = len(labelled.heatmaps) / (len(labelled.heatmaps) + _PRIOR_IMAGES)
    for name in CHANCES:
        wanted[name] = weight * wanted[name] + (1.0 - weight) * start[name]
    fitted = config
    for _ in tqdm(range(_ROUNDS), desc="fitting", unit=" rounds"):
        found = summary(_simulated(rng, labelled, fitted))
        changes = {}
        for name, target in wanted.items():
            if not np.isfinite(target) or not np.isfinite(found[name]):
                continue  # no joint is hidden, say
            ratio = np.clip((target + 1e-4) / (found[name] + 1e-4), 0.5, 2.0) ** 0.7
            value = float(np.round(getattr(fitted, name) * ratio, 5))
            changes[name] = min(value, 1.0) if name in CHANCES else value
        fitted = dataclasses.replace(fitted, **changes)
    return fitted, real, _simulated(rng, labelled, fitted)


def _simulated(rng: np.random.Generator, labelled: Labelled, config: SimulatorConfig) -> Measured:
    """What is measured of simulated heatmaps of the same people."""
    parts = []
    for _ in range(_COPIES):
        blobs = simulator.simulate(rng, labelled.points_mm, labelled.keypoints_xy, config).blobs
        maps = np.asarray(simulator.render(blobs))
        parts.append(measure(labelled._replace(heatmaps=maps), config.occlusion_margin_mm))
    return Measured(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _quantile(values: np.ndarray, q: float) -> float:
    values = values[np.isfinite(values)]
    return float(np.quantile(values, q)) if values.size else float("nan")


def _spread(values: np.ndarray) -> float:
    """A standard deviation that outliers do not move: from the quartiles."""
    return (_quantile(values, 0.75) - _quantile(values, 0.25)) / 1.349


def _spread_of_images(values: np.ndarray) -> float:
    """The standard deviation of the images' means."""
    counts = np.isfinite(values).sum(1)
    means = np.nansum(values, axis=1)[counts > 0] / counts[counts > 0]
    return float(means.std()) if means.size else float("nan")


def _share(is_so: Any) -> float:
    return float(np.mean(is_so)) if np.size(is_so) else float("nan")
