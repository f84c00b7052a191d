"""Compact heatmaps: what is kept, against float64 numpy, and how large it is."""

import zlib

import numpy as np
import pytest

from diffpose_jax.data import compact

Y, X = np.mgrid[:64, :64]
DENSE_BYTES = 16 * 64 * 64 * 2


def blob(x, y, sigma, height=1.0):
    heights = height * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * sigma**2))
    return np.where(heights < 2e-3 * height, 0.0, heights)


def image(make, seed):
    """Heatmaps (16, 64, 64), each made by a function of a generator."""
    rng = np.random.default_rng(seed)
    return np.stack([make(rng) for _ in range(16)]).astype(np.float32)


def one_blob(rng):
    return blob(*rng.uniform(4, 60, 2), rng.uniform(1.8, 2.4), rng.uniform(0.3, 1.0))


def single_cell(rng):
    heights = np.zeros((64, 64))
    heights[rng.integers(64), rng.integers(64)] = rng.uniform(0.1, 1.0)
    return heights


def hardly_positive(rng):
    heights = -rng.uniform(0.1, 1.0, (64, 64))
    heights[20, 30] = 1e-9  # 0 in float16
    return heights


KINDS = {
    "blob": one_blob,
    "two peaks": lambda rng: one_blob(rng) + one_blob(rng),
    "noisy": lambda rng: one_blob(rng) + rng.normal(0, 0.01, (64, 64)),
    "noise": lambda rng: rng.normal(0, 1, (64, 64)),
    "flat": lambda rng: np.full((64, 64), rng.uniform(0.1, 1.0)),
    "all negative": lambda rng: -rng.uniform(0.1, 1.0, (64, 64)),
    "zero or less": lambda rng: np.minimum(rng.normal(0, 1, (64, 64)), 0.0),
    "all zero": lambda rng: np.zeros((64, 64)),
    "single cell": single_cell,
    "hardly positive": hardly_positive,
    "near the largest": lambda rng: 65000 * rng.random((64, 64)),
}


@pytest.fixture(params=[name for name in KINDS if name != "hardly positive"])
def maps(request):
    return image(KINDS[request.param], seed=list(KINDS).index(request.param))


def test_the_distribution_of_candidates(maps):
    restored = compact.decode(compact.encode(maps[None]))
    assert restored.shape == (1, 16, 64, 64)
    assert restored.dtype == np.float32
    for before, after in zip(maps.astype(np.float64), restored[0].astype(np.float64), strict=True):
        if before.max() <= 0:
            continue
        p, q = np.maximum(before, 0), np.maximum(after, 0)
        assert np.abs(p / p.sum() - q / q.sum()).sum() / 2 < 1e-3
        # Not a cell more than it takes: without the lowest one left, too much would be missing.
        lowest = before[after > 0].min()
        assert p[before <= lowest].sum() > compact.MAX_DROPPED_MASS * p.sum()


def test_heights_are_exact_to_float16(maps):
    restored = compact.decode(compact.encode(maps[None]))[0]
    expected = maps.astype(np.float16)
    kept = restored != 0
    np.testing.assert_array_equal(restored[kept], expected[kept])
    cells = maps.reshape(16, -1).argmax(-1)[:, None]
    heights = np.take_along_axis(expected.reshape(16, -1), cells, 1)
    np.testing.assert_array_equal(np.take_along_axis(restored.reshape(16, -1), cells, 1), heights)
    np.testing.assert_array_equal(restored.max((1, 2)), heights[:, 0])


@pytest.mark.parametrize("name", ["all negative", "zero or less", "all zero", "hardly positive"])
def test_maps_without_a_positive_cell_stay_as_they_are(name):
    maps = image(KINDS[name], seed=9)
    restored = compact.decode(compact.encode(maps[None]))[0]
    np.testing.assert_array_equal(restored, maps.astype(np.float16))


def test_without_dropped_cells(maps):
    assert len(compact.encode(maps[None], None)[0]) == DENSE_BYTES + 8
    dense = compact.decode(compact.encode(maps[None], None))[0]
    np.testing.assert_array_equal(dense, maps.astype(np.float16))
    positive = compact.decode(compact.encode(maps[None], 0.0))[0]
    some = maps.max((1, 2)) > 0
    np.testing.assert_array_equal(positive[some], np.maximum(maps, 0).astype(np.float16)[some])


def test_ties_are_kept_together():
    maps = np.zeros((1, 16, 64, 64), np.float32)
    maps[:, :, :50] = 1.0
    np.testing.assert_array_equal(compact.decode(compact.encode(maps, 0.3)), maps)


def test_size():
    shares = {
        "blob": 0.05,
        "two peaks": 0.1,
        "noisy": 0.6,
        "flat": 1.1,
        "all zero": 200 / DENSE_BYTES,
    }
    for name, share in shares.items():
        (record,) = compact.encode(image(KINDS[name], seed=3)[None])
        assert len(record) < share * DENSE_BYTES, name


def test_many_records_in_any_order_and_form():
    maps = np.stack([image(one_blob, seed) for seed in range(5)])
    records = compact.encode(maps)
    order = [3, 0, 0, 4]
    together = compact.decode([records[i] for i in order])
    for row, i in enumerate(order):
        np.testing.assert_array_equal(together[row], compact.decode([records[i]])[0])
    mixed = compact.decode([records[1], *compact.encode(maps[2:3], None)])
    np.testing.assert_array_equal(mixed[1], maps[2].astype(np.float16))
    # Written over what was there.
    out = np.full((4, 16, 64, 64), 7.0, np.float32)
    assert compact.decode([records[i] for i in order], out) is out
    np.testing.assert_array_equal(out, together)
    assert compact.encode(maps[:0]) == []
    assert compact.decode([]).shape == (0, 16, 64, 64)


@pytest.mark.parametrize("max_dropped_mass", [5e-4, None])
def test_damaged_records(max_dropped_mass):
    (record,) = compact.encode(image(one_blob, seed=1)[None], max_dropped_mass)
    rng = np.random.default_rng(2)
    damaged = [b"", bytes(4), bytes(100), record[:-1], record[:-2], record + b"\0\0"]
    for place in [*range(150), *rng.integers(len(record), size=100)]:
        flipped = record[place] ^ (1 << rng.integers(8))
        damaged.append(record[:place] + bytes([flipped]) + record[place + 1 :])
    for each in damaged:
        with pytest.raises(ValueError, match=r"damaged"):
            compact.decode([each])


def test_unknown_form():
    content = b"new1" + bytes(128)
    with pytest.raises(ValueError, match=r"unknown form b'new1'"):
        compact.decode([zlib.crc32(content).to_bytes(4, "little") + content])


@pytest.mark.parametrize("value", [np.nan, -np.inf, 66000.0])
@pytest.mark.parametrize("max_dropped_mass", [5e-4, None])
def test_heights_that_float16_cannot_hold(value, max_dropped_mass):
    maps = np.stack([image(one_blob, seed) for seed in range(2)])
    maps[1, 5, 30, 2] = value
    with pytest.raises(ValueError, match=r"image 1, joint 5"):
        compact.encode(maps, max_dropped_mass)
