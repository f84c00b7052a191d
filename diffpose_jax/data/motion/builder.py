"""TFDS builder that turns motion capture into examples for training and evaluation.

Every frame is seen several times: each time another body, camera, crop and draw of the detector's
failures. All randomness comes from `numpy.random.default_rng([seed, split, hash of the clip's name,
view])`, so examples depend neither on the order nor on the number of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32

from diffpose_jax.config import check_range, parse
from diffpose_jax.data import cameras, prepared, simulator
from diffpose_jax.data.cameras import CameraConfig
from diffpose_jax.data.motion import clips
from diffpose_jax.data.motion.bodies import BodyConfig, bend, exchange_parts, vary_bodies
from diffpose_jax.data.prepared.builder import StoredHeatmaps
from diffpose_jax.data.simulator import SimulatorConfig
from diffpose_jax.detectors import crops
from diffpose_jax.skeleton import NUM_HEATMAPS

EMBEDDED = "embedded"
_SPLITS = ("train", "test")
# What TFDS sorts in memory, 1000 MiB: it needs TensorFlow for more.
_MOST_EXAMPLES = 327_680


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """Imperfect crops: those of the published preprocessing are exact (all zero)."""

    scale_std: float = 0.03  # log; of the side's factor
    shift_std: float = 0.01  # fraction of the side
    cut: float = 0.02  # share of crops that cut off a part of the body
    cut_shift: float = 0.3  # largest shift of such a crop, fraction of the side

    def __post_init__(self) -> None:
        check_range(self, scale_std=(0, 1), shift_std=(0, 1), cut=(0, 1), cut_shift=(0, 1))


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Everything that the examples depend on: `config.data.builder`."""

    source: str = EMBEDDED  # or a folder of motion files, see `clips.read_folder`
    fps: float = 0.0  # frames a second that are enough, see `clips.thin`; 0 keeps all
    test_clips: str = ""  # a pattern of test clips in a folder, see `clips.read_folder`
    train_views_per_frame: int = 12  # how often a frame is seen
    test_views_per_frame: int = 12
    test_stride: int = 1  # every n-th frame of a test clip is seen
    seed: int = 0
    body: BodyConfig = dataclasses.field(default_factory=BodyConfig)
    camera: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    crop: CropConfig = dataclasses.field(default_factory=CropConfig)
    simulator: SimulatorConfig = dataclasses.field(default_factory=SimulatorConfig)

    def __post_init__(self) -> None:
        counts = ("train_views_per_frame", "test_views_per_frame", "test_stride")
        check_range(self, fps=(0, 1e6), seed=(0, 1 << 63), **dict.fromkeys(counts, (1, 1 << 31)))
        if self.test_clips and self.source == EMBEDDED:
            raise ValueError("test_clips must be empty: the embedded clips have fixed splits")


def default_config() -> ml_collections.ConfigDict:
    """The fields of `MotionConfig` with their defaults, for a configuration file."""
    return ml_collections.ConfigDict(dataclasses.asdict(MotionConfig()))


def data_set_name(config: MotionConfig) -> str:
    """Names a data set after its content: a hash of all fields and of the motion files' bytes."""
    folder = clips.ARCHIVE.parent if config.source == EMBEDDED else Path(config.source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"config.data.builder.source must be {EMBEDDED!r} or a folder, not {config.source!r}"
        )
    files, label = sorted(path for path in folder.rglob("*") if path.is_file()), "folder"
    if config.source == EMBEDDED:
        files, label = [clips.ARCHIVE], EMBEDDED
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return f"{label}_{digest.hexdigest()[:12]}"


class RenderedHeatmaps(StoredHeatmaps):
    """Heatmaps that are stored as the blobs they consist of and rendered when decoded."""

    def encode_example(self, example_data: Any) -> bytes:
        """Blobs (16, R, 5) float32, see `simulator.render`, as bytes."""
        return example_data.tobytes()

    def decode_example_np(self, example_data: bytes) -> Float32[np.ndarray, "16 64 64"]:
        """Renders the blobs of bytes."""
        return np.asarray(simulator.render(decode_blobs(example_data)))


def decode_blobs(data: bytes) -> Float32[np.ndarray, "16 R 5"]:
    """The blobs of an encoded example."""
    return np.frombuffer(data, np.float32).reshape(NUM_HEATMAPS, -1, 5)


