"""Prepares a data set from a user's own copy, for training and evaluation.

    python -m experiments.prepare --dataset human36m --source DIR --detector hrnet [--data_dir DIR]
    python -m experiments.prepare --dataset human36m --source h36m.h5 --human36m.format=released
    python -m experiments.prepare --dataset mpi_inf_3dhp --source DIR --detector hrnet
    python -m experiments.prepare --dataset motion --source DIR --motion.fps=20

`--detector` is a folder that `experiments.convert` wrote. `--NAME.FIELD=VALUE` changes what a data
set depends on. Stopped and started again, it goes on with the parts that are not finished.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

import experiments
from diffpose_jax import detectors
from diffpose_jax.config import ConfigError
from diffpose_jax.data import human36m, motion, mpi_inf_3dhp

DATASET = flags.DEFINE_enum(
    "dataset", None, ["human36m", "mpi_inf_3dhp", "motion"], "Data set to prepare."
)
SOURCE = flags.DEFINE_string("source", None, "Folder or file of the user's copy.")
DETECTOR = flags.DEFINE_string("detector", None, "Folder of a converted detector.")
DTYPE = flags.DEFINE_enum(
    "detector_dtype", "float32", ["float32", "bfloat16"], "Type of the detector's products."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to; default: where TFDS keeps data sets.")
HUMAN36M = config_flags.DEFINE_config_dict("human36m", human36m.default_config())
MPI_INF_3DHP = config_flags.DEFINE_config_dict("mpi_inf_3dhp", mpi_inf_3dhp.default_config())
MOTION = config_flags.DEFINE_config_dict("motion", motion.default_config())


def main(_: list[str]) -> None:
    """Prepares the data set."""
    if DATASET.value is None or SOURCE.value is None:
        raise app.UsageError("--dataset and --source are needed")
    source = Path(SOURCE.value)
    try:
        if DATASET.value == "motion":
            MOTION.value.source = str(source)
            builder = motion.prepare(MOTION.value, DATA_DIR.value)
        elif DATASET.value == "human36m":
            detector = _detector(HUMAN36M.value.input_px)
            builder = human36m.prepare(HUMAN36M.value, source, DATA_DIR.value, detector)
        else:
            detector = _detector()
            if detector is None:
                raise ValueError("the images need a detector: give --detector")
            builder = mpi_inf_3dhp.prepare(MPI_INF_3DHP.value, source, DATA_DIR.value, detector)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError("; ".join([str(error), *getattr(error, "__notes__", [])])) from error
    splits = ", ".join(
        f"{name} {info.num_examples:,}" for name, info in builder.info.splits.items()
    )
    print(f"{builder.data_path}: {splits} examples")


def _detector(input_px: int | None = None) -> detectors.Detector | None:
    if DETECTOR.value is None:
        return None
    return detectors.load(DETECTOR.value, input_px, DTYPE.value)


if __name__ == "__main__":
    experiments.run(main)
