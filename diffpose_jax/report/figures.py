"""Figures: one frame with its hypotheses, and the curves of a run.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know, so figures need no
display and are freed like other objects. The style is set by `matplotlib.rc_context`, in one thread
at a time. The colours are those of Okabe and Ito (2008), which stay apart under the common
colour-vision deficiencies: warm is the person's right side, cool the left.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator, NullLocator
from scipy import ndimage

from diffpose_jax.data.simulator_fit import Measured
from diffpose_jax.evaluation.calibration import SinglePose
from diffpose_jax.io.files import write_atomic
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.skeleton import (
    H36M_BONES,
    H36M_JOINTS,
    H36M_LEFT,
    H36M_RIGHT,
    HEATMAP_SIZE,
    MPII_BONES,
    MPII_TO_H36M,
    NUM_HEATMAPS,
    NUM_JOINTS,
)

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
"""The model and its baselines, by their names in results.json."""

_H36M_COLOURS = tuple(GROUP_COLOURS[group] for group in JOINT_GROUPS)
_MPII_COLOURS = tuple(_H36M_COLOURS[joint] for joint in MPII_TO_H36M)
_BAR_ORDER = [10, 9, 8, 7, 14, 15, 16, 11, 12, 13, 1, 2, 3, 4, 5, 6]
"""Top to bottom as a person is seen; the hip is the origin, so it has no spread to show."""

_INK = "#1a1a1a"
_MUTED = "#5c5c5c"
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#c9ccd1", "#6f757e", "#33373d"])
_STYLE: Any = {  # matplotlib's type of the keys differs between its versions
    "axes.axisbelow": True,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "grid.color": "#ebebeb",
    "legend.columnspacing": 1.3,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.labelcolor": _MUTED,
    "lines.linewidth": 1.9,
    "lines.markeredgecolor": "white",
    "lines.markersize": 3.8,
    "text.parse_math": False,  # names of files and clips are literal
}
for _axis in ("xtick", "ytick"):
    _STYLE |= {f"{_axis}.color": _MUTED, f"{_axis}.labelcolor": _INK, f"{_axis}.labelsize": 8.5}
    _STYLE |= {f"{_axis}.major.size": 3, f"{_axis}.major.width": 0.8}


@matplotlib.rc_context(_STYLE)
def plot_example(
    heatmaps: Float[np.ndarray, "16 64 64"],
    candidates: Candidates | None,
    poses_mm: Float[np.ndarray, "M 17 3"],
    truth_mm: Float[np.ndarray, "17 3"] | None = None,
    title: str = "",
    *,
    chosen: SinglePose | None = None,
    crop: UInt8[np.ndarray, "P P 3"] | None = None,
) -> Figure:
    """Shows one frame: the heatmaps, the 3D hypotheses twice, and the spread per joint.

    The pose drawn strong is the truth or else the chosen pose or else the hypotheses' mean. The
    spread is the root mean squared distance of the hypotheses to their mean; beside it stand the
    radii of a chosen pose and, with a truth, the errors of the mean pose and of the hypothesis that
    is best by MPJPE.

    Args:
      heatmaps: in MPII order.
      candidates: what the poses were drawn under: of all hypotheses, (S, 16), or of each, (M, S,
        16); None for a model that reads the heatmaps themselves.
      poses_mm: hip-centred, y up, z towards the camera.
      truth_mm: likewise, or None where it is not known.
      title: heading of the figure.
      chosen: the pose that was made of the hypotheses.
      crop: RGB, what the heatmaps were detected in; it is drawn in their place.
    """
    mean_mm = poses_mm.mean(axis=0)
    strong, strong_mm = "mean of the hypotheses", mean_mm
    if truth_mm is not None:
        strong, strong_mm = "truth", truth_mm
    elif chosen is not None:
        strong, strong_mm = chosen.name, chosen.pose_mm
    limits = _pose_limits(poses_mm, strong_mm)

    # Panels share their height, so equal aspect needs widths in proportion to the extents.
    height, below, above = 4.3, 0.78, 0.57
    front_width, _, side_width = height * np.ptp(limits, axis=1) / np.ptp(limits[1])
    columns = (0.15, height, 0.75, front_width, 0.25, side_width, 1.0, 3.3, 0.2)  # gaps and panels
    total = below + height + above
    figure = Figure(figsize=(sum(columns), total))
    grid = figure.add_gridspec(1, len(columns), width_ratios=columns, wspace=0)
    grid.update(left=0, right=1, bottom=below / total, top=1 - above / total)
    maps, front, side, spread = (figure.add_subplot(grid[panel]) for panel in (1, 3, 5, 7))

    _draw_heatmaps(maps, heatmaps, candidates, crop)
    for axes, across in ((front, 0), (side, 2)):
        _draw_poses(axes, poses_mm[..., [across, 1]], strong_mm[:, [across, 1]])
        axes.set(xlim=limits[across], ylim=limits[1])
    count = f"{len(poses_mm)} {'hypothesis' if len(poses_mm) == 1 else 'hypotheses'}"
    front.set(title=f"Front: {count}", xlabel="x, right (mm)", ylabel="y, up (mm)")
    side.set(title="Side", xlabel="z, towards the camera (mm)")
    side.tick_params(labelleft=False)
    handles = _draw_spread(spread, poses_mm, mean_mm, truth_mm, chosen)

    right = 1 - columns[-1] / sum(columns)
    figure.legend(handles=handles, loc="lower right", ncols=4, bbox_to_anchor=(right, 0.0))
    groups = {strong: _INK} | GROUP_COLOURS
    lines = [Line2D([], [], color=colour, lw=2.3, label=name) for name, colour in groups.items()]
    figure.legend(handles=lines, loc="lower left", ncols=6)
    figure.suptitle(title, x=0.15 / sum(columns), y=1 - 0.1 / total, ha="left", va="top")
    return figure


@matplotlib.rc_context(_STYLE)
def plot_min_mpjpe(curves: Mapping[str, Mapping[int, float]], title: str = "") -> Figure:
    """Shows the error of the best of K hypotheses over K, on a logarithmic axis.

    `curves` is name to {K: MPJPE of the best of K, mm}, see `min_mpjpe_curves`. A name that starts
    with a key of `METHOD_COLOURS` gets that method's colour; one that ends in "ambiguous" is
    dashed. A curve of a single point, as a regression has it, is a horizontal line.
    """
    points = {name: np.array(sorted(curve.items())) for name, curve in curves.items() if curve}
    figure = Figure(figsize=(7.4, 4.1), layout="constrained")
    axes = figure.subplots()
    largest = max([2.0, *(curve[-1, 0] for curve in points.values())])
    spare = iter(GROUP_COLOURS.values())
    ends = []
    for name, curve in points.items():
        method = next((key for key in METHOD_COLOURS if name.startswith(key)), None)
        colour = METHOD_COLOURS[method] if method else next(spare, _INK)
        style = (0, (4, 2)) if name.endswith("ambiguous") else "-"
        ends.append((curve[-1, 1], name.replace("_", " "), colour))
        if len(curve) == 1:
            axes.plot([1, largest], curve[[0, 0], 1], color=colour, ls=style, lw=1.3)
        else:
            axes.plot(*curve.T, color=colour, ls=style, marker="o")
    axes.set_xscale("log")
    axes.set(xlim=(0.93, largest * 1.07), title=title or "Error of the best of K hypotheses")
    axes.set(xlabel="hypotheses K", ylabel="best of K, MPJPE (mm)")
    _set_log_ticks(axes.xaxis)
    _label_ends(axes, ends)
    return figure


def min_mpjpe_curves(results: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Takes the curves of `plot_min_mpjpe` out of the content of a results.json.

    A method without hypotheses gives one point, its `mpjpe_best`. The mean pose is left out: it
    would stretch the axis.

    Returns:
      "method, subset" to {K: mm}, for the methods that have `mpjpe_best_at` or `mpjpe_best`.
    """
    curves = {}
    for subset, methods in results.get("subsets", {}).items():
        for method in METHOD_COLOURS:
            metrics = {} if method == "mean_pose" else methods.get(method, {})
            curve = {int(k): float(v) for k, v in metrics.get("mpjpe_best_at", {}).items()}
            if not curve and "mpjpe_best" in metrics:
                curve = {1: float(metrics["mpjpe_best"])}
            if curve:
                curves[f"{method}, {subset}"] = curve
    return curves


