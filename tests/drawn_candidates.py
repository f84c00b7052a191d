"""The candidates in a figure's first panel."""

import numpy as np
from matplotlib.collections import PathCollection


def assert_shows(figure, candidates):
    """All of (..., S, 16), each cell of a joint once, and nothing else but the argmax."""
    shown, _ = (part for part in figure.axes[0].collections if isinstance(part, PathCollection))
    of_joints = np.asarray(candidates.cells).reshape(-1, 16) + 4096 * np.arange(16)
    rows, columns = np.divmod(np.unique(of_joints) % 4096, 64)
    expected = np.stack([columns, rows], -1).tolist()
    assert sorted(np.asarray(shown.get_offsets()).tolist()) == sorted(expected)
