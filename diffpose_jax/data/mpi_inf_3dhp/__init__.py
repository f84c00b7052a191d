"""MPI-INF-3DHP's test set, from a user's own copy: annotations and a TFDS builder."""

from diffpose_jax.data.mpi_inf_3dhp.annotations import SCENES, Recording
from diffpose_jax.data.mpi_inf_3dhp.mpi_inf_3dhp_dataset_builder import (
    MpiInf3dhp,
    MpiInf3dhpConfig,
    builder_config,
    default_config,
    prepare,
)

__all__ = [
    "SCENES",
    "MpiInf3dhp",
    "MpiInf3dhpConfig",
    "Recording",
    "builder_config",
    "default_config",
    "prepare",
]
