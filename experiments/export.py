"""Writes a trained model as a small checkpoint to give away.

    python -m experiments.export --checkpoint runs/quickstart --output DIR [--half]
    python -m experiments.export --checkpoint runs/quickstart --output DIR --stablehlo

The second writes DIR/stablehlo, too: the sampler as a program for CPU and CUDA that jax runs
without this package, with an example of how (`diffpose_jax.interop.stablehlo`).
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import experiments
from diffpose_jax import inference
from diffpose_jax.evaluation import calibration
from diffpose_jax.interop import stablehlo
from diffpose_jax.io import files

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or one of its steps.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, which must not be there yet.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["raw", "ema"], "Weights to write; default: the configuration's."
)
HALF = flags.DEFINE_bool("half", False, "Whether to write float16, half the bytes.")
STABLEHLO = flags.DEFINE_bool("stablehlo", False, "Whether to write the sampler as StableHLO, too.")
NUM_HYPOTHESES = flags.DEFINE_integer(
    "num_hypotheses",
    None,
    "Hypotheses an image of --stablehlo; default: the configuration's.",
    lower_bound=1,
)
SOLVER = flags.DEFINE_string(
    "solver",
    None,
    "Solver of --stablehlo, such as ddpm or dpm++:8; default: the configuration's, or ddpm.",
)


def main(_: list[str]) -> None:
    """Exports the model."""
    if CHECKPOINT.value is None or OUTPUT.value is None:
        raise app.UsageError(
            "--checkpoint and --output are needed; try --checkpoint runs/quickstart"
        )
    if not STABLEHLO.value and (NUM_HYPOTHESES.value or SOLVER.value):
        raise app.UsageError("--num_hypotheses and --solver are for --stablehlo")
    output = Path(OUTPUT.value)
    model = inference.load(CHECKPOINT.value, WEIGHTS.value)
    sampler = None
    if STABLEHLO.value:
        # Before anything is written: what is wrong with the flags is said here.
        sampler = stablehlo.build(
            model,
            NUM_HYPOTHESES.value or model.config.evaluation.num_hypotheses,
            model.parse_solver(SOLVER.value) if SOLVER.value else model.solver,
        )
    inference.export(model, output, half=HALF.value)
    calibrations = Path(CHECKPOINT.value) / calibration.CALIBRATIONS
    if calibrations.exists():
        files.write_atomic(output / calibration.CALIBRATIONS, calibrations.read_bytes())
    if sampler is not None:
        stablehlo.write(output / "stablehlo", sampler)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    experiments.run(main)
