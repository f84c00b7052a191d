"""The input pipeline: prepared data sets to batches for training and evaluation."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer, Key, Shaped
from tqdm import tqdm

from diffpose_jax import distributed
from diffpose_jax.config import ConfigError, DataConfig
from diffpose_jax.data import cameras, human36m, motion, prepared, simulator
from diffpose_jax.method.heatmaps import MAPS_SHAPE, PredrawnCandidates
from diffpose_jax.method.network import DiffPose
from diffpose_jax.training.step import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split of a data set.

    Attributes:
      pose_mm: the truth, hip-centred, in the axes that `config.data.axes` says, with y up.
      clips: the recording that each example is from.
      names: a name for each example.
      heatmaps: rows (n,) -> heatmaps (n, 16, 64, 64) float32, from any thread.
      groups: {name: (N,)}, what results can be told apart by, such as the action.
      counted: the frames that the evaluation's protocol counts; None for all.
      ambiguous: the data set's own list of ambiguous frames; None without one.
      fingerprint: of the whole data set that the split is from, see `prepared.fingerprint`.
    """

    pose_mm: Float[np.ndarray, "N 17 3"]
    clips: Shaped[np.ndarray, " N"]
    names: Shaped[np.ndarray, " N"]
    heatmaps: Callable[[np.ndarray], np.ndarray]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counted: Bool[np.ndarray, " N"] | None = None
    ambiguous: Bool[np.ndarray, " N"] | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pose_mm)

    def select(self, rows: Integer[np.ndarray, " n"]) -> Examples:
        """The examples of some rows, in their order."""
        return Examples(
            pose_mm=self.pose_mm[rows],
            clips=self.clips[rows],
            names=self.names[rows],
            heatmaps=lambda some: self.heatmaps(rows[some]),
            groups={name: column[rows] for name, column in self.groups.items()},
            counted=None if self.counted is None else self.counted[rows],
            ambiguous=None if self.ambiguous is None else self.ambiguous[rows],
            fingerprint=self.fingerprint,
        )

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Rows in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield np.arange(start, min(start + batch_size, len(self)))


def load(config: DataConfig, split: str, data_dir: str | Path | None = None) -> Examples:
    """Reads a split; "motion" is prepared first if it is not there, the others must be there.

    Args:
      config: which data set.
      split: "train" or "test".
      data_dir: where prepared data sets lie; by default where TFDS keeps them.

    Raises:
      ConfigError: for a configuration or source that the data set does not take, or a data set that
        is not prepared or damaged, or holds poses that are not finite.
    """
    loaders = {
        "motion": _load_motion,
        "human36m": _load_human36m,
        "mpi_inf_3dhp": _load_mpi_inf_3dhp,
    }
    try:
        examples = loaders[config.name](config, split, data_dir)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error
    # Of the truth only: heatmaps are read when they are needed, and a step tells of theirs.
    wrong = examples.names[~np.isfinite(examples.pose_mm).all(axis=(1, 2))]
    if len(wrong):
        raise ConfigError(
            f"config.data: poses of {config.name}'s {split} split are not finite, that of"
            f" {str(wrong[0])!r} is the first of {len(wrong)}; mend the source and prepare it again"
        )
    return examples


def as_recorded(config: DataConfig) -> DataConfig:
    """The same recordings without the poses that a training makes up of them, seen less often."""
    if config.name != "motion":
        return config
    body = {**config.builder.get("body", {}), "exchange": 0.0, "bend_std_degrees": 0.0}
    views = min(int(config.builder.get("train_views_per_frame", 4)), 4)
    builder = {**config.builder, "body": body, "train_views_per_frame": views}
    return dataclasses.replace(config, builder=builder)


def hold_out(examples: Examples, share: float) -> tuple[Examples, Examples | None]:
    """Keeps whole recordings out of the training, to calibrate on.

    Args:
      examples: a training split.
      share: about this share of the examples, from recordings chosen by a hash of their names;
        0 for none.

    Returns:
      The examples to train on, and those held out (None if there are none).

    Raises:
      ConfigError: if no recording is small enough.
    """
    if share == 0:
        return examples, None
    clips, sizes = np.unique(examples.clips, return_counts=True)
    chosen, room = [], share * len(examples)
    for clip in sorted(range(len(clips)), key=lambda i: zlib.crc32(str(clips[i]).encode())):
        if sizes[clip] <= room:
            chosen.append(clips[clip])
            room -= sizes[clip]
    is_chosen = np.isin(examples.clips, chosen)
    if not chosen:
        raise ConfigError(
            f"config.data.calibration_share = {share}: no recording is as small as that; give more,"
            " or 0 to leave the radius uncalibrated"
        )
    train, held_out = (examples.select(np.flatnonzero(m)) for m in (~is_chosen, is_chosen))
    return train, held_out


