"""Fits to pictures of people whose joints are known: the simulated detector, or a model's radius.

    python -m experiments.calibrate --what simulator --source pictures.npz --detector DIR
        --output DIR
    python -m experiments.calibrate --what radius --source pictures.npz --detector DIR
        --checkpoint runs/quickstart --output DIR

`diffpose_jax.data.labelled` says what the file holds. The first writes simulator.json, the fields
of `config.data.builder.simulator`, and simulator.png, real and simulated heatmaps side by side. The
second writes an export of the model whose radius holds on such pictures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

import experiments
from diffpose_jax import detectors, inference
from diffpose_jax.config import ConfigError
from diffpose_jax.data import labelled, simulator_fit
from diffpose_jax.data.labelled import LabelledPeople
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.data.simulator import SimulatorConfig
from diffpose_jax.data.simulator_fit import Labelled
from diffpose_jax.evaluation import calibration, fitting
from diffpose_jax.io import files
from diffpose_jax.report import figures

WHAT = flags.DEFINE_enum("what", None, ["simulator", "radius"], "What is fitted.")
SOURCE = flags.DEFINE_string("source", None, "File of labelled pictures.")
DETECTOR = flags.DEFINE_string("detector", None, "Folder of a detector.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run or export whose radius is fitted.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")


def main(_: list[str]) -> None:
    """Fits one or the other."""
    if not (WHAT.value and SOURCE.value and DETECTOR.value and OUTPUT.value):
        raise app.UsageError("--what, --source, --detector and --output are needed")
    if (WHAT.value == "radius") != (CHECKPOINT.value is not None):
        raise app.UsageError("--checkpoint is needed for --what radius, and only for it")
    people = labelled.read(SOURCE.value)
    found = people.detect(detectors.load(DETECTOR.value))
    if WHAT.value == "simulator":
        _simulator(found, Path(OUTPUT.value))
    else:
        _radius(people, found, Path(OUTPUT.value))


def _simulator(found: Labelled, output: Path) -> None:
    config, real, simulated = simulator_fit.fit(np.random.default_rng(0), found, SimulatorConfig())
    fields = dataclasses.asdict(config)
    files.write_json(output / "simulator.json", fields)
    figures.save(figures.plot_detector(real, simulated), output / "simulator.png")
    wanted, reached = simulator_fit.summary(real), simulator_fit.summary(simulated)
    print(f"{'':20}{'value':>10}{'measured':>10}{'simulated':>10}")
    for name in wanted:
        print(f"{name:20}{fields[name]:10.4g}{wanted[name]:10.4g}{reached[name]:10.4g}")
    print(f"{output / 'simulator.json'}")


def _radius(people: LabelledPeople, found: Labelled, output: Path) -> None:
    model = inference.load(str(CHECKPOINT.value))
    settings = model.config.evaluation
    try:
        poses_mm = people.poses_mm(model.config.data.axes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    known = np.asarray(people.is_valid.any(axis=0))
    examples = Examples(
        pose_mm=poses_mm.astype(np.float32),
        clips=people.moments,
        names=people.moments.astype(str),
        heatmaps=lambda rows: found.heatmaps[rows],
    ).select(np.flatnonzero(people.is_valid[:, known].all(axis=1)))
    if len(examples) == 0:
        raise ConfigError(f"{people.path}: in no picture all joints are valid that are in some")
    fitted = fitting.fit_calibration(jax.random.key(0), model, examples, settings)
    # A joint that is labelled nowhere gets what the others have.
    others = np.median(np.asarray(fitted.factor)[1:][known[1:]])
    factor = np.where(known, fitted.factor, others).astype(np.float32)
    fitted = dataclasses.replace(fitted, factor=factor)
    inference.export(model, output)
    fitted_on = {
        "source": people.path.name,
        "solver": model.solver.name,
        "num_hypotheses": settings.num_hypotheses,
    }
    calibration.write_calibration(output, settings.pose, fitted, fitted_on)
    print(f"{output}: {fitted.meaning}")


if __name__ == "__main__":
    experiments.run(main)
