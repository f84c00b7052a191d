"""The report of a run or a prediction: one HTML file, without network or other files.

`report_template.html` holds the page's markup, style and the 3D view (plain JavaScript on a
canvas); this module fills in tables, figures and poses. Whatever comes from outside (names,
the config, captions) is escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.resources
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffpose_jax.io.files import write_atomic
from diffpose_jax.report.figures import (
    GROUP_COLOURS,
    JOINT_GROUPS,
    METHOD_COLOURS,
    ChosenPose,
    checked_array,
    figure_bytes,
)
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, NUM_JOINTS

MAX_HYPOTHESES = 200
"""Hypotheses of an example that go into the page: about 50 kB for 200 of them."""
MAX_EXAMPLES = 8
"""Examples that go into the page."""

_SVG_LIMIT = 120_000  # bytes; above it a PNG is smaller and faster to show
_PNG_DPI = 110
_CSS_DPI = 96
_WIDE = 900  # CSS pixels; a wider figure takes both columns of the page

Picture = Figure | str | os.PathLike[str]
"""A figure, or the path of a PNG."""


@dataclasses.dataclass(frozen=True)
class _Metric:
    """How one metric of results.json is shown."""

    label: str
    unit: str
    digits: int
    better: str  # "lower" or "higher"


_METRICS = {
    "mpjpe_best": _Metric("MPJPE, best", "mm", 1, "lower"),
    "mpjpe_mean": _Metric("MPJPE, mean", "mm", 1, "lower"),
    "mpjpe_median": _Metric("MPJPE, median", "mm", 1, "lower"),
    "pa_mpjpe_best": _Metric("PA-MPJPE, best", "mm", 1, "lower"),
    "pa_mpjpe_mean": _Metric("PA-MPJPE, mean", "mm", 1, "lower"),
    "pck150_best": _Metric("PCK@150, best", "%", 1, "higher"),
    "pck150_all_best": _Metric("PCK@150, all joints, best", "%", 1, "higher"),
    "pck150_scaled_best": _Metric("PCK@150, scaled, best", "%", 1, "higher"),
    "cps_best": _Metric("CPS, best", "of 299", 1, "higher"),
    "cps_area_best": _Metric("CPS as an area, best", "of 299", 1, "higher"),
    "symmetry": _Metric("Symmetry", "mm", 1, "lower"),
    "ece": _Metric("ECE", "", 3, "lower"),
    "energy_score": _Metric("Energy score", "mm", 1, "lower"),
}
_AT_K = _Metric("", "mm", 1, "lower")
_TILES = ("mpjpe_best", "pa_mpjpe_best", "pck150_best", "cps_best", "symmetry", "ece")


@dataclasses.dataclass(frozen=True)
class ReportExample:
    """One frame for the 3D view.

    Attributes:
        name: What the selector calls it.
        hypotheses_mm: (M, 17, 3), millimetres, hip-centred, y up, z towards the camera; the
            first `MAX_HYPOTHESES` are shown.
        truth_mm: (17, 3), millimetres, or None where it is not known.
        figure: Shown below the view while the example is selected, for instance by
            `plotting.plot_example`; a PNG's path will do, too.
        chosen: The pose that was made of the hypotheses, with its radii; None for their mean.
    """

    name: str
    hypotheses_mm: np.ndarray
    truth_mm: np.ndarray | None = None
    figure: Picture | None = None
    chosen: ChosenPose | None = None


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any] | None = None,
    config_text: str = "",
    figures: Sequence[tuple[str, Picture]] = (),
    examples: Sequence[ReportExample] = (),
) -> Path:
    """Writes the report of a run, or of one prediction, as one self-contained HTML file.

    Args:
        path: The file; it appears whole or not at all.
        title: Heading of the page.
        results: The content of results.json: `{"num_hypotheses": M, "subsets": {subset:
            {"frames": n, method: {metric: value}}}}`. Methods and metrics may be missing;
            None or no subsets leaves the tables out.
        config_text: The configuration as text, shown folded.
        figures: (caption, figure or path of a PNG), in the order of the page.
        examples: Frames for the 3D view; the first `MAX_EXAMPLES` are taken.

    Returns:
        The path.

    Raises:
        ValueError: An example's poses have the wrong shape or are not finite, or a picture is
            not a PNG.
    """
    results = results or {}
    shown = examples[:MAX_EXAMPLES]
    poses = [_example_data(example) for example in shown]
    data = {
        "joints": H36M_JOINTS,
        "bones": H36M_BONES,
        "groups": list(GROUP_COLOURS),
        "groupOf": [list(GROUP_COLOURS).index(group) for group in JOINT_GROUPS],
        "examples": poses,
    }
    tables = "".join(
        _subset_tables(subset, methods) for subset, methods in results.get("subsets", {}).items()
    )
    parts = {
        "title": html.escape(title),
        "colours": _colour_css(),
        "summary": _summary(results),
        "tiles": _tiles(results),
        "tables": tables,
        "hide_results": "" if tables else "hidden",
        "hide_examples": "" if poses else "hidden",
        "omitted": f"The first {len(shown)} of {len(examples)} examples."
        if len(shown) < len(examples)
        else "",
        "example_figures": "".join(
            _picture(example.figure, example.name, attributes=f'data-example="{index}" hidden')
            for index, example in enumerate(shown)
            if example.figure is not None
        ),
        "figures": "".join(
            _picture(figure, caption, below=f"<figcaption>{html.escape(caption)}</figcaption>")
            for caption, figure in figures
        ),
        "hide_figures": "" if figures else "hidden",
        "config": html.escape(config_text),
        "hide_config": "" if config_text else "hidden",
        "data": _script_safe_json(data),
    }
    template = importlib.resources.files(__package__).joinpath("page.html")
    # One pass, so that nothing filled in can be taken for a place to fill in.
    page = re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template.read_text(encoding="utf-8")
    )
    return write_atomic(path, page.encode("utf-8"))


def _example_data(example: ReportExample) -> dict[str, object]:
    """An example for the page's script: poses as flat lists of whole millimetres."""
    name = f"hypotheses_mm of example {example.name!r}"
    hypotheses = checked_array(name, example.hypotheses_mm, (None, NUM_JOINTS, 3))
    truth = None
    if example.truth_mm is not None:
        name = f"truth_mm of example {example.name!r}"
        truth = checked_array(name, example.truth_mm, (NUM_JOINTS, 3))
    chosen = None
    if example.chosen is not None:
        drawn = example.chosen.checked()
        chosen = {
            "name": drawn.name,
            "pose": _whole_mm(drawn.pose_mm),
            "radius": _whole_mm(drawn.radius_mm),
            "level": f"{100 * drawn.level:g}%",
            "meaning": drawn.meaning,
        }
    return {
        "name": example.name,
        "chosen": chosen,
        "total": len(hypotheses),
        "hypotheses": _whole_mm(hypotheses[:MAX_HYPOTHESES]),
        "truth": None if truth is None else _whole_mm(truth),
    }


