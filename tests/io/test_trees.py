"""Trees of arrays on disk: written and read, and what does not fit is named."""

import chex
import numpy as np
import pytest
import tensorstore

from diffpose_jax.io import trees
from diffpose_jax.io.trees import CheckpointError


def test_a_tree(tmp_path):
    tree = {"a": {"b": np.arange(3, dtype=np.float32)}}
    trees.save_tree(tmp_path / "tree", tree)
    chex.assert_trees_all_equal(trees.load_tree(tmp_path / "tree", tree), tree)
    # In place of what was there.
    other = {"c": np.ones(3)}
    trees.save_tree(tmp_path / "tree", other)
    chex.assert_trees_all_equal(trees.load_tree(tmp_path / "tree", other), other)
    with pytest.raises(CheckpointError, match=r"tree do not fit: a\.b is missing; c is unknown"):
        trees.load_tree(tmp_path / "tree", tree)
    with pytest.raises(CheckpointError, match="tree do not fit: c is unknown"):
        trees.load_tree(tmp_path / "tree", {})
    with pytest.raises(CheckpointError, match="cannot read nothing"):
        trees.load_tree(tmp_path / "nothing", tree)


@pytest.mark.parametrize(
    ("shape", "chunk", "problem"),
    [
        (10**9, 10**6, r"tree do not fit: a is \(1000000000,\), not \(3,\)"),
        (3, 10**9, "tree is damaged: a has chunks larger than itself"),
    ],
)
def test_an_array_of_a_stranger_larger_than_expected(tmp_path, shape, chunk, problem):
    """Zeros are packed to nearly nothing."""
    tree = {"a": np.zeros(3, np.float32)}
    trees.save_tree(tmp_path / "tree", tree)
    base = {"driver": "file", "path": f"{tmp_path}/tree/"}
    tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": "a/"},
            "metadata": {"shape": [shape], "chunks": [chunk], "dtype": "<f4"},
        },
        create=True,
        delete_existing=True,
    ).result()
    with pytest.raises(CheckpointError, match=problem):
        trees.load_tree(tmp_path / "tree", tree)
