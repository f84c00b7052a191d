"""Measures speed on this machine; prints one JSON object a line.

    python -m experiments.benchmark [--parts data,detector] [--examples 20000]

Weights and input are synthetic. `data`: a set of detections is prepared and read in random
batches, against what training the paper's model consumes. `detector`: images a second of both.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags

import experiments
from configs import h36m
from diffpose_jax import config as config_lib
from diffpose_jax import model as model_lib
from diffpose_jax import training
from diffpose_jax.data import detections, mocap, motion, simulator
from diffpose_jax.data.detections import Part
from diffpose_jax.detectors import efficientpose, hrnet
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

PARTS = flags.DEFINE_list("parts", ["data", "detector"], "What to measure.")
EXAMPLES = flags.DEFINE_integer("examples", 20_000, "Examples of the data set.", lower_bound=1_000)

_BATCH_SIZE, _STEPS = 64, 100


def report(**figures: Any) -> None:
    """Prints a line; numbers are rounded to four digits."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class SyntheticDetections(detections.DetectionsBuilder):
    """Simulated detections of the embedded motion, stored as those of real pictures are."""

    VERSION = tfds.core.Version("1.0.0")

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps and poses."""
        return {"frame": tfds.features.Scalar(np.int32)}

    def parts(self) -> list[Part]:
        """Pieces of 1,000 examples."""
        return [
            Part(f"part_{start:06d}", "train", functools.partial(_read_part, start))
            for start in range(0, EXAMPLES.value, 1_000)
        ]


def _read_part(start: int) -> Iterator[detections.Columns]:
    rng = np.random.default_rng(start)
    positions_mm = np.concatenate([clip.positions_mm for clip in mocap.load_embedded()])
    config = motion.builder_config(motion.default_config())
    for first in range(start, min(start + 1_000, EXAMPLES.value), 250):
        chosen = positions_mm[rng.integers(len(positions_mm), size=250)]
        made = motion.make_examples(rng, chosen, config)
        yield {
            "heatmaps": simulator.render(made["heatmaps"]),
            "pose_mm": made["pose_mm"],
            "frame": np.arange(first, first + 250, dtype=np.int32),
        }


def data() -> None:
    """Preparation and reading of detections, against the training of the paper's model."""
    with tempfile.TemporaryDirectory() as folder:
        config = detections.named(detections.DetectionsConfig(name=""), "synthetic")
        builder = SyntheticDetections(config=config, data_dir=folder)
        start = time.perf_counter()
        builder.prepare()
        prepared = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(builder.data_path).rglob("*"))
        columns, heatmaps = detections.read(builder, "train")
        rng = np.random.default_rng(0)

        def read() -> np.ndarray:
            return heatmaps(rng.integers(len(columns["pose_mm"]), size=_BATCH_SIZE * _STEPS // 4))

        seconds = median_seconds(read, 5)
    read_rate = _BATCH_SIZE * _STEPS / 4 / seconds
    step = _train_step_seconds()
    report(
        part="data",
        examples=EXAMPLES.value,
        prepared_per_second=EXAMPLES.value / prepared,
        bytes_per_example=size / EXAMPLES.value,
        read_per_second=read_rate,
        training_consumes_per_second=_BATCH_SIZE / step,
        read_over_training=read_rate * step / _BATCH_SIZE,
        peak_memory_mb=_peak_memory_mb(),
    )


def _train_step_seconds() -> float:
    """Seconds of a step of the paper's model, batch 64, candidates drawn in the step."""
    config = h36m.get_config()
    network = config_lib.call(model_lib.build, config.model, "config.model")
    trainer = training.from_config(network, config.training)
    rng = np.random.default_rng(0)
    shape = (_BATCH_SIZE, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
    batch = training.Batch(
        evidence=rng.random(shape, np.float32),
        pose_mm=300 * rng.standard_normal((_BATCH_SIZE, NUM_JOINTS, 3)).astype(np.float32),
    )
    batch, key = jax.device_put(batch), jax.random.key(0)
    state = trainer.init(key)
    step = jax.jit(functools.partial(training.train_step, trainer))
    return median_seconds(lambda: step(state, key, batch), 10)


def detector() -> None:
    """Images a second of both detectors, on crops of the size that each reads."""
    batch = 2 if jax.default_backend() == "cpu" else 64
    networks = {
        "hrnet_w32": (hrnet.HRNet(), hrnet.preprocess, 256),
        "efficientpose_ii_lite": (
            efficientpose.EfficientPose(),
            efficientpose.preprocess,
            efficientpose.INPUT_PX,
        ),
    }
    for name, (network, preprocess, input_px) in networks.items():
        crops = np.random.default_rng(0).integers(0, 256, (batch, input_px, input_px, 3), np.uint8)
        images = preprocess(jax.numpy.asarray(crops))
        params = jax.jit(network.init)(jax.random.key(0), images)
        seconds = median_seconds(functools.partial(jax.jit(network.apply), params, images), 5)
        report(part="detector", network=name, batch=batch, images_per_second=batch / seconds)


def _peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


_MEASURE = {"data": data, "detector": detector}


def main(_: list[str]) -> None:
    """Runs the parts."""
    if unknown := [part for part in PARTS.value if part not in _MEASURE]:
        raise app.UsageError(f"--parts: {', '.join(unknown)} unknown; take {', '.join(_MEASURE)}")
    report(
        part="machine",
        backend=jax.default_backend(),
        devices=[str(device.device_kind) for device in jax.local_devices()],
        jax=jax.__version__,
    )
    for part in PARTS.value:
        _MEASURE[part]()


if __name__ == "__main__":
    experiments.run(main)