def _load_motion(config: DataConfig, split: str, data_dir: str | Path | None) -> Examples:
    builder = motion.prepare(config.builder, data_dir)
    columns = motion.read_all(builder, split)
    blobs, pose_mm = columns["blobs"], columns["pose_mm"]
    if config.axes == "crop":
        turns = cameras.turns_to(columns["ray"])
        pose_mm = (pose_mm @ turns.swapaxes(1, 2)).astype(np.float32)
    return Examples(
        pose_mm=pose_mm,
        clips=columns["clip"],
        names=_joined(columns["clip"], columns["frame"]),
        heatmaps=lambda rows: np.asarray(simulator.render(blobs[rows])),
        groups={"clip": columns["clip"]},
        fingerprint=prepared.fingerprint(builder.data_dir),
    )


def _load_human36m(config: DataConfig, split: str, data_dir: str | Path | None) -> Examples:
    folder = prepared.find(data_dir, config.name, config.prepared)
    columns, heatmaps = prepared.read(folder, split)
    counted = None
    if split == "test" and config.test_frames == "every_64th_frame":
        counted = human36m.every_64th_frame(columns["frame"])
    elif split == "test" and config.test_frames == "every_16th_row":
        counted = human36m.every_16th_row(columns["row"])
    clips = _joined(*(columns[key] for key in ("subject", "action", "subaction", "camera")))
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=clips,
        names=_joined(clips, columns["frame"]),
        heatmaps=heatmaps,
        groups={key: columns[key] for key in ("subject", "action", "camera")},
        counted=counted,
        ambiguous=columns["ambiguous"] if columns["ambiguous"].any() else None,
        fingerprint=prepared.fingerprint(folder),
    )


def _load_mpi_inf_3dhp(config: DataConfig, split: str, data_dir: str | Path | None) -> Examples:
    folder = prepared.find(data_dir, config.name, config.prepared)
    columns, heatmaps = prepared.read(folder, split)
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=columns["subject"],
        names=_joined(columns["subject"], columns["frame"]),
        heatmaps=heatmaps,
        groups={key: columns[key] for key in ("subject", "scene")},
        fingerprint=prepared.fingerprint(folder),
    )


def _joined(*columns: np.ndarray) -> np.ndarray:
    """Names (N,) from columns (N,): "S9 Waiting 1 54138969"."""
    return functools.reduce(
        lambda a, b: np.char.add(np.char.add(a, " "), b), (c.astype(str) for c in columns)
    )


@flax.struct.dataclass
class Selection:
    """Which examples steps take.

    Attributes:
      rows: rows of the data set.
      offsets: where among its predrawn candidates each begins.
    """

    rows: Integer[Array | np.ndarray, "*shape"]
    offsets: Integer[Array | np.ndarray, "*shape"]


