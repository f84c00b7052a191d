"""TFDS builder that turns motion capture into examples for training and evaluation.

Every frame is seen several times: each time another body, another camera, another crop and
another draw of the detector's failures. All randomness comes from
`numpy.random.default_rng([seed, split, hash of the clip's name, view])`, so examples depend
neither on the order nor on the number of the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from diffpose_jax.data import cameras, simulator
from diffpose_jax.data import prepared as detections
from diffpose_jax.data.motion import clips as mocap
from diffpose_jax.data.motion.bodies import BodyConfig, exchange_parts, vary_bodies
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

EMBEDDED = "embedded"
_SPLITS = ("train", "test")
_LEAST = {
    "fps": 0,
    "train_views_per_frame": 1,
    "test_views_per_frame": 1,
    "test_stride": 1,
    "seed": 0,
}
# TFDS sorts up to this much in memory and needs TensorFlow for more.
_LARGEST_SPLIT_BYTES = 1000 << 20
_EXAMPLE_BYTES = 3200


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """Imperfect crops: those of the published preprocessing are exact (all zero).

    Attributes:
        scale_std: Standard deviation of the log of the side's factor.
        shift_std: Standard deviation of the shift, a fraction of the side.
        cut: Share of crops that cut off a part of the body.
        cut_shift: Largest shift of such a crop, a fraction of the side.
    """

    scale_std: float = 0.03
    shift_std: float = 0.01
    cut: float = 0.02
    cut_shift: float = 0.3


@dataclasses.dataclass(eq=False)
class MotionConfig(tfds.core.BuilderConfig):
    """Everything that the examples depend on; make it with `builder_config`.

    Attributes:
        source: "embedded", or a folder of the user's motion files (see `mocap.read_folder`).
        fps: Frames a second that are enough: frames of faster clips are dropped, evenly, as long
            as so many are left (see `mocap.thin`). 0 keeps all.
        test_clips: Of a folder, a pattern for the names of test clips besides those under
            `test/`: "03_*" holds out subject 3 of the CMU database. Empty for none.
        train_views_per_frame: How often each training frame is seen.
        test_views_per_frame: The same for test frames.
        test_stride: Only every n-th frame of a test clip is seen.
        seed: Seed of everything random.
        body: Variation of the bodies.
        camera: Distribution of the cameras.
        crop: Imperfection of the crops.
        simulator: The detector.
    """

    source: str = EMBEDDED
    fps: float = 0.0
    test_clips: str = ""
    train_views_per_frame: int = 12
    test_views_per_frame: int = 12
    test_stride: int = 1
    seed: int = 0
    body: BodyConfig = dataclasses.field(default_factory=BodyConfig)
    camera: cameras.CameraConfig = dataclasses.field(default_factory=cameras.CameraConfig)
    crop: CropConfig = dataclasses.field(default_factory=CropConfig)
    simulator: simulator.SimulatorConfig = dataclasses.field(
        default_factory=simulator.SimulatorConfig
    )


def default_config() -> ml_collections.ConfigDict:
    """Gives the fields of `MotionConfig` with their defaults, as `builder_config` takes them."""
    return ml_collections.ConfigDict(_parameters(MotionConfig(name="")))


def builder_config(config: ml_collections.ConfigDict) -> MotionConfig:
    """Checks a configuration and names it after its content.

    The name ends in a hash of all fields and of the motion files' bytes, so that changed
    parameters make another data set and an old one is never read in its place.

    Args:
        config: Fields of `MotionConfig` (`body`, `camera`, `crop` and `simulator` nested); what is
            missing keeps its default.

    Returns:
        The builder's configuration.

    Raises:
        ValueError: If a field is unknown, of another type or out of range.
        FileNotFoundError: If `source` is neither "embedded" nor a folder.
    """
    made = _fill(MotionConfig(name=""), config.to_dict(), "data")
    for field, least in _LEAST.items():
        if not getattr(made, field) >= least:  # nan is refused, too
            raise ValueError(
                f"data.{field} is {getattr(made, field)}; it must be at least {least}."
            )
    if made.test_clips and made.source == EMBEDDED:
        raise ValueError(
            f"data.test_clips is {made.test_clips!r}, but the embedded clips have fixed splits; "
            "leave it empty or set data.source to a folder."
        )
    parameters = json.dumps(_parameters(made), sort_keys=True)
    digest = hashlib.sha256(parameters.encode() + _source_digest(made.source)).hexdigest()
    label = made.source if made.source == EMBEDDED else "folder"
    return dataclasses.replace(made, name=f"{label}_{digest[:12]}")


def _parameters(config: MotionConfig) -> dict[str, Any]:
    base = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in base}


def _fill(default: Any, values: dict[str, Any], path: str) -> Any:
    """Replaces fields of a dataclass, nested ones too, by `values`."""
    base = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    known = {field.name for field in dataclasses.fields(default)} - base
    changes = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path}.{key} is unknown; {path} has {', '.join(sorted(known))}.")
        old = getattr(default, key)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                fields = ", ".join(field.name for field in dataclasses.fields(old))
                raise ValueError(f"{path}.{key} is {value!r}; it must hold fields: {fields}.")
            changes[key] = _fill(old, value, f"{path}.{key}")
        elif isinstance(value, type(old)) or (isinstance(old, float) and isinstance(value, int)):
            changes[key] = type(old)(value)
        else:
            raise ValueError(f"{path}.{key} is {value!r}; it must be a {type(old).__name__}.")
    return dataclasses.replace(default, **changes)


def _source_digest(source: str) -> bytes:
    if source == EMBEDDED:
        return hashlib.sha256(
            resources.files(__package__).joinpath("mocap.npz").read_bytes()
        ).digest()
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.source is {source!r}; it must be {EMBEDDED!r} or a folder of motion files."
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.digest()


class RenderedHeatmaps(tfds.features.FeatureConnector):
    """Heatmaps that are stored as the blobs they consist of and rendered when decoded.

    Encoded: the bytes of (16, R, 5) float32 blobs (see `simulator.render`). Decoded: (16, 64, 64)
    float32. With `tfds.decode.SkipDecoding` the bytes come back.
    """

    def get_tensor_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of decoded heatmaps."""
        shape = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
        return tfds.features.TensorInfo(shape=shape, dtype=np.float32)

    def get_serialized_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of what is stored."""
        return tfds.features.TensorInfo(shape=(), dtype=np.object_)

    def encode_example(self, example_data: np.ndarray) -> bytes:
        """Turns blobs (16, R, 5) into bytes."""
        if example_data.ndim != 3 or (example_data.shape[0], example_data.shape[2]) != (
            NUM_HEATMAPS,
            5,
        ):
            raise ValueError(
                f"Blobs have shape {example_data.shape}; they must be ({NUM_HEATMAPS}, R, 5)."
            )
        return np.asarray(example_data, np.float32).tobytes()

    def decode_example_np(self, example_data: bytes) -> np.ndarray:
        """Turns bytes into heatmaps (16, 64, 64)."""
        return simulator.render(decode_blobs(example_data))

    def to_json_content(self) -> dict[str, Any]:
        """Tells what `features.json` needs: nothing."""
        return {}

    @classmethod
    def from_json_content(cls, value: dict[str, Any]) -> RenderedHeatmaps:
        """Makes the feature from the content of `features.json`."""
        del value
        return cls()


def decode_blobs(data: bytes) -> np.ndarray:
    """Gives the blobs (16, R, 5) float32 of an encoded example."""
    return np.frombuffer(data, np.float32).reshape(NUM_HEATMAPS, -1, 5)


class Motion(tfds.core.GeneratorBasedBuilder):
    """Poses from motion capture with simulated heatmaps of a 2D detector."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        def tensor(shape: tuple[int, ...], dtype: type, doc: str) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes", doc=doc)

        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "heatmaps": RenderedHeatmaps(doc="MPII order, row = y, column = x"),
                    "pose_mm": tensor(
                        (NUM_JOINTS, 3),
                        np.float32,
                        "Human3.6M order, from the hip, x right, y up, z towards the camera",
                    ),
                    "keypoints_xy": tensor(
                        (NUM_JOINTS, 2), np.float32, "true projections in heatmap cells"
                    ),
                    "hidden": tensor(
                        (NUM_HEATMAPS,), np.bool_, "behind another part of the body, MPII order"
                    ),
                    "clip": tfds.features.Text(doc="name of the recording"),
                    "frame": tfds.features.Scalar(np.int32, doc="frame of the clip, as thinned"),
                }
            ),
            description="Motion capture seen by simulated cameras and a simulated detector.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self.builder_config
        if config.source == EMBEDDED:
            clips = [mocap.thin(clip, config.fps) for clip in mocap.load_embedded()]
        else:
            clips = mocap.read_folder(config.source, fps=config.fps, test_clips=config.test_clips)
        return {
            split: self._generate_examples([clip for clip in clips if clip.split == split], split)
            for split in _SPLITS
        }

    def _generate_examples(
        self, clips: list[mocap.Clip], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.builder_config
        views = config.train_views_per_frame if split == "train" else config.test_views_per_frame
        stride = config.test_stride if split == "test" else 1
        frames = {clip.name: np.arange(0, len(clip.positions_mm), stride) for clip in clips}
        total = views * sum(map(len, frames.values()))
        if total * _EXAMPLE_BYTES > _LARGEST_SPLIT_BYTES:
            raise ValueError(
                f"The {split} split would have {total} examples; more than "
                f"{_LARGEST_SPLIT_BYTES // _EXAMPLE_BYTES} cannot be sorted in memory. Use fewer "
                f"views per frame (now {views}), fewer frames a second (fps) or a larger stride."
            )
        all_positions_mm = np.concatenate([clip.positions_mm for clip in clips])
        for clip in clips:
            for view in range(views):
                seeds = [config.seed, _SPLITS.index(split), zlib.crc32(clip.name.encode()), view]
                rng = np.random.default_rng(seeds)
                chosen = frames[clip.name]
                positions_mm = clip.positions_mm[chosen]
                if split == "train":
                    positions_mm = exchange_parts(
                        rng, positions_mm, all_positions_mm, config.body.exchange
                    )
                columns = make_examples(rng, positions_mm, config)
                for row, frame in enumerate(chosen):
                    example = {key: column[row] for key, column in columns.items()}
                    example |= {"clip": clip.name, "frame": np.int32(frame)}
                    yield f"{clip.name}/{frame}/{view}", example


def make_examples(
    rng: np.random.Generator, positions_mm: np.ndarray, config: MotionConfig
) -> dict[str, np.ndarray]:
    """Makes one example of each pose.

    Args:
        rng: Source of randomness.
        positions_mm: (B, 17, 3), poses in the world, z up, the floor at z = 0.
        config: Bodies, cameras, crops and the detector.

    Returns:
        `heatmaps` as blobs (B, 16, R, 5), `pose_mm` (B, 17, 3), `keypoints_xy` (B, 17, 2), all
        float32, and `hidden` (B, 16) bool.
    """
    world = vary_bodies(rng, positions_mm, config.body)
    camera = cameras.sample_cameras(rng, world[:, 0], config.camera)
    points = cameras.world_to_camera(world, camera)
    pixels = cameras.project(points, camera)
    crop = _disturb(rng, cameras.square_crop(pixels), config.crop)
    keypoints = cameras.to_heatmap(pixels, crop)
    detections = simulator.simulate(rng, points, keypoints, config.simulator)
    return {
        "heatmaps": detections.blobs,
        "pose_mm": cameras.output_pose(points).astype(np.float32),
        "keypoints_xy": keypoints.astype(np.float32),
        "hidden": detections.hidden,
    }


def _disturb(rng: np.random.Generator, crop: cameras.Crop, config: CropConfig) -> cameras.Crop:
    batch = len(crop.side_px)
    side = crop.side_px * np.exp(rng.normal(0.0, config.scale_std, batch))
    shift = rng.normal(0.0, config.shift_std, (batch, 2))
    cut = rng.random((batch, 1)) < config.cut
    shift = shift + cut * rng.uniform(-config.cut_shift, config.cut_shift, (batch, 2))
    centre = crop.corner_px + crop.side_px[:, None] * (0.5 + shift)
    side = np.round(side)
    return cameras.Crop(np.round(centre - side[:, None] / 2), side)


def prepare(
    config: ml_collections.ConfigDict, data_dir: str | Path | None = None
) -> tfds.core.DatasetBuilder:
    """Opens the data set of a configuration, after writing it if it is not there yet.

    A second process that prepares the same waits for the first.

    Args:
        config: See `builder_config`.
        data_dir: Folder of all data sets; default: that of TFDS.

    Returns:
        The prepared builder, for `read_all` or `as_data_source`.

    Raises:
        ValueError, FileNotFoundError: See `builder_config` and `mocap.read_folder`.
        OSError: If it cannot be written, as on a full disk.
    """
    made = builder_config(config)

    folder = detections.all_of(Motion.name, data_dir) / made.name / str(Motion.VERSION)
    with detections.preparing(folder):
        if not folder.exists():
            builder = Motion(config=made, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
    return detections.opened(folder)


def read_all(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """Reads a whole split into memory without rendering it.

    Args:
        builder: A prepared builder.
        split: "train" or "test", or a part of it such as "train[:10%]".

    Returns:
        `blobs` (N, 16, R, 5), `pose_mm` (N, 17, 3), `keypoints_xy` (N, 17, 2) float32, `hidden`
        (N, 16) bool, `clip` (N,) str and `frame` (N,) int32, in the stored (shuffled) order.
    """
    source = builder.as_data_source(split, decoders={"heatmaps": tfds.decode.SkipDecoding()})
    rows = source.__getitems__(range(len(source)))
    columns = {key: np.stack([row[key] for row in rows]) for key in ("pose_mm", "keypoints_xy")}
    return {
        "blobs": np.stack([decode_blobs(row["heatmaps"]) for row in rows]),
        **columns,
        "hidden": np.stack([row["hidden"] for row in rows]),
        "clip": np.array([row["clip"].decode() for row in rows]),
        "frame": np.array([row["frame"] for row in rows], np.int32),
    }
