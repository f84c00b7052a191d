"""Heatmaps as bytes: a twentieth of dense float16 for clean maps, about half for noisy ones.

Candidates are drawn with p proportional to max(height, 0), so what matters of a map are its
positive cells, and of those the few that hold nearly all of its mass. Of each map the highest
positive cells are kept, exact to float16; the others decode to 0. A map without a positive cell
keeps all its cells, for its argmax is a candidate with its raw height.

A record is a CRC-32 of all that follows, four bytes that name the form, and the content:

- compact: which of the 65,536 cells are kept, a mask of bits, then their heights. Kept cells lie
  together, so most bytes of the mask are 0: it is stored as its other bytes and, before them, a
  mask of where these are, which is stored in the same way once more.
- dense: all heights.

Heights are little-endian float16, bits are packed from the highest to the lowest.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS

MAX_DROPPED_MASS = 5e-4
SHAPE = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
_NUM_CELLS = NUM_HEATMAPS * HEATMAP_SIZE * HEATMAP_SIZE
_MASK_BYTES = (_NUM_CELLS // 512, _NUM_CELLS // 64, _NUM_CELLS // 8)
_HEIGHT = np.dtype("<f2")
_VANISHING = 2.0**-25  # float16 rounds to 0 what is not above it
_COMPACT, _DENSE = b"cmp1", b"f16d"


def encode(
    heatmaps: Float[np.ndarray, "N 16 64 64"], max_dropped_mass: float | None = MAX_DROPPED_MASS
) -> list[bytes]:
    """Turns heatmaps into a record each.

    Rounding to float16 moves the distribution that candidates are drawn from by up to 2.5e-4 in
    total variation (more where all of a map's heights are below 6e-5, the least normal float16),
    the dropped cells by up to `max_dropped_mass` more.

    Args:
      heatmaps: MPII joint order.
      max_dropped_mass: share of a map's positive mass that may be dropped, below 1; None keeps
        every cell, the negative ones too (the dense form).

    Raises:
      ValueError: for a height that is not finite or beyond float16.
    """
    bad = np.argwhere(~(np.abs(heatmaps) <= np.finfo(_HEIGHT).max).all((2, 3)))
    if len(bad):
        image, joint = bad[0]
        raise ValueError(
            f"heatmaps must be finite and within +-65504 (float16): image {image}, joint {joint}"
        )
    return [_encode(maps, max_dropped_mass) for maps in heatmaps]


def decode(
    records: Sequence[bytes], out: Float32[np.ndarray, "N 16 64 64"] | None = None
) -> Float32[np.ndarray, "N 16 64 64"]:
    """Turns the records of `encode`, of both forms, into heatmaps: 0 in dropped cells.

    They are written to `out`, which must be contiguous, if it is given.

    Raises:
      ValueError: if a record is damaged.
    """
    if out is None:
        out = np.empty((len(records), *SHAPE), np.float32)
    for record, heights in zip(records, out.reshape(len(records), _NUM_CELLS), strict=True):
        checked = memoryview(record)[4:]
        if len(checked) < 4 or zlib.crc32(checked).to_bytes(4, "little") != record[:4]:
            raise ValueError("a heatmap record is damaged: its check sum does not fit")
        form, content = record[4:8], np.frombuffer(record, np.uint8, offset=8)
        if form == _COMPACT:
            _decode_compact(content, heights)
        elif form == _DENSE:
            heights[:] = content.view(_HEIGHT)
        else:
            raise ValueError(f"a heatmap record has the unknown form {form!r}")
    return out


def _encode(maps: Float[np.ndarray, "16 64 64"], max_dropped_mass: float | None) -> bytes:
    if max_dropped_mass is None:
        form, masks, kept = _DENSE, [], np.ones(SHAPE, np.bool_)
    else:
        form, kept = _COMPACT, np.stack([_kept(heights, max_dropped_mass) for heights in maps])
        cells = np.packbits(kept)
        groups = np.packbits(cells != 0)
        masks = [np.packbits(groups != 0), groups[groups != 0], cells[cells != 0]]
    content = form + b"".join(part.tobytes() for part in (*masks, maps[kept].astype(_HEIGHT)))
    return zlib.crc32(content).to_bytes(4, "little") + content


def _kept(
    heights: Float[np.ndarray, "64 64"], max_dropped_mass: float
) -> Bool[np.ndarray, "64 64"]:
    """Which cells of a map are kept."""
    positive = heights[heights > _VANISHING]
    if not positive.size:
        return heights != 0
    positive.sort()
    mass = np.cumsum(positive, dtype=np.float64)
    first = np.searchsorted(mass, max_dropped_mass * mass[-1], side="right")
    return heights >= positive[first]


def _decode_compact(content: UInt8[np.ndarray, " F"], heights: Float32[np.ndarray, " N"]) -> None:
    occupied = np.ones(_MASK_BYTES[0], np.bool_)
    start = 0
    for num_bytes in _MASK_BYTES:
        stop = start + int(np.count_nonzero(occupied))
        mask = np.zeros(num_bytes, np.uint8)
        mask[occupied] = content[start:stop]
        occupied = np.unpackbits(mask).view(np.bool_)
        start = stop
    heights.fill(0)
    heights[occupied] = content[start:].view(_HEIGHT)
