"""The input pipeline: prepared data sets to batches for training and evaluation."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from tqdm import tqdm

from diffpose_jax import distributed as devices
from diffpose_jax.config import ConfigError
from diffpose_jax.data import human36m, motion, simulator
from diffpose_jax.data import prepared as detections
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.method.network import DiffPose
from diffpose_jax.method.network import Evidence as ModelEvidence
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS
from diffpose_jax.training.step import Batch

_MAPS = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split of a data set.

    Attributes:
      pose_mm: (N, 17, 3) float32, the truth, hip-centred camera axes with y up.
      clips: (N,), the recording that each example is from.
      names: (N,), a name for each example.
      heatmaps: rows (n,) -> heatmaps (n, 16, 64, 64) float32, from any thread.
      groups: {name: (N,)}, what results can be told apart by, such as the action.
      counted: (N,) bool, the frames that the evaluation's protocol counts; None for all.
      ambiguous: (N,) bool, the data set's own list of ambiguous frames; None without one.
      fingerprint: of the whole data set that the split is from, see `detections.fingerprint`.
    """

    pose_mm: np.ndarray
    clips: np.ndarray
    names: np.ndarray
    heatmaps: Callable[[np.ndarray], np.ndarray]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counted: np.ndarray | None = None
    ambiguous: np.ndarray | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pose_mm)

    def select(self, rows: np.ndarray) -> Examples:
        """The examples of some rows (n,), in their order."""

        def of_rows(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[rows]

        return Examples(
            pose_mm=self.pose_mm[rows],
            clips=self.clips[rows],
            names=self.names[rows],
            heatmaps=lambda some: self.heatmaps(rows[some]),
            groups={name: column[rows] for name, column in self.groups.items()},
            counted=of_rows(self.counted),
            ambiguous=of_rows(self.ambiguous),
            fingerprint=self.fingerprint,
        )

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Rows in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield np.arange(start, min(start + batch_size, len(self)))


def load(
    config: ml_collections.ConfigDict, split: str, data_dir: str | Path | None = None
) -> Examples:
    """Reads a split; "motion" is prepared first if it is not there, the others must be there.

    Args:
      config: `config.data`.
      split: "train" or "test".
      data_dir: where prepared data sets lie; by default where TFDS keeps them.

    Raises:
      ConfigError: for an unknown data set, a configuration or source that it does not take, or a
        data set that is not prepared or damaged, or holds poses that are not finite.
    """
    if config.name not in _LOADERS:
        raise ConfigError(
            f"config.data.name: unknown data set {config.name!r}; known: {', '.join(_LOADERS)}"
        )
    try:
        examples = _LOADERS[config.name](config, split, data_dir)
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


def hold_out(examples: Examples, share: float) -> tuple[Examples, Examples | None]:
    """Keeps whole recordings out of the training, to calibrate on.

    Args:
      examples: a training split.
      share: about this share of the examples, from recordings chosen by a hash of their names;
        0 for none.

    Returns:
      The examples to train on, and those held out (None if there are none).

    Raises:
      ConfigError: if no recording is small enough, or for a share outside of [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"config.data.calibration_share must be in [0, 1), not {share}")
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


def _load_motion(
    config: ml_collections.ConfigDict, split: str, data_dir: str | Path | None
) -> Examples:
    builder = motion.prepare(config.builder, data_dir)
    columns = motion.read_all(builder, split)
    blobs = columns["blobs"]
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=columns["clip"],
        names=_joined(columns["clip"], columns["frame"]),
        heatmaps=lambda rows: simulator.render(blobs[rows]),
        groups={"clip": columns["clip"]},
        fingerprint=detections.fingerprint(builder.data_dir),
    )


def _load_human36m(
    config: ml_collections.ConfigDict, split: str, data_dir: str | Path | None
) -> Examples:
    folder = detections.find(data_dir, config.name, dict(config.prepared))
    columns, heatmaps = detections.read(folder, split)
    frames = {
        "every_64th_frame": lambda: human36m.every_64th_frame(columns["frame"]),
        "every_16th_row": lambda: human36m.every_16th_row(columns["row"]),
        "all": lambda: None,
    }
    if config.test_frames not in frames:
        raise ValueError(
            f"test_frames must be one of {', '.join(frames)}, not {config.test_frames!r}"
        )
    clips = _joined(*(columns[key] for key in ("subject", "action", "subaction", "camera")))
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=clips,
        names=_joined(clips, columns["frame"]),
        heatmaps=heatmaps,
        groups={key: columns[key] for key in ("subject", "action", "camera")},
        counted=frames[config.test_frames]() if split == "test" else None,
        ambiguous=columns["hard"] if columns["hard"].any() else None,
        fingerprint=detections.fingerprint(folder),
    )


def _load_mpi_inf_3dhp(
    config: ml_collections.ConfigDict, split: str, data_dir: str | Path | None
) -> Examples:
    folder = detections.find(data_dir, config.name, dict(config.prepared))
    columns, heatmaps = detections.read(folder, split)
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=columns["subject"],
        names=_joined(columns["subject"], columns["frame"]),
        heatmaps=heatmaps,
        groups={key: columns[key] for key in ("subject", "scene")},
        fingerprint=detections.fingerprint(folder),
    )


_LOADERS = {
    "motion": _load_motion,
    "human36m": _load_human36m,
    "mpi_inf_3dhp": _load_mpi_inf_3dhp,
}


def _joined(*columns: np.ndarray) -> np.ndarray:
    """Names (N,) from columns (N,): "S9 Waiting 1 54138969"."""
    return functools.reduce(
        lambda a, b: np.char.add(np.char.add(a, " "), b), (c.astype(str) for c in columns)
    )


class HeatmapsOnDisk:
    """What the training step draws candidates from: heatmaps, read when a step needs them."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def take(self, rows: Array | np.ndarray, places: Array | np.ndarray) -> np.ndarray:
        """Heatmaps (..., 16, 64, 64) of the rows (...)."""
        del places
        return self._examples.heatmaps(np.asarray(rows).reshape(-1)).reshape(*rows.shape, *_MAPS)


@flax.struct.dataclass
class HeatmapsInMemory:
    """What the training step draws candidates from: all heatmaps.

    Attributes:
      heatmaps: (N, 16, 64, 64) float16.
    """

    heatmaps: Array | np.ndarray

    @classmethod
    def read(cls, examples: Examples) -> HeatmapsInMemory:
        """Reads the heatmaps of all examples."""
        heatmaps = np.empty((len(examples), *_MAPS), np.float16)
        for rows in _progress(examples, "reading heatmaps"):
            heatmaps[rows] = examples.heatmaps(rows)
        return cls(heatmaps)

    def take(self, rows: Array | np.ndarray, places: Array | np.ndarray) -> Array | np.ndarray:
        """Heatmaps (..., 16, 64, 64) of the rows (...)."""
        del places
        return self.heatmaps[rows]


@flax.struct.dataclass
class PredrawnCandidates:
    """Candidates drawn ahead of training, P for each joint.

    Drawing costs more than a small model's whole step. Of P candidates drawn once for each
    joint, a step takes a contiguous part at a random place: 31 of P draws with replacement are
    31 draws with replacement.

    Attributes:
      best: (N, 1, 16), the argmax.
      drawn: (N, P, 16).
      num_taken: how many of the drawn ones a step takes.
      include_argmax: whether the argmax stands before them.
    """

    best: Candidates
    drawn: Candidates
    num_taken: int = flax.struct.field(pytree_node=False)
    include_argmax: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def draw(
        cls, examples: Examples, network: DiffPose, num_drawn: int, key: Array
    ) -> PredrawnCandidates:
        """Draws the candidates.

        Args:
          examples: a split.
          network: tells how many candidates a step takes, and whether the argmax is one.
          num_drawn: P.
          key: a random key.

        Raises:
          ConfigError: if P is smaller than what a step takes.
        """
        num_taken = network.num_candidates - network.include_argmax
        if num_drawn < num_taken:
            raise ConfigError(
                f"config.data.predrawn_candidates = {num_drawn} is less than the {num_taken}"
                " that a step takes; give more, or 0 to draw in every step"
            )
        parts = []
        for rows in _progress(examples, "drawing candidates"):
            maps = jnp.asarray(examples.heatmaps(rows))
            maps = heatmaps_lib.normalise(maps) if network.normalised_likelihood else maps
            parts.append(jax.device_get(_draw(key, rows, maps, num_drawn)))
        best, drawn = (
            jax.tree.map(lambda *x: np.concatenate(x), *part) for part in zip(*parts, strict=True)
        )
        return cls(best, drawn, num_taken, network.include_argmax)

    def take(self, rows: Array | np.ndarray, places: Array | np.ndarray) -> Candidates:
        """Candidates (..., S, 16) of the rows (...), from places (...) of any size on."""
        places = places[..., None] + np.arange(self.num_taken).reshape((1,) * rows.ndim + (-1,))
        places = places % self.drawn.cells.shape[1]
        taken = jax.tree.map(lambda x: x[rows[..., None], places], self.drawn)
        if not self.include_argmax:
            return taken
        best = jax.tree.map(lambda x: x[rows], self.best)
        concatenate = np.concatenate if isinstance(rows, np.ndarray) else jnp.concatenate
        return jax.tree.map(lambda *x: concatenate(x, axis=-2), best, taken)


Evidence = HeatmapsOnDisk | HeatmapsInMemory | PredrawnCandidates


def evidence(
    examples: Examples, network: DiffPose, num_predrawn: int, key: Array, *, in_memory: bool = False
) -> Evidence:
    """What the training step draws candidates from, as `config.data.predrawn_candidates` says.

    Args:
      examples: the training split.
      network: tells how many candidates a step takes and whether the argmax is one.
      num_predrawn: candidates drawn ahead per joint, 0 to draw in every step.
      key: a random key.
      in_memory: whether heatmaps are all read now, or when a step needs them.

    Raises:
      ConfigError: if the network cannot take candidates drawn ahead, or not so few.
    """
    if num_predrawn == 0:
        return HeatmapsInMemory.read(examples) if in_memory else HeatmapsOnDisk(examples)
    if network.reads_heatmaps:
        raise ConfigError(
            "config.data.predrawn_candidates must be 0: the encoder reads the heatmaps themselves"
        )
    return PredrawnCandidates.draw(examples, network, num_predrawn, key)


@functools.partial(jax.jit, static_argnames="num_drawn")
def _draw(
    key: Array, rows: Array, heatmaps: Array, num_drawn: int
) -> tuple[Candidates, Candidates]:
    """Argmax (n, 1, 16) and draws (n, P, 16) in storage types."""

    def draw(row: Array, heatmaps: Array) -> Candidates:
        key_of_row = jax.random.fold_in(key, row)
        return heatmaps_lib.sample(key_of_row, heatmaps, num_drawn + 1, include_argmax=True)

    samples = jax.vmap(draw)(rows, heatmaps)
    stored = Candidates(
        cells=samples.cells.astype(jnp.uint16), likelihood=samples.likelihood.astype(jnp.float16)
    )
    return jax.tree.map(lambda x: x[:, :1], stored), jax.tree.map(lambda x: x[:, 1:], stored)


def _progress(examples: Examples, what: str) -> Iterator[np.ndarray]:
    """Rows of all examples, 32 at a time, with a bar."""
    hidden = not devices.is_first()
    with tqdm(total=len(examples), desc=what, unit=" images", disable=hidden) as bar:
        for rows in examples.batches(32):
            yield rows
            bar.update(len(rows))


@flax.struct.dataclass
class Selection:
    """Which examples steps take.

    Attributes:
      rows: (...) int32, rows of the data set.
      places: (...) int32, where among its predrawn candidates each begins.
    """

    rows: Array | np.ndarray
    places: Array | np.ndarray

    def of_images(self, images: slice) -> Selection:
        """Of some images of each step: (steps, B) -> (steps, some)."""
        return Selection(self.rows[:, images], self.places[:, images])


@flax.struct.dataclass
class HeldData:
    """A training split, on the host or, as the argument of a dispatch, on devices.

    Attributes:
      pose_mm: (N, 17, 3).
      evidence: what candidates come from; arrays, not files, if it is to lie on devices.
    """

    pose_mm: Array | np.ndarray
    evidence: Evidence

    def batch(self, selection: Selection) -> Batch:
        """The examples of a selection."""
        # On the host these are NumPy's arrays, which a dispatch takes as well.
        return Batch(
            evidence=cast(ModelEvidence, self.evidence.take(selection.rows, selection.places)),
            pose_mm=cast(Array, self.pose_mm[selection.rows]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Batches of shuffled examples as a pure function of the step, so that a run can resume.

    Attributes:
      examples: the training split.
      evidence: what candidates come from.
      seed: seed of the order and of the places among predrawn candidates.
    """

    examples: Examples
    evidence: Evidence
    seed: int

    def held(self) -> HeldData:
        """All examples at once."""
        return HeldData(self.examples.pose_mm, self.evidence)

    def selection(self, step: int, num_steps: int, batch_size: int) -> Selection:
        """Which examples the steps after `step` take, (num_steps, batch_size)."""
        positions = np.arange(step * batch_size, (step + num_steps) * batch_size)
        epochs, places = np.divmod(positions, len(self.examples))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = _order(self.seed, epoch, len(self.examples))[
                places[epochs == epoch]
            ]
        rng = np.random.default_rng([self.seed, 1, step])
        places = rng.integers(0, 1 << 16, len(rows))
        shape = (num_steps, batch_size)
        return Selection(
            rows.reshape(shape).astype(np.int32), places.reshape(shape).astype(np.int32)
        )

    def batch(self, step: int, num_steps: int, batch_size: int) -> Batch:
        """Images for the steps after `step`: leading axes (num_steps, batch_size)."""
        return self.held().batch(self.selection(step, num_steps, batch_size))

    def dispatches(
        self,
        first: int,
        last: int,
        num_steps: int,
        batch_size: int,
        *,
        images: slice = slice(None),
        held: bool = False,
    ) -> Iterator[Batch | Selection]:
        """Batches of all steps from `first` to `last`, each made while the one before is used.

        Args:
          first: step that the first of them begins after.
          last: step that the last of them ends with.
          num_steps: steps of each.
          batch_size: images a step.
          images: which of these to read, see `devices.images_of_process`.
          held: make selections, for devices that hold the data.
        """

        def make(*steps: int) -> Batch | Selection:
            selection = self.selection(*steps).of_images(images)
            return selection if held else self.held().batch(selection)

        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead: Future[Batch | Selection] | None = None
            for start in range(first, last, num_steps):
                batch, ahead = ahead, worker.submit(make, start, num_steps, batch_size)
                if batch is not None:
                    yield batch.result()
            if ahead is not None:
                yield ahead.result()


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(num_examples)
