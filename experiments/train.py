"""Trains a model, evaluates it and writes its report.

    python -m experiments.train --config configs/quickstart.py [--workdir DIR]

Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

import experiments
from diffpose_jax import checkpoints, files, model, results, scalars, training
from diffpose_jax import config as config_lib
from diffpose_jax.data import pipeline

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: that of TFDS.")


def train(config: ml_collections.ConfigDict, workdir: Path, data_dir: str | None = None) -> None:
    """Trains until the last step, from the newest checkpoint if there is one."""
    network = config_lib.call(model.build, config.model, "config.model")
    trainer = training.from_config(network, config.training)
    init_key, train_key, candidate_key = jax.random.split(jax.random.key(config.seed), 3)
    workdir.mkdir(parents=True, exist_ok=True)
    state = trainer.init(init_key)
    with checkpoints.RunCheckpoints(
        workdir / "checkpoints", config, trainer.keep_checkpoints
    ) as saved:
        state = saved.restore_latest(state) or state
        files.write_json(workdir / "config.json", config.to_dict())
        first = int(state.step)
        if first == trainer.num_steps:
            return
        examples = pipeline.load(config.data, "train", data_dir)
        examples, _ = pipeline.hold_out(examples, config.data.calibration_share)
        evidence = pipeline.evidence(
            examples,
            network,
            config.data.predrawn_candidates,
            candidate_key,
            in_memory=config.data.on_device,
        )
        data = pipeline.TrainingData(examples, evidence, config.seed)
        batches = data.dispatches(
            first,
            trainer.num_steps,
            trainer.steps_per_dispatch,
            trainer.batch_size,
            held=config.data.on_device,
        )
        held = data.held() if config.data.on_device else None
        with (
            scalars.ScalarWriter(workdir / "metrics.jsonl", last_step=first) as writer,
            tqdm(total=trainer.num_steps, initial=first, desc="training", unit=" steps") as bar,
        ):
            for new_state, losses in training.run(trainer, state, train_key, batches, held=held):
                step = int(new_state.step)
                loss = float(np.mean(losses, dtype=np.float64))
                learning_rate = float(trainer.learning_rate(step - 1))
                writer.write(step, loss=loss, learning_rate=learning_rate)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step - bar.n)
                if step % trainer.checkpoint_every == 0 or step == trainer.num_steps:
                    saved.save(new_state)


def main(_: list[str]) -> None:
    """Trains, then evaluates."""
    config = CONFIG.value
    if config is None:
        raise app.UsageError("--config is missing; try --config configs/quickstart.py")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(WORKDIR.value or Path("runs") / name)
    start = time.monotonic()
    train(config, workdir, DATA_DIR.value)
    results.print_table(results.evaluate_run(workdir, workdir, config, data_dir=DATA_DIR.value))
    minutes = (time.monotonic() - start) / 60
    print(f"\n{workdir / 'report.html'}, after {minutes:.1f} minutes")


if __name__ == "__main__":
    experiments.run(main)
