"""TFDS builders of data sets of pictures in files, with a known square around one person each."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffpose_jax.data import prepared
from diffpose_jax.data.prepared import Columns
from diffpose_jax.detectors import crops
from diffpose_jax.io import pictures

_PART, _AT_ONCE = 1024, 64


class Photographs(NamedTuple):
    """N pictures: their files, what to cut out of them, and the data set's columns."""

    name: str
    paths: Sequence[Path]
    squares: crops.Crop
    columns: Columns


class PhotographsBuilder(prepared.DetectionsBuilder):
    """Puts all pictures into the split "test"; a data set gives `photographs` and `columns`."""

    def describe(self) -> dict[str, Any]:
        """The configuration and the detector."""
        if self.detector is None:
            raise ValueError("the pictures need a detector: give --detector")
        return super().describe()

    @abc.abstractmethod
    def photographs(self) -> list[Photographs]:
        """All pictures of `source`, which are not opened."""

    def check(self) -> None:
        """Reads all annotations and the headers of all pictures."""
        for _, paths, (corners_px, sides_px), _ in tqdm(self.photographs(), desc="checking"):
            ends_px = corners_px + sides_px[:, None]
            for path, low, high in zip(paths, corners_px, ends_px, strict=True):
                size = np.array(pictures.size(path))
                if (high <= 0).any() or (low >= size).any():
                    raise ValueError(
                        f"{path} is {size[0]} x {size[1]} px, and its annotated person lies outside"
                        f" (x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}): are"
                        " the images of another size than those of the data set?"
                    )

    def parts(self) -> list[prepared.Part]:
        """A thousand pictures each."""
        return [
            prepared.Part(
                f"{some.name}_{start}", "test", functools.partial(self._read, some, start)
            )
            for some in self.photographs()
            for start in range(0, len(some.paths), _PART)
        ]

    def _read(self, some: Photographs, first: int) -> Iterator[Columns]:
        last = min(first + _PART, len(some.paths))
        for start in range(first, last, _AT_ONCE):
            here = slice(start, min(start + _AT_ONCE, last))
            parts = zip(some.paths[here], *(values[here] for values in some.squares), strict=True)
            input_px = self.fields["input_px"]
            cut = [
                crops.square_crop_image(pictures.read(path), corner_px, side_px, input_px)
                for path, corner_px, side_px in parts
            ]
            columns = {name: column[here] for name, column in some.columns.items()}
            yield {"crops": np.stack(cut), **columns}
