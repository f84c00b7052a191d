"""Published numbers, to stand beside measured ones (Holmquist and Wandt, ICCV 2023).

Best of 200 hypotheses where nothing else is said; millimetres, PCK in percent, CPS at most 299.
Rows are `{metric: value}` under the names of `metrics.per_frame_metrics`.
"""

from __future__ import annotations

from diffpose_jax.report.tables import PAPER_METRICS


def _row(*values: float) -> dict[str, float]:
    """A row from the first values of `PAPER_METRICS`."""
    return dict(zip(PAPER_METRICS, values, strict=False))


H36M: dict[str, dict[str, float]] = {
    "DiffPose (Holmquist and Wandt)": _row(42.9, 30.8),
    "Martinez et al., one pose": _row(62.9, 47.7),
}
"""Human3.6M, every 64th frame of the test subjects (Table 1); mean of five seeds."""

H36MA: dict[str, dict[str, float]] = {
    "DiffPose (Holmquist and Wandt)": _row(63.1, 46.7, 94.9, 195.5, 14.9),
    "DiffPose, 2000 hypotheses": _row(56.5, 41.2),
    "Wehrbein et al.": _row(71.0, 54.2, 93.4, 171.0, 27.4),
    "Sharma et al.": _row(78.3, 61.1, 88.5, 136.4, 23.9),
    "Li and Lee": _row(81.1, 66.0, 85.7, 119.9),
}
"""The ambiguous subset of Human3.6M (Table 2)."""

ABLATIONS: dict[str, dict[str, float]] = {
    "full": _row(63.1, 46.7, 94.9, 195.5, 14.9),
    "sample_free": _row(67.7, 50.1, 93.5, 178.4, 25.7),
    "sample_based": _row(66.4, 50.0, 93.5, 180.4, 26.9),
    "full_heatmap": _row(173.8, 283.3, 37.3, 24.1, 13.4),
    "without_sampling": _row(67.7, 50.1, 93.5, 178.9, 21.8),
    "without_argmax": _row(62.5, 46.2, 95.2, 196.9, 14.6),
    "without_cross_spatial": _row(63.6, 46.8, 94.9, 194.9, 14.5),
    "without_likelihood_scaling": _row(62.4, 46.8, 95.0, 194.3, 14.3),
    "without_transformer": _row(66.0, 49.2, 94.2, 191.6, 16.0),
    "without_joint_dropout": _row(65.0, 47.9, 94.2, 188.7, 17.4),
}
"""The ablations on the ambiguous subset (Tables 3 and 4), named as in `configs/ablations.py`."""

MPI_INF_3DHP_PCK: dict[str, float] = {
    "green_screen": 87.4,
    "no_green_screen": 82.7,
    "outdoor": 83.6,
    "all": 84.7,
}
"""PCK@150 on the test set of MPI-INF-3DHP by scene; 87.6 over all with 2,000 hypotheses."""