def _whole_mm(poses_mm: np.ndarray) -> list[int]:
    return np.rint(poses_mm).astype(np.int64).ravel().tolist()


def _script_safe_json(data: object) -> str:
    """JSON that cannot end the script element it stands in, whatever the names hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _colour_css() -> str:
    colours = GROUP_COLOURS | METHOD_COLOURS
    return " ".join(f"--{_css_name(name)}: {colour};" for name, colour in colours.items())


def _css_name(name: str) -> str:
    return re.sub(r"\W|_", "-", name)


def _summary(results: Mapping[str, Any]) -> str:
    facts = []
    if "num_hypotheses" in results:
        facts.append(f"{_count(results['num_hypotheses'])} hypotheses per frame")
    for subset, methods in results.get("subsets", {}).items():
        if "frames" in methods:
            facts.append(f"{html.escape(str(subset))}: {_count(methods['frames'])} frames")
    return " &middot; ".join(facts)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _tiles(results: Mapping[str, Any]) -> str:
    """The model's main numbers: the first subset large, the others below."""
    subsets = {
        str(name): methods["model"]
        for name, methods in results.get("subsets", {}).items()
        if methods.get("model")
    }
    if not subsets:
        return ""
    (_, main), *others = subsets.items()
    tiles = []
    for key in _TILES:
        if key not in main:
            continue
        metric = _METRICS[key]
        also = ", ".join(
            f"{html.escape(name)} {_number(model[key], metric)}"
            for name, model in others
            if key in model
        )
        tiles.append(
            f'<div class="tile"><div class="label">{metric.label}</div>'
            f'<div class="value">{_number(main[key], metric)}'
            f'<span class="unit">{metric.unit}</span></div><div class="also">{also}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _subset_tables(subset: str, methods: Mapping[str, Any]) -> str:
    """The metrics of one subset, and the best of K where there are hypotheses."""
    rows = {name: methods[name] for name in METHOD_COLOURS if methods.get(name)}
    rows |= {
        name: metrics
        for name, metrics in methods.items()
        if name not in rows and isinstance(metrics, Mapping) and metrics
    }
    frames = f", {_count(methods['frames'])} frames" if "frames" in methods else ""
    heading = f"{html.escape(str(subset)).capitalize()}{frames}"
    columns = {
        metric: {name: row[key] for name, row in rows.items() if key in row}
        for key, metric in _METRICS.items()
    }
    table = _table(heading, columns)

    at = {name: row["mpjpe_best_at"] for name, row in rows.items() if row.get("mpjpe_best_at")}
    counts = sorted({int(k) for values in at.values() for k in values})
    columns = {
        dataclasses.replace(_AT_K, label=f"K = {k}"): {
            name: {int(key): value for key, value in values.items()}[k]
            for name, values in at.items()
            if k in {int(key) for key in values}
        }
        for k in counts
    }
    return table + _table("MPJPE of the best of K hypotheses", columns)


def _table(caption: str, columns: Mapping[_Metric, Mapping[str, float]]) -> str:
    """A table of methods by metrics; the best of each column is bold."""
    columns = {metric: values for metric, values in columns.items() if values}
    if not columns:
        return ""
    rows = list(dict.fromkeys(name for values in columns.values() for name in values))
    # Columns are filled in any order; the rows keep that of the methods.
    rows.sort(key=lambda name: list(METHOD_COLOURS).index(name) if name in METHOD_COLOURS else 99)
    head = "".join(_column_head(metric) for metric in columns)
    body = "".join(
        f'<tr><th scope="row">{_swatch(name)}{html.escape(name.replace("_", " "))}</th>'
        + "".join(_cell(name, metric, values) for metric, values in columns.items())
        + "</tr>"
        for name in rows
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _column_head(metric: _Metric) -> str:
    arrow = "&darr;" if metric.better == "lower" else "&uarr;"
    unit = f'<span class="unit">{metric.unit} {arrow}</span>'
    return f'<th scope="col" title="{metric.better} is better">{metric.label}<br>{unit}</th>'


def _cell(name: str, metric: _Metric, values: Mapping[str, float]) -> str:
    if name not in values:
        return '<td class="none">&ndash;</td>'
    shown = _number(values[name], metric)
    finite = [value for value in values.values() if math.isfinite(value)]
    # Compared as shown, so that equal numbers are bold together.
    best = (min if metric.better == "lower" else max)(finite, default=math.nan)
    if len(values) > 1 and math.isfinite(values[name]) and shown == _number(best, metric):
        shown = f"<b>{shown}</b>"
    return f"<td>{shown}</td>"


def _number(value: float, metric: _Metric) -> str:
    return f"{value:.{metric.digits}f}" if math.isfinite(value) else "n/a"


def _swatch(method: str) -> str:
    if method not in METHOD_COLOURS:
        return ""
    return f'<i class="swatch" style="background:var(--{_css_name(method)})"></i>'


def _picture(picture: Picture, text: str, attributes: str = "", below: str = "") -> str:
    """A figure element with the picture inside it, as SVG where that is small, else PNG."""
    if isinstance(picture, Figure):
        width, height = (float(inches) * _CSS_DPI for inches in picture.get_size_inches())
        kind, content = "svg+xml", b""
        if width <= _WIDE:  # a wide figure shows many poses: as SVG that is slow, and too large
            content = figure_bytes(picture, "svg")
        if not 0 < len(content) <= _SVG_LIMIT:
            kind, content = "png", figure_bytes(picture, "png", _PNG_DPI)
    else:
        kind, content = "png", Path(picture).read_bytes()
        if len(content) < 24 or content[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{picture} is not a PNG; give the report PNG files or Figures")
        width, height = struct.unpack(">II", content[16:24])
    encoded = base64.b64encode(content).decode("ascii")
    wide = ' class="wide"' if width > _WIDE else ""
    return (
        f'<figure{wide} {attributes}><img alt="{html.escape(text)}" width="{width:.0f}" '
        f'height="{height:.0f}" src="data:image/{kind};base64,{encoded}">{below}</figure>'
    )
