"""Evaluates a trained model on a test split: tables, pictures and the report.

    python -m experiments.evaluate --checkpoint runs/quickstart [--num_hypotheses N]
        [--solver ddpm:8] [--output DIR]

`--config` takes another data set or protocol than the model's own, see `configs/protocols.py`.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from diffpose_jax import config as config_lib
from diffpose_jax import distributed
from diffpose_jax.io import locks
from diffpose_jax.report import results
from diffpose_jax.training import checkpoints
from experiments import processes

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or an export.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Protocol: its data and evaluation; default: the model's own."
)
NUM_HYPOTHESES = flags.DEFINE_list(
    "num_hypotheses", [], "M, or several of them for one pass; default: the configuration's."
)
SOLVER = flags.DEFINE_string(
    "solver", None, "Such as ddpm:8, for fewer steps; default: the configuration's."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; default: the checkpoint's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: TFDS's.")


def main(_: list[str]) -> None:
    """Runs the evaluation."""
    if CHECKPOINT.value is None:
        raise app.UsageError("--checkpoint is missing; try --checkpoint runs/quickstart")
    try:
        counts = [int(count) for count in NUM_HYPOTHESES.value]
    except ValueError as error:
        raise app.UsageError(f"--num_hypotheses must be integers: {error}") from error
    if any(count < 1 for count in counts):
        raise app.UsageError("--num_hypotheses must be at least 1")
    checkpoints.find(Path(CHECKPOINT.value))  # before a folder is made for what cannot be
    output = Path(OUTPUT.value or CHECKPOINT.value)
    # While it is trained, a model can be evaluated into another folder than its own.
    with distributed.output_folder(output) as own, locks.exclusive(own):
        results.print_table(
            results.evaluate_run(
                Path(CHECKPOINT.value),
                output,
                CONFIG.value and config_lib.from_dict(CONFIG.value),
                num_hypotheses=counts,
                data_dir=DATA_DIR.value,
                solver=SOLVER.value,
            )
        )
    print(f"\n{output / 'report.html'}")


if __name__ == "__main__":
    processes.run(main)
