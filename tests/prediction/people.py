"""Pictures of people whose joints are squares of 16 colours, and a detector of colours."""

import dataclasses

import numpy as np

from diffpose_jax.detectors import Detector

GREY = 128
COLOURS = np.array([[r, g, b] for r in (0, 255) for g in (0, 120, 240) for b in (0, 110, 255)])
COLOURS = COLOURS[1:17]  # without black, which is around a picture


@dataclasses.dataclass(frozen=True, eq=False)
class ColourDetector(Detector):
    """Sees a colour where at least six pixels of its crop have it."""

    network: None = None
    params: None = None
    input_px: int = 160
    fingerprint: str = "colours"
    looks: list = dataclasses.field(default_factory=list)

    def heatmaps(self, crops):
        self.looks.extend(crops)
        return np.stack([[self.heatmap(crop, colour) for colour in COLOURS] for crop in crops])

    def heatmap(self, crop, colour):
        rows, columns = np.nonzero(np.abs(crop.astype(int) - colour).max(-1) < 40)
        if len(rows) < 6:
            return np.zeros((64, 64), np.float32)
        x, y = (np.mean(places) + 0.5 for places in (columns, rows))
        cell = np.arange(64) * (160 / 64)
        squares = (cell - x) ** 2 + (cell[:, None] - y) ** 2
        return np.float32(0.9 * np.exp(-squares / (2 * 4.0**2)))


def person(seed, low, high, size):
    """16 joints (x, y) between two corners; the first two are at them."""
    rng = np.random.default_rng(seed)
    low, high = np.array(low), np.array(high)
    while True:
        xy = np.concatenate([[low, high], rng.uniform(low, high, (14, 2))])
        distances = np.abs(xy[:, None] - xy).max(-1) + 1e9 * np.eye(16)
        if distances.min() > 1.2 * size:
            return xy


def picture(height, width, *people, size):
    """People's joints as squares of `size` pixels on grey."""
    image = np.full((height, width, 3), GREY, np.uint8)
    for xy in people:
        for (x, y), colour in zip(xy, COLOURS, strict=True):
            top, left = (max(round(value - size / 2), 0) for value in (y, x))
            image[top : top + size, left : left + size] = colour
    return image
