"""Sets of real detections that TFDS keeps: built part by part, found and read back."""

from diffpose_jax.data.prepared.builder import (
    POSE,
    DetectionsBuilder,
    DetectionsConfig,
    Detector,
    Part,
    preparing,
)
from diffpose_jax.data.prepared.reader import Columns, all_of, find, fingerprint, opened, read

__all__ = [
    "POSE",
    "Columns",
    "DetectionsBuilder",
    "DetectionsConfig",
    "Detector",
    "Part",
    "all_of",
    "find",
    "fingerprint",
    "opened",
    "preparing",
    "read",
]
