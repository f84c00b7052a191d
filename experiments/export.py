"""Writes a trained model as a small checkpoint to give away.

python -m experiments.export --checkpoint runs/quickstart --output DIR
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import experiments
from diffpose_jax import aggregation, checkpoints, files

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or one of its steps.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, which must not be there yet.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["raw", "ema"], "Weights to write; default: the configuration's."
)


def main(_: list[str]) -> None:
    """Exports the model."""
    if CHECKPOINT.value is None or OUTPUT.value is None:
        raise app.UsageError(
            "--checkpoint and --output are needed; try --checkpoint runs/quickstart"
        )
    output = Path(OUTPUT.value)
    checkpoints.export(checkpoints.load(CHECKPOINT.value, WEIGHTS.value), output)
    calibration = Path(CHECKPOINT.value) / aggregation.CALIBRATIONS
    if calibration.exists():
        files.write_whole(output / aggregation.CALIBRATIONS, calibration.read_bytes())
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    experiments.run(main)
