"""MATLAB files as SciPy writes them, and one that is written here byte by byte."""

import struct

import numpy as np
import pytest
import scipy.io

from diffpose_jax.data import matlab5


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "bool"]
)
def test_arrays_are_those_that_scipy_wrote(tmp_path, dtype, compress):
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 2 if dtype == "bool" else 100, (2, 3, 5)).astype(dtype)
    variables = {"first": "text", "wanted": wanted, "x": {"a": [1.0]}, "one": np.ones((1, 1), "u1")}
    scipy.io.savemat(tmp_path / "a.mat", variables, do_compression=compress)
    found = matlab5.read(tmp_path / "a.mat", "wanted")
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(matlab5.read(tmp_path / "a.mat", "one"), [[1]])
    with pytest.raises(ValueError, match=r"a\.mat has no array y; it has first, wanted, x, one"):
        matlab5.read(tmp_path / "a.mat", "y")
    for name in ("first", "x"):
        with pytest.raises(ValueError, match="the variable is no array of real numbers"):
            matlab5.read(tmp_path / "a.mat", name)


def test_the_other_byte_order_and_doubles_stored_as_bytes(tmp_path):
    """As MATLAB itself stores whole numbers: in the smallest type, a short name in its tag."""
    content = struct.pack(">2I2I", 6, 8, 6, 0) + struct.pack(">2I2i", 5, 8, 2, 3)
    content += struct.pack(">2H2s2x", 2, 1, b"xy") + struct.pack(">2I6B2x", 2, 6, *range(6))
    data = b"MATLAB 5.0 MAT-file".ljust(124) + b"\1\0MI"
    (tmp_path / "a.mat").write_bytes(data + struct.pack(">2I", 14, len(content)) + content)
    np.testing.assert_array_equal(matlab5.read(tmp_path / "a.mat", "xy"), [[0, 2, 4], [1, 3, 5]])
    assert scipy.io.loadmat(tmp_path / "a.mat")["xy"].tolist() == [[0, 2, 4], [1, 3, 5]]
