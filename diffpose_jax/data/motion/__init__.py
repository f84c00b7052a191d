"""Motion capture: clips, readers of motion files, and a TFDS builder of examples."""

from diffpose_jax.data.motion.builder import (
    MotionConfig,
    default_config,
    make_examples,
    prepare,
    read_all,
)
from diffpose_jax.data.motion.clips import load_embedded, read_clip, read_folder

__all__ = [
    "MotionConfig",
    "default_config",
    "load_embedded",
    "make_examples",
    "prepare",
    "read_all",
    "read_clip",
    "read_folder",
]
