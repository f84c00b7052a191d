"""Checkpoints with Orbax: of a run, to go on from, and of a model, to give away.

Both have one layout, so that one reader does: a folder with the items `params`, `metadata`
(the configuration and what it takes to recognise the file) and, in a run, `ema` and
`optimizer`. A run keeps such folders as `checkpoints/<step>`. Orbax writes to a temporary name
and renames, so that a folder that has its name is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffpose_jax import config as config_lib
from diffpose_jax import model as model_lib
from diffpose_jax import training
from diffpose_jax.skeleton import H36M_JOINTS

FORMAT = "diffpose_jax checkpoint 1"

_PARAMS, _EMA, _OPTIMIZER, _METADATA = "params", "ema", "optimizer", "metadata"
_ITEM_OF_WEIGHTS = {"raw": _PARAMS, "ema": _EMA}


class CheckpointError(ValueError):
    """A checkpoint is missing, foreign or does not fit; the message names the folder."""


class RunCheckpoints:
    """The checkpoints of one training run, a context manager.

    Saving goes on in the background; leaving the context waits for it.
    """

    def __init__(self, directory: Path, config: ml_collections.ConfigDict, keep: int) -> None:
        self._metadata = _metadata(config)
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=(_PARAMS, _EMA, _OPTIMIZER, _METADATA),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: training.TrainState) -> None:
        """Saves a state under its step; a step that is there already is left as it is."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {
            _PARAMS: ocp.args.StandardSave(state.params),
            _OPTIMIZER: ocp.args.StandardSave(_optimizer_item(state)),
            _METADATA: ocp.args.JsonSave(self._metadata),
        }
        if state.ema is not None:
            items[_EMA] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore_latest(self, state: training.TrainState) -> training.TrainState | None:
        """The newest saved state, None if there is none.

        Args:
          state: a state of the same shapes, such as that before the first step.

        Raises:
          CheckpointError: if the newest checkpoint was written under another configuration.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        folder = self._directory / str(step)
        saved = _read_metadata(folder)
        _check_same(saved["config"], self._metadata["config"], self._directory)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items: dict[str, Any] = {
            _PARAMS: ocp.args.StandardRestore(abstract.params),
            _OPTIMIZER: ocp.args.StandardRestore(_optimizer_item(abstract)),
        }
        if state.ema is not None:
            items[_EMA] = ocp.args.StandardRestore(abstract.ema)
        restored = _read(folder, items)
        return training.TrainState(
            step=restored[_OPTIMIZER]["step"],
            params=restored[_PARAMS],
            ema=restored[_EMA] if state.ema is not None else None,
            opt_state=restored[_OPTIMIZER]["state"],
            loss_scale=restored[_OPTIMIZER].get("loss_scale"),
        )


def _optimizer_item(state: training.TrainState) -> dict[str, Any]:
    item = {"step": state.step, "state": state.opt_state}
    return item if state.loss_scale is None else item | {"loss_scale": state.loss_scale}


def load(checkpoint: str | Path, weights: str | None = None) -> model_lib.Model:
    """Reads a model, ready to sample.

    Args:
      checkpoint: a run's folder, its `checkpoints` or one step in it, or an export.
      weights: "raw" or "ema"; by default what `config.evaluation.weights` says. An export
        holds the one set that it was made from.

    Raises:
      CheckpointError: if there is no checkpoint, or not one of this package or version.
    """
    folder = _find(Path(checkpoint))
    metadata = _read_metadata(folder)
    config = ml_collections.ConfigDict(metadata["config"])
    network = config_lib.call(model_lib.build, config.model, f"{folder}: config.model")
    weights = weights or config.evaluation.weights
    if weights not in _ITEM_OF_WEIGHTS:
        raise CheckpointError(f"{folder}: weights must be raw or ema, not {weights!r}")
    item = _ITEM_OF_WEIGHTS[weights] if (folder / _OPTIMIZER).is_dir() else _PARAMS
    if not (folder / item).is_dir():
        raise CheckpointError(f"{folder} holds no {weights} weights")
    params = _read(folder, {item: ocp.args.StandardRestore()})[item]
    _check_shapes(params, jax.eval_shape(network.init, jax.random.key(0)), folder)
    return model_lib.Model(network=network, params=jax.device_put(params), config=config)


def export(model: model_lib.Model, directory: str | Path) -> None:
    """Writes parameters and configuration as a small checkpoint that `load` reads.

    Raises:
      CheckpointError: if the folder is there already.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise CheckpointError(f"{directory} is there already: choose another or remove it")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            directory,
            args=ocp.args.Composite(
                **{
                    _PARAMS: ocp.args.StandardSave(model.params),
                    _METADATA: ocp.args.JsonSave(_metadata(model.config)),
                }
            ),
        )


def save_tree(directory: str | Path, tree: dict[str, Any]) -> None:
    """Writes a nested dictionary of arrays, in place of what was there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), tree, force=True)


def load_tree(directory: str | Path) -> dict[str, Any]:
    """Reads what `save_tree` wrote.

    Raises:
      CheckpointError: if it cannot be read.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(directory).absolute())
    except Exception as error:  # as in `_read`
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: cannot be read: {reason}") from error


def _metadata(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return {"format": FORMAT, "joint_names": list(H36M_JOINTS), "config": config.to_dict()}


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata = _read(folder, {_METADATA: ocp.args.JsonRestore()})[_METADATA]
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder} is not a '{FORMAT}', its format is {found!r}")
    return metadata


def _find(path: Path) -> Path:
    """The folder with the items, from the folder that a user names."""
    for base in (path / "checkpoints", path):
        if (base / _METADATA).is_dir():
            return base
        steps = [p for p in base.glob("[0-9]*") if p.name.isdigit() and (p / _METADATA).is_dir()]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    what = "is not a checkpoint, nor a folder with one" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {what}; name a training run's folder (runs/NAME) or an exported checkpoint"
    )


def _read(folder: Path, items: dict[str, Any]) -> Any:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**items))
    except Exception as error:  # for a damaged array Orbax raises a bare one
        names, reason = ", ".join(items), str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot read {names}: {reason}") from error


def _check_same(saved: dict[str, Any], current: dict[str, Any], directory: Path) -> None:
    """Checks that a run goes on under the configuration that it began with."""
    differing = sorted(
        name
        for name in {**_flat(saved), **_flat(current)}
        if _flat(saved).get(name) != _flat(current).get(name) and name.split(".")[0] != "evaluation"
    )
    if differing:
        fields = ", ".join(f"config.{name}" for name in differing)
        raise CheckpointError(
            f"{directory} was begun with another configuration ({fields} differ): choose another"
            " --workdir, or remove this one to start afresh"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _check_shapes(params: Any, expected: Any, folder: Path) -> None:
    """Checks a restored tree against the one that the configuration builds."""
    found, wanted = (
        {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, expected))
    )
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder}: parameter {name} has shape {found.get(name, 'none, it is missing')},"
                f" its configuration wants {wanted.get(name, 'no such parameter')}"
            )
