"""How metrics are named and rounded; tables of results as Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one metric of results.json is shown.

    Attributes:
      label: on the page.
      heading: in tables, where it is known that a metric is that of the best hypothesis.
      better: "lower" or "higher"; "" for a number that is not compared.
    """

    label: str
    heading: str
    unit: str = "mm"
    digits: int = 1
    better: str = "lower"

    def text(self, value: float) -> str:
        """The value rounded."""
        return f"{value:.{self.digits}f}" if math.isfinite(value) else "n/a"


METRICS: dict[str, Metric] = {
    "mpjpe_best": Metric("MPJPE, best", "MPJPE"),
    "mpjpe_mean": Metric("MPJPE, mean", "MPJPE, mean"),
    "mpjpe_median": Metric("MPJPE, median", "MPJPE, median"),
    "pa_mpjpe_best": Metric("PA-MPJPE, best", "PA-MPJPE"),
    "pa_mpjpe_mean": Metric("PA-MPJPE, mean", "PA-MPJPE, mean"),
    "pck150_best": Metric("PCK@150, best", "PCK", "%", 1, "higher"),
    "pck150_all_best": Metric("PCK@150, all joints, best", "PCK, all joints", "%", 1, "higher"),
    "pck150_scaled_best": Metric("PCK@150, scaled, best", "PCK, scaled", "%", 1, "higher"),
    "cps_best": Metric("CPS, best", "CPS", "of 299", 1, "higher"),
    "cps_area_best": Metric("CPS as an area, best", "CPS as an area", "of 299", 1, "higher"),
    "symmetry": Metric("Symmetry", "Sym"),
    "ece": Metric("ECE", "ECE", "", 3),
    "pit_error": Metric("PIT error", "PIT error", "", 3),
    "energy_score": Metric("Energy score", "energy score"),
    "energy_score_pose": Metric("Energy score, pose", "energy score, pose"),
    "sharpness_mm": Metric("Sharpness", "sharpness", better=""),
    "radius_mm": Metric("Radius", "radius", better=""),
    "coverage": Metric("Coverage", "within it", "", 3, ""),
}
"""The metrics of results.json in the order of the page."""

PAPER_METRICS = ("mpjpe_best", "pa_mpjpe_best", "pck150_best", "cps_best", "symmetry")
"""The columns of the paper's tables."""

Headings = Mapping[str, tuple[str, int]]
"""Column to its heading and decimals."""

_OTHERS = (
    *("pck150_scaled_best", "mpjpe_mean", "energy_score", "energy_score_pose", "ece", "pit_error"),
    *("sharpness_mm", "radius_mm", "coverage"),
)
COLUMNS: Headings = {
    name: (METRICS[name].heading, METRICS[name].digits) for name in PAPER_METRICS + _OTHERS
}
"""The columns of most tables."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a row for each method.

    Attributes:
      columns: keys of `headings`.
      rows: (name, `{column: values}`): the values of several seeds, or one. A column that a row
        does not have stays empty.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, Mapping[str, Sequence[float]]], ...]
    headings: Headings = dataclasses.field(default_factory=lambda: COLUMNS)

    def to_markdown(self) -> str:
        """Mean and spread (the sample standard deviation over seeds), rounded."""
        headings = ["", *(self.headings[column][0] for column in self.columns)]
        lines = [headings, ["---"] * len(headings)]
        for name, metrics in self.rows:
            cells = [_rounded(metrics.get(c, ()), self.headings[c][1]) for c in self.columns]
            lines.append([name, *cells])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def to_csv(self) -> str:
        """One line a row: name, number of values, then mean and spread of each metric, exact."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        headings = [h for column in self.columns for h in (column, f"{column} spread")]
        writer.writerow(["name", "values", *headings])
        for name, metrics in self.rows:
            numbers = [n for c in self.columns for n in mean_and_spread(metrics.get(c, ()))]
            cells = ["" if math.isnan(number) else number for number in numbers]
            writer.writerow([name, max(map(len, metrics.values()), default=0), *cells])
        return text.getvalue()


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, NaN where there are too few values for it."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _rounded(values: Sequence[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