class Motion(tfds.core.GeneratorBasedBuilder):
    """Poses from motion capture with simulated heatmaps of a 2D detector."""

    VERSION = tfds.core.Version("1.1.0")

    def __init__(self, config: MotionConfig, data_dir: str | Path | None = None) -> None:
        self._motion = config
        named = tfds.core.BuilderConfig(name=data_set_name(config))
        super().__init__(config=named, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tensor = functools.partial(tfds.features.Tensor, encoding="bytes")
        features = {
            "heatmaps": RenderedHeatmaps(doc="MPII order, row = y, column = x"),
            "pose_mm": prepared.POSE,
            "keypoints_xy": tensor(shape=(17, 2), dtype=np.float32, doc="true projections, cells"),
            "hidden": tensor(shape=(16,), dtype=np.bool_, doc="behind another body part"),
            "ray": tensor(shape=(3,), dtype=np.float32, doc="to the crop's centre, see `cameras`"),
            "clip": tfds.features.Text(doc="name of the recording"),
            "frame": tfds.features.Scalar(np.int32, doc="frame of the clip, as thinned"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description="Motion capture seen by simulated cameras and a simulated detector.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._motion
        if config.source == EMBEDDED:
            every = [clips.thin(clip, config.fps) for clip in clips.load_embedded()]
        else:
            every = clips.read_folder(config.source, fps=config.fps, test_clips=config.test_clips)
        return {
            split: self._generate_examples([clip for clip in every if clip.split == split], split)
            for split in _SPLITS
        }

    def _generate_examples(
        self, recordings: list[clips.Clip], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self._motion
        is_training = split == "train"
        views = config.train_views_per_frame if is_training else config.test_views_per_frame
        stride = 1 if is_training else config.test_stride
        total = views * sum(len(clip.positions_mm[::stride]) for clip in recordings)
        if total > _MOST_EXAMPLES:
            raise ValueError(
                f"the {split} split would have {total} examples, more than {_MOST_EXAMPLES}. Use "
                f"fewer views per frame (now {views}), frames a second (fps) or a larger stride."
            )
        all_positions_mm = np.concatenate([clip.positions_mm for clip in recordings])
        for clip in recordings:
            for view in range(views):
                seeds = [config.seed, _SPLITS.index(split), zlib.crc32(clip.name.encode()), view]
                rng = np.random.default_rng(seeds)
                positions_mm = clip.positions_mm[::stride]
                if is_training:
                    chance = config.body.exchange
                    positions_mm = exchange_parts(rng, positions_mm, all_positions_mm, chance)
                    if config.body.bend_std_degrees:
                        positions_mm = bend(rng, positions_mm, config.body.bend_std_degrees)
                columns = make_examples(rng, positions_mm, config)
                for row in range(len(positions_mm)):
                    frame = row * stride
                    example = {key: column[row] for key, column in columns.items()}
                    example |= {"clip": clip.name, "frame": np.int32(frame)}
                    yield f"{clip.name}/{frame}/{view}", example


def make_examples(
    rng: np.random.Generator, positions_mm: Float[np.ndarray, "B 17 3"], config: MotionConfig
) -> dict[str, np.ndarray]:
    """Makes one example of each pose in the world (z up, the floor at z = 0).

    They are `heatmaps` as blobs (B, 16, R, 5), `pose_mm` (B, 17, 3), `keypoints_xy` (B, 17, 2) and
    `ray` (B, 3), all float32, and `hidden` (B, 16) bool.
    """
    world = vary_bodies(rng, positions_mm, config.body)
    camera = cameras.sample_cameras(rng, world[:, 0], config.camera)
    points = cameras.world_to_camera(world, camera)
    pixels = cameras.project(points, camera)
    crop = _disturb(rng, crops.square_crop(pixels), config.crop)
    keypoints = crops.pixels_to_cells(pixels, *crop)
    detections = simulator.simulate(rng, points, keypoints, config.simulator)
    return {
        "heatmaps": detections.blobs,
        "pose_mm": cameras.output_pose(points).astype(np.float32),
        "keypoints_xy": keypoints.astype(np.float32),
        "hidden": detections.hidden,
        "ray": cameras.rays(crop.middle_px, camera.focal_px, camera.centre_px).astype(np.float32),
    }


def _disturb(rng: np.random.Generator, crop: crops.Crop, config: CropConfig) -> crops.Crop:
    batch = len(crop.side_px)
    side = crop.side_px * np.exp(rng.normal(0.0, config.scale_std, batch))
    shift = rng.normal(0.0, config.shift_std, (batch, 2))
    cut = rng.random((batch, 1)) < config.cut
    shift = shift + cut * rng.uniform(-config.cut_shift, config.cut_shift, (batch, 2))
    centre = crop.corner_px + crop.side_px[:, None] * (0.5 + shift)
    side = np.round(side)
    return crops.Crop(np.round(centre - side[:, None] / 2), side)


def prepare(fields: Any, data_dir: str | Path | None = None) -> tfds.core.DatasetBuilder:
    """Opens the data set of a configuration, after writing it where it is missing.

    `fields` are those of `MotionConfig` that differ from their defaults. A second process that
    prepares the same waits for the first.

    Raises:
      ValueError, FileNotFoundError: for wrong fields or an unreadable source.
      OSError: if it cannot be written, as on a full disk.
    """
    config = parse(MotionConfig, fields, "config.data.builder")
    base = prepared.all_of(Motion.name, data_dir)
    folder = base / data_set_name(config) / str(Motion.VERSION)
    with prepared.preparing(folder):
        if not folder.exists():
            Motion(config, data_dir).download_and_prepare()
    return prepared.opened(folder)


def read_all(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """Reads a split, such as "test" or "train[:10%]", of a prepared builder without rendering it.

    The columns are `blobs` (N, 16, R, 5), `pose_mm` (N, 17, 3), `keypoints_xy` (N, 17, 2), `hidden`
    (N, 16), `ray` (N, 3), `clip` (N,) and `frame` (N,), in the stored (shuffled) order.
    """
    source = builder.as_data_source(split, decoders={"heatmaps": tfds.decode.SkipDecoding()})
    rows = source.__getitems__(range(len(source)))
    columns = ("pose_mm", "keypoints_xy", "hidden", "ray")
    return {
        **{name: np.stack([row[name] for row in rows]) for name in columns},
        "blobs": np.stack([decode_blobs(row["heatmaps"]) for row in rows]),
        "clip": np.array([row["clip"].decode() for row in rows]),
        "frame": np.array([row["frame"] for row in rows], np.int32),
    }
