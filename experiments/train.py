"""Trains a model, evaluates it and writes its report.

    python -m experiments.train --config configs/quickstart.py [--workdir DIR]

Run again, it goes on where it was stopped: by SIGINT or SIGTERM, after the running steps and a
checkpoint of them; by anything else, at the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from diffpose_jax import config as config_lib
from diffpose_jax import distributed
from diffpose_jax.config import Config, ConfigError
from diffpose_jax.data import pipeline
from diffpose_jax.data.pipeline import TrainingData
from diffpose_jax.io import files, locks, scalars
from diffpose_jax.method import network, sampling
from diffpose_jax.method.diffusion import Schedule
from diffpose_jax.method.network import Params
from diffpose_jax.report import results
from diffpose_jax.training import checkpoints, loop, runs
from diffpose_jax.training.step import Trainer
from experiments import processes

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: that of TFDS.")


def train(config: Config, workdir: Path, data_dir: str | None = None) -> None:
    """Trains until the last step, from the newest checkpoint if there is one.

    Raises:
      Stopped: after SIGINT or SIGTERM; what was trained is saved.
      ConfigError: for a solver that the evaluation could not use, or weights of another model.
      NonFiniteLossError: the step's examples are in nonfinite_step_N.json.
    """
    settings = config.training
    trainer = Trainer(network.build(config.model), settings)
    _check_solver(config, trainer.network.schedule)
    images = distributed.images_of_process(settings.batch_size, "config.training.batch_size")
    init_key, train_key, candidate_key = jax.random.split(jax.random.key(config.seed), 3)
    workdir.mkdir(parents=True, exist_ok=True)
    with checkpoints.RunCheckpoints(
        workdir / "checkpoints", config, settings.keep_checkpoints
    ) as saved:
        state = saved.restore_latest(trainer.init(init_key))
        first = 0 if state is None else int(state.step)
        if first == settings.num_steps:
            runs.write_config(workdir, config)
            return
        trained = _trained_before(config) if state is None else None
        with distributed.first_process_first("data"):
            examples = pipeline.load(config.data, "train", data_dir)
        saved.trains_on(examples.fingerprint)
        start = runs.start_record(
            seed=config.seed, step=first, data_fingerprint=examples.fingerprint
        )
        runs.write_config(workdir, config, start)
        examples, _ = pipeline.hold_out(examples, config.data.calibration_share)
        if state is None:
            new = trainer.init(init_key, examples.pose_mm)
            state = new if trained is None else trainer.start(trained)
        data = pipeline.training_data(
            examples, trainer.network, config.data, candidate_key, config.seed
        )
        batches = data.dispatches(
            first,
            settings.num_steps,
            settings.steps_per_dispatch,
            settings.batch_size,
            images=images,
            selections=config.data.on_device,
        )
        on_device = data.arrays if config.data.on_device else None
        with (
            scalars.ScalarWriter(workdir / "metrics.jsonl", last_step=first) as writer,
            tqdm(
                total=settings.num_steps,
                initial=first,
                desc="training",
                unit=" steps",
                disable=not distributed.is_first(),
            ) as bar,
            _noting_examples(workdir, trainer, data),
            runs.deferred_stop() as signals,
        ):
            for new_state, of_steps in loop.run(trainer, state, train_key, batches, data=on_device):
                step = int(new_state.step)
                loss, grad_norm = (
                    float(np.mean(x, dtype=np.float64)) for x in (of_steps.loss, of_steps.grad_norm)
                )
                learning_rate = float(trainer.learning_rate(step - 1))
                writer.write(step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step - bar.n)
                # Asked once, or a signal in between could end the loop unsaved. A signal to one of
                # several processes stops all of them, after the same step.
                stopping = distributed.max_over_processes(max(signals, default=0))
                is_due = step % settings.checkpoint_every == 0 or step == settings.num_steps
                if is_due or stopping:
                    writer.sync()
                    saved.save(new_state)
                if stopping:
                    signals.append(stopping)
                    saved.wait()
                    break


def _check_solver(config: Config, schedule: Schedule) -> None:
    """Raises ConfigError for a solver that is unknown or that the evaluation could not use."""
    if (
        sampling.needs_errors(schedule, config.evaluation.solver)
        and not config.data.calibration_share
    ):
        raise ConfigError(
            f"config.evaluation.solver = {config.evaluation.solver!r} needs errors measured on"
            " recordings that are held out of the training: set config.data.calibration_share, such"
            " as 0.1, or take another solver"
        )


def _trained_before(config: Config) -> Params | None:
    """The weights that `config.training.init_from` names, if it names any.

    Raises:
      CheckpointError: if they cannot be read.
      ConfigError: if they are of another model.
    """
    folder = config.training.init_from
    if not folder:
        return None
    found = checkpoints.load(folder)
    theirs, ours = (dataclasses.asdict(model) for model in (found.config.model, config.model))
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        fields = ", ".join(f"config.model.{name}={theirs[name]!r}" for name in differing)
        raise ConfigError(
            f"config.training.init_from: the weights of {folder} are of another model; set {fields}"
        )
    return found.params


@contextlib.contextmanager
def _noting_examples(workdir: Path, trainer: Trainer, data: TrainingData) -> Iterator[None]:
    """Writes down which examples were in the batch of a step that went wrong."""
    try:
        yield
    except loop.NonFiniteLossError as error:
        rows = data.select(error.step - 1, 1, trainer.config.batch_size).rows[0]
        content = {
            "step": error.step,
            error.what: str(error.value),
            "learning_rate": float(trainer.learning_rate(error.step - 1)),
            "examples": data.examples.names[rows].tolist(),
        }
        path = files.write_json(workdir / f"nonfinite_step_{error.step}.json", content)
        error.add_note(f"the examples of its batch are listed in {path}")
        raise


def main(_: list[str]) -> None:
    """Trains, then evaluates."""
    if CONFIG.value is None:
        raise app.UsageError("--config is missing; try --config configs/quickstart.py")
    config = config_lib.from_dict(CONFIG.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(WORKDIR.value or Path("runs") / name)
    start = time.monotonic()
    with distributed.output_folder(workdir) as own, locks.exclusive(own):
        train(config, own, DATA_DIR.value)
        results.print_table(results.evaluate_run(workdir, workdir, config, data_dir=DATA_DIR.value))
    minutes = (time.monotonic() - start) / 60
    print(f"\n{workdir / 'report.html'}, after {minutes:.1f} minutes")


if __name__ == "__main__":
    processes.run(main)
