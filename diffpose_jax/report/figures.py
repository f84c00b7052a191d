"""Figures: one frame with its hypotheses, the heatmaps, and the curves of a run.

Every function returns a `matplotlib.figure.Figure` on an Agg canvas. Nothing touches pyplot or
rcParams, so figures can be made in any thread and need no display. The colours are those of
Okabe and Ito (2008), which stay apart under the common colour-vision deficiencies: warm is the
person's right side, cool the left.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from diffpose_jax.io.files import write_atomic
from diffpose_jax.skeleton import (
    H36M_BONES,
    H36M_JOINTS,
    H36M_LEFT,
    H36M_RIGHT,
    HEATMAP_SIZE,
    MPII_BONES,
    MPII_JOINTS,
    MPII_TO_H36M,
    NUM_HEATMAPS,
    NUM_JOINTS,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

GROUP_COLOURS: dict[str, str] = {
    "trunk": "#6b6b6b",
    "right arm": "#e69f00",
    "right leg": "#d55e00",
    "left arm": "#56b4e9",
    "left leg": "#0072b2",
}
"""Body part to colour; the same in every figure and on the report's page."""

JOINT_GROUPS: tuple[str, ...] = tuple(
    f"{'right' if joint in H36M_RIGHT else 'left'} {'arm' if joint > 10 else 'leg'}"
    if joint in H36M_RIGHT + H36M_LEFT
    else "trunk"
    for joint in range(NUM_JOINTS)
)
"""Body part of each of the 17 joints, a key of `GROUP_COLOURS`; a bone has its child's."""

METHOD_COLOURS: dict[str, str] = {
    "model": "#009e73",
    "gaussian": "#cc79a7",
    "regression": "#b07a00",
    "mean_pose": "#8c8c8c",
}
"""The model and its controls, by their names in results.json."""

# Top to bottom as a person is seen; the hip is the origin, so it has no spread to show.
_BAR_ORDER = (10, 9, 8, 7, 14, 15, 16, 11, 12, 13, 1, 2, 3, 4, 5, 6)
_H36M_COLOURS = tuple(GROUP_COLOURS[group] for group in JOINT_GROUPS)
_MPII_COLOURS = tuple(_H36M_COLOURS[joint] for joint in MPII_TO_H36M)

_INK = "#1a1a1a"
_MUTED = "#5c5c5c"
_FAINT = "#d9d9d9"
_CASING = [Stroke(linewidth=4.2, foreground="white"), Normal()]
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#c9ccd1", "#6f757e", "#33373d"])


@dataclasses.dataclass(frozen=True)
class ChosenPose:
    """The one pose that was made of a frame's hypotheses, and how sure it is.

    Attributes:
        pose_mm: (17, 3), millimetres, hip-centred, y up.
        radius_mm: (17,), millimetres; a joint lies within it with the frequency `level`.
        level: In (0, 1).
        method: How it was chosen, such as "mean".
        meaning: What the radius means, in words.
    """

    pose_mm: np.ndarray
    radius_mm: np.ndarray
    level: float
    method: str
    meaning: str

    @property
    def name(self) -> str:
        """What to call it."""
        return f"chosen pose ({self.method.replace('_', ' ')})"

    def checked(self) -> ChosenPose:
        """The same with arrays that are fit to be drawn, see `checked_array`."""
        return dataclasses.replace(
            self,
            pose_mm=checked_array("the chosen pose_mm", self.pose_mm, (NUM_JOINTS, 3)),
            radius_mm=checked_array("radius_mm", self.radius_mm, (NUM_JOINTS,)),
        )


