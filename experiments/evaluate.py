"""Evaluates a trained model on its test split: tables, pictures and the report.

python -m experiments.evaluate --checkpoint runs/quickstart [--num_hypotheses N] [--output DIR]
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import experiments
from diffpose_jax import results

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or an export.")
NUM_HYPOTHESES = flags.DEFINE_integer(
    "num_hypotheses", None, "M; default: the configuration's.", lower_bound=1
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; default: the checkpoint's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: TFDS's.")


def main(_: list[str]) -> None:
    """Runs the evaluation."""
    if CHECKPOINT.value is None:
        raise app.UsageError("--checkpoint is missing; try --checkpoint runs/quickstart")
    output = Path(OUTPUT.value or CHECKPOINT.value)
    results.print_table(
        results.evaluate_run(
            Path(CHECKPOINT.value),
            output,
            num_hypotheses=NUM_HYPOTHESES.value,
            data_dir=DATA_DIR.value,
        )
    )
    print(f"\n{output / 'report.html'}")


if __name__ == "__main__":
    experiments.run(main)
