"""The input pipeline: prepared data sets to batches for training and evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from tqdm import tqdm

from diffpose_jax import heatmaps as heatmaps_lib
from diffpose_jax.config import ConfigError
from diffpose_jax.data import motion, simulator
from diffpose_jax.heatmaps import HeatmapSamples
from diffpose_jax.model import DiffPose
from diffpose_jax.training import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split of a data set.

    Attributes:
      pose_mm: (N, 17, 3) float32, the truth, hip-centred camera axes with y up.
      clips: (N,), the recording that each example is from.
      names: (N,), a name for each example.
      heatmaps: rows (n,) -> heatmaps (n, 16, 64, 64) float32.
    """

    pose_mm: np.ndarray
    clips: np.ndarray
    names: np.ndarray
    heatmaps: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.pose_mm)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Rows in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield np.arange(start, min(start + batch_size, len(self)))


def load(
    config: ml_collections.ConfigDict, split: str, data_dir: str | Path | None = None
) -> Examples:
    """Reads a split, preparing the data set first if it is not there.

    Args:
      config: `config.data`.
      split: "train" or "test".
      data_dir: where prepared data sets lie; by default where TFDS keeps them.

    Raises:
      ConfigError: for an unknown data set, or a configuration or source that it does not take.
    """
    if config.name != "motion":
        raise ConfigError(f"config.data.name: unknown data set {config.name!r}; known: motion")
    try:
        builder = motion.prepare(config.builder, data_dir)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data.builder: {error}") from error
    columns = motion.read_all(builder, split)
    blobs = columns["blobs"]
    return Examples(
        pose_mm=columns["pose_mm"],
        clips=columns["clip"],
        names=np.char.add(np.char.add(columns["clip"], " "), columns["frame"].astype(str)),
        heatmaps=lambda rows: simulator.render(blobs[rows]),
    )


class DrawnInStep:
    """What the training step draws candidates from: the heatmaps themselves."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def take(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Heatmaps (n, 16, 64, 64) of the rows (n,)."""
        del rng
        return self._examples.heatmaps(rows)


class PredrawnCandidates:
    """Candidates drawn ahead of training.

    Drawing costs more than a small model's whole step. Of P candidates drawn once for each
    joint, a step takes a contiguous part at a random place: 31 of P draws with replacement are
    31 draws with replacement.

    Args:
      examples: a split.
      num_drawn: P.
      num_samples: S, candidates that a step takes, the argmax counted in.
      include_argmax: whether the first is the argmax.
      key: a random key.

    Raises:
      ValueError: if P is smaller than what a step takes.
    """

    def __init__(
        self,
        examples: Examples,
        num_drawn: int,
        num_samples: int,
        *,
        include_argmax: bool,
        key: Array,
    ) -> None:
        self._window = num_samples - include_argmax
        self._include_argmax = include_argmax
        if num_drawn < self._window:
            raise ValueError(
                f"config.data.predrawn_candidates = {num_drawn} is less than the {self._window}"
                " that a step takes; give more, or 0 to draw in every step"
            )
        parts = []
        progress = tqdm(total=len(examples), desc="drawing candidates", unit=" images")
        for rows in examples.batches(32):
            parts.append(jax.device_get(_draw(key, rows, examples.heatmaps(rows), num_drawn)))
            progress.update(len(rows))
        progress.close()
        best, drawn = (
            jax.tree.map(lambda *x: np.concatenate(x), *part) for part in zip(*parts, strict=True)
        )
        self._best: HeatmapSamples = best
        self._drawn: HeatmapSamples = drawn

    def take(self, rows: np.ndarray, rng: np.random.Generator) -> HeatmapSamples:
        """Candidates (n, S, 16) of the rows (n,)."""
        num_drawn = self._drawn.cells.shape[1]
        places = rng.integers(0, num_drawn, (len(rows), 1)) + np.arange(self._window)[None]
        taken = jax.tree.map(lambda x: x[rows[:, None], places % num_drawn], self._drawn)
        if not self._include_argmax:
            return taken
        best = jax.tree.map(lambda x: x[rows], self._best)
        return jax.tree.map(lambda *x: np.concatenate(x, axis=1), best, taken)


def evidence(
    examples: Examples, network: DiffPose, num_predrawn: int, key: Array
) -> DrawnInStep | PredrawnCandidates:
    """What the training step draws candidates from, as `config.data.predrawn_candidates` says.

    Args:
      examples: the training split.
      network: tells how many candidates a step takes and whether the argmax is one.
      num_predrawn: candidates drawn ahead per joint, 0 to draw in every step.
      key: a random key.
    """
    if num_predrawn == 0:
        return DrawnInStep(examples)
    return PredrawnCandidates(
        examples,
        num_predrawn,
        network.num_samples,
        include_argmax=network.include_argmax,
        key=key,
    )


@functools.partial(jax.jit, static_argnames="num_drawn")
def _draw(
    key: Array, rows: Array, heatmaps: Array, num_drawn: int
) -> tuple[HeatmapSamples, HeatmapSamples]:
    """Argmax (n, 1, 16) and draws (n, P, 16) in storage types."""

    def draw(row: Array, heatmaps: Array) -> HeatmapSamples:
        key_of_row = jax.random.fold_in(key, row)
        return heatmaps_lib.sample(key_of_row, heatmaps, num_drawn + 1, include_argmax=True)

    samples = jax.vmap(draw)(rows, heatmaps)
    stored = HeatmapSamples(
        cells=samples.cells.astype(jnp.uint16), likelihood=samples.likelihood.astype(jnp.float16)
    )
    return jax.tree.map(lambda x: x[:, :1], stored), jax.tree.map(lambda x: x[:, 1:], stored)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Batches of shuffled examples as a pure function of the step, so that a run can resume.

    Attributes:
      examples: the training split.
      evidence: what candidates come from.
      seed: seed of the order and of what `evidence` draws.
    """

    examples: Examples
    evidence: DrawnInStep | PredrawnCandidates
    seed: int

    def batch(self, step: int, num_steps: int, batch_size: int) -> Batch:
        """Images for the steps after `step`: leading axes (num_steps, batch_size)."""
        positions = np.arange(step * batch_size, (step + num_steps) * batch_size)
        epochs, places = np.divmod(positions, len(self.examples))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._order(epoch)[places[epochs == epoch]]
        evidence = self.evidence.take(rows, np.random.default_rng([self.seed, 1, step]))
        batch = Batch(evidence=evidence, pose_mm=self.examples.pose_mm[rows])
        return jax.tree.map(lambda x: x.reshape(num_steps, batch_size, *x.shape[1:]), batch)

    def dispatches(self, first: int, last: int, num_steps: int, batch_size: int) -> Iterator[Batch]:
        """Batches for all steps from `first` to `last`, each made while the one before is used."""
        starts = range(first, last, num_steps)
        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead = None
            for start in starts:
                batch, ahead = ahead, worker.submit(self.batch, start, num_steps, batch_size)
                if batch is not None:
                    yield batch.result()
            if ahead is not None:
                yield ahead.result()

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the data lives as long as the run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.examples))