@matplotlib.rc_context(_STYLE)
def plot_loss(steps: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray) -> Figure:
    """Shows the training loss on a logarithmic axis, with its running median.

    Losses that are not finite or not positive are left out; there may be none.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    usable = np.isfinite(losses) & (losses > 0)
    steps, losses = steps[usable], losses[usable]
    figure = Figure(figsize=(7.4, 3.45), layout="constrained")
    axes = figure.subplots()
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="loss (log scale)")
    if not len(losses):
        _say(axes, "no losses yet")
        return figure
    # A window of about a thirtieth smooths the noise of t and still shows the first drop.
    half = len(losses) // 60
    median = ndimage.median_filter(losses, size=2 * half + 1, mode="nearest")
    if half:
        axes.plot(steps, losses, color=METHOD_COLOURS["model"], alpha=0.28, lw=0.7)
    axes.plot(steps, median, color=METHOD_COLOURS["model"], marker="o" if len(steps) < 30 else "")
    axes.set_yscale("log")
    _set_log_ticks(axes.yaxis)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.01)
    last = f"{'running median ' if half else 'last '}{median[-1]:.3g} at step {steps[-1]:,.0f}"
    axes.set_title(last, loc="right", fontsize=8.5, color=_MUTED, weight="normal")
    return figure


@matplotlib.rc_context(_STYLE)
def plot_reliability(results: Mapping[str, Any]) -> Figure:
    """Shows how often the truth lies where the hypotheses say, from the content of a results.json.

    Three panels have the model's `reliability` on all frames, a line for each joint. Where it rises
    above the diagonal and then falls below it, the hypotheses are too sure of themselves; where it
    stays above, they are too far along the axis. The last panel has the `region_coverage` of the
    model and the Gaussian on each subset, too sure below the diagonal.
    """
    subsets = results["subsets"]
    model = subsets["all"]["model"]
    figure = Figure(figsize=(13.2, 4.3), layout="constrained")
    *panels, balls = figure.subplots(1, 4, sharex=True, sharey=True)
    for axes in (*panels, balls):
        axes.plot([0, 1], [0, 1], color=_MUTED, lw=1.0, ls=(0, (4, 3)), zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="quantile level")
        axes.tick_params(labelleft=True)
    titles = ("x, right", "y, up", "z, towards the camera")
    for axes, title, of_joints in zip(panels, titles, model["reliability"].values(), strict=True):
        axes.set_title(title)
        for joint, frequencies in of_joints.items():
            levels = np.linspace(0, 1, len(frequencies))
            colour = _H36M_COLOURS[H36M_JOINTS.index(joint)]
            axes.plot(levels, frequencies, color=colour, lw=1.0)
    panels[0].set_ylabel("truths below the quantile")
    for method, colour in METHOD_COLOURS.items():
        for subset, methods in subsets.items():
            if coverage := methods.get(method, {}).get("region_coverage"):
                style = (0, (4, 2)) if subset == "ambiguous" else "-"
                look: dict[str, Any] = {"color": colour, "ls": style, "marker": "o"}
                shares = [int(percent) / 100 for percent in coverage]
                balls.plot(shares, list(coverage.values()), label=f"{method}, {subset}", **look)
    balls.set(title="Balls around the median", xlabel="hypotheses within", ylabel="truths within")
    lines = [Line2D([], [], color=colour, label=name) for name, colour in GROUP_COLOURS.items()]
    figure.legend(handles=lines, loc="outside lower left", ncols=len(lines))
    figure.legend(handles=balls.get_lines()[1:], loc="outside lower right", ncols=4, handlelength=3)
    title = f"Model, all frames: PIT error {model['pit_error']:.3f}"
    figure.suptitle(title, x=0.008, ha="left")
    return figure


@matplotlib.rc_context(_STYLE)
def plot_detector(real: Measured, simulated: Measured) -> Figure:
    """Shows what was measured of a detector's heatmaps and of those of its simulation.

    Each panel has the shares of the joints whose number is at most that of the axis.
    """
    figure = Figure(figsize=(13.2, 3.6), layout="constrained")
    panels = {
        "height": "height",
        "width": "width, cells",
        "error": "error of the highest cell, cells",
        "second": "second mode's height over the first's",
        "floor": "deviation far from the joint",
    }
    kinds = {"real": (real, "-"), "simulated": (simulated, (0, (4, 2)))}
    colours = {"seen": METHOD_COLOURS["model"], "hidden": GROUP_COLOURS["right leg"]}
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        largest = 0.0
        for kind, (measured, style) in kinds.items():
            for where, colour in colours.items():
                values = getattr(measured, name)[measured.hidden == (where == "hidden")]
                values = np.sort(values[np.isfinite(values)])
                if values.size:
                    shares = np.arange(1, values.size + 1) / values.size
                    look: dict[str, Any] = {"color": colour, "ls": style, "lw": 1.2}
                    axes.plot(values, shares, label=f"{where}, {kind}", **look)
                    largest = max(largest, float(np.quantile(values, 0.97)))
        axes.set(xlim=(0, largest or 1.0), ylim=(0, 1), xlabel=label)
    first = figure.axes[0]
    first.set_ylabel("share of the joints")
    figure.legend(handles=first.get_lines(), loc="outside lower left", ncols=4, handlelength=3)
    arms, legs = np.mean(real.exchanged > 0.5, axis=0)
    their_arms, their_legs = np.mean(simulated.exchanged > 0.5, axis=0)
    figure.suptitle(
        f"Left and right exchanged: arms {arms:.1%} (simulated {their_arms:.1%}), legs {legs:.1%}"
        f" ({their_legs:.1%})",
        x=0.008,
        ha="left",
    )
    return figure


def figure_bytes(figure: Figure, file_format: str = "png", dpi: int = 150) -> bytes:
    """Renders a figure as "png", "svg" or "pdf"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=dpi)
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Writes a figure whole or not at all; the suffix gives the format (.png, .svg, .pdf)."""
    path = Path(path)
    return write_atomic(path, figure_bytes(figure, path.suffix.lstrip(".") or "png", dpi))


def _draw_heatmaps(
    axes: Axes,
    heatmaps: Float[np.ndarray, "16 64 64"],
    candidates: Candidates | None,
    crop: UInt8[np.ndarray, "P P 3"] | None,
) -> None:
    """The picture, or the maximum of the heatmaps; candidates, and the skeleton of the argmax."""
    names = ["Heatmaps" if crop is None else "Picture", *["candidates"] * (candidates is not None)]
    axes.set(title=", ".join([*names, "argmax"]), xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#d9d9d9")
    if crop is None:
        merged = heatmaps.max(axis=0)
        # The square root lifts second peaks of a tenth of the height out of the background.
        norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(merged.max()), 1e-12), clip=True)
        axes.imshow(merged, cmap=_HEAT, norm=norm, interpolation="nearest")
    else:
        # A cell's value belongs to its whole-number coordinate: the crop's edge is at 0, not -1/2.
        axes.imshow(crop, extent=(0, HEATMAP_SIZE, HEATMAP_SIZE, 0), alpha=0.8)
    rows, columns = np.divmod(heatmaps.reshape(NUM_HEATMAPS, -1).argmax(axis=-1), HEATMAP_SIZE)
    argmax = np.stack([columns, rows], axis=-1)
    # A flat map says nothing, as MoveNet's of the head.
    known = heatmaps.max(axis=(1, 2)) > 0
    segments = [argmax[list(bone)] for bone in MPII_BONES if known[list(bone)].all()]
    bones = LineCollection(segments, colors=_INK, linewidths=1.6, zorder=3)
    bones.set_path_effects([Stroke(linewidth=3.2, foreground="white"), Normal()])
    axes.add_collection(bones, autolim=False)
    if candidates is not None:
        cells = np.asarray(candidates.cells, np.int64).reshape(-1, NUM_HEATMAPS)
        heights = np.clip(np.asarray(candidates.likelihood, np.float64), 0, None)
        heights = heights.reshape(cells.shape)
        sizes = 4 + 34 * heights / np.maximum(heights.max(axis=0), 1e-12)
        # Draws of one cell coincide.
        _, first = np.unique(cells + HEATMAP_SIZE**2 * np.arange(NUM_HEATMAPS), return_index=True)
        first = first[known[first % NUM_HEATMAPS]]
        y, x = np.divmod(cells.ravel()[first], HEATMAP_SIZE)
        colours = [_MPII_COLOURS[joint] for joint in first % NUM_HEATMAPS]
        look: dict[str, Any] = {"alpha": 0.75, "edgecolors": "white", "linewidths": 0.5}
        axes.scatter(x, y, s=sizes.ravel()[first], c=colours, zorder=4, **look)
    colours = [colour for colour, is_known in zip(_MPII_COLOURS, known, strict=True) if is_known]
    look = {"edgecolors": _INK, "linewidths": 1.1}
    axes.scatter(columns[known], rows[known], s=26, c=colours, zorder=5, **look)


def _draw_poses(
    axes: Axes, hypotheses: Float[np.ndarray, "M 17 2"], strong: Float[np.ndarray, "17 2"]
) -> None:
    """Hypotheses thin and translucent, one pose strong in front."""
    count, bones = len(hypotheses), list(H36M_BONES)
    thin = LineCollection(
        list(hypotheses[:, bones].reshape(-1, 2, 2)),
        colors=[_H36M_COLOURS[child] for _, child in bones] * count,
        linewidths=0.7,
        alpha=float(np.clip(3.0 / np.sqrt(count), 0.08, 0.7)),
        zorder=2,
    )
    thick = LineCollection(list(strong[bones]), colors=_INK, linewidths=2.3, zorder=4)
    thick.set(capstyle="round", path_effects=[Stroke(linewidth=4.2, foreground="white"), Normal()])
    axes.add_collection(thin)
    axes.add_collection(thick)
    x, y = strong.T
    axes.scatter(x, y, s=24, c=_H36M_COLOURS, edgecolors=_INK, linewidths=1.0, zorder=5)
    axes.set_aspect("equal")
    axes.locator_params(nbins=5)


def _draw_spread(
    axes: Axes,
    poses_mm: Float[np.ndarray, "M 17 3"],
    mean_mm: Float[np.ndarray, "17 3"],
    truth_mm: Float[np.ndarray, "17 3"] | None,
    chosen: SinglePose | None,
) -> list[Line2D | Patch]:
    """Draws bars of millimetres and gives what belongs into the legend."""
    names = [H36M_JOINTS[joint] for joint in _BAR_ORDER]
    axes.set(xlabel="mm", title="Spread per joint")
    axes.grid(visible=False, axis="y")
    bars: dict[str, Any] = {"height": 0.62}
    colours = [_H36M_COLOURS[joint] for joint in _BAR_ORDER]
    spread = np.sqrt(np.square(poses_mm - mean_mm).sum(axis=-1).mean(axis=0))[_BAR_ORDER]
    axes.barh(names, spread, color=colours, alpha=0.55, lw=0, **bars)
    handles: list[Line2D | Patch] = [Line2D([], [], color=_MUTED, lw=6, alpha=0.55, label="spread")]
    if chosen is not None:
        outline: dict[str, Any] = {"fill": False, "ec": _INK, "lw": 1.0}
        axes.barh(names, chosen.radius_mm[_BAR_ORDER], zorder=3, **bars, **outline)
        handles.append(Patch(**outline, label=f"{100 * chosen.level:g}% radius"))
    if truth_mm is not None:
        axes.set_title("Spread and error per joint")
        errors = np.linalg.norm(poses_mm - truth_mm, axis=-1)
        best = errors[errors.mean(axis=-1).argmin()]
        mean = np.linalg.norm(mean_mm - truth_mm, axis=-1)
        look: dict[str, Any] = {"ms": 5, "ls": "", "clip_on": False}
        for values, label, marker, face, edge in (
            (mean, "error of the mean", "o", "white", _INK),
            (best, "of the best", "D", _INK, "white"),
        ):
            look |= {"marker": marker, "mfc": face, "mec": edge, "label": label}
            handles += axes.plot(values[_BAR_ORDER], names, **look, zorder=4)
    axes.set(ylim=(len(names) - 0.4, -0.6))
    axes.set_xlim(0, max(axes.dataLim.x1, 1.0) * 1.05)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    return handles


def _pose_limits(
    poses_mm: Float[np.ndarray, "M 17 3"], strong_mm: Float[np.ndarray, "17 3"]
) -> Float[np.ndarray, "3 2"]:
    """Limits that hold nearly all of every pose, for the same scale on each axis."""
    # One stray hypothesis must not shrink all others, but the strong pose is never cut.
    low, high = np.quantile(poses_mm, [0.001, 0.999], axis=(0, 1))
    low, high = np.minimum(low, strong_mm.min(axis=0)), np.maximum(high, strong_mm.max(axis=0))
    half = (high - low) / 2 + 0.04 * max(high[1] - low[1], 200.0)
    half[1] = max(half[1], half[0] / 1.2, half[2] / 1.2)  # a lying person gets no endless panel
    # At least half as wide as tall, so that the panel's heading fits.
    half = np.maximum(half, 0.55 * half[1])
    middle = (low + high) / 2
    return np.stack([middle - half, middle + half], axis=-1)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Labels curves (last value, name, colour) right of the panel, without overlaps."""
    if not ends:
        _say(axes, "no curves yet")
        return
    ends = sorted(ends)
    low, high = axes.get_ylim()
    at = (np.array([value for value, _, _ in ends]) - low) / (high - low)
    stacked = 0.062 * np.arange(len(ends))  # in fractions of the panel's height
    places = stacked + np.maximum.accumulate(at - stacked)
    places = np.minimum(places, 1 - stacked[::-1])
    for start, place, (value, name, colour) in zip(at, places, ends, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 0}
        axes.annotate(
            f"{name}  {value:.1f}", (1.005, start), (1.05, place), "axes fraction",
            arrowprops=line, color=colour, fontsize=8.5, va="center", annotation_clip=False,
        )  # fmt: skip


def _set_log_ticks(axis: Axis) -> None:
    """Ticks 1, 2, 5 per decade; evenly spaced ones where fewer than two would show."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, color=_MUTED, transform=axes.transAxes, ha="center", va="center")
