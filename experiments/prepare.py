"""Prepares a data set from a user's own copy, for training, evaluation and prediction.

    python -m experiments.prepare --dataset human36m --source DIR --detector hrnet [--data_dir DIR]
    python -m experiments.prepare --dataset human36m --source h36m.h5 --human36m.format=released
    python -m experiments.prepare --dataset mpi_inf_3dhp --source DIR --detector hrnet
    python -m experiments.prepare --dataset lsp --source DIR --detector hrnet
    python -m experiments.prepare --dataset motion --source DIR --motion.fps=20
    python -m experiments.prepare --dataset motion --source DIR --clean OUT [--clips LIST.txt]

The last one writes clean motion for `--config.data.builder.source=OUT`; the others write examples.
`--detector` is a folder that `experiments.convert` wrote. `--NAME.FIELD=VALUE` changes what a data
set depends on. Stopped and started again, it goes on with the parts that are not finished.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

import experiments
from diffpose_jax import detectors
from diffpose_jax.config import ConfigError, parse
from diffpose_jax.data import motion
from diffpose_jax.data.human36m import Human36m
from diffpose_jax.data.lsp import Lsp
from diffpose_jax.data.motion import cleaning
from diffpose_jax.data.mpi_inf_3dhp import MpiInf3dhp

BUILDERS = {builder.name: builder for builder in (Human36m, MpiInf3dhp, Lsp)}
CONFIGS = {name: builder.CONFIG for name, builder in BUILDERS.items()} | {
    "motion": motion.MotionConfig
}


def _flag(name: str, config: Any) -> flags.FlagHolder[ml_collections.ConfigDict]:
    try:
        fields = ml_collections.ConfigDict(dataclasses.asdict(config()))
        return config_flags.DEFINE_config_dict(name, fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"error: --{name}.FIELD=VALUE does not fit: {error}; it has {', '.join(fields)}")


DATASET = flags.DEFINE_enum("dataset", None, list(CONFIGS), "Data set to prepare.")
SOURCE = flags.DEFINE_string("source", None, "Folder or file of the user's copy.")
DETECTOR = flags.DEFINE_string("detector", None, "Folder of a converted detector.")
DTYPE = flags.DEFINE_enum(
    "detector_dtype", "float32", ["float32", "bfloat16"], "Type of the detector's products."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to; default: where TFDS keeps data sets.")
CLEAN = flags.DEFINE_string("clean", None, "Folder for cleaned motion; no data set is prepared.")
CLIPS = flags.DEFINE_string("clips", None, "With --clean: list of the recordings, one a line.")
FIELDS = {name: _flag(name, config) for name, config in CONFIGS.items()}


def main(_: list[str]) -> None:
    """Prepares the data set."""
    if DATASET.value is None or SOURCE.value is None:
        raise app.UsageError("--dataset and --source are needed")
    if CLEAN.value is not None and DATASET.value != "motion":
        raise app.UsageError("--clean is for --dataset motion")
    if CLIPS.value is not None and CLEAN.value is None:
        raise app.UsageError("--clips needs --clean")
    fields, detector = FIELDS[DATASET.value].value, None
    try:
        if CLEAN.value is not None:
            fps = parse(motion.MotionConfig, fields, "motion").fps
            counts = cleaning.clean_folder(SOURCE.value, CLEAN.value, fps, CLIPS.value)
            print("\n".join(f"{count:10,} {what}" for what, count in counts.items()))
            return
        if DATASET.value == "motion":
            fields.source = SOURCE.value
            builder = motion.prepare(fields, DATA_DIR.value)
        else:
            if DETECTOR.value is not None:
                detector = detectors.load(DETECTOR.value, fields.get("input_px"), DTYPE.value)
            builder = BUILDERS[DATASET.value](fields, SOURCE.value, detector, DATA_DIR.value)
            builder.prepare()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError("; ".join([str(error), *getattr(error, "__notes__", [])])) from error
    splits = ", ".join(
        f"{name} {info.num_examples:,}" for name, info in builder.info.splits.items()
    )
    print(f"{builder.data_path}: {splits} examples")


if __name__ == "__main__":
    experiments.run(main)