def plot_example(
    heatmaps: ArrayLike,
    candidates_xy: ArrayLike,
    likelihood: ArrayLike,
    hypotheses_mm: ArrayLike,
    truth_mm: ArrayLike | None = None,
    title: str = "",
    *,
    chosen: ChosenPose | None = None,
    crop: NDArray[np.uint8] | None = None,
) -> Figure:
    """Shows one frame: the 2D evidence, the 3D hypotheses twice, and the spread per joint.

    Args:
        heatmaps: (16, 64, 64), MPII order, row-major.
        candidates_xy: (S, 16, 2), grid coordinates x = 2 (column - 32) / 64 in [-1, 1).
        likelihood: (S, 16), heatmap heights at the candidates.
        hypotheses_mm: (M, 17, 3), millimetres, hip-centred, y up, z towards the camera.
        truth_mm: (17, 3), millimetres, or None where it is not known; the chosen pose or, without
            one, the hypotheses' mean is then drawn strong in its place.
        title: Heading of the figure, taken literally.
        chosen: The pose that was made of the hypotheses, for a frame without truth.
        crop: (P, P, 3) uint8, RGB, what the heatmaps were detected in; it is drawn in their place.

    Returns:
        A figure with four panels; its last shows the spread of the hypotheses (root mean
        squared distance to their mean), the radii of a chosen pose and, with a truth, the error
        of the mean pose and of the hypothesis that is best by MPJPE.

    Raises:
        ValueError: An array has the wrong shape or holds values that are not finite.
    """
    heatmaps = checked_array("heatmaps", heatmaps, (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE))
    candidates_xy = checked_array("candidates_xy", candidates_xy, (None, NUM_HEATMAPS, 2))
    likelihood = checked_array("likelihood", likelihood, (len(candidates_xy), NUM_HEATMAPS))
    hypotheses_mm = checked_array("hypotheses_mm", hypotheses_mm, (None, NUM_JOINTS, 3))
    if truth_mm is not None:
        truth_mm = checked_array("truth_mm", truth_mm, (NUM_JOINTS, 3))

    mean_mm = hypotheses_mm.mean(axis=0)
    strong, strong_mm = "mean of the hypotheses", mean_mm
    if chosen is not None:
        chosen = chosen.checked()
        strong, strong_mm = chosen.name, chosen.pose_mm
    if truth_mm is not None:
        strong, strong_mm = "truth", truth_mm
    limits = _pose_limits(hypotheses_mm, strong_mm)
    extents = np.diff(limits, axis=-1)[:, 0]

    # Panels share their height, so equal aspect needs widths in proportion to the extents.
    height = 4.3
    widths = (height, height * extents[0] / extents[1], height * extents[2] / extents[1], 3.3)
    gaps = (0.15, 0.75, 0.25, 1.0, 0.2)
    figure = _figure(sum(widths) + sum(gaps), height + 1.35)
    left, axes = 0.0, []
    for width, gap in zip(widths, gaps, strict=False):
        left += gap
        axes.append(_add_axes(figure, left, 0.78, width, height))
        left += width
    evidence, front, side, spread = axes

    _draw_evidence(evidence, heatmaps, candidates_xy, likelihood, crop)
    _head(evidence, f"{'Heatmaps' if crop is None else 'Picture'}, candidates, argmax")
    count = len(hypotheses_mm)
    noun = "hypothesis" if count == 1 else "hypotheses"
    for axes_, across, heading, label in (
        (front, 0, f"Front: {count} {noun}", "x, right (mm)"),
        (side, 2, "Side", "z, towards the camera (mm)"),
    ):
        _draw_poses(axes_, hypotheses_mm[..., [across, 1]], strong_mm[:, [across, 1]])
        axes_.set(xlim=limits[across], ylim=limits[1])
        axes_.set_xlabel(label)
        _head(axes_, heading)
    front.set_ylabel("y, up (mm)")
    side.tick_params(labelleft=False)
    _draw_spread(spread, hypotheses_mm, mean_mm, truth_mm, chosen)
    _head(spread, "Spread per joint" if truth_mm is None else "Spread and error per joint")

    _group_legend(figure, strong)
    _suptitle(figure, title)
    return figure


