"""Checkpoints with Orbax: of a run, to go on from, and of a model, to give away.

Both have one layout, so that one reader does: a folder with the items `params`, `metadata`
(the configuration and what it takes to recognise the file) and, in a run, `ema` and
`optimizer`. A run keeps such folders as `checkpoints/<step>`.

Beside the items, or in the run's folder, may lie `prediction_errors.npz`, which some solvers need.

`metadata` also holds check sums of each array and of itself, which are compared whenever something
is read (`io.trees` says why).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffpose_jax import config as config_lib
from diffpose_jax import distributed
from diffpose_jax.config import Config, ConfigError
from diffpose_jax.io import arrays, trees
from diffpose_jax.io.trees import CheckpointError, DamagedError
from diffpose_jax.method import network as network_lib
from diffpose_jax.method.network import DiffPose, Params
from diffpose_jax.method.pose_vector import POSE_SIZE
from diffpose_jax.method.sampling import ERRORS, PredictionErrors
from diffpose_jax.skeleton import H36M_JOINTS
from diffpose_jax.training.loop import NonFiniteLossError
from diffpose_jax.training.step import TrainState

FORMAT = "diffpose_jax checkpoint 1"

_PARAMS, _EMA, _OPTIMIZER, _METADATA = "params", "ema", "optimizer", "metadata"
_LONG = 200  # characters
_OWN_SUM = "metadata_crc32"
_ITEM_OF_WEIGHTS = {"raw": _PARAMS, "ema": _EMA}


class RunCheckpoints:
    """The checkpoints of one training run, a context manager.

    Saving goes on in the background; leaving the context waits for it. An error there is raised by
    the next `save`, or when the context is left. All of several processes call this; the first
    one alone writes and reads, and gives the others what it read.
    """

    def __init__(self, directory: Path, config: Config, keep: int) -> None:
        self._config = config
        self._data_fingerprint = ""
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        self._manager: Any = distributed.is_first() and ocp.CheckpointManager(
            directory.absolute(),
            item_names=(_PARAMS, _EMA, _OPTIMIZER, _METADATA),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                create=False,  # it cannot, alone
                multiprocessing_options=trees.alone(),
            ),
        )

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            try:
                if self._manager:
                    self._manager.wait_until_finished()
            finally:
                if self._manager:
                    self._manager.close()
        except Exception as error:
            if kind is not None and issubclass(kind, Exception):
                logging.error("%s", self._not_saved(error))  # beside the error that comes first
            else:
                raise self._not_saved(error) from error
        if kind is None:
            distributed.barrier("saved")

    def save(self, state: TrainState) -> None:
        """Saves a state under its step; a step that is there already is left as it is.

        Raises:
          NonFiniteLossError: if a number in it is not finite; it is not saved.
          CheckpointError: if it, or the state before, could not be written, as on a full disk.
        """
        step = int(state.step)
        if not self._manager or step in self._manager.all_steps():
            return
        state = jax.device_get(state)
        written = {_PARAMS: state.params, _OPTIMIZER: _optimizer_item(state)}
        if state.ema is not None:
            written[_EMA] = state.ema
        for item in (_PARAMS, _EMA):
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(written.get(item))):
                raise NonFiniteLossError(step, f"update of the {item}", float("nan"))
        metadata = _metadata(self._config, self._data_fingerprint, written)
        items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in written.items()}
        items[_METADATA] = ocp.args.JsonSave(metadata)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of the files, by way of Orbax: of many classes
            raise self._not_saved(error) from error

    def _not_saved(self, error: Exception) -> CheckpointError:
        reason = str(error).partition("\n")[0]
        if len(reason) > _LONG:  # of many layers, the last of which says what it was
            reason = f"..{reason[-_LONG:]}"
        return CheckpointError(
            f"{self._directory}: a checkpoint could not be written: {reason}. Those before it are"
            " kept; mend this, and the same command goes on from the newest of them"
        )

    def wait(self) -> None:
        """Waits, in all processes, until what was saved is on the disk."""
        if self._manager:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._not_saved(error) from error
        distributed.barrier("saved")

    def restore_latest(self, state: TrainState) -> TrainState | None:
        """The newest saved state, None if there is none.

        A damaged checkpoint is put aside, as `<step>.damaged`, and the one before it is taken.

        Args:
          state: a state of the same shapes, such as that before the first step.

        Raises:
          CheckpointError: if the newest checkpoint was written under another configuration, or all
            of them are damaged.
        """
        found = self._restore_latest(state) if self._manager else None
        sent = np.bool_(found is not None), found or state
        is_found, found = distributed.broadcast_from_first(sent)
        return found if is_found else None

    def _restore_latest(self, state: TrainState) -> TrainState | None:
        damaged: dict[int, DamagedError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(self._directory / str(step), state)
            except DamagedError as error:
                damaged[step] = error
                continue
            for step_aside, why in damaged.items():
                folder = self._directory / str(step_aside)
                folder.rename(_unused(folder.with_name(f"{step_aside}.damaged")))
                logging.warning("%s. It is put aside; going on from step %d", why, step)
            self._manager.reload()
            # A process that is killed after its last checkpoint leaves one too many.
            for step_too_many in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(step_too_many)
            return restored
        if damaged:
            reasons = "; ".join(map(str, damaged.values()))
            raise CheckpointError(
                f"{self._directory} has no checkpoint that is whole: {reasons}. Remove the run's"
                " folder to start afresh"
            )
        return None

    def _restore(self, folder: Path, state: TrainState) -> TrainState:
        saved = _read_metadata(folder)
        _check_same(_config_of(folder, saved), self._config, self._directory)
        self._data_fingerprint = saved.get("data_fingerprint", "")
        expected = {_PARAMS: state.params, _OPTIMIZER: _optimizer_item(state)}
        if state.ema is not None:
            expected[_EMA] = state.ema
        restored = trees.read_trees(folder, expected)
        trees.check_sums(folder, restored, saved.get("crc32", {}))
        return TrainState(
            step=restored[_OPTIMIZER]["step"],
            params=restored[_PARAMS],
            ema=restored[_EMA] if state.ema is not None else None,
            opt_state=restored[_OPTIMIZER]["state"],
            loss_scale=restored[_OPTIMIZER].get("loss_scale"),
        )

    def trains_on(self, data_fingerprint: str) -> None:
        """Says which data the run trains on, for the checkpoints to hold.

        Raises:
          CheckpointError: if the state that was restored was trained on other data.
        """
        if self._data_fingerprint not in ("", data_fingerprint):
            raise CheckpointError(
                f"{self._directory} was begun with other data (its fingerprint was"
                f" {self._data_fingerprint}, it is {data_fingerprint} now): prepare the data set as"
                " it was, or choose another --workdir"
            )
        self._data_fingerprint = data_fingerprint


def _unused(path: Path) -> Path:
    """The path, or if something is there already, one with a number."""
    candidates = [path, *(path.with_name(f"{path.name}_{number}") for number in range(2, 100))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    item = {"step": state.step, "state": state.opt_state}
    return item if state.loss_scale is None else item | {"loss_scale": state.loss_scale}


class Loaded(NamedTuple):
    """What a checkpoint holds of a model: the fields of `inference.Model`."""

    network: DiffPose
    params: Params
    config: Config
    data_fingerprint: str
    errors: PredictionErrors | None


def load(checkpoint: str | Path, weights: str | None = None) -> Loaded:
    """Reads a model; see `inference.load`."""
    folder = find(Path(checkpoint))
    metadata = _read_metadata(folder)
    config = _config_of(folder, metadata)
    network = network_lib.build(config.model)
    weights = weights or config.evaluation.weights
    if weights not in _ITEM_OF_WEIGHTS:
        raise CheckpointError(f"{folder}: weights must be raw or ema, not {weights!r}")
    item = _ITEM_OF_WEIGHTS[weights] if (folder / _OPTIMIZER).is_dir() else _PARAMS
    if not (folder / item).is_dir():
        raise CheckpointError(f"{folder} holds no {weights} weights")
    expected = jax.eval_shape(network.init, jax.random.key(0))
    stored = trees.read_trees(folder, {item: expected})[item]
    params = jax.tree.map(np.float32, stored)  # an export may hold float16
    trees.check_sums(folder, {item: params}, metadata.get("crc32", {}))
    errors = find_errors((folder, *folder.absolute().parents[:2]), network, params)
    fingerprint = metadata.get("data_fingerprint", "")
    return Loaded(network, jax.device_put(params), config, fingerprint, errors)


def write_errors(folder: Path, errors: PredictionErrors, params: Params) -> None:
    """Writes what was measured of a model with these parameters."""
    about = {"parameters": trees.check_sum(params), "noise": dict(errors.noise)}
    arrays.write_tree(folder / ERRORS, serialization.to_state_dict(errors), about)


def find_errors(
    folders: Sequence[Path], network: DiffPose, params: Params
) -> PredictionErrors | None:
    """Reads what was measured of a model with these parameters, from the first folder that has it.

    Raises:
      CheckpointError: if a file is damaged, or of a network with other times.
    """
    steps = network.schedule.num_steps
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "variance"), (POSE_SIZE,))
    shapes |= dict.fromkeys(("error", "cross", "residual"), (steps, POSE_SIZE, POSE_SIZE))
    for path in (folder / ERRORS for folder in folders):
        if not path.is_file():
            continue
        try:
            tree, about = arrays.read_tree(path)
            if wrong := trees.misfits(tree, shapes):
                raise ValueError(wrong)
            if not all(np.isfinite(array).all() for array in tree.values()):
                raise ValueError("it holds numbers that are not finite")
            if about.get("parameters") == trees.check_sum(params):
                noise = {str(name): float(x) for name, x in about.get("noise", {}).items()}
                if not all(0 <= factor < 1e6 for factor in noise.values()):
                    raise ValueError("a factor of the noise is no factor")
                return PredictionErrors(**tree, noise=noise)
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
    return None


def export(
    directory: str | Path,
    params: Params,
    config: Config,
    data_fingerprint: str = "",
    errors: PredictionErrors | None = None,
    half: bool = False,
) -> None:
    """Writes a model without the optimizer; see `inference.export`."""
    directory = Path(directory).absolute()
    trees.check_new(directory)
    stored = jax.device_get(params)
    if half:
        stored = jax.tree.map(np.float16, stored)
        params = jax.tree.map(np.float32, stored)  # as they are read
    items = {
        _PARAMS: ocp.args.PyTreeSave(stored),
        _METADATA: ocp.args.JsonSave(_metadata(config, data_fingerprint, {_PARAMS: params})),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.Composite(**items))
    if errors is not None:
        write_errors(directory, errors, params)


def _metadata(config: Config, data_fingerprint: str, written: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "format": FORMAT,
        **_poses(config.model.pose_scale),
        "data_fingerprint": data_fingerprint,
        "config": dataclasses.asdict(config),
        "crc32": {item: trees.array_sums(tree) for item, tree in written.items()},
    }
    return metadata | {_OWN_SUM: trees.json_sum(metadata)}


def _poses(pose_scale: float) -> dict[str, Any]:
    """What a checkpoint says of its poses."""
    return {"joint_names": list(H36M_JOINTS), "pose_unit": "mm", "pose_scale": pose_scale}


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata = trees.restore(folder, {_METADATA: ocp.args.JsonRestore()})[_METADATA]
    found = metadata.get("format") if isinstance(metadata, dict) else None
    own_sum = metadata.pop(_OWN_SUM, None) if found is not None else None
    is_whole = own_sum in (None, trees.json_sum(metadata))
    kind = CheckpointError if is_whole else DamagedError
    if found != FORMAT:
        raise kind(f"{folder} is not a '{FORMAT}', its format is {str(found)[:100]!r}")
    try:
        pose_scale = metadata["config"]["model"]["pose_scale"]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{folder}: {_METADATA} holds no configuration") from error
    for name, expected in _poses(pose_scale).items():
        if metadata.get(name, expected) != expected:
            raise kind(
                f"{folder}: its poses are others: {name} is {str(metadata[name])[:500]}, not"
                f" {expected}"
            )
    if not is_whole:
        raise DamagedError(f"{folder}: {_METADATA} is damaged: its check sum is another")
    return metadata


def find(path: Path) -> Path:
    """The folder with the items, from the folder that a user names.

    Raises:
      CheckpointError: if there is none.
    """
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


def _config_of(folder: Path, metadata: dict[str, Any]) -> Config:
    try:
        return config_lib.from_dict(metadata["config"])
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its configuration does not fit: {error}") from error


def _check_same(saved: Config, current: Config, directory: Path) -> None:
    """Checks that a run goes on under the configuration that it began with."""
    before, now = config_lib.flat(saved), config_lib.flat(current)
    differing = sorted(
        f"config.{name}"
        for name in before | now
        if before.get(name) != now.get(name) and not name.startswith("evaluation.")
    )
    if differing:
        raise CheckpointError(
            f"{directory} was begun with another configuration ({', '.join(differing)} differ):"
            " choose another --workdir, or remove this one to start afresh"
        )
