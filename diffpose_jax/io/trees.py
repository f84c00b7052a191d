"""Nested dictionaries of arrays on disk, with Orbax, and what their files are checked for.

Orbax writes to a temporary name and renames: no half-written folder has the name of a whole one.
But it has no check sums of the arrays' bytes, so that a flipped bit of a weight comes back as
another weight: `array_sums` are for the caller to store and to compare. And a few bytes can stand
for a large array of zeros, so that names, shapes and chunks are compared before anything is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_MOST_NAMED = 10


class CheckpointError(ValueError):
    """A checkpoint is missing, foreign or does not fit; the message names the folder."""


class DamagedError(CheckpointError):
    """A file of a checkpoint cannot be read, or its content is not what was written."""


def check_new(directory: Path) -> None:
    """Raises CheckpointError if there is something already."""
    if directory.exists():
        raise CheckpointError(f"{directory} is there already: choose another or remove it")


def save_tree(directory: str | Path, tree: dict[str, Any]) -> None:
    """Writes a nested dictionary of arrays, in place of what was there."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(directory).absolute(), args=ocp.args.PyTreeSave(tree), force=True)


def load_tree(directory: str | Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Reads what `save_tree` wrote, see `read_trees`."""
    directory = Path(directory)
    return read_trees(directory.parent, {directory.name: expected})[directory.name]


def read_trees(folder: Path, expected: dict[str, Any]) -> Mapping[str, Any]:
    """Reads items of a checkpoint, each of the structure and shapes of an expected tree.

    Raises:
      DamagedError: if an item cannot be read, or its arrays have other names or shapes.
    """
    for item, tree in expected.items():
        _check_stored(folder, item, tree)
    items = {
        item: ocp.args.PyTreeRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        for item, tree in expected.items()
    }
    return restore(folder, items)


def restore(folder: Path, items: dict[str, Any]) -> Mapping[str, Any]:
    """Reads items of a checkpoint by their Orbax arguments, in this process alone."""
    try:
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone())
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone()) as checkpointer:
            return dict(
                checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**items)).items()
            )
    except Exception as error:  # for a damaged array Orbax raises a bare one
        raise _unreadable(folder, ", ".join(items), error) from error


def alone() -> ocp.options.MultiprocessingOptions:
    """For Orbax not to wait for other processes, which do not save, or read for themselves."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def misfits(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with arrays by their names and the shapes wanted; empty if nothing is."""
    problems = [
        f"{name:.100} is {np.shape(found[name])}, not {shape}"
        for name, shape in wanted.items()
        if name in found and np.shape(found[name]) != shape
    ]
    problems += [f"{name:.100} is missing" for name in wanted if name not in found]
    problems += [f"{name:.100} is unknown" for name in found if name not in wanted]
    more = len(problems) - _MOST_NAMED
    return "; ".join(problems[:_MOST_NAMED] + [f"and {more} more"] * (more > 0))


def array_sums(tree: Any) -> dict[str, int]:
    """CRC-32 of the bytes of each array, by its path in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): zlib.crc32(np.asarray(x).tobytes()) for path, x in leaves}


def check_sum(tree: Any) -> int:
    """CRC-32 of all arrays of a tree and of their names."""
    return json_sum(array_sums(tree))


def json_sum(content: Any) -> int:
    """CRC-32 of what JSON can hold."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_sums(folder: Path, trees: Mapping[str, Any], written: dict[str, dict[str, int]]) -> None:
    """Raises DamagedError if what was read has other `array_sums` than those that were written."""
    for item, tree in trees.items():
        expected = written.get(item, {})
        found = array_sums(tree) if expected else {}
        wrong = [name for name in found | expected if found.get(name) != expected.get(name)]
        if wrong:
            raise DamagedError(
                f"{folder}: {item} is damaged: {wrong[0]} is not what was written ({len(wrong)} of"
                f" {len(expected)} arrays have another check sum)"
            )


def _check_stored(folder: Path, item: str, expected: Any) -> None:
    """Compares names, shapes and chunks of an item's arrays without reading them."""
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            stored = _by_name(handler.metadata((folder / item).absolute()).tree)
    except Exception as error:  # as in `restore`
        raise _unreadable(folder, item, error) from error
    wanted = {name: np.shape(leaf) for name, leaf in _by_name(expected).items()}
    if problems := misfits(stored, wanted):
        raise DamagedError(f"{folder}: {item} do not fit: {problems}")
    for name, array in stored.items():
        chunk = (array.storage and array.storage.chunk_shape) or ()
        if math.prod(chunk) > max(1, math.prod(array.shape)):
            raise DamagedError(f"{folder}: {item} is damaged: {name} has chunks larger than itself")


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unreadable(folder: Path, what: str, error: Exception) -> DamagedError:
    reason = str(error).partition("\n")[0][:500]
    return DamagedError(f"{folder}: cannot read {what}: {reason}")