def plot_heatmap_grid(
    heatmaps: ArrayLike,
    candidates_xy: ArrayLike | None = None,
    likelihood: ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """Shows the 16 heatmaps one by one, each with its candidates and its highest value.

    Every map has its own grey scale, so that a weak second peak shows; the height printed in
    the corner says how sure the detector is.

    Args:
        heatmaps: (16, 64, 64), MPII order, row-major.
        candidates_xy: (S, 16, 2), grid coordinates in [-1, 1), or None.
        likelihood: (S, 16), heatmap heights at the candidates; None draws all at one size.
        title: Heading of the figure, taken literally.

    Returns:
        A figure of 4 x 4 panels in MPII order.

    Raises:
        ValueError: An array has the wrong shape or holds values that are not finite.
    """
    heatmaps = checked_array("heatmaps", heatmaps, (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE))
    candidates = None
    if candidates_xy is not None:
        xy = checked_array("candidates_xy", candidates_xy, (None, NUM_HEATMAPS, 2))
        heights = np.ones(xy.shape[:2]) if likelihood is None else likelihood
        candidates = xy, checked_array("likelihood", heights, (len(xy), NUM_HEATMAPS))

    size, gap_x, gap_y, top = 1.9, 0.15, 0.32, 0.45
    figure = _figure(4 * size + 5 * gap_x, top + 4 * (size + gap_y) - 0.1)
    for joint, heatmap in enumerate(heatmaps):
        row, column = divmod(joint, 4)
        bottom = (3 - row) * (size + gap_y) + gap_x
        axes = _add_axes(figure, gap_x + column * (size + gap_x), bottom, size, size)
        _draw_heatmap(axes, heatmap)
        if candidates is not None:
            xy, heights = (of_joints[:, joint] for of_joints in candidates)
            _draw_candidates(axes, xy, heights, _MPII_COLOURS[joint], 30.0)
        axes.set_title(MPII_JOINTS[joint], loc="left", fontsize=8.5, color=_INK, pad=3)
        axes.set_title(f"peak {heatmap.max():.2g}", loc="right", fontsize=7.5, color=_MUTED, pad=3)
        for spine in axes.spines.values():
            spine.set(visible=True, color=_MPII_COLOURS[joint], linewidth=1.1)
    _suptitle(figure, title or "Heatmaps and candidates")
    return figure


def plot_min_mpjpe(
    curves: Mapping[str, Mapping[int, float] | Mapping[str, float]], title: str = ""
) -> Figure:
    """Shows the error of the best of K hypotheses over K, on a logarithmic axis.

    Args:
        curves: Curve name to {K: MPJPE of the best of K hypotheses, millimetres}; see
            `min_mpjpe_curves`. A name starts with a key of `METHOD_COLOURS` to get that
            method's colour; one that ends in "ambiguous" is dashed. A curve of a single
            point, as a regression has it, is a horizontal line. K may be a string, as in JSON.
        title: Heading of the figure, taken literally.

    Returns:
        A figure with one panel; each curve is labelled at its right end.
    """
    points = {
        name: np.array(sorted((int(k), float(v)) for k, v in curve.items()))
        for name, curve in curves.items()
        if curve
    }
    figure = _figure(7.4, 4.1)
    axes = _add_axes(figure, 0.75, 0.62, 4.45, 3.1)
    _style(axes, grid="both")
    if not points:
        _say(axes, "no curves yet")
    largest = max((curve[-1, 0] for curve in points.values()), default=2.0)
    largest = max(largest, 2.0)
    spare = iter(GROUP_COLOURS.values())
    ends = []
    for name, curve in points.items():
        method = next((key for key in METHOD_COLOURS if name.startswith(key)), None)
        colour = METHOD_COLOURS[method] if method else next(spare, _INK)
        style = (0, (4, 2)) if name.endswith("ambiguous") else "-"
        ends.append((float(curve[-1, 1]), name, colour))
        if len(curve) == 1:
            axes.plot([1, largest], curve[[0, 0], 1], color=colour, ls=style, lw=1.3)
        else:
            axes.plot(*curve.T, color=colour, ls=style, lw=1.9, marker="o", ms=3.8, mec="white")
    axes.set_xscale("log")
    axes.set_xlim(0.93, largest * 1.07)
    ticks = sorted({int(k) for curve in points.values() for k in curve[:, 0]} | {1})
    axes.set_xticks(_apart(ticks, largest))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("hypotheses K")
    axes.set_ylabel("best of K, MPJPE (mm)")
    _head(axes, title or "Error of the best of K hypotheses")
    _label_ends(axes, ends)
    return figure


def min_mpjpe_curves(results: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Takes the curves of `plot_min_mpjpe` out of the content of a results.json.

    Args:
        results: `{"subsets": {subset: {"frames": n, method: {"mpjpe_best_at": {K: mm}}}}}`.
            A method without hypotheses gives one point, its `mpjpe_best`.

    Returns:
        "method, subset" to {K: millimetres}, for the methods that have either key; the mean
        pose is left out, as it would stretch the axis and hide what matters.
    """
    curves = {}
    for subset, methods in results.get("subsets", {}).items():
        for method in METHOD_COLOURS:
            metrics = methods.get(method)
            if method == "mean_pose" or not metrics:
                continue
            curve = {int(k): float(v) for k, v in metrics.get("mpjpe_best_at", {}).items()}
            if not curve and "mpjpe_best" in metrics:
                curve = {1: float(metrics["mpjpe_best"])}
            if curve:
                curves[f"{method}, {subset}"] = curve
    return curves


def plot_loss(steps: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> Figure:
    """Shows the training loss on a logarithmic axis, with its running median.

    Args:
        steps: (N,) optimizer steps, ascending.
        losses: (N,) losses; values that are not finite or not positive are left out. N may
            be 0 or 1.

    Returns:
        A figure with one panel.

    Raises:
        ValueError: The two differ in length.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if steps.shape != losses.shape or steps.ndim != 1:
        raise ValueError(
            f"plot_loss needs one loss for each step, but got steps {steps.shape} and "
            f"losses {losses.shape}; pass two flat arrays of one length"
        )
    usable = np.isfinite(losses) & (losses > 0)
    steps, losses = steps[usable], losses[usable]
    figure = _figure(7.4, 3.45)
    axes = _add_axes(figure, 0.75, 0.62, 6.4, 2.45)
    _style(axes, grid="both")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (log scale)")
    _head(axes, "Training loss")
    if not len(losses):
        _say(axes, "no losses yet")
        return figure
    # A window of about a thirtieth smooths the noise of t and still shows the first drop.
    half = len(losses) // 60
    padded = np.pad(losses, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    median = np.median(windows, axis=-1)
    if half:
        axes.plot(steps, losses, color=METHOD_COLOURS["model"], alpha=0.28, lw=0.7)
    marker = "o" if len(losses) < 30 else None
    axes.plot(steps, median, color=METHOD_COLOURS["model"], lw=1.9, marker=marker, ms=3.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_LogTicks(nbins=5))
    axes.yaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_thousands)
    if len(steps) > 1:
        axes.margins(x=0.01)
    last = f"{'running median ' if half else 'last '}{median[-1]:.3g} at step {steps[-1]:,.0f}"
    axes.set_title(last, loc="right", fontsize=8.5, color=_MUTED, pad=8)
    return figure


def plot_calibration(
    levels: ArrayLike, observed: ArrayLike | Mapping[str, ArrayLike], title: str = ""
) -> Figure:
    """Shows how often the truth lies within each predicted quantile level.

    Below the diagonal the hypotheses are too sure of themselves, above it too spread out.

    Args:
        levels: (L,) quantile levels in [0, 1].
        observed: (L,) observed frequencies in [0, 1], or several by name.
        title: Heading of the figure, taken literally.

    Returns:
        A figure with one panel; the expected calibration error printed beside each curve is
        the mean over the levels of abs(observed - level).

    Raises:
        ValueError: A curve's length is not that of the levels.
    """
    levels = np.asarray(levels, np.float64)
    curves = observed if isinstance(observed, Mapping) else {"model": observed}
    figure = _figure(4.6, 4.6)
    axes = _add_axes(figure, 0.7, 0.62, 3.6, 3.6)
    _style(axes, grid="both")
    axes.plot([0, 1], [0, 1], color=_MUTED, lw=1.0, ls=(0, (4, 3)))
    spare = iter(GROUP_COLOURS.values())
    for index, (name, values) in enumerate(curves.items()):
        values = checked_array(f"observed frequencies of {name!r}", values, levels.shape)
        colour = METHOD_COLOURS.get(name) or next(spare, _INK)
        axes.fill_between(levels, levels, values, color=colour, alpha=0.10, lw=0)
        axes.plot(levels, values, color=colour, lw=1.9, marker="o", ms=3.2, mec="white")
        label = f"{name}: ECE {np.abs(values - levels).mean():.3f}"
        _text(axes, 0.04, 0.94 - 0.065 * index, label, colour, transform=axes.transAxes)
    _text(axes, 0.97, 0.05, "too sure", _MUTED, transform=axes.transAxes, ha="right")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("quantile level")
    axes.set_ylabel("observed frequency")
    _head(axes, title or "Calibration")
    return figure


def figure_bytes(figure: Figure, file_format: str = "png", dpi: int = 150) -> bytes:
    """Renders a figure to the bytes of a file.

    Args:
        figure: The figure.
        file_format: "png", "svg" or "pdf".
        dpi: Pixels per inch, for PNG.

    Returns:
        The file's content, without the date.
    """
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(file_format, {})
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=dpi, metadata=undated)
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Writes a figure; a reader never sees half a file.

    Args:
        figure: The figure.
        path: Where to; the suffix gives the format (.png, .svg, .pdf). Folders are made.
        dpi: Pixels per inch, for PNG.

    Returns:
        The path.
    """
    path = Path(path)
    return write_atomic(path, figure_bytes(figure, path.suffix.lstrip(".") or "png", dpi))


def checked_array(name: str, values: ArrayLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """Gives values as a float64 array, once they are fit to be drawn.

    Args:
        name: What to call the array in an error.
        values: Anything that numpy makes an array of.
        shape: The sizes expected; None stands for one or more.

    Returns:
        The array.

    Raises:
        ValueError: The shape is another one, or a value is not finite.
    """
    values = np.asarray(values, np.float64)
    fits = len(values.shape) == len(shape) and all(
        have > 0 if want is None else have == want
        for have, want in zip(values.shape, shape, strict=True)
    )
    if not fits:
        want = ", ".join("N" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape ({want}), but has {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite; draw only finite frames")
    return values


def _draw_evidence(
    axes: Axes,
    heatmaps: np.ndarray,
    candidates_xy: np.ndarray,
    likelihood: np.ndarray,
    crop: NDArray[np.uint8] | None,
) -> None:
    """The picture, or the maximum of the heatmaps; candidates, and the skeleton of the argmax."""
    if crop is None:
        _draw_heatmap(axes, heatmaps.max(axis=0))
    else:
        _style(axes)
        # A cell's value belongs to its whole-number coordinate: the crop's edge is at 0, not -1/2.
        axes.imshow(crop, extent=(0, HEATMAP_SIZE, HEATMAP_SIZE, 0), alpha=0.8)
        axes.set(xlim=(0, HEATMAP_SIZE), ylim=(HEATMAP_SIZE, 0), xticks=[], yticks=[])
    cells = heatmaps.reshape(NUM_HEATMAPS, -1).argmax(axis=-1)
    argmax = np.stack([cells % HEATMAP_SIZE, cells // HEATMAP_SIZE], axis=-1)
    bones = LineCollection(list(argmax[list(MPII_BONES)]), colors=_INK, linewidths=1.6, zorder=3)
    bones.set_path_effects([Stroke(linewidth=3.2, foreground="white"), Normal()])
    axes.add_collection(bones)
    for joint, colour in enumerate(_MPII_COLOURS):
        _draw_candidates(axes, candidates_xy[:, joint], likelihood[:, joint], colour, 34.0)
    x, y = argmax.T
    axes.scatter(x, y, s=26, c=_MPII_COLOURS, edgecolors=_INK, linewidths=1.1, zorder=5)
    for spine in axes.spines.values():
        spine.set(visible=True, color=_FAINT)


def _draw_heatmap(axes: Axes, heatmap: np.ndarray) -> None:
    _style(axes)
    # The square root lifts second peaks of a tenth of the height out of the background.
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(heatmap.max()), 1e-12), clip=True)
    axes.imshow(heatmap, cmap=_HEAT, norm=norm, interpolation="nearest")
    axes.set(xlim=(-0.5, HEATMAP_SIZE - 0.5), ylim=(HEATMAP_SIZE - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])


def _draw_candidates(
    axes: Axes, points_xy: np.ndarray, likelihood: np.ndarray, colour: str, largest: float
) -> None:
    """Candidates in grid coordinates; the area grows with the likelihood."""
    half = HEATMAP_SIZE / 2
    share = np.clip(likelihood, 0, None) / max(float(likelihood.max()), 1e-12)
    x, y = (half + half * points_xy).T
    axes.scatter(
        x,
        y,
        s=4.0 + largest * share,
        c=colour,
        alpha=0.75,
        edgecolors="white",
        linewidths=0.5,
        zorder=4,
    )


def _draw_poses(axes: Axes, hypotheses: np.ndarray, strong: np.ndarray) -> None:
    """Hypotheses (M, 17, 2) thin and translucent, one pose (17, 2) strong in front."""
    _style(axes, grid="both")
    axes.set_aspect("equal")
    count = len(hypotheses)
    alpha = float(np.clip(3.0 / np.sqrt(count), 0.08, 0.7))
    bones = list(H36M_BONES)
    axes.add_collection(
        LineCollection(
            list(hypotheses[:, bones].reshape(-1, 2, 2)),
            colors=[_H36M_COLOURS[child] for _, child in bones] * count,
            linewidths=0.7,
            alpha=alpha,
            zorder=2,
        )
    )
    truth = LineCollection(list(strong[bones]), colors=_INK, linewidths=2.3, zorder=4)
    truth.set_capstyle("round")
    truth.set_path_effects(_CASING)
    axes.add_collection(truth)
    x, y = strong.T
    axes.scatter(x, y, s=24, c=_H36M_COLOURS, edgecolors=_INK, linewidths=1.0, zorder=5)
    axes.locator_params(nbins=5)


def _draw_spread(
    axes: Axes,
    hypotheses_mm: np.ndarray,
    mean_mm: np.ndarray,
    truth_mm: np.ndarray | None,
    chosen: ChosenPose | None,
) -> None:
    _style(axes, grid="x")
    order = list(_BAR_ORDER)
    rows = np.arange(len(order))
    squared = np.square(hypotheses_mm - mean_mm).sum(axis=-1)
    spread = np.sqrt(squared.mean(axis=0))[order]
    colours = [_H36M_COLOURS[joint] for joint in order]
    axes.barh(rows, spread, height=0.62, color=colours, alpha=0.55, lw=0)
    handles: list[Line2D | Patch] = [Line2D([], [], color=_MUTED, lw=6, alpha=0.55, label="spread")]
    reach = spread.max()
    if chosen is not None:
        outline: dict[str, Any] = {"fill": False, "ec": _INK, "lw": 1.0}
        axes.barh(rows, chosen.radius_mm[order], height=0.62, **outline, zorder=3)
        handles.append(Patch(**outline, label=f"{100 * chosen.level:g}% radius"))
        reach = max(reach, chosen.radius_mm.max())
    if truth_mm is not None:
        errors = np.linalg.norm(hypotheses_mm - truth_mm, axis=-1)
        best = errors[errors.mean(axis=-1).argmin()][order]
        mean = np.linalg.norm(mean_mm - truth_mm, axis=-1)[order]
        marker: dict[str, Any] = {"ms": 5, "ls": "", "clip_on": False}
        circle = marker | {"marker": "o", "mfc": "white", "mec": _INK}
        diamond = marker | {"marker": "D", "mfc": _INK, "mec": "white"}
        axes.plot(mean, rows, **circle, zorder=4)
        axes.plot(best, rows, **diamond, zorder=5)
        handles += [
            Line2D([], [], **circle, label="error of the mean"),
            Line2D([], [], **diamond, label="of the best"),
        ]
        reach = max(reach, mean.max(), best.max())
    axes.set_yticks(rows, [H36M_JOINTS[joint] for joint in order])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(order) - 0.4, -0.6), xlim=(0, max(float(reach), 1.0) * 1.05))
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("mm")
    axes.figure.legend(
        handles=handles,
        loc="lower right",
        ncols=3,
        bbox_to_anchor=(axes.get_position().x1, 0.0),
        **_LEGEND,
    )


def _group_legend(figure: Figure, strong: str) -> None:
    handles = [Line2D([], [], color=_INK, lw=2.3, label=strong)]
    handles += [
        Line2D([], [], color=colour, lw=2.3, label=group) for group, colour in GROUP_COLOURS.items()
    ]
    figure.legend(handles=handles, loc="lower left", ncols=6, **_LEGEND)


_LEGEND = {
    "frameon": False,
    "fontsize": 8.5,
    "labelcolor": _MUTED,
    "handlelength": 1.4,
    "handletextpad": 0.5,
    "columnspacing": 1.3,
}


def _pose_limits(*poses_mm: np.ndarray) -> np.ndarray:
    """(3, 2) limits that hold nearly all of every pose, the same scale on each axis."""
    joints = np.concatenate([poses.reshape(-1, 3) for poses in poses_mm])
    strong = poses_mm[-1]
    # One stray hypothesis must not shrink all others, but the strong pose is never cut.
    low = np.minimum(np.quantile(joints, 0.001, axis=0), strong.min(axis=0))
    high = np.maximum(np.quantile(joints, 0.999, axis=0), strong.max(axis=0))
    height = max(high[1] - low[1], 200.0)
    half = (high - low) / 2 + 0.04 * height
    half[1] = max(half[1], half[0] / 1.2, half[2] / 1.2)  # a lying person gets no endless panel
    # At least half as wide as tall, so that the panel's heading fits.
    half = np.maximum(half, 0.55 * half[1])
    middle = (low + high) / 2
    return np.stack([middle - half, middle + half], axis=-1)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes placed in inches: alignment that no layout engine moves."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _style(axes: Axes, grid: Literal["", "x", "y", "both"] = "") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#9a9a9a", linewidth=0.8)
    axes.tick_params(labelsize=8.5, colors=_MUTED, labelcolor=_INK, width=0.8, length=3)
    axes.xaxis.label.set(size=9, color=_MUTED)
    axes.yaxis.label.set(size=9, color=_MUTED)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="#ebebeb", linewidth=0.8)


def _head(axes: Axes, heading: str) -> None:
    axes.set_title(
        heading, loc="left", fontsize=10, color=_INK, weight="bold", pad=8, parse_math=False
    )


def _suptitle(figure: Figure, title: str) -> None:
    up = figure.get_size_inches()[1]
    figure.suptitle(
        title,
        x=0.15 / figure.get_size_inches()[0],
        y=1 - 0.1 / up,
        ha="left",
        va="top",
        fontsize=12,
        weight="bold",
        color=_INK,
        parse_math=False,
    )


def _text(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    axes.text(x, y, text, color=colour, fontsize=8.5, va="center", parse_math=False, **options)


def _say(axes: Axes, text: str) -> None:
    _text(axes, 0.5, 0.5, text, _MUTED, transform=axes.transAxes, ha="center")


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Labels curves right of the panel, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    need = 0.062
    places: list[float] = []
    for value, _, _ in sorted(ends):
        wanted = (value - low) / (high - low)
        places.append(wanted if not places else max(wanted, places[-1] + need))
    # What went over the top comes back down, and takes along what is in its way.
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - need
    for place, (value, name, colour) in zip(places, sorted(ends), strict=True):
        at = (value - low) / (high - low)
        axes.plot(
            [1.005, 1.03, 1.04], [at, place, place], color=colour, lw=0.8,
            transform=axes.transAxes, clip_on=False,
        )  # fmt: skip
        label = f"{name.replace('_', ' ')}  {value:.1f}"
        _text(axes, 1.05, place, label, colour, transform=axes.transAxes)


def _apart(ticks: Sequence[int], largest: float) -> list[int]:
    """Drops ticks whose labels would touch on a logarithmic axis; keeps both ends."""
    kept = [ticks[0]]
    room = np.log(max(largest, 2)) / 14
    for tick in ticks[1:-1]:
        if np.log(tick / kept[-1]) >= room and np.log(ticks[-1] / tick) >= room:
            kept.append(tick)
    return [*kept, ticks[-1]] if len(ticks) > 1 else kept


class _LogTicks(MaxNLocator):
    """Round ticks on a logarithmic axis that may span less than a decade."""

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Ticks 1, 2, 5 per decade; evenly spaced ones where fewer than three would show."""
        decades = np.arange(np.floor(np.log10(vmin)), np.ceil(np.log10(vmax)) + 1)
        ticks = np.outer(10.0**decades, [1, 2, 5]).ravel()
        ticks = ticks[(ticks >= vmin) & (ticks <= vmax)]
        if len(ticks) > 9:
            ticks = 10.0**decades
        return list(ticks if len(ticks) > 2 else super().tick_values(vmin, vmax))


def _plain_number(value: float, _: float) -> str:
    return f"{value:.3g}"


def _thousands(value: float, _: float) -> str:
    return f"{value:,.0f}"
