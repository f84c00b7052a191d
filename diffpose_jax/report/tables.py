"""Tables of results as Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

Headings = Mapping[str, tuple[str, int]]
"""Column to its heading and decimals."""

COLUMNS: Headings = {
    "mpjpe_best": ("MPJPE", 1),
    "pa_mpjpe_best": ("PA-MPJPE", 1),
    "pck150_best": ("PCK", 1),
    "cps_best": ("CPS", 1),
    "symmetry": ("Sym", 1),
    "pck150_scaled_best": ("PCK, scaled", 1),
    "mpjpe_mean": ("MPJPE, mean", 1),
    "energy_score": ("energy score", 1),
    "ece": ("ECE", 3),
    "radius_mm": ("radius", 1),
    "coverage": ("within it", 3),
}
"""The columns of most tables: metrics, of which the first five are the paper's."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a row for each method.

    Attributes:
      columns: keys of `headings`.
      rows: (name, `{column: values}`): the values of several seeds, or one. A column that a row
        does not have stays empty.
      headings: heading and decimals of each column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, Mapping[str, Sequence[float]]], ...]
    headings: Headings = dataclasses.field(default_factory=lambda: COLUMNS)

    def to_markdown(self) -> str:
        """Mean and spread (the sample standard deviation over seeds), rounded."""
        headings = ["", *(self.headings[column][0] for column in self.columns)]
        lines = [headings, ["---"] * len(headings)]
        for name, metrics in self.rows:
            cells = [
                _rounded(metrics.get(column, ()), self.headings[column][1])
                for column in self.columns
            ]
            lines.append([name, *cells])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def to_csv(self) -> str:
        """One line a row: name, number of values, then mean and spread of each metric, exact."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        pairs = [(column, f"{column} spread") for column in self.columns]
        writer.writerow(["name", "values", *(heading for pair in pairs for heading in pair)])
        for name, metrics in self.rows:
            cells = [
                cell
                for column in self.columns
                for cell in map(_exact, mean_and_spread(metrics.get(column, ())))
            ]
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


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
