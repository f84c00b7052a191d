"""The report of a run or a prediction: one HTML file, without network or other files.

`page.html` is the Jinja template: markup, style and the 3D view (JavaScript on a canvas). This
module prepares its values. Jinja escapes what comes from outside (names, the config, captions).
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from diffpose_jax.evaluation.calibration import SinglePose
from diffpose_jax.io.files import write_atomic
from diffpose_jax.report.figures import GROUP_COLOURS, JOINT_GROUPS, METHOD_COLOURS, figure_bytes
from diffpose_jax.report.tables import METRICS, Metric
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS

MAX_HYPOTHESES = 200
"""Hypotheses of an example that go into the page: about 50 kB for 200 of them."""
MAX_EXAMPLES = 8
"""Examples that go into the page."""

_WIDE = 900  # pixels; a wider figure takes both columns of the page

Picture = Figure | str | os.PathLike[str]
"""A figure, or the path of a PNG."""

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


@dataclasses.dataclass(frozen=True)
class ReportExample:
    """One frame for the 3D view.

    Attributes:
      name: what the selector calls it.
      hypotheses_mm: hip-centred, y up, z towards the camera; the first `MAX_HYPOTHESES` are shown.
      truth_mm: likewise, or None where it is not known.
      figure: shown below the view while the example is selected, see `figures.plot_example`.
      chosen: the pose that was made of the hypotheses, with its radii; None for their mean.
    """

    name: str
    hypotheses_mm: Float[np.ndarray, "M 17 3"]
    truth_mm: Float[np.ndarray, "17 3"] | None = None
    figure: Picture | None = None
    chosen: SinglePose | None = None


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

    `results` is the content of results.json, in which baselines and metrics may be missing,
    `config_text` is shown folded, `figures` are pairs of a caption and a figure, and the first
    `MAX_EXAMPLES` of the examples are taken for the 3D view.
    """
    subsets = (results or {}).get("subsets", {})
    summary = [f"{name}: {methods['frames']:,} frames" for name, methods in subsets.items()]
    if results:
        summary.insert(0, f"{results['num_hypotheses']:,} hypotheses per frame")
    shown = examples[:MAX_EXAMPLES]
    groups = list(GROUP_COLOURS)
    page = _ENVIRONMENT.get_template("page.html").render(
        title=title,
        colours=GROUP_COLOURS | METHOD_COLOURS,
        method_colours=METHOD_COLOURS,
        summary=summary,
        models=[(name, methods["model"]) for name, methods in subsets.items()],
        metrics=METRICS,
        tables=[table for item in subsets.items() for table in _tables(*item)],
        data={
            "joints": H36M_JOINTS,
            "bones": H36M_BONES,
            "groups": groups,
            "groupOf": [groups.index(group) for group in JOINT_GROUPS],
            "examples": [_example_data(example) for example in shown],
        },
        total=len(examples),
        example_figures=[
            (index, _picture(example.figure, example.name))
            for index, example in enumerate(shown)
            if example.figure is not None
        ],
        figures=[_picture(figure, caption) for caption, figure in figures],
        config=config_text,
    )
    return write_atomic(path, page.encode("utf-8"))


def _example_data(example: ReportExample) -> dict[str, Any]:
    """An example for the page's script: poses as flat lists of whole millimetres."""
    chosen = example.chosen
    return {
        "name": example.name,
        "chosen": chosen
        and {
            "name": chosen.name,
            "pose": _whole_mm(chosen.pose_mm),
            "radius": _whole_mm(chosen.radius_mm),
            "level": f"{100 * chosen.level:g}%",
            "meaning": chosen.meaning,
        },
        "total": len(example.hypotheses_mm),
        "hypotheses": _whole_mm(example.hypotheses_mm[:MAX_HYPOTHESES]),
        "truth": None if example.truth_mm is None else _whole_mm(example.truth_mm),
    }


def _whole_mm(poses_mm: Float[np.ndarray, "*shape"]) -> list[int]:
    return np.rint(poses_mm).astype(np.int64).ravel().tolist()


class _Table(NamedTuple):
    """Methods by metrics; a column is a metric, {method: value as shown}, and the best of them."""

    caption: str
    methods: list[str]
    columns: list[tuple[Metric, dict[str, str], str]]


def _tables(subset: str, results: Mapping[str, Any]) -> list[_Table]:
    """The metrics of one subset, and the best of K where there are hypotheses."""
    known = [name for name in METHOD_COLOURS if name in results]
    rows = {name: results[name] for name in [*known, *results] if name != "frames"}
    compared = {key: metric for key, metric in METRICS.items() if metric.better}
    best_at = {
        name: {int(k): value for k, value in row["mpjpe_best_at"].items()}
        for name, row in rows.items()
        if "mpjpe_best_at" in row
    }
    of_k = {k: Metric(f"K = {k}", "") for k in sorted(set().union(*best_at.values()))}
    caption = f"{subset.capitalize()}, {results['frames']:,} frames"
    tables = [_Table(caption, list(rows), _columns(compared, rows))]
    if best_at:
        caption = "MPJPE of the best of K hypotheses"
        tables.append(_Table(caption, list(best_at), _columns(of_k, best_at)))
    return tables


def _columns(
    metrics: Mapping[Any, Metric], rows: Mapping[str, Mapping[Any, float]]
) -> list[tuple[Metric, dict[str, str], str]]:
    columns = []
    for key, metric in metrics.items():
        values = {name: row[key] for name, row in rows.items() if key in row}
        finite = [value for value in values.values() if math.isfinite(value)]
        best = (min if metric.better == "lower" else max)(finite, default=math.nan)
        # Compared as shown, so that equal numbers are bold together.
        best_text = metric.text(best) if finite and len(values) > 1 else ""
        texts = {name: metric.text(value) for name, value in values.items()}
        columns.append((metric, texts, best_text))
    return [column for column in columns if column[1]]


def _picture(picture: Picture, text: str) -> dict[str, Any]:
    """What the template needs of a picture: its PNG as a data URL, its size, its caption."""
    content = figure_bytes(picture) if isinstance(picture, Figure) else Path(picture).read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # in the PNG's header
    url = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return {"alt": text, "src": url, "width": width, "height": height, "wide": width > _WIDE}