@flax.struct.dataclass
class TrainingArrays:
    """A training split as arrays, on the host or, as an argument of a dispatch, on devices.

    Attributes:
      pose_mm: the true poses.
      inputs: all heatmaps (N, 16, 64, 64) float16, or candidates that were drawn ahead.
    """

    pose_mm: Float[Array | np.ndarray, "N 17 3"]
    inputs: Float[Array | np.ndarray, "N J H W"] | PredrawnCandidates

    def batch(self, selection: Selection) -> Batch:
        """The examples of a selection."""
        if isinstance(self.inputs, PredrawnCandidates):
            inputs: Any = self.inputs.take(selection.rows, selection.offsets)
        else:
            inputs = self.inputs[selection.rows]
        return Batch(inputs, self.pose_mm[selection.rows])


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Batches of shuffled examples as a pure function of the step, so that a run can resume.

    Attributes:
      examples: the training split.
      arrays: the same in memory; None to read heatmaps when a step needs them.
      seed: seed of the order and of the offsets among predrawn candidates.
    """

    examples: Examples
    arrays: TrainingArrays | None
    seed: int

    def select(self, step: int, num_steps: int, batch_size: int) -> Selection:
        """Which examples the steps after `step` take, (num_steps, batch_size)."""
        positions = np.arange(step * batch_size, (step + num_steps) * batch_size)
        epochs, in_epoch = np.divmod(positions, len(self.examples))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            order = _order(self.seed, epoch, len(self.examples))
            rows[epochs == epoch] = order[in_epoch[epochs == epoch]]
        offsets = np.random.default_rng([self.seed, 1, step]).integers(0, 1 << 16, len(rows))
        shape = (num_steps, batch_size)
        return Selection(*(x.reshape(shape).astype(np.int32) for x in (rows, offsets)))

    def batch(self, selection: Selection) -> Batch:
        """The examples of a selection (steps, B), on the host."""
        if self.arrays is not None:
            return self.arrays.batch(selection)
        rows = cast(np.ndarray, selection.rows)
        maps = self.examples.heatmaps(rows.reshape(-1)).reshape(*rows.shape, *MAPS_SHAPE)
        return Batch(maps, self.examples.pose_mm[rows])

    def dispatches(
        self,
        first: int,
        last: int,
        num_steps: int,
        batch_size: int,
        *,
        images: slice = slice(None),
        selections: bool = False,
    ) -> Iterator[Batch | Selection]:
        """Batches of all steps from `first` to `last`, each made while the one before is used.

        Args:
          first: step that the first of them begins after.
          last: step that the last of them ends with.
          num_steps: steps of each.
          batch_size: images a step.
          images: which of these to read, see `distributed.images_of_process`.
          selections: give the selections alone, for devices that hold the data.
        """

        def make(step: int) -> Batch | Selection:
            selection = self.select(step, num_steps, batch_size)
            selection = Selection(selection.rows[:, images], selection.offsets[:, images])
            return selection if selections else self.batch(selection)

        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead: Future[Batch | Selection] | None = None
            for start in range(first, last, num_steps):
                batch, ahead = ahead, worker.submit(make, start)
                if batch is not None:
                    yield batch.result()
            if ahead is not None:
                yield ahead.result()


def training_data(
    examples: Examples, network: DiffPose, config: DataConfig, key: Key[Array, ""], seed: int
) -> TrainingData:
    """Makes what the training steps read of a training split, as the configuration says.

    Args:
      examples: the training split.
      network: says how many candidates a step takes and whether the argmax is one.
      config: `predrawn_candidates` and `on_device`.
      key: a random key, of candidates drawn ahead.
      seed: seed of the order.

    Raises:
      ConfigError: if the network cannot take candidates drawn ahead, or not so few.
    """
    number, sampler = config.predrawn_candidates, network.sampler
    if number == 0:
        inputs = _all_heatmaps(examples) if config.on_device else None
    elif sampler is None:
        raise ConfigError(
            "config.data.predrawn_candidates must be 0: the encoder reads the heatmaps themselves"
        )
    elif number < sampler.num_candidates - sampler.include_argmax:
        raise ConfigError(
            f"config.data.predrawn_candidates = {number} is less than the candidates that a step"
            f" takes (config.model.num_candidates = {sampler.num_candidates}); give more, or 0 to"
            " draw in every step"
        )
    else:
        parts = [
            jax.device_get(
                sampler.draw_ahead(key, rows, jnp.asarray(examples.heatmaps(rows)), number)
            )
            for rows in _progress(examples, "drawing candidates")
        ]
        inputs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    arrays = None if inputs is None else TrainingArrays(examples.pose_mm, inputs)
    return TrainingData(examples, arrays, seed)


def _all_heatmaps(examples: Examples) -> Float[np.ndarray, "N J H W"]:
    heatmaps = np.empty((len(examples), *MAPS_SHAPE), np.float16)
    for rows in _progress(examples, "reading heatmaps"):
        heatmaps[rows] = examples.heatmaps(rows)
    return heatmaps


def _progress(examples: Examples, what: str) -> Iterator[np.ndarray]:
    """Rows of all examples, 32 at a time, with a bar."""
    hidden = not distributed.is_first()
    with tqdm(total=len(examples), desc=what, unit=" images", disable=hidden) as bar:
        for rows in examples.batches(32):
            yield rows
            bar.update(len(rows))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(num_examples)
