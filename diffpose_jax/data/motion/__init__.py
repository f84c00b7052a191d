"""Motion capture turned into examples: a TFDS builder that works without TensorFlow."""

from diffpose_jax.data.motion.bodies import BodyConfig, exchange_parts, mirror_poses, vary_bodies
from diffpose_jax.data.motion.motion_dataset_builder import (
    CropConfig,
    Motion,
    MotionConfig,
    RenderedHeatmaps,
    builder_config,
    decode_blobs,
    default_config,
    make_examples,
    prepare,
    read_all,
)

__all__ = [
    "BodyConfig",
    "CropConfig",
    "Motion",
    "MotionConfig",
    "RenderedHeatmaps",
    "builder_config",
    "decode_blobs",
    "default_config",
    "exchange_parts",
    "make_examples",
    "mirror_poses",
    "prepare",
    "read_all",
    "vary_bodies",
]
